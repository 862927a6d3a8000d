"""Fused attention where a platform has a kernel for it (arXiv:2205.14135).

It never holds the scores, which are gigabytes at full size.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array
# q, k, v [n, tokens, heads, width] -> the same shape, or None for inputs that it does not take.
Kernel = Callable[[Array, Array, Array], Array | None]
AMPERE = 8.0  # compute capability from which cuDNN has fused attention
LANES = 128  # of a TPU: tokens are padded to a multiple
LONG = 1024  # tokens; below it the scores are small, and plain products as fast


def choose_kernel(device: jax.Device, mesh: Mesh | None = None) -> Kernel | None:
    """Choose the kernel of a device: NVIDIA's from Ampere on, or that of TPUs, or None.

    Args:
        mesh: the devices that rows are divided over; None: all rows are on one device.
    """
    if device.platform == "tpu":
        return partial(flash, mesh=mesh)
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return None
    return cudnn if float(device.compute_capability) >= AMPERE else None


def cudnn(q: Array, k: Array, v: Array) -> Array | None:
    """Attend by cuDNN, in 16 bits and with heads of up to 128."""
    width = q.shape[-1]
    if q.dtype not in (jnp.float16, jnp.bfloat16) or width % 8 or width > 128:
        return None
    output: Array = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return output


def flash(q: Array, k: Array, v: Array, mesh: Mesh | None = None) -> Array | None:
    """Attend by Pallas' kernel for TPUs: long self-attention in bfloat16."""
    width = q.shape[-1]
    is_short = q.shape != k.shape or q.shape[1] < LONG
    if q.dtype != jnp.bfloat16 or is_short or (width > LANES and width % LANES):
        return None
    if mesh is None:
        return flash_padded(q, k, v)
    rows = PartitionSpec(mesh.axis_names)
    divided = jax.shard_map(flash_padded, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    output: Array = divided(q, k, v)
    return output


def flash_padded(q: Array, k: Array, v: Array) -> Array:
    """Attend on one TPU; padding up to a multiple of its lanes is in a segment of its own."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    rows, tokens, _, width = q.shape
    padded_tokens = -(-tokens // LANES) * LANES
    side = next(side for side in (512, 256, LANES) if padded_tokens % side == 0)
    segments = None
    if padded_tokens > tokens:
        is_padding = jnp.broadcast_to(jnp.arange(padded_tokens) >= tokens, (rows, padded_tokens))
        segments = tpu.SegmentIds(*[is_padding.astype(jnp.int32)] * 2)
    padding = ((0, 0), (0, padded_tokens - tokens), (0, 0), (0, 0))
    heads_first = (jnp.pad(x, padding).transpose(0, 2, 1, 3) for x in (q, k, v))
    output: Array = tpu.flash_attention(
        *heads_first,
        segment_ids=segments,
        sm_scale=1 / math.sqrt(width),
        block_sizes=make_block_sizes(side),
    )
    return output.transpose(0, 2, 1, 3)[:, :tokens]


def make_block_sizes(side: int) -> object:
    """Return square blocks for the forward pass and both backward passes."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    return tpu.BlockSizes(
        block_b=1,
        block_q=side,
        block_k_major=side,
        block_k=side,
        block_q_major_dkv=side,
        block_k_major_dkv=side,
        block_k_dkv=side,
        block_q_dkv=side,
        block_k_major_dq=side,
        block_k_dq=side,
        block_q_dq=side,
    )
