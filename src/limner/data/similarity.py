"""Pictures that look alike: their perceptual hashes differ in a few of 64 bits."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash
from PIL import Image

from limner.data import image

DISTANCE = 4  # bits; docs/log.md tells which pictures it groups, rightly and wrongly
FLAT = 2  # the deviation of grey, of 255, below which a picture is without detail
MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
ROWS = 64  # of a picture that are digested at once
BLOCK = 4096  # hashes that are compared at once with all others of an equal band


def perceptual_hashes(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return the 64-bit perceptual hashes of a picture, of PIL or uint8 [H, W, 3], and of its
    mirror image.

    They are pHash of ImageHash: the signs of the low frequencies of a 32x32 grey picture. In a
    picture without detail those would be of noise: its hashes are digests of its pixels.
    """
    # Lanczos over all pixels of a large picture would be slow.
    pixels = np.asarray(picture)
    shrunk = image.shrink(pixels, min(pixels.shape[:2]) // 64, "L")
    grey = Image.fromarray(shrunk).resize((32, 32), Image.Resampling.LANCZOS)
    if float(np.asarray(grey, np.float32).std()) < FLAT:
        return digest_pixels(pixels), digest_pixels(pixels[:, ::-1])
    return read_frequencies(grey), read_frequencies(grey.transpose(MIRROR))


def digest_pixels(pixels: np.ndarray) -> int:
    """Return a 64-bit digest of a picture's shape and pixels."""
    digest = xxhash.xxh3_64(f"{pixels.shape}".encode())
    # Some rows at a time: a copy of a large picture would be hundreds of MB.
    for start in range(0, len(pixels), ROWS):
        digest.update(pixels[start : start + ROWS].tobytes())
    return digest.intdigest()


def read_frequencies(grey: Image.Image) -> int:
    """Return the pHash of a grey picture."""
    import imagehash

    bits = imagehash.phash(grey).hash.reshape(-1)
    return int(np.packbits(bits).view(">u8")[0])


def group_similar(
    hashes: Sequence[int], mirrored: Sequence[int] = (), distance: int = DISTANCE
) -> list[list[int]]:
    """Return groups of pictures that look alike, directly or through others, as numbers in order.

    Args:
        mirrored: the hashes of their mirror images, where a picture is like its own; else none.
    """
    count = len(hashes)
    values, value_numbers = np.unique(
        np.array([*hashes, *mirrored], np.uint64), return_inverse=True
    )
    value_numbers = value_numbers.reshape(-1)
    # A forest over the values: a root is its own parent, and all below it form one group.
    parents = list(range(len(values)))

    def find_root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    own_mirrors = zip(value_numbers[:count], value_numbers[count:], strict=False)
    for one, other in itertools.chain(find_near_pairs(values, distance), own_mirrors):
        roots = find_root(one), find_root(other)
        parents[max(roots)] = min(roots)
    groups: dict[int, list[int]] = {}
    for picture, number in enumerate(value_numbers[:count]):
        groups.setdefault(find_root(int(number)), []).append(picture)
    return sorted(group for group in groups.values() if len(group) > 1)


def find_near_pairs(values: np.ndarray, distance: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of numbers of ``values`` (uint64) that differ in at most ``distance`` bits."""
    # Two values that differ in d bits are equal in at least one of d + 1 bands of their bits, so
    # only values with an equal band are compared.
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            yield from compare_all(values, bucket, distance)


def compare_all(
    values: np.ndarray, numbers: np.ndarray, distance: int
) -> Iterator[tuple[int, int]]:
    """Yield the near pairs among some values; ``numbers`` are their places in ``values``."""
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK]
        differing = np.bitwise_count(values[block][:, None] ^ values[numbers][None, :])
        # Above the diagonal: each pair once, and none of a value with itself.
        near = np.triu(differing <= distance, 1 + start)
        for row, column in zip(*np.nonzero(near), strict=True):
            yield int(block[row]), int(numbers[column])
