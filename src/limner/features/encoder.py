"""What the frozen encoders make of pictures and captions: encoded once where that is exact, in
batches of one fixed shape always.

Another batch shape moves the last bits of an encoder's output, so every call sees ``batch``
examples, padded; cached or not, the numbers are equal.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from limner.data import image
from limner.data.prefetch import prefetch
from limner.errors import InputError
from limner.families.family import Family
from limner.families.text import encode_captions, tokenize
from limner.features.store import FeatureStore
from limner.protocols import Encoders, Features

SHARD = 64  # rows that are encoded before they are written
T = TypeVar("T")
CheckStop = Callable[[], None]
Views = Sequence[np.ndarray]  # of one picture, in the order of the family's ``views``


@dataclass(frozen=True)
class ImageRequest:
    """The request for one picture's views."""

    key: str | None  # all that its features depend on, besides the encoder; None: not cached
    shape: tuple[int, int]  # height and width of the first view; the others' are the same for all
    load: Callable[[], Views]  # each uint8 [height, width, 3]


class FeatureEncoder:
    """Features by request: from where they are kept, else from the encoders; float32, whatever
    ``dtype`` they are rounded to.

    Args:
        parts: gives the encoders, which load what is asked of them.
        images, texts: where features are kept; None: they are encoded each time.
        batch: pictures that an encoder sees at once.
        text_batch: captions that an encoder sees at once.
        chunks: of a caption.
        dtype: what features are rounded to, kept or not.
        threads: that decode pictures beside the encoder while rows are filled in.
    """

    def __init__(
        self,
        family: Family,
        parts: Callable[[], Encoders],
        images: FeatureStore | None,
        texts: FeatureStore | None,
        batch: int,
        *,
        text_batch: int = 8,
        chunks: int = 1,
        dtype: Literal["float32", "float16"] = "float32",
        threads: int = 4,
        world: int = 1,
    ):
        self.family, self.get_encoders, self.image_store, self.text_store, self.batch = (
            family,
            parts,
            images,
            texts,
            batch,
        )
        self.text_batch, self.chunks, self.dtype, self.threads, self.world_size = (
            text_batch,
            chunks,
            np.dtype(dtype),
            threads,
            world,
        )
        self.busy = threading.Lock()

    def image_features(self, pictures: Sequence[ImageRequest]) -> Features:
        """Image features of a batch of one shape, in its order."""
        keys = [picture.key for picture in pictures]
        if (found := self.read_stored(self.image_store, keys)) is not None:
            return to_float32(found)
        loaded = [picture.load() for picture in pictures]
        with self.busy:
            return to_float32(self.encode_images(loaded))

    def text_features(self, captions: Sequence[str]) -> Features:
        """Text features of a batch, in its order."""
        if not self.family.text_components:
            return {}
        if (found := self.read_stored(self.text_store, captions)) is not None:
            return to_float32(found)
        with self.busy:
            return to_float32(self.encode_texts(captions))

    def token_ids(self, captions: Sequence[str]) -> Features:
        """Token ids of a batch, for text encoders that are being trained."""
        with self.busy:
            return tokenize(self.family, self.get_encoders(), list(captions), self.chunks)

    def fill_images(self, pictures: Sequence[ImageRequest], check: CheckStop) -> None:
        """Encode and keep the pictures that are not kept yet, shape by shape; ``check`` may raise
        between two shards."""
        if self.image_store is None:
            return
        wanted = {picture.key: picture for picture in pictures if picture.key is not None}
        missing = [wanted[key] for key in self.image_store.missing(wanted)]
        missing.sort(key=lambda picture: picture.shape)
        with contextlib.closing(
            prefetch(
                lambda i: missing[i].load(),
                0,
                len(missing),
                threads=self.threads,
                ahead=2 * self.batch + self.threads,
            )
        ) as loaded:
            self.fill(
                self.image_store,
                [(p.shape, p.key) for p in missing],
                loaded,
                self.encode_images,
                "encoding pictures",
                check,
            )

    def fill_texts(self, captions: Sequence[str], check: CheckStop) -> None:
        """Encode and keep the captions that are not kept yet."""
        if self.text_store is not None:
            missing = self.text_store.missing(dict.fromkeys(captions))
            self.fill(
                self.text_store,
                [((0, 0), caption) for caption in missing],
                iter(missing),
                self.encode_texts,
                "encoding captions",
                check,
            )

    def is_incomplete(self, pictures: Sequence[ImageRequest], captions: Sequence[str]) -> bool:
        """Whether something is not kept that could be; looks at what other processes have stored,
        too."""
        for store in (self.image_store, self.text_store):
            if store is not None:
                store.refresh()
        keys = [picture.key for picture in pictures if picture.key is not None]
        held = self.image_store is None or all(key in self.image_store for key in keys)
        return not (
            held
            and (self.text_store is None or all(caption in self.text_store for caption in captions))
        )

    def encode_images(self, loaded: Sequence[Views]) -> Features:
        def encode(part: list[Views]) -> Features:
            return self.family.encode_image(
                self.get_encoders(),
                *(image.to_pixels(np.stack(view)) for view in zip(*part, strict=True)),
            )

        return self.encode_padded(list(loaded), self.batch, encode)

    def encode_texts(self, captions: Sequence[str]) -> Features:
        return self.encode_padded(
            list(captions),
            self.text_batch,
            lambda part: encode_captions(
                self.family,
                self.get_encoders(),
                tokenize(self.family, self.get_encoders(), part, self.chunks),
            ),
        )

    def read_stored(
        self, store: FeatureStore | None, keys: Sequence[str | None]
    ) -> Features | None:
        """The rows of all keys, or None where one is not kept."""
        known = [key for key in keys if key is not None]
        if store is None or len(known) < len(keys) or not all(key in store for key in known):
            return None
        return store.get(known)

    def encode_padded(
        self, items: list[T], batch: int, encode: Callable[[list[T]], Features]
    ) -> Features:
        """Features of any number of items, from batches of one size."""
        parts = []
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            made = encode(part + [part[-1]] * (batch - len(part)))
            parts.append({name: array[: len(part)] for name, array in made.items()})
        return self.round_features(
            {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        )

    def round_features(self, features: Features) -> Features:
        """Features as they are kept.

        Raises:
            InputError: when a number is too large for ``data.cache_dtype``.
        """
        if self.dtype == np.float32:
            return features
        out = {}
        for name, array in features.items():
            with np.errstate(over="ignore"):
                out[name] = array.astype(self.dtype) if array.dtype == np.float32 else array
            if not np.array_equal(np.isfinite(out[name]), np.isfinite(array)):
                raise InputError(
                    f"data.cache_dtype: {name} has numbers beyond what float16 can hold; set "
                    'data.cache_dtype="float32"'
                )
        return out

    def fill(
        self,
        store: FeatureStore,
        keys: list[tuple[tuple[int, int], str | None]],
        items: Iterator[T],
        encode: Callable[[Sequence[T]], Features],
        what: str,
        check: CheckStop,
    ) -> None:
        """Encode ``items``, whose shapes and keys are ``keys``, and keep them, a shard of one shape
        at a time."""
        with tqdm(total=len(keys), desc=what, disable=None if keys else True) as bar:
            done = 0
            while done < len(keys):
                check()
                chunk = [
                    str(key) for shape, key in keys[done : done + SHARD] if shape == keys[done][0]
                ]
                features = encode(list(islice(items, len(chunk))))
                if done == 0:
                    store.check_room(self.world_size * len(keys) * count_row_bytes(features))
                store.put(chunk, features)
                done += len(chunk)
                bar.update(len(chunk))


def to_float32(features: Features) -> Features:
    """Float32 in place of float16."""
    return {
        name: array.astype(np.float32) if array.dtype == np.float16 else array
        for name, array in features.items()
    }


def count_row_bytes(features: Features) -> int:
    """Bytes of one row."""
    return sum(array[:1].nbytes for array in features.values())
