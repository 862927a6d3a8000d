"""The two sides of a comparison: Limner and diffusers' own script on the same base, pictures and
settings, each as a command of its own."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

WARM_UP = 3  # steps that no median counts
WRAPPED = """
import json, runpy, sys, time
import accelerate
log = accelerate.Accelerator.log
def stamped(self, values, *rest, **more):
    if "train_loss" in values:
        with open({trace!r}, "a") as file:
            row = {{"loss": values["train_loss"], "time": time.monotonic()}}
            file.write(json.dumps(row) + "\\n")
    return log(self, values, *rest, **more)
accelerate.Accelerator.log = stamped
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Settings:
    """What both sides are told; everything else is AdamW's defaults, float32, a centre crop, no
    flip and no average."""

    size: int
    batch: int
    steps: int
    learning_rate: float
    threads: int


@dataclass(frozen=True)
class Trace:
    """What one side did: loss of each step, seconds of each step after the warm-up (median),
    seconds of the whole command."""

    losses: list[float]
    step_seconds: float
    wall_seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "script",
        type=Path,
        help="examples/text_to_image/train_text_to_image.py of a diffusers checkout",
    )
    parser.add_argument("base", type=Path, help="a Stable Diffusion folder in the diffusers layout")
    parser.add_argument(
        "pictures", type=Path, help="a folder of pictures with metadata.jsonl (file_name, text)"
    )
    parser.add_argument(
        "work", type=Path, help="an empty or new folder for everything that is written"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of PyTorch, on both sides (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, help="use no more than this many pictures")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")


def settings(a: argparse.Namespace, steps: int) -> Settings:
    return Settings(a.size, a.batch, steps, a.learning_rate, a.threads)


def copy_pictures(source: Path, target: Path, rows: list[dict[str, str]]) -> Path:
    """Pictures as plain RGB on white: how the two sides treat transparency differs, and is not what
    is compared."""
    target.mkdir(parents=True)
    for row in rows:
        picture = Image.open(source / row["file_name"]).convert("RGBA")
        Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        ).save((target / row["file_name"]).with_suffix(".png"))
    lines = [
        json.dumps(
            {"file_name": str(Path(row["file_name"]).with_suffix(".png")), "text": row["text"]}
        )
        + "\n"
        for row in rows
    ]
    (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return target


def read_rows(folder: Path) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def run_diffusers(
    script: Path, base: Path, pictures: Path, out: Path, s: Settings, seed: int
) -> Trace:
    """Their script, unmodified, in a process that notes the time and loss of every step as it is
    logged."""
    trace = out.with_suffix(".jsonl")
    code = WRAPPED.format(trace=str(trace), script=str(script))
    flags = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": pictures,
        "output_dir": out,
        "resolution": s.size,
        "train_batch_size": s.batch,
        "max_train_steps": s.steps,
        "learning_rate": s.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "seed": seed,
        "mixed_precision": "no",
        "checkpointing_steps": 10**9,
        "image_interpolation_mode": "lanczos",
        "report_to": "tensorboard",
    }
    cache = {"HF_DATASETS_CACHE": str(out.parent / "datasets")}
    wall = execute(
        [
            sys.executable,
            "-c",
            code,
            "--center_crop",
            *(f"--{name}={value}" for name, value in flags.items()),
        ],
        out,
        s,
        cache,
    )
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    return Trace([row["loss"] for row in rows], median_gap([row["time"] for row in rows]), wall)


def run_limner(
    base: Path, pictures: Path, out: Path, s: Settings, seed: int, *, cache: str
) -> Trace:
    """The same with ``limner train``; ``cache=off`` runs the frozen encoders in every step, as the
    script does."""
    recipe = out.with_suffix(".toml")
    recipe.write_text("")
    values = {
        "run": out,
        "model.base": base,
        "data.folder": pictures,
        "data.size": s.size,
        "data.cache": cache,
        "train.batch_size": s.batch,
        "train.steps": s.steps,
        "optim.learning_rate": s.learning_rate,
        "train.seed": seed,
        "engine.precision": "no",
        "engine.device": "cpu",
        "checkpoint.every": 10**9,
        "log.every": 1,
    }
    wall = execute(
        [
            sys.executable,
            "-m",
            "limner",
            "train",
            str(recipe),
            *(f"{name}={value}" for name, value in values.items()),
        ],
        out,
        s,
        {},
    )
    rows = [
        row
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    return Trace(
        [row["loss"] for row in rows],
        s.batch / statistics.median(row["images_per_second"] for row in rows[WARM_UP:]),
        wall,
    )


def execute(command: list[str], out: Path, s: Settings, more: dict[str, str]) -> float:
    """Run a side to its end, its words in a file; returns the seconds it took."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # threads that spin while another program has their core make any side many times slower; see
    # README.md
    waiting = {"OMP_WAIT_POLICY": "passive"}
    environment = {
        **waiting,
        **os.environ,
        "OMP_NUM_THREADS": str(s.threads),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }
    began = time.monotonic()
    with open(out.with_suffix(".log"), "w") as log:
        done = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        tail = "\n".join(out.with_suffix(".log").read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(
            f"{out.name} ended with {done.returncode}; the end of {out.with_suffix('.log')}:\n"
            f"{tail}"
        )
    return time.monotonic() - began


def median_gap(times: list[float]) -> float:
    """The median time between two steps, after the warm-up."""
    return statistics.median(
        after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)
    )
