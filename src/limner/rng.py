"""Randomness is an address, not a state: a number is named by (seed, purpose, major, minor), and
nothing random is ever saved."""

import zlib

import numpy as np


def at(seed: int, purpose: str, major: int, minor: int = 0) -> np.random.Generator:
    """The generator that lives at one address: same address, same numbers, in any process and any
    order of calls.

    Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed by the
    seed and the purpose, and counts from (major, minor); an address holds 2**128 numbers, so that
    neighbours never overlap.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        purpose: what the numbers are for, e.g. ``"noise"``; purposes never move each other.
        major, minor: which example, epoch or record.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, minor, major], np.uint64))
    )


def uniform(seed: int, purpose: str, major: int, minor: int = 0) -> float:
    """The first number in [0, 1) at an address."""
    return float(at(seed, purpose, major, minor).random())
