"""A process that dies, leaves or is stopped is named by the others, whatever they wait in, and all
end with a code of their own."""

import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import ranks
import worker

from limner.storage import checkpoint
from limner.storage.run_folder import RunFolder, read_status

pytestmark = pytest.mark.frameworks


@pytest.fixture(scope="module")
def ctx() -> ForkServerContext:
    return worker.context()


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, [f"{f}" for f in files]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("engine", "where", "victim"),
    [
        pytest.param("torch", "barrier", 1, marks=pytest.mark.soak),
        ("torch", "sum", 0),
        pytest.param("torch", "sleep", 1, marks=pytest.mark.soak),
        ("jax", "barrier", 0),
        pytest.param("jax", "barrier", 1, marks=pytest.mark.soak),
    ],
)
def test_a_dead_process_is_named(
    engine: str, where: str, victim: int, ctx: ForkServerContext, tmp_path: Path
) -> None:
    pair = ranks.start(ctx, tmp_path, engine, ranks.wait_in, where, victim)
    wait_for(tmp_path / "met-0", tmp_path / "met-1")
    dead, other = pair[victim], pair[1 - victim]
    worker.send_signal(dead, signal.SIGKILL)
    other.join(15)
    said = ranks.said(tmp_path, 1 - victim)
    assert other.exitcode == 3, said
    assert f"limner: process {victim} (process {dead.pid} on " in said and "has died" in said
    assert "Traceback" not in said and said.count("limner:") == 1


@pytest.mark.parametrize(
    ("engine", "rank"),
    [
        ("torch", "0"),
        pytest.param("torch", "1", marks=pytest.mark.soak),
        pytest.param("jax", "0", marks=pytest.mark.soak),
        ("jax", "1"),
    ],
)
def test_one_that_never_comes_is_not_waited_for_longer_than_patience(
    engine: str, rank: str, ctx: ForkServerContext, tmp_path: Path
) -> None:
    [process] = ranks.start(ctx, tmp_path, engine, ranks.meet_alone, ranks=(rank,))
    wait_for(tmp_path / f"met-{rank}")
    process.join(ranks.PATIENCE + 15)
    said = ranks.said(tmp_path, int(rank))
    assert process.exitcode == 3, said
    assert "limner: the 2 processes of this run have not met within 4 seconds" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("engine", "where", "victim"),
    [
        pytest.param("torch", "barrier", 0, marks=pytest.mark.soak),
        ("torch", "sum", 1),
        pytest.param("jax", "barrier", 1, marks=pytest.mark.soak),
    ],
)
def test_a_stopped_process_is_named_within_patience(
    engine: str, where: str, victim: int, ctx: ForkServerContext, tmp_path: Path
) -> None:
    pair = ranks.start(ctx, tmp_path, engine, ranks.wait_in, where, victim)
    wait_for(tmp_path / "met-0", tmp_path / "met-1")
    stopped, other = pair[victim], pair[1 - victim]
    worker.send_signal(stopped, signal.SIGSTOP)
    try:
        other.join(ranks.PATIENCE + 10)
        said = ranks.said(tmp_path, 1 - victim)
        assert other.exitcode == 3, said
        assert f"limner: process {victim} (process {stopped.pid} on " in said
        assert "has not answered for 4 seconds (engine.patience)" in said
    finally:
        worker.send_signal(stopped, signal.SIGCONT)
    stopped.join(20)
    assert stopped.exitcode == 3, "once it goes on, it finds that the others have left"
    assert "Traceback" not in said + ranks.said(tmp_path, victim)


@pytest.mark.parametrize("engine", ["torch", pytest.param("jax", marks=pytest.mark.soak)])
def test_a_process_that_goes_on_within_patience_costs_nothing(
    engine: str, ctx: ForkServerContext, tmp_path: Path
) -> None:
    pair = ranks.start(ctx, tmp_path, engine, ranks.pass_barriers, 40)
    wait_for(tmp_path / "met-0", tmp_path / "met-1")
    worker.send_signal(pair[1], signal.SIGSTOP)
    pair[0].join(ranks.PATIENCE / 2)
    assert pair[0].exitcode is None, "it waits"
    worker.send_signal(pair[1], signal.SIGCONT)
    for rank, process in enumerate(pair):
        process.join(20)
        assert (process.exitcode, ranks.said(tmp_path, rank)) == (0, "")


@pytest.mark.parametrize(
    ("engine", "where", "told"),
    [
        ("torch", "barrier", 1),
        pytest.param("torch", "barrier", 0, marks=pytest.mark.soak),
        pytest.param("jax", "sleep", 1, marks=pytest.mark.soak),
    ],
)
def test_a_signal_to_one_process_before_training_ends_all(
    engine: str, where: str, told: int, ctx: ForkServerContext, tmp_path: Path
) -> None:
    """Whether it reaches the one that sleeps or the one that waits for it in a call of C++."""
    pair = ranks.start(ctx, tmp_path, engine, ranks.wait_in, where, 1)
    wait_for(tmp_path / "met-0", tmp_path / "met-1")
    began = time.monotonic()
    worker.send_signal(pair[told], signal.SIGTERM)
    for process in pair:
        process.join(25)
    said = [ranks.said(tmp_path, rank) for rank in (0, 1)]
    assert [process.exitcode for process in pair] == [3, 3], said
    assert time.monotonic() - began < 20
    assert all("stopped" in text and "Traceback" not in text for text in said), said


@pytest.mark.parametrize(
    ("engine", "who"),
    [("torch", 1), ("jax", 0), pytest.param("jax", 1, marks=pytest.mark.soak)],
)
def test_an_error_of_one_process_alone_ends_all_with_its_code(
    engine: str, who: int, ctx: ForkServerContext, tmp_path: Path
) -> None:
    """JAX ends a process with SIGABRT that it finds alone, unless that has ended before."""
    pair = ranks.start(ctx, tmp_path, engine, ranks.fail_alone, who)
    for process in pair:
        process.join(30)
    said = [ranks.said(tmp_path, rank) for rank in (0, 1)]
    assert [process.exitcode for process in pair] == [5, 5], said
    assert said[who] == "limner: disk: full\n"
    other = said[1 - who]
    assert f"process {who} (process" in other and "has left the run: disk: full" in other


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_signal_before_the_devices_are_there_ends_all(
    victim: int, ctx: ForkServerContext, tmp_path: Path
) -> None:
    began = time.monotonic()
    pair = ranks.start(ctx, tmp_path, "jax", ranks.stop_while_devices_are_sought, victim)
    for process in pair:
        process.join(30)
    said = [ranks.said(tmp_path, rank) for rank in (0, 1)]
    assert [process.exitcode for process in pair] == [3, 3], said
    assert time.monotonic() - began < 20
    assert said[victim].startswith("limner: stopped before training began")
    assert "has left the run: stopped before training began" in said[1 - victim]
    assert not any("Traceback" in text for text in said)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_ends_when_a_process_dies_and_goes_on_afterwards(
    victim: int, ctx: ForkServerContext, base: Path, pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32, "threads": 1},
        "train": {"steps": 5000, "batch_size": 2, "seed": 1},
        "checkpoint": {"every": 2, "keep": 1},
        "engine": {"device": "cpu", "patience": 5.0},
    }
    pair = ranks.start(ctx, tmp_path, "torch", ranks.train, raw)
    wait_for(run / "checkpoint-2" / "MANIFEST.json")
    worker.send_signal(pair[victim], signal.SIGKILL)
    other = pair[1 - victim]
    other.join(30)
    said = ranks.said(tmp_path, 1 - victim)
    assert other.exitcode == 3, said
    assert f"limner: process {victim} (process {pair[victim].pid} on " in said
    assert said.count("\n") == 1 and "Traceback" not in said
    status = read_status(RunFolder(run))
    assert status is not None and status.state == ("died" if victim == 0 else "failed")
    newest = checkpoint.find_latest(run)
    assert newest is not None and newest.step >= 2
