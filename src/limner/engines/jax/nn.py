"""Layers as pure functions of named arrays, in the names and layouts of safetensors files.

Images are [n, height, width, channels] inside. Weights are cast to their input's type where they
are used; norms, softmax and timestep embeddings are float32.
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
    """Named arrays under a prefix; a layer asks for each with the shape that it must have.

    With ``requested`` no arrays are needed: layers get zeros, and names and shapes are recorded.
    """

    arrays: Mapping[str, Any]
    prefix: str = ""
    requested: dict[str, tuple[int, ...]] | None = None
    scale: float = 1.0  # alpha / rank of the LoRA layers among the arrays
    # Of the LoRA layers' inputs: a function of a layer's prefix and its input.
    dropout: Callable[[str, Array], Array] | None = None

    def __truediv__(self, name: str | int) -> "Params":
        """Return the same arrays under a longer prefix."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def __call__(self, name: str, *shape: int) -> Array:
        """Return one array."""
        key = self.prefix + name
        if self.requested is not None:
            self.requested[key] = shape
            return jnp.zeros(shape)
        array: Array = self.arrays[key]
        return array

    def has(self, name: str) -> bool:
        """Return whether an array of that name exists below the prefix."""
        return self.prefix + name in self.arrays


def list_shapes(model: Callable[[Params], Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every array that a model asks for; nothing is computed."""
    requested: dict[str, tuple[int, ...]] = {}
    jax.eval_shape(lambda: model(Params({}, requested=requested)))
    return requested


def linear(p: Params, x: Array, out: int, bias: bool = True) -> Array:
    """Map x [..., in] to [..., out], with LoRA's B A x * alpha / rank (arXiv:2106.09685) if any."""
    y = matmul(x, p("weight", out, x.shape[-1]))
    if p.has("lora_A.weight"):
        kept = x if p.dropout is None else p.dropout(p.prefix, x)
        down = matmul(kept, p("lora_A.weight"))
        y = y + matmul(down, p("lora_B.weight")) * p.scale
    return add_bias(p, y, out) if bias else y


def add_bias(p: Params, x: Array, out: int) -> Array:
    """Add the bias of a layer to x [..., out]."""
    return x + p("bias", out).astype(x.dtype)


def matmul(x: Array, weight: Array) -> Array:
    """Multiply x [..., in] by a weight [out, in]."""
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


def pointwise(p: Params, x: Array, out: int, convolution: bool) -> Array:
    """Apply a linear layer to each pixel or token of x [n, ..., in].

    Args:
        convolution: whether the checkpoint stores it as a 1 x 1 convolution.
    """
    if not convolution:
        return linear(p, x, out)
    weight = p("weight", out, x.shape[-1], 1, 1)[:, :, 0, 0]
    return add_bias(p, matmul(x, weight), out)


def conv(
    p: Params,
    x: Array,
    out: int,
    size: int = 3,
    stride: int = 1,
    pad: tuple[int, int] | None = None,
) -> Array:
    """Convolve x [n, h, w, in].

    Args:
        pad: pixels before and after; None: size // 2 on each side.
    """
    weight = p("weight", out, x.shape[-1], size, size).astype(x.dtype)
    padding = pad or (size // 2, size // 2)
    return add_bias(p, convolve_with_fast_gradient(x, weight, stride, padding), out)


def convolve(x: Array, weight: Array, stride: int, pad: tuple[int, int]) -> Array:
    """Convolve x [n, h, w, in] with a kernel [out, in, size, size]."""
    return jax.lax.conv_general_dilated(
        x, weight, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


convolve_with_fast_gradient = jax.custom_vjp(convolve, nondiff_argnums=(2, 3))


def convolve_forward(
    x: Array, weight: Array, stride: int, pad: tuple[int, int]
) -> tuple[Array, tuple[Array, Array]]:
    """Convolve, and keep what the backward pass needs."""
    return convolve(x, weight, stride, pad), (x, weight)


def convolve_backward(
    stride: int, pad: tuple[int, int], residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """Return the gradients of input and kernel."""
    x, weight = residuals

    def kernel_gradient(x: Array, gradient: Array) -> Array:
        transposed = jax.linear_transpose(lambda w: convolve(x, w, stride, pad), weight)
        (result,) = transposed(gradient)
        return result

    def kernel_gradient_on_cpu(x: Array, gradient: Array) -> Array:
        return multiply_shifted(x, gradient, weight.shape, stride, pad)

    transposed = jax.linear_transpose(lambda x: convolve(x, weight, stride, pad), x)
    (input_gradient,) = transposed(gradient)
    # On a CPU XLA's convolution for the kernel's gradient takes twice as long as products.
    return input_gradient, jax.lax.platform_dependent(
        x, gradient, cpu=kernel_gradient_on_cpu, default=kernel_gradient
    )


convolve_with_fast_gradient.defvjp(convolve_forward, convolve_backward)


def multiply_shifted(
    x: Array, gradient: Array, shape: tuple[int, ...], stride: int, pad: tuple[int, int]
) -> Array:
    """Return the gradient of a kernel of that shape, by one matrix product per kernel position.

    Args:
        x: the input, [n, h, w, in].
        gradient: of the output, [n, height, width, out].
    """
    _, _, size, _ = shape
    _, height, width, _ = gradient.shape
    positions = [(i, j) for i in range(size) for j in range(size)]
    pairs = []
    # The array with fewer channels is the one that is shifted, since each shift is a copy.
    if stride == 1 and sum(pad) == size - 1 and gradient.shape[-1] < x.shape[-1]:
        padded = jnp.pad(gradient, ((0, 0), pad[::-1], pad[::-1], (0, 0)))
        for i, j in positions:
            top, left = size - 1 - i, size - 1 - j
            pairs.append((padded[:, top : top + height, left : left + width], x))
    else:
        padded = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
        for i, j in positions:
            bottom, right = i + stride * height, j + stride * width
            pairs.append((gradient, padded[:, i:bottom:stride, j:right:stride]))
    over_pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    products = [jax.lax.dot_general(a, b, over_pixels) for a, b in pairs]
    return jnp.stack(products, -1).reshape(shape)


def group_norm(p: Params, x: Array, groups: int, eps: float) -> Array:
    """Normalise x [n, ..., channels] over each group of channels and all pixels (arXiv:1803.08494).

    Mean and variance are taken in two passes, in float32.
    """
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
    """Attend q [n, tokens, width] to k and v [n, keys, width] in several heads, softmax in float32.

    Args:
        mask: False for keys to be ignored, bool [n, keys].
        kernel: a fused implementation, used without a mask where it takes these shapes.
    """
    q_heads, k_heads, v_heads = (t.reshape(*t.shape[:2], heads, -1) for t in (q, k, v))
    if kernel is not None and mask is None and not causal:
        fused = kernel(q_heads, k_heads, v_heads)
        if fused is not None:
            return fused.reshape(q.shape)
    products = jnp.einsum("nqhd,nkhd->nhqk", q_heads, k_heads, preferred_element_type=jnp.float32)
    scores = products / math.sqrt(q_heads.shape[-1])
    if mask is not None:
        scores = scores + jnp.where(mask[:, None, None], 0.0, -10000.0)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(q.dtype)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v_heads).reshape(q.shape)


def sinusoid(t: Array, width: int, cosine_first: bool, shift: float) -> Array:
    """Embed numbers [n] as sines and cosines: float32 [n, width].

    There are ``width`` / 2 frequencies, from 1 down to 1 / 10000.
    """
    half = width // 2
    column = t.astype(jnp.float32)[:, None]
    exponents = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shift)
    angles = column * jnp.exp(exponents)
    if cosine_first:
        return jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), -1)
    return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), -1)


def resnet(p: Params, x: Array, time: Array | None, out: int, groups: int, eps: float) -> Array:
    """Apply two convolutions with norms and a shortcut; ``time`` [n, width] is added in between."""
    h = conv(p / "conv1", jax.nn.silu(group_norm(p / "norm1", x, groups, eps)), out)
    if time is not None:
        h = h + linear(p / "time_emb_proj", jax.nn.silu(time), out)[:, None, None]
    h = conv(p / "conv2", jax.nn.silu(group_norm(p / "norm2", h, groups, eps)), out)
    return h + (x if x.shape[-1] == out else conv(p / "conv_shortcut", x, out, size=1))


def upsample(p: Params, x: Array, size: tuple[int, ...] | None = None) -> Array:
    """Double both sides of x [n, h, w, channels] by repeating pixels, then convolve.

    Args:
        size: (height, width) to be cut to, where a side was odd before it was halved.
    """
    height, width = size or (2 * x.shape[1], 2 * x.shape[2])
    larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
    return conv(p / "upsamplers" / 0 / "conv", larger, x.shape[-1])


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
}
