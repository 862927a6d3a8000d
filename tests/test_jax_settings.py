"""What a component's config leaves out is what the stock class says, and what there is no code for
is refused in one message."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from limner.errors import InputError

pytestmark = pytest.mark.frameworks

LEVELS = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}
UNETS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "levels alone": LEVELS,
    # As diffusers 0.2 wrote that of Stable Diffusion 1.4.
    "an old one": LEVELS
    | {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "out_channels": 4,
        "sample_size": 64,
    },
    "heads by level": LEVELS | {"attention_head_dim": [2, 4], "use_linear_projection": True},
    "layers by level": LEVELS | {"layers_per_block": [1, 3], "only_cross_attention": [False] * 2},
    "another name of its activation": LEVELS | {"act_fn": "swish"},
    "a wide time": LEVELS | {"time_embedding_dim": 96, "upcast_attention": True},
    "XL": LEVELS
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "transformer_layers_per_block": [1, 2],
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
    },
}
CODERS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "two levels": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "no attention": {"mid_block_add_attention": False, "latent_channels": 3},
    "no quantizing layers": {"use_quant_conv": False, "use_post_quant_conv": False},
}


def list_stock_shapes(class_name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import diffusers
    import torch

    with torch.device("meta"):
        net = getattr(diffusers, class_name).from_config(config)
    return {name: tuple(array.shape) for name, array in net.state_dict().items()}


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        *(("UNet2DConditionModel", config) for config in UNETS.values()),
        *(("AutoencoderKL", config) for config in CODERS.values()),
    ],
)
def test_arrays_are_those_of_the_stock_class(class_name: str, config: dict[str, Any]) -> None:
    from limner.engines.jax.weights import expected_shapes

    assert dict(expected_shapes(class_name, config)) == list_stock_shapes(class_name, config)


def test_text_encoders_with_configs_that_say_little() -> None:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from limner.engines.jax.weights import expected_shapes

    for config in ({}, {"hidden_size": 64, "num_hidden_layers": 2}, {"eos_token_id": 2}):
        with torch.device("meta"):
            net = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        stock = {
            name if name.startswith("text_") else f"text_model.{name}": tuple(array.shape)
            for name, array in net.named_parameters()
        }
        assert dict(expected_shapes("CLIPTextModelWithProjection", config)) == stock


# Of the constructors' settings, those that change nothing that JAX computes.
UNREAD = {
    "UNet2DConditionModel": {
        "sample_size",  # read by the pipeline
        "upcast_attention",  # softmax is float32 always
        "addition_embed_type_num_heads",
    },
    # Latents are scaled and shifted outside the network.
    "AutoencoderKL": {
        *("sample_size", "force_upcast"),
        *("latents_mean", "latents_std", "shift_factor"),
    },
}


@pytest.mark.parametrize("class_name", UNREAD)
def test_defaults_are_those_of_the_stock_class(class_name: str) -> None:
    """And every setting of the class is decided on."""
    import diffusers

    from limner.engines.jax import unet, vae

    module: Any = {"UNet2DConditionModel": unet, "AutoencoderKL": vae}[class_name]
    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    stock = {name: p.default for name, p in signature.parameters.items() if name != "self"}
    assert {name: stock[name] for name in module.DEFAULTS} == module.DEFAULTS
    for name, (first, *_) in module.SERVED_SETTINGS.items():
        assert stock[name] == first or first in stock[name], name
    decided = module.DEFAULTS.keys() | module.SERVED_SETTINGS.keys() | UNREAD[class_name]
    assert stock.keys() == decided


def test_defaults_are_those_of_the_text_encoder() -> None:
    from transformers import CLIPTextConfig

    from limner.engines.jax import clip

    stock = CLIPTextConfig().to_dict()
    assert {name: stock[name] for name in clip.DEFAULTS} == clip.DEFAULTS


@pytest.mark.parametrize(
    ("class_name", "change", "message"),
    [
        ("UNet2DConditionModel", {"only_cross_attention": [True, False]}, "only_cross_attention"),
        ("UNet2DConditionModel", {"num_attention_heads": 8}, "num_attention_heads is 8, None"),
        ("UNet2DConditionModel", {"encoder_hid_dim": 768}, "encoder_hid_dim is 768, None"),
        ("UNet2DConditionModel", {"class_embed_type": "timestep"}, "class_embed_type is"),
        ("UNet2DConditionModel", {"mid_block_type": None}, "mid_block_type is None"),
        ("UNet2DConditionModel", {"mid_block_only_cross_attention": True}, "cross_attention is"),
        ("UNet2DConditionModel", {"act_fn": "gelu"}, "act_fn is 'gelu', 'silu' or 'swish'"),
        ("UNet2DConditionModel", {"down_block_types": ["AttnDownBlock2D"]}, "down_block_types is"),
        ("UNet2DConditionModel", {"attention_head_dim": [5]}, "has 1 values, 4 are expected"),
        ("UNet2DConditionModel", {"block_out_channels": "abc"}, "block_out_channels is 'abc', a"),
        ("UNet2DConditionModel", {"block_out_channels": [64, "x"]}, "block_out_channels is"),
        ("UNet2DConditionModel", {"norm_num_groups": None}, "norm_num_groups is None, a number"),
        ("UNet2DConditionModel", {"layers_per_block": 1.5}, "layers_per_block is 1.5, a number"),
        ("UNet2DConditionModel", {"layers_per_block": 0}, "layers_per_block is 0, a number"),
        ("UNet2DConditionModel", {"cross_attention_dim": [7, 7, 7, 7]}, "one number is expected"),
        (
            "UNet2DConditionModel",
            {"addition_embed_type": "text_time"},
            "addition_time_embed_dim is None, a number",
        ),
        ("AutoencoderKL", {"act_fn": "relu"}, "act_fn is 'relu'"),
        ("AutoencoderKL", {"out_channels": 4}, "out_channels is 4, 3 is expected"),
        ("AutoencoderKL", {"scaling_factor": None}, "scaling_factor is None, a number"),
        ("CLIPTextModel", {"use_attention_mask": True}, "use_attention_mask is True"),
        ("CLIPTextModel", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("CLIPTextModel", {"num_hidden_layers": -1}, "num_hidden_layers is -1, a number"),
        ("CLIPTextModel", {"hidden_size": "512"}, "hidden_size is '512', a number"),
    ],
)
def test_what_there_is_no_code_for_is_refused(
    class_name: str, change: dict[str, Any], message: str
) -> None:
    from limner.engines.jax.weights import expected_shapes

    with pytest.raises(InputError) as refusal:
        expected_shapes(class_name, change)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("version", "side"), [("0.8.0", 64), ("0.6.0.dev0", 64), ("0.9.0.dev0", 16), ("0.42.1", 16)]
)
def test_the_size_of_old_bases_is_that_of_the_stock_pipeline(
    base: Path, tmp_path: Path, version: str, side: int
) -> None:
    import warnings

    from diffusers import StableDiffusionPipeline

    from limner.base_model.open import open_base
    from limner.config.schema import ModelSettings
    from limner.engines.jax.pipeline import latent_side
    from limner.families import FAMILIES

    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"_diffusers_version": version}
    path.write_text(json.dumps(config))
    opened = open_base(ModelSettings(str(folder), "sd"), FAMILIES["sd"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert stock.unet.config.sample_size == latent_side(opened, None) == side
