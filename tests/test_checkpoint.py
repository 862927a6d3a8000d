"""A checkpoint is whole or absent at every moment, every damage is found and named, and the last
good one is never removed."""

import errno
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import moments
import numpy as np
import pytest

from limner.errors import DiskError, InputError, IntegrityError
from limner.storage import atomic, checkpoint


def arrays(step: int) -> dict[str, np.ndarray]:
    """One of each dtype and kind of shape that a state has."""
    draws = np.random.default_rng(step)
    made = {
        "weight": draws.standard_normal((40, 30), np.float32),
        "half": draws.standard_normal(7).astype(np.float16),
        "count": np.array(step, np.int64),
    }
    made |= {
        "turned": draws.standard_normal((5, 3), np.float32).T,
        "none": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False, True]),
        "exact": np.array(0.1),
    }
    return made | {"bytes": np.arange(5, dtype=np.uint8), "few": np.array([step], np.int32)}


def save(root: Path, step: int, **settings: Any) -> Path:
    files = (
        (name, arrays(step + i), {"which": name})
        for i, name in enumerate(["unet/weights.safetensors", "optimizer.safetensors"])
    )
    return checkpoint.save(root, step, files, {"seed": 5, "step_of": step}, **settings)


def steps(root: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(root)]


def damage(path: Path) -> None:
    file = path / "optimizer.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)


def is_good(path: Path) -> bool:
    try:
        checkpoint.open_checkpoint(path)
    except IntegrityError:
        return False
    return True


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert (array.shape, array.dtype) == (
            theirs[name].shape,
            theirs[name].dtype,
        ) and array.tobytes() == theirs[name].tobytes(), name


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    found = checkpoint.open_checkpoint(
        save(
            tmp_path,
            12,
            finish=lambda path: (path / "unet" / "config.json").write_text("{}") and None,
        )
    )
    assert (found.step, found.plain_state, found.folder) == (
        12,
        {"step": 12, "seed": 5, "step_of": 12},
        tmp_path / "checkpoint-12",
    )
    same(arrays(12), dict(found.arrays("unet/weights.safetensors")))
    same(arrays(13), dict(found.arrays("optimizer.safetensors")))
    assert "unet/config.json" in json.loads((found.folder / "MANIFEST.json").read_text())["files"]
    assert checkpoint.open_verified(found.folder) == found


def test_files_are_stock_safetensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = save(tmp_path, 3) / "unet" / "weights.safetensors"
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "which": "unet/weights.safetensors"}
        same(arrays(3), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping


def test_there_is_no_pickle(tmp_path: Path) -> None:
    """Only safetensors and JSON; the bytes of neither begin like a pickle or a zip, and no reader
    of these modules can unpickle."""
    for path in (p for p in save(tmp_path, 1).rglob("*") if p.is_file()):
        assert path.suffix in (".safetensors", ".json")
        assert path.read_bytes()[:2] not in (
            b"\x80\x02",
            b"\x80\x03",
            b"\x80\x04",
            b"\x80\x05",
            b"PK",
        )
    source = Path(checkpoint.__file__).read_text() + Path(atomic.__file__).read_text()
    assert "import pickle" not in source and "import torch" not in source


def test_listed_knows_its_own(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    for name in (
        "checkpoint-best",
        "checkpoint-7x",
        "checkpoint-",
        "my-checkpoint-3",
        "checkpoint-1-old",
        ".checkpoint-20.1.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-50").write_text("a file")
    assert steps(tmp_path) == [100, 10, 5]
    assert checkpoint.list_checkpoints(tmp_path / "none") == []
    save(tmp_path, 110, keep=1)
    assert steps(tmp_path) == [110] and (tmp_path / "checkpoint-best").is_dir()


def test_an_exception_in_the_middle_leaves_the_previous(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def files() -> Any:
        yield "a.safetensors", arrays(0), {}
        raise RuntimeError("the engine failed")

    with pytest.raises(RuntimeError, match="the engine failed"):
        checkpoint.save(tmp_path, 2, files(), {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"] and is_good(
        tmp_path / "checkpoint-1"
    )


def test_keep_removes_the_oldest(tmp_path: Path) -> None:
    kept = [(save(tmp_path, step, keep=2), steps(tmp_path))[1] for step in (1, 2, 3, 10)]
    assert kept == [[1], [2, 1], [3, 2], [10, 3]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-3"]


def test_keep_does_not_count_on_damaged_newer_ones(tmp_path: Path) -> None:
    """Gone on from 10 because 20 and 30 are damaged: the new 15 must not fall to "keep the newest
    one", nor must it leave 30 alone as the last."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-20")
    damage(tmp_path / "checkpoint-30")
    found = checkpoint.find_latest(tmp_path, lambda text: None)
    assert found is not None and found.step == 10
    save(tmp_path, 15, keep=1)
    found = checkpoint.find_latest(tmp_path, lambda text: None)
    assert found is not None and found.step == 15
    save(tmp_path, 20, keep=1)
    save(tmp_path, 30, keep=1)
    assert steps(tmp_path) == [30] and is_good(tmp_path / "checkpoint-30")


def test_keep_removes_nothing_when_the_new_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that writes other bits than it was given: found by reading back, before an older
    checkpoint is touched."""
    save(tmp_path, 1, keep=1)
    real = atomic.seal

    def lying(path: Path) -> None:
        real(path)
        damage(path)

    monkeypatch.setattr(atomic, "seal", lying)
    with pytest.raises(IntegrityError, match=r"checkpoint-2/optimizer\.safetensors: changed"):
        save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2, 1] and is_good(tmp_path / "checkpoint-1")


def test_every_damage_is_found_named_and_passed_over(tmp_path: Path) -> None:
    """A bit in many places of each file, cuts, and missing files: ``latest`` falls back to the
    earlier one and says why."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    told: list[str] = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        places = np.linspace(0, len(whole) * 8 - 1, 60).astype(int)
        flipped = [
            whole[: b // 8] + bytes([whole[b // 8] ^ 1 << b % 8]) + whole[b // 8 + 1 :]
            for b in places
        ]
        for damaged in [*flipped, b"", whole[:-1], whole[: len(whole) // 2], None]:
            file.write_bytes(damaged) if damaged is not None else file.unlink()
            told.clear()
            found = checkpoint.find_latest(tmp_path, told.append)
            assert found is not None and found.step == 1
            assert (
                len(told) == 1
                and told[0].startswith("checkpoint-2 is not usable and is passed over: ")
                and str(file) in told[0]
            )
        file.write_bytes(whole)
    found = checkpoint.find_latest(tmp_path, told.append)
    assert found is not None and found.step == 2


def test_when_none_is_good_there_is_none(tmp_path: Path) -> None:
    damage(save(tmp_path, 1))
    (tmp_path / "checkpoint-9").mkdir()
    told: list[str] = []
    assert checkpoint.find_latest(tmp_path, told.append) is None
    assert [text.split()[0] for text in told] == ["checkpoint-9", "checkpoint-1"]
    assert (
        checkpoint.find_checkpoint(tmp_path, "latest", told.append) is None
        and checkpoint.find_latest(tmp_path / "none") is None
    )


def test_find_takes_what_a_user_writes(tmp_path: Path) -> None:
    root, other = tmp_path / "run", tmp_path / "other"
    save(root, 5)
    save(root, 50)
    save(other, 7)
    assert [
        getattr(checkpoint.find_checkpoint(root, which), "step", None)
        for which in ("latest", "checkpoint-5", "checkpoint-5/", str(other / "checkpoint-7"))
    ] == [
        50,
        5,
        5,
        7,
    ]
    for which in ("checkpoint-6", str(other / "checkpoint-8"), "lastest"):
        with pytest.raises(
            InputError,
            match=f"{which}: no such checkpoint. In {root} there are: checkpoint-50, checkpoint-5. "
            "Pass one of these",
        ):
            checkpoint.find_checkpoint(root, which)
    damage(root / "checkpoint-5")
    with pytest.raises(
        IntegrityError, match=r"checkpoint-5/optimizer\.safetensors: changed since it was written"
    ):
        checkpoint.find_checkpoint(root, "checkpoint-5")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_call_leaves_a_good_one(tmp_path: Path, number: int) -> None:
    """The n-th call fails, for n = 1, 2, ... until none does; keep=1 leaves no room for
    mistakes."""
    faults = 0
    for n in itertools.count(1):
        root = tmp_path / str(n)
        save(root, 1)
        with moments.failing(n, number) as count:
            try:
                save(root, 2, keep=1)
            except DiskError as fault:
                faults += 1
                assert str(root) in str(fault) and os.strerror(number) in str(fault)
            except IntegrityError as fault:
                assert str(root) in str(fault)  # it could not be read back
        atomic.sweep(root)
        found = checkpoint.find_latest(root, lambda text: pytest.fail(text))
        assert found is not None
        same(arrays(found.step), dict(found.arrays("unet/weights.safetensors")))
        if count[0] < n:
            break
    assert faults > 10 and steps(root) == [2]


def test_death_at_any_call_leaves_a_good_one(tmp_path: Path) -> None:
    """Both for a new step and for a step that is written again, with keep=1."""
    for again in (False, True):
        for n in itertools.count(1 + again, 2):
            save(tmp_path, 1)
            if again:
                save(tmp_path, 2)
            died = moments.dies_at(n, lambda: save(tmp_path, 2, keep=1))
            atomic.sweep(tmp_path)
            found = checkpoint.find_latest(tmp_path, lambda text: pytest.fail(text))
            assert found is not None and found.step in ((2,) if again else (1, 2))
            assert not list(tmp_path.glob(".*"))
            if not died:
                break
        assert n > 20 and steps(tmp_path) == [2]
        atomic.remove_folder(tmp_path / "checkpoint-2")


def test_death_inside_a_file_leaves_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    sizes = [0, 7, 100, 1500, 5000]
    assert [moments.dies_writing(size, lambda: save(tmp_path, 2, keep=1)) for size in sizes] == [
        True
    ] * len(sizes)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-1"] and len(
        list(tmp_path.glob(".*.tmp"))
    ) == len(sizes)
    atomic.sweep(tmp_path)
    assert is_good(tmp_path / "checkpoint-1") and sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1"
    ]


def test_a_disk_that_is_full_inside_a_file_is_named(tmp_path: Path) -> None:
    """The system's own refusal in the middle of the arrays: which file, how much is needed, and
    that nothing is lost."""
    save(tmp_path, 1)
    heard, say = os.pipe()

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            save(tmp_path, 2, keep=1)
        except DiskError as fault:
            os.write(say, str(fault).encode())

    assert moments.in_child(limited) == 0
    os.close(say)
    message = os.read(heard, 10_000).decode()
    os.close(heard)
    assert (
        "checkpoint-2" in message
        and "unet/weights.safetensors: File too large; 0 MiB are needed" in message
        and "whole still" in message
    )
    assert is_good(tmp_path / "checkpoint-1") and sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1"
    ]
