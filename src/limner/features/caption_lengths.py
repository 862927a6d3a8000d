"""Captions that are longer than the text encoders see."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from limner.errors import join_first, say_count
from limner.families.text import Text
from limner.protocols import Report, Tokenizers

SHOWN = 60  # characters of a prompt in a message


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


def report_cut_prompts(
    text: Text, tokenizers: Tokenizers, prompts: Sequence[str], report: Report
) -> None:
    """Name the prompts that text encoders will see cut: pipelines draw with one chunk of tokens."""
    for one in text.inputs:
        limit = one.count_limit(tokenizers, 1)
        pairs = [(prompt, prompt) for prompt in dict.fromkeys(prompts)]
        long = find_truncated_captions(pairs, partial(one.count_tokens, tokenizers), limit)
        if long:
            named = [f"{cut.caption[:SHOWN]!r} ({cut.tokens})" for cut in long]
            report(
                f"{say_count(len(long), 'prompt is', 'prompts are')} cut, with more than the "
                f"{limit} tokens that the {one.tokenizer} gives on: {join_first(named)}"
            )
