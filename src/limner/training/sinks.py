"""What is written down about a run, and for whom: metrics.jsonl always, other sinks where asked;
none may stop training, change it or keep a secret."""

import importlib.util
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.storage import atomic
from limner.storage.run_folder import METRICS_FILE

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet_ml",),
}
SECRET_KEY = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
SECRET_TEXT = re.compile(r"hf_[A-Za-z0-9]{20,}")
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY")
HIDDEN = "[redacted]"
Pictures = Sequence[tuple[str, np.ndarray]]  # caption, uint8 [height, width, 3]


class Sink(Protocol):
    """Somewhere that numbers and pictures go."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the values of one step."""
        ...

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        """Record pictures with their captions; ``name`` says what they are, e.g. ``validation``."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def redact(value: Any) -> Any:
    """The same plain value without secrets: tokens by the name of their key, by their form, or
    because the environment holds them."""
    if isinstance(value, Mapping):
        return {
            redact(k): HIDDEN
            if SECRET_KEY.search(str(k)) and v not in (None, "", True, False)
            else redact(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if not isinstance(value, str):
        return value
    known = [secret for name in SECRET_VARIABLES if (secret := os.environ.get(name, "").strip())]
    for secret in known:
        value = (
            HIDDEN
            if value == secret
            else value.replace(secret, HIDDEN)
            if len(secret) >= 8
            else value
        )
    return SECRET_TEXT.sub(HIDDEN, value)


def installed_sinks() -> tuple[str, ...]:
    """The sinks whose packages are there, without importing them."""
    return tuple(name for name, packages in PACKAGES.items() if any(map(_is_there, packages)))


def _is_there(package: str) -> bool:
    return (
        sys.modules[package] is not None
        if package in sys.modules
        else importlib.util.find_spec(package) is not None
    )


def require_packages(names: Iterable[str]) -> None:
    """Refuse sinks whose package is missing.

    Raises:
        InputError: naming the command that installs it.
    """
    if missing := [name for name in names if name not in installed_sinks()]:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise InputError(
            f"log.to: {', '.join(missing)} is not installed. Run `pip install {packages}`, or "
            "leave it out of log.to (--report_to)."
        )


def open_sinks(
    config: Config, run: Path, resumed_step: int, report: Callable[[str], None] = print
) -> "Sinks":
    """All sinks of a run, in its first process; what earlier attempts wrote of steps after
    ``resumed_step`` is dropped.

    Args:
        resumed_step: of the checkpoint that training goes on from; 0 for a fresh start.

    Raises:
        InputError: when a sink's package is not installed.
        DiskError: when the run's folder cannot be written to.
    """
    require_packages(config.log.to)
    sinks = Sinks(RunFiles(run, resumed_step), report)
    openers: dict[str, Callable[[Config, Path, int], Sink]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "comet_ml": Comet,
    }
    for name in config.log.to:
        sinks.add(name, partial(openers[name], config, run / config.log.folder, resumed_step))
    return sinks


class Sinks:
    """The files of the run and every other sink, as one; a sink that fails is told of once and
    dropped, the files are tried again."""

    def __init__(self, files: Sink, report: Callable[[str], None]) -> None:
        self.files, self.report = files, report
        self.others: dict[str, Sink] = {}
        self.files_failed = False

    def add(self, name: str, opener: Callable[[], Sink]) -> None:
        try:
            self.others[name] = opener()
        except Exception as error:
            self._drop(name, error)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._each(lambda sink: sink.write(step, values))

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        shown = [(redact(caption), np.asarray(array)) for caption, array in pictures]
        self._each(lambda sink: sink.images(step, name, shown))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self.others.clear()

    def _each(self, act: Callable[[Sink], None]) -> None:
        try:
            act(self.files)
        except Exception as error:
            if not self.files_failed:
                self.files_failed = True
                self.report(
                    "metrics or previews could not be written, training goes on: "
                    f"{redact(str(error))}"
                )
        for name, sink in list(self.others.items()):
            try:
                act(sink)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.others.pop(name, None)
        self.report(
            f"{name} failed and is left out from now on; {METRICS_FILE} has all numbers: "
            f"{redact(f'{type(error).__name__}: {error}')}"
        )


class RunFiles:
    """``metrics.jsonl``, one JSON object per line, and ``previews/step-000500/00.png``; rows that a
    full disk refused are kept and written later."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        self.path, self.previews = run / METRICS_FILE, run / "previews"
        kept = (
            [line for line, row in _rows(self.path) if row["step"] <= resumed_step]
            if resumed_step
            else []
        )
        atomic.write_text(self.path, "".join(line + "\n" for line in kept))
        self.size, self.waiting = self.path.stat().st_size, b""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.waiting += (
            json.dumps({"step": step} | {k: _number(v) for k, v in values.items()}, allow_nan=False)
            + "\n"
        ).encode()
        self._flush()

    def _flush(self) -> None:
        with (
            atomic.disk_errors(self.path),
            open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file,
        ):
            file.seek(
                min(self.size, os.fstat(file.fileno()).st_size)
            )  # over what an earlier failure left half written
            start = file.tell()
            file.write(self.waiting)
            file.truncate()
        self.size, self.waiting = start + len(self.waiting), b""

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        final = self.previews / (
            f"step-{step:06d}" if name == "validation" else f"step-{step:06d}-{name}"
        )
        with atomic.write_folder(final) as folder:
            for number, (caption, array) in enumerate(pictures):
                text = PngImagePlugin.PngInfo()
                text.add_itxt("caption", caption)
                Image.fromarray(array).save(folder / f"{number:02d}.png", pnginfo=text)

    def close(self) -> None:
        if self.waiting:
            self._flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a line that a killed process left half written is passed
    over."""
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[
        :-1
    ]:  # after the last line break: nothing, or half a line
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((line, row))
    return rows


def _number(value: Any) -> Any:
    """A plain number for JSON, which knows no NaN and no infinity: null."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(config: Config) -> dict[str, Any]:
    """The config as trackers take it: flat, without secrets."""
    return toml.flatten(redact(toml.to_plain(config)))


def _identity(folder: Path, resumed_step: int) -> str:
    """The name under which remote sinks know this run: kept with it, so that a resumed run goes on
    there; new at a fresh start."""
    path = folder / "run-id"
    if not (resumed_step and path.exists()):
        atomic.write_text(
            path, uuid.uuid4().hex
        )  # from the operating system, not from any seeded generator
    return path.read_text().strip()


class TensorBoard:
    """Event files; what an earlier attempt wrote after the resumed step is hidden by TensorBoard
    itself."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard.summary import hparams
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # type: ignore[no-redef]
            from tensorboardX.summary import hparams  # type: ignore[no-redef]
        self.writer = SummaryWriter(
            str(folder / config.log.project), purge_step=resumed_step + 1 if resumed_step else 0
        )
        settings = {
            k: v if isinstance(v, bool | int | float | str) else json.dumps(v)
            for k, v in _settings(config).items()
        }
        for summary in hparams(settings, {}):
            self.writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self.writer.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        self.writer.add_images(
            name, np.stack([array for _, array in pictures]), step, dataformats="NHWC"
        )
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases; ``step`` is logged as a value, because its own counter refuses to
    go back on resume."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        import wandb

        identity = _identity(folder, resumed_step)
        self.wandb = wandb
        private = wandb.Settings(
            x_disable_meta=True
        )  # its metadata would hold the command line, and with it a token given as a flag
        self.run = wandb.init(
            project=config.log.project,
            dir=str(folder),
            id=identity,
            resume="allow",
            config=_settings(config),
            settings=private,
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log({**values, "step": step})

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        self.run.log(
            {
                name: [
                    self.wandb.Image(array, caption=f"{i}: {caption}")
                    for i, (caption, array) in enumerate(pictures)
                ],
                "step": step,
            }
        )

    def close(self) -> None:
        self.run.finish()


class Comet:
    """An experiment on Comet."""

    def __init__(self, config: Config, folder: Path, resumed_step: int) -> None:
        import comet_ml

        private = comet_ml.ExperimentConfig(
            parse_args=False, log_env_details=False
        )  # it would send the command line, and with it a token given as a flag
        key = _identity(folder, resumed_step)
        self.experiment = comet_ml.start(
            project_name=config.log.project,
            experiment_key=key,
            mode="get_or_create",
            experiment_config=private,
        )
        self.experiment.log_parameters(_settings(config))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self.experiment.log_metrics(dict(values), step=step)

    def images(self, step: int, name: str, pictures: Pictures) -> None:
        for number, (caption, array) in enumerate(pictures):
            self.experiment.log_image(array, name=f"{name} {number}: {caption}", step=step)

    def close(self) -> None:
        self.experiment.end()
