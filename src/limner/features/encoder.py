"""Features of pictures and captions from the frozen encoders, or from a store of earlier ones.

Another batch shape moves the last bits of an encoder's output. Every call therefore sees batches of
one shape, padded, and stored features equal fresh ones to the bit.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, TypeVar

import numpy as np

from limner.data import image
from limner.data.buckets import Shape
from limner.data.prefetch import prefetch
from limner.errors import InputError
from limner.families.family import Family
from limner.families.text import encode_captions, tokenize
from limner.features.store import FeatureStore
from limner.progress import open_progress
from limner.protocols import Encoders, Features

SHARD = 64  # rows that are encoded before they are written
T = TypeVar("T")
CheckStop = Callable[[], None]  # raises ``Stopped`` when the run is to end
Views = Sequence[np.ndarray]  # of one picture, in the order of the family's ``image_views``


@dataclass(frozen=True)
class ImageRequest:
    """The request for one picture's views."""

    key: str | None  # all that its features depend on, but for the encoder; None: never stored
    shape: Shape  # of the first view; the others have one shape each for all pictures
    load: Callable[[], Views]  # returns views, uint8 [height, width, 3]


@dataclass(eq=False)
class FeatureEncoder:
    """Features by request, stored ones or fresh ones, as float32 whatever ``dtype`` is."""

    family: Family
    get_encoders: Callable[[], Encoders]
    image_store: FeatureStore | None  # None: pictures are encoded each time
    text_store: FeatureStore | None  # None: captions are encoded each time
    batch: int  # pictures that an encoder sees at once
    text_batch: int = 8  # captions that an encoder sees at once
    chunks: int = 1  # of a caption
    # All features are rounded to it, stored or not, so that a store changes no number.
    dtype: Literal["float32", "float16"] = "float32"
    threads: int = 4  # that decode pictures while a store is filled
    world_size: int = 1  # processes that fill the stores together
    # Encoders and tokenizers serve one thread at a time.
    busy: threading.Lock = field(default_factory=threading.Lock, init=False)

    def image_features(self, pictures: Sequence[ImageRequest]) -> Features:
        """Return image features of a batch of one shape, in its order."""
        stored = self.read_stored(self.image_store, [picture.key for picture in pictures])
        if stored is not None:
            return to_float32(stored)
        loaded = [picture.load() for picture in pictures]
        with self.busy:
            return to_float32(self.encode_images(loaded))

    def text_features(self, captions: Sequence[str]) -> Features:
        """Return text features of a batch, in its order."""
        if not self.family.text.components:
            return {}
        stored = self.read_stored(self.text_store, captions)
        if stored is not None:
            return to_float32(stored)
        with self.busy:
            return to_float32(self.encode_texts(captions))

    def token_ids(self, captions: Sequence[str]) -> Features:
        """Return token ids of a batch, for text encoders that are being trained."""
        with self.busy:
            return tokenize(self.family.text, self.get_encoders(), list(captions), self.chunks)

    def fill_images(self, pictures: Sequence[ImageRequest], check: CheckStop) -> None:
        """Encode and store the pictures that are missing from the store, shape by shape.

        Args:
            check: called between two shards.
        """
        if self.image_store is None:
            return
        requests = {picture.key: picture for picture in pictures if picture.key is not None}
        missing = [requests[key] for key in self.image_store.missing(requests)]
        missing.sort(key=lambda request: request.shape)
        loaded = prefetch(
            lambda i: missing[i].load(),
            0,
            len(missing),
            threads=self.threads,
            ahead=2 * self.batch + self.threads,
        )
        keys = [(request.shape, str(request.key)) for request in missing]
        # Closing ends the threads that load ahead, also after an error.
        with contextlib.closing(loaded):
            self.fill(
                self.image_store, keys, loaded, self.encode_images, "encoding pictures", check
            )

    def fill_texts(self, captions: Sequence[str], check: CheckStop) -> None:
        """Encode and store the captions that are missing from the store; see ``fill_images``."""
        if self.text_store is None:
            return
        missing = self.text_store.missing(dict.fromkeys(captions))
        # The features of captions all have one shape.
        keys = [((0, 0), caption) for caption in missing]
        self.fill(
            self.text_store, keys, iter(missing), self.encode_texts, "encoding captions", check
        )

    def is_incomplete(self, pictures: Sequence[ImageRequest], captions: Sequence[str]) -> bool:
        """Whether a store lacks features, whichever process was to write them."""
        for store in (self.image_store, self.text_store):
            if store is not None:
                store.refresh()
        keys = [picture.key for picture in pictures if picture.key is not None]
        return not (has_all(self.image_store, keys) and has_all(self.text_store, captions))

    def encode_images(self, loaded: Sequence[Views]) -> Features:
        """Encode pictures, each given as its views."""

        def encode(part: list[Views]) -> Features:
            # From the views of each picture to the pictures of each view.
            views = [image.to_pixels(np.stack(view)) for view in zip(*part, strict=True)]
            return self.family.images.encode(self.get_encoders(), *views)

        return self.encode_padded(list(loaded), self.batch, encode)

    def encode_texts(self, captions: Sequence[str]) -> Features:
        """Encode captions."""

        def encode(part: list[str]) -> Features:
            tokens = tokenize(self.family.text, self.get_encoders(), part, self.chunks)
            return encode_captions(self.family.text, self.get_encoders(), tokens)

        return self.encode_padded(list(captions), self.text_batch, encode)

    def read_stored(
        self, store: FeatureStore | None, keys: Sequence[str | None]
    ) -> Features | None:
        """Return the rows of all keys, or None where one of them is not stored."""
        present = [key for key in keys if key is not None]
        if store is None or len(present) < len(keys) or not has_all(store, present):
            return None
        return store.get(present)

    def encode_padded(
        self, items: list[T], batch: int, encode: Callable[[list[T]], Features]
    ) -> Features:
        """Encode any number of items in batches of one size, filled with the last item."""
        parts = []
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            padding = [part[-1]] * (batch - len(part))
            features = encode(part + padding)
            parts.append({name: array[: len(part)] for name, array in features.items()})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self.round_features(joined)

    def round_features(self, features: Features) -> Features:
        """Round features to ``dtype``.

        Raises:
            InputError: when a number is too large for ``data.cache_dtype``.
        """
        if self.dtype == "float32":
            return features
        rounded = {}
        for name, array in features.items():
            with np.errstate(over="ignore"):
                rounded[name] = array.astype(self.dtype) if array.dtype == np.float32 else array
            if not np.array_equal(np.isfinite(rounded[name]), np.isfinite(array)):
                raise InputError(
                    f"data.cache_dtype: {name} has numbers beyond what float16 can hold; set "
                    'data.cache_dtype="float32"'
                )
        return rounded

    def fill(
        self,
        store: FeatureStore,
        keys: list[tuple[Shape, str]],
        items: Iterator[T],
        encode: Callable[[Sequence[T]], Features],
        description: str,
        check: CheckStop,
    ) -> None:
        """Encode and store items in shards of one shape, and show how far it is.

        Args:
            keys: shape and key of each item, sorted by shape.
        """
        with open_progress(len(keys), description, silent=not keys) as progress:
            done = 0
            while done < len(keys):
                check()
                shape = keys[done][0]
                shard = [key for s, key in keys[done : done + SHARD] if s == shape]
                features = encode(list(islice(items, len(shard))))
                if done == 0:
                    # The other processes are about to store as much.
                    store.check_room(self.world_size * len(keys) * count_row_bytes(features))
                store.put(shard, features)
                done += len(shard)
                progress.update(len(shard))


def has_all(store: FeatureStore | None, keys: Sequence[str]) -> bool:
    """Whether a store has all keys; where there is no store, none is wanted."""
    return store is None or all(key in store for key in keys)


def to_float32(features: Features) -> Features:
    """Convert float16 to float32."""
    return {
        name: array.astype(np.float32) if array.dtype == np.float16 else array
        for name, array in features.items()
    }


def count_row_bytes(features: Features) -> int:
    """Return the bytes of one row."""
    return sum(array[:1].nbytes for array in features.values())
