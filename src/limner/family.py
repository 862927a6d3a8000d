"""What a model family is: how its parts are named, what is encoded once, how the trained network is
called. No framework in here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Features = dict[str, np.ndarray]  # first axis: examples
Configs = dict[str, dict[str, Any]]  # component name -> its config.json, from the base


class Encoders(Protocol):
    """Text encoders, frozen or learning; arrays of the kind that they are given: numpy, or an
    engine's own."""

    def text(self, name: str, ids: Any, skip: int = 0) -> tuple[Any, Any]:
        """Hidden states [n, tokens, width] and pooled embedding [n, width] of token ids [n,
        tokens].

        Args:
            skip: 0: the states after the last layer norm; 1: those before the last layer, as they
                are.
        """
        ...

    def beside(self, arrays: list[Any]) -> Any:
        """Arrays joined along the last axis."""
        ...


class Parts(Encoders, Protocol):
    """The frozen parts of a base, numpy in and numpy out, loaded when first called; every engine
    has its own."""

    def vae(self, name: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the posterior, float32 [n, channels, h, w], for pixels in
        [-1, 1], float32 [n, 3, H, W]."""
        ...

    def movq(self, name: str, pixels: np.ndarray) -> np.ndarray:
        """Latents of a VQ autoencoder before they are quantized, float32 [n, channels, h, w], for
        pixels in [-1, 1], float32 [n, 3, H, W]."""
        ...

    def see(self, name: str, processor: str, pixels: np.ndarray) -> np.ndarray:
        """CLIP image embedding, float32 [n, width], for pixels in [-1, 1], float32 [n, 3, side,
        side], which ``processor`` says how to normalise."""
        ...

    def tokens(self, tokenizer: str, captions: list[str], chunks: int) -> np.ndarray:
        """Token ids, int64 [n, chunks, length]: each chunk has its own start and end and is padded;
        what is longer is cut."""
        ...

    def lengths(self, tokenizer: str, captions: list[str]) -> list[int]:
        """Tokens of each caption, start and end included, uncut."""
        ...

    def limit(self, tokenizer: str) -> int:
        """Tokens of one chunk, start and end included."""
        ...


@dataclass(frozen=True)
class Stage:
    """One of two models that make pictures together, one after the other."""

    partner: str  # the family of the other one
    needs: dict[
        str, str
    ]  # the components of the other one that this one's features are made with -> class name
    whole: str  # class name of the stock pipeline of both
    prefix: str  # what the names of this one's components begin with in it


@dataclass(frozen=True)
class Family:
    """One model family. Functions take and return arrays whose first axis is the example; they work
    on numpy, torch and jax alike."""

    name: str
    pipeline: str  # class name of the stock diffusers pipeline
    trains: str  # the component that learns
    components: dict[str, str]  # every component that is read -> its class name
    # parts, and for each of ``views`` pixels in [-1, 1], [n, 3, H, W] -> what is cached per picture
    image: Callable[..., Features]
    text: Callable[
        [Encoders, dict[str, Any]], dict[str, Any]
    ]  # token ids by tokenizer, [n, chunks, length] -> what the network is told of a caption
    clean: Callable[
        [Features, Configs, np.ndarray], np.ndarray
    ]  # features, configs (with ``fixed``), standard normal -> x0
    latent: tuple[
        str, ...
    ]  # the image features that ``clean`` turns into x0; all have the shape of x0
    inputs: Callable[
        [dict[str, Any]], dict[str, Any]
    ]  # batch -> keyword arguments of the trained network
    lora: dict[
        str, tuple[str, ...]
    ]  # component -> the modules that get adapters; those of text encoders by wish only
    tag: str = "stable-diffusion"  # on a model card
    views: tuple[Literal["cut", "whole"], ...] = (
        "cut",
    )  # of a picture: as the recipe cuts it; the middle square of the whole of it
    eye: Callable[[Configs], int] = lambda configs: 0  # pixels a side of ``whole``
    stage: Stage | None = None  # where two models make pictures together
    # arrays among the trained network's weights that do not learn; their numbers are
    # ``configs["fixed"]``
    fixed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()  # settings that mean nothing to it
    heeds_padding: bool = (
        False  # whether the network is told which tokens are words: ``mask``, bool [n, length]
    )
    tokenizers: tuple[str, ...] = ("tokenizer",)
    captions: tuple[str, ...] = ("text_encoder",)  # the components that make text features
    pictures: tuple[str, ...] = ("vae",)  # the components that make image features
    misfits: Callable[[Configs], list[str]] = (
        lambda configs: []
    )  # what in a base's configs does not fit together, in words
    empty_is_zeros: Callable[[Configs], bool] = lambda configs: (
        False
    )  # whether the stock pipeline has zeros for a prompt that is not given

    def learns(self, text_encoders: bool) -> tuple[str, ...]:
        """The components that a LoRA changes, the trained network first."""
        return (
            self.trains,
            *(name for name in self.captions if text_encoders and name in self.lora),
        )


def tokenize(family: Family, parts: Parts, captions: list[str], chunks: int) -> Features:
    """Token ids by tokenizer, int64 [n, chunks, length]; with several chunks, or where padding is
    heeded, also ``mask``, bool [n, chunks * length].

    With several chunks the mask keeps the network from looking at chunks without words (the first
    one is always looked at), so that a caption which fits into one chunk means the same whatever
    the number of chunks is.
    """
    ids = {tokenizer: parts.tokens(tokenizer, captions, chunks) for tokenizer in family.tokenizers}
    if family.heeds_padding:
        lengths, (name, *_) = (
            np.array(parts.lengths(family.tokenizers[0], captions)),
            family.tokenizers,
        )
        return ids | {"mask": np.arange(ids[name].shape[-1]) < lengths[:, None]}
    if chunks == 1:
        return ids
    words = np.any(
        [
            (ids[tokenizer] != parts.tokens(tokenizer, [""], 1)).any(-1)
            for tokenizer in family.tokenizers
        ],
        axis=0,
    )
    words[:, 0] = True
    return ids | {"mask": np.repeat(words, ids[family.tokenizers[0]].shape[2], axis=1)}


def chunked(
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


def told(family: Family, encoders: Encoders, tokens: dict[str, Any]) -> dict[str, Any]:
    """What the network is told of captions: the text features of ``tokenize``'s result, and its
    mask."""
    return family.text(encoders, tokens) | {
        name: array for name, array in tokens.items() if name == "mask"
    }


def silenced(features: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Text features with zeros where ``keep``, float32 [n], is 0."""
    return {
        name: array if name == "mask" else array * keep.reshape(-1, *[1] * (array.ndim - 1))
        for name, array in features.items()
    }


def joined(encoders: Encoders, name: str, ids: Any, skip: int = 0) -> tuple[Any, Any]:
    """Hidden states of chunks, encoded apart and joined, [n, chunks * length, width], and the first
    chunk's pooled embedding [n, width]."""
    rows, chunks, length = ids.shape
    states, pooled = encoders.text(name, ids.reshape(rows * chunks, length), skip)
    return states.reshape(rows, chunks * length, -1), pooled.reshape(rows, chunks, -1)[:, 0]


def masked(batch: dict[str, Any]) -> dict[str, Any]:
    """The argument that keeps a UNet from looking at empty chunks, where there are several."""
    return {"encoder_attention_mask": batch["mask"]} if "mask" in batch else {}
