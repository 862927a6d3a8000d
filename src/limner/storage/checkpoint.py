"""A checkpoint is named arrays plus JSON, whole or absent, with a digest of every file; no pickle,
nothing that runs."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from limner.errors import InputError, IntegrityError
from limner.plain import Plain
from limner.storage import atomic
from limner.storage.safetensors import NamedArrays, read_arrays, write_arrays

STATE_FILE = "state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


RUN_STATE_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """What a checkpoint remembers of its run besides arrays: all that the run's future depends
    on."""

    config: Plain  # resolved, as ``to_plain`` gives it
    seed: int
    batch_size: int  # global
    world_size: int
    records: int  # to train on
    mixture: list[list[float | None]]  # repeats and weight of each data set
    data_digest: str  # of the records' pictures and captions
    base_digest: str  # of the base's configs and weights
    random_digest: str  # of some random numbers, which another numpy might draw differently
    numpy_version: str
    version: int = RUN_STATE_VERSION

    def to_plain(self) -> Plain:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, raw: Plain, folder: Path) -> "RunState":
        """The inverse of ``to_plain``; ``folder`` is the checkpoint's.

        Raises:
            InputError: when another build of Limner began the run.
            IntegrityError: when it is not what was written.
        """
        version = raw.get("version")
        if version != RUN_STATE_VERSION:
            build = "a later" if isinstance(version, int) and version > 1 else "an earlier"
            raise InputError(
                f"{folder}: this run was begun with {build} build of Limner, and its checkpoints "
                "cannot be gone on from with this one. Go on with the build that began it, or "
                "begin a new run in another folder."
            )
        names = {one.name for one in dataclasses.fields(cls)}
        if missing := sorted(names - raw.keys()):
            raise IntegrityError(f"{folder / STATE_FILE}: {', '.join(missing)} is missing")
        return cls(**{name: raw[name] for name in names})


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
        return read_arrays(self.folder / name)[0]


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
    """Open a checkpoint that another process of this run has verified."""
    state = json.loads((path / STATE_FILE).read_text())
    return Checkpoint(path, state["step"], state)


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
