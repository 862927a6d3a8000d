"""What can go wrong, one class per exit code: every fault says what was given, what was expected
and what to do."""

import contextlib
import os
from collections.abc import Iterator


class Fault(Exception):
    """Shown to the user as one message, without a traceback; ``code`` is the exit status of the
    process."""

    code = 1
    told = False  # true where another process of the run says it, so that this one exits in silence


class InputFault(Fault):
    """Something the user wrote or gave cannot be honoured: a recipe, a flag, a picture, a model
    folder."""

    code = 2


class Stopped(Fault):
    """SIGTERM or Ctrl-C: the run saved a checkpoint and can be continued with the same command."""

    code = 3


class NonFinite(Fault):
    """A loss or gradient was infinite or NaN; it has not reached the weights, the EMA or a
    checkpoint."""

    code = 4


class DiskFault(Fault):
    """The disk is full, read-only or failing; whatever was whole before is whole still."""

    code = 5


class HubFault(Fault):
    """A download from or a push to the Hub failed; what lies on the local disk is complete."""

    code = 6


class IntegrityFault(Fault):
    """A file is not what its digest says: cut short, changed or missing."""

    code = 7


class Locked(Fault):
    """Another process is writing to the same folder."""

    code = 8


def described(error: BaseException) -> dict[str, str]:
    """What the other processes are told of an error; one that is no fault stays with the process
    that has it."""
    if isinstance(error, Fault):
        known = next(c.__name__ for c in type(error).__mro__ if globals().get(c.__name__) is c)
        return {"fault": known, "text": str(error)}
    return {"fault": "Fault", "text": f"the first process failed: {type(error).__name__}: {error}"}


def rebuilt(said: dict[str, str]) -> Fault:
    """The first process's fault, in another process: same class, same message, already told."""
    fault: Fault = globals()[said["fault"]](said["text"])
    fault.told = True
    return fault


@contextlib.contextmanager
def told_once(*kinds: type[Fault]) -> Iterator[None]:
    """For faults (of these kinds; none given: of all) that come to all processes alike: the first
    one of each host says it."""
    try:
        yield
    except Fault as fault:
        if not kinds or isinstance(fault, kinds):
            fault.told = fault.told or os.environ.get("LOCAL_RANK", "0") != "0"
        raise
