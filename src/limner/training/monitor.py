"""What is seen of a run while it trains: the progress bar, metrics, held-out loss, previews. None
of it changes a number."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from limner.errors import NonFiniteError
from limner.protocols import NonFiniteStep, State
from limner.storage import checkpoint
from limner.training import sinks
from limner.training.setup import Setup


def fetch_metrics(setup: Setup, state: State, metrics: list[Any]) -> list[dict[str, float]]:
    """Fetch metrics; a fault is raised as ``NonFiniteError`` with its step and its examples."""
    try:
        return setup.engine.fetch_metrics(state, metrics)
    except NonFiniteStep as fault:
        names = setup.stream.record_names(fault.step)
        there = checkpoint.list_checkpoints(setup.folder)
        raise NonFiniteError(
            f"step {fault.step + 1}: the loss or the gradient is not a finite number; the weights "
            "were not touched by it. "
            f"Examples of this step: {', '.join(names)}. Last checkpoint: "
            f"{there[0].name if there else 'none'}."
            " Look at these pictures, lower optim.learning_rate, or train in bf16 or float32."
        ) from None


@dataclass
class Monitor:
    """Watches one run; each of its methods is called when it is due."""

    setup: Setup
    first_step: int
    pending: list[Any] = field(default_factory=list)
    learning_rate: float = 0.0

    def __enter__(self) -> "Monitor":
        setup, config = self.setup, self.setup.config
        self.sink = (
            sinks.open_sinks(config, setup.folder, self.first_step, setup.report)
            if setup.process.rank == 0
            else None
        )
        self.bar = tqdm(
            total=setup.plan.steps,
            initial=self.first_step,
            desc="training",
            unit="step",
            disable=True if setup.process.rank else None,
            dynamic_ncols=True,
        )
        self.clock, self.at = time.monotonic(), self.first_step
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.sink is not None:
            self.sink.close()

    def add_step(self, metrics: Any, rate: float) -> None:
        self.pending.append(metrics)
        self.learning_rate = rate
        self.bar.update()

    @contextlib.contextmanager
    def timer_paused(self) -> Iterator[None]:
        """What takes time inside is not training, and does not count in images per second."""
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def write_metrics(self, state: State, step: int) -> None:
        """Mean loss since the last time, gradient norm and learning rate of the last step, and
        images per second."""
        rows, self.pending = fetch_metrics(self.setup, state, self.pending), []
        speed = (
            (step - self.at) * self.setup.plan.batch_size / max(1e-9, time.monotonic() - self.clock)
        )
        self.clock, self.at = time.monotonic(), step
        loss = math.fsum(r["loss"] for r in rows) / max(1, len(rows))
        self.write(
            step,
            {
                "loss": loss,
                "learning_rate": self.learning_rate,
                "grad_norm": rows[-1]["grad_norm"] if rows else math.nan,
                "images_per_second": speed,
            },
        )
        self.bar.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"})

    def validate(self, state: State, step: int) -> None:
        """Mean loss over the held-out records, with the weights that will be the result."""
        setup, sums = self.setup, [0.0, 0.0]
        for count, batch in setup.stream.validation_batches(
            setup.validation_entries,
            setup.config.validation.timesteps,
            setup.process.rank,
            setup.process.world_size,
        ):
            losses = setup.engine.losses(state, batch, average=True)[:count]
            sums = [sums[0] + math.fsum(losses.tolist()), sums[1] + count]
        sums = setup.process.total(sums)
        self.write(step, {"held_out_loss": sums[0] / sums[1]})

    def draw_previews(self, state: State, step: int) -> None:
        """Pictures for the prompts of the recipe, with fixed seeds."""
        p, setup = self.setup.config.preview, self.setup
        prompts = [prompt for prompt in p.prompts for _ in range(p.count)]
        seeds = [setup.plan.seed + k for _ in p.prompts for k in range(p.count)]
        size = setup.config.data.size - setup.config.data.size % 8  # what stock pipelines draw
        with setup.stream.features.busy:  # the loaders use the same tokenizer
            made = setup.engine.draw_previews(
                state, prompts, seeds, steps=p.steps, guidance_scale=p.guidance_scale, size=size
            )
        if self.sink is not None:
            self.sink.images(step, "validation", list(zip(prompts, made, strict=True)))
        setup.process.barrier()

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.sink is not None:
            self.sink.write(step, values)
