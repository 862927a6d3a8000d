"""Stable Diffusion XL (arXiv:2307.01952): two CLIP text encoders; the UNet reads sizes and crop."""

from dataclasses import replace

import numpy as np

from limner.families import sd
from limner.families.family import Family, Network
from limner.families.sd import OTHER_CONDITIONS, SD
from limner.families.text import Text, TextInput, encode_chunks
from limner.protocols import Arguments, Array, BaseConfigs, Features, TextEncoders

STATISTICS = ("latents_mean", "latents_std")
CLIP_L = TextInput("text_encoder", "tokenizer", skip_layers=1)
CLIP_G = TextInput("text_encoder_2", "tokenizer_2", skip_layers=1)


def encode_text(encoders: TextEncoders, ids: dict[str, Array]) -> dict[str, Array]:
    """Return both encoders' states before the last layer, and the second's projected embedding.

    The states are joined along the last axis, [n, tokens, width + width_2].
    """
    first, _ = encode_chunks(encoders, CLIP_L, ids)
    second, pooled = encode_chunks(encoders, CLIP_G, ids)
    return {"context": encoders.concat([first, second], axis=-1), "pooled": pooled}


def enter(x: Array, timestep: Array, batch: dict[str, Array]) -> Arguments:
    """Return the arguments of the UNet, with the pooled caption and the numbers of section 2.2.

    These are original size, crop corner and target size, each (height, width) in pixels.
    """
    added = {"text_embeds": batch["pooled"], "time_ids": batch["size_and_crop"]}
    return sd.enter(x, timestep, batch) | {"added_cond_kwargs": added}


def check_configs(configs: BaseConfigs) -> list[str]:
    """Check that the UNet takes latents, both encoders' states, the embedding and six numbers."""
    unet = configs["unet"]
    problems = sd.check_latent_channels(configs)
    problems += sd.check_scaling(configs, STATISTICS) + check_statistics(configs)
    width = unet.get("cross_attention_dim")
    hidden_size = sum(
        configs[name].get("hidden_size", 0) for name in ("text_encoder", "text_encoder_2")
    )
    if width != hidden_size:
        problems.append(
            f"unet: cross_attention_dim is {width}, the hidden_size of both text encoders "
            f"together is {hidden_size}; these are not from the same model"
        )
    problems += check_added_embedding(configs)
    others = [name for name in OTHER_CONDITIONS if unet.get(name) is not None]
    if others:
        problems.append(
            "unet: it is conditioned on more than this family's captions, sizes and crops "
            f"({', '.join(others)})"
        )
    return problems


def read_statistics(configs: BaseConfigs) -> tuple[Array, Array] | None:
    """Return the mean and deviation of each channel of the autoencoder's latents, float32
    [channels, 1, 1]; None where it says none, or one of them only, as in the stock pipeline."""
    values = [configs["vae"].get(name) for name in STATISTICS]
    if None in values:
        return None
    mean, std = (np.asarray(value, np.float32).reshape(-1, 1, 1) for value in values)
    return mean, std


def clean_latents(features: Features, configs: BaseConfigs, normal: np.ndarray) -> np.ndarray:
    """Draw latents from the posterior, brought to about mean 0 and variance 1."""
    statistics = read_statistics(configs)
    if statistics is None:
        return sd.clean_latents(features, configs, normal)
    mean, std = statistics
    drawn = features["mean"] + features["std"] * normal
    return (drawn - mean) * (np.float32(configs["vae"].get("scaling_factor", 0.18215)) / std)


def decode_latents(x0: Array, configs: BaseConfigs) -> Array:
    """Return the inverse of ``clean_latents``: what the autoencoder decodes."""
    scale = np.float32(configs["vae"].get("scaling_factor", 0.18215))
    statistics = read_statistics(configs)
    return x0 / scale if statistics is None else x0 * (statistics[1] / scale) + statistics[0]


def check_statistics(configs: BaseConfigs) -> list[str]:
    """Check the mean and deviation of the autoencoder's latents, where it says any."""
    vae = configs["vae"]
    given = {name: vae.get(name) for name in STATISTICS if vae.get(name) is not None}
    channels = vae.get("latent_channels", 4)
    problems = [
        f"vae: {name} is {str(value)[:80]}, {channels} finite numbers are expected"
        for name, value in given.items()
        if not is_per_channel(value, channels)
    ]
    if len(given) == 1:
        problems.append(
            f"vae: {next(iter(given))} is given alone; the stock pipeline reads both of "
            f"{' and '.join(STATISTICS)}, or none"
        )
    if not problems and not all(one > 0 for one in given.get("latents_std") or ()):
        problems.append("vae: latents_std is not above 0 everywhere")
    return problems


def is_per_channel(value: object, channels: object) -> bool:
    """Return whether a setting is a finite number for each channel."""
    if not isinstance(value, list | tuple) or len(value) != channels:
        return False
    return all(type(one) in (int, float) and -1e9 < one < 1e9 for one in value)


def check_added_embedding(configs: BaseConfigs) -> list[str]:
    """Check the width of the embedding of the pooled caption and the six numbers."""
    unet = configs["unet"]
    kind = unet.get("addition_embed_type")
    if kind != "text_time":
        return [f"unet: addition_embed_type is {kind}, text_time is expected of this family"]
    width = unet.get("projection_class_embeddings_input_dim")
    pooled_width = configs["text_encoder_2"].get("projection_dim", 512)
    expected = pooled_width + 6 * (unet.get("addition_time_embed_dim") or 0)
    if width == expected:
        return []
    return [
        f"unet: projection_class_embeddings_input_dim is {width}, the second text encoder's "
        "projection_dim and six numbers of addition_time_embed_dim come to "
        f"{expected}; a refiner or another model is none of this family"
    ]


def uses_zeros_for_empty_prompt(configs: BaseConfigs) -> bool:
    """Return what the pipeline's index says; the stock pipeline takes zeros where it is silent."""
    return bool(configs.model_index.get("force_zeros_for_empty_prompt", True))


SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    components={
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "",
    },
    images=replace(SD.images, clean_latents=clean_latents),
    text=Text((CLIP_L, CLIP_G), encode_text, zeros_for_empty_prompt=uses_zeros_for_empty_prompt),
    network=Network("unet", enter),
    lora_targets=SD.lora_targets | {"text_encoder_2": SD.lora_targets["text_encoder"]},
    card_tag="stable-diffusion-xl",
    incompatibilities=check_configs,
    pipeline_options=lambda configs: {
        "force_zeros_for_empty_prompt": uses_zeros_for_empty_prompt(configs),
        "add_watermarker": False,
    },
)
