"""Shards are whole or absent, verified, safe for several writers; whatever is damaged is named,
left out and encoded again."""

import errno
import os
import resource
import threading
import time
from pathlib import Path

import moments
import numpy as np
import pytest

from limner.errors import DiskError, IntegrityError
from limner.features.store import DAY, DiskStore, MemoryStore, name_shard
from limner.storage import atomic, safetensors


def rows(keys: list[str]) -> dict[str, np.ndarray]:
    """Two arrays whose rows are functions of their keys."""
    numbers = np.array([int(key.split()[-1]) for key in keys], np.float32)
    return {
        "mean": numbers[:, None, None] + np.arange(6, dtype=np.float32).reshape(2, 3),
        "mask": numbers.astype(np.int64),
    }


def keys(*numbers: int) -> list[str]:
    return [f"a grün caption {n}" for n in numbers]


def filled(folder: Path, *parts: tuple[int, ...]) -> DiskStore:
    store = DiskStore(folder, lambda text: pytest.fail(text))
    for part in parts:
        store.put(keys(*part), rows(keys(*part)))
    return store


def assert_holds(store: DiskStore, *numbers: int) -> None:
    found = store.get(keys(*numbers))
    for name, array in rows(keys(*numbers)).items():
        assert (
            found[name].dtype == array.dtype
            and found[name].shape == array.shape
            and found[name].tobytes() == array.tobytes()
        )


def test_rows_come_back_in_the_order_asked(tmp_path: Path) -> None:
    store = filled(tmp_path / "caption-1", (0, 1, 2), (3, 4))
    assert_holds(store, 4, 0, 3, 0)
    again = DiskStore(tmp_path / "caption-1")
    assert_holds(again, 2, 4, 1)
    assert keys(4)[0] in again and keys(5)[0] not in again


def test_get_gives_what_may_be_changed(tmp_path: Path) -> None:
    store = filled(tmp_path / "c", (0, 1))
    store.get(keys(0, 1))["mean"] += 1
    assert_holds(store, 0, 1)


def test_every_flipped_bit_is_found_and_the_rows_encoded_again(tmp_path: Path) -> None:
    """All bits of a shard: length, header (where a flip may turn the keys, a shape or an offset
    into others) and data."""
    folder = tmp_path / "caption-1"
    filled(folder, (0, 1), (2,))
    path = next(p for p in folder.iterdir() if p.name == name_shard(keys(0, 1)))
    whole = path.read_bytes()
    header = whole.index(b"}", whole.rindex(b"data_offsets")) + 2
    harmless = 0
    for bit in range(len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        told: list[str] = []
        store = DiskStore(folder, told.append)
        if not store.missing(keys(0, 1)):
            assert_holds(store, 0, 1)  # e.g. in the name of an entry that is not used
            harmless += 1
        else:
            assert (
                len(told) == 1
                and str(path) in told[0]
                and "its captions are encoded again" in told[0]
                and not path.exists()
            )
        assert_holds(store, 2)
    assert harmless < 8 * header / 10 and header < len(whole) - 40
    path.write_bytes(whole)
    assert_holds(DiskStore(folder), 0, 1, 2)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    folder = tmp_path / "picture-1"
    filled(folder, (0, 1, 2))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:100], whole[:-1], b"\0" * len(whole)):
        path.write_bytes(damaged)
        told: list[str] = []
        assert keys(0)[0] not in DiskStore(folder, told.append)
        assert "its pictures are encoded again" in told[0]
    told.clear()
    path.write_bytes(whole.replace(b'"version": "2"', b'"version": "1"'))
    assert (
        keys(0)[0] not in DiskStore(folder, told.append)
        and "another version of Limner wrote it, 1 and not 2" in told[0]
    )
    path.write_bytes(whole)
    path.rename(path.with_name("renamed.safetensors"))
    assert keys(0)[0] not in DiskStore(folder, told.append)


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_is_no_file_is_no_shard(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "picture-1"
    filled(folder, (0, 1))
    path = folder / name_shard(keys(2, 3))
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    told: list[str] = []
    store = DiskStore(folder, told.append)
    assert told == [
        f"{path}: this part of the cache is damaged (it is no regular file); its pictures are "
        "encoded again"
    ]
    assert store.missing(keys(0, 1, 2, 3)) == keys(2, 3)
    store.put(keys(2, 3), rows(keys(2, 3)))
    assert_holds(DiskStore(folder, lambda text: pytest.fail(text)), 0, 1, 2, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digests": '["a"]'}, "its keys and digests are no texts"),
        ({"digests": "[1, null]"}, "its keys and digests are no texts"),
        ({"digests": "7"}, "its keys and digests are no texts"),
        ({"keys": "7"}, "its keys and digests are no texts"),
        ({"keys": "[1, 2]"}, "its keys and digests are no texts"),
        ({"keys": '{"a": 0, "b": 1}'}, "its keys and digests are no texts"),
        ({"keys": '["a", "b"]'}, "its keys are not those that were written"),
        ({"digests": "[" * 100_000}, "nested too deep"),
        (None, "it has no arrays"),
    ],
)
def test_a_shard_with_the_right_digest_and_wrong_values(
    tmp_path: Path, change: dict[str, str] | None, words: str
) -> None:
    folder = tmp_path / "caption-1"
    filled(folder, (0, 1))
    (path,) = folder.iterdir()
    arrays, metadata = safetensors.read_arrays(path)
    metadata = {name: metadata[name] for name in ("version", "keys", "digests")} | (change or {})
    metadata["digest"] = atomic.digest_json(metadata)
    whole = {name: array.copy() for name, array in arrays.items()} if change else {}
    safetensors.write_arrays(path, whole, metadata)
    told: list[str] = []
    store = DiskStore(folder, told.append)
    assert len(told) == 1 and f"is damaged ({words})" in told[0]
    assert store.missing(keys(0, 1)) == keys(0, 1)


def test_rows_of_other_arrays_are_one_message(tmp_path: Path) -> None:
    """Whole, and of another shape, or under another name, than those beside them."""
    for other in (
        {"mean": np.zeros((1, 5), np.float32), "mask": np.zeros(1, np.int64)},
        {"latents": np.zeros((1, 2, 3), np.float32), "mask": np.zeros(1, np.int64)},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        store = filled(folder, (0, 1))
        store.put(keys(2), other)
        assert_holds(store, 0, 1)
        for order in ((0, 2), (2, 0)):
            with pytest.raises(IntegrityError) as caught:
                store.get(keys(*order))
            assert f"{folder}: another program has written rows of other arrays" in str(
                caught.value
            )
            assert "Remove this folder and run the same command again" in str(caught.value)


def test_a_damaged_shard_is_replaced_by_the_next_put(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    filled(folder, (0, 1))
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    told: list[str] = []
    store = DiskStore(folder, told.append)
    store.put(keys(0, 1), rows(keys(0, 1)))
    assert_holds(store, 1, 0)
    assert_holds(DiskStore(folder, lambda text: pytest.fail(text)), 0, 1)
    assert len(told) == 1


def test_a_damaged_shard_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only cache: the damage is told once, the other rows serve, and there is no
    traceback."""
    folder = tmp_path / "c"
    filled(folder, (0, 1), (2,))
    path = folder / name_shard(keys(0, 1))
    path.write_bytes(path.read_bytes()[:-5])

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    told: list[str] = []
    store = DiskStore(folder, told.append)
    store.refresh()
    store.refresh()
    assert len(told) == 1 and str(path) in told[0] and path.exists()
    assert_holds(store, 2)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, number: int) -> None:
    """At any call: the fault names the folder, nothing half-written is left in it, and what it
    holds still serves."""
    folder = tmp_path / "c"
    filled(folder, (0, 1))
    store = DiskStore(
        folder, lambda text: None
    )  # what was just written and then cannot be read is told, and encoded again when it is needed
    faults = 0
    for n in range(1, 100):
        with moments.failing(n, number) as count:
            try:
                store.put(keys(7), rows(keys(7)))
            except DiskError as fault:
                faults += 1
                assert str(folder) in str(fault) and os.strerror(number) in str(fault)
        assert_holds(store, 0, 1)
        assert not list(folder.glob(".*"))
        if count[0] < n:
            break
    assert faults > 2 and keys(7)[0] in store
    with moments.failing(1, number), pytest.raises(DiskError, match=str(tmp_path / "new")):
        DiskStore(tmp_path / "new" / "deep")


def test_a_cache_that_may_not_be_written_says_so_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, (0,))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        DiskError,
        match=f"{tmp_path}: it cannot be written, and does not hold all that is needed. Set "
        "data.cache to another",
    ):
        store.check_room(1)
    assert_holds(store, 0)


def test_two_stores_write_at_once(tmp_path: Path) -> None:
    """Different rows and the same rows, from two threads with a store each; both see all of it
    after a refresh."""
    stores = [DiskStore(tmp_path / "c", lambda text: pytest.fail(text)) for _ in range(2)]
    start = threading.Barrier(2)

    def write(which: int) -> None:
        start.wait()
        for i in range(20):
            part = keys(i, i + 100) if i % 2 else keys(1000 * which + i)
            stores[which].put(part, rows(part))

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in (*stores, DiskStore(tmp_path / "c", lambda text: pytest.fail(text))):
        store.refresh()
        assert_holds(store, 0, 1000, 1, 101, 19, 119, 1018)
    assert len(list((tmp_path / "c").iterdir())) == 30


def test_death_at_every_call_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    filled(folder, (0, 1))
    for n in range(1, 100):
        died = moments.dies_at(n, lambda: DiskStore(folder).put(keys(5), rows(keys(5))))
        store = DiskStore(folder, lambda text: pytest.fail(text))
        assert_holds(store, 0, 1)
        if keys(5)[0] in store:
            assert_holds(store, 5)
        if not died:
            break
    assert n > 3 and keys(5)[0] in store
    assert moments.dies_writing(50, lambda: DiskStore(folder).put(keys(6), rows(keys(6))))
    assert keys(6)[0] not in DiskStore(folder, lambda text: pytest.fail(text))


def test_leavings_of_the_dead_go_after_a_day(tmp_path: Path) -> None:
    filled(tmp_path, (0,))
    old, new = (atomic.name_temporary(tmp_path / name, "tmp") for name in "xy")
    foreign = tmp_path / ".draft.tmp"
    for path in (old, new, foreign):
        path.write_text("")
    for path in (old, foreign):
        os.utime(path, (time.time() - 2 * DAY,) * 2)
    assert_holds(DiskStore(tmp_path), 0)
    assert new.exists() and foreign.exists() and not old.exists()


def test_no_file_stays_open(tmp_path: Path) -> None:
    """A large data set has more shards than a process may have open files: none of them may count
    as damaged."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled(tmp_path, *((i,) for i in range(80)))
    used = (
        max(int(fd) for fd in os.listdir("/proc/self/fd"))
        if os.path.isdir("/proc/self/fd")
        else 200
    )
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
        store = DiskStore(tmp_path, lambda text: pytest.fail(text))
        assert_holds(store, *range(80))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_row_that_changes_during_the_run_is_found_when_it_is_read(tmp_path: Path) -> None:
    store = filled(tmp_path, (0, 1))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 4  # of the second row
    path.write_bytes(content)
    assert_holds(store, 0)
    with pytest.raises(
        IntegrityError,
        match=f"{path}: this part of the cache has been removed or changed during the run .a "
        "row's digest differs.. Run",
    ):
        store.get(keys(0, 1))
    assert not path.exists()  # so that the next run encodes it


def test_rows_that_are_not_asked_for_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, (0, 1), (2, 3))
    read = []
    monkeypatch.setattr(
        DiskStore,
        "read",
        lambda self, key, whole=DiskStore.read: [read.append(key), whole(self, key)][1],
    )
    store = DiskStore(tmp_path)
    assert read == [] and store.missing(keys(1, 7)) == keys(7) and read == keys(1)


def test_rows_in_memory() -> None:
    store = MemoryStore()
    store.put(keys(0, 1), rows(keys(0, 1)))
    store.put(keys(5), rows(keys(5)))
    found = store.get(keys(5, 0))
    assert all(found[name].tobytes() == array.tobytes() for name, array in rows(keys(5, 0)).items())
    assert store.missing(keys(1, 2)) == keys(2) and keys(1)[0] in store


def test_a_shard_that_vanishes_during_the_run(tmp_path: Path) -> None:
    store = filled(tmp_path, (0,))
    (path,) = tmp_path.iterdir()
    path.unlink()
    with pytest.raises(
        IntegrityError,
        match=f"{path}: this part of the cache has been removed or changed during the run",
    ):
        store.get(keys(0))
