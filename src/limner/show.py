"""What a recipe comes to, in words: every setting, the batch arithmetic and the steps; no weight
and no picture is read."""

import json
import math
import os
import re
from typing import Any

from limner import config, plan
from limner.data import sets
from limner.families import FAMILIES
from limner.faults import InputFault


def text(cfg: config.Config) -> str:
    """The resolved settings as TOML, then batch arithmetic for the number of processes that this
    command was launched with."""
    cfg.check()
    if cfg.model.family not in FAMILIES:
        raise InputFault(f"model.family: {cfg.model.family!r} is not one of {', '.join(FAMILIES)}")
    raw = config.plain(cfg)
    lines = [f"run = {toml(raw.pop('run'))}"]
    for section, values in raw.items():
        lines += [
            "",
            f"[{section}]",
            *(f"{name} = {toml(value)}" for name, value in values.items() if value is not None),
        ]
        lines += [f"# {name} is not set" for name, value in values.items() if value is None]
    return "\n".join([*lines, "", *arithmetic(cfg)])


def toml(value: Any) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return re.sub(
        "[\x7f\ud800-\udfff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(value, ensure_ascii=False),
    )


def arithmetic(cfg: config.Config) -> list[str]:
    """How the global batch is divided, and what an epoch comes to."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    local = cfg.data.folder is not None or (
        cfg.data.sets and all(one.folder is not None for one in cfg.data.sets)
    )
    count = len(sets.open_source(cfg.data, lambda line: None)) if local else None
    learned = None if count is None else min(count, cfg.data.limit or count) - cfg.watch.hold_out
    numbers = plan.make(cfg, world, learned or 1, None, cfg.train.seed or 0)
    lines = [
        f"# one optimizer step: {numbers.batch} examples = {world} processes x "
        f"{numbers.accumulate} micro-batches x {numbers.micro}",
        "# seed: "
        f"{'one is drawn when the run begins' if cfg.train.seed is None else cfg.train.seed}",
    ]
    if learned is None:
        return [
            *lines,
            f"# the data set {cfg.data.hub} is on the Hub: its size is known when the run begins",
        ]
    warm = (
        f", the first {cfg.optim.warmup} of them warming up"
        if cfg.optim.warmup and cfg.optim.schedule != "constant"
        else ""
    )
    times = numbers.steps * numbers.batch / max(1, learned)
    return [
        *lines,
        f"# records: {count} listed, {cfg.watch.hold_out} held out, {learned} to train on",
        f"# one epoch: {numbers.steps_per_epoch:g} steps; the run: {numbers.steps} steps{warm}, "
        f"each record about {times:.1f} times",
        f"# checkpoints: {math.ceil(numbers.steps / cfg.checkpoint.every)}, of which "
        f"{'all' if cfg.checkpoint.keep is None else cfg.checkpoint.keep} are kept",
    ]
