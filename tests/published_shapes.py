"""Make the table of array shapes that is compared where no engine is installed.

``python tests/published_shapes.py`` writes it. The configs are those of the published models, as
far as shapes depend on them.
"""

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

from limner.base_model.published_shapes import TABLE, fold_names
from limner.engines.torch.weights import build_model, find_class, list_expected
from limner.families import FAMILIES
from limner.families.published import load_published

# Settings of diffusers' classes that no shape depends on.
SHAPELESS = {
    *("self", "sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    *("force_upcast", "act_fn", "dropout", "norm_eps", "upcast_attention", "flip_sin_to_cos"),
    *("freq_shift", "downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"),
    *("center_input_sample", "cross_attention_norm", "clip_sample", "attention_type"),
}
CLIP = ("hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim")
VOCABULARY = {"vocab_size": 49408, "max_position_embeddings": 77}
LARGE = dict(zip(CLIP, (768, 3072, 12, 768), strict=True)) | VOCABULARY
BIG = dict(zip(CLIP, (1280, 5120, 32, 1280), strict=True)) | VOCABULARY
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# MOVQ_CONFIG in diffusers' scripts/convert_kandinsky_to_diffusers.py.
MOVQ = {
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": [*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3],
    "layers_per_block": 2,
    "latent_channels": 4,
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
    "norm_type": "spatial",
}
# Where the UNet of Stable Diffusion 2.x is not that of 1.5: v2-inference.yaml of Stability's
# repository, under diffusers' names.
UNET_2 = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
BIG_VISION = {
    **dict(zip(CLIP, (1664, 8192, 48, 1280), strict=True)),
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


def without_projection(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a text encoder that has none, whatever its width is said to be."""
    return {name: value for name, value in config.items() if name != "projection_dim"}


PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("transformers", "CLIPTextModel", without_projection(LARGE)),  # Stable Diffusion 1.x and XL
    # Stable Diffusion 2.x
    (
        "transformers",
        "CLIPTextModel",
        dict(zip(CLIP[:3], (1024, 4096, 23), strict=True)) | VOCABULARY,
    ),
    ("transformers", "CLIPTextModelWithProjection", LARGE),  # Stable Diffusion 3
    ("transformers", "CLIPTextModelWithProjection", BIG),
    ("transformers", "CLIPVisionModelWithProjection", BIG_VISION),
    ("transformers", "T5EncoderModel", T5),
    ("diffusers", "AutoencoderKL", VAE),
    ("diffusers", "VQModel", MOVQ),
    (
        "diffusers",
        "AutoencoderKL",
        VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    ),
]


def list_published() -> list[tuple[str, str, dict[str, Any]]]:
    """The configs above, and those of every family's network."""
    networks = []
    for family in FAMILIES.values():
        configs = load_published(family.name)
        assert configs is not None
        config = configs[family.network.component]
        networks.append(("diffusers", config["_class_name"], config))
        if family.name == "sd":
            networks.append(("diffusers", config["_class_name"], config | UNET_2))
    return [*PUBLISHED, *networks]


def list_settings(cls: Any, config: dict[str, Any]) -> dict[str, list[Any]]:
    """The settings that shapes depend on: their value, and the class's own."""
    if getattr(cls, "config_class", None) is not None:
        usual = cls.config_class().to_dict()
        return {name: [value, usual.get(name)] for name, value in config.items()}
    parameters = inspect.signature(cls.__init__).parameters
    return {
        name: [config.get(name, parameter.default), parameter.default]
        for name, parameter in parameters.items()
        if name not in SHAPELESS and parameter.default is not inspect.Parameter.empty
    }


def make_table() -> list[dict[str, Any]]:
    """An entry for each published component, without what JSON does not have."""
    table = []
    for library, name, config in list_published():
        cls = find_class(library, name)
        expected = list_expected(build_model(cls, config))
        shapes = {array: list(shape) for array, shape in expected.shapes.items()}
        table.append(
            {
                "class": name,
                "settings": list_settings(cls, config),
                "tied": expected.tied,
                "arrays": fold_names(shapes),
            }
        )
    return json.loads(json.dumps(table))  # type: ignore[no-any-return]


if __name__ == "__main__":
    text = json.dumps(make_table(), separators=(",", ":"))
    data = gzip.compress(text.encode(), mtime=0)
    Path(TABLE).write_bytes(data)
    print(f"{TABLE}: {len(data)} bytes")
