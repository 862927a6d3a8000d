"""The KL autoencoder of Stable Diffusion (arXiv:2112.10752), encoder and decoder, as pure functions
of its arrays and its config.json."""

from typing import Any

import jax
import jax.numpy as jnp

from limner.engines.jax.attention import Array
from limner.engines.jax.nn import (
    Params,
    attention,
    conv,
    group_norm,
    linear,
    list_shapes,
    resnet,
    upsample,
)

EPS = 1e-6


def unsupported(config: dict[str, Any]) -> list[str]:
    """What in a config this file has no code for, in words."""
    plain = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    out = [
        f"a {kind} is no {wanted}"
        for name, wanted in plain.items()
        for kind in dict.fromkeys(config.get(name, []))
        if kind != wanted
    ]
    out += [
        f"{name} is {config[name]}, none is expected"
        for name in ("latents_mean", "latents_std", "shift_factor")
        if config.get(name) is not None
    ]
    return out + (
        [f"act_fn is {config['act_fn']!r}, 'silu' is expected"]
        if config.get("act_fn", "silu") != "silu"
        else []
    )


def middle_block(p: Params, h: Array, groups: int, looks: bool) -> Array:
    """Two residual cells, with attention of one head between them."""
    h = resnet(p / "resnets" / 0, h, None, h.shape[-1], groups, EPS)
    if looks:
        a, width = p / "attentions" / 0, h.shape[-1]
        x = group_norm(a / "group_norm", h, groups, EPS).reshape(len(h), -1, width)
        q, k, v = (linear(a / name, x, width) for name in ("to_q", "to_k", "to_v"))
        h = h + linear(a / "to_out" / 0, attention(q, k, v, 1), width).reshape(h.shape)
    return resnet(p / "resnets" / 1, h, None, h.shape[-1], groups, EPS)


def encode(p: Params, config: dict[str, Any], x: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the posterior, [n, latent channels, h, w], for pixels in [-1,
    1], [n, 3, H, W]."""
    channels, groups, latent = (
        config["block_out_channels"],
        config.get("norm_num_groups", 32),
        config.get("latent_channels", 4),
    )
    e = p / "encoder"
    h = conv(e / "conv_in", x.transpose(0, 2, 3, 1), channels[0])
    for level, out in enumerate(channels):
        down = e / "down_blocks" / level
        for i in range(config.get("layers_per_block", 1)):
            h = resnet(down / "resnets" / i, h, None, out, groups, EPS)
        if level < len(channels) - 1:
            h = conv(down / "downsamplers" / 0 / "conv", h, out, stride=2, pad=(0, 1))
    h = middle_block(e / "mid_block", h, groups, config.get("mid_block_add_attention", True))
    h = conv(
        e / "conv_out", jax.nn.silu(group_norm(e / "conv_norm_out", h, groups, EPS)), 2 * latent
    )
    if config.get("use_quant_conv", True):
        h = conv(p / "quant_conv", h, 2 * latent, size=1)
    mean, log_variance = jnp.split(h.transpose(0, 3, 1, 2), 2, axis=1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))


def decode(p: Params, config: dict[str, Any], z: Array) -> Array:
    """Pixels, about within [-1, 1], [n, 3, H, W], of unscaled latents z [n, latent channels, h,
    w]."""
    channels, groups = config["block_out_channels"], config.get("norm_num_groups", 32)
    h, d = z.transpose(0, 2, 3, 1), p / "decoder"
    if config.get("use_post_quant_conv", True):
        h = conv(p / "post_quant_conv", h, h.shape[-1], size=1)
    h = middle_block(
        d / "mid_block",
        conv(d / "conv_in", h, channels[-1]),
        groups,
        config.get("mid_block_add_attention", True),
    )
    for i, out in enumerate(reversed(channels)):
        up = d / "up_blocks" / i
        for j in range(config.get("layers_per_block", 1) + 1):
            h = resnet(up / "resnets" / j, h, None, out, groups, EPS)
        if i < len(channels) - 1:
            h = upsample(up, h)
    return conv(
        d / "conv_out", jax.nn.silu(group_norm(d / "conv_norm_out", h, groups, EPS)), 3
    ).transpose(0, 3, 1, 2)


def vae_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of both halves."""
    side = 2 ** (len(config["block_out_channels"]) - 1)
    pixels, latents = (
        jnp.zeros((1, 3, side, side)),
        jnp.zeros((1, config.get("latent_channels", 4), 1, 1)),
    )
    return list_shapes(lambda p: encode(p, config, pixels)) | list_shapes(
        lambda p: decode(p, config, latents)
    )
