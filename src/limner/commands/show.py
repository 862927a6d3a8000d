"""``limner show``: every setting, the batch arithmetic and the steps; no weight and no picture is
read."""

import math
import os

from limner.config import toml
from limner.config.rules import describe_idle_settings
from limner.config.schema import Config, DataSettings
from limner.config.toml import format_value
from limner.data import mixture
from limner.json_types import Plain
from limner.training.batch_plan import count_held_out, make_plan
from limner.training.resolve import resolve


def format_settings(config: Config) -> str:
    """The settings as TOML, then batch arithmetic for the number of processes that this command was
    launched with."""
    config, _ = resolve(config)
    plain = toml.to_plain(config)
    lines = [f"run = {format_value(plain.pop('run'))}"]
    for section, values in plain.items():
        lines += ["", f"[{section}]", *format_section(values)]
        tables = {name: v for name, v in values.items() if isinstance(v, dict)}
        for name, table in tables.items():
            lines += ["", f"[{section}.{name}]", *format_section(table)]
    remarks = [f"# {line}" for line in describe_idle_settings(config)]
    return "\n".join([*lines, "", *format_arithmetic(config), *remarks])


def format_section(values: Plain) -> list[str]:
    """Settings that have a value, then the names of those that have none; tables are left out."""
    given = [
        f"{name} = {format_value(v)}"
        for name, v in values.items()
        if v is not None and not isinstance(v, dict)
    ]
    return given + [f"# {name} is not set" for name, v in values.items() if v is None]


def count_records(data: DataSettings) -> int | None:
    """How many records there are; None where that is known on the Hub only."""
    folders = [one.folder for one in data.sets] or [data.folder]
    if None in folders:
        return None
    return len(mixture.open_source(data, lambda line: None))


def format_arithmetic(config: Config) -> list[str]:
    """How the global batch is divided, and what an epoch comes to."""
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    seed = config.train.seed
    listed = count_records(config.data)
    records, hold_out = None, 0
    if listed is not None:
        used = min(listed, config.data.max_records or listed)
        hold_out = count_held_out(config.validation.hold_out, used)
        records = used - hold_out
    plan = make_plan(config, processes, records or 1, None, seed or 0)
    lines = [
        f"# one optimizer step: {plan.batch_size} examples = {processes} processes x "
        f"{plan.accumulation_steps} micro-batches x {plan.micro_batch_size}",
        f"# seed: {'one is drawn when the run begins' if seed is None else seed}",
    ]
    if records is None:
        return [
            *lines,
            f"# the data set {config.data.hub} is on the Hub: its size is known when the run "
            "begins",
        ]
    warm_up = ""
    if config.optim.warmup and config.optim.schedule != "constant":
        warm_up = f", the first {config.optim.warmup} of them warming up"
    times = plan.steps * plan.batch_size / max(1, records)
    checkpoints = math.ceil(plan.steps / config.checkpoint.every)
    keep = config.checkpoint.keep
    return [
        *lines,
        f"# records: {listed} listed, {hold_out} held out, {records} to train on",
        f"# one epoch: {plan.steps_per_epoch:g} steps; the run: {plan.steps} steps{warm_up}, each "
        f"record about {times:.1f} times",
        f"# checkpoints: {checkpoints}, of which {'all' if keep is None else keep} are kept",
    ]
