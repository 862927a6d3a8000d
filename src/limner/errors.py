"""What can go wrong, one class per exit code: every fault says what was given, what was expected
and what to do."""

import contextlib
import os
from collections.abc import Iterator


class LimnerError(Exception):
    """Shown to the user as one message, without a traceback; ``code`` is the exit status of the
    process."""

    code = 1
    reported = (
        False  # true where another process of the run says it, so that this one exits in silence
    )


class InputError(LimnerError):
    """Something the user wrote or gave cannot be honoured: a recipe, a flag, a picture, a model
    folder."""

    code = 2


class Stopped(LimnerError):
    """SIGTERM or Ctrl-C: the run saved a checkpoint and can be continued with the same command."""

    code = 3


class NonFiniteError(LimnerError):
    """A loss or gradient was infinite or NaN; it has not reached the weights, the EMA or a
    checkpoint."""

    code = 4


class DiskError(LimnerError):
    """The disk is full, read-only or failing; whatever was whole before is whole still."""

    code = 5


class HubError(LimnerError):
    """A download from or a push to the Hub failed; what lies on the local disk is complete."""

    code = 6


class IntegrityError(LimnerError):
    """A file is not what its digest says: cut short, changed or missing."""

    code = 7


class LockedError(LimnerError):
    """Another process is writing to the same folder."""

    code = 8


def to_message(error: BaseException) -> dict[str, str]:
    """What the other processes are told of an error; one that is no fault stays with the process
    that has it."""
    if isinstance(error, LimnerError):
        known = next(c.__name__ for c in type(error).__mro__ if globals().get(c.__name__) is c)
        return {"fault": known, "text": str(error)}
    return {
        "fault": "LimnerError",
        "text": f"the first process failed: {type(error).__name__}: {error}",
    }


def from_message(said: dict[str, str]) -> LimnerError:
    """The first process's fault, in another process: same class, same message, already told."""
    fault: LimnerError = globals()[said["fault"]](said["text"])
    fault.reported = True
    return fault


@contextlib.contextmanager
def report_once(*kinds: type[LimnerError]) -> Iterator[None]:
    """For faults (of these kinds; none given: of all) that come to all processes alike: the first
    one of each host says it."""
    try:
        yield
    except LimnerError as fault:
        if not kinds or isinstance(fault, kinds):
            fault.reported = fault.reported or os.environ.get("LOCAL_RANK", "0") != "0"
        raise
