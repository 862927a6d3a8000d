"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a transformer on latents of 16 channels.

Its captions come from two CLIPs and a T5, and it was trained as a rectified flow.
"""

from typing import Any

import numpy as np

from limner.families import sd
from limner.families.family import Family, Images, Network
from limner.families.text import Text, TextInput, encode_chunks
from limner.protocols import BaseConfigs, Features, TextEncoders

CLIP_L = TextInput("text_encoder", "tokenizer", skip_layers=1)
CLIP_G = TextInput("text_encoder_2", "tokenizer_2", skip_layers=1)
# The stock pipeline's max_sequence_length.
T5 = TextInput("text_encoder_3", "tokenizer_3", length=256)


def encode_text(encoders: TextEncoders, ids: dict[str, Any]) -> dict[str, Any]:
    """Return the states of all three encoders, one after the other, and both CLIPs' embeddings.

    CLIP's are joined along their width and filled with zeros up to T5's: [n, 77 + 256, width].
    """
    first, pooled = encode_chunks(encoders, CLIP_L, ids)
    second, pooled_2 = encode_chunks(encoders, CLIP_G, ids)
    states, _ = encode_chunks(encoders, T5, ids)
    clip = encoders.concat([first, second], axis=-1)
    return {
        "context": encoders.concat([encoders.pad_width(clip, states.shape[-1]), states], axis=1),
        "pooled": encoders.concat([pooled, pooled_2], axis=-1),
    }


def clean_latents(features: Features, configs: BaseConfigs, normal: np.ndarray) -> np.ndarray:
    """Draw latents from the posterior, shifted and scaled to about mean 0 and variance 1."""
    vae = configs["vae"]
    shift = np.float32(vae.get("shift_factor") or 0)
    scale = np.float32(vae.get("scaling_factor", 0.18215))
    return (features["mean"] + features["std"] * normal - shift) * scale


def count_pixels(configs: BaseConfigs) -> int:
    """Return the pixels a side of one token: those of a latent, times the latents of a patch."""
    halvings = len(configs["vae"].get("block_out_channels", (64,))) - 1
    return int(configs["transformer"].get("patch_size", 2)) << halvings


def count_positions(configs: BaseConfigs) -> int:
    """Return the tokens a side for which the transformer has positions."""
    return int(configs["transformer"].get("pos_embed_max_size") or 96)


def enter(x: Any, timestep: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the transformer."""
    return {
        "hidden_states": x,
        "timestep": timestep,
        "encoder_hidden_states": batch["context"],
        "pooled_projections": batch["pooled"],
    }


def check_configs(configs: BaseConfigs) -> list[str]:
    """Check that the transformer takes the autoencoder's latents, and the encoders' widths."""
    transformer, vae = configs["transformer"], configs["vae"]
    first, second, t5 = (configs[one.encoder] for one in (CLIP_L, CLIP_G, T5))
    t5_width = t5.get("d_model", 512)
    latents = vae.get("latent_channels", 4), "the autoencoder's latent_channels"
    rows = [
        ("in_channels", 16, *latents),
        ("out_channels", 16, *latents),
        ("joint_attention_dim", 4096, t5_width, "the third text encoder's d_model"),
        (
            "pooled_projection_dim",
            2048,
            first.get("projection_dim", 512) + second.get("projection_dim", 512),
            "the projection_dim of both CLIPs together",
        ),
    ]
    problems = sd.check_pixels("vae", configs) + sd.check_scaling(configs, ("shift_factor",))
    shift = vae.get("shift_factor")
    if not isinstance(shift, int | float) or not -1e9 < shift < 1e9:
        problems.append(
            f"vae: shift_factor is {shift}, a number is expected: the stock pipeline adds it"
        )
    problems += [
        f"transformer: {name} is {transformer.get(name, usual)}, {what} is {expected}; these are "
        "not from the same model"
        for name, usual, expected, what in rows
        if transformer.get(name, usual) != expected
    ]
    clip_width = first.get("hidden_size", 512) + second.get("hidden_size", 512)
    if clip_width > t5_width:
        problems.append(
            f"text encoders: the hidden_size of both CLIPs is {clip_width} together, which is more "
            f"than the third's d_model, {t5_width}; these are not from the same model"
        )
    return problems


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    components={
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
        "transformer": "SD3Transformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    },
    images=Images(
        ("vae",),
        sd.encode_image,
        clean_latents,
        latent_features=("mean", "std"),
        pixel_multiple=count_pixels,
        longest_side=lambda configs: count_positions(configs) * count_pixels(configs),
    ),
    text=Text((CLIP_L, CLIP_G, T5), encode_text),
    # Positions are a table of sines, which diffusers keeps among the weights.
    network=Network("transformer", enter, frozen_arrays=("pos_embed.pos_embed",)),
    lora_targets={
        "transformer": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        )
    },
    lacks=("prediction types", "trainable text encoders", "caption chunks"),
    incompatibilities=check_configs,
    card_tag="stable-diffusion-3.5",
)
