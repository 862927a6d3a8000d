"""One curve on any number of processes: the same losses, the same records, going on with more or
fewer of them, and one stop for all."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import worker

from limner.config import toml
from limner.config.schema import Config
from limner.engines.torch import processes
from limner.errors import InputError, Stopped
from limner.families.text import Text
from limner.storage import checkpoint
from limner.training import batch_plan, encode, loop, signals
from limner.training.signals import Stop

pytestmark = pytest.mark.frameworks

STEPS = 24
STOPPED_AT_LEAST = 3
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

# One process of a pair that a launcher starts.
WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import ranks
jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
sys.exit(ranks.train_all(out, "torch", jobs))
"""


def settings(base: Path, pictures: Path, run: Path, *overrides: str) -> dict[str, Any]:
    given = [
        "train.seed=3",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        f"train.steps={STEPS}",
        "log.every=1",
        "checkpoint.every=100",
        "optim.learning_rate=1e-3",
        "data.size=32",
    ]
    given += [
        "data.flip=true",
        "data.crop=random",
        "data.crop_variants=2",
        "data.threads=1",
        "engine.device=cpu",
        "validation.hold_out=2",
        "validation.every=12",
        "validation.timesteps=2",
    ]
    return toml.apply_overrides(
        {"run": str(run), "model": {"base": str(base)}, "data": {"folder": str(pictures)}},
        [*given, *overrides],
    )


def alone(raw: dict[str, Any]) -> Path:
    return loop.run_training(toml.build(Config, raw), report=lambda line: None)


def environment() -> dict[str, str]:
    places = Path(processes.__file__).parents[3], Path(__file__).parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}


def begin_pair(folder: Path, jobs: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """Start two processes that do all the jobs; what they say at the end lies in ``folder``."""
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    log = open(folder / "log.txt", "w")  # noqa: SIM115
    command = [*LAUNCH, str(folder / "worker.py"), str(folder / "jobs.json"), str(folder)]
    with log:
        return subprocess.Popen(
            command, env=environment(), stdout=log, stderr=subprocess.STDOUT, text=True
        )


def ends(folder: Path) -> list[list[Any]]:
    """How each job ended: class of the fault or "done", message, whether another process says it,
    exit code, lines told; for both processes."""
    return [json.loads((folder / f"ends-{rank}.json").read_text()) for rank in (0, 1)]


def curve(run: Path, name: str = "loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    found = checkpoint.open_checkpoint(run / f"checkpoint-{step}")
    files = sorted(p.relative_to(found.folder) for p in found.folder.rglob("*.safetensors"))
    return {
        f"{file}:{name}": array for file in files for name, array in found.arrays(str(file)).items()
    }


@dataclass
class Seen:
    """What was run: folders by name, the step at which the stopped run stopped, how all ended."""

    runs: Path
    stopped: int
    ends_of_stop: list[list[Any]]
    ends: list[list[Any]]


def wait_for_line(path: Path, line: int, process: subprocess.Popen[str], log: Path) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < line:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def seen(
    base: Path,
    sdxl: Path,
    sd3: Path,
    kandinsky: Path,
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Seen:
    """All the runs: one launch of two processes, two that begin warm, the rest in this one."""
    runs = tmp_path_factory.mktemp("runs")
    lora = ("adapter.kind=lora", "adapter.rank=2", "adapter.dropout=0.2")
    ema = ("optim.ema=0.9", "checkpoint.every=100")

    tiny.pictures(runs / "wide", 7, size=(40, 80))
    sets = f'data.sets=[{{folder="{pictures}"}}, {{folder="{runs / "wide"}", repeats=2}}]'
    buckets = (
        f"model.base={sdxl}",
        "model.family=sdxl",
        "data.folder=none",
        sets,
        "data.buckets={step=8}",
        "data.drop_caption=0.3",
        "optim.ema=0.9",
    )

    prior, decoder = (
        (
            f"model.base={kandinsky / one}",
            f"model.other_stage={kandinsky / other}",
            f"model.family=kandinsky22-{one}",
            "optim.ema=0.9",
            "objective.min_snr=5.0",
        )
        for one, other in (("prior", "decoder"), ("decoder", "prior"))
    )
    prior += (
        "data.crop=center",
        "data.crop_variants=none",
        "data.drop_caption=0.3",
        "adapter.kind=lora",
    )

    flow = (f"model.base={sd3}", "model.family=sd3", "data.drop_caption=0.3", "optim.ema=0.9")

    def job(name: str, *overrides: str) -> dict[str, Any]:
        return settings(base, pictures, runs / name, *overrides)

    first = begin_pair(runs / "first", [job("stopped", *ema, "train.steps=5000")])
    alone(job("changing", "train.steps=8"))
    wait_for_line(
        runs / "stopped" / "metrics.jsonl", STOPPED_AT_LEAST + 1, first, runs / "first" / "log.txt"
    )  # the first line is the held-out loss
    first.send_signal(signal.SIGTERM)  # torchrun passes it on
    assert first.wait(60) != 0
    [newest] = checkpoint.list_checkpoints(runs / "stopped")
    stopped = checkpoint.step_of(newest)
    again, total = runs / "again", f"train.steps={stopped + 3}"
    shutil.copytree(runs / "stopped", again)
    alone(job("full-1"))
    jobs = [
        job("full-2"),
        job("lora-2", *lora),
        job("changing", "train.steps=16"),
        job("again", *ema, total),
        job("uninterrupted", *ema, total),
    ]
    jobs += [job("buckets-2", *buckets), job("prior-2", *prior), job("decoder-2", *decoder)]
    jobs += [job("flow-2", *flow)]
    jobs += [
        job("full-1", "train.steps=30", "train.batch_size=3"),
        job("odd", "train.batch_size=3"),
        job("busy", "data.caption=txet"),
    ]
    (runs / "second").mkdir()
    second = ranks.start(worker.context(), runs / "second", "torch", ranks.train_all, jobs)
    alone(job("lora-1", *lora))
    alone(job("buckets-1", *buckets))
    alone(job("prior-1", *prior))
    alone(job("decoder-1", *decoder))
    alone(job("flow-1", *flow))
    for process in second:
        process.join(120)
    assert (runs / "second" / "ends-0.json").exists(), ranks.said(runs / "second", 0)
    alone(job("changing"))
    return Seen(runs, stopped, ends(runs / "first"), ends(runs / "second"))


@pytest.mark.parametrize("kind", ["full", "lora", "buckets", "prior", "decoder", "flow"])
def test_losses_agree(kind: str, seen: Seen) -> None:
    one, two = curve(seen.runs / f"{kind}-1"), curve(seen.runs / f"{kind}-2")
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert len(set(one.values())) == STEPS
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-6, abs=0)
    held = (
        curve(seen.runs / f"{kind}-1", "held_out_loss"),
        curve(seen.runs / f"{kind}-2", "held_out_loss"),
    )
    assert list(held[0]) == [0, 12, 24]
    assert list(held[1].values()) == pytest.approx(list(held[0].values()), rel=1e-6, abs=0)
    states = [
        json.loads((seen.runs / f"{kind}-{n}" / f"checkpoint-{STEPS}" / "state.json").read_text())
        for n in (1, 2)
    ]
    assert [s["world_size"] for s in states] == [1, 2] and [s["batch_size"] for s in states] == [
        4,
        4,
    ]


def test_a_run_goes_on_with_another_number_of_processes_and_back(seen: Seen) -> None:
    whole, changing = curve(seen.runs / "full-1"), curve(seen.runs / "changing")
    assert list(changing) == list(whole)
    assert list(changing.values()) == pytest.approx(list(whole.values()), rel=1e-6, abs=0)
    states = [
        json.loads((seen.runs / "changing" / f"checkpoint-{step}" / "state.json").read_text())
        for step in (8, 16, 24)
    ]
    assert [s["world_size"] for s in states] == [1, 2, 1]
    ours, theirs = arrays(seen.runs / "changing", STEPS), arrays(seen.runs / "full-1", STEPS)
    assert ours.keys() == theirs.keys()
    assert (
        max(
            float(np.abs(ours[name] - theirs[name]).max())
            for name in ours
            if name.startswith("unet/")
        )
        < 1e-5
    )


def test_a_stop_saves_and_ends_all_processes_with_its_code(seen: Seen) -> None:
    [[kind, text, told, code, _]], [[other_kind, other_text, other_told, other_code, _]] = (
        seen.ends_of_stop
    )
    assert (kind, other_kind, code, other_code) == ("Stopped", "Stopped", 3, 3)
    assert text == other_text and f"stopped at step {seen.stopped} of 5000" in text
    assert (told, other_told) == (False, True)
    assert seen.stopped >= STOPPED_AT_LEAST
    assert list(curve(seen.runs / "stopped")) == list(range(1, seen.stopped + 1))


def test_a_stopped_run_goes_on_as_if_nothing_had_been(seen: Seen) -> None:
    assert [end[0] for end in seen.ends[0][3:5]] == ["done", "done"]
    assert f"resuming from checkpoint-{seen.stopped}" in seen.ends[0][3][4]
    ours, theirs = (
        arrays(seen.runs / name, seen.stopped + 3) for name in ("again", "uninterrupted")
    )
    assert (
        ours.keys() == theirs.keys()
        and any(name.startswith("unet_ema/") for name in ours)
        and any(name.startswith("optimizer") for name in ours)
    )
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.tobytes() == theirs[name].tobytes(), name
    assert curve(seen.runs / "again") == curve(seen.runs / "uninterrupted")


def test_a_batch_that_does_not_divide_is_refused_and_nothing_is_lost(
    seen: Seen, base: Path, pictures: Path
) -> None:
    for rank in (0, 1):
        kind, text, _, code, _ = seen.ends[rank][10]
        assert (kind, code) == (
            "InputError",
            2,
        ) and "a global batch of 3 cannot be divided among 2 processes" in text
        kind, text, _, code, _ = seen.ends[rank][9]
        assert (kind, code) == (
            "InputError",
            2,
        ) and "begun with a global batch of 4, 3 is asked for" in text
    assert checkpoint.list_checkpoints(seen.runs / "odd") == []
    assert [p.name for p in checkpoint.list_checkpoints(seen.runs / "full-1")] == [
        f"checkpoint-{STEPS}"
    ]
    odd = seen.runs / "odd-alone"
    three = settings(
        base, pictures, odd, "train.batch_size=3", "train.micro_batch_size=1", "train.steps=1"
    )
    alone(three)
    state = checkpoint.open_checkpoint(odd / "checkpoint-1").state
    with pytest.raises(InputError, match="a global batch of 3 cannot be divided among 2 processes"):
        batch_plan.make_plan(toml.build(Config, three), 2, 10, state, 3)


def test_one_process_speaks_for_all(seen: Seen) -> None:
    assert [[end[4] for end in ends if end[0] == "done"] for ends in seen.ends][1] == [[]] * 9
    for mine, others in zip(*seen.ends, strict=True):
        if mine[0] != "done":
            assert (mine[2], others[2]) == (False, True), f"told twice: {mine[1]}"


@pytest.mark.parametrize("around", [0, 1, 2])
def test_a_signal_that_comes_twice_at_once_is_one_request(
    around: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a later one is none, however many contexts are open around this one: a command's."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background begins with Ctrl-C ignored
    with contextlib.ExitStack() as stack:
        outer = [stack.enter_context(Stop()) for _ in range(around)]
        stop = stack.enter_context(Stop())
        stop.save_first = True
        assert not stop.asked
        for now[0] in (
            100.0,
            100.0,
            101.0,
        ):  # a terminal's Ctrl-C reaches the launcher too, which passes it on
            signal.raise_signal(signal.SIGINT)
        assert stop.asked
        now[0] = 110.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not any(one.asked for one in outer)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_process_whose_main_thread_hears_none(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is in a call of C, so that no handler in Python runs; steps are unsaved."""
    now, codes = [100.0], []
    heard, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "QUIT_SECONDS", 0.0)
    monkeypatch.setattr(signals.os, "_exit", lambda code: [codes.append(code), ended.set()])
    with Stop() as stop:
        stop.save_first = stop.unsaved = True
        stop.tell_others = heard.set
        stop.writer.send(bytes([number]))
        assert heard.wait(10) and not codes
        now[0] = 110.0
        stop.writer.send(bytes([number]))
        assert ended.wait(10)
    assert codes == [code] and "without saving" in capfd.readouterr().err


@pytest.mark.parametrize("mine", [True, False])
def test_a_stop_while_encoding_is_heard_by_all_before_one_leaves(mine: bool) -> None:
    """The process that was told to stop still meets the others, which would wait for it for ever;
    they stop with it."""
    stop, met = Stop(), []
    stop.asked = mine

    def fill(requests: list[Any], check: Any) -> None:
        check()

    def any_of_all(flag: bool) -> bool:
        met.append(flag)
        return len(met) == 2  # first: whether one has a fault

    process = SimpleNamespace(rank=0, world_size=2, any=any_of_all)
    stream = SimpleNamespace(
        entries=(), features=SimpleNamespace(fill_texts=fill, fill_images=fill)
    )
    alone = {"caches_verified": False, "validation_entries": ()}
    family, data = (
        SimpleNamespace(text=Text()),
        SimpleNamespace(drop_caption=0.0),
    )
    job = SimpleNamespace(
        stream=stream,
        **alone,
        process=process,
        stop=stop,
        family=family,
        config=SimpleNamespace(data=data, preview=SimpleNamespace(prompts=())),
        report=print,
        engine=SimpleNamespace(get_encoders=lambda: None),
    )
    with pytest.raises(Stopped, match="stopped before training began"):
        encode.fill_caches(job)  # type: ignore[arg-type]
    assert met == [False, mine]
