"""Encoded pictures and captions on disk, as rows of named arrays under keys: whole or absent, verified, and never the source of another number."""

import contextlib
import json
import math
import os
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from limner import checkpoint, durable
from limner.family import Features
from limner.faults import IntegrityFault

DAY = 86_400


@dataclass(frozen=True)
class Array:
    """Where in a shard an array lies."""

    dtype: np.dtype
    shape: tuple[int, ...]  # first axis: rows
    begin: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, file: int, i: int) -> np.ndarray:
        """Row ``i`` from an open file."""
        return np.frombuffer(os.pread(file, self.row_bytes, self.begin + i * self.row_bytes), self.dtype).reshape(self.shape[1:])


class Store:
    """The rows of one encoder in one folder; safe for several processes that write at once.

    A shard is one safetensors file with up to a few hundred rows. Its name is the digest of its keys, its metadata hold the keys and a digest of
    the arrays. A damaged shard is named through ``tell`` and left out, so that its rows are encoded again. Rows are read when they are asked for,
    and no file stays open: a large data set has more shards than a process may have open files.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = print):
        self.folder, self.tell = folder, tell
        self.rows: dict[str, tuple[Path, dict[str, Array], int]] = {}
        self.seen: set[Path] = set()
        with durable.disk_errors(folder):
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
        """Look at the shards that have appeared since the last time, other processes' included."""
        with durable.disk_errors(self.folder):
            new = sorted(set(self.folder.glob("*.safetensors")) - self.seen)
        for path in new:
            self.seen.add(path)
            try:
                keys, arrays = read_shard(path)
            except Exception as error:  # a damaged header can break its reader in any way
                reason, rows = str(error) or type(error).__name__, f"{self.folder.name.split('-')[0]}s"
                self.tell(f"{path}: this part of the cache is damaged ({reason}); its {rows} are encoded again")
                if not isinstance(error, OSError):
                    with contextlib.suppress(OSError):
                        path.unlink()
                continue
            self.rows |= {key: (path, arrays, row) for row, key in enumerate(keys)}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def get(self, keys: Sequence[str]) -> Features:
        """The rows of ``keys``, stacked: arrays of shape [len(keys), ...].

        Raises:
            IntegrityFault: when a shard has vanished since it was verified.
        """
        rows = [self.read(key) for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def read(self, key: str) -> Features:
        path, arrays, row = self.rows[key]
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                return {name: array.row(file, row) for name, array in arrays.items()}
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            what = f"this part of the cache has been removed or changed during the run ({error})"
            raise IntegrityFault(f"{path}: {what}. Run the same command again: it is encoded anew.") from error

    def put(self, keys: Sequence[str], features: Features) -> None:
        """Add rows, in one shard, on disk before this returns."""
        path = self.folder / shard_name(list(keys))
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with durable.disk_errors(path, sum(a.nbytes for a in features.values())):
            try:
                checkpoint.write_arrays(temporary, features, {"keys": json.dumps(list(keys)), "digest": arrays_digest(features)})
                durable.sync(temporary)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
        self.seen.discard(path)
        self.refresh()


def shard_name(keys: list[str]) -> str:
    return f"{durable.digest_json(keys)}.safetensors"


def arrays_digest(features: Features) -> str:
    """XXH3-128 over names and bytes, in the order of the names."""
    state = xxhash.xxh3_128()
    for name in sorted(features):
        state.update(name.encode())
        state.update(np.ascontiguousarray(features[name]).view(np.uint8).reshape(-1).data)
    return state.hexdigest()


def read_shard(path: Path) -> tuple[list[str], dict[str, Array]]:
    """Keys of a shard and where its arrays lie; raises, one way or another, when it is not what was written."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > 1 << 28:
            raise ValueError("no safetensors header")
        header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        keys = json.loads(metadata["keys"])
        dtypes, start = checkpoint.DTYPES, 8 + length
        arrays = {name: Array(dtypes[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0]) for name, e in header.items()}
        if shard_name(keys) != path.name or any(array.shape[0] != len(keys) for array in arrays.values()):
            raise ValueError("its keys are not those that were written")
        whole = {}
        for name, array in arrays.items():
            file.seek(array.begin)
            whole[name] = np.frombuffer(file.read(array.shape[0] * array.row_bytes), array.dtype).reshape(array.shape)
        if arrays_digest(whole) != metadata["digest"]:
            raise ValueError("its digest differs")
    return keys, arrays
