"""What is seen of a run while it trains: the progress bar, metrics, held-out loss, previews. None
of it changes a number."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from limner import checkpoint, log
from limner.engine import FirstFault, State
from limner.faults import NonFinite

if TYPE_CHECKING:
    from limner.training import Run


def fetch(job: "Run", state: State, metrics: list[Any]) -> list[dict[str, float]]:
    """Fetch metrics; a fault is raised as ``NonFinite`` with its step and its examples."""
    try:
        return job.engine.fetch(state, metrics)
    except FirstFault as fault:
        names = job.stream.names(fault.step)
        there = checkpoint.listed(job.folder)
        raise NonFinite(
            f"step {fault.step + 1}: the loss or the gradient is not a finite number; the weights "
            "were not touched by it. "
            f"Examples of this step: {', '.join(names)}. Last checkpoint: "
            f"{there[0].name if there else 'none'}."
            " Look at these pictures, lower optim.learning_rate, or train in bf16 or float32."
        ) from None


@dataclass
class Watcher:
    """Watches one run; each of its methods is called when it is due."""

    job: "Run"
    begun: int
    pending: list[Any] = field(default_factory=list)
    rate: float = 0.0

    def __enter__(self) -> "Watcher":
        job, cfg = self.job, self.job.cfg
        self.sink = (
            log.open_sinks(cfg, job.folder, self.begun, job.tell) if job.process.rank == 0 else None
        )
        self.bar = tqdm(
            total=job.plan.steps,
            initial=self.begun,
            desc="training",
            unit="step",
            disable=True if job.process.rank else None,
            dynamic_ncols=True,
        )
        self.clock, self.at = time.monotonic(), self.begun
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.sink is not None:
            self.sink.close()

    def add(self, metrics: Any, rate: float) -> None:
        self.pending.append(metrics)
        self.rate = rate
        self.bar.update()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What takes time inside is not training, and does not count in images per second."""
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def metrics(self, state: State, step: int) -> None:
        """Mean loss since the last time, gradient norm and learning rate of the last step, and
        images per second."""
        rows, self.pending = fetch(self.job, state, self.pending), []
        speed = (step - self.at) * self.job.plan.batch / max(1e-9, time.monotonic() - self.clock)
        self.clock, self.at = time.monotonic(), step
        loss = math.fsum(r["loss"] for r in rows) / max(1, len(rows))
        self.write(
            step,
            {
                "loss": loss,
                "learning_rate": self.rate,
                "grad_norm": rows[-1]["grad_norm"] if rows else math.nan,
                "images_per_second": speed,
            },
        )
        self.bar.set_postfix({"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"})

    def held_out(self, state: State, step: int) -> None:
        """Mean loss over the held-out records, with the weights that will be the result."""
        job, sums = self.job, [0.0, 0.0]
        for count, batch in job.stream.held_out(
            job.held_out, job.cfg.watch.timesteps, job.process.rank, job.process.world
        ):
            losses = job.engine.losses(state, batch, average=True)[:count]
            sums = [sums[0] + math.fsum(losses.tolist()), sums[1] + count]
        sums = job.process.total(sums)
        self.write(step, {"held_out_loss": sums[0] / sums[1]})

    def preview(self, state: State, step: int) -> None:
        """Pictures for the prompts of the recipe, with fixed seeds."""
        p, job = self.job.cfg.preview, self.job
        prompts = [prompt for prompt in p.prompts for _ in range(p.count)]
        seeds = [job.plan.seed + k for _ in p.prompts for k in range(p.count)]
        size = job.cfg.data.size - job.cfg.data.size % 8  # what stock pipelines draw
        with job.stream.encoded.busy:  # the loaders use the same tokenizer
            made = job.engine.pictures(
                state, prompts, seeds, steps=p.steps, guidance_scale=p.guidance_scale, size=size
            )
        if self.sink is not None:
            self.sink.images(step, "validation", list(zip(prompts, made, strict=True)))
        job.process.barrier()

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.sink is not None:
            self.sink.write(step, values)
