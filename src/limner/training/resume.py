"""What a checkpoint remembers of its run, and what may change when it is resumed."""

import json
from typing import Any, get_args

import numpy as np

from limner import rng
from limner.config import schema, toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.storage import atomic
from limner.training.batch_plan import BatchPlan

# Settings that may differ from the checkpoint's: they move no example, or are compared in another
# way (by content, by what they come to).
FREE_SETTINGS: tuple[str, ...] = (
    "run",
    "log.",
    "preview.",
    "checkpoint.",
    "export.",
    "validation.every",
    "validation.timesteps",
    "train.",
)
FREE_SETTINGS += ("data.threads", "data.cache", "data.cache_dir", "data.folder")
FREE_SETTINGS += (
    "data.hub",
    "data.hub_config",
    "data.hub_revision",
    "data.hub_files",
    "data.split",
    "data.image",
    "data.caption",
    "data.on_bad_record",
    "data.max_pixels",
)
FREE_SETTINGS += (
    "optim.ema_offload",
    "model.base",
    "model.revision",
    "model.trained_revision",
    "model.variant",
    "model.cache_dir",
    "model.vae",
    "data.sets",
)
FREE_SETTINGS += (
    "model.other_stage",
    "engine.device",
    "engine.devices",
    "engine.fsdp",
    "engine.compile_cache",
    "engine.gradient_checkpointing",
    "engine.attention",
)


def make_run_state(config: Config, plan: BatchPlan, data: str, base: str) -> dict[str, Any]:
    """What a checkpoint remembers of its run, besides arrays: all that its future depends on."""
    return {
        "config": toml.to_plain(config),
        "seed": plan.seed,
        "batch": plan.batch_size,
        "world": plan.world_size,
        "records": plan.records,
        "mixture": [[one.repeats, one.weight] for one in config.data.sets],
        "data": data,
        "base": base,
        "draws": random_digest(plan.seed),
        "numpy": np.__version__,
    }


def random_digest(seed: int) -> str:
    """A digest of some draws: another numpy might make other normal numbers from the same bits, and
    a resumed run would notice."""
    numbers = np.concatenate(
        [rng.at(seed, "noise", p).standard_normal(64, np.float32) for p in range(4)]
    )
    return atomic.digest_json(
        [numbers.tobytes().hex(), rng.at(seed, "order", 0).permutation(32).tolist()]
    )


def must_match(saved: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """Refuse to go on from a checkpoint when what the weights depend on has changed; returns a line
    for each change that is allowed.

    Raises:
        InputError: naming each setting, its value in the checkpoint and its value now.
    """
    before, after = toml.flatten(saved["config"]), toml.flatten(now["config"])
    allowed = tuple(now["config"]["checkpoint"]["allow_changes"])
    problems: list[str] = []
    changes: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        free = any(name == f or (f.endswith(".") and name.startswith(f)) for f in FREE_SETTINGS)
        if not free and before.get(name) != after.get(name):
            (changes if name in allowed else problems).append(
                f"{name}: was {before.get(name)!r}, now {after.get(name)!r}"
            )
    if saved.get("mixture", []) != now["mixture"]:
        problems.append(
            f"data.sets: repeats and weights were {saved.get('mixture', [])}, now {now['mixture']}"
        )
    if saved["data"] != now["data"]:
        had, has = (
            f"{run['records']} records of {describe_source(run['config']['data'])}"
            for run in (saved, now)
        )
        problems.append(
            f"the data set: was {had}, now {has}, and the pictures or captions are not the same"
        )
    if saved["base"] != now["base"]:
        bases = [run["config"]["model"]["base"] for run in (saved, now)]
        problems.append(
            f"the base model: was {bases[0]}, now {bases[1]}, and the weights or configuration "
            "are not the same"
        )
    if saved["draws"] != now["draws"]:
        problems.append(
            f"random numbers: numpy {saved['numpy']} drew others than numpy {now['numpy']} does; "
            f"install numpy {saved['numpy']}"
        )
    if problems:
        may = [
            p.partition(":")[0]
            for p in problems
            if p.partition(":")[0] in get_args(schema.Allowable)
        ]
        hint = (
            f" To change it all the same: checkpoint.allow_changes={json.dumps(may)}."
            if may
            else ""
        )
        raise InputError(
            f"checkpoint-{step} cannot be gone on from, since this has changed:\n  "
            + "\n  ".join(problems)
            + "\nPut it back, or begin a new run in another folder."
            + hint
        )
    return [f"from step {step} on, {line}" for line in changes]


def describe_source(data: dict[str, Any]) -> str:
    """What a data section of a config names."""
    return (
        data["folder"]
        or data["hub"]
        or ", ".join(one["folder"] or one["hub"] for one in data.get("sets") or [])
        or "the caller's own"
    )
