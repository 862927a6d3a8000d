"""What the frozen encoders make of pictures and captions: encoded once where that is exact, in batches of one fixed shape always.

Another batch shape moves the last bits of an encoder's output, so every call sees ``batch`` examples, padded; cached or not, the numbers are equal.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from limner.cache import Store
from limner.data import image
from limner.family import Family, Features, Parts, tokenize, told

SHARD = 64  # rows that are encoded before they are written
T = TypeVar("T")
Picture = tuple[str | None, Callable[[], np.ndarray]]  # key (None: not cached), and what loads it: uint8 [H, W, 3]


class Encoded:
    """Features by request: from the stores where they hold them, else from the encoders."""

    def __init__(self, family: Family, parts: Callable[[], Parts], images: Store | None, texts: Store | None, batch: int, chunks: int = 1):
        self.chunks = chunks
        self.family, self.parts, self.image_store, self.text_store, self.batch = family, parts, images, texts, batch
        self.busy = threading.Lock()

    def images(self, pictures: Sequence[Picture]) -> Features:
        """Image features of a batch, in its order."""
        return self._through(self.image_store, pictures, [key for key, _ in pictures], self.encode_images)

    def texts(self, captions: Sequence[str]) -> Features:
        """Text features of a batch, in its order."""
        return self._through(self.text_store, captions, list(captions), self.encode_texts)

    def fill_images(self, pictures: Sequence[Picture], check: Callable[[], None]) -> None:
        """Encode and store the pictures that are not stored yet; ``check`` may raise between two shards."""
        self._fill(self.image_store, {key: (key, load) for key, load in pictures if key is not None}, self.encode_images, "encoding pictures", check)

    def fill_texts(self, captions: Sequence[str], check: Callable[[], None]) -> None:
        """Encode and store the captions that are not stored yet."""
        self._fill(self.text_store, {c: c for c in captions}, self.encode_texts, "encoding captions", check)

    def refresh(self) -> None:
        """See what other processes have stored."""
        for store in (self.image_store, self.text_store):
            if store is not None:
                store.refresh()

    def tokens(self, captions: Sequence[str]) -> Features:
        """Token ids of a batch, for text encoders that are being trained."""
        with self.busy:
            return tokenize(self.family, self.parts(), list(captions), self.chunks)

    def encode_images(self, pictures: Sequence[Picture]) -> Features:
        return self._padded([load() for _, load in pictures], lambda part: self.family.image(self.parts(), image.pixels(np.stack(part))))

    def encode_texts(self, captions: Sequence[str]) -> Features:
        return self._padded(list(captions), lambda part: told(self.family, self.parts(), tokenize(self.family, self.parts(), part, self.chunks)))

    def _through(self, store: Store | None, requests: Sequence[T], keys: list[str | None], encode: Callable[[Sequence[T]], Features]) -> Features:
        if store is not None and all(key in store for key in keys if key is not None) and None not in keys:
            return store.get([key for key in keys if key is not None])
        with self.busy:
            return encode(requests)

    def _padded(self, items: list[T], encode: Callable[[list[T]], Features]) -> Features:
        parts = []
        for start in range(0, len(items), self.batch):
            part = items[start : start + self.batch]
            made = encode(part + [part[-1]] * (self.batch - len(part)))
            parts.append({name: array[: len(part)] for name, array in made.items()})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _fill(self, store: Store | None, requests: dict[str, T], encode: Callable[[Sequence[T]], Features], what: str, check: Callable[[], None]) -> None:
        if store is None:
            return
        missing = {key: request for key, request in requests.items() if key not in store}
        with tqdm(total=len(missing), desc=what, disable=None if missing else True) as bar:
            items = iter(missing.items())
            while chunk := list(islice(items, SHARD)):
                check()
                store.put([key for key, _ in chunk], encode([request for _, request in chunk]))
                bar.update(len(chunk))
