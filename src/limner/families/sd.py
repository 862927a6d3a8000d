"""Stable Diffusion 1.x and 2.x: a UNet on latents of a KL autoencoder, with one text encoder."""

import numpy as np

from limner.families.family import Family, Images, Network
from limner.families.text import Text, TextInput, encode_chunks, mask_argument
from limner.protocols import Arguments, Array, BaseConfigs, Encoders, Features, TextEncoders

CLIP = TextInput("text_encoder", "tokenizer")
# What a UNet may be conditioned on besides the caption.
OTHER_CONDITIONS = (
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


def encode_image(encoders: Encoders, pixels: np.ndarray) -> Features:
    """Return the mean and standard deviation of the autoencoder's posterior."""
    # Never a draw from the posterior: what is deterministic can be cached without changing a bit.
    mean, std = encoders.encode_vae("vae", pixels)
    return {"mean": mean, "std": std}


def encode_text(encoders: TextEncoders, ids: dict[str, Array]) -> dict[str, Array]:
    """Return the last hidden state of the text encoder, for all tokens."""
    context, _ = encode_chunks(encoders, CLIP, ids)
    return {"context": context}


def clean_latents(features: Features, configs: BaseConfigs, normal: np.ndarray) -> np.ndarray:
    """Draw latents from the posterior, scaled to about unit variance."""
    scale = np.float32(configs["vae"].get("scaling_factor", 0.18215))
    return (features["mean"] + features["std"] * normal) * scale


def check_scaling(configs: BaseConfigs, honoured: tuple[str, ...] = ()) -> list[str]:
    """Check the numbers by which latents are scaled; those that a stock pipeline leaves out must
    change nothing.

    Args:
        honoured: the names of those that this family's stock pipeline reads.
    """
    vae = configs["vae"]
    problems = []
    scale = vae.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or not 0 < scale < 1e9:
        problems.append(f"vae: scaling_factor is {scale}, a number above 0 is expected")
    for name, neutral in (("latents_mean", 0), ("latents_std", 1), ("shift_factor", 0)):
        value = vae.get(name)
        values = value if isinstance(value, list | tuple) else [value]
        is_neutral = all(type(one) is not bool and one == neutral for one in values)
        if name not in honoured and value is not None and not is_neutral:
            problems.append(
                f"vae: {name} is {str(value)[:80]}, of which this family's stock pipeline knows "
                "nothing; choose an autoencoder that was made for it"
            )
    return problems


def check_pixels(autoencoder: str, configs: BaseConfigs) -> list[str]:
    """Check that an autoencoder takes and gives pictures of three channels."""
    config = configs[autoencoder]
    return [
        f"{autoencoder}: {name} is {str(config[name])[:80]}; pictures have 3 channels"
        for name in ("in_channels", "out_channels")
        if config.get(name, 3) != 3
    ]


def enter(x: Array, timestep: Array, batch: dict[str, Array]) -> Arguments:
    """Return the arguments of the UNet: latents, timestep and the caption's states."""
    return {
        "sample": x,
        "timestep": timestep,
        "encoder_hidden_states": batch["context"],
    } | mask_argument(batch)


def check_latent_channels(configs: BaseConfigs) -> list[str]:
    """Check that the UNet takes and gives the autoencoder's latents, and nothing besides them."""
    latent_channels = configs["vae"].get("latent_channels")
    problems = check_pixels("vae", configs)
    for name in ("in_channels", "out_channels"):
        channels = configs["unet"].get(name, 4)
        if channels != latent_channels:
            problems.append(
                f"unet: {name} is {channels}, the autoencoder's latent_channels is "
                f"{latent_channels}; these two are not from the same model, or it is an inpainting "
                "or depth model, no plain text-to-image base"
            )
    return problems


def check_configs(configs: BaseConfigs) -> list[str]:
    """Check that the UNet takes latents and the text encoder's states, and nothing else."""
    unet = configs["unet"]
    problems = check_latent_channels(configs) + check_scaling(configs)
    width = unet.get("cross_attention_dim")
    hidden_size = configs["text_encoder"].get("hidden_size")
    if any(w != hidden_size for w in (width if isinstance(width, list) else [width])):
        problems.append(
            f"unet: cross_attention_dim is {width}, the text encoder's hidden_size is "
            f"{hidden_size}; these two are not from the same model"
        )
    conditions = ("addition_embed_type", *OTHER_CONDITIONS)
    others = [name for name in conditions if unet.get(name) is not None]
    if others:
        problems.append(
            f"unet: it is conditioned on more than the caption ({', '.join(others)}); such a model "
            "is none of this family"
        )
    return problems


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    components={
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "",
    },
    images=Images(("vae",), encode_image, clean_latents, latent_features=("mean", "std")),
    text=Text((CLIP,), encode_text),
    network=Network("unet", enter),
    lora_targets={
        "unet": ("to_q", "to_k", "to_v", "to_out.0"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    },
    incompatibilities=check_configs,
    pipeline_options=lambda configs: {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
)
