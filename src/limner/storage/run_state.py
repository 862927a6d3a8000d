"""What a run is, as its checkpoints remember it: a versioned record, in JSON."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.errors import InputError, IntegrityError
from limner.json_types import Plain

STATE_FILE = "state.json"
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
    # Of steps since the last regular row of metrics: the next row's mean is over these too.
    unlogged_losses: tuple[float, ...] = ()
    # The class of the base's scheduler, which draws; in earlier builds it was not written.
    scheduler: str = ""
    # Whether pictures that look alike are all held out, or none of them: in earlier builds any was.
    held_out_apart: bool = False

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
                "cannot be resumed with this one. Resume with the build that began it, or "
                "begin a new run in another folder."
            )
        fields = {one.name: one.default for one in dataclasses.fields(cls)}
        needed = {name for name, default in fields.items() if default is dataclasses.MISSING}
        if missing := sorted(needed - raw.keys()):
            raise IntegrityError(f"{folder / STATE_FILE}: {', '.join(missing)} is missing")
        state = cls(**{name: raw.get(name, default) for name, default in fields.items()})
        if wrong := sorted(find_other_types(state)):
            raise IntegrityError(f"{folder / STATE_FILE}: {', '.join(wrong)} is of another type")
        return state


def find_other_types(state: RunState) -> Iterator[str]:
    """The fields whose values are not of their declared type, as far as JSON tells them apart."""
    for one in dataclasses.fields(state):
        if not is_of_kind(getattr(state, one.name), typing.get_origin(one.type) or one.type):
            yield one.name
    if isinstance(state.config, dict):
        for section in ("data", "model", "checkpoint"):
            if not isinstance(state.config.get(section), dict):
                yield f"config.{section}"
    losses = state.unlogged_losses
    if isinstance(losses, list) and not all(isinstance(loss, int | float) for loss in losses):
        yield "unlogged_losses"


def is_of_kind(value: object, kind: Any) -> bool:
    """Return whether a value is of a class; JSON has lists for tuples, and true is no number."""
    wanted = (list, tuple) if kind is tuple else kind
    return isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
