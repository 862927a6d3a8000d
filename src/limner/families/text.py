"""Captions to text features: tokenize, split into chunks, encode, zero what was dropped."""

from typing import Any

import numpy as np

from limner.families.family import Family
from limner.protocols import Encoders, Features, TextEncoders


def tokenize(family: Family, encoders: Encoders, captions: list[str], chunks: int) -> Features:
    """Return token ids by tokenizer, int64 [n, chunks, length], and an attention mask where needed.

    The mask, bool [n, chunks * length], is there with several chunks, or where the network reads
    which tokens are words. With several chunks it hides those without words, except the first, so
    that a caption which fits into one chunk means the same whatever the number of chunks is.
    """
    ids = {name: encoders.tokenize(name, captions, chunks) for name in family.tokenizers}
    if family.uses_attention_mask:
        first = family.tokenizers[0]
        lengths = np.array(encoders.count_tokens(first, captions))
        return ids | {"mask": np.arange(ids[first].shape[-1]) < lengths[:, None]}
    if chunks == 1:
        return ids
    words = np.any(
        [(ids[name] != encoders.tokenize(name, [""], 1)).any(-1) for name in family.tokenizers],
        axis=0,
    )
    words[:, 0] = True
    return ids | {"mask": np.repeat(words, ids[family.tokenizers[0]].shape[2], axis=1)}


def split_into_chunks(
    captions: list[list[int]], chunks: int, length: int, start: int, end: int, pad: int
) -> np.ndarray:
    """Split the token ids of captions into chunks, int64 [n, chunks, length]; cut off the rest.

    Args:
        captions: token ids, uncut, with their start and end.
        start, end, pad: ids of special tokens; each chunk gets its own start and end.
    """
    out = np.full((len(captions), chunks, length), pad, np.int64)
    for row, ids in enumerate(captions):
        for chunk in range(chunks):
            piece = [start, *ids[1 + chunk * (length - 2) : -1][: length - 2], end]
            out[row, chunk, : len(piece)] = piece
    return out


def encode_captions(
    family: Family, encoders: TextEncoders, tokens: dict[str, Any]
) -> dict[str, Any]:
    """Return the text features of ``tokenize``'s result, and its mask where there is one."""
    features = family.encode_text(encoders, tokens)
    return features | {name: array for name, array in tokens.items() if name == "mask"}


def zero_dropped(features: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Return text features with zeros for the examples where ``keep``, float32 [n], is 0."""
    return {
        name: array if name == "mask" else array * keep.reshape(-1, *[1] * (array.ndim - 1))
        for name, array in features.items()
    }


def encode_chunks(encoders: TextEncoders, name: str, ids: Any, skip: int = 0) -> tuple[Any, Any]:
    """Encode each chunk by itself; return joined states and the first chunk's pooled embedding.

    Shapes: ids [n, chunks, length], states [n, chunks * length, width], pooled [n, width].
    """
    rows, chunks, length = ids.shape
    states, pooled = encoders.encode_text(name, ids.reshape(rows * chunks, length), skip)
    return states.reshape(rows, chunks * length, -1), pooled.reshape(rows, chunks, -1)[:, 0]


def mask_argument(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the argument that hides empty chunks from a UNet, where there are several chunks."""
    return {"encoder_attention_mask": batch["mask"]} if "mask" in batch else {}
