"""What is said when a training begins: what learns, from what, how long, on what, and where."""

import limner
from limner.errors import say_count
from limner.training.setup import Setup

PRECISIONS = {"no": "float32", "fp16": "fp16 autocast", "bf16": "bf16 autocast"}


def announce_run(setup: Setup, trained: int) -> None:
    """Report the head of a run, in five lines.

    Args:
        trained: how many numbers learn.
    """
    for line in describe_run(setup, trained):
        setup.report(line)


def describe_run(setup: Setup, trained: int) -> list[str]:
    """Return the lines of the head; see ``announce_run``."""
    config, plan, process = setup.config, setup.plan, setup.process
    network = setup.family.network.component
    what = f"all of its {network}" if config.adapter.kind == "full" else "a LoRA"
    if config.adapter.kind == "lora":
        what += f" of rank {config.adapter.rank} on its {network}"
    if config.adapter.text_encoders:
        what += " and text encoders"
    held_out = f", {len(setup.validation_entries)} held out" if setup.validation_entries else ""
    epochs = plan.steps / plan.steps_per_epoch
    processes = f" x {plan.world_size} processes" if plan.world_size > 1 else ""
    cores = f" x {process.device_count} devices" if process.device_count > 1 else ""
    return [
        f"model: {setup.base.name} ({setup.family.name}); {what} learns, {trained:,} numbers",
        f"data: {say_count(len(setup.stream.entries), 'record', 'records')} to train on{held_out}; "
        f"one epoch is {plan.steps_per_epoch:g} step{'' if plan.steps_per_epoch == 1 else 's'}",
        f"steps: {plan.steps:,} of {plan.batch_size} examples (micro-batches of "
        f"{plan.micro_batch_size}{cores} x {plan.accumulation_steps}{processes}), "
        f"{epochs:.3g} epochs; a checkpoint every {config.checkpoint.every}",
        f"device: {process.device_name}, {PRECISIONS[process.precision]}",
        f"folder: {setup.folder}, by limner {limner.__version__}",
    ]
