"""Files and folders that are whole or absent, whatever moment the process, the disk or the power
dies."""

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from limner.errors import DiskError, IntegrityError, LockedError

MANIFEST = "MANIFEST.json"
REFUSALS: tuple[int, ...] = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
REFUSALS += (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
)


def digest_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal: for finding accidents, not attackers."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """XXH3-128 of a plain value, the same for equal values whatever the order of their keys."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Ask the disk to keep a file's bytes, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals into a ``DiskError`` that names the path and the
    space."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        folder = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(folder).free
        space = (
            f"; {needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
            if needed
            else ""
        )
        raise DiskError(
            f"{path}: {error.strerror}{space}. What was whole before is whole still; make room or "
            "choose another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file by a new one; a reader sees the old or the new text, never a part."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextlib.contextmanager
def write_folder(final: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes ``final``, with a manifest
    if wanted, in one rename.

    An existing ``final`` is replaced only after the new one is whole. When the block raises,
    ``final`` is untouched. A death between the two renames of a replacement leaves the old folder
    aside, and ``sweep`` puts it back.
    """
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            seal(temporary) if manifest else flush(temporary)
            replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(whole: Path, final: Path) -> None:
    """Give a folder its name; the one that had the name is kept until then."""
    aside = final.with_name(f".{final.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.rename(final, aside)
    try:
        os.rename(whole, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def seal(path: Path) -> None:
    """Write the manifest: size and digest of every file below ``path``, and a digest of the
    manifest itself."""
    names = sorted(
        str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST
    )
    files = {
        name: {"size": (path / name).stat().st_size, "xxh3_128": digest_file(path / name)}
        for name in names
    }
    (path / MANIFEST).write_text(
        json.dumps({"files": files, "digest": digest_json(files)}, indent=1)
    )
    flush(path)


def flush(path: Path) -> None:
    """Ask the disk to keep every file and folder below ``path``."""
    for inner in [*path.rglob("*"), path]:
        sync(inner)


def verify(path: Path) -> None:
    """Compare every file below ``path`` with its manifest.

    Raises:
        IntegrityError: naming the first file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, own = manifest["files"], manifest["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path / MANIFEST}: missing or unreadable, so {path.name} cannot be trusted"
        ) from error
    if own != digest_json(files):
        raise IntegrityError(f"{path / MANIFEST}: changed since it was written")
    for name, known in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != known["size"]:
                raise IntegrityError(f"{file}: {size} bytes, {known['size']} were written")
            if digest_file(file) != known["xxh3_128"]:
                raise IntegrityError(f"{file}: changed since it was written (digest differs)")
        except OSError as error:
            raise IntegrityError(
                f"{file}: {'missing' if error.errno == errno.ENOENT else error.strerror}"
            ) from error


def remove_folder(path: Path) -> None:
    """Remove a folder so that a death in between leaves nothing that looks whole."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.{os.getpid()}.del")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Put back what a writer that died had set aside in ``root``, and remove its leavings. Call it
    only while holding the lock of ``root``."""
    for aside in root.glob(".*.old"):
        final = root / aside.name[1:].rsplit(".", 2)[0]
        shutil.rmtree(aside) if final.exists() else os.rename(aside, final)
    for left in (*root.glob(".*.tmp"), *root.glob(".*.del")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold ``root`` for this process alone; the system lets go of it when the process dies, however
    it dies.

    Raises:
        LockedError: naming the process and the host that hold it.
    """
    import fcntl

    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with disk_errors(root / ".lock"):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(file, 1000).decode(errors="replace").strip() or "unknown process"
                raise LockedError(
                    f"{root}: another run is writing here ({holder}). Wait for it, stop it, or "
                    "choose another folder."
                ) from None
            os.ftruncate(file, 0)
            command = " ".join(sys.argv[:1])
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}: {command}\n".encode())
        yield
    finally:
        os.close(file)


def user_cache_folder() -> Path:
    """The folder that this user's runs share: LIMNER_CACHE, or ``limner`` in the user's cache
    folder."""
    if chosen := os.environ.get("LIMNER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limner"
