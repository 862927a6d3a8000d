"""The UNet of Stable Diffusion 1.x, 2.x and XL (arXiv:2112.10752, arXiv:2307.01952) as one pure
function of its arrays and its config.json."""

from functools import partial
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

PLAIN = {  # what the config of a plain UNet says; anything else would need code that is not here
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "reverse_transformer_layers_per_block": None,
}
BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


def unsupported(config: dict[str, Any]) -> list[str]:
    """What in a config this file has no code for, in words."""
    out = [
        f"{name} is {config[name]!r}, {wanted!r} is expected"
        for name, wanted in PLAIN.items()
        if config.get(name, wanted) != wanted
    ]
    kinds = [
        kind
        for kind in (*config["down_block_types"], *config["up_block_types"])
        if kind not in BLOCKS
    ]
    out += [f"a {kind} is none of {', '.join(BLOCKS)}" for kind in dict.fromkeys(kinds)]
    flat = {
        "cross_attention_dim": [config.get("cross_attention_dim", 1280)],
        "transformer_layers_per_block": value_per_level(
            config.get("transformer_layers_per_block", 1), 1
        ),
    }
    out += [
        f"{name} is {config[name]}, one number is expected"
        for name, values in flat.items()
        if any(isinstance(v, list | tuple) for v in values)
    ]
    if config.get("addition_embed_type") not in (None, "text_time"):
        out.append(
            f"addition_embed_type is {config['addition_embed_type']!r}, None or 'text_time' is "
            "expected"
        )
    return out


def value_per_level(value: Any, count: int) -> list[Any]:
    """One value per level."""
    return list(value) if isinstance(value, list | tuple) else [value] * count


def feed_forward(p: Params, x: Array) -> Array:
    """Two linear layers with a gated GELU between them (arXiv:2002.05202)."""
    width = x.shape[-1]
    h, gate = jnp.split(linear(p / "net" / 0 / "proj", x, 8 * width), 2, axis=-1)
    return linear(p / "net" / 2, h * jax.nn.gelu(gate, approximate=False), width)


def attend(
    p: Params, x: Array, context: Array, heads: int, mask: Array | None, kernel: Kernel | None
) -> Array:
    """Attention of x [n, tokens, width] to a context [n, keys, ...]."""
    width = x.shape[-1]
    q, k, v = (
        linear(p / name, source, width, bias=False)
        for name, source in (("to_q", x), ("to_k", context), ("to_v", context))
    )
    return linear(p / "to_out" / 0, attention(q, k, v, heads, mask, kernel=kernel), width)


def block(
    p: Params, x: Array, context: Array, mask: Array | None, heads: int, kernel: Kernel | None
) -> Array:
    """Attention to itself, attention to the caption, two linear layers; each on what a norm makes
    of x, and added to it."""
    h = layer_norm(p / "norm1", x)
    x = x + attend(p / "attn1", h, h, heads, None, kernel)
    x = x + attend(p / "attn2", layer_norm(p / "norm2", x), context, heads, mask, None)
    return x + feed_forward(p / "ff", layer_norm(p / "norm3", x))


def transformer(
    p: Params,
    x: Array,
    context: Array,
    mask: Array | None,
    *,
    heads: int,
    depth: int,
    groups: int,
    remat: bool,
    kernel: Kernel | None,
    convolution: bool,
) -> Array:
    """Transformer blocks over the pixels of x [n, h, w, channels]."""
    n, height, width, channels = x.shape
    h = group_norm(p / "norm", x, groups, 1e-6).reshape(n, height * width, channels)
    h = pointwise(p / "proj_in", h, channels, convolution)
    run = partial(block, heads=heads, kernel=kernel)
    for i in range(depth):
        inner = p / "transformer_blocks" / i
        h = (
            jax.checkpoint(lambda h, c, inner=inner: run(inner, h, c, mask))
            if remat
            else lambda h, c, inner=inner: run(inner, h, c, mask)
        )(h, context)
    return x + pointwise(p / "proj_out", h, channels, convolution).reshape(x.shape)


def embed_conditions(
    p: Params, config: dict[str, Any], x: Array, t: Array, added: dict[str, Array] | None
) -> Array:
    """What timestep, and for XL pooled caption and the six numbers of the crop, come to: [n,
    width]."""
    first = config["block_out_channels"][0]
    width = config.get("time_embedding_dim") or 4 * first
    wave = partial(
        sinusoid,
        cosine_first=config.get("flip_sin_to_cos", True),
        shift=config.get("freq_shift", 0),
    )

    def two(inner: Params, h: Array) -> Array:
        return linear(
            inner / "linear_2",
            jax.nn.silu(linear(inner / "linear_1", h.astype(x.dtype), width)),
            width,
        )

    time = two(p / "time_embedding", wave(t, first))
    if config.get("addition_embed_type") != "text_time" or added is None:
        return time
    numbers = wave(added["time_ids"].reshape(-1), config["addition_time_embed_dim"]).reshape(
        len(x), -1
    )
    return time + two(
        p / "add_embedding",
        jnp.concatenate([added["text_embeds"].astype(jnp.float32), numbers], -1),
    )


def unet(
    p: Params,
    config: dict[str, Any],
    x: Array,
    t: Array,
    encoder_hidden_states: Array,
    added_cond_kwargs: dict[str, Array] | None = None,
    encoder_attention_mask: Array | None = None,
    *,
    remat: bool = False,
    kernel: Kernel | None = None,
) -> Array:
    """What the network predicts for noisy latents x [n, channels, h, w] at timesteps t [n]: [n, out
    channels, h, w], in the type of x.

    Args:
        encoder_hidden_states: [n, tokens, width] of the caption.
        encoder_attention_mask: which tokens are looked at, bool [n, tokens].
        remat: recompute activations block by block in the backward pass (arXiv:1604.06174).
        kernel: of attention; see ``attention.choose_kernel``.
    """
    channels, layers = config["block_out_channels"], config.get("layers_per_block", 2)
    levels, groups, eps = (
        len(channels),
        config.get("norm_num_groups", 32),
        config.get("norm_eps", 1e-5),
    )
    heads, depth = (
        value_per_level(
            config.get("num_attention_heads") or config.get("attention_head_dim", 8), levels
        ),
        value_per_level(config.get("transformer_layers_per_block", 1), levels),
    )
    per_level = value_per_level(layers, levels)
    x, context = x.transpose(0, 2, 3, 1), encoder_hidden_states.astype(x.dtype)
    time = embed_conditions(p, config, x, t, added_cond_kwargs)

    def cell(inner: Params, h: Array, out: int) -> Array:
        def run(h: Array, time: Array) -> Array:
            return resnet(inner, h, time, out, groups, eps)

        return (jax.checkpoint(run) if remat else run)(h, time)

    def attend(inner: Params, h: Array, level: int) -> Array:
        how = {
            "heads": heads[level],
            "depth": depth[level],
            "groups": groups,
            "remat": remat,
            "kernel": kernel,
        }
        return transformer(
            inner,
            h,
            context,
            encoder_attention_mask,
            **how,
            convolution=not config.get("use_linear_projection", False),
        )

    h = conv(p / "conv_in", x, channels[0])
    skips = [h]
    for level, kind in enumerate(config["down_block_types"]):
        down = p / "down_blocks" / level
        for i in range(per_level[level]):
            h = cell(down / "resnets" / i, h, channels[level])
            if kind.startswith("CrossAttn"):
                h = attend(down / "attentions" / i, h, level)
            skips.append(h)
        if level < levels - 1:
            h = conv(down / "downsamplers" / 0 / "conv", h, channels[level], stride=2)
            skips.append(h)
    middle = p / "mid_block"
    h = cell(middle / "resnets" / 0, h, channels[-1])
    h = attend(middle / "attentions" / 0, h, levels - 1)
    h = cell(middle / "resnets" / 1, h, channels[-1])
    for i, kind in enumerate(config["up_block_types"]):
        level, up = levels - 1 - i, p / "up_blocks" / i
        for j in range(per_level[level] + 1):
            h = cell(up / "resnets" / j, jnp.concatenate([h, skips.pop()], -1), channels[level])
            if kind.startswith("CrossAttn"):
                h = attend(up / "attentions" / j, h, level)
        if i < levels - 1:
            h = upsample(up, h, skips[-1].shape[1:3])
    h = jax.nn.silu(group_norm(p / "conv_norm_out", h, groups, eps))
    return conv(p / "conv_out", h, config.get("out_channels", 4)).transpose(0, 3, 1, 2)


def unet_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of the network."""
    side = 2 ** (len(config["block_out_channels"]) - 1)
    x = jnp.zeros((1, config.get("in_channels", 4), side, side))
    width = config.get("cross_attention_dim", 1280)
    added = None
    if config.get("addition_embed_type") == "text_time":
        pooled = (
            config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        )
        added = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
    return list_shapes(lambda p: unet(p, config, x, jnp.zeros(1), jnp.zeros((1, 1, width)), added))
