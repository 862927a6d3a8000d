"""Compiled programs on disk. JAX's own cache knows a program when it has been traced; beside it, in
the same folder, lie whole steps that are found by what they are made from, which spares the tracing
too."""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import jax
from jax._src import compilation_cache
from jax.experimental import serialize_executable

import limner
from limner.engines.machine import instruction_sets, processor_name
from limner.errors import InputError
from limner.storage import atomic

ENABLED_FOLDER = 4 << 30  # bytes of compiled programs; those that were used longest ago go first
WORTH_SECONDS = 0.5  # seconds of compiling that are worth a file


def enable(place: str) -> None:
    """Keep compiled programs on disk, where another process finds them; unless the recipe names a
    folder, what ``JAX_COMPILATION_CACHE_DIR`` says holds.

    Raises:
        InputError: when the folder cannot be written.
    """
    if place == "off" or (place == "auto" and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return
    folder = atomic.user_cache_folder() / "jax" if place == "auto" else Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise InputError(
            f"engine.compile_cache: {folder} cannot be written ({error.strerror}); give another "
            "folder, or off"
        ) from error
    sweep(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", ENABLED_FOLDER)


def sweep(folder: Path) -> None:
    """Remove programs that a killed process has left half-written: JAX would trip over them for
    ever. Of a whole one the time of its last use is there too."""
    with (
        contextlib.suppress(filelock.Timeout),
        filelock.FileLock(folder / ".lockfile", timeout=10),
    ):  # JAX's own lock
        for path in folder.glob("*-cache"):
            if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
                path.unlink(missing_ok=True)


def load_or_compile(
    make: Callable[[], Any], devices: Sequence[Any], meaning: Any, arguments: Any
) -> Any:
    """What ``make`` compiles, or the same program from the disk, where an earlier process has left
    it.

    Args:
        make: lowers and compiles.
        devices: those that the program runs on.
        meaning: all that the program depends on besides this package's code, JAX, its settings and
            the machine; JSON.
        arguments: a tree of arrays, of which names, shapes, types and places matter.
    """
    store: Any = compilation_cache._get_cache(
        devices[0].client
    )  # what puts JAX's own programs there, throws out the oldest, and locks
    if store is None:
        return make()
    key = f"limner-{cache_key(devices, meaning, arguments)}"
    if found := store.get(key):
        try:
            seal, blob = found[:32], found[32:]
            if hashlib.sha256(blob).digest() != seal:
                raise ValueError("a damaged program")
            program, takes, gives = pickle.loads(blob)
            return serialize_executable.deserialize_and_load(
                program, takes, gives, devices[0].client, devices
            )
        except Exception:  # whatever is wrong with it, the program can be made again
            for path in Path(store._path).glob(f"{key}-*"):
                path.unlink(missing_ok=True)
    began = time.monotonic()
    with found_by_jax() as hits:
        made = make()
    if not hits and time.monotonic() - began > WORTH_SECONDS:
        with contextlib.suppress(Exception):  # some programs cannot be written, and some disks
            blob = pickle.dumps(serialize_executable.serialize(made))
            store.put(key, hashlib.sha256(blob).digest() + blob)
    return made


@contextlib.contextmanager
def found_by_jax() -> Iterator[list[str]]:
    """What JAX's own cache gives meanwhile. On CPUs such a program lacks functions when it is
    written once more, and then fails where it is run."""
    heard: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            heard.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield heard
    finally:
        jax.monitoring.unregister_event_listener(listen)


def cache_key(devices: Sequence[Any], meaning: Any, arguments: Any) -> str:
    """A digest of all that makes a program what it is."""
    leaves = [
        [jax.tree_util.keystr(path), list(a.shape), str(a.dtype), str(getattr(a, "sharding", None))]
        for path, a in jax.tree_util.tree_flatten_with_path(arguments)[0]
    ]
    first = devices[0]
    place = [
        [d.id for d in devices],
        jax.process_index(),
        first.device_kind,
        first.client.platform_version,
    ]
    place += [processor_name(), instruction_sets()] if first.platform == "cpu" else []
    settings = {
        name: repr(value)
        for name, value in sorted(jax.config.values.items())
        if "cache" not in name
    }
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    versions = [version(name) for name in ("jax", "jaxlib", "numpy", "optax")]
    return hashlib.sha256(
        json.dumps(
            [digest_package(), versions, place, settings, flags, meaning, leaves], sort_keys=True
        ).encode()
    ).hexdigest()


@functools.cache
def digest_package() -> str:
    """A digest of this package's own code."""
    root, digest = Path(limner.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
