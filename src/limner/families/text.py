"""Captions to text features: tokenize, split into chunks, encode, zero what was dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from limner.protocols import Array, BaseConfigs, Features, TextEncoders, Tokenizers


@dataclass(frozen=True)
class TextInput:
    """How captions become the token ids of one text encoder."""

    encoder: str
    tokenizer: str
    template: str = "{}"  # the text that is tokenized; the caption stands for the braces
    length: int | None = None  # tokens that the encoder sees; None: what its tokenizer says
    padding: Literal["right", "left"] = "right"
    # Layers of the encoder that are left out. 0: its states are those after the last layer norm;
    # 1: those before the last layer, as they are.
    skip_layers: int = 0

    def fill_template(self, caption: str) -> str:
        """Return the text that is tokenized."""
        # Not str.format: captions and templates may have braces of their own.
        return self.template.replace("{}", caption, 1)

    def read_length(self, tokenizers: Tokenizers) -> int:
        """Return the tokens of one chunk, special ones included."""
        return self.length or tokenizers.max_tokens(self.tokenizer)

    def count_tokens(self, tokenizers: Tokenizers, captions: list[str]) -> list[int]:
        """Return the tokens of each caption, uncut, with template and special tokens."""
        texts = [self.fill_template(caption) for caption in captions]
        return [len(ids) for ids in tokenizers.list_token_ids(self.tokenizer, texts)]

    def count_limit(self, tokenizers: Tokenizers, chunks: int) -> int:
        """Return the tokens from which on a caption is cut, special ones counted once."""
        special = len(tokenizers.list_token_ids(self.tokenizer, [""])[0])
        return chunks * (self.read_length(tokenizers) - special) + special

    def tokenize(self, tokenizers: Tokenizers, captions: list[str], chunks: int) -> np.ndarray:
        """Return token ids, int64 [n, chunks, length]; what is longer is cut."""
        texts = [self.fill_template(caption) for caption in captions]
        special, *ids = tokenizers.list_token_ids(self.tokenizer, ["", *texts])
        chunked = split_into_chunks(
            ids, chunks, self.read_length(tokenizers), special, tokenizers.pad_token(self.tokenizer)
        )
        return chunked if self.padding == "right" else move_padding_left(chunked, ids)


@dataclass(frozen=True)
class Text:
    """How captions become features."""

    inputs: tuple[TextInput, ...] = ()  # one for each text encoder; none: captions are not read
    # Text encoders, token ids [n, chunks, length] by tokenizer -> text features.
    encode: Callable[[TextEncoders, dict[str, Array]], dict[str, Array]] = lambda encoders, ids: {}
    # Whether the network reads which tokens are words: ``mask``, bool [n, length].
    uses_mask: bool = False
    # Whether the stock pipeline takes zeros for the features of a prompt that is not given.
    zeros_for_empty_prompt: Callable[[BaseConfigs], bool] = lambda configs: False

    @property
    def components(self) -> tuple[str, ...]:
        """The text encoders."""
        return tuple(one.encoder for one in self.inputs)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The tokenizers."""
        return tuple(one.tokenizer for one in self.inputs)


def tokenize(text: Text, tokenizers: Tokenizers, captions: list[str], chunks: int) -> Features:
    """Return token ids by tokenizer, int64 [n, chunks, length], and an attention mask where needed.

    The mask, bool [n, chunks * length], is there with several chunks, or where the network reads
    which tokens are words. With several chunks it hides those without words, except the first, so
    that a caption which fits into one chunk means the same whatever the number of chunks is.
    """
    ids = {one.tokenizer: one.tokenize(tokenizers, captions, chunks) for one in text.inputs}
    if text.uses_mask:
        first = text.inputs[0]
        lengths = np.array(first.count_tokens(tokenizers, captions))
        return ids | {"mask": np.arange(ids[first.tokenizer].shape[-1]) < lengths[:, None]}
    if chunks == 1:
        return ids
    words = np.any(
        [(ids[one.tokenizer] != one.tokenize(tokenizers, [""], 1)).any(-1) for one in text.inputs],
        axis=0,
    )
    words[:, 0] = True
    return ids | {"mask": np.repeat(words, ids[text.tokenizers[0]].shape[2], axis=1)}


def split_into_chunks(
    captions: list[list[int]], chunks: int, length: int, special: list[int], pad: int
) -> np.ndarray:
    """Split the token ids of captions into chunks, int64 [n, chunks, length]; cut off the rest.

    Args:
        captions: token ids, uncut, with the special tokens around them.
        special: ids of an empty text. Its last one ends a text, those before begin it; each chunk
            gets its own.
        pad: id of the padding.
    """
    start, end = special[:-1], special[-1:]
    room = length - len(special)
    out = np.full((len(captions), chunks, length), pad, np.int64)
    for row, ids in enumerate(captions):
        words = ids[len(start) : len(ids) - len(end)]
        for chunk in range(chunks):
            piece = [*start, *words[chunk * room : (chunk + 1) * room], *end]
            out[row, chunk, : len(piece)] = piece
    return out


def move_padding_left(chunked: np.ndarray, captions: list[list[int]]) -> np.ndarray:
    """Move the padding before the text; one chunk each."""
    length = chunked.shape[-1]
    rows = [
        np.roll(row, length - min(len(ids), length), axis=-1)
        for row, ids in zip(chunked, captions, strict=True)
    ]
    return np.stack(rows)


def encode_captions(
    text: Text, encoders: TextEncoders, tokens: dict[str, Array]
) -> dict[str, Array]:
    """Return the text features of ``tokenize``'s result, and its mask where there is one."""
    features = text.encode(encoders, tokens)
    return features | {name: array for name, array in tokens.items() if name == "mask"}


def zero_dropped(features: dict[str, Array], keep: Array) -> dict[str, Array]:
    """Return text features with zeros for the examples where ``keep``, float32 [n], is 0."""
    return {
        name: array if name == "mask" else array * keep.reshape(-1, *[1] * (array.ndim - 1))
        for name, array in features.items()
    }


def encode_chunks(
    encoders: TextEncoders, one: TextInput, ids: dict[str, Array]
) -> tuple[Array, Array]:
    """Encode each chunk by itself; return joined states and the first chunk's pooled embedding.

    Args:
        ids: by tokenizer, [n, chunks, length].

    Returns:
        States [n, chunks * length, width]; pooled [n, width], or None where the encoder has none.
    """
    rows, chunks, length = ids[one.tokenizer].shape
    flat = ids[one.tokenizer].reshape(rows * chunks, length)
    states, pooled = encoders.encode_text(one.encoder, flat, one.skip_layers)
    if pooled is not None:
        pooled = pooled.reshape(rows, chunks, -1)[:, 0]
    return states.reshape(rows, chunks * length, -1), pooled


def mask_argument(batch: dict[str, Array]) -> dict[str, Array]:
    """Return the argument that hides empty chunks from a UNet, where there are several chunks."""
    return {"encoder_attention_mask": batch["mask"]} if "mask" in batch else {}


def list_other_sides(text: Text, configs: BaseConfigs) -> list[str]:
    """Return what is wrong where a tokenizer pads or cuts at another side than the family does."""
    problems = []
    for one in text.inputs:
        for name, side in (("padding_side", one.padding), ("truncation_side", "right")):
            stated = configs[one.tokenizer].get(name, side)
            if stated != side:
                problems.append(
                    f"{one.tokenizer}: {name} is {stated!r}, and captions are filled up and cut "
                    f"on the other; {side!r} is expected in its tokenizer_config.json"
                )
    return problems
