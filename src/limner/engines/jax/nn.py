"""Layers as pure functions over named arrays, in the names and layouts of safetensors files:
nothing is converted, whatever the checkpoint.

Pictures are [n, height, width, channels] inside. Weights are cast to their input's type where they
are used; norms, softmax and timesteps are float32.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from limner.engines.jax.attention import Array, Kernel


@dataclass(frozen=True)
class Params:
    """Named arrays under a prefix. A layer asks for each with the shape that it must have.

    In a survey nothing is there: what is asked for is made up, and remembered with its shape.
    """

    arrays: Mapping[str, Any]
    prefix: str = ""
    asked: dict[str, tuple[int, ...]] | None = None
    scale: float = 1.0  # alpha / rank of the low-rank additions among the arrays
    dropout: float = 0.0  # of what goes into them
    key: Array | None = None  # of that dropout

    def __truediv__(self, name: str | int) -> "Params":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def __call__(self, name: str, *shape: int) -> Array:
        key = self.prefix + name
        if self.asked is not None:
            self.asked[key] = shape
            return jnp.zeros(shape)
        array: Array = self.arrays[key]
        return array

    def has(self, name: str) -> bool:
        return self.prefix + name in self.arrays


def list_shapes(model: Callable[[Params], Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every array that a model asks for; nothing is computed."""
    asked: dict[str, tuple[int, ...]] = {}
    jax.eval_shape(lambda: model(Params({}, asked=asked)))
    return asked


def linear(p: Params, x: Array, out: int, bias: bool = True, weight: str = "weight") -> Array:
    """x [..., in] -> [..., out], with the low-rank addition B A x * alpha / rank (arXiv:2106.09685)
    where there is one."""
    y = matmul(x, p(weight, out, x.shape[-1]))
    if p.has("lora_A.weight"):
        down = dropout(p, x)
        y = y + matmul(matmul(down, p("lora_A.weight")), p("lora_B.weight")) * p.scale
    return y + p("bias", out).astype(x.dtype) if bias else y


def matmul(x: Array, weight: Array) -> Array:
    """x [..., in] times a weight [out, in]."""
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def dropout(p: Params, x: Array) -> Array:
    """Dropout on what goes into a low-rank addition, addressed by the layer's name."""
    if p.key is None or not p.dropout:
        return x
    import zlib

    kept = jax.random.bernoulli(
        jax.random.fold_in(p.key, zlib.crc32(p.prefix.encode())), 1 - p.dropout, x.shape
    )
    return jnp.where(kept, x / (1 - p.dropout), 0).astype(x.dtype)


def pointwise(p: Params, x: Array, out: int, convolution: bool) -> Array:
    """A linear layer, which some checkpoints hold as a convolution of one pixel; x [n, h, w, in] or
    [n, tokens, in]."""
    if not convolution:
        return linear(p, x, out)
    return matmul(x, p("weight", out, x.shape[-1], 1, 1)[:, :, 0, 0]) + p("bias", out).astype(
        x.dtype
    )


def conv(
    p: Params,
    x: Array,
    out: int,
    size: int = 3,
    stride: int = 1,
    pad: tuple[int, int] | None = None,
) -> Array:
    """A convolution of x [n, h, w, in], padded by size // 2 on each side unless told otherwise
    (before, after)."""
    weight = p("weight", out, x.shape[-1], size, size).astype(x.dtype)
    return convolve(x, weight, stride, pad or (size // 2, size // 2)) + p("bias", out).astype(
        x.dtype
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Array, weight: Array, stride: int, pad: tuple[int, int]) -> Array:
    """x [n, h, w, in] under a kernel [out, in, size, size]."""
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def convolve_backward(
    stride: int, pad: tuple[int, int], kept: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    """Gradients of input and kernel. On a CPU the kernel's is a product for each of its places:
    XLA's convolution for it takes twice as long there."""
    x, weight = kept
    size, (_, high, wide, _) = weight.shape[2], g.shape
    places = [(i, j) for i in range(size) for j in range(size)]

    def usual(x: Array, g: Array) -> Array:
        found: Array = jax.linear_transpose(lambda w: convolution(x, w, stride, pad), weight)(g)[0]
        return found

    def by_place(x: Array, g: Array) -> Array:
        if (
            stride == 1 and sum(pad) == size - 1 and g.shape[-1] < x.shape[-1]
        ):  # what has fewer channels is moved about
            around = jnp.pad(g, ((0, 0), pad[::-1], pad[::-1], (0, 0)))
            pairs = [
                (
                    around[
                        :, size - 1 - i : size - 1 - i + high, size - 1 - j : size - 1 - j + wide
                    ],
                    x,
                )
                for i, j in places
            ]
        else:
            around = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
            pairs = [
                (g, around[:, i : i + stride * high : stride, j : j + stride * wide : stride])
                for i, j in places
            ]
        return jnp.stack(
            [jax.lax.dot_general(a, b, (((0, 1, 2), (0, 1, 2)), ((), ()))) for a, b in pairs], -1
        ).reshape(weight.shape)

    return jax.linear_transpose(lambda x: convolution(x, weight, stride, pad), x)(g)[
        0
    ], jax.lax.platform_dependent(x, g, cpu=by_place, default=usual)


convolution = convolve.fun


convolve.defvjp(
    lambda x, weight, stride, pad: (convolution(x, weight, stride, pad), (x, weight)),
    convolve_backward,
)


def group_norm(p: Params, x: Array, groups: int, eps: float) -> Array:
    """Normalise x [n, ..., channels] over each group of channels and all places, in two passes and
    float32 (arXiv:1803.08494)."""
    channels = x.shape[-1]
    h = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, channels // groups)
    h = h - h.mean((1, 3), keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean((1, 3), keepdims=True) + eps)
    return (h.reshape(x.shape) * p("weight", channels) + p("bias", channels)).astype(x.dtype)


def layer_norm(p: Params, x: Array, eps: float = 1e-5) -> Array:
    """Normalise x over its last axis, in float32 (arXiv:1607.06450)."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + eps)
    return (h * p("weight", x.shape[-1]) + p("bias", x.shape[-1])).astype(x.dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    heads: int,
    mask: Array | None = None,
    causal: bool = False,
    kernel: Kernel | None = None,
) -> Array:
    """Scaled dot products of q [n, tokens, width] with k and v [n, keys, width], in ``heads``
    heads, softmax in float32.

    Args:
        mask: which keys are looked at, bool [n, keys].
        kernel: what computes it where nothing is masked and it can; else, and where there is none,
            plain products do.
    """
    apart = tuple(t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
    if kernel is not None and mask is None and not causal and (out := kernel(*apart)) is not None:
        return out.reshape(q.shape)
    scores = jnp.einsum(
        "nqhd,nkhd->nhqk", apart[0], apart[1], preferred_element_type=jnp.float32
    ) / math.sqrt(apart[0].shape[-1])
    if mask is not None:
        scores = scores + jnp.where(mask[:, None, None], 0.0, -10000.0)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores).astype(q.dtype), apart[2]).reshape(
        q.shape
    )


def sinusoid(t: Array, width: int, cosine_first: bool, shift: float) -> Array:
    """Sines and cosines of numbers [n] at ``width`` / 2 frequencies from 1 to 1 / 10000: float32
    [n, width]."""
    half = width // 2
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(
        -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift)
    )
    waves = (
        (jnp.cos(angles), jnp.sin(angles)) if cosine_first else (jnp.sin(angles), jnp.cos(angles))
    )
    return jnp.concatenate(waves, -1)


def resnet(p: Params, x: Array, time: Array | None, out: int, groups: int, eps: float) -> Array:
    """Two convolutions with norms and a shortcut; ``time`` [n, width] is added between them."""
    h = conv(p / "conv1", jax.nn.silu(group_norm(p / "norm1", x, groups, eps)), out)
    if time is not None:
        h = h + linear(p / "time_emb_proj", jax.nn.silu(time), out)[:, None, None]
    h = conv(p / "conv2", jax.nn.silu(group_norm(p / "norm2", h, groups, eps)), out)
    return h + (x if x.shape[-1] == out else conv(p / "conv_shortcut", x, out, size=1))


def upsample(p: Params, x: Array, size: tuple[int, ...] | None = None) -> Array:
    """Each pixel twice in both directions, cut to ``size`` (height, width) where sides were odd
    before, then a convolution."""
    high, wide = size or (2 * x.shape[1], 2 * x.shape[2])
    return conv(
        p / "upsamplers" / 0 / "conv",
        jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :high, :wide],
        x.shape[-1],
    )


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
}
