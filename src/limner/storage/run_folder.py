"""The files of a run's folder by name, and the status file by which others follow the run."""

import dataclasses
import datetime
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from limner.config import toml
from limner.errors import InputError
from limner.json_types import parse_json
from limner.redaction import redact_text
from limner.storage import atomic

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
CARD_FILE = "README.md"
GRID_FILE = "preview.png"
TRACKER_ID_FILE = "run-id"  # in the folder of the trackers' files
VALIDATION_PREVIEWS = "validation"

# How a run ended, or that it did not; "died" is never written, but concluded by a reader.
RunPhase = Literal["running", "stopped", "failed", "finished", "died"]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run; its properties are the paths of what a run writes there."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings of the run, without secrets."""
        return self.path / "config.json"

    @property
    def status(self) -> Path:
        """Whether the run goes on, and how far it is; see ``RunStatus``."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """Losses and speed, one JSON object a line."""
        return self.path / METRICS_FILE

    @property
    def skipped(self) -> Path:
        """The records that were left out, with the reason, one JSON object a line."""
        return self.path / "skipped.jsonl"

    @property
    def previews(self) -> Path:
        """A folder of pictures for each step at which previews were drawn."""
        return self.path / "previews"

    @property
    def result(self) -> Path:
        """The files of the result and their digests; it is written last."""
        return self.path / RESULT_FILE

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / CARD_FILE

    @property
    def grid(self) -> Path:
        """The last previews in one picture, for the model card."""
        return self.path / GRID_FILE

    @property
    def pushed(self) -> Path:
        """The repository that the result was pushed to, and the result's digest."""
        return self.path / "pushed.json"

    @property
    def lock(self) -> Path:
        """The file that ``atomic.lock`` locks."""
        return self.path / atomic.LOCK_FILE

    def logs(self, name: str) -> Path:
        """Return the folder of the trackers' files, where ``log.folder`` is ``name``."""
        return self.path / name

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def previews_of_step(self, step: int, name: str = VALIDATION_PREVIEWS) -> Path:
        """Return the folder of the pictures drawn at a step; ``name`` says what they are."""
        suffix = "" if name == VALIDATION_PREVIEWS else f"-{name}"
        return self.previews / f"step-{step:06d}{suffix}"

    def list_previews(self) -> list[Path]:
        """List the folders of pictures, by step."""
        return sorted(self.previews.glob("step-*"))


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunStatus:
    """What a run says of itself while it trains and when it ends; times are ISO 8601, in UTC."""

    state: RunPhase
    step: int
    steps: int
    images_per_second: float | None = None
    error: str | None = None  # of a run that failed
    process_id: int = field(default_factory=os.getpid)
    process_start: int | None = field(default_factory=lambda: read_start_ticks(os.getpid()))
    host: str = field(default_factory=socket.gethostname)
    began: str = field(default_factory=utc_now)
    updated: str = field(default_factory=utc_now)


def write_status(folder: RunFolder, status: RunStatus) -> None:
    """Write the status of a run, with the present time as its ``updated``.

    Raises:
        DiskError: when the disk refuses.
    """
    current = dataclasses.replace(status, updated=utc_now())
    if current.error is not None:
        current = dataclasses.replace(current, error=redact_text(current.error))
    atomic.write_text(folder.status, json.dumps(dataclasses.asdict(current), indent=1))


def read_status(folder: RunFolder) -> RunStatus | None:
    """Read the status of a run; None where there is none, or it is damaged.

    A status that says "running" becomes "died" where its process is gone from this host. Of a
    process on another host nothing can be known, so that its status stands.
    """
    try:
        plain = parse_json(folder.status.read_text(encoding="utf-8"))
        status: RunStatus = toml.build(RunStatus, plain)
    except (OSError, ValueError, TypeError, AttributeError, InputError):
        return None
    # Signals to these numbers go to groups of processes.
    if status.process_id < 1:
        return None
    if status.state == "running" and not is_alive(status):
        return dataclasses.replace(status, state="died")
    return status


def is_alive(status: RunStatus) -> bool:
    """Return False where the process that wrote a status is known to be gone, else True."""
    if status.host != socket.gethostname():
        return True
    try:
        os.kill(status.process_id, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return False
    # In a container that is started again, another process has the same number.
    start = read_start_ticks(status.process_id)
    return start is None or status.process_start is None or start == status.process_start


def read_start_ticks(process_id: int) -> int | None:
    """Return when a process started, in the kernel's clock ticks; None where there is no /proc."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return None
    # The command's name, in parentheses, may hold spaces: fields are counted from its end.
    return int(stat.rpartition(")")[2].split()[19])
