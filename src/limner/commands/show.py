"""What a recipe comes to, in words: every setting, the batch arithmetic and the steps; no weight
and no picture is read."""

import math
import os

from limner.config import rules, toml
from limner.config.schema import Config
from limner.config.toml import format_value
from limner.data import mixture
from limner.errors import InputError
from limner.families import FAMILIES
from limner.training import batch_plan


def format_settings(config: Config) -> str:
    """The resolved settings as TOML, then batch arithmetic for the number of processes that this
    command was launched with."""
    rules.check_config(config)
    if config.model.family not in FAMILIES:
        raise InputError(
            f"model.family: {config.model.family!r} is not one of {', '.join(FAMILIES)}"
        )
    raw = toml.to_plain(config)
    lines = [f"run = {format_value(raw.pop('run'))}"]
    for section, values in raw.items():
        lines += [
            "",
            f"[{section}]",
            *(
                f"{name} = {format_value(value)}"
                for name, value in values.items()
                if value is not None
            ),
        ]
        lines += [f"# {name} is not set" for name, value in values.items() if value is None]
    return "\n".join([*lines, "", *format_arithmetic(config)])


def format_arithmetic(config: Config) -> list[str]:
    """How the global batch is divided, and what an epoch comes to."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    local = config.data.folder is not None or (
        config.data.sets and all(one.folder is not None for one in config.data.sets)
    )
    count = len(mixture.open_source(config.data, lambda line: None)) if local else None
    learned = (
        None
        if count is None
        else min(count, config.data.max_records or count) - config.validation.hold_out
    )
    numbers = batch_plan.make_plan(config, world, learned or 1, None, config.train.seed or 0)
    lines = [
        f"# one optimizer step: {numbers.batch_size} examples = {world} processes x "
        f"{numbers.accumulation_steps} micro-batches x {numbers.micro_batch_size}",
        "# seed: "
        f"{'one is drawn when the run begins' if config.train.seed is None else config.train.seed}",
    ]
    if learned is None:
        return [
            *lines,
            f"# the data set {config.data.hub} is on the Hub: its size is known when the run "
            "begins",
        ]
    warm = (
        f", the first {config.optim.warmup} of them warming up"
        if config.optim.warmup and config.optim.schedule != "constant"
        else ""
    )
    times = numbers.steps * numbers.batch_size / max(1, learned)
    return [
        *lines,
        f"# records: {count} listed, {config.validation.hold_out} held out, {learned} to train on",
        f"# one epoch: {numbers.steps_per_epoch:g} steps; the run: {numbers.steps} steps{warm}, "
        f"each record about {times:.1f} times",
        f"# checkpoints: {math.ceil(numbers.steps / config.checkpoint.every)}, of which "
        f"{'all' if config.checkpoint.keep is None else config.checkpoint.keep} are kept",
    ]
