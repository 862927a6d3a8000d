"""JAX's cache of executables with a digest on every entry: what is damaged, or was written for
another name or another processor, is not given to XLA, which would trust it."""

import contextlib
import functools
import hashlib
import os
import secrets
import stat
import sys
from pathlib import Path

import filelock
import jax
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from limner.engines.machine import instruction_sets, processor_name
from limner.protocols import Report
from limner.storage import atomic

DIGEST_BYTES = 32


class SealedCache(LRUCache):
    """JAX's cache in a folder, each entry a digest of its name and content, then the content.

    Names are this package's own: entries of JAX's in the same folder are neither read nor touched.
    """

    def __init__(self, folder: str, max_bytes: int):
        super().__init__(folder, max_size=max_bytes)
        # JAX's own ``path`` is one of etils where that is installed, without chmod or an owner.
        self.folder = Path(folder)
        self.report: Report = write_to_stderr

    def get(self, key: str) -> bytes | None:
        """Return an entry, or None where there is none, or one that was removed for its digest."""
        name = make_name(key)
        path = self.folder / f"{name}-cache"
        reason = find_stranger(path)
        # A pipe or a device could be read, or written, for ever.
        if atomic.is_device(path) or atomic.is_device(path.with_name(f"{name}-atime")):
            reason = "it is no regular file"
        if reason is not None:
            self.remove(key, reason)
            return None
        stored = super().get(name)
        if stored is None:
            return None
        content: bytes = stored[DIGEST_BYTES:]
        if stored[:DIGEST_BYTES] == make_digest(name, content):
            return content
        self.remove(key, "it is damaged, or another program's")
        return None

    def put(self, key: str, content: bytes) -> None:
        """Add an entry."""
        name = make_name(key)
        sealed = make_digest(name, content) + content
        if self.eviction_enabled:
            super().put(name, sealed)
            with contextlib.suppress(FileNotFoundError):  # too large, or removed already
                (self.folder / f"{name}-cache").chmod(0o600)
            return
        # Nobody locks such a folder: other processes must not read half an entry.
        part = self.folder / f"{name}-{secrets.token_hex(8)}-part"
        part.write_bytes(sealed)
        part.chmod(0o600)
        part.rename(self.folder / f"{name}-cache")

    def remove(self, key: str, reason: str) -> None:
        """Remove an entry, so that it is made again, and say so in a line."""
        name = make_name(key)
        # A folder is locked if its size is limited.
        with self.lock if self.eviction_enabled else contextlib.nullcontext():
            for suffix in ("cache", "atime"):
                (self.folder / f"{name}-{suffix}").unlink(missing_ok=True)
        path = self.folder / f"{name}-cache"
        self.report(f"compiled program {path} is made again: {reason}")


def make_name(key: str) -> str:
    """Return the name of an entry."""
    return f"limner-{digest_processor()}-{key}"


@functools.cache
def digest_processor() -> str:
    """Return a digest of the host's processor, for which a program may have been compiled.

    JAX's keys do not have it.
    """
    processor = f"{processor_name()}\n{instruction_sets()}"
    return hashlib.sha256(processor.encode()).hexdigest()[:16]


def find_stranger(path: Path) -> str | None:
    """Return who else may have written a file or folder; None where nobody, or there is none."""
    if not hasattr(os, "getuid") or not path.exists():
        return None
    status = path.stat()
    if status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others than its owner may write it"
    return None


def make_digest(name: str, content: bytes) -> bytes:
    """Return the digest of an entry; it finds accidents, not attackers."""
    return hashlib.sha256(f"{name}\n".encode() + content).digest()


def write_to_stderr(line: str) -> None:
    """Write a line where no engine has said where to."""
    print(line, file=sys.stderr)


def install(folder: str, max_bytes: int) -> None:
    """Have JAX keep its executables in a sealed cache."""
    compilation_cache.reset_cache()
    # JAX makes a cache when it first needs one, unless it has one.
    compilation_cache._cache = SealedCache(folder, max_bytes)
    compilation_cache._cache_initialized = True


def find_installed() -> SealedCache | None:
    """Return the sealed cache that JAX uses, if any."""
    cache = compilation_cache._cache
    is_enabled = jax.config.values["jax_enable_compilation_cache"]
    return cache if is_enabled and isinstance(cache, SealedCache) else None


def sweep(folder: Path) -> None:
    """Remove entries that a killed process has left half-written, and what is no file, which JAX
    would read when it looks for the oldest.

    JAX writes the time of use last, and never again writes or removes an entry without it.
    """
    jax_lock = filelock.FileLock(folder / ".lockfile", timeout=10)
    with contextlib.suppress(filelock.Timeout), jax_lock:
        for path in [*folder.glob("*-atime"), *folder.glob("*-cache")]:
            if atomic.is_device(path):
                path.unlink(missing_ok=True)
                write_to_stderr(f"limner: {path} is removed: it is no regular file")
        for path in folder.glob("*-cache"):
            if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
                path.unlink(missing_ok=True)
