"""A checkpoint is named arrays plus JSON, whole or absent, with a digest of every file; no pickle,
nothing that runs."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from limner.errors import InputError, IntegrityError, shorten
from limner.json_types import Plain, read_object
from limner.storage import atomic
from limner.storage.run_state import STATE_FILE, RunState
from limner.storage.safetensors import NamedArrays, SafetensorsError, read_arrays, write_arrays

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been verified, and what its ``state.json`` says."""

    folder: Path
    step: int
    plain_state: Plain

    @property
    def state(self) -> RunState:
        """What the checkpoint remembers of its run; raises what ``RunState.from_plain`` does."""
        return RunState.from_plain(self.plain_state, self.folder)

    def arrays(self, name: str) -> NamedArrays:
        """The arrays of one file, e.g. ``unet/diffusion_pytorch_model.safetensors``."""
        try:
            return read_arrays(self.folder / name)[0]
        except (OSError, SafetensorsError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise IntegrityError(
                f"{self.folder / name}: {reason}, so {self.folder.name} cannot be resumed"
            ) from error


def save(
    root: Path,
    step: int,
    files: Iterable[tuple[str, NamedArrays, dict[str, str]]],
    state: Mapping[str, object],
    *,
    keep: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``root/checkpoint-<step>``; once it has been read back and verified, remove all up to
    this step but the newest ``keep``.

    Checkpoints of later steps are left: this run will write them anew, and until then they may be
    all that is good, or damaged and no reason to part with an older one.

    Args:
        files: file name, arrays and header metadata, made one at a time so that only one needs to
            be in memory.
        state: plain values for ``state.json``.
        finish: may add further files (a ``config.json``) before the folder is sealed.
    """
    final = root / f"checkpoint-{step}"
    with atomic.write_folder(final) as path:
        for name, arrays, metadata in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic.disk_errors(path / name, sum(a.nbytes for a in arrays.values())):
                write_arrays(path / name, arrays, metadata)
        if finish is not None:
            finish(path)
        (path / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1))
    prune(root, step, keep)
    return final


def prune(root: Path, step: int, keep: int | None) -> None:
    """Remove all checkpoints up to this step but the newest ``keep``, if that of this step is
    good."""
    with atomic.disk_errors(root):
        if keep is not None and (
            old := [path for path in list_checkpoints(root) if step_of(path) <= step][keep:]
        ):
            atomic.verify(root / f"checkpoint-{step}")
            for path in old:
                atomic.remove_folder(path)


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below ``root`` by name, newest first, not verified; other folders are none of
    ours."""
    return sorted(
        (p for p in root.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()),
        key=step_of,
        reverse=True,
    )


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("checkpoint-"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint and open it.

    Raises:
        IntegrityError: when a file is missing, cut short or changed.
    """
    atomic.verify(path)
    return open_verified(path)


def open_verified(path: Path) -> Checkpoint:
    """Open a checkpoint that another process of this run has verified.

    Raises:
        IntegrityError: when it is none of Limner's all the same.
    """
    try:
        state = read_object((path / STATE_FILE).read_text(encoding="utf-8"))
        step = state["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step!r}")
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"{path / STATE_FILE}: missing or not what was written ({shorten(str(error))})"
        ) from error
    return Checkpoint(path, step, state)


def find_latest(root: Path, report: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint below ``root`` that verifies; each newer one that does not is named
    through ``report``."""
    for path in list_checkpoints(root):
        try:
            return open_checkpoint(path)
        except IntegrityError as fault:
            report(f"{path.name} is not usable and is passed over: {fault}")
    return None


def find_checkpoint(
    root: Path, which: str, report: Callable[[str], None] = print
) -> Checkpoint | None:
    """Resolve what a user wrote: ``latest``, ``checkpoint-500`` (below ``root``), or the path of a
    checkpoint folder.

    Raises:
        InputError: when a named checkpoint does not exist.
        IntegrityError: when a named checkpoint is damaged.
    """
    if which == "latest":
        return find_latest(root, report)
    path = root / which if CHECKPOINT_NAME.fullmatch(which.rstrip("/")) else Path(which)
    if not path.is_dir():
        there = ", ".join(p.name for p in list_checkpoints(root)) or "none"
        raise InputError(
            f"{which}: no such checkpoint. In {root} there are: {there}. Pass one of these, the "
            "path of another, or 'latest'."
        )
    return open_checkpoint(path)
