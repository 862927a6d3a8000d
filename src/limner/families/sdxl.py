"""Stable Diffusion XL (arXiv:2307.01952): two CLIP text encoders; the UNet reads sizes and crop."""

from typing import Any

from limner.families import sd
from limner.families.family import Family
from limner.families.sd import OTHER_CONDITIONS, SD
from limner.families.text import encode_chunks, mask_argument
from limner.protocols import BaseConfigs, TextEncoders


def encode_text(encoders: TextEncoders, ids: dict[str, Any]) -> dict[str, Any]:
    """Return both encoders' states before the last layer, and the second's projected embedding.

    The states are joined along the last axis, [n, tokens, width + width_2].
    """
    first, _ = encode_chunks(encoders, "text_encoder", ids["tokenizer"], skip=1)
    second, pooled = encode_chunks(encoders, "text_encoder_2", ids["tokenizer_2"], skip=1)
    return {"context": encoders.concat_features([first, second]), "pooled": pooled}


def network_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the caption's states, its pooled embedding, and the six numbers of section 2.2.

    These are original size, crop corner and target size, each (height, width) in pixels.
    """
    return {
        "encoder_hidden_states": batch["context"],
        "added_cond_kwargs": {"text_embeds": batch["pooled"], "time_ids": batch["size_and_crop"]},
    } | mask_argument(batch)


def check_configs(configs: BaseConfigs) -> list[str]:
    """Check that the UNet takes latents, both encoders' states, the embedding and six numbers."""
    unet = configs["unet"]
    problems = sd.check_latent_channels(configs)
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
    trained_component="unet",
    components={
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "",
    },
    encode_image=sd.encode_image,
    encode_text=encode_text,
    clean_latents=sd.clean_latents,
    latent_features=SD.latent_features,
    network_inputs=network_inputs,
    lora_targets=SD.lora_targets | {"text_encoder_2": SD.lora_targets["text_encoder"]},
    card_tag="stable-diffusion-xl",
    tokenizers=("tokenizer", "tokenizer_2"),
    text_components=("text_encoder", "text_encoder_2"),
    incompatibilities=check_configs,
    zeros_for_empty_prompt=uses_zeros_for_empty_prompt,
)
