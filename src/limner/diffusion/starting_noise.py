"""The noise that a picture starts from: what PyTorch's generator of the CPU draws, in numpy.

A seed then means the same picture in every engine and in stock diffusers. The algorithm is that of
``normal_fill`` in PyTorch 2.13 (aten/src/ATen/native/cpu/DistributionTemplates.h).
"""

import math

import numpy as np
from numpy.typing import DTypeLike

BLOCK = 16  # numbers of one Box-Muller transform: 8 radii and 8 angles


def draw_starting_noise(
    shape: tuple[int, ...], seed: int, dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Draw what ``torch.randn`` draws for this seed, to about 5e-7 in float32.

    The call is ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype)``.

    Args:
        seed: any integer; PyTorch's generator takes its lowest 32 bits.
        dtype: float32, float16 or bfloat16; the last two are rounded from float32.
    """
    # Both libraries start the Mersenne Twister by init_genrand of Matsumoto and Nishimura.
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    size = math.prod(shape)
    if size < BLOCK:
        return draw_few(generator, size).astype(dtype).reshape(shape)
    whole = size - size % BLOCK
    normal = np.empty(size, np.float32)
    normal[:whole] = transform_blocks(draw_uniform(generator, whole))
    if size > whole:
        # In float32 PyTorch draws uniform numbers for all before it draws the last 16 anew.
        if np.dtype(dtype) == np.float32:
            draw_uniform(generator, size - whole)
        normal[-BLOCK:] = transform_blocks(draw_uniform(generator, BLOCK))
    return normal.astype(dtype).reshape(shape)


def draw_bits(generator: np.random.RandomState, count: int) -> np.ndarray:
    """Draw numbers of 32 random bits, uint32."""
    return generator.randint(0, 1 << 32, count, np.uint32)


def draw_uniform(generator: np.random.RandomState, count: int) -> np.ndarray:
    """Draw float32 in [0, 1) of 24 random bits each."""
    bits = draw_bits(generator, count) & np.uint32((1 << 24) - 1)
    return bits.astype(np.float32) * np.float32(2.0**-24)


def transform_blocks(uniform: np.ndarray) -> np.ndarray:
    """Make uniform numbers standard normal, block by block, by Box and Muller (1958).

    A block's first half gives radii, its second half angles; cosines go to the first half.
    """
    radius_part, angle_part = uniform.reshape(-1, 2, BLOCK // 2).swapaxes(0, 1)
    radius = np.sqrt(-2 * np.log(1 - radius_part))
    angle = np.float32(2 * np.pi) * angle_part
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def draw_few(generator: np.random.RandomState, count: int) -> np.ndarray:
    """Draw fewer than 16 standard normal numbers, which PyTorch makes in float64 and in pairs."""
    pairs = -(-count // 2)
    words = draw_bits(generator, 4 * pairs).astype(np.uint64)
    bits = (words[0::2] << np.uint64(32) | words[1::2]) & np.uint64((1 << 53) - 1)
    uniform = bits.astype(np.float64) * 2.0**-53
    angle = 2 * np.pi * uniform[0::2]
    radius = np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]
