"""Randomness is an address: golden numbers, and nothing that one purpose or place does moves
another."""

import itertools

import numpy as np
import pytest

from limner import rng


@pytest.mark.parametrize(
    ("address", "number"),
    [
        ((0, "flip", 0), 0.7872009849531919),
        ((7, "timestep", 123), 0.9886763724208518),
        ((2**63 - 1, "drop", 5, 2), 0.2779232902174411),
        ((2**64 - 1, "drop", 2**40, 2**64 - 1), 0.5044172205617329),
    ],
)
def test_golden_uniform(address: tuple, number: float) -> None:
    """Whoever moves an address changes every run that was ever begun."""
    assert rng.uniform(*address) == number


def test_golden_permutation_and_normals() -> None:
    assert rng.at(0, "order", 0).permutation(8).tolist() == [7, 6, 3, 4, 0, 5, 1, 2]
    assert rng.at(7, "order", 3).permutation(8).tolist() == [4, 3, 1, 7, 2, 5, 0, 6]
    noise = rng.at(0, "noise", 0).standard_normal(4, np.float32)
    assert noise.tolist() == [
        -0.018020344898104668,
        1.3030279874801636,
        -0.5899849534034729,
        -0.7349853515625,
    ]
    watched = rng.at(7, "watch noise", 10**9).standard_normal(4, np.float32)
    assert watched.tolist() == [
        0.31193581223487854,
        -0.252479612827301,
        0.23440462350845337,
        -1.0397288799285889,
    ]


def test_large_seeds_are_told_apart() -> None:
    """A seed near 2**63 does not go through floating point, where its neighbours would be the
    same."""
    assert (
        len(
            {
                rng.uniform(seed, "noise", 0)
                for seed in (2**63 - 2, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)
            }
        )
        == 5
    )


def test_order_of_calls_does_not_matter() -> None:
    addresses = list(itertools.product((0, 1), ("noise", "crop"), range(5), range(2)))
    forward = {a: rng.at(*a).random(3).tolist() for a in addresses}
    backward = {a: rng.at(*a).random(3).tolist() for a in reversed(addresses)}
    assert forward == backward


def test_purposes_do_not_move_each_other() -> None:
    alone = [rng.uniform(3, "crop", p) for p in range(20)]
    between = []
    for p in range(20):
        rng.at(3, "a new augmentation", p).random(1000)
        between.append(rng.uniform(3, "crop", p))
        rng.at(3, "noise", p).standard_normal(1000)
    assert between == alone


def test_addresses_do_not_overlap() -> None:
    """Long draws at neighbouring addresses, of every kind of neighbour, have no number in
    common."""
    near = [
        (0, "noise", 0, 0),
        (1, "noise", 0, 0),
        (0, "posterior", 0, 0),
        (0, "noise", 1, 0),
        (0, "noise", 0, 1),
        (0, "noise", 1, 1),
    ]
    numbers = [rng.at(*address).integers(2**63, size=20_000) for address in near]
    assert len(np.unique(np.concatenate(numbers))) == len(near) * 20_000


def test_purposes_in_use_have_keys_of_their_own() -> None:
    import zlib

    names = [
        "order",
        "flip",
        "crops",
        "caption",
        "drop",
        "timestep",
        "crop",
        "noise",
        "offset",
        "posterior",
        "perturbation",
        "hold out",
        "limit",
        "lora",
    ]
    names += [f"watch {name}" for name in names]
    assert len({zlib.crc32(name.encode()) for name in names}) == len(names)


def test_uniform_is_uniform() -> None:
    numbers = np.array([rng.uniform(5, "timestep", p) for p in range(2000)])
    assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
