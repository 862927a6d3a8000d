"""What a run comes to, before any weight is loaded: batch arithmetic, steps, and whether it may go
on from a checkpoint."""

import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from limner import config, durable, rng
from limner.data.order import Order
from limner.faults import InputFault

# Settings that may differ from the checkpoint's: they move no example, or are compared in another
# way (by content, by what they come to).
FREE: tuple[str, ...] = (
    "run",
    "log.",
    "preview.",
    "checkpoint.",
    "export.",
    "watch.every",
    "watch.timesteps",
    "train.",
)
FREE += ("data.threads", "data.cache", "data.cache_dir", "data.folder")
FREE += (
    "data.hub",
    "data.hub_config",
    "data.hub_revision",
    "data.hub_files",
    "data.split",
    "data.image",
    "data.caption",
    "data.bad",
    "data.max_pixels",
)
FREE += (
    "optim.ema_offload",
    "model.base",
    "model.revision",
    "model.trained_revision",
    "model.variant",
    "model.cache_dir",
    "model.vae",
    "data.sets",
)
FREE += (
    "model.partner",
    "engine.device",
    "engine.devices",
    "engine.fsdp",
    "engine.compile_cache",
    "engine.gradient_checkpointing",
    "engine.attention",
)


@dataclass(frozen=True)
class Plan:
    """The numbers of a run: global batch, micro-batch per device, micro-batches per step,
    processes, optimizer steps, seed."""

    batch: int
    micro: int
    accumulate: int
    world: int
    steps: int
    seed: int
    records: int
    # optimizer steps in which every record is seen once; without buckets a batch may span two
    # epochs
    steps_per_epoch: float

    def every(self, steps: int | None, epochs: float | None) -> int | None:
        """An interval in optimizer steps, given in steps or in epochs."""
        return steps if epochs is None else max(1, math.ceil(epochs * self.steps_per_epoch))


def make(
    cfg: config.Config,
    world: int,
    records: int,
    saved: dict[str, Any] | None,
    seed: int,
    order: Callable[[int], Order] | None = None,
    devices: int = 1,
) -> Plan:
    """Divide the global batch among processes and micro-batches; on resume the checkpoint's global
    batch and seed hold.

    Args:
        devices: of each process; ``train.micro`` is what one of them holds.
        order: the order of the run for a global batch; None, where no picture has been looked at:
            as many batches as hold the records.

    Raises:
        InputFault: when it does not divide, or when the recipe asks for another batch or seed than
            the checkpoint's.
    """
    t = cfg.train
    batch = (
        t.batch if t.batch is not None else (t.micro or 1) * (t.accumulate or 1) * world * devices
    )
    if saved is not None:
        before = saved["config"]["train"]
        as_before = (t.batch, t.micro, t.accumulate or 1) == (
            None,
            before["micro"],
            before["accumulate"] or 1,
        ) and before["batch"] is None
        if (
            batch != saved["batch"] and not as_before
        ):  # asked for as before, it is another only because the number of processes is
            begun = (
                f"this run was begun with a global batch of {saved['batch']}, {batch} is asked for"
            )
            raise InputFault(
                f"train.batch: {begun}. Keep {saved['batch']}, or begin a new run in another "
                "folder."
            )
        batch = saved["batch"]
        if t.seed is not None and t.seed != saved["seed"]:
            begun = f"this run was begun with seed {saved['seed']}, {t.seed} is asked for"
            raise InputFault(
                f"train.seed: {begun}. Keep {saved['seed']} or leave it out, or begin a new run "
                "in another folder."
            )
    if batch % world:
        raise InputFault(
            f"a global batch of {batch} cannot be divided among {world} processes; use a number "
            "of processes that divides it"
        )
    share = batch // world
    micro = min((t.micro or share) * devices, share)
    if share % micro:
        each = f"each of {world} processes has {share} of the {batch} examples of a step"
        raise InputFault(
            f"train.micro: {each}, which micro-batches of {micro} do not divide; use a divisor of "
            f"{share}"
        )
    made = order(batch) if order is not None else None
    per_epoch = records / batch if made is None else made.steps_per_epoch
    asked = (
        max(1, math.ceil((t.epochs or 0) * records / batch))
        if made is None
        else made.steps(t.epochs or 0)
    )
    return Plan(
        batch,
        micro,
        share // micro,
        world,
        asked if t.steps is None else t.steps,
        seed,
        records,
        per_epoch,
    )


def drawn_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(2**31)


def identity(cfg: config.Config, plan: Plan, data: str, base: str) -> dict[str, Any]:
    """What a checkpoint remembers of its run, besides arrays: all that its future depends on."""
    return {
        "config": config.plain(cfg),
        "seed": plan.seed,
        "batch": plan.batch,
        "world": plan.world,
        "records": plan.records,
        "mixture": [[one.repeats, one.weight] for one in cfg.data.sets],
        "data": data,
        "base": base,
        "draws": draws(plan.seed),
        "numpy": np.__version__,
    }


def draws(seed: int) -> str:
    """A digest of some draws: another numpy might make other normal numbers from the same bits, and
    a resumed run would notice."""
    numbers = np.concatenate(
        [rng.at(seed, "noise", p).standard_normal(64, np.float32) for p in range(4)]
    )
    return durable.digest_json(
        [numbers.tobytes().hex(), rng.at(seed, "order", 0).permutation(32).tolist()]
    )


def must_match(saved: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """Refuse to go on from a checkpoint when what the weights depend on has changed; returns a line
    for each change that is allowed.

    Raises:
        InputFault: naming each setting, its value in the checkpoint and its value now.
    """
    before, after = config.flat(saved["config"]), config.flat(now["config"])
    allowed = tuple(now["config"]["checkpoint"]["allow"])
    problems: list[str] = []
    changes: list[str] = []
    for name in sorted(before.keys() | after.keys()):
        free = any(name == f or (f.endswith(".") and name.startswith(f)) for f in FREE)
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
            f"{run['records']} records of {source_of(run['config']['data'])}"
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
            if p.partition(":")[0] in get_args(config.Allowable)
        ]
        hint = f" To change it all the same: checkpoint.allow={json.dumps(may)}." if may else ""
        raise InputFault(
            f"checkpoint-{step} cannot be gone on from, since this has changed:\n  "
            + "\n  ".join(problems)
            + "\nPut it back, or begin a new run in another folder."
            + hint
        )
    return [f"from step {step} on, {line}" for line in changes]


def source_of(data: dict[str, Any]) -> str:
    """What a data section of a config names."""
    return (
        data["folder"]
        or data["hub"]
        or ", ".join(one["folder"] or one["hub"] for one in data.get("sets") or [])
        or "the caller's own"
    )
