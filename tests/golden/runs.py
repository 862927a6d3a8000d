"""Fourteen tiny training runs that together use most of what Limner can do, for comparisons.

Each run has six optimizer steps on a random model of a few hundred kilobytes, in float32 on the
CPU. Every family learns whole and by LoRA, in each engine that knows it. ``tests/test_golden.py``
holds their losses against recorded ones, ``compare_commits.py`` makes them at two commits.
"""

import json
from pathlib import Path
from typing import Any

import tiny

Settings = dict[str, Any]  # flat: "section.key" to a plain value, as TOML has them

SIZE = tiny.SIZE  # pixels
LONG = ", ".join(f"a {name} circle" for name in tiny.COLOURS) + ", on paper" * 30  # above 75 tokens
PROMPT = "a red circle"

COMMON: Settings = {
    "data.size": SIZE,
    "data.threads": 1,
    "engine.device": "cpu",
    "engine.precision": "no",
    "train.steps": 6,
    "train.seed": 3,
    "log.every": 1,
    "checkpoint.every": 3,
}
LORA: Settings = {"adapter.kind": "lora", "adapter.rank": 3, "adapter.alpha": 6.0}
VALIDATION: Settings = {"validation.hold_out": 2, "validation.every": 3, "validation.timesteps": 2}
PREVIEW: Settings = {"preview.prompts": [PROMPT], "preview.every": 3, "preview.steps": 2}
RANDOM_CROPS: Settings = {"data.crop": "random", "data.crop_variants": 2, "data.flip": True}
ACCUMULATED: Settings = {"train.batch_size": 4, "train.micro_batch_size": 2}
SHAPES: Settings = {"data.buckets.step": 8, "data.buckets.smallest": 24, "data.buckets.largest": 48}

RUNS: dict[str, Settings] = {
    "torch-sd-full": {
        "model.family": "sd",
        "data.folder": "discs",
        **RANDOM_CROPS,
        "data.drop_caption": 0.3,
        "objective.min_snr": 5.0,
        "objective.noise_offset": 0.1,
        "optim.learning_rate": 1e-4,
        "optim.schedule": "cosine",
        "optim.warmup": 2,
        "optim.ema": 0.9,
        **ACCUMULATED,
        **VALIDATION,
        **PREVIEW,
    },
    "torch-sd-lora": {
        "model.family": "sd",
        "data.folder": "discs",
        "data.crop": "random",  # a new one each time, which is never cached
        "data.drop_caption": 0.3,
        "data.empty_caption": "zeros",
        "data.caption_chunks": 2,
        "objective.predict": "v_prediction",
        "objective.timestep_bias": {
            "strategy": "range",
            "multiplier": 3.0,
            "begin": 200,
            "end": 600,
        },
        **LORA,
        "adapter.text_encoders": True,
        "optim.learning_rate": 1e-3,
        "optim.schedule": "linear",
        "train.micro_batch_size": 2,
        "train.accumulation_steps": 2,
    },
    "torch-sdxl-full": {
        "model.family": "sdxl",
        "data.sets": [{"folder": "wide", "repeats": 2}, {"folder": "tall"}],
        **SHAPES,
        "data.on_bad_record": "skip",
        "data.flip": True,
        "data.drop_caption": 0.3,
        "objective.predict": "v_prediction",
        "objective.min_snr": 5.0,
        "optim.learning_rate": 1e-4,
        "optim.ema": 0.9,
        "optim.ema_offload": True,
        "engine.gradient_checkpointing": True,
        **ACCUMULATED,
        **VALIDATION,
    },
    "torch-sdxl-lora": {
        "model.family": "sdxl",
        "data.folder": "discs",
        "data.flip": True,
        "data.cache": "memory",
        "data.resample": "bicubic",
        "objective.noise_offset": 0.05,
        "objective.input_perturbation": 0.1,
        **LORA,
        "adapter.text_encoders": True,
        "optim.learning_rate": 1e-3,
        "optim.betas": [0.8, 0.99],
        "optim.ema": 0.9,
        "train.batch_size": 4,
        **VALIDATION,
        **PREVIEW,
        "preview.count": 2,
    },
    "torch-prior-full": {
        "model.family": "kandinsky22-prior",
        "data.folder": "discs",
        "data.flip": True,
        "data.drop_caption": 0.4,
        "objective.min_snr": 5.0,
        "optim.learning_rate": 1e-4,
        "optim.ema": 0.9,
        **ACCUMULATED,
        **VALIDATION,
        **PREVIEW,
    },
    "torch-prior-lora": {
        "model.family": "kandinsky22-prior",
        "data.folder": "discs",
        "data.max_records": 9,
        "data.drop_caption": 0.3,
        "objective.input_perturbation": 0.1,
        **LORA,
        "adapter.targets": ["to_q", "to_v"],
        "optim.learning_rate": 1e-3,
        "optim.schedule": "polynomial",
        "optim.warmup": 1,
        "train.micro_batch_size": 3,
        "train.accumulation_steps": 2,
    },
    "torch-decoder-full": {
        "model.family": "kandinsky22-decoder",
        "data.folder": "discs",
        **RANDOM_CROPS,
        "data.resample": "box",
        "objective.min_snr": 5.0,
        "objective.noise_offset": 0.1,
        "optim.learning_rate": 1e-4,
        "optim.schedule": "constant_with_warmup",
        "optim.warmup": 3,
        **ACCUMULATED,
        **VALIDATION,
    },
    "torch-decoder-lora": {
        "model.family": "kandinsky22-decoder",
        "data.sets": [{"folder": "wide", "weight": 1.0}, {"folder": "tall", "weight": 2.0}],
        **SHAPES,
        "data.on_bad_record": "skip",
        "data.flip": True,
        "objective.dream": 1.0,
        **LORA,
        "optim.learning_rate": 1e-3,
        "optim.ema": 0.9,
        "train.batch_size": 4,
        **PREVIEW,
    },
    "torch-sd3-full": {
        "model.family": "sd3",
        "data.folder": "discs",
        "data.flip": True,
        "data.drop_caption": 0.3,
        "optim.learning_rate": 1e-4,
        "optim.ema": 0.9,
        "engine.gradient_checkpointing": True,
        **ACCUMULATED,
        **VALIDATION,
        **PREVIEW,
    },
    "torch-sd3-lora": {
        "model.family": "sd3",
        "data.sets": [{"folder": "wide", "repeats": 2}, {"folder": "tall"}],
        **SHAPES,
        "data.on_bad_record": "skip",
        "objective.flow.density": "mode",
        "objective.flow.sigmas": "table",
        "objective.input_perturbation": 0.1,
        **LORA,
        "optim.learning_rate": 1e-3,
        "train.batch_size": 4,
    },
    "jax-sd-full": {
        "model.family": "sd",
        "model.base": "sd-one-level",  # half the time to compile
        "engine.kind": "jax",
        "data.folder": "discs",
        **RANDOM_CROPS,
        "data.drop_caption": 0.3,
        "objective.min_snr": 5.0,
        "optim.learning_rate": 1e-4,
        "optim.schedule": "cosine",
        "optim.warmup": 2,
        "optim.ema": 0.9,
        **ACCUMULATED,
        **VALIDATION,
    },
    "jax-sd-lora": {
        "model.family": "sd",
        "model.base": "sd-one-level",  # half the time to compile
        "engine.kind": "jax",
        "data.folder": "discs",
        "data.flip": True,
        "data.drop_caption": 0.3,
        "data.empty_caption": "zeros",
        "data.caption_chunks": 2,
        "objective.dream": 1.0,
        **LORA,
        "optim.learning_rate": 1e-3,
        "train.batch_size": 4,
        **PREVIEW,
    },
    "jax-sdxl-full": {
        "model.family": "sdxl",
        "engine.kind": "jax",
        "data.folder": "wide",  # of one shape: each takes JAX many seconds
        **SHAPES,
        "data.flip": True,
        "data.drop_caption": 0.3,
        "objective.predict": "v_prediction",
        "objective.min_snr": 5.0,
        "optim.learning_rate": 1e-4,
        "optim.ema": 0.9,
        "train.batch_size": 4,
    },
    "jax-sdxl-lora": {
        "model.family": "sdxl",
        "engine.kind": "jax",
        "data.folder": "discs",
        "data.flip": True,
        "data.resample": "bicubic",
        "objective.noise_offset": 0.05,
        "objective.input_perturbation": 0.1,
        **LORA,
        "adapter.text_encoders": True,
        "optim.learning_rate": 1e-3,
        "optim.ema": 0.9,
        "engine.gradient_checkpointing": True,
        "train.batch_size": 4,
    },
}

BASES = {
    "sd": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "kandinsky22-prior": "kandinsky/prior",
    "kandinsky22-decoder": "kandinsky/decoder",
}
OTHER_STAGES = {"kandinsky22-prior": "kandinsky/decoder", "kandinsky22-decoder": "kandinsky/prior"}


def make_inputs(folder: Path) -> Path:
    """Write the models and pictures of all runs into ``folder``, and return it.

    Pictures are PNG files, which every decoder reads alike: ``discs`` of one size with two captions
    each, one of them long; ``wide`` and ``tall`` for buckets; one of ``tall`` is damaged.
    """
    tiny.stable_diffusion(folder / "sd")
    tiny.stable_diffusion(folder / "sd-one-level", channels=(64,))
    tiny.stable_diffusion_xl(folder / "sdxl")
    tiny.stable_diffusion_3(folder / "sd3")
    tiny.kandinsky22(folder / "kandinsky")
    captions = [[f"a circle, number {i}", f"number {i}: {LONG}"] for i in range(12)]
    tiny.pictures(folder / "discs", 12, captions=captions)
    tiny.pictures(folder / "wide", 5, size=(36, 58), seed=1)
    tiny.pictures(folder / "tall", 6, size=(52, 38), seed=2)
    damaged = folder / "tall" / "005.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    return folder


def settings_of(name: str, inputs: Path, run: str) -> Settings:
    """The settings of a run, flat, on what ``make_inputs`` wrote; ``run`` is its own folder."""
    chosen = {"run": run, **COMMON, **RUNS[name]}
    family = chosen["model.family"]
    chosen["model.base"] = str(inputs / chosen.get("model.base", BASES[family]))
    if family in OTHER_STAGES:
        chosen["model.other_stage"] = str(inputs / OTHER_STAGES[family])
    if "data.folder" in chosen:
        chosen["data.folder"] = str(inputs / chosen["data.folder"])
    if "data.sets" in chosen:
        sets = chosen["data.sets"]
        chosen["data.sets"] = [{**one, "folder": str(inputs / one["folder"])} for one in sets]
    return chosen


def write_recipe(settings: Settings, path: Path) -> Path:
    """Write flat settings as a recipe, one line each, and return its path."""
    path.write_text("".join(f"{name} = {as_toml(value)}\n" for name, value in settings.items()))
    return path


def as_toml(value: Any) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return json.dumps(value)
