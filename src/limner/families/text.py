"""Captions to text features: tokenize, split into chunks, encode, zero what was dropped."""

from typing import Any

import numpy as np

from limner.families.family import Family
from limner.protocols import Encoders, Features, TextEncoders


def tokenize(family: Family, parts: Encoders, captions: list[str], chunks: int) -> Features:
    """Token ids by tokenizer, int64 [n, chunks, length]; with several chunks, or where padding is
    heeded, also ``mask``, bool [n, chunks * length].

    With several chunks the mask keeps the network from looking at chunks without words (the first
    one is always looked at), so that a caption which fits into one chunk means the same whatever
    the number of chunks is.
    """
    ids = {
        tokenizer: parts.tokenize(tokenizer, captions, chunks) for tokenizer in family.tokenizers
    }
    if family.uses_attention_mask:
        lengths, (name, *_) = (
            np.array(parts.count_tokens(family.tokenizers[0], captions)),
            family.tokenizers,
        )
        return ids | {"mask": np.arange(ids[name].shape[-1]) < lengths[:, None]}
    if chunks == 1:
        return ids
    words = np.any(
        [
            (ids[tokenizer] != parts.tokenize(tokenizer, [""], 1)).any(-1)
            for tokenizer in family.tokenizers
        ],
        axis=0,
    )
    words[:, 0] = True
    return ids | {"mask": np.repeat(words, ids[family.tokenizers[0]].shape[2], axis=1)}


def split_into_chunks(
    captions: list[list[int]], chunks: int, length: int, start: int, end: int, pad: int
) -> np.ndarray:
    """Token ids of captions, uncut and with their start and end, in ``chunks`` pieces that each
    have their own: int64 [n, chunks, length]; the rest is cut."""
    out = np.full((len(captions), chunks, length), pad, np.int64)
    for row, ids in enumerate(captions):
        for chunk in range(chunks):
            piece = [start, *ids[1 + chunk * (length - 2) : -1][: length - 2], end]
            out[row, chunk, : len(piece)] = piece
    return out


def encode_captions(
    family: Family, encoders: TextEncoders, tokens: dict[str, Any]
) -> dict[str, Any]:
    """What the network is told of captions: the text features of ``tokenize``'s result, and its
    mask."""
    return family.encode_text(encoders, tokens) | {
        name: array for name, array in tokens.items() if name == "mask"
    }


def zero_dropped(features: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Text features with zeros where ``keep``, float32 [n], is 0."""
    return {
        name: array if name == "mask" else array * keep.reshape(-1, *[1] * (array.ndim - 1))
        for name, array in features.items()
    }


def encode_chunks(encoders: TextEncoders, name: str, ids: Any, skip: int = 0) -> tuple[Any, Any]:
    """Hidden states of chunks, encoded apart and joined, [n, chunks * length, width], and the first
    chunk's pooled embedding [n, width]."""
    rows, chunks, length = ids.shape
    states, pooled = encoders.encode_text(name, ids.reshape(rows * chunks, length), skip)
    return states.reshape(rows, chunks * length, -1), pooled.reshape(rows, chunks, -1)[:, 0]


def mask_argument(batch: dict[str, Any]) -> dict[str, Any]:
    """The argument that keeps a UNet from looking at empty chunks, where there are several."""
    return {"encoder_attention_mask": batch["mask"]} if "mask" in batch else {}
