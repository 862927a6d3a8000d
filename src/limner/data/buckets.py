"""Buckets: sizes of about the same area and different proportions."""

import functools
import math

from limner.config.schema import BucketSettings, DataSettings
from limner.errors import InputError

Shape = tuple[int, int]  # height, width


class TooSmall(ValueError):
    """A picture that a bucket would enlarge, against the recipe; the message is the reason."""


@functools.lru_cache(maxsize=64)
def make_shapes(side: int, config: BucketSettings) -> tuple[Shape, ...]:
    """Return all bucket sizes whose area is near ``side`` squared, in order.

    They are, for each height, the nearest width, and for each width the nearest height. For 1024
    and steps of 64 each size of the table in appendix I of arXiv:2307.01952 is among them, or has a
    neighbour among them that differs by one step in one side. Areas in that table differ by up to
    9 %, these by at most step / (2 * shortest side), 6 %.

    Raises:
        InputError: when there is none between the shortest and the longest side.
    """
    step = config.step
    smallest = math.ceil((config.smallest or side // 2) / step) * step
    largest = (config.largest or 2 * side) // step * step
    shapes: set[Shape] = set()
    for height in range(max(smallest, step), largest + 1, step):
        width = round(side * side / height / step) * step
        if smallest <= width <= largest:
            shapes |= {(height, width), (width, height)}
    if not shapes:
        raise InputError(
            f"data.buckets: no size of about {side}x{side} pixels has sides that are multiples of "
            f"{step}, at least {smallest} and at most {largest}. "
            "Change data.buckets.step, smallest or largest, or the resolution."
        )
    return tuple(sorted(shapes))


def choose_shape(original: Shape, data: DataSettings) -> Shape:
    """Return the height and width to which a picture of ``original`` (height, width) is cut.

    Raises:
        TooSmall: when it would be enlarged, and ``data.buckets.upscale`` is false.
    """
    if data.buckets is None:
        return data.size, data.size
    return choose_bucket(original, data.size, data.buckets)


@functools.lru_cache(maxsize=1 << 16)
def choose_bucket(original: Shape, size: int, config: BucketSettings) -> Shape:
    """Return the bucket of the nearest proportions, at the largest resolution that is filled."""
    nearest = [
        min(make_shapes(side, config), key=functools.partial(rank_shape, original))
        for side in sorted(config.resolutions or (size,), reverse=True)
    ]
    filled = [shape for shape in nearest if shape[0] <= original[0] and shape[1] <= original[1]]
    if filled:
        return filled[0]
    smallest = nearest[-1]
    if not config.upscale:
        raise TooSmall(
            f"{original[1]}x{original[0]} pixels are too small for its bucket of "
            f"{smallest[1]}x{smallest[0]} (data.buckets.upscale = false)"
        )
    return smallest


def rank_shape(original: Shape, shape: Shape) -> tuple[float, int, int]:
    """Return a sort key: the nearest proportions first, of equally near ones the largest size."""
    difference = abs(math.log(original[0] * shape[1] / (original[1] * shape[0])))
    return difference, -shape[0] * shape[1], shape[0]
