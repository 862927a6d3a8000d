"""Random numbers by address: (seed, purpose, major, minor) names a generator.

No state of a generator is ever saved or restored.
"""

import zlib

import numpy as np


def at(seed: int, purpose: str, major: int, minor: int = 0) -> np.random.Generator:
    """Return the generator at one address.

    The same address gives the same numbers in any process and in any order of calls.

    Philox (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed by the
    seed and the purpose, and counts from (major, minor). An address holds 2**128 numbers, so that
    neighbours never overlap.

    Args:
        seed: of the run, 0 to 2**64 - 1.
        purpose: a name for the numbers' use, such as ``"noise"``; purposes are independent.
        major, minor: the example, epoch or record.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], np.uint64)
    # The lower two words of the counter count the numbers that are drawn at this address.
    counter = np.array([0, 0, minor, major], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniform(seed: int, purpose: str, major: int, minor: int = 0) -> float:
    """Return the first number in [0, 1) at an address."""
    return float(at(seed, purpose, major, minor).random())
