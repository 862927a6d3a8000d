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
    if any(flags):
        count = say_part(flags, "has", "have")
        report(
            f"{count} black places, because the networks gave numbers there that are not finite: "
            f"{name_flagged(prompts, seeds, flags)}. In fp16 that is often an overflow: another "
            "precision may do. Else the weights are broken"
        )


def say_part(flags: Sequence[bool], one: str, several: str) -> str:
    """Return how many of all pictures are flagged, and the verb: ``2 of 8 pictures are``."""
    total = f"of {len(flags)} pictures"
    return say_count(sum(flags), f"{total} {one}", f"{total} {several}")


def name_flagged(prompts: Sequence[str], seeds: Sequence[int], flags: Sequence[bool]) -> str:
    """Return prompt and seed of the pictures that are flagged."""
    pictures = zip(prompts, seeds, flags, strict=True)
    return join_first([f"{prompt!r} (seed {seed})" for prompt, seed, is_one in pictures if is_one])
