"""Stable Diffusion 1.x and 2.x: a UNet on the latents of a KL autoencoder, told of the caption by
one CLIP text encoder."""

from typing import Any

import numpy as np

from limner.families.family import Family
from limner.families.text import encode_chunks, mask_argument
from limner.protocols import Configs, Encoders, Features, TextEncoders


def encode_image(parts: Encoders, pixels: np.ndarray) -> Features:
    """The posterior's mean and standard deviation, never a draw from it: deterministic, so that
    caching it is exact."""
    mean, std = parts.encode_vae("vae", pixels)
    return {"mean": mean, "std": std}


def encode_text(encoders: TextEncoders, ids: dict[str, Any]) -> dict[str, Any]:
    """The last hidden state of the text encoder, all tokens of it."""
    return {"context": encode_chunks(encoders, "text_encoder", ids["tokenizer"])[0]}


def clean_latents(features: Features, configs: Configs, normal: np.ndarray) -> np.ndarray:
    """Latents: a draw from the posterior, scaled to about unit variance."""
    return (features["mean"] + features["std"] * normal) * np.float32(
        configs["vae"].get("scaling_factor", 0.18215)
    )


def check_latent_channels(configs: Configs) -> list[str]:
    """The UNet must take the autoencoder's latents, and nothing beside them."""
    into, latent = configs["unet"].get("in_channels"), configs["vae"].get("latent_channels")
    kind = (
        "these two are not from the same model, or it is an inpainting or depth model, no "
        "plain text-to-image base"
    )
    return (
        []
        if into == latent
        else [f"unet: in_channels is {into}, the autoencoder's latent_channels is {latent}; {kind}"]
    )


def check_configs(configs: Configs) -> list[str]:
    """The UNet must take the autoencoder's latents and the text encoder's states, and nothing
    else."""
    unet, text_encoder = configs["unet"], configs["text_encoder"]
    out = check_latent_channels(configs)
    width, hidden = unet.get("cross_attention_dim"), text_encoder.get("hidden_size")
    if any(w != hidden for w in (width if isinstance(width, list) else [width])):
        out.append(
            f"unet: cross_attention_dim is {width}, the text encoder's hidden_size is {hidden}; "
            "these two are not from the same model"
        )
    conditions = (
        "addition_embed_type",
        "class_embed_type",
        "encoder_hid_dim_type",
        "num_class_embeds",
        "time_cond_proj_dim",
    )
    if extra := [name for name in conditions if unet.get(name) is not None]:
        out.append(
            f"unet: it is conditioned on more than the caption ({', '.join(extra)}); such a model "
            "is none of this family"
        )
    return out


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    trained_component="unet",
    components={
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "",
    },
    encode_image=encode_image,
    encode_text=encode_text,
    clean_latents=clean_latents,
    latent_features=("mean", "std"),
    network_inputs=lambda batch: {"encoder_hidden_states": batch["context"]} | mask_argument(batch),
    lora_targets={
        "unet": ("to_q", "to_k", "to_v", "to_out.0"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    },
    incompatibilities=check_configs,
)
