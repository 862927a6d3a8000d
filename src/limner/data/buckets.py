"""Sizes of about the same area and different proportions, and the one that fits a picture best."""

import functools
import math

from limner.config.schema import BucketSettings, DataSettings
from limner.errors import InputError

Shape = tuple[int, int]  # height, width


class TooSmall(ValueError):
    """A picture that would have to be enlarged where the recipe forbids it; the message is the
    reason."""


@functools.lru_cache(maxsize=64)
def make_shapes(side: int, config: BucketSettings) -> tuple[Shape, ...]:
    """All sizes whose area is near ``side`` squared: for each height the nearest width, and for
    each width the nearest height.

    For 1024 and steps of 64 each size of the table in appendix I of arXiv:2307.01952 is among
    these, or has a neighbour among them that differs by one step in one side; areas there differ by
    up to 9 %, here by at most step / (2 * shortest side), 6 %.

    Raises:
        InputError: when there is none between the shortest and the longest side.
    """
    smallest = math.ceil((config.smallest or side // 2) / config.step) * config.step
    largest = (config.largest or 2 * side) // config.step * config.step
    pairs = [
        (one, round(side * side / one / config.step) * config.step)
        for one in range(max(smallest, config.step), largest + 1, config.step)
    ]
    found = sorted(
        {
            shape
            for one, other in pairs
            if smallest <= other <= largest
            for shape in ((one, other), (other, one))
        }
    )
    if not found:
        raise InputError(
            f"data.buckets: no size of about {side}x{side} pixels has sides that are multiples of "
            f"{config.step}, at least {smallest} and at most {largest}. "
            "Change data.buckets.step, smallest or largest, or the resolution."
        )
    return tuple(found)


def choose_shape(original: Shape, data: DataSettings) -> Shape:
    """The height and width that a picture of ``original`` (height, width) is cut to.

    Raises:
        TooSmall: when it would have to be enlarged, and ``data.buckets.upscale`` is false.
    """
    return (
        (data.size, data.size)
        if data.buckets is None
        else choose_bucket(original, data.size, data.buckets)
    )


@functools.lru_cache(maxsize=1 << 16)
def choose_bucket(original: Shape, size: int, config: BucketSettings) -> Shape:
    """The size of the nearest proportions; of several resolutions, the largest that the picture
    fills."""
    nearest = [
        min(make_shapes(side, config), key=functools.partial(compare_proportions, original))
        for side in sorted(config.resolutions or (size,), reverse=True)
    ]
    filled = [shape for shape in nearest if shape[0] <= original[0] and shape[1] <= original[1]]
    if not filled and not config.upscale:
        (height, width), (tall, wide) = original, nearest[-1]
        raise TooSmall(
            f"{width}x{height} pixels are too small for its bucket of {wide}x{tall} "
            "(data.buckets.upscale = false)"
        )
    return (filled or nearest[-1:])[0]


def compare_proportions(original: Shape, shape: Shape) -> tuple[float, int, int]:
    """How far two proportions are apart; of equally near ones the larger size comes first."""
    return (
        abs(math.log(original[0] * shape[1] / (original[1] * shape[0]))),
        -shape[0] * shape[1],
        shape[0],
    )
