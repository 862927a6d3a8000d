"""Captions that are longer than the text encoders see."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TruncatedCaption:
    """A caption that the text encoder sees cut."""

    key: str  # of its record
    caption: str
    tokens: int  # uncut


def find_truncated_captions(
    captions: Iterable[tuple[str, str]],
    count_tokens: Callable[[list[str]], list[int]],
    max_tokens: int,
) -> list[TruncatedCaption]:
    """Return the captions of more than ``max_tokens`` tokens.

    Args:
        captions: (key of the record, caption), as ``Index.captions`` gives them.
        count_tokens: returns the tokens of each text, start and end included.
    """
    pairs = list(captions)
    # Each distinct text is counted once.
    texts = list(dict.fromkeys(text for _, text in pairs))
    lengths: dict[str, int] = {}
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        lengths |= zip(part, count_tokens(part), strict=True)
    return [
        TruncatedCaption(key, text, lengths[text])
        for key, text in pairs
        if lengths[text] > max_tokens
    ]
