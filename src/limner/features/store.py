"""Encoded pictures and captions, as rows of named arrays under keys: whole or absent, verified when
read, and never the source of another number."""

import contextlib
import json
import math
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from limner.errors import DiskError, IntegrityError
from limner.protocols import Features
from limner.storage import atomic, safetensors
from limner.storage.safetensors import DTYPES

DAY = 86_400
VERSION = 2  # of a shard's layout


class DamagedError(ValueError):
    """A shard or a row that is not what was written; the message is the reason."""


class FeatureStore(Protocol):
    """Where rows of features are kept."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, keys: Sequence[str]) -> Features:
        """The rows of ``keys``, stacked: arrays of shape [len(keys), ...]."""
        ...

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Add rows, all of one shape."""
        ...

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys whose rows are not here, or not what was written."""
        ...

    def refresh(self) -> None:
        """See what other processes have done."""
        ...

    def check_room(self, size: int) -> None:
        """Refuse to begin what cannot be kept.

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
        rows = [self.rows[key] for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def put(self, keys: Sequence[str], features: Features) -> None:
        self.rows |= {
            key: {name: array[i].copy() for name, array in features.items()}
            for i, key in enumerate(keys)
        }

    def missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self.rows]

    def refresh(self) -> None:
        pass

    def check_room(self, size: int) -> None:
        pass


@dataclass(frozen=True)
class ArraySpan:
    """Where in a shard an array lies."""

    dtype: np.dtype
    shape: tuple[int, ...]  # first axis: rows
    begin: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, file: int, i: int) -> np.ndarray:
        """Row ``i`` from an open file."""
        return np.frombuffer(
            os.pread(file, self.row_bytes, self.begin + i * self.row_bytes), self.dtype
        ).reshape(self.shape[1:])


class DiskStore:
    """The rows of one encoder in one folder; safe for several processes that write at once.

    A shard is one safetensors file with up to a few hundred rows of one shape. Its name is the
    digest of its keys; its metadata hold the version of the layout, the keys, a digest of each row,
    and a digest of all that. Opening a shard reads its header; a row is verified whenever it is
    read. What is damaged is named through ``report`` and left out, so that it is encoded again. No
    file stays open: a large data set has more shards than a process may have open files.
    """

    def __init__(self, folder: Path, report: Callable[[str], None] = print):
        self.folder, self.report = folder, report
        self.rows: dict[str, tuple[Path, Shard, int]] = {}
        self.seen: set[Path] = set()
        with atomic.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        self.refresh()

    def sweep(self) -> None:
        """Remove what writers that were killed left behind a day ago or earlier."""
        with contextlib.suppress(OSError):
            for left in self.folder.glob(".*.tmp"):
                if time.time() - left.stat().st_mtime > DAY:
                    left.unlink()

    def refresh(self) -> None:
        """Look at the shards that have appeared or vanished since the last time, other processes'
        included."""
        with atomic.disk_errors(self.folder):
            there = {
                self.folder / name
                for name in os.listdir(self.folder)
                if name.endswith(".safetensors") and not name.startswith(".")
            }
        if gone := self.seen - there:
            self.rows = {key: place for key, place in self.rows.items() if place[0] not in gone}
        for path in sorted(there - self.seen):
            try:
                shard = open_shard(path)
            except FileNotFoundError:
                continue  # another process has just removed it
            except Exception as error:  # a damaged header can break its reader in any way
                self.drop(
                    path, str(error) or type(error).__name__, remove=not isinstance(error, OSError)
                )
                continue
            self.rows |= {key: (path, shard, row) for row, key in enumerate(shard.keys)}
        self.seen = there

    def drop(self, path: Path, reason: str, remove: bool = True) -> None:
        """Leave a shard out, and say so."""
        what = f"{self.folder.name.split('-')[0]}s"
        self.report(
            f"{path}: this part of the cache is damaged ({reason}); its {what} are encoded again"
        )
        self.rows = {key: place for key, place in self.rows.items() if place[0] != path}
        if remove:
            with contextlib.suppress(OSError):
                path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[str]) -> Features:
        """The rows of ``keys``, stacked: arrays of shape [len(keys), ...].

        Raises:
            IntegrityError: when a row has been removed or changed since it was verified.
        """
        try:
            rows = [self.read(key) for key in keys]
        except (OSError, DamagedError) as error:
            path = next((self.rows[key][0] for key in keys if not self.is_good(key)), self.folder)
            with contextlib.suppress(OSError):
                path.unlink()
            what = f"this part of the cache has been removed or changed during the run ({error})"
            raise IntegrityError(
                f"{path}: {what}. Run the same command again: it is encoded anew."
            ) from error
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def read(self, key: str) -> Features:
        """One row, compared with its digest.

        Raises:
            Damaged: when it differs.
            OSError: when the shard cannot be read.
        """
        path, shard, number = self.rows[key]
        file = os.open(path, os.O_RDONLY)
        try:
            row = {name: array.row(file, number) for name, array in shard.arrays.items()}
        except (ValueError, OverflowError) as error:  # a shape or a place that no longer fits
            raise DamagedError(str(error)) from error
        finally:
            os.close(file)
        if digest_row(row) != shard.digests[number]:
            raise DamagedError("a row's digest differs")
        return row

    def is_good(self, key: str) -> bool:
        """Whether a row is what was written."""
        try:
            self.read(key)
        except (OSError, DamagedError):
            return False
        return True

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys whose rows are not here, or not what was written; all rows of a shard
        with a damaged one are gone."""
        keys = list(keys)
        for key in keys:
            if key in self.rows and not self.is_good(key):
                self.drop(self.rows[key][0], "a row's digest differs")
        return [key for key in keys if key not in self.rows]

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Add rows, in one shard, on disk before this returns."""
        path = self.folder / name_shard(list(keys))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        digests = [
            digest_row({name: array[i] for name, array in features.items()})
            for i in range(len(keys))
        ]
        metadata = {
            "version": str(VERSION),
            "keys": json.dumps(list(keys)),
            "digests": json.dumps(digests),
        }
        with atomic.disk_errors(path, sum(a.nbytes for a in features.values())):
            try:
                safetensors.write_arrays(
                    temporary, features, metadata | {"digest": atomic.digest_json(metadata)}
                )
                atomic.sync(temporary)
                temporary.rename(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
        self.seen.discard(path)
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
            needed = (
                f"{size / 2**20:.0f} MiB are needed for what is not encoded yet, "
                f"{free / 2**20:.0f} MiB are free"
            )
            raise DiskError(
                f"{self.folder}: {needed}. Make room, set data.cache to a folder on another disk, "
                "or to off."
            )


@dataclass(frozen=True)
class Shard:
    """What a shard's header says."""

    keys: list[str]
    digests: list[str]
    arrays: dict[str, ArraySpan]


def name_shard(keys: list[str]) -> str:
    return f"{atomic.digest_json(keys)}.safetensors"


def digest_row(row: Features) -> str:
    """XXH3-128 over names, types, shapes and bytes, in the order of the names."""
    state = xxhash.xxh3_128()
    for name in sorted(row):
        state.update(f"{name} {row[name].dtype} {row[name].shape}".encode())
        state.update(np.ascontiguousarray(row[name]).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def open_shard(path: Path) -> Shard:
    """A shard's header; raises, one way or another, when it is not what was written, or by another
    version."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > 1 << 28:
            raise DamagedError("it has no safetensors header")
        header: dict[str, Any] = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size
    metadata = header.pop("__metadata__")
    if metadata.get("version") != str(VERSION):
        raise DamagedError(
            f"another version of Limner wrote it, {metadata.get('version')} and not {VERSION}"
        )
    if metadata["digest"] != atomic.digest_json(
        {name: metadata[name] for name in ("version", "keys", "digests")}
    ):
        raise DamagedError("its header differs")
    keys, digests, start = json.loads(metadata["keys"]), json.loads(metadata["digests"]), 8 + length
    arrays = {
        name: ArraySpan(DTYPES[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0])
        for name, e in header.items()
    }
    if name_shard(keys) != path.name or any(
        array.shape[0] != len(keys) for array in arrays.values()
    ):
        raise DamagedError("its keys are not those that were written")
    if size != start + max(e["data_offsets"][1] for e in header.values()):
        raise DamagedError(f"{size} bytes are there, it is cut short or longer than it was")
    return Shard(keys, digests, arrays)
