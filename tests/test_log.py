"""Every number arrives in every sink, once, also after a resume; no secret is written; no sink
stops training or moves its random numbers."""

import errno
import json
import math
import os
import random
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.redaction import redact
from limner.storage import atomic
from limner.training.sinks import (
    list_installed_sinks,
    open_sinks,
    read_metrics,
    require_packages,
)

CANARY = "hf_CanaryCanaryCanaryCanary1234"
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def recipe(*to: str, **raw: Any) -> Config:
    return toml.build(Config, {"log": {"to": list(to), "project": "stars"}, **raw})


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Stub(types.ModuleType):
    """A tracker's package that remembers every call; ``fails`` makes its logging raise."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.fails and name.startswith("log"):
                raise ConnectionError(f"no network for {CANARY}")
            self.calls.append((name, args, kwargs))
            return (name, args, kwargs) if name == "Image" else self

        return call

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(name: str) -> Stub:
        module = Stub(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


def test_rows_are_exact_and_equal_runs_give_equal_lines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sinks = open_sinks(recipe(), tmp_path / name, 0)
        sinks.write(1, {"loss": 0.1 + 0.2, "grad_norm": np.float32(0.1), "count": np.int64(3)})
        sinks.write(2, {"loss": math.nan, "grad_norm": math.inf, "count": 4})
        sinks.close()
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert text == (tmp_path / "b" / "metrics.jsonl").read_text()
    assert (
        text.splitlines()[0]
        == '{"step": 1, "loss": 0.30000000000000004, "grad_norm": 0.10000000149011612, "count": 3}'
    )
    assert text.splitlines()[1] == '{"step": 2, "loss": null, "grad_norm": null, "count": 4}'
    assert read_metrics(tmp_path / "a" / "metrics.jsonl") == rows(tmp_path / "a")


def test_resume_drops_later_rows_and_half_a_line(tmp_path: Path) -> None:
    sinks = open_sinks(recipe(), tmp_path, 0)
    for step in (2, 4, 6, 8):
        sinks.write(step, {"loss": step / 10})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + '{"step": 10, "lo')
    assert [row["step"] for row in read_metrics(path)] == [2, 4, 6, 8]
    resumed = open_sinks(recipe(), tmp_path, 4)
    assert path.read_text() == "".join(before[:2])
    resumed.write(6, {"loss": 0.6})
    assert path.read_text() == "".join(before[:3])
    open_sinks(recipe(), tmp_path, 0)
    assert path.read_text() == "", "a fresh start begins with no rows"


def test_rows_that_a_full_disk_refused_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sinks = open_sinks(recipe(), tmp_path, 0, told.append)
    sinks.write(1, {"loss": 1.0})
    real = os.open

    def full(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("metrics.jsonl"):
            with (tmp_path / "metrics.jsonl").open("ab") as file:
                file.write(b'{"step": 2, "lo')  # what fitted
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        sinks.write(2, {"loss": 2.0})
        sinks.write(3, {"loss": 3.0})
    assert len(told) == 1 and "No space left" in told[0] and "training goes on" in told[0]
    sinks.write(4, {"loss": 4.0})
    sinks.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
    ]


def test_previews_are_whole_folders_of_exact_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sinks = open_sinks(recipe(), tmp_path, 0, told.append)
    sinks.write_images(
        500, "validation", [("a red apple", PICTURE), ("ein grüner Apfel", PICTURE[::-1])]
    )
    folder = tmp_path / "previews" / "step-000500"
    atomic.verify(folder)
    with Image.open(folder / "01.png") as second:
        assert np.array_equal(np.asarray(second), PICTURE[::-1])
        assert second.text["caption"] == "ein grüner Apfel"  # type: ignore[attr-defined]
    sinks.write_images(600, "test", [("x", PICTURE)])
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == [
        "step-000500",
        "step-000600-test",
    ]
    sinks.write_images(700, "validation", [("x", PICTURE), ("not a picture", np.zeros((2, 2, 7)))])
    assert len(told) == 1 and not (tmp_path / "previews" / "step-000700").exists()


def accumulated(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "stars"))
    events.Reload()
    return events


@pytest.mark.frameworks
def test_tensorboard_holds_the_numbers_pictures_and_settings(tmp_path: Path) -> None:
    sinks = open_sinks(recipe("tensorboard", train={"steps": 7}), tmp_path, 0)
    for step in (1, 2, 3):
        sinks.write(step, {"loss": step / 4, "learning_rate": 1e-4})
    sinks.write_images(2, "validation", [("a", PICTURE), ("b", PICTURE)])
    events = accumulated(tmp_path)  # before close: what is written can be seen at once
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert events.Scalars("learning_rate")[0].value == pytest.approx(1e-4)
    [shown] = events.Images("validation")
    assert (shown.step, shown.width * shown.height) == (2, 2 * 4 * 6)
    assert (
        b"train.steps"
        in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    sinks.close()


@pytest.mark.frameworks
def test_tensorboard_after_resume_shows_each_step_once(tmp_path: Path) -> None:
    first = open_sinks(recipe("tensorboard"), tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": step / 4})
    first.close()
    second = open_sinks(recipe("tensorboard"), tmp_path, 2)
    for step in (3, 4, 5):
        second.write(step, {"loss": step / 8})
    second.close()
    files = sorted(
        (tmp_path / "logs" / "stars").glob("events*"), key=lambda p: p.stat().st_mtime_ns
    )
    for number, file in enumerate(
        files
    ):  # read in the order of writing, though both were made within a second
        file.rename(file.with_name(f"events.out.tfevents.{number:010d}.host"))
    assert [(e.step, e.value) for e in accumulated(tmp_path).Scalars("loss")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.375),
        (4, 0.5),
        (5, 0.625),
    ]


def test_wandb(tmp_path: Path, stub: Any) -> None:
    wandb = stub("wandb")
    sinks = open_sinks(recipe("wandb", train={"steps": 7}), tmp_path, 0)
    sinks.write(3, {"loss": 0.5})
    sinks.write_images(3, "validation", [("a star", PICTURE)])
    sinks.close()
    [(_, start)] = wandb.named("init")
    assert (start["project"], start["config"]["train.steps"], start["resume"]) == (
        "stars",
        7,
        "allow",
    )
    assert wandb.named("Settings") == [((), {"x_disable_meta": True})], (
        "the command line stays here"
    )
    (values,), _ = wandb.named("log")[0]
    assert values == {"loss": 0.5, "step": 3}
    (pictures,), _ = wandb.named("log")[1]
    assert pictures["validation"][0][2] == {"caption": "0: a star"}
    assert np.array_equal(pictures["validation"][0][1][0], PICTURE)
    assert len(wandb.named("finish")) == 1
    open_sinks(recipe("wandb"), tmp_path, 3)
    open_sinks(recipe("wandb"), tmp_path, 0)
    first, resumed, fresh = [kwargs["id"] for _, kwargs in wandb.named("init")]
    assert first == resumed != fresh


def test_comet(tmp_path: Path, stub: Any) -> None:
    comet = stub("comet_ml")
    sinks = open_sinks(recipe("comet_ml", train={"steps": 7}), tmp_path, 0)
    sinks.write(3, {"loss": 0.5})
    sinks.write_images(4, "validation", [("a star", PICTURE)])
    sinks.close()
    [(_, start)] = comet.named("start")
    assert start["project_name"] == "stars" and len(start["experiment_key"]) == 32
    assert comet.named("ExperimentConfig") == [
        ((), {"parse_args": False, "log_env_details": False})
    ], "the command line stays here"
    assert comet.named("log_parameters")[0][0][0]["train.steps"] == 7
    assert comet.named("log_metrics") == [(({"loss": 0.5},), {"step": 3})]
    [((array,), named)] = comet.named("log_image")
    assert named == {"name": "validation 0: a star", "step": 4} and np.array_equal(array, PICTURE)
    assert len(comet.named("end")) == 1


def test_a_failing_sink_is_told_of_once_and_dropped(tmp_path: Path, stub: Any) -> None:
    wandb, comet, told = stub("wandb"), stub("comet_ml"), []
    wandb.fails = True
    sinks = open_sinks(recipe("wandb", "comet_ml"), tmp_path, 0, told.append)
    for step in (1, 2, 3):
        sinks.write(step, {"loss": 1.0})
    sinks.write_images(3, "validation", [("x", PICTURE)])
    sinks.close()
    assert told == [
        "wandb failed and is left out from now on; metrics.jsonl has all numbers: "
        "ConnectionError: no network for [redacted]"
    ]
    assert len(rows(tmp_path)) == len(comet.named("log_metrics")) == 3
    comet.start = lambda **kwargs: 1 // 0
    open_sinks(recipe("comet_ml"), tmp_path, 0, told.append).write(1, {"loss": 1.0})
    assert len(told) == 2 and told[1].startswith("comet_ml failed") and len(rows(tmp_path)) == 1


def test_a_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Any
) -> None:
    for name in ("tensorboard", "tensorboardX", "wandb", "comet_ml"):
        monkeypatch.setitem(sys.modules, name, None)
    assert list_installed_sinks() == ()
    with pytest.raises(
        InputError, match=r"wandb, comet_ml is not installed\. Run `pip install wandb comet-ml`"
    ):
        open_sinks(recipe("wandb", "comet_ml"), tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()
    stub("wandb")
    stub("tensorboardX")
    assert list_installed_sinks() == ("tensorboard", "wandb")
    require_packages(list_installed_sinks())


def test_redact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    monkeypatch.setenv("HF_TOKEN", "x")
    given = {
        "hub_token": "anything",
        "Token": None,
        "use_token": True,
        "deep": [
            {"api_key": 5, "url": f"https://user:{CANARY}@host/x"},
            ("abcdef0123456789!", "x", "text"),
        ],
        f"key {CANARY}": 1.5,
        "short": "hf_short",
    }
    assert redact(given) == {
        "hub_token": "[redacted]",
        "Token": None,
        "use_token": True,
        "deep": [
            {"api_key": "[redacted]", "url": "https://user:[redacted]@host/x"},
            ["[redacted]!", "[redacted]", "text"],
        ],
        "key [redacted]": 1.5,
        "short": "hf_short",
    }
    plain = toml.to_plain(Config())
    assert redact(plain) == plain, "no setting is taken for a secret"


@pytest.mark.frameworks
def test_no_byte_of_the_run_holds_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Any
) -> None:
    secret = "canary-of-the-environment"
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", secret)
    wandb, comet = stub("wandb"), stub("comet_ml")
    model = {"base": f"https://me:{CANARY}@hub/model", "cache_dir": f"/{secret}/cache"}
    raw = {"model": model, "preview": {"prompts": [f"a {CANARY}"]}, "export": {"hub": secret}}
    sinks = open_sinks(recipe("tensorboard", "wandb", "comet_ml", **raw), tmp_path, 0)
    sinks.write(1, {"loss": 1.0})
    sinks.write_images(1, "validation", [(f"a {CANARY} {secret}", PICTURE)])
    sinks.close()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".jsonl", ".png", ".json"} and any(
        "tfevents" in p.name for p in files
    )
    for path in files:
        content = path.read_bytes()
        assert CANARY.encode() not in content and secret.encode() not in content, path
    for calls in (wandb.calls, comet.calls):
        assert len(calls) >= 4
        assert CANARY not in repr(calls) and secret not in repr(calls)


@pytest.mark.frameworks
def test_sinks_move_no_random_number(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sinks = open_sinks(recipe("tensorboard"), tmp_path, 0)
    sinks.write(1, {"loss": 1.0})
    sinks.write_images(1, "validation", [("x", PICTURE)])
    sinks.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.frameworks
def test_tensorboard_on_a_failing_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its writer has a thread, whose traceback nobody would understand."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    before = threading.excepthook
    sinks = open_sinks(recipe("tensorboard"), tmp_path, 0, said.append)
    monkeypatch.setattr(RecordWriter, "write", refuse)
    for step in range(1, 200):
        sinks.write(step, {"loss": 1.0})
        if said:
            break
    sinks.close()
    assert len(said) == 1 and said[0].startswith("tensorboard failed and is left out from now on")
    assert "Traceback" not in "".join(capfd.readouterr())
    threading.excepthook = before
