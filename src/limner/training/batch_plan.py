"""The arithmetic of a run: global batch, micro-batches, processes, steps and epochs."""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from limner.config.schema import Config, TrainSettings
from limner.data.order import Order
from limner.errors import InputError, say_count
from limner.json_types import Plain
from limner.storage.run_state import RunState


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
    # Optimizer steps in which every record is seen once. Without buckets a batch may span two
    # epochs.
    steps_per_epoch: float

    def to_steps(self, steps: int | None, epochs: float | None) -> int | None:
        """An interval in optimizer steps, given in steps or in epochs."""
        return steps if epochs is None else max(1, math.ceil(epochs * self.steps_per_epoch))


def make_plan(
    config: Config,
    world: int,
    records: int,
    saved: RunState | None,
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
    batch_size = choose_batch_size(config.train, saved, world * devices)
    if batch_size % world:
        raise InputError(
            f"a global batch of {batch_size} cannot be divided among {world} processes; use a "
            "number of processes that divides it"
        )
    share = batch_size // world
    micro = min((config.train.micro_batch_size or share) * devices, share)
    if share % micro:
        raise InputError(
            f"train.micro_batch_size: each of {world} processes has {share} of the {batch_size} "
            f"examples of a step, which micro-batches of {micro} do not divide; use a divisor of "
            f"{share}"
        )
    steps, steps_per_epoch = count_steps(config.train.epochs or 0, records, batch_size, order)
    return BatchPlan(
        batch_size=batch_size,
        micro_batch_size=micro,
        accumulation_steps=share // micro,
        world_size=world,
        steps=steps if config.train.steps is None else config.train.steps,
        seed=seed,
        records=records,
        steps_per_epoch=steps_per_epoch,
    )


def count_held_out(hold_out: float, records: int) -> int:
    """How many records are held out; of a share at least one.

    Args:
        hold_out: ``validation.hold_out``: a number of records, or a share below 1.

    Raises:
        InputError: when none is left to train on.
    """
    count = int(hold_out) if hold_out >= 1 or hold_out == 0 else max(1, round(hold_out * records))
    if count >= records:
        raise InputError(
            f"validation.hold_out: {say_count(count, 'record is', 'records are')} held out of "
            f"{records}, so that none is left to train on. Hold out fewer, or a share: "
            "validation.hold_out=0.1"
        )
    return count


def count_steps(
    epochs: float, records: int, batch_size: int, order: Callable[[int], Order] | None
) -> tuple[int, float]:
    """Optimizer steps of so many epochs, and of one."""
    if order is None:
        return max(1, math.ceil(epochs * records / batch_size)), records / batch_size
    return order(batch_size).steps(epochs), order(batch_size).steps_per_epoch


def choose_batch_size(train: TrainSettings, saved: RunState | None, all_devices: int) -> int:
    """The global batch that the settings ask for; on resume that of the checkpoint.

    Raises:
        InputError: when another batch or seed than the checkpoint's is asked for.
    """
    asked = train.batch_size
    if asked is None:
        asked = (train.micro_batch_size or 1) * (train.accumulation_steps or 1) * all_devices
    if saved is None:
        return asked
    if asked != saved.batch_size and not is_asked_as_before(train, saved.config["train"]):
        raise InputError(
            f"train.batch_size: this run was begun with a global batch of {saved.batch_size}, "
            f"{asked} is asked for. Keep {saved.batch_size}, or begin a new run in another folder."
        )
    if train.seed is not None and train.seed != saved.seed:
        raise InputError(
            f"train.seed: this run was begun with seed {saved.seed}, {train.seed} is asked for. "
            f"Keep {saved.seed} or leave it out, or begin a new run in another folder."
        )
    return saved.batch_size


def is_asked_as_before(train: TrainSettings, before: Plain) -> bool:
    """Whether the batch differs only because the number of processes does: micro-batches and
    accumulation are asked for as before, and no global batch is."""
    now = (train.batch_size, train.micro_batch_size, train.accumulation_steps or 1)
    then = (before["batch_size"], before["micro_batch_size"], before["accumulation_steps"] or 1)
    return now == then and train.batch_size is None


def draw_seed() -> int:
    """A seed for a run that was given none."""
    return secrets.randbelow(2**31)
