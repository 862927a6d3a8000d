"""What both engines do with the pictures that an autoencoder gives."""

from collections.abc import Iterable, Sequence

import numpy as np

from limner.errors import InputError, join_first, say_count
from limner.protocols import Report


def round_pictures(images: Iterable[np.ndarray]) -> tuple[list[np.ndarray], list[bool]]:
    """Return pictures as uint8 [height, width, 3], black where a number is not finite, and of each
    whether one is not.

    Args:
        images: in [0, 1], float [height, width, 3] each.

    Raises:
        InputError: for pictures of another number of channels.
    """
    pictures, broken = [], []
    for image in images:
        if image.ndim != 3 or image.shape[-1] != 3:
            raise InputError(
                f"the autoencoder gives pictures of {image.shape[-1]} channels, 3 are expected. "
                "Choose another autoencoder, or another base."
            )
        finite = np.isfinite(image)
        broken.append(not finite.all())
        pictures.append((np.where(finite, image, 0) * 255).round().astype(np.uint8))
    return pictures, broken


def report_broken(
    prompts: Sequence[str], seeds: Sequence[int], flags: Sequence[bool], report: Report
) -> None:
    """Say which pictures have numbers that are not finite.

    Args:
        flags: of each picture, whether it has.
    """
    pictures = zip(prompts, seeds, flags, strict=True)
    broken = [f"{prompt!r} (seed {seed})" for prompt, seed, is_broken in pictures if is_broken]
    if broken:
        total = f"of {len(flags)} pictures"
        report(
            f"{say_count(len(broken), f'{total} has', f'{total} have')} black places, because the "
            f"networks gave numbers there that are not finite: {join_first(broken)}. In fp16 that "
            "is often an overflow: another precision may do. Else the weights are broken"
        )
