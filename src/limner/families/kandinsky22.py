"""Kandinsky 2.2 (arXiv:2310.03502), a model in two stages.

The prior makes a CLIP image embedding of a caption, the decoder makes a picture of the embedding.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from limner.config.declare import Need
from limner.families.family import Family, Images, Network, Stage
from limner.families.sd import CLIP, check_pixels
from limner.families.text import Text, encode_chunks
from limner.protocols import Arguments, Array, BaseConfigs, Encoders, Features, TextEncoders

COMBINED_PIPELINE = "KandinskyV22CombinedPipeline"
IMAGE_ENCODER = {
    "image_encoder": "CLIPVisionModelWithProjection",
    "image_processor": "CLIPImageProcessor",
}
LACKS: tuple[Need, ...] = ("prediction types", "trainable text encoders", "caption chunks")


def get_clip_image_size(configs: BaseConfigs) -> int:
    """Return the pixels a side of the pictures that the image encoder takes."""
    return int(configs["image_encoder"].get("image_size", 224))


def check_image_processor(configs: BaseConfigs) -> list[str]:
    """Check that the processor shows the image encoder what Limner shows it.

    That is the middle square of the picture, resized by bicubic interpolation and normalised, as in
    the stock pipelines.
    """
    config = configs["image_processor"]
    side = get_clip_image_size(configs)
    # Setting -> its value where the config is silent, and the values that mean the same.
    expected: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "size": (side, (side, {"shortest_edge": side})),
        "crop_size": (side, (side, {"height": side, "width": side})),
        "resample": (3, (3,)),
        "do_resize": (True, (True,)),
        "do_center_crop": (True, (True,)),
        "do_normalize": (True, (True,)),
    }
    problems = []
    for name, (default, values) in expected.items():
        value = config.get(name, default)
        if value not in values:
            problems.append(
                f"image_processor: {name} is {value}, {default} is expected with an image encoder "
                f"that sees {side}x{side} pixels"
            )
    return problems


def embed_image(encoders: Encoders, square: np.ndarray) -> Features:
    """Return the CLIP image embedding of the middle square of the picture, [n, width]."""
    return {"embedding": encoders.encode_image("image_encoder", "image_processor", square)}


def encode_text(encoders: TextEncoders, ids: dict[str, Array]) -> dict[str, Array]:
    """Return the text encoder's last hidden states of all tokens, and its projected embedding."""
    states, pooled = encode_chunks(encoders, CLIP, ids)
    return {"context": states, "pooled": pooled}


def normalize_embedding(features: Features, configs: BaseConfigs, normal: np.ndarray) -> np.ndarray:
    """Scale the image embedding to mean 0 and deviation 1, by the statistics of the prior."""
    mean = np.asarray(configs.statistics["clip_mean"], np.float32).reshape(-1)
    std = np.asarray(configs.statistics["clip_std"], np.float32).reshape(-1)
    return ((features["embedding"] - mean) / std).astype(np.float32)


def check_prior(configs: BaseConfigs) -> list[str]:
    """Check the widths of both CLIP encoders, and that one can divide by the statistics."""
    prior = configs["prior"]
    problems = check_image_processor(configs)
    width = prior.get("embedding_dim", 768)
    for component, name in (
        ("text_encoder", "projection_dim"),
        ("text_encoder", "hidden_size"),
        ("image_encoder", "projection_dim"),
    ):
        component_width = configs[component].get(name, 512)
        if component_width != width:
            problems.append(
                f"prior: embedding_dim is {width}, the {component.replace('_', ' ')}'s {name} is "
                f"{component_width}; these two are not from the same model"
            )
    length = prior.get("num_embeddings", 77)
    positions = configs["text_encoder"].get("max_position_embeddings", 77)
    if length != positions:
        problems.append(
            f"prior: num_embeddings is {length}, the text encoder has {positions} positions; "
            "these two are not from the same model"
        )
    # The statistics are read last: configs are also checked before there are weights to read.
    std = configs.statistics.get("clip_std", np.ones(1))
    if not (np.isfinite(std).all() and (std > 0).all()):
        problems.append(
            "prior: clip_std is not above 0 everywhere; a prior is needed that knows the mean and "
            "deviation of its image embeddings"
        )
    return problems


def encode_decoder_image(encoders: Encoders, pixels: np.ndarray, square: np.ndarray) -> Features:
    """Return MOVQ latents of the cropped picture, and the CLIP image embedding of its square.

    Nothing is drawn from a distribution, so that both can be cached.
    """
    latents = encoders.encode_movq("movq", pixels)
    return {"latents": latents} | embed_image(encoders, square)


def check_decoder(configs: BaseConfigs) -> list[str]:
    """Check that the UNet takes the MOVQ's latents and the image embedding, and nothing else.

    It may predict a variance besides the noise.
    """
    unet = configs["unet"]
    problems = check_image_processor(configs) + check_pixels("movq", configs)
    latent_channels = configs["movq"].get("latent_channels", 3)
    in_channels = unet.get("in_channels", 4)
    out_channels = unet.get("out_channels", 4)
    if in_channels != latent_channels or out_channels not in (latent_channels, 2 * latent_channels):
        problems.append(
            f"unet: in_channels is {in_channels} and out_channels {out_channels}, the MOVQ's "
            f"latent_channels is {latent_channels}; {latent_channels} and {2 * latent_channels} "
            "are expected. Inpainting and depth models are none of this family"
        )
    for name, wanted in (("encoder_hid_dim_type", "image_proj"), ("addition_embed_type", "image")):
        if unet.get(name) != wanted:
            problems.append(
                f"unet: {name} is {unet.get(name)}, {wanted} is expected of this family"
            )
    unet_width = unet.get("encoder_hid_dim")
    embedding_width = configs["image_encoder"].get("projection_dim", 512)
    if unet_width != embedding_width:
        problems.append(
            f"unet: encoder_hid_dim is {unet_width}, the image encoder's projection_dim is "
            f"{embedding_width}; these two are not from the same model"
        )
    return problems


def count_pixels(configs: BaseConfigs) -> int:
    """Return what the sides of a picture are multiples of.

    The UNet halves latents evenly or not at all, and the stock pipeline draws multiples of as many
    latents as a latent has pixels.
    """
    halvings = len(configs["unet"].get("block_out_channels", (0,) * 4)) - 1
    latent = 1 << (len(configs["movq"].get("block_out_channels", (64,))) - 1)
    return latent * max(latent, 1 << halvings)


def enter_prior(x: Array, timestep: Array, batch: dict[str, Array]) -> Arguments:
    """Return the arguments of the prior: the noisy embedding, and the caption's features."""
    return {
        "hidden_states": x,
        "timestep": timestep,
        "proj_embedding": batch["pooled"],
        "encoder_hidden_states": batch["context"],
        "attention_mask": batch["mask"],
    }


def enter_decoder(x: Array, timestep: Array, batch: dict[str, Array]) -> Arguments:
    """Return the arguments of the UNet: latents, timestep and the image embedding."""
    return {
        "sample": x,
        "timestep": timestep,
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": batch["embedding"]},
    }


def draw_with_both(prompt: str) -> Sequence[str]:
    """Return the lines of example code that draw with a prior and a decoder."""
    return (
        f"image_embeds, negative_image_embeds = prior({prompt}).to_tuple()",
        "image = decoder(image_embeds=image_embeds, "
        "negative_image_embeds=negative_image_embeds).images[0]",
    )


PRIOR = Family(
    name="kandinsky22-prior",
    pipeline="KandinskyV22PriorPipeline",
    components={
        "prior": "PriorTransformer",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "scheduler": "",
    }
    | IMAGE_ENCODER,
    images=Images(
        tuple(IMAGE_ENCODER),
        embed_image,
        normalize_embedding,
        latent_features=("embedding",),
        views=("center_square",),
        clip_size=get_clip_image_size,
        statistics=("clip_mean", "clip_std"),
    ),
    text=Text((CLIP,), encode_text, uses_mask=True),
    network=Network("prior", enter_prior, frozen_arrays=("clip_mean", "clip_std")),
    lora_targets={"prior": ("to_q", "to_k", "to_v", "to_out.0")},
    stage=Stage(
        "kandinsky22-decoder",
        {},
        COMBINED_PIPELINE,
        prefix="prior_",
        part="prior_pipe",
        variable="prior",
        draw=draw_with_both,
    ),
    lacks=(*LACKS, "spatial latents"),
    incompatibilities=check_prior,
    card_tag="kandinsky",
)
DECODER = Family(
    name="kandinsky22-decoder",
    pipeline="KandinskyV22Pipeline",
    components={"unet": "UNet2DConditionModel", "movq": "VQModel", "scheduler": ""},
    images=Images(
        ("movq", *IMAGE_ENCODER),
        encode_decoder_image,
        lambda features, configs, normal: features["latents"],
        latent_features=("latents",),
        views=("crop", "center_square"),
        clip_size=get_clip_image_size,
        pixel_multiple=count_pixels,
    ),
    text=Text(),
    network=Network("unet", enter_decoder),
    lora_targets={"unet": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")},
    stage=Stage(
        "kandinsky22-prior",
        IMAGE_ENCODER,
        COMBINED_PIPELINE,
        prefix="",
        part="decoder_pipe",
        variable="decoder",
        draw=draw_with_both,
        card_key="prior",
    ),
    lacks=(*LACKS, "captions"),
    incompatibilities=check_decoder,
    card_tag="kandinsky",
)
