"""Stable Diffusion XL (arXiv:2307.01952): a UNet on latents, told of the caption by two CLIP text
encoders and of how its picture was cut."""

from typing import Any

from limner.families import sd
from limner.families.family import Family
from limner.families.sd import SD
from limner.families.text import encode_chunks, mask_argument
from limner.protocols import Configs, TextEncoders


def encode_text(encoders: TextEncoders, ids: dict[str, Any]) -> dict[str, Any]:
    """The states before the last layer of both encoders, side by side [n, tokens, width + width_2],
    and the second one's projected embedding."""
    first, _ = encode_chunks(encoders, "text_encoder", ids["tokenizer"], skip=1)
    second, pooled = encode_chunks(encoders, "text_encoder_2", ids["tokenizer_2"], skip=1)
    return {"context": encoders.concat_features([first, second]), "pooled": pooled}


def network_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Caption, its pooled embedding, and the six numbers of section 2.2: original size, crop corner
    and target size, each (height, width) in pixels."""
    return {
        "encoder_hidden_states": batch["context"],
        "added_cond_kwargs": {"text_embeds": batch["pooled"], "time_ids": batch["size_and_crop"]},
    } | mask_argument(batch)


def check_configs(configs: Configs) -> list[str]:
    """The UNet must take the autoencoder's latents, both encoders' states, and the pooled embedding
    with six numbers; the two tokenizers go together."""
    unet, first, second = configs["unet"], configs["text_encoder"], configs["text_encoder_2"]
    out = sd.check_latent_channels(configs)
    width, hidden = (
        unet.get("cross_attention_dim"),
        first.get("hidden_size", 0) + second.get("hidden_size", 0),
    )
    if width != hidden:
        out.append(
            f"unet: cross_attention_dim is {width}, the hidden_size of both text encoders "
            f"together is {hidden}; these are not from the same model"
        )
    kind = unet.get("addition_embed_type")
    if kind != "text_time":
        out.append(f"unet: addition_embed_type is {kind}, text_time is expected of this family")
    else:
        told = unet.get("projection_class_embeddings_input_dim")
        given = second.get("projection_dim", 512) + 6 * (unet.get("addition_time_embed_dim") or 0)
        if told != given:
            what = (
                "the second text encoder's projection_dim and six numbers of "
                "addition_time_embed_dim"
            )
            out.append(
                f"unet: projection_class_embeddings_input_dim is {told}, {what} come to {given}; "
                "a refiner or another model is none of this family"
            )
    if extra := [
        name
        for name in (
            "class_embed_type",
            "encoder_hid_dim_type",
            "num_class_embeds",
            "time_cond_proj_dim",
        )
        if unet.get(name) is not None
    ]:
        out.append(
            f"unet: it is conditioned on more than this family tells it ({', '.join(extra)})"
        )
    return out


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
    zeros_for_empty_prompt=lambda configs: bool(
        configs["model_index"].get("force_zeros_for_empty_prompt", True)
    ),
)
