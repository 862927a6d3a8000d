"""Pictures that look alike: their perceptual hashes differ in a few of 64 bits, or they are plain
and of nearly one colour."""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from limner.data import image

DISTANCE = 4  # bits; docs/log.md tells which pictures it groups, rightly and wrongly
FLAT = 2  # the deviation of grey, of 255, below which a picture is faint
PLAIN = 0.02  # the deviation of every channel below which nothing is to be seen in a picture
SIDE = 32  # of the small picture whose frequencies are read
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue
MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
BLOCK = 4096  # hashes that are compared at once with all others of an equal band
# How far plain colours may differ, in each channel, and be alike: as after JPEG of quality 50.
TOLERANCE = 3
FIELD_BITS = 9  # of a plain picture's hash: its proportions, red, green and blue
# Hashes of plain pictures are below; no other is, since the first bit of a pHash is always set.
PLAIN_END = 1 << 4 * FIELD_BITS
# Levels of a faint picture's mean colour that turn over one bit of its hash: of grey, and of what
# red and blue are above green.
GREY_STEP, TINT_STEP = 12.75, 17.0
GREY_TINT = 10  # of 21 steps, where red, green and blue are equal
COLOR_BITS = 21  # for each of the three


def perceptual_hashes(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return the 64-bit perceptual hashes of a picture, of PIL or uint8 [H, W, 3], and of its
    mirror image.

    They are pHash of ImageHash: the signs of the low frequencies of a 32x32 grey picture. Of a
    faint picture they are read with its contrast stretched, and some bits are turned over by its
    colour (``encode_color``). A plain one has colour and proportions only (``encode_plain``).
    """
    # Lanczos over all pixels of a large picture would be slow.
    pixels = np.asarray(picture)
    shrunk = image.shrink(pixels, min(pixels.shape[:2]) // 64, "L")
    grey = Image.fromarray(shrunk).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    deviation = float(np.asarray(grey, np.float32).std())
    if deviation >= FLAT:
        return read_frequencies(grey), read_frequencies(grey.transpose(MIRROR))
    small = shrink_exactly(pixels)
    color = small.mean((0, 1))
    if small.std((0, 1)).max() < PLAIN:
        code = encode_plain(color, pixels.shape[0], pixels.shape[1])
        return code, code
    # The more there is to be seen, the less its colour counts: at the bound, not at all.
    turned = encode_color(color, min(1.0, 2 * (1 - deviation / FLAT)))
    stretched = stretch_contrast(small)
    mirrored = stretched.transpose(MIRROR)
    return read_frequencies(stretched) ^ turned, read_frequencies(mirrored) ^ turned


def shrink_exactly(pixels: np.ndarray) -> np.ndarray:
    """Make pixels, uint8 [H, W, 3], a small picture that is not rounded to whole levels: float32
    [32, 32, 3]. A faint line is less than a level there."""
    height, width = pixels.shape[:2]
    rows = np.arange(0, height, max(1, height // 64))
    columns = np.arange(0, width, max(1, width // 64))
    # A block of rows at a time: the sums of a large picture would be far larger than it is.
    blocks = np.split(pixels, rows[1:])
    sums = [np.add.reduceat(block.sum(0, dtype=np.int64), columns) for block in blocks]
    counts = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    means = (np.stack(sums) / counts[..., None]).astype(np.float32)
    channels = [
        Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for channel in np.ascontiguousarray(means.transpose(2, 0, 1))
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def stretch_contrast(small: np.ndarray) -> Image.Image:
    """Return the grey of a faint picture, float32 [32, 32, 3], from black to white; of colours that
    are equally bright, the channel that shows most."""
    grey, deviations = small @ GREY, small.std((0, 1))
    if 4 * grey.std() < deviations.max():
        grey = small[..., int(deviations.argmax())]
    low, high = grey.min(), grey.max()
    return Image.fromarray(np.rint((grey - low) * (255 / (high - low))).astype(np.uint8))


def encode_color(color: np.ndarray, share: float) -> int:
    """Return the bits that a faint picture's mean colour, 0 to 255 [3], turns over in its hash:
    none for white, and one more for each step away from it.

    A little more or less of a colour is a bit, seldom two: of greys only the first part changes.

    Args:
        share: 0 to 1, of the steps that are taken.
    """
    red, green, blue = (float(level) for level in color)
    tints = [share * (level - green) / TINT_STEP + GREY_TINT for level in (red, blue)]
    bits = 0
    for number, step in enumerate([share * (255 - float(color @ GREY)) / GREY_STEP, *tints]):
        steps = min(COLOR_BITS, max(0, round(step)))
        bits |= ((1 << steps) - 1) << COLOR_BITS * number
    whites = (1 << GREY_TINT) - 1
    return bits ^ (whites << COLOR_BITS | whites << 2 * COLOR_BITS)


def encode_plain(color: np.ndarray, height: int, width: int) -> int:
    """Return the hash of a plain picture: its proportions, in sixteenths of an octave, and its
    colour, 0 to 255 [3], a field each."""
    proportions = min(255, max(0, 128 + round(16 * math.log2(height / width))))
    code = 0
    for value in (proportions, *color):
        # No step of ``TOLERANCE`` from here leads into the field beside it.
        code = code << FIELD_BITS | round(float(value)) + TOLERANCE
    return code


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
    """Yield pairs of numbers of ``values`` (uint64, in order) that differ in at most ``distance``
    bits; of plain pictures, those of nearly one colour."""
    plain = int(np.searchsorted(values, np.uint64(PLAIN_END)))
    yield from find_near_colors(values[:plain])
    # Two values that differ in d bits are equal in at least one of d + 1 bands of their bits, so
    # only values with an equal band are compared.
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (values[plain:] >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            yield from compare_all(values, plain + bucket, distance)


def find_near_colors(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of numbers of hashes of plain pictures (uint64, in order) whose fields differ in
    at most ``TOLERANCE`` each."""
    if len(values) < 2:
        return
    for steps in itertools.product(range(-TOLERANCE, TOLERANCE + 1), repeat=4):
        step = sum(step << FIELD_BITS * number for number, step in enumerate(steps))
        if step > 0:  # each pair once
            wanted = values + np.uint64(step)
            places = np.searchsorted(values, wanted).clip(max=len(values) - 1)
            for number in np.flatnonzero(values[places] == wanted):
                yield int(number), int(places[number])


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
