"""What is seen of a run while it trains: progress, metrics, validation loss, previews.

None of it changes a number.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

from limner.errors import NonFiniteError, Stopped
from limner.progress import open_progress
from limner.protocols import Metrics, NonFiniteStep, State
from limner.storage import checkpoint
from limner.storage.run_folder import RunFolder
from limner.training import sinks
from limner.training.resolve import find_preview_size
from limner.training.setup import Setup
from limner.training.status import StatusFile

# So many validations without a better loss are worth a word.
RISES = 3


def fetch_metrics(setup: Setup, state: State, metrics: list[Metrics]) -> list[dict[str, float]]:
    """Copy metrics of some steps from the device.

    Raises:
        NonFiniteError: with step and examples, when a step was not finite.
    """
    try:
        return setup.engine.fetch_metrics(state, metrics)
    except NonFiniteStep as error:
        names = setup.stream.record_names(error.step)
        saved = checkpoint.list_checkpoints(setup.folder)
        raise NonFiniteError(
            f"step {error.step + 1}: the loss or the gradient is not a finite number; the weights "
            "were not touched by it. "
            f"Records of this step: {', '.join(names)}. Last checkpoint: "
            f"{saved[0].name if saved else 'none'}."
            " Look at these pictures, lower optim.learning_rate, or train in bf16 or float32."
        ) from None


def describe_held_out(losses: Sequence[tuple[int, float]]) -> str:
    """Say the last held-out loss beside the best one before it, and when it has begun to rise.

    Args:
        losses: step and loss of each validation, in that order.
    """
    step, loss = losses[-1]
    text = f"step {step}: held-out loss {loss:.4f}"
    if len(losses) == 1:
        return text
    best_step, best = min(losses[:-1], key=lambda row: row[1])
    text += f" ({best:.4f} at step {best_step})"
    if len(losses) > RISES and loss > best and best_step == losses[-1 - RISES][0]:
        text += (
            f". It has been higher for {RISES} validations: the training pictures may be learned "
            "by heart. Fewer steps, a lower optim.learning_rate or more pictures may help."
        )
    return text


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something is to be done after ``step``: at each interval, and at the last step."""
    return last or step % every == 0


def list_due(setup: Setup, step: int, last: bool) -> list[str]:
    """The looks at the state that are due after ``step``: "validation" and "preview"."""
    preview, plan = setup.config.preview, setup.plan
    preview_every = plan.to_steps(preview.every, preview.every_epochs) or plan.steps
    due = []
    # At step 0 there is what later ones are compared with.
    if setup.validation_entries and is_due(step, setup.config.validation.every, last):
        due.append("validation")
    if preview.prompts and is_due(step, preview_every, last):
        due.append("preview")
    return due


def list_missing(setup: Setup, step: int) -> list[str]:
    """The looks at the state with which a run starts that are due and were not taken: the run
    begins, or was ended in the middle of them."""
    due, folder = list_due(setup, step, step == setup.plan.steps), RunFolder(setup.folder)
    if step == 0:
        return due
    rows = sinks.read_metrics(folder.metrics)
    if not rows and not folder.list_previews():
        # A checkpoint from elsewhere: its looks are there.
        return []
    if any(row["step"] == step and "held_out_loss" in row for row in rows):
        due = [name for name in due if name != "validation"]
    if folder.previews_of_step(step).is_dir():
        due = [name for name in due if name != "preview"]
    return due


class Monitor:
    """Watches one run; the loop calls each method when it is due."""

    def __init__(self, setup: Setup, first_step: int, status: StatusFile):
        self.setup, self.first_step, self.status = setup, first_step, status
        self.pending: list[Metrics] = []  # still on the device
        # Of steps since the last regular row, as the checkpoint and this process know them.
        saved = setup.checkpoint
        self.losses = list(saved.state.unlogged_losses) if saved is not None else []
        self.grad_norm = math.nan  # of the last step that was fetched
        self.learning_rate = 0.0
        self.shown: dict[str, str] = {}  # beside the progress
        self.held_out: list[tuple[int, float]] = []  # step and loss of each validation so far
        self.sinks: sinks.Sinks | None = None
        # Speed is counted from here; validation, previews and saving move the clock.
        self.clock, self.clock_step = time.monotonic(), first_step

    def __enter__(self) -> "Monitor":
        setup = self.setup
        if setup.process.rank == 0:
            self.sinks = sinks.open_sinks(setup.config, setup.folder, self.first_step, setup.report)
            rows = sinks.read_metrics(RunFolder(setup.folder).metrics)
            self.held_out = [
                (row["step"], row["held_out_loss"])
                for row in rows
                if isinstance(row.get("held_out_loss"), float)
            ]
        self.progress = open_progress(
            setup.plan.steps,
            "training",
            "step",
            done=self.first_step,
            silent=setup.process.rank > 0,
        )
        self.clock = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.sinks is not None:
            self.sinks.close()

    def add_step(self, metrics: Metrics, learning_rate: float) -> None:
        """Remember a step's metrics, which stay on the device."""
        self.pending.append(metrics)
        self.learning_rate = learning_rate
        self.progress.update()

    def fetch_losses(self, state: State) -> list[float]:
        """Copy what is pending from the device; return the losses since the last regular row.

        Raises:
            NonFiniteError: when a step was not finite.
        """
        rows = fetch_metrics(self.setup, state, self.pending)
        self.pending = []
        self.losses += [row["loss"] for row in rows]
        if rows:
            self.grad_norm = rows[-1]["grad_norm"]
        return self.losses

    @contextlib.contextmanager
    def timer_paused(self) -> Iterator[None]:
        """Leave the time inside out of images per second: it is not training."""
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began

    def write_metrics(self, state: State, step: int) -> None:
        """Write the mean loss since the last regular row, gradient norm and learning rate of the
        last step, and images per second."""
        losses = self.fetch_losses(state)
        seconds = max(1e-9, time.monotonic() - self.clock)
        speed = (step - self.clock_step) * self.setup.plan.batch_size / seconds
        self.clock, self.clock_step = time.monotonic(), step
        loss = math.fsum(losses) / max(1, len(losses))
        # The row of the last step may come between: a run that is extended has none there.
        if step % self.setup.config.log.every == 0:
            self.losses = []
        values = {
            "loss": loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "images_per_second": speed,
        }
        self.write(step, values)
        self.status.update(step=step, images_per_second=speed)
        self.shown |= {"loss": f"{loss:.4f}", "images/s": f"{speed:.1f}"}
        self.progress.set_postfix(self.shown)

    def look(self, names: Sequence[str], state: State, step: int) -> bool:
        """Validate and draw previews, as ``list_due`` names them; False: a stop came between."""
        with self.timer_paused():
            for name in names:
                if self.setup.process.any(self.setup.stop.asked):
                    return False
                take = self.draw_previews if name == "preview" else self.validate
                if not take(state, step):
                    return False
        return True

    def validate(self, state: State, step: int) -> bool:
        """Write the mean loss over the held-out records, with the weights that will be the result.

        Returns:
            False where a stop came between: then nothing is written.
        """
        setup, process = self.setup, self.setup.process
        loss, count = 0.0, 0.0
        batches = setup.stream.validation_batches(
            setup.validation_entries,
            setup.config.validation.timesteps,
            process.rank,
            process.world_size,
        )
        for rows, batch in batches:
            # All leave at the same batch: the losses may be one program of all processes.
            if process.any(setup.stop.asked):
                return False
            losses = setup.engine.losses(state, batch, average=True)[:rows]
            loss += math.fsum(losses.tolist())
            count += rows
        if process.any(setup.stop.asked):
            return False
        loss, count = process.total([loss, count])
        self.write(step, {"held_out_loss": loss / count})
        self.held_out.append((step, loss / count))
        setup.report(describe_held_out(self.held_out))
        self.shown["held-out"] = f"{loss / count:.4f}"
        self.progress.set_postfix(self.shown)
        return True

    def draw_previews(self, state: State, step: int) -> bool:
        """Draw the prompts of the recipe, with fixed seeds.

        Returns:
            False where a stop came between: then nothing is written.
        """
        setup, preview = self.setup, self.setup.config.preview
        prompts = [prompt for prompt in preview.prompts for _ in range(preview.count)]
        seeds = [setup.plan.seed + k for _ in preview.prompts for k in range(preview.count)]
        # The loaders use the same tokenizers, which are not safe in threads.
        with setup.stream.features.busy, contextlib.suppress(Stopped):
            pictures = setup.engine.draw_previews(
                state,
                prompts,
                seeds,
                setup.stop.check,
                steps=preview.steps,
                guidance_scale=preview.guidance_scale,
                size=find_preview_size(setup.config.data),
            )
        if setup.process.any(setup.stop.asked):
            return False
        if self.sinks is not None:
            self.sinks.write_images(step, "validation", list(zip(prompts, pictures, strict=True)))
            folder = RunFolder(setup.folder).previews_of_step(step, "validation")
            setup.report(f"step {step}: previews in {folder}")
        setup.process.barrier()
        return True

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write a row to all sinks, in the first process."""
        if self.sinks is not None:
            self.sinks.write(step, values)
