"""The names of a run's files, and its status, which never says that a dead run is alive."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from limner.storage import atomic, run_folder
from limner.storage.run_folder import RunFolder, RunStatus, read_status, write_status


def start_process() -> subprocess.Popen:
    """A process that runs until its input ends."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_files_lie_where_users_look(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = {
        "config": "config.json",
        "status": "status.json",
        "metrics": "metrics.jsonl",
        "skipped": "skipped.jsonl",
        "previews": "previews",
        "result": "result.json",
        "card": "README.md",
        "grid": "preview.png",
        "pushed": "pushed.json",
        "lock": ".lock",
    }
    assert {name: getattr(folder, name) for name in names} == {
        name: tmp_path / file for name, file in names.items()
    }
    assert folder.checkpoint(500) == tmp_path / "checkpoint-500"
    assert folder.logs("trackers") == tmp_path / "trackers"
    with atomic.lock(tmp_path):
        assert folder.lock.is_file()


def test_previews_are_listed_by_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.list_previews() == []
    shown = [folder.previews_of_step(20), folder.previews_of_step(500, "test")]
    for path in reversed(shown):
        path.mkdir(parents=True)
    assert [path.name for path in shown] == ["step-000020", "step-000500-test"]
    assert folder.list_previews() == shown


def test_a_status_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(run_folder, "utc_now", lambda: "2026-01-02T03:04:05+00:00")
    status = RunStatus("running", step=3, steps=10, began="2026-01-01T00:00:00+00:00")
    assert (status.process_id, status.host) == (os.getpid(), socket.gethostname())
    write_status(folder, replace(status, images_per_second=2.5))
    assert read_status(folder) == replace(
        status, images_per_second=2.5, updated="2026-01-02T03:04:05+00:00"
    )
    failed = replace(status, state="failed", error="the disk is full", process_id=1 << 22)
    write_status(folder, failed)
    assert read_status(folder) == replace(failed, updated="2026-01-02T03:04:05+00:00")


def test_times_are_utc() -> None:
    assert len(run_folder.utc_now()) == 25 and run_folder.utc_now().endswith("+00:00")


def test_a_run_whose_process_is_gone_has_died(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with start_process() as process:
        start = run_folder.read_start_ticks(process.pid)
        status = RunStatus("running", 3, 10, process_id=process.pid, process_start=start)
        write_status(folder, status)
        alive = read_status(folder)
        process.kill()
        process.wait()
        dead = read_status(folder)
    assert alive is not None and alive.state == "running"
    assert dead is not None and dead == replace(alive, state="died")
    elsewhere = replace(status, host=f"not-{socket.gethostname()}")
    write_status(folder, elsewhere)
    assert getattr(read_status(folder), "state", None) == "running"
    for state in ("stopped", "failed", "finished"):
        write_status(folder, replace(status, state=state))
        assert getattr(read_status(folder), "state", None) == state


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_another_process_of_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    """As in a container that is started again, where the same number is given each time."""
    folder = RunFolder(tmp_path)
    status = RunStatus("running", 3, 10)
    assert status.process_start is not None
    write_status(folder, replace(status, process_start=status.process_start - 1))
    assert getattr(read_status(folder), "state", None) == "died"
    write_status(folder, replace(status, process_start=None))
    assert getattr(read_status(folder), "state", None) == "running"


def test_the_start_of_a_process_is_read_whatever_its_name(tmp_path: Path) -> None:
    """The name of a command may hold spaces and parentheses."""
    if run_folder.read_start_ticks(os.getpid()) is None:
        pytest.skip("there is no /proc")
    command = tmp_path / "a ) (b"
    command.symlink_to("/bin/cat")
    with subprocess.Popen([command], stdin=subprocess.PIPE) as process:
        ticks = run_folder.read_start_ticks(process.pid)
    own = run_folder.read_start_ticks(os.getpid())
    assert ticks is not None and own is not None and ticks >= own
    assert run_folder.read_start_ticks(1 << 22) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "5",
        '"running"',
        '{"state": "running"}',
        "\xff",
    ],
)
def test_a_damaged_status_is_none(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    assert read_status(folder) is None
    folder.status.write_bytes(text.encode("latin-1"))
    assert read_status(folder) is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "flying"},
        {"step": "3"},
        {"step": None},
        {"process_id": 0},
        {"process_id": -1},
        {"images_per_second": "fast"},
        {"unknown": 1},
    ],
)
def test_a_status_of_another_kind_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    folder = RunFolder(tmp_path)
    status = asdict(RunStatus("running", 3, 10))
    folder.status.write_text(json.dumps(status))
    assert read_status(folder) is not None
    folder.status.write_text(json.dumps(status | change))
    assert read_status(folder) is None


def test_numbers_that_no_process_has(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for number in (1 << 31, 1 << 70):
        write_status(folder, RunStatus("running", 3, 10, process_id=number))
        assert getattr(read_status(folder), "state", None) == "died"
