"""Pictures that look alike, by a perceptual hash: near enough in their 64 bits, found without
comparing all with all."""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

DISTANCE = 4  # bits; docs/log.md has what it finds, and what it confuses
FLAT = 0  # the hash of a picture without detail, which looks like nothing
BLOCK = 4096  # rows that are compared with all others of a band's bucket at once


def perceptual_hash(picture: Image.Image) -> int:
    """A picture's 64-bit perceptual hash (pHash of ImageHash: signs of the low frequencies of a
    32x32 grey picture); ``FLAT`` where there are none."""
    import imagehash

    shrink = max(1, min(picture.size) // 64)
    grey = (
        (picture.reduce(shrink) if shrink > 1 else picture)
        .convert("L")
        .resize((32, 32), Image.Resampling.LANCZOS)
    )
    if float(np.asarray(grey, np.float32).std()) < 2:
        return FLAT
    bits = imagehash.phash(grey).hash.reshape(-1)
    return int(np.packbits(bits).view(">u8")[0])


def group_similar(hashes: Sequence[int], distance: int = DISTANCE) -> list[list[int]]:
    """The numbers of pictures that look alike, directly or through others, in order; pictures
    without detail are in no group.

    Two hashes that differ in at most d bits are equal in one of d + 1 bands, so only pictures with
    an equal band are compared.
    """
    values, inverse = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for start in range(0, len(bucket), BLOCK):
                rows = bucket[start : start + BLOCK]
                near = np.bitwise_count(values[rows][:, None] ^ values[bucket][None, :]) <= distance
                for a, b in zip(*np.nonzero(np.triu(near, 1 + start)), strict=True):
                    one, other = root(int(rows[a])), root(int(bucket[b]))
                    parent[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = {}
    for number, value in enumerate(inverse.reshape(-1)):
        if values[value] != FLAT:
            found.setdefault(root(int(value)), []).append(number)
    return sorted(group for group in found.values() if len(group) > 1)
