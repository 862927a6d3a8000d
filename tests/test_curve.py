"""The curve of a run that was killed, stopped or extended is that of the undisturbed run, at every
row and to the bit, whatever the intervals of rows and checkpoints."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limner.config import toml
from limner.config.schema import Config
from limner.errors import Stopped
from limner.storage.checkpoint import list_checkpoints, open_checkpoint
from limner.storage.run_state import RunState
from limner.training import loop, sinks
from limner.training.monitor import Monitor
from limner.training.signals import Stop

pytestmark = pytest.mark.frameworks
STEPS, EVERY = 10, {"log": 4, "checkpoint": 3}


class Killed(BaseException):
    """In place of a death."""


def settings(base: Path, pictures: Path, run: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32, "threads": 1},
        "adapter": {"kind": "lora"},
        "train": {"steps": STEPS, "batch_size": 2, "seed": 1},
        "log": {"every": EVERY["log"]},
        "checkpoint": {"every": EVERY["checkpoint"]},
        "validation": {"hold_out": 2, "every": 5, "timesteps": 1},
        "engine": {"device": "cpu"},
    }
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


def train(config: Config) -> None:
    loop.run_training(config, report=lambda line: None)


def curve(config: Config) -> list[dict[str, Any]]:
    rows = sinks.read_metrics(Path(config.run) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest, base: Path, pictures: Path, tmp_path_factory: Any
) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = settings(base, pictures, folder, engine={"kind": request.param})
    train(config)
    rows = curve(config)
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 10]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 5, 10]
    return request.param, rows


def at_step(step: int, act: Callable[[], None]) -> Callable[..., None]:
    """``Monitor.add_step`` that does something once, when so many steps are done in all."""
    add, done = Monitor.add_step, []

    def add_step(self: Monitor, *given: Any) -> None:
        add(self, *given)
        done.append(None)
        if self.first_step + len(done) == step:
            act()

    return add_step


@pytest.mark.parametrize("undisturbed", ["torch"], indirect=True)
@pytest.mark.parametrize("step", [5, 8])
def test_a_killed_run_has_the_same_rows(
    step: int, undisturbed: Any, base: Path, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    engine, rows = undisturbed
    config = settings(base, pictures, tmp_path / "run", engine={"kind": engine})

    def die() -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "add_step", at_step(step, die))
        train(config)
    assert list_checkpoints(tmp_path / "run")[0].name == f"checkpoint-{(step - 1) // 3 * 3}"
    train(config)
    assert curve(config) == rows


@pytest.mark.parametrize(
    ("undisturbed", "step"),
    [("torch", 2), ("torch", 6), pytest.param("jax", 6, marks=pytest.mark.soak)],
    indirect=["undisturbed"],
)
def test_a_stopped_run_has_the_same_rows_and_none_of_its_own(
    step: int, undisturbed: Any, base: Path, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    engine, rows = undisturbed
    config = settings(base, pictures, tmp_path / "run", engine={"kind": engine})
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"at step {step} "):
        stop = at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patch.setattr(Monitor, "add_step", stop)
        train(config)
    state = open_checkpoint(tmp_path / "run" / f"checkpoint-{step}").state
    assert len(state.unlogged_losses) == step % 4
    train(config)
    assert curve(config) == rows


def test_a_stop_ends_a_preview_which_is_drawn_when_the_run_goes_on(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A sampler may take minutes: the stop is heard between two of its steps."""
    preview = {"prompts": ["a red circle"], "every": 2, "steps": 4}
    config = settings(base, pictures, tmp_path / "run", preview=preview, train={"steps": 3})
    check, calls = Stop.check, []

    def check_unsaved(self: Stop) -> None:
        """The signal comes after the second step of the sampler, at the second step of the run."""
        if self.unsaved:
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        check(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="at step 2 of 3"):
        patch.setattr(Stop, "check", check_unsaved)
        train(config)
    folder = tmp_path / "run" / "previews"
    assert len(calls) == 2 and [path.name for path in folder.iterdir()] == ["step-000000"]
    train(config)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-000000", "step-000002", "step-000003"]


@pytest.mark.parametrize("undisturbed", ["torch"], indirect=True)
def test_an_extended_run_has_the_longer_run_s_rows(
    undisturbed: Any, base: Path, pictures: Path, tmp_path: Path
) -> None:
    """Its own last row stays between them, as what it was: the mean since the row before."""
    engine, rows = undisturbed
    short, longer = (
        settings(base, pictures, tmp_path / "run", train={"steps": steps}, engine={"kind": engine})
        for steps in (7, STEPS)
    )
    train(short)
    train(longer)
    assert [row for row in curve(longer) if row["step"] != 7] == rows


def test_a_state_without_losses_is_read() -> None:
    """Checkpoints that were written before know nothing of them."""
    numbers = dict.fromkeys(("seed", "batch_size", "world_size", "records"), 1)
    texts = dict.fromkeys(("data_digest", "base_digest", "random_digest", "numpy_version"), "x")
    plain = {"config": {"data": {}, "model": {}, "checkpoint": {}}, "mixture": [[1, None]]}
    plain |= {**numbers, **texts, "version": 1}
    assert RunState.from_plain(plain, Path("checkpoint-1")).unlogged_losses == ()
