"""A seed's starting noise is the one that PyTorch's generator of the CPU draws."""

import math
from typing import Any

import numpy as np
import pytest

from limner.diffusion.starting_noise import draw_starting_noise

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**53 + 1, 2**64 - 1)
SHAPES = (
    *((n,) for n in (*range(1, 34), 47, 48, 63, 255, 4097)),
    (1, 4, 8, 8),
    (1, 4, 9, 7),
    (1, 4, 15, 15),
    (1, 1, 5, 5),
    (1, 4, 128, 96),
    (2, 3),
    (3, 5, 7),
    (0,),
    (1, 4, 0, 8),
    (),
)


def drawn_by_torch(shape: tuple[int, ...], seed: int, dtype: Any = None) -> np.ndarray:
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).double().numpy()


@pytest.mark.frameworks
@pytest.mark.parametrize("seed", SEEDS)
def test_float32_is_torch_s_to_one_millionth(seed: int) -> None:
    for shape in SHAPES:
        own = draw_starting_noise(shape, seed)
        assert own.shape == shape and own.dtype == np.float32
        assert np.abs(own - drawn_by_torch(shape, seed)).max(initial=0) < 1e-6, shape


@pytest.mark.frameworks
def test_a_million_numbers_with_their_tails() -> None:
    own, stock = draw_starting_noise((1 << 20,), 3), drawn_by_torch((1 << 20,), 3)
    assert np.abs(own - stock).max() < 1e-6
    assert np.abs(stock).max() > 4.5, "the rarest numbers are among them"


@pytest.mark.frameworks
@pytest.mark.parametrize(("name", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_is_torch_s_but_for_how_the_last_bit_is_rounded(
    name: str, bits: int
) -> None:
    """Numbers that lie between two of the type may fall to either side."""
    import torch

    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[name]
    differ = total = 0
    for seed in SEEDS:
        for shape in SHAPES:
            own = draw_starting_noise(shape, seed, dtype)
            assert own.shape == shape and own.dtype == dtype
            own, stock = own.astype(np.float64), drawn_by_torch(shape, seed, getattr(torch, name))
            spacing = 2.0 ** (np.floor(np.log2(np.abs(stock) + 1e-30)) + 1 - bits)
            assert (np.abs(own - stock) <= spacing).all(), (seed, shape)
            differ += int((own != stock).sum())
            total += math.prod(shape)
    assert total > 400_000 and differ < 1e-4 * total


def test_seeds_differ_and_only_their_lowest_32_bits_count() -> None:
    one, two = (draw_starting_noise((64,), seed) for seed in (5, 6))
    assert np.abs(one - two).max() > 1
    np.testing.assert_array_equal(one, draw_starting_noise((64,), 2**32 + 5))
