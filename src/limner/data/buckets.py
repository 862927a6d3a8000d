"""Sizes of about the same area and different proportions, and the one that fits a picture best."""

import functools
import math

from limner import config
from limner.faults import InputFault

Shape = tuple[int, int]  # height, width


class TooSmall(ValueError):
    """A picture that would have to be enlarged where the recipe forbids it; the message is the
    reason."""


@functools.lru_cache(maxsize=64)
def shapes(side: int, cfg: config.Buckets) -> tuple[Shape, ...]:
    """All sizes whose area is near ``side`` squared: for each height the nearest width, and for
    each width the nearest height.

    For 1024 and steps of 64 each size of the table in appendix I of arXiv:2307.01952 is among
    these, or has a neighbour among them that differs by one step in one side; areas there differ by
    up to 9 %, here by at most step / (2 * shortest side), 6 %.

    Raises:
        InputFault: when there is none between the shortest and the longest side.
    """
    smallest = math.ceil((cfg.smallest or side // 2) / cfg.step) * cfg.step
    largest = (cfg.largest or 2 * side) // cfg.step * cfg.step
    pairs = [
        (one, round(side * side / one / cfg.step) * cfg.step)
        for one in range(max(smallest, cfg.step), largest + 1, cfg.step)
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
        raise InputFault(
            f"data.buckets: no size of about {side}x{side} pixels has sides that are multiples of "
            f"{cfg.step}, at least {smallest} and at most {largest}. "
            "Change data.buckets.step, smallest or largest, or the resolution."
        )
    return tuple(found)


def fit(original: Shape, data: config.Data) -> Shape:
    """The height and width that a picture of ``original`` (height, width) is cut to.

    Raises:
        TooSmall: when it would have to be enlarged, and ``data.buckets.upscale`` is false.
    """
    return (
        (data.size, data.size)
        if data.buckets is None
        else fitting(original, data.size, data.buckets)
    )


@functools.lru_cache(maxsize=1 << 16)
def fitting(original: Shape, size: int, cfg: config.Buckets) -> Shape:
    """The size of the nearest proportions; of several resolutions, the largest that the picture
    fills."""
    nearest = [
        min(shapes(side, cfg), key=functools.partial(distance, original))
        for side in sorted(cfg.resolutions or (size,), reverse=True)
    ]
    filled = [shape for shape in nearest if shape[0] <= original[0] and shape[1] <= original[1]]
    if not filled and not cfg.upscale:
        (height, width), (tall, wide) = original, nearest[-1]
        raise TooSmall(
            f"{width}x{height} pixels are too small for its bucket of {wide}x{tall} "
            "(data.buckets.upscale = false)"
        )
    return (filled or nearest[-1:])[0]


def distance(original: Shape, shape: Shape) -> tuple[float, int, int]:
    """How far two proportions are apart; of equally near ones the larger size comes first."""
    return (
        abs(math.log(original[0] * shape[1] / (original[1] * shape[0]))),
        -shape[0] * shape[1],
        shape[0],
    )
