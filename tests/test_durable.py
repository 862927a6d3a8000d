"""Files and folders are whole or absent, whatever fails at whatever moment; damage is found and
named; one writer at a time."""

import contextlib
import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import moments
import pytest

from limner.errors import DiskError, IntegrityError, LockedError
from limner.storage import atomic


def fill(path: Path, text: str = "new") -> None:
    (path / "inner").mkdir()
    (path / "a.txt").write_text(text)
    (path / "inner" / "b.bin").write_bytes(os.urandom(100))


def made(final: Path, text: str = "new") -> Path:
    with atomic.write_folder(final) as path:
        fill(path, text)
    return final


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with atomic.write_folder(final) as path:
        fill(path)
        assert not final.exists() and path.parent == final.parent
    atomic.verify(final)
    assert names(final.parent) == ["final"] and names(final) == ["MANIFEST.json", "a.txt", "inner"]


def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="midway"), atomic.write_folder(tmp_path / "final") as path:
        fill(path)
        raise ValueError("midway")
    assert names(tmp_path) == []


def test_an_exception_in_the_middle_leaves_the_previous(tmp_path: Path) -> None:
    final = made(tmp_path / "final", "old")
    with pytest.raises(KeyboardInterrupt), atomic.write_folder(final) as path:
        fill(path)
        raise KeyboardInterrupt
    atomic.verify(final)
    assert (final / "a.txt").read_text() == "old" and names(tmp_path) == ["final"]
    made(final, "newer")
    assert (final / "a.txt").read_text() == "newer" and names(tmp_path) == ["final"]


def test_without_manifest(tmp_path: Path) -> None:
    with atomic.write_folder(tmp_path / "final", manifest=False) as path:
        fill(path)
    assert names(tmp_path / "final") == ["a.txt", "inner"]
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json: missing or unreadable"):
        atomic.verify(tmp_path / "final")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_every_call_can_fail(tmp_path: Path, number: int) -> None:
    """For n = 1, 2, ... until none fails: each time a whole folder is there, and the message names
    the path and the reason."""
    final = made(tmp_path / "final", "old")
    faults = 0
    for n in itertools.count(1):
        with moments.failing(n, number) as count:
            try:
                made(final, "new")
            except DiskError as fault:
                faults += 1
                assert str(final) in str(fault) and os.strerror(number) in str(fault)
        atomic.verify(final)
        atomic.sweep(tmp_path)
        assert names(tmp_path) == ["final"]
        if count[0] < n:
            break
    assert faults > 8 and (final / "a.txt").read_text() == "new"


def test_death_at_every_call_loses_nothing(tmp_path: Path) -> None:
    """What was whole before is whole after the sweep, even when the death falls between the two
    renames of a replacement."""
    final, n, seen = tmp_path / "final", 0, set()
    while True:
        n += 1
        made(final, "old")
        died = moments.dies_at(n, lambda: made(final, "new"))
        atomic.sweep(tmp_path)
        assert names(tmp_path) == ["final"]
        atomic.verify(final)
        seen.add((final / "a.txt").read_text())
        if not died:
            break
    assert n > 15 and seen == {"old", "new"}


def test_what_was_set_aside_is_put_back(tmp_path: Path) -> None:
    """The state between the two renames of ``replace``, made by hand."""
    final = tmp_path / "checkpoint-1.5 x"
    made(final, "old").rename(atomic.name_temporary(final, "old"))
    atomic.name_temporary(final, "tmp").mkdir()
    atomic.sweep(tmp_path)
    atomic.verify(tmp_path / "checkpoint-1.5 x")
    assert names(tmp_path) == ["checkpoint-1.5 x"]


def test_sweep_takes_leavings_only(tmp_path: Path) -> None:
    made(tmp_path / "final")
    for kind in ("tmp", "del", "old"):
        (atomic.name_temporary(tmp_path / "final", kind) / "inner").mkdir(parents=True)
    atomic.name_temporary(tmp_path / "metrics.jsonl", "tmp").write_text("half")
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize(
    "name",
    [
        "mine.tmp",
        ".git",
        ".zshrc.old",
        ".draft.tmp",
        ".backup.2024.old",
        ".notes.1.tmp",
        ".data.limner-.del",
        ".photos.limner-2024.old",
        "x.limner-0123456789abcdef.tmp",
        ".x.limner-0123456789abcdef.tmp.png",
    ],
)
@pytest.mark.parametrize("is_folder", [True, False])
def test_sweep_leaves_what_is_the_users(name: str, is_folder: bool, tmp_path: Path) -> None:
    """A run's folder may be one with other things in it."""
    inner = tmp_path / name / "inner" if is_folder else tmp_path / name
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("keep")
    atomic.sweep(tmp_path)
    assert names(tmp_path) == [name] and inner.read_text() == "keep"


def test_write_text_is_whole_or_the_old(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "config.json"
    atomic.write_text(file, "old ä")
    for n in itertools.count(1):
        with moments.failing(n, errno.ENOSPC) as count, contextlib.suppress(DiskError):
            atomic.write_text(file, "new ä" * 1000)
        assert file.read_text(encoding="utf-8") in ("old ä", "new ä" * 1000) and names(
            file.parent
        ) == ["config.json"]
        if count[0] < n:
            break
    for n in itertools.count(1):
        file.write_text("old")
        if not moments.dies_at(n, lambda: atomic.write_text(file, "new")):
            break
        assert file.read_text() in ("old", "new")
    atomic.sweep(file.parent)
    assert names(file.parent) == ["config.json"] and file.read_text() == "new"


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and names(tmp_path) == ["picture.png"]
    with atomic.replacing(file) as one, atomic.replacing(file) as other:
        one.write_text("first")
        other.write_text("second")
        assert one.parent == tmp_path and file.read_text() == "old"
    assert file.read_text() == "first" and names(tmp_path) == ["picture.png"]
    words = r"No space left on device; 5 MiB are needed, \d+ MiB are free"
    with pytest.raises(DiskError, match=words), atomic.replacing(file, 5 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Two or three bits of every byte of the manifest, and one of every byte of every file."""
    final = made(tmp_path / "final")
    for file in (final / "a.txt", final / "inner" / "b.bin", final / "MANIFEST.json"):
        whole = file.read_bytes()
        bits = (
            range(0, len(whole) * 8, 3)
            if file.name == "MANIFEST.json"
            else [i * 8 + i % 8 for i in range(len(whole))]
        )
        for bit in bits:
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(
                IntegrityError, match=file.name if file.name != "MANIFEST.json" else "final"
            ):
                atomic.verify(final)
        file.write_bytes(whole)
    atomic.verify(final)


@pytest.mark.parametrize("file", ["a.txt", "inner/b.bin", "MANIFEST.json"])
def test_truncated_longer_missing_and_unreadable_files_are_named(tmp_path: Path, file: str) -> None:
    final = made(tmp_path / "final")
    path = final / file
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[1:], None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=str(path)):
            atomic.verify(final)
    path.mkdir()
    with pytest.raises(IntegrityError, match=str(path)):
        atomic.verify(final)


def test_a_disk_that_cannot_read_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = made(tmp_path / "final")

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "digest_file", fail)
    with pytest.raises(IntegrityError, match="Input/output error"):
        atomic.verify(final)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "{}",
        '{"files": 5, "digest": "x"}',
        '{"files": {"a.txt": 5}, "digest": "x"}',
        "null",
        "\xff",
    ],
)
def test_a_manifest_of_another_kind(tmp_path: Path, manifest: str) -> None:
    final = made(tmp_path / "final")
    (final / "MANIFEST.json").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json"):
        atomic.verify(final)


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_place_that_is_no_folder(tmp_path: Path, place: str) -> None:
    """An output below, or in place of, a file is the user's mistake: said in words."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=f"{tmp_path / place}"), atomic.lock(tmp_path / place):
        pass
    with pytest.raises(DiskError, match="file"):
        atomic.write_text(tmp_path / "file" / "x.json", "")


def test_space_is_named(tmp_path: Path) -> None:
    words = (
        r"No space left on device; 3 MiB are needed, \d+ MiB are free\. What was whole "
        r"before is whole still"
    )
    with pytest.raises(DiskError, match=words), atomic.disk_errors(tmp_path / "x", 3 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_are_not_the_disk_s(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.disk_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "a defect of the program")


@pytest.mark.parametrize(
    "name",
    "EINVAL ENOENT ENOTCONN ETIMEDOUT EHOSTDOWN ESTALE EBUSY EXDEV ENXIO EUCLEAN".split(),  # noqa: SIM905
)
def test_what_a_disk_or_a_share_says_of_a_file_is_the_disk_s(name: str, tmp_path: Path) -> None:
    number = getattr(errno, name)
    place = tmp_path / "a"
    with pytest.raises(DiskError, match=f"^{place}: {os.strerror(number)}"):  # noqa: SIM117
        with atomic.disk_errors(place):
            raise OSError(number, os.strerror(number), str(place))


@pytest.mark.parametrize("name", ["EBADF", "EFAULT", "EINVAL", "ETIMEDOUT", "ENOTCONN", "EPIPE"])
def test_what_no_file_is_named_in_may_be_a_defect(name: str, tmp_path: Path) -> None:
    """Or a socket's fault: a bad descriptor, a bad address, a place before a file's beginning."""
    number = getattr(errno, name)
    with pytest.raises(OSError, match=os.strerror(number)), atomic.disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="no number"), atomic.disk_errors(tmp_path):
        raise OSError("no number")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="of Linux")
def test_a_place_where_the_system_makes_no_folder() -> None:
    place = Path("/proc/limner")
    with pytest.raises(DiskError, match=f"{place}: No such file"), atomic.lock(place):
        pass


HOLDER = """
import sys; from pathlib import Path; from limner.storage import atomic
with atomic.lock(Path(sys.argv[1])):
    print("held", flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir"])
def test_a_sweep_that_the_disk_refuses_is_said_in_words(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dead run has left: a folder set aside with and without its successor, a file."""
    made(tmp_path / "final", "new")
    made(atomic.name_temporary(tmp_path / "final", "old"), "old")
    made(atomic.name_temporary(tmp_path / "other", "old"), "other")
    atomic.name_temporary(tmp_path / "metrics.jsonl", "tmp").touch()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(DiskError, match=f"{tmp_path}: {os.strerror(number)}"):
            atomic.sweep(tmp_path)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["final", "other"]


def test_a_new_folder_is_synced_into_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut takes the run away with its checkpoints."""
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "sync", synced.append)
    with atomic.lock(tmp_path / "runs" / "mine" / "first"):
        assert synced == [tmp_path, tmp_path / "runs", tmp_path / "runs" / "mine"]
    synced.clear()
    atomic.make_folder(tmp_path / "runs" / "mine" / "second")
    assert synced == [tmp_path / "runs" / "mine"]
    synced.clear()
    atomic.make_folder(tmp_path / "runs" / "mine" / "second")
    assert synced == []


def test_what_holds_a_lock_is_gone_with_it(tmp_path: Path) -> None:
    with atomic.lock(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock-holder").read_text()
    assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_two_names_are_exchanged_in_one_step(kind: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        if kind == "file":
            path.write_text(path.name)
        else:
            made(path, path.name)
    if atomic.exchange(one, other):
        left = [(p if kind == "file" else p / "a.txt").read_text() for p in (one, other)]
        assert left == ["other", "one"]
    assert not atomic.exchange(one, tmp_path / "nothing") and one.exists()


@contextlib.contextmanager
def holder(root: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """The second is refused at once, naming the first; a SIGKILL of the first frees the lock."""
    root = tmp_path / "run"
    with holder(root) as process:
        with (
            pytest.raises(
                LockedError,
                match=f"{root}: another run is writing here \\(process {process.pid} on ",
            ),
            atomic.lock(root),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with (
            atomic.lock(root),
            pytest.raises(LockedError, match=f"process {os.getpid()} on "),
            atomic.lock(root),
        ):
            pass
    with atomic.lock(root):
        pass


@pytest.mark.parametrize("call", ["ftruncate", "write", "open"])
def test_a_full_disk_at_the_lock_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskError, match="No space left"), atomic.lock(tmp_path):
        pass
    monkeypatch.undo()
    with atomic.lock(tmp_path):
        pass


def test_digest_json_looks_at_values_not_at_order() -> None:
    assert (
        atomic.digest_json({"a": 1, "b": [1, 2]})
        == atomic.digest_json({"b": (1, 2), "a": 1})
        != atomic.digest_json({"a": 1, "b": [2, 1]})
    )


def test_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "x"))
    assert atomic.user_cache_folder() == tmp_path / "x"
    monkeypatch.delenv("LIMNER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert atomic.user_cache_folder() == tmp_path / "limner"


def test_a_device_stays_one_and_a_link_leads_where_it_led(tmp_path: Path) -> None:
    pipe, file, link = (tmp_path / name for name in ("pipe", "file", "link"))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(pipe, "one")
    assert os.read(reader, 9) == b"one" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    file.write_text("old")
    link.symlink_to(file)
    atomic.write_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and not file.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]
