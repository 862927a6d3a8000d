"""Runs of a recipe that both engines know, for the tests of the JAX engine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.families import FAMILIES
from limner.storage import checkpoint
from limner.training import loop

IS_SOAK = "CURVE_STEPS" in os.environ
STEPS = int(os.environ.get("CURVE_STEPS", "12"))  # of the runs that both engines make
HALFWAY = STEPS // 2


@pytest.fixture(autouse=True)
def float32_products() -> Iterator[None]:
    """As exact as float32 allows, on whatever device."""
    import jax

    with jax.default_matmul_precision("highest"):
        yield


def opened(folder: Path, family: str) -> Any:
    return open_base(ModelSettings(base=str(folder), family=family), FAMILIES[family])


def settings(
    base: Path,
    pictures: Path,
    run: Path,
    by: str,
    family: str = "sd",
    kind: str = "full",
    **sections: Any,
) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base), "family": family},
        "engine": {"kind": by},
        "data": {
            "folder": str(pictures),
            "size": 32,
            "flip": True,
            "drop_caption": 0.3,
            "threads": 1,
        },
        "adapter": {
            "kind": "lora",
            "text_encoders": family == "sdxl",
            "rank": 3,
            "alpha": 6.0,
            "dropout": 0.1 if family == "sdxl" else 0.0,
        }
        if kind == "lora"
        else {},
        "optim": {"learning_rate": 1e-5, "ema": 0.9},
        "objective": {"min_snr": 5.0},
        "train": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "seed": 3},
        "log": {"every": 1},
        "validation": {"hold_out": 2, "every": HALFWAY, "timesteps": 2},
        "checkpoint": {"every": HALFWAY},
    }
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


def trained(cfg: Config) -> dict[str, list[float]]:
    run = loop.run_training(cfg, report=lambda line: None)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        name: [row[name] for row in rows if name in row]
        for name in ("loss", "grad_norm", "held_out_loss")
    }


def bits(run: Path, step: int) -> dict[str, bytes]:
    found = checkpoint.open_checkpoint(run / f"checkpoint-{step}")
    files = sorted(
        p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*.safetensors")
    )
    return {
        f"{file}:{name}": array.tobytes()
        for file in files
        for name, array in found.arrays(file).items()
    }
