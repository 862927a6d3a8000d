"""The arithmetic of a run: global batch, micro-batches, processes, steps and epochs."""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limner.config.schema import Config
from limner.data.order import Order
from limner.errors import InputError


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of a run: global batch, micro-batch per device, micro-batches per step,
    processes, optimizer steps, seed."""

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    steps: int
    seed: int
    records: int
    # optimizer steps in which every record is seen once; without buckets a batch may span two
    # epochs
    steps_per_epoch: float

    def to_steps(self, steps: int | None, epochs: float | None) -> int | None:
        """An interval in optimizer steps, given in steps or in epochs."""
        return steps if epochs is None else max(1, math.ceil(epochs * self.steps_per_epoch))


def make_plan(
    config: Config,
    world: int,
    records: int,
    saved: dict[str, Any] | None,
    seed: int,
    order: Callable[[int], Order] | None = None,
    devices: int = 1,
) -> BatchPlan:
    """Divide the global batch among processes and micro-batches; on resume the checkpoint's global
    batch and seed hold.

    Args:
        devices: of each process; ``train.micro_batch_size`` is what one of them holds.
        order: the order of the run for a global batch; None, where no picture has been looked at:
            as many batches as hold the records.

    Raises:
        InputError: when it does not divide, or when the recipe asks for another batch or seed than
            the checkpoint's.
    """
    t = config.train
    batch = (
        t.batch_size
        if t.batch_size is not None
        else (t.micro_batch_size or 1) * (t.accumulation_steps or 1) * world * devices
    )
    if saved is not None:
        before = saved["config"]["train"]
        as_before = (t.batch_size, t.micro_batch_size, t.accumulation_steps or 1) == (
            None,
            before["micro_batch_size"],
            before["accumulation_steps"] or 1,
        ) and before["batch_size"] is None
        if (
            batch != saved["batch"] and not as_before
        ):  # asked for as before, it is another only because the number of processes is
            begun = (
                f"this run was begun with a global batch of {saved['batch']}, {batch} is asked for"
            )
            raise InputError(
                f"train.batch_size: {begun}. Keep {saved['batch']}, or begin a new run in another "
                "folder."
            )
        batch = saved["batch"]
        if t.seed is not None and t.seed != saved["seed"]:
            begun = f"this run was begun with seed {saved['seed']}, {t.seed} is asked for"
            raise InputError(
                f"train.seed: {begun}. Keep {saved['seed']} or leave it out, or begin a new run "
                "in another folder."
            )
    if batch % world:
        raise InputError(
            f"a global batch of {batch} cannot be divided among {world} processes; use a number "
            "of processes that divides it"
        )
    share = batch // world
    micro = min((t.micro_batch_size or share) * devices, share)
    if share % micro:
        each = f"each of {world} processes has {share} of the {batch} examples of a step"
        raise InputError(
            f"train.micro_batch_size: {each}, which micro-batches of {micro} do not divide; use a "
            "divisor of "
            f"{share}"
        )
    made = order(batch) if order is not None else None
    per_epoch = records / batch if made is None else made.steps_per_epoch
    asked = (
        max(1, math.ceil((t.epochs or 0) * records / batch))
        if made is None
        else made.steps(t.epochs or 0)
    )
    return BatchPlan(
        batch,
        micro,
        share // micro,
        world,
        asked if t.steps is None else t.steps,
        seed,
        records,
        per_epoch,
    )


def draw_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(2**31)
