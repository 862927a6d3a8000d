"""Kandinsky 2.2 (arXiv:2310.03502), two models: a prior makes a CLIP image embedding of a caption,
a decoder makes a picture of the embedding."""

from typing import Any

import numpy as np

from limner.families.family import Family, Stage
from limner.families.text import encode_chunks
from limner.protocols import Configs, Encoders, Features, TextEncoders

COMBINED_PIPELINE = "KandinskyV22CombinedPipeline"
IMAGE_ENCODER = {
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_processor": "CLIPImageProcessor",
}
IGNORED_SETTINGS = (
    "objective.predict",
    "adapter.text_encoders",
    "data.empty_caption",
    "data.caption_chunks",
)


def clip_image_size(configs: Configs) -> int:
    """Pixels a side of what CLIP's vision tower sees."""
    return int(configs["image_encoder"].get("image_size", 224))


def check_image_processor(configs: Configs) -> list[str]:
    """The processor must show the tower the middle square of the picture, resized by bicubic
    interpolation, as the stock pipelines do."""
    known, side = configs["image_processor"], clip_image_size(configs)
    given = {
        "size": known.get("size", side),
        "crop_size": known.get("crop_size", side),
        "resample": known.get("resample", 3),
        "do_resize": known.get("do_resize", True),
        "do_center_crop": known.get("do_center_crop", True),
        "do_normalize": known.get("do_normalize", True),
    }
    wanted: dict[str, tuple[Any, ...]] = {
        "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}),
        "resample": (3,),
    }
    return [
        f"image_processor: {name} is {value}, {wanted.get(name, (True,))[0]} is expected beside "
        f"an image encoder that sees {side}x{side} pixels"
        for name, value in given.items()
        if value not in wanted.get(name, (True,))
    ]


def embed_image(parts: Encoders, whole: np.ndarray) -> Features:
    """The CLIP image embedding of the whole picture, [n, width]."""
    return {"embedding": parts.encode_image("image_encoder", "image_processor", whole)}


def encode_text(encoders: TextEncoders, ids: dict[str, Any]) -> dict[str, Any]:
    """All last hidden states of the text encoder, and its projected embedding."""
    states, pooled = encode_chunks(encoders, "text_encoder", ids["tokenizer"])
    return {"context": states, "pooled": pooled}


def normalize_embedding(features: Features, configs: Configs, normal: np.ndarray) -> np.ndarray:
    """The image embedding with mean 0 and deviation 1 in every dimension, by the prior's own
    statistics."""
    mean, std = (
        np.asarray(configs["fixed"][name], np.float32).reshape(-1)
        for name in ("clip_mean", "clip_std")
    )
    return ((features["embedding"] - mean) / std).astype(np.float32)


def check_prior(configs: Configs) -> list[str]:
    """The two CLIP towers must be as wide as the prior, and the statistics such that one can divide
    by them."""
    prior, out = configs["prior"], check_image_processor(configs)
    width = prior.get("embedding_dim", 768)
    for part, name in (
        ("text_encoder", "projection_dim"),
        ("text_encoder", "hidden_size"),
        ("image_encoder", "projection_dim"),
    ):
        if (given := configs[part].get(name, 512)) != width:
            out.append(
                f"prior: embedding_dim is {width}, the {part.replace('_', ' ')}'s {name} is "
                f"{given}; these two are not from the same model"
            )
    length, words = (
        prior.get("num_embeddings", 77),
        configs["text_encoder"].get("max_position_embeddings", 77),
    )
    if length != words:
        out.append(
            f"prior: num_embeddings is {length}, the text encoder has {words} positions; these "
            "two are not from the same model"
        )
    deviations = np.asarray(configs.get("fixed", {}).get("clip_std", [1.0]))
    if not (np.isfinite(deviations).all() and (deviations > 0).all()):
        out.append(
            "prior: clip_std is not above 0 everywhere; a prior is needed that knows the mean and "
            "deviation of its image embeddings"
        )
    return out


def encode_decoder_image(parts: Encoders, pixels: np.ndarray, whole: np.ndarray) -> Features:
    """MOVQ latents of the cut picture, and the CLIP image embedding of the whole one; nothing in
    either is drawn."""
    return {"latents": parts.encode_movq("movq", pixels)} | embed_image(parts, whole)


def check_decoder(configs: Configs) -> list[str]:
    """The UNet must take the MOVQ's latents, the image encoder's embedding, and nothing else; it
    may predict a variance beside the noise."""
    unet, out = configs["unet"], check_image_processor(configs)
    latent, into, made = (
        configs["movq"].get("latent_channels", 3),
        unet.get("in_channels", 4),
        unet.get("out_channels", 4),
    )
    if into != latent or made not in (latent, 2 * latent):
        many = (
            f"in_channels is {into} and out_channels {made}, the MOVQ's latent_channels is {latent}"
        )
        out.append(
            f"unet: {many}; {latent} and {2 * latent} are expected. Inpainting and depth models "
            "are none of this family"
        )
    for name, wanted in (("encoder_hid_dim_type", "image_proj"), ("addition_embed_type", "image")):
        if unet.get(name) != wanted:
            out.append(f"unet: {name} is {unet.get(name)}, {wanted} is expected of this family")
    told, width = unet.get("encoder_hid_dim"), configs["image_encoder"].get("projection_dim", 512)
    if told != width:
        out.append(
            f"unet: encoder_hid_dim is {told}, the image encoder's projection_dim is {width}; "
            "these two are not from the same model"
        )
    return out


PRIOR = Family(
    name="kandinsky22-prior",
    pipeline="KandinskyV22PriorPipeline",
    trained_component="prior",
    components={
        "prior": "PriorTransformer",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "",
    }
    | IMAGE_ENCODER,
    encode_image=embed_image,
    encode_text=encode_text,
    clean_latents=normalize_embedding,
    latent_features=("embedding",),
    network_inputs=lambda batch: {
        "proj_embedding": batch["pooled"],
        "encoder_hidden_states": batch["context"],
        "attention_mask": batch["mask"],
    },
    lora_targets={"prior": ("to_q", "to_k", "to_v", "to_out.0")},
    card_tag="kandinsky",
    image_views=("center_square",),
    clip_image_size=clip_image_size,
    stage=Stage("kandinsky22-decoder", {}, COMBINED_PIPELINE, "prior_"),
    frozen_arrays=("clip_mean", "clip_std"),
    ignored_settings=(
        *IGNORED_SETTINGS,
        "data.crop",
        "data.crop_variants",
        "data.buckets",
        "objective.noise_offset",
    ),
    uses_attention_mask=True,
    image_components=tuple(IMAGE_ENCODER),
    incompatibilities=check_prior,
)
DECODER = Family(
    name="kandinsky22-decoder",
    pipeline="KandinskyV22Pipeline",
    trained_component="unet",
    components={"unet": "UNet2DConditionModel", "movq": "VQModel", "scheduler": ""},
    encode_image=encode_decoder_image,
    encode_text=lambda encoders, ids: {},
    clean_latents=lambda features, configs, normal: features["latents"],
    latent_features=("latents",),
    network_inputs=lambda batch: {
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": batch["embedding"]},
    },
    lora_targets={"unet": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")},
    card_tag="kandinsky",
    image_views=("crop", "center_square"),
    clip_image_size=clip_image_size,
    stage=Stage("kandinsky22-prior", IMAGE_ENCODER, COMBINED_PIPELINE, ""),
    ignored_settings=(*IGNORED_SETTINGS, "data.caption", "data.drop_caption"),
    tokenizers=(),
    text_components=(),
    image_components=("movq", *IMAGE_ENCODER),
    incompatibilities=check_decoder,
)
