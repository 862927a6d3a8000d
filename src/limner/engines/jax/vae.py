"""The KL autoencoder of Stable Diffusion (arXiv:2112.10752), encoder and decoder.

Both are pure functions of their arrays and the component's config.json.
"""

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
from limner.engines.jax.settings import complete, find_unserved

EPS = 1e-6
# Of the settings that would need code of their own, the values that need none; the class's first.
SERVED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": (3,),
    "out_channels": (3,),
    "up_block_types": ("UpDecoderBlock2D",),
}
# What the class says where a config does not.
DEFAULTS: dict[str, Any] = {
    "block_out_channels": (64,),
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def find_unsupported(config: dict[str, Any]) -> list[str]:
    """Say which settings of a config there is no code for."""
    return find_unserved(complete(config, DEFAULTS), SERVED_SETTINGS, DEFAULTS)


def middle_block(p: Params, h: Array, config: dict[str, Any]) -> Array:
    """Apply two residual blocks, with attention of one head between them."""
    groups, width = config["norm_num_groups"], h.shape[-1]
    h = resnet(p / "resnets" / 0, h, None, width, groups, EPS)
    if config["mid_block_add_attention"]:
        layer = p / "attentions" / 0
        x = group_norm(layer / "group_norm", h, groups, EPS).reshape(len(h), -1, width)
        q, k, v = (linear(layer / name, x, width) for name in ("to_q", "to_k", "to_v"))
        h = h + linear(layer / "to_out" / 0, attention(q, k, v, 1), width).reshape(h.shape)
    return resnet(p / "resnets" / 1, h, None, width, groups, EPS)


def output_block(p: Params, h: Array, config: dict[str, Any], out: int) -> Array:
    """Apply the last norm, activation and convolution of either half."""
    normed = group_norm(p / "conv_norm_out", h, config["norm_num_groups"], EPS)
    return conv(p / "conv_out", jax.nn.silu(normed), out)


def encode(p: Params, config: dict[str, Any], x: Array) -> tuple[Array, Array]:
    """Encode pixels in [-1, 1], [n, 3, H, W].

    Returns:
        Mean and standard deviation of the posterior, [n, latent channels, h, w].
    """
    config = complete(config, DEFAULTS)
    channels, groups = config["block_out_channels"], config["norm_num_groups"]
    latent_channels = config["latent_channels"]
    encoder = p / "encoder"
    h = conv(encoder / "conv_in", x.transpose(0, 2, 3, 1), channels[0])
    for level, out in enumerate(channels):
        down = encoder / "down_blocks" / level
        for i in range(config["layers_per_block"]):
            h = resnet(down / "resnets" / i, h, None, out, groups, EPS)
        if level < len(channels) - 1:
            h = conv(down / "downsamplers" / 0 / "conv", h, out, stride=2, pad=(0, 1))
    h = middle_block(encoder / "mid_block", h, config)
    h = output_block(encoder, h, config, 2 * latent_channels)
    if config["use_quant_conv"]:
        h = conv(p / "quant_conv", h, 2 * latent_channels, size=1)
    mean, log_variance = jnp.split(h.transpose(0, 3, 1, 2), 2, axis=1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))


def decode(p: Params, config: dict[str, Any], z: Array) -> Array:
    """Decode unscaled latents [n, latent channels, h, w].

    Returns:
        Pixels, about within [-1, 1], [n, 3, H, W].
    """
    config = complete(config, DEFAULTS)
    channels, groups = config["block_out_channels"], config["norm_num_groups"]
    decoder = p / "decoder"
    h = z.transpose(0, 2, 3, 1)
    if config["use_post_quant_conv"]:
        h = conv(p / "post_quant_conv", h, h.shape[-1], size=1)
    h = conv(decoder / "conv_in", h, channels[-1])
    h = middle_block(decoder / "mid_block", h, config)
    for i, out in enumerate(reversed(channels)):
        up = decoder / "up_blocks" / i
        for j in range(config["layers_per_block"] + 1):
            h = resnet(up / "resnets" / j, h, None, out, groups, EPS)
        if i < len(channels) - 1:
            h = upsample(up, h)
    return output_block(decoder, h, config, 3).transpose(0, 3, 1, 2)


def list_vae_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every array of both halves."""
    config = complete(config, DEFAULTS)
    side = 2 ** (len(config["block_out_channels"]) - 1)
    pixels = jnp.zeros((1, 3, side, side))
    latents = jnp.zeros((1, config["latent_channels"], 1, 1))
    encoder = list_shapes(lambda p: encode(p, config, pixels))
    return encoder | list_shapes(lambda p: decode(p, config, latents))
