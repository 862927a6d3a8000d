"""Killed at any moment and started again with the same command, a run ends with the same bits,
after exactly as many steps."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import worker

from limner import rng
from limner.storage import atomic, checkpoint
from limner.training import sinks

pytestmark = pytest.mark.frameworks

STEPS = 6


@pytest.fixture(scope="module")
def processes():
    return worker.context()


def settings(base: Path, pictures: Path, folder: Path, kind: str, **train: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "model": {"base": str(base)},
        "data": {
            "folder": str(pictures),
            "size": 32,
            "flip": True,
            "drop_caption": 0.2,
            "cache": str(folder / "cache"),
            "threads": 2,
        },
        "adapter": {"kind": kind, "dropout": 0.1 if kind == "lora" else 0.0},
        "optim": {"learning_rate": 1e-3, "ema": 0.9, "schedule": "cosine", "warmup": 2},
        "train": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "seed": 3, **train},
        "checkpoint": {"every": 1, "keep": 2},
        "validation": {"hold_out": 2, "every": 3, "timesteps": 1},
        "preview": {"prompts": ["a red circle"], "every": 3, "steps": 2},
        "log": {"every": 1},
    }


def settings_xl(sdxl: Path, many: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Stable Diffusion XL on two data sets in buckets, with caches of both kinds, or text encoders
    that learn."""
    cfg = settings(sdxl, many, folder, kind)
    cfg["model"]["family"] = "sdxl"
    sets = [
        {"folder": str(many / "tall"), "weight": 1.0},
        {"folder": str(many / "wide"), "weight": 2.0},
    ]
    cfg["data"] |= {
        "folder": None,
        "sets": sets,
        "buckets": {"step": 8},
        "crop": "random",
        "crop_variants": 2,
        "caption_chunks": 2,
        "cache_dtype": "float16",
    }
    cfg["adapter"] |= {"text_encoders": kind == "lora"}
    return cfg


def settings_22(
    kandinsky: Path, pictures: Path, folder: Path, stage: str, kind: str
) -> dict[str, Any]:
    """A stage of Kandinsky 2.2, previews drawn with the other one."""
    cfg, other = (
        settings(kandinsky / stage, pictures, folder, kind),
        {"prior": "decoder", "decoder": "prior"}[stage],
    )
    cfg["model"] |= {"family": f"kandinsky22-{stage}", "other_stage": str(kandinsky / other)}
    cfg["engine"] = {"gradient_checkpointing": True}
    if stage == "decoder":
        del cfg["data"]["drop_caption"]
    return cfg


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Two data sets of different shapes."""
    folder = tmp_path_factory.mktemp("many")
    tiny.pictures(
        folder / "tall",
        5,
        size=(60, 36),
        captions=[
            [f"a {n} circle", "a disc " * 80] for n in ("red", "green", "blue", "grey", "pink")
        ],
    )
    tiny.pictures(folder / "wide", 7, size=(36, 50), seed=1)
    return folder


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must not depend on kills: the last checkpoint, the result, and the losses."""
    last = run / f"checkpoint-{STEPS}"
    atomic.verify(last)
    result = json.loads((run / "result.json").read_text())
    files = {
        p.name if p.parent == last else f"{p.parent.name}/{p.name}": atomic.digest_file(p)
        for p in sorted(last.rglob("*.safetensors"))
    }
    losses = [
        {k: v for k, v in row.items() if k != "images_per_second"}
        for row in sinks.read_metrics(run / "metrics.jsonl")
    ]
    left = sorted(p.name for p in run.iterdir() if p.name.endswith((".tmp", ".del")))
    return {
        "step": result["step"],
        "files": files,
        "result": result["files"],
        "losses": losses,
        "left": left,
        "there": [p.name for p in checkpoint.list_checkpoints(run)],
    }


KINDS = [
    "full",
    "lora",
    "xl full",
    "xl lora",
    "sd3 full",
    "sd3 lora",
    "prior full",
    "prior lora",
    "decoder full",
    "decoder lora",
]


@pytest.mark.parametrize(
    "kind",
    [*KINDS, *(pytest.param(f"jax {kind}", marks=pytest.mark.soak) for kind in ("full", "lora"))],
)
def test_killed_runs_end_with_the_same_bits(
    processes, base, pictures, sdxl, sd3, kandinsky, many, tmp_path, kind, pytestconfig
):
    def job(folder: Path) -> dict[str, Any]:
        if kind.startswith("jax"):
            return settings(base, pictures, folder, kind[4:]) | {
                "engine": {"kind": "jax"},
                "preview": {},
            }
        if kind.startswith("sd3"):
            cfg = settings(sd3, pictures, folder, kind[4:])
            cfg["model"]["family"] = "sd3"
            return cfg
        if kind.startswith(("prior", "decoder")):
            return settings_22(kandinsky, pictures, folder, *kind.split())
        return (
            settings_xl(sdxl, many, folder, kind[3:])
            if kind.startswith("xl")
            else settings(base, pictures, folder, kind)
        )

    whole = job(tmp_path / "whole")
    began = time.monotonic()
    process = worker.start(processes, whole)
    process.join()
    span = time.monotonic() - began
    assert process.exitcode == 0
    want = outcome(Path(whole["run"]))
    assert want["step"] == STEPS and [
        row["step"] for row in want["losses"] if "loss" in row
    ] == list(range(1, STEPS + 1))
    assert want["there"] == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"] and not want["left"]
    kills, trial, odds = 0, 0, rng.at(0, f"kills {kind}", 0)
    while kills < max(1, pytestconfig.getoption("--kills") // (5 if kind.startswith("jax") else 2)):
        cfg = job(tmp_path / f"trial-{trial}")
        trial += 1
        for _ in range(50):
            aimed = odds.random() < 0.5  # half in the middle of a write, half at any moment
            process = worker.start(processes, cfg, int(odds.integers(0, 40)) if aimed else None)
            process.join(None if aimed else float(odds.random()) * span)
            worker.send_signal(process, signal.SIGKILL)
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        assert outcome(Path(cfg["run"])) == want


def test_a_signal_to_a_process_that_has_ended_is_none() -> None:
    """The server of forks has taken note of its end, and has not told its exit code yet."""
    ended = subprocess.Popen([sys.executable, "-IS", "-c", ""])
    ended.wait()
    process: Any = SimpleNamespace(pid=ended.pid, exitcode=None)
    worker.send_signal(process, signal.SIGCONT)


@pytest.fixture(scope="module")
def plain(processes, base, pictures, tmp_path_factory) -> Path:
    """A run that nobody disturbed; only read it."""
    cfg = settings(base, pictures, tmp_path_factory.mktemp("plain"), "full")
    process = worker.start(processes, cfg)
    process.join()
    assert process.exitcode == 0
    return Path(cfg["run"])


def test_a_stop_saves_and_the_run_goes_on_to_the_same_bits(
    processes, base, pictures, tmp_path, plain
):
    stopped = settings(base, pictures, tmp_path / "stopped", "full")
    stopped["checkpoint"] = {"every": 100}
    process = worker.start(processes, stopped)
    metrics = Path(stopped["run"]) / "metrics.jsonl"
    while process.is_alive() and not any("loss" in row for row in sinks.read_metrics(metrics)):
        process.join(0.01)
    worker.send_signal(process, signal.SIGTERM)
    process.join()
    assert process.exitcode == 3
    [saved] = checkpoint.list_checkpoints(Path(stopped["run"]))
    assert checkpoint.open_checkpoint(saved).step < STEPS
    process = worker.start(processes, stopped)
    process.join()
    assert process.exitcode == 0
    one, other = outcome(plain), outcome(Path(stopped["run"]))
    assert {**one, "there": 0} == {**other, "there": 0}


def test_finished_is_finished_and_more_steps_go_on(processes, base, pictures, tmp_path):
    cfg = settings(base, pictures, tmp_path, "lora", steps=3)
    run = Path(cfg["run"])
    seen = []
    for steps in (3, 3, STEPS):
        cfg["train"]["steps"] = steps
        process = worker.start(processes, cfg)
        process.join()
        assert process.exitcode == 0
        seen.append(
            {
                p.relative_to(run).as_posix(): (atomic.digest_file(p), p.stat().st_mtime_ns)
                for p in run.rglob("*")
                if p.is_file() and p.name not in (".lock", "config.json")
            }
        )
    assert seen[0] == seen[1]
    assert outcome(run)["step"] == STEPS


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    processes, base, pictures, tmp_path, capfd, plain
):
    whole = settings(base, pictures, tmp_path / "whole", "full")
    shutil.copytree(plain, whole["run"])
    want = outcome(plain)
    newest = Path(whole["run"]) / f"checkpoint-{STEPS}"
    weights = newest / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    said: list[str] = []
    found = checkpoint.find_latest(newest.parent, said.append)
    assert found is not None and found.step == STEPS - 1
    assert len(said) == 1 and str(weights) in said[0]
    process = worker.start(processes, whole)
    process.join()
    assert process.exitcode == 0
    assert outcome(Path(whole["run"])) == want


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": {"every": 3}},
        {"preview": {}},
        {"log": {"every": 4, "to": ["tensorboard"]}},
        {"validation": {"hold_out": 2, "every": 100, "timesteps": 3}},
        {"data": {"threads": 1}},
        {"data": {"cache": "off"}},
    ],
)
def test_looking_saving_and_caching_move_no_bit(processes, base, pictures, tmp_path, change, plain):
    cfg = settings(base, pictures, tmp_path / "changed", "full")
    cfg = {**cfg, **{k: {**cfg[k], **v} if v else v for k, v in change.items()}}
    process = worker.start(processes, cfg)
    process.join()
    assert process.exitcode == 0
    assert outcome(Path(cfg["run"]))["files"] == outcome(plain)["files"]


def test_an_average_moves_no_trained_weight(processes, base, pictures, tmp_path, plain):
    cfg = settings(base, pictures, tmp_path, "full")
    cfg["optim"]["ema"] = None
    process = worker.start(processes, cfg)
    process.join()
    assert process.exitcode == 0
    files = [outcome(run)["files"] for run in (plain, Path(cfg["run"]))]
    assert "unet_ema/diffusion_pytorch_model.safetensors" in files[0].keys() - files[1].keys()
    for name in ("unet/diffusion_pytorch_model.safetensors", "optimizer.safetensors"):
        assert files[0][name] == files[1][name]
