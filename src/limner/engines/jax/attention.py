"""Fused attention, where a platform has a kernel for it: the scores, gigabytes at full size, are
never in memory (arXiv:2205.14135)."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array
Kernel = Callable[
    [Array, Array, Array], Array | None
]  # q, k, v [n, tokens, heads, width] to the same shape; None: what it cannot serve
AMPERE = 8.0  # the compute capability that cuDNN's fused attention begins with
LANES = 128  # of a TPU: what tokens are padded to
LONG = 1024  # tokens; the scores of fewer are small, and plain products as fast


def choose_kernel(device: jax.Device, mesh: Mesh | None = None) -> Kernel | None:
    """The kernel of a kind of device: NVIDIA's from Ampere on, and TPUs; None where there is none.

    Args:
        mesh: over all of whose devices the rows are divided; None: they lie on one device.
    """
    if (
        device.platform == "gpu"
        and "cuda" in device.client.platform_version.lower()
        and float(device.compute_capability) >= AMPERE
    ):
        return cudnn
    return partial(flash, mesh=mesh) if device.platform == "tpu" else None


def cudnn(q: Array, k: Array, v: Array) -> Array | None:
    """cuDNN's, for 16 bits and heads of up to 128."""
    if q.dtype not in (jnp.float16, jnp.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return None
    found: Array = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return found


def flash(q: Array, k: Array, v: Array, mesh: Mesh | None = None) -> Array | None:
    """Pallas' for TPUs, for the attention of many tokens to themselves in bfloat16."""
    width = q.shape[-1]
    if (
        q.dtype != jnp.bfloat16
        or q.shape != k.shape
        or q.shape[1] < LONG
        or (width > LANES and width % LANES)
    ):
        return None
    if mesh is None:
        return flash_padded(q, k, v)
    rows = PartitionSpec(mesh.axis_names)
    found: Array = jax.shard_map(
        flash_padded, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )(q, k, v)
    return found


def flash_padded(q: Array, k: Array, v: Array) -> Array:
    """On one TPU; tokens up to the next multiple of its lanes are there, and not looked at."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    rows, tokens, _, width = q.shape
    whole = -(-tokens // LANES) * LANES
    side = next(side for side in (512, 256, LANES) if whole % side == 0)
    forward, keys, queries = (
        ("q", "k_major", "k"),
        ("q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv"),
        ("k_major_dq", "k_dq", "q_dq"),
    )
    sizes = tpu.BlockSizes(
        block_b=1, **{f"block_{name}": side for name in (*forward, *keys, *queries)}
    )
    seen = (
        tpu.SegmentIds(
            *[jnp.broadcast_to(jnp.arange(whole) >= tokens, (rows, whole)).astype(jnp.int32)] * 2
        )
        if whole > tokens
        else None
    )
    apart = (
        jnp.pad(x, ((0, 0), (0, whole - tokens), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
        for x in (q, k, v)
    )
    found: Array = tpu.flash_attention(
        *apart, segment_ids=seen, sm_scale=1 / math.sqrt(width), block_sizes=sizes
    )
    return found.transpose(0, 2, 1, 3)[:, :tokens]
