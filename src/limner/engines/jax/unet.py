"""The UNet of Stable Diffusion 1.x, 2.x and XL (arXiv:2112.10752, arXiv:2307.01952).

It is a pure function of its arrays and the component's config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from limner.engines.jax.attention import Array, Kernel
from limner.engines.jax.nn import (
    Params,
    attention,
    conv,
    group_norm,
    layer_norm,
    linear,
    list_shapes,
    pointwise,
    resnet,
    sinusoid,
    upsample,
)
from limner.engines.jax.settings import complete, find_unserved

# Of the settings that would need code of their own, the values that need none; the class's first.
SERVED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    # diffusers' attention_head_dim is the number of heads, and this one has no meaning yet.
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# What the class says where a config does not.
DEFAULTS: dict[str, Any] = {
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "use_linear_projection": False,
}


def find_unsupported(config: dict[str, Any]) -> list[str]:
    """Say which settings of a config there is no code for."""
    config = complete(config, DEFAULTS)
    problems = find_unserved(config, SERVED_SETTINGS, DEFAULTS)
    if problems:
        return problems
    levels = len(config["block_out_channels"])
    for name in ("down_block_types", "up_block_types", "attention_head_dim", "layers_per_block"):
        if isinstance(config[name], list | tuple) and len(config[name]) != levels:
            problems.append(f"{name} has {len(config[name])} values, {levels} are expected")
    depths = expand_per_level(config["transformer_layers_per_block"], 1)
    for name, values in (
        ("cross_attention_dim", [config["cross_attention_dim"]]),
        ("transformer_layers_per_block", depths),
    ):
        if any(isinstance(value, list | tuple) for value in values):
            problems.append(f"{name} is {config[name]}, one number is expected")
    if config.get("addition_embed_type") == "text_time":
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if config[name] is None:
                problems.append(f"{name} is None, a number is expected")
    return problems


def expand_per_level(value: Any, count: int) -> list[Any]:
    """Return one value per level."""
    return list(value) if isinstance(value, list | tuple) else [value] * count


def feed_forward(p: Params, x: Array) -> Array:
    """Apply two linear layers with a gated GELU between them (arXiv:2002.05202)."""
    width = x.shape[-1]
    h, gate = jnp.split(linear(p / "net" / 0 / "proj", x, 8 * width), 2, axis=-1)
    return linear(p / "net" / 2, h * jax.nn.gelu(gate, approximate=False), width)


def attend(
    p: Params, x: Array, context: Array, heads: int, mask: Array | None, kernel: Kernel | None
) -> Array:
    """Attend x [n, tokens, width] to a context [n, keys, ...]."""
    width = x.shape[-1]
    q = linear(p / "to_q", x, width, bias=False)
    k = linear(p / "to_k", context, width, bias=False)
    v = linear(p / "to_v", context, width, bias=False)
    return linear(p / "to_out" / 0, attention(q, k, v, heads, mask, kernel=kernel), width)


def transformer_block(
    p: Params, x: Array, context: Array, mask: Array | None, heads: int, kernel: Kernel | None
) -> Array:
    """Add self-attention, attention to the caption and two linear layers, each after a norm."""
    h = layer_norm(p / "norm1", x)
    x = x + attend(p / "attn1", h, h, heads, None, kernel)
    x = x + attend(p / "attn2", layer_norm(p / "norm2", x), context, heads, mask, None)
    return x + feed_forward(p / "ff", layer_norm(p / "norm3", x))


def embed_conditions(
    p: Params, config: dict[str, Any], x: Array, t: Array, added: dict[str, Array] | None
) -> Array:
    """Embed the timestep: [n, width], in the type of x.

    Args:
        added: XL's pooled caption ``text_embeds`` and six numbers ``time_ids`` [n, 6].
    """
    channels = config["block_out_channels"][0]
    width = config["time_embedding_dim"] or 4 * channels
    cosine_first, shift = config["flip_sin_to_cos"], config["freq_shift"]

    def two_layers(inner: Params, h: Array) -> Array:
        h = jax.nn.silu(linear(inner / "linear_1", h.astype(x.dtype), width))
        return linear(inner / "linear_2", h, width)

    time = two_layers(p / "time_embedding", sinusoid(t, channels, cosine_first, shift))
    if config.get("addition_embed_type") != "text_time" or added is None:
        return time
    numbers = added["time_ids"].reshape(-1)
    waves = sinusoid(numbers, config["addition_time_embed_dim"], cosine_first, shift)
    waves = waves.reshape(len(x), -1)
    pooled = added["text_embeds"].astype(jnp.float32)
    return time + two_layers(p / "add_embedding", jnp.concatenate([pooled, waves], -1))


@dataclass(frozen=True)
class UNetBlocks:
    """The two kinds of block that a UNet is made of, and what all of them share."""

    config: dict[str, Any]
    time: Array  # the embedded timestep, [n, width]
    context: Array  # of the caption, [n, tokens, width]
    mask: Array | None  # False for tokens to be ignored, bool [n, tokens]
    remat: bool
    kernel: Kernel | None

    @property
    def groups(self) -> int:
        """Groups of channels that are normalised together."""
        return int(self.config["norm_num_groups"])

    @property
    def eps(self) -> float:
        """Added to variances, outside the transformers."""
        return float(self.config["norm_eps"])

    def run(self, block: Callable[[Array, Array], Array], h: Array, condition: Array) -> Array:
        """Run a block, with its activations recomputed in the backward pass if asked for."""
        return (jax.checkpoint(block) if self.remat else block)(h, condition)

    def resnet(self, p: Params, h: Array, out: int) -> Array:
        """Apply two convolutions to h [n, h, w, channels], with the timestep between them."""

        def block(h: Array, time: Array) -> Array:
            return resnet(p, h, time, out, self.groups, self.eps)

        return self.run(block, h, self.time)

    def transformer(self, p: Params, x: Array, level: int) -> Array:
        """Apply transformer blocks to the pixels of x [n, h, w, channels]."""
        config, levels = self.config, len(self.config["block_out_channels"])
        # diffusers' attention_head_dim is the number of heads.
        heads = expand_per_level(config["attention_head_dim"], levels)[level]
        depths = expand_per_level(config["transformer_layers_per_block"], levels)
        convolution = not config["use_linear_projection"]
        n, height, width, channels = x.shape
        h = group_norm(p / "norm", x, self.groups, 1e-6).reshape(n, height * width, channels)
        h = pointwise(p / "proj_in", h, channels, convolution)
        for i in range(depths[level]):
            inner = p / "transformer_blocks" / i

            def block(h: Array, context: Array, inner: Params = inner) -> Array:
                return transformer_block(inner, h, context, self.mask, heads, self.kernel)

            h = self.run(block, h, self.context)
        return x + pointwise(p / "proj_out", h, channels, convolution).reshape(x.shape)


def unet(
    p: Params,
    config: dict[str, Any],
    inputs: dict[str, Any],
    *,
    remat: bool = False,
    kernel: Kernel | None = None,
) -> Array:
    """Predict from noisy latents.

    Args:
        inputs: ``sample``, the latents [n, channels, h, w]; ``timestep`` [n]; and of the caption
            ``encoder_hidden_states`` [n, tokens, width]; as the family needs them
            ``encoder_attention_mask``, bool [n, tokens], and ``added_cond_kwargs``, see
            ``embed_conditions``.
        remat: recompute activations block by block in the backward pass (arXiv:1604.06174).
        kernel: of self-attention; see ``attention.choose_kernel``.

    Returns:
        [n, out channels, h, w], in the type of the latents.
    """
    config = complete(config, DEFAULTS)
    x = inputs["sample"].transpose(0, 2, 3, 1)
    context = inputs["encoder_hidden_states"].astype(x.dtype)
    time = embed_conditions(p, config, x, inputs["timestep"], inputs.get("added_cond_kwargs"))
    mask = inputs.get("encoder_attention_mask")
    blocks = UNetBlocks(config, time, context, mask, remat, kernel)
    h = conv(p / "conv_in", x, config["block_out_channels"][0])
    h, skips = run_down_blocks(p, blocks, h)
    h = run_middle_block(p / "mid_block", blocks, h)
    h = run_up_blocks(p, blocks, h, skips)
    h = jax.nn.silu(group_norm(p / "conv_norm_out", h, blocks.groups, blocks.eps))
    return conv(p / "conv_out", h, config["out_channels"]).transpose(0, 3, 1, 2)


def run_down_blocks(p: Params, blocks: UNetBlocks, h: Array) -> tuple[Array, list[Array]]:
    """Run the levels from large to small; also returns what the way up concatenates."""
    channels = blocks.config["block_out_channels"]
    layers = expand_per_level(blocks.config["layers_per_block"], len(channels))
    skips = [h]
    for level, kind in enumerate(blocks.config["down_block_types"]):
        down = p / "down_blocks" / level
        for i in range(layers[level]):
            h = blocks.resnet(down / "resnets" / i, h, channels[level])
            if kind.startswith("CrossAttn"):
                h = blocks.transformer(down / "attentions" / i, h, level)
            skips.append(h)
        if level < len(channels) - 1:
            h = conv(down / "downsamplers" / 0 / "conv", h, channels[level], stride=2)
            skips.append(h)
    return h, skips


def run_middle_block(p: Params, blocks: UNetBlocks, h: Array) -> Array:
    """Run the block between the way down and the way up."""
    channels = blocks.config["block_out_channels"]
    h = blocks.resnet(p / "resnets" / 0, h, channels[-1])
    h = blocks.transformer(p / "attentions" / 0, h, len(channels) - 1)
    return blocks.resnet(p / "resnets" / 1, h, channels[-1])


def run_up_blocks(p: Params, blocks: UNetBlocks, h: Array, skips: list[Array]) -> Array:
    """Run the levels from small to large; uses up ``skips``."""
    channels = blocks.config["block_out_channels"]
    layers = expand_per_level(blocks.config["layers_per_block"], len(channels))
    for i, kind in enumerate(blocks.config["up_block_types"]):
        level, up = len(channels) - 1 - i, p / "up_blocks" / i
        for j in range(layers[level] + 1):
            joined = jnp.concatenate([h, skips.pop()], -1)
            h = blocks.resnet(up / "resnets" / j, joined, channels[level])
            if kind.startswith("CrossAttn"):
                h = blocks.transformer(up / "attentions" / j, h, level)
        if level > 0:
            h = upsample(up, h, skips[-1].shape[1:3])
    return h


def list_unet_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every array of the network."""
    config = complete(config, DEFAULTS)
    side = 2 ** (len(config["block_out_channels"]) - 1)
    inputs: dict[str, Any] = {
        "sample": jnp.zeros((1, config["in_channels"], side, side)),
        "timestep": jnp.zeros(1),
        "encoder_hidden_states": jnp.zeros((1, 1, config["cross_attention_dim"])),
    }
    if config.get("addition_embed_type") == "text_time":
        numbers_width = 6 * config["addition_time_embed_dim"]
        pooled_width = config["projection_class_embeddings_input_dim"] - numbers_width
        inputs["added_cond_kwargs"] = {
            "text_embeds": jnp.zeros((1, pooled_width)),
            "time_ids": jnp.zeros((1, 6)),
        }
    return list_shapes(lambda p: unet(p, config, inputs))
