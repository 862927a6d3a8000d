"""Write files and folders so that each is whole or absent, whenever process or power die."""

import contextlib
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import xxhash

from limner.errors import DiskError, IntegrityError, LockedError
from limner.json_types import read_object

MANIFEST = "MANIFEST.json"
LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder"
# Names of what is not whole yet (tmp), not needed any more (old) or to be deleted (del). A folder
# of the user's may hold any other.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.limner-[0-9a-f]{16}\.(?P<kind>tmp|old|del)")
# Errors of the disk, the network share or the place that the user chose, where the system knows
# them; all others, as EBADF and EFAULT, are defects of the program.
REFUSALS = """
    ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENOTDIR EISDIR EEXIST ENOTEMPTY ENAMETOOLONG ELOOP
    ENOLCK EOPNOTSUPP ESTALE EBUSY ETXTBSY EXDEV EMLINK ENXIO ENODEV ENOMEDIUM EUCLEAN EBADMSG
    EREMOTEIO ENOKEY EKEYEXPIRED
""".split()  # noqa: SIM905
# The same, of a file that is named; else they come from a socket, or from a defect.
NAMED_REFUSALS = "ENOENT EINVAL EILSEQ ENOTCONN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ECONNRESET".split()  # noqa: SIM905


def digest_file(path: Path) -> str:
    """Return the XXH3-128 of a file's bytes, in hexadecimal; it finds accidents, not attackers."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def digest_json(value: object) -> str:
    """Return the XXH3-128 of a JSON value, the same whatever the order of its keys."""
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's list of names, written to the disk."""
    # Windows syncs no folders, and files only where they may be written.
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, where they are not there; no power cut takes them away."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync(one.parent)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals into a ``DiskError`` that names the path.

    Args:
        needed: bytes that are about to be written; the message compares them with the free space.
    """
    try:
        yield
    except OSError as error:
        if not is_refusal(error):
            raise
        space = ""
        if needed:
            folder = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
            free = shutil.disk_usage(folder).free
            space = f"; {needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise DiskError(
            f"{path}: {error.strerror}{space}. What was whole before is whole still; make room or "
            "choose another folder."
        ) from error


def is_refusal(error: OSError) -> bool:
    """Whether an error is the disk's, not the program's."""
    name = errno.errorcode.get(error.errno or 0)
    # Two names of one number on some systems.
    name = "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else name
    return name in REFUSALS or (name in NAMED_REFUSALS and error.filename is not None)


def name_temporary(path: Path, kind: str, mark: str | None = None) -> Path:
    """Return a name beside ``path`` that ``sweep`` knows.

    Args:
        kind: tmp, old or del, see ``TEMPORARY``.
        mark: 16 hexadecimal digits; by default those of this process.
    """
    mark = mark or f"{os.getpid():016x}"
    return path.with_name(f".{path.name}.limner-{mark}.{kind}")


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary path in the same folder; a file written to it then replaces ``path``.

    A reader sees the old file or the new one, never a part. When the block raises, ``path`` is
    untouched. What a link leads to is replaced, not the link; a device or pipe is written to.

    Args:
        needed: see ``disk_errors``.

    Raises:
        DiskError: when the disk refuses.
    """
    if is_device(path):
        with tempfile.TemporaryDirectory() as folder, disk_errors(path, needed):
            yield Path(folder) / path.name
            with path.open("wb") as device, (Path(folder) / path.name).open("rb") as file:
                shutil.copyfileobj(file, device)
        return
    target = Path(os.path.realpath(path))
    # Random, as threads, and hosts with a shared disk, may write the same file at once.
    temporary = name_temporary(target, "tmp", secrets.token_hex(8))
    with disk_errors(path, needed):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)


def is_device(path: Path) -> bool:
    """Whether a path is there, and is neither a file nor a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_text(path: Path, text: str) -> None:
    """Write a small file, in place of an older one; its folder is made if there is none."""
    with disk_errors(path):
        make_folder(path.parent)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def write_folder(final: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes ``final`` when the block ends.

    An existing ``final`` is replaced only after the new one is whole. When the block raises,
    ``final`` is untouched. A death between the two renames of a replacement leaves the old folder
    under another name, and ``sweep`` puts it back.

    Args:
        manifest: whether to write the manifest that ``verify`` reads.
    """
    temporary = name_temporary(final, "tmp")
    with disk_errors(final):
        make_folder(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if manifest:
                seal(temporary)
            else:
                flush(temporary)
            replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(whole: Path, final: Path) -> None:
    """Rename a folder to ``final``; the one of that name is deleted only afterwards."""
    if final.exists() and exchange(whole, final):
        sync(final.parent)
        shutil.rmtree(whole, ignore_errors=True)
        return
    aside = name_temporary(final, "old")
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


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change their names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    # From Linux's <fcntl.h> and <linux/fs.h>; absolute names need no folder.
    at_fdcwd, rename_exchange = -100, 2
    return bool(rename(at_fdcwd, names[0], at_fdcwd, names[1], rename_exchange) == 0)


def seal(path: Path) -> None:
    """Write the manifest of a folder: size and digest of every file, and a digest of itself."""
    names = sorted(
        str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST
    )
    files = {
        name: {"size": (path / name).stat().st_size, "xxh3_128": digest_file(path / name)}
        for name in names
    }
    manifest = {"files": files, "digest": digest_json(files)}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush(path)


def flush(path: Path) -> None:
    """Have every file and folder below ``path`` written to the disk."""
    for inner in [*path.rglob("*"), path]:
        sync(inner)


def verify(path: Path) -> None:
    """Compare every file below ``path`` with its manifest.

    Raises:
        IntegrityError: naming the first file that is missing, cut short or changed.
    """
    try:
        manifest = read_object((path / MANIFEST).read_text(encoding="utf-8"))
        files, digest = manifest["files"], manifest["digest"]
        check_entries(files)
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{path / MANIFEST}: missing or unreadable, so {path.name} cannot be trusted"
        ) from error
    if digest != digest_json(files):
        raise IntegrityError(f"{path / MANIFEST}: changed since it was written")
    for name, entry in files.items():
        verify_file(path / name, entry["size"], entry["xxh3_128"])


def check_entries(files: object) -> None:
    """Refuse what is no list of files, each with a size and a digest, below one folder.

    Raises:
        ValueError: saying what is wrong.
    """
    if not isinstance(files, dict) or not files:
        raise ValueError("names no files")
    for name, entry in files.items():
        if not is_inside(name):
            raise ValueError("names a file elsewhere")
        sound = isinstance(entry, dict) and entry.keys() == {"size", "xxh3_128"}
        if not sound or type(entry["size"]) is not int or not isinstance(entry["xxh3_128"], str):
            raise ValueError("describes a file in another way")


def is_inside(name: str) -> bool:
    """Return whether a file's name in a manifest leads to a place below its folder."""
    parts = name.split("/")
    is_plain = "\0" not in name and "\\" not in name and len(name) <= 4_000
    return is_plain and all(parts) and ".." not in parts


def verify_file(path: Path, size: int, digest: str) -> None:
    """Compare one file with its size and digest; raises ``IntegrityError`` as ``verify`` does."""
    try:
        actual_size = path.stat().st_size
        if actual_size != size:
            raise IntegrityError(f"{path}: {actual_size} bytes, {size} were written")
        if digest_file(path) != digest:
            raise IntegrityError(f"{path}: changed since it was written (digest differs)")
    except OSError as error:
        reason = "missing" if error.errno == errno.ENOENT else error.strerror
        raise IntegrityError(f"{path}: {reason}") from error


def remove_folder(path: Path) -> None:
    """Remove a folder; a death before the end leaves nothing that looks whole."""
    if path.exists():
        doomed = name_temporary(path, "del")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Put back folders that a dead writer had renamed in ``root``, and remove its temporary files.

    Call it only while holding the lock of ``root``.

    Raises:
        DiskError: when the disk refuses.
    """
    with disk_errors(root):
        for left in sorted(root.glob(".*")):
            known = TEMPORARY.fullmatch(left.name)
            if known is None:
                continue
            final = root / known["name"]
            if known["kind"] == "old" and not final.exists():
                os.rename(left, final)
            elif known["kind"] == "old":
                shutil.rmtree(left)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process dies, however it dies.

    Raises:
        LockedError: naming the process and the host that hold it.
    """
    path, holder = root / LOCK_FILE, root / HOLDER_FILE
    with disk_errors(root):
        make_folder(root)
    # Its own file has no text: on Windows nobody else can read a file that is locked.
    file_lock = filelock.FileLock(path, timeout=0, thread_local=False)
    try:
        with disk_errors(path):
            file_lock.acquire()
    except filelock.Timeout:
        raise LockedError(
            f"{root}: another run is writing here ({read_holder(holder)}). Wait for it, stop it, "
            "or choose another folder."
        ) from None
    try:
        with disk_errors(path):
            command = " ".join(sys.argv[:1])
            text = f"process {os.getpid()} on {socket.gethostname()}: {command}\n"
            write_in_place(holder, text.encode(errors="replace"))
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        file_lock.release()


def write_in_place(path: Path, content: bytes) -> None:
    """Write a small file whose loss harms nobody."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.ftruncate(file, 0)
        os.write(file, content)
    finally:
        os.close(file)


def read_holder(path: Path) -> str:
    """Return what the process that holds a lock says of itself."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:1000].strip()
    except OSError:
        text = ""
    return text or "unknown process"


def user_cache_folder() -> Path:
    """Return the folder that a user's runs share: LIMNER_CACHE, else one in the user's cache."""
    if chosen := os.environ.get("LIMNER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "limner"
