"""Where a run's metrics and pictures go: files in its folder always, trackers on request.

No sink may stop training, change it, or store a secret.
"""

import importlib.util
import json
import math
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.json_types import Plain, parse_json
from limner.redaction import redact
from limner.storage import atomic
from limner.storage.run_folder import METRICS_FILE, TRACKER_ID_FILE, RunFolder

# Tracker -> the packages that provide it, any of which is enough.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
}
Pictures = Sequence[tuple[str, np.ndarray]]  # caption, uint8 [height, width, 3]


class Sink(Protocol):
    """A destination of metrics and pictures."""

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Record the values of one step."""
        ...

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Record pictures with their captions; ``name`` says what they are, e.g. ``validation``."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def list_installed_sinks() -> tuple[str, ...]:
    """List the trackers whose packages are installed, without importing them."""
    return tuple(name for name, packages in PACKAGES.items() if any(map(is_installed, packages)))


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    # find_spec raises for a loaded module without a spec.
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def require_packages(names: Iterable[str]) -> None:
    """Check that the packages of these trackers are installed.

    Raises:
        InputError: naming the command that installs what is missing.
    """
    installed = list_installed_sinks()
    missing = [name for name in names if name not in installed]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise InputError(
            f"log.to: {', '.join(missing)} is not installed. Run `pip install {packages}`, or "
            "leave it out of log.to (--report_to)."
        )


def open_sinks(
    config: Config, run: Path, resumed_step: int, report: Callable[[str], None] = print
) -> "Sinks":
    """Open all sinks of a run, in its first process.

    Rows of steps after ``resumed_step``, which earlier attempts wrote, are dropped.

    Args:
        resumed_step: step of the checkpoint from which training resumes; 0 for a fresh start.

    Raises:
        InputError: when a tracker's package is not installed.
        DiskError: when the run's folder cannot be written to.
    """
    require_packages(config.log.to)
    sinks = Sinks(RunFiles(run, resumed_step), report)
    trackers: dict[str, Callable[[Config, Path, int], Sink]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "comet_ml": Comet,
    }
    for name in config.log.to:
        sinks.add(
            name,
            partial(trackers[name], config, RunFolder(run).logs(config.log.folder), resumed_step),
        )
    return sinks


class Sinks:
    """The run's files and its trackers as one sink.

    A tracker that fails is reported once and dropped; files that fail are tried again.
    """

    def __init__(self, files: Sink, report: Callable[[str], None]) -> None:
        self.files = files
        self.report = report
        self.trackers: dict[str, Sink] = {}
        self.files_failed = False

    def add(self, name: str, open_tracker: Callable[[], Sink]) -> None:
        """Open a tracker; one that fails is left out."""
        try:
            self.trackers[name] = open_tracker()
        except Exception as error:
            self._drop(name, error)

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Record the values of one step in every sink."""
        self._call_each(lambda sink: sink.write(step, values))

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Record pictures in every sink, with captions that hold no secret."""
        redacted = [(redact(caption), np.asarray(array)) for caption, array in pictures]
        self._call_each(lambda sink: sink.write_images(step, name, redacted))

    def close(self) -> None:
        """Close every sink."""
        self._call_each(lambda sink: sink.close())
        self.trackers.clear()

    def _call_each(self, call: Callable[[Sink], None]) -> None:
        try:
            call(self.files)
        except Exception as error:
            if not self.files_failed:
                self.files_failed = True
                self.report(
                    "metrics or previews could not be written, training goes on: "
                    f"{redact(str(error))}"
                )
        for name, tracker in list(self.trackers.items()):
            # Trackers raise whatever their network and libraries raise.
            try:
                call(tracker)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.trackers.pop(name, None)
        self.report(
            f"{name} failed and is left out from now on; {METRICS_FILE} has all numbers: "
            f"{redact(f'{type(error).__name__}: {error}')}"
        )


class RunFiles:
    """``metrics.jsonl``, one JSON object per line, and folders like ``previews/step-000500``.

    Rows that a full disk refused are written later.
    """

    def __init__(self, run: Path, resumed_step: int) -> None:
        self.folder = RunFolder(run)
        self.path = self.folder.metrics
        rows = _read_rows(self.path) if resumed_step else []
        lines = [line for line, row in rows if row["step"] <= resumed_step]
        atomic.write_text(self.path, "".join(f"{line}\n" for line in lines))
        self.size = self.path.stat().st_size  # bytes of whole rows
        self.waiting = b""  # rows that are not on the disk yet

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append a row, after those that could not be written before."""
        row = {"step": step} | {name: _to_json_number(value) for name, value in values.items()}
        self.waiting += f"{json.dumps(row, allow_nan=False)}\n".encode()
        self._flush()

    def _flush(self) -> None:
        with atomic.disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            with open(descriptor, "r+b") as file:
                # After the last whole row: an earlier failure may have left half of one.
                start = file.seek(min(self.size, os.fstat(descriptor).st_size))
                file.write(self.waiting)
                file.truncate()
        self.size = start + len(self.waiting)
        self.waiting = b""

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Write numbered PNG files into a folder that is whole or absent."""
        with atomic.write_folder(self.folder.previews_of_step(step, name)) as folder:
            for number, (caption, array) in enumerate(pictures):
                text = PngImagePlugin.PngInfo()
                text.add_itxt("caption", caption)
                Image.fromarray(array).save(folder / f"{number:02d}.png", pnginfo=text)

    def close(self) -> None:
        """Write the rows that are left."""
        if self.waiting:
            self._flush()


def read_metrics(path: Path) -> list[Plain]:
    """Read the rows of a ``metrics.jsonl``, without a last line that is not whole."""
    return [row for _, row in _read_rows(path)]


def _read_rows(path: Path) -> list[tuple[str, Plain]]:
    """Read the whole lines of a ``metrics.jsonl``, each as text and as a row."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    # After the last line break there is nothing, or what a killed process wrote of a line.
    for line in lines[:-1]:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((line, row))
    return rows


def _to_json_number(value: object) -> object:
    """Return a plain number; NaN and infinity, which JSON lacks, become None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flatten_config(config: Config) -> Plain:
    """Return the config as trackers take it: flat, without secrets."""
    return toml.flatten(redact(toml.to_plain(config)))


def _get_run_id(folder: Path, resumed_step: int) -> str:
    """Return the name of this run at remote trackers: the same on resume, new at a fresh start."""
    path = folder / TRACKER_ID_FILE
    if not (resumed_step and path.exists()):
        # uuid4 draws from the operating system, and so moves no seeded generator.
        atomic.write_text(path, uuid.uuid4().hex)
    return path.read_text().strip()


class TensorBoard:
    """Event files; TensorBoard itself hides rows of steps after the resumed one."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard.summary import hparams
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
            from tensorboardX.summary import hparams  # type: ignore[no-redef]
        # Its thread's error comes back from the next call, and is told in a line.
        self.previous_hook = threading.excepthook
        threading.excepthook = self.pass_over
        purge_step = resumed_step + 1 if resumed_step else 0
        self.writer = SummaryWriter(str(folder / config.log.project), purge_step=purge_step)
        settings = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in _flatten_config(config).items()
        }
        for summary in hparams(settings, {}):
            self.writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self.writer.flush()

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Add a scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Add the pictures as one batch."""
        images = np.stack([array for _, array in pictures])
        self.writer.add_images(name, images, step, dataformats="NHWC")
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()
        threading.excepthook = self.previous_hook

    def pass_over(self, arguments: threading.ExceptHookArgs) -> None:
        """Say nothing of an error in a thread of TensorBoard's own."""
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            self.previous_hook(arguments)


class WeightsAndBiases:
    """A run on Weights & Biases."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=config.log.project,
            dir=str(folder),
            id=_get_run_id(folder, resumed_step),
            resume="allow",
            config=_flatten_config(config),
            # The metadata would hold the command line, and with it a token given as a flag.
            settings=wandb.Settings(x_disable_meta=True),
        )
        # The step is logged as a value: the counter of wandb refuses to go back on resume.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Log the values with their step."""
        self.run.log({**values, "step": step})

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Log the pictures with numbered captions."""
        images = [
            self.wandb.Image(array, caption=f"{i}: {caption}")
            for i, (caption, array) in enumerate(pictures)
        ]
        self.run.log({name: images, "step": step})

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Comet:
    """An experiment on Comet."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        import comet_ml

        # By default it sends the command line, and with it a token given as a flag.
        private = comet_ml.ExperimentConfig(parse_args=False, log_env_details=False)
        self.experiment = comet_ml.start(
            project_name=config.log.project,
            experiment_key=_get_run_id(folder, resumed_step),
            mode="get_or_create",
            experiment_config=private,
        )
        self.experiment.log_parameters(_flatten_config(config))

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Log the values of one step."""
        self.experiment.log_metrics(dict(values), step=step)

    def write_images(self, step: int, name: str, pictures: Pictures) -> None:
        """Log the pictures, each named by number and caption."""
        for number, (caption, array) in enumerate(pictures):
            self.experiment.log_image(array, name=f"{name} {number}: {caption}", step=step)

    def close(self) -> None:
        """End the experiment."""
        self.experiment.end()
