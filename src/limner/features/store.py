"""Stores of features: rows of named arrays under keys.

A row is whole or absent, and verified when it is read.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from limner.errors import DiskError, IntegrityError
from limner.json_types import parse_json
from limner.protocols import Features
from limner.storage import atomic, safetensors

DAY = 86_400
VERSION = 2  # of a shard's layout


class DamagedError(ValueError):
    """A shard or row that differs from its digests; the message is the reason."""


class FeatureStore(Protocol):
    """Rows of features by key."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, keys: Sequence[str]) -> Features:
        """Return the rows of ``keys``, stacked: arrays of shape [len(keys), ...]."""
        ...

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Add rows, all of one shape."""
        ...

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys whose rows are absent or damaged."""
        ...

    def refresh(self) -> None:
        """Take in what other processes have written or removed."""
        ...

    def check_room(self, size: int) -> None:
        """Refuse to begin what cannot be stored.

        Raises:
            DiskError: when there is no room for ``size`` bytes, or nothing may be written.
        """
        ...


class MemoryStore:
    """Rows in the memory of this process."""

    def __init__(self) -> None:
        self.rows: dict[str, Features] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[str]) -> Features:
        """Stack the rows of these keys, in their order."""
        rows = [self.rows[key] for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Keep a copy of each row, so that the batch it came in can be freed."""
        for i, key in enumerate(keys):
            self.rows[key] = {name: array[i].copy() for name, array in features.items()}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys that were not put; nothing here is ever damaged."""
        return [key for key in keys if key not in self.rows]

    def refresh(self) -> None:
        """Do nothing: no other process writes here."""

    def check_room(self, size: int) -> None:
        """Refuse nothing: how much memory there is, is not known."""


@dataclass(frozen=True)
class ArraySpan:
    """An array's place in a shard."""

    dtype: np.dtype
    shape: tuple[int, ...]  # first axis: rows
    begin: int  # in bytes from the file's start

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, file: int, i: int) -> np.ndarray:
        """Read row ``i`` from an open file."""
        content = os.pread(file, self.row_bytes, self.begin + i * self.row_bytes)
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


@dataclass(frozen=True)
class Shard:
    """The header of a shard."""

    keys: list[str]
    digests: list[str]
    arrays: dict[str, ArraySpan]


class RowPlace(NamedTuple):
    """A row's place on disk."""

    path: Path
    shard: Shard
    number: int  # of the row in the shard


class DiskStore:
    """The rows of one encoder in one folder; safe for several processes that write at once.

    A shard is one safetensors file with up to a few hundred rows of one shape. Its name is the
    digest of its keys; its metadata hold the version of the layout, the keys, a digest of each row,
    and a digest of all that. Opening a shard reads its header; a row is verified whenever it is
    read. Damaged shards are reported and left out, so that their rows are encoded again.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print):
        self.folder = folder
        self.report = report
        # No file stays open: a large data set has more shards than a process may have open files.
        self.rows: dict[str, RowPlace] = {}
        self.shards: set[Path] = set()
        with atomic.disk_errors(folder):
            atomic.make_folder(folder)
        self.remove_leftovers()
        self.refresh()

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed at least a day ago."""
        with contextlib.suppress(OSError):
            for file in self.folder.glob(".*.tmp"):
                known = atomic.TEMPORARY.fullmatch(file.name)
                if known is not None and time.time() - file.stat().st_mtime > DAY:
                    file.unlink()

    def refresh(self) -> None:
        """Take in the shards that have appeared or vanished, other processes' included."""
        with atomic.disk_errors(self.folder):
            shards = {
                self.folder / name
                for name in os.listdir(self.folder)
                if name.endswith(".safetensors") and not name.startswith(".")
            }
        vanished = self.shards - shards
        if vanished:
            self.rows = {
                key: place for key, place in self.rows.items() if place.path not in vanished
            }
        for path in sorted(shards - self.shards):
            self.add_shard(path)
        self.shards = shards

    def add_shard(self, path: Path) -> None:
        """Take in the rows of a shard, or leave it out if it is damaged."""
        try:
            shard = open_shard(path)
        except FileNotFoundError:
            # Another process has just removed it.
            return
        # A damaged header can break its reader in any way.
        except Exception as error:
            # One that cannot be read now may be whole.
            is_damaged = not isinstance(error, OSError)
            self.drop_shard(path, str(error) or type(error).__name__, remove=is_damaged)
            return
        for number, key in enumerate(shard.keys):
            self.rows[key] = RowPlace(path, shard, number)

    def drop_shard(self, path: Path, reason: str, remove: bool = True) -> None:
        """Leave a shard out, report it, and remove its file."""
        # The folder's name begins with "picture-" or "caption-".
        rows = f"{self.folder.name.split('-')[0]}s"
        self.report(
            f"{path}: this part of the cache is damaged ({reason}); its {rows} are encoded again"
        )
        self.rows = {key: place for key, place in self.rows.items() if place.path != path}
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[str]) -> Features:
        """Return the rows of ``keys``, stacked: arrays of shape [len(keys), ...].

        Raises:
            IntegrityError: when a row has been removed or changed since it was verified.
        """
        try:
            rows = [self.read(key) for key in keys]
        except (OSError, DamagedError) as error:
            damaged = (self.rows[key].path for key in keys if not self.is_good(key))
            path = next(damaged, self.folder)
            with contextlib.suppress(OSError):
                path.unlink()
            raise IntegrityError(
                f"{path}: this part of the cache has been removed or changed during the run "
                f"({error}). Run the same command again: it is encoded anew."
            ) from error
        try:
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                f"{self.folder}: another program has written rows of other arrays here ({error}). "
                "Remove this folder and run the same command again: they are encoded anew."
            ) from error

    def read(self, key: str) -> Features:
        """Read one row and compare it with its digest.

        Raises:
            DamagedError: when it differs.
            OSError: when the shard cannot be read.
        """
        path, shard, number = self.rows[key]
        file = os.open(path, os.O_RDONLY)
        try:
            row = {name: array.row(file, number) for name, array in shard.arrays.items()}
        # A file that was cut short, or a shape or place that the header gives wrongly.
        except (ValueError, OverflowError) as error:
            raise DamagedError(str(error)) from error
        finally:
            os.close(file)
        if digest_row(row) != shard.digests[number]:
            raise DamagedError("a row's digest differs")
        return row

    def is_good(self, key: str) -> bool:
        """Whether a row is as it was written."""
        try:
            self.read(key)
        except (OSError, DamagedError):
            return False
        return True

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys whose rows are absent or damaged, with all of a damaged row's shard."""
        keys = list(keys)
        for key in keys:
            if key in self.rows and not self.is_good(key):
                self.drop_shard(self.rows[key].path, "a row's digest differs")
        return [key for key in keys if key not in self.rows]

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Add rows in one shard, on disk before this returns."""
        path = self.folder / name_shard(list(keys))
        digests = [
            digest_row({name: array[i] for name, array in features.items()})
            for i in range(len(keys))
        ]
        metadata = {
            "version": str(VERSION),
            "keys": json.dumps(list(keys)),
            "digests": json.dumps(digests),
        }
        metadata["digest"] = atomic.digest_json(metadata)
        needed = sum(array.nbytes for array in features.values())
        with atomic.replacing(path, needed) as temporary:
            safetensors.write_arrays(temporary, features, metadata)
        # A shard of the same keys may have been there, damaged.
        self.shards.discard(path)
        self.refresh()

    def check_room(self, size: int) -> None:
        """See ``FeatureStore``."""
        if not os.access(self.folder, os.W_OK):
            raise DiskError(
                f"{self.folder}: it cannot be written, and does not hold all that is needed. Set "
                "data.cache to another folder, or to off."
            )
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise DiskError(
                f"{self.folder}: {size / 2**20:.0f} MiB are needed for what is not encoded yet, "
                f"{free / 2**20:.0f} MiB are free. Make room, set data.cache to a folder on "
                "another disk, or to off."
            )


def name_shard(keys: list[str]) -> str:
    """Return the file name of a shard."""
    return f"{atomic.digest_json(keys)}.safetensors"


def digest_row(row: Features) -> str:
    """Return XXH3-128 over names, types, shapes and bytes, in the order of the names."""
    state = xxhash.xxh3_128()
    for name in sorted(row):
        state.update(f"{name} {row[name].dtype} {row[name].shape}".encode())
        state.update(np.ascontiguousarray(row[name]).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def is_list_of_texts(value: object) -> bool:
    """Whether a value of JSON is a list of texts."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def open_shard(path: Path) -> Shard:
    """Read a shard's header.

    Raises:
        Exception: of any kind, for a header that is damaged or of another version.
    """
    header = safetensors.read_header(path)
    metadata = header.metadata
    if metadata.get("version") != str(VERSION):
        raise DamagedError(
            f"another version of Limner wrote it, {metadata.get('version')} and not {VERSION}"
        )
    if metadata["digest"] != atomic.digest_json(
        {name: metadata[name] for name in ("version", "keys", "digests")}
    ):
        raise DamagedError("its header differs")
    keys, digests = parse_json(metadata["keys"]), parse_json(metadata["digests"])
    arrays = {
        name: ArraySpan(array.numpy_dtype, array.shape, array.begin)
        for name, array in header.arrays.items()
    }
    if not is_list_of_texts(keys) or not is_list_of_texts(digests) or len(digests) != len(keys):
        raise DamagedError("its keys and digests are no texts")
    if name_shard(keys) != path.name or any(
        array.shape[:1] != (len(keys),) for array in arrays.values()
    ):
        raise DamagedError("its keys are not those that were written")
    if not arrays:
        raise DamagedError("it has no arrays")
    return Shard(keys, digests, arrays)
