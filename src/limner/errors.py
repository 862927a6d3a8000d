"""Errors that end a command, one class for each exit code.

Every message gives the value, the expectation and the remedy.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

SHOWN = 500  # characters of a value in a message
# Control characters, and those that end a line or turn the direction of writing: a file's name that
# holds them could forge a message.
CONTROLS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069]")


class LimnerError(Exception):
    """An error that the user sees as one message, without a traceback."""

    # The exit status of the process.
    code = 1
    # Whether another process of the run reports the same error, so that this one exits in silence.
    reported = False


class InputError(LimnerError):
    """A recipe, flag, picture or model folder that cannot be used as it was given."""

    code = 2


class Stopped(LimnerError):
    """SIGTERM or Ctrl-C: a checkpoint is saved, and the same command continues the run."""

    code = 3


class LostProcess(Stopped):
    """Another process of the run has died or no longer answers; the same command continues the run
    from its newest checkpoint."""


def find_stop(error: BaseException | None) -> Stopped | None:
    """Return the stop that an error was made of, if any.

    A signal may come while diffusers or transformers imports something; they then raise an error of
    their own from whatever ended the import.
    """
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__
    return error


class NonFiniteError(LimnerError):
    """A loss or gradient that is infinite or NaN; weights, EMA and checkpoints are unharmed."""

    code = 4


class DiskError(LimnerError):
    """A disk that is full, read-only or failing; whole files stay whole."""

    code = 5


class HubError(LimnerError):
    """A failed download from the Hub, or push to it; files on the local disk are complete."""

    code = 6


class IntegrityError(LimnerError):
    """A file that differs from its digest: cut short, changed or missing."""

    code = 7


class LockedError(LimnerError):
    """A folder that another process is writing to."""

    code = 8


def to_message(error: BaseException, subject: str = "the first process") -> dict[str, str]:
    """Return an error as plain text for the other processes of a run.

    Any error but a ``LimnerError`` is sent as a plain ``LimnerError``, which says whose it was.
    """
    if not isinstance(error, LimnerError):
        text = f"{subject} failed: {type(error).__name__}: {error}"
        return {"error": LimnerError.__name__, "text": text}
    # A subclass from elsewhere is sent as its nearest ancestor among the classes above.
    ancestors = (cls.__name__ for cls in type(error).__mro__ if globals().get(cls.__name__) is cls)
    return {"error": next(ancestors), "text": str(error)}


def from_message(message: dict[str, str]) -> LimnerError:
    """Return the first process's error in another process: same class and text, and reported."""
    error: LimnerError = globals()[message["error"]](message["text"])
    error.reported = True
    return error


def is_first_on_host() -> bool:
    """Whether this process speaks for its host, as far as the launcher says."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def report_once(*kinds: type[LimnerError]) -> Iterator[None]:
    """Let one process of each host report an error that all processes raise.

    Args:
        kinds: the errors that all processes raise alike; every ``LimnerError`` if none is given.
    """
    try:
        yield
    except LostProcess:
        raise  # the one that would report it may be the one that is lost
    except LimnerError as error:
        if not kinds or isinstance(error, kinds):
            error.reported = error.reported or not is_first_on_host()
        raise


def shorten(text: str) -> str:
    """Return a text as a message shows it: of a long one, the beginning."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def say_count(count: int, one: str, several: str) -> str:
    """Return a number with what is said of one, or of several or none: ``1 file is``."""
    return f"{count} {one if count == 1 else several}"


def join_first(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first names of many for a message; ``...`` where there are more."""
    shown = [make_printable(name) for name in names[:most]]
    return separator.join([*shown, *["..."] * (len(names) > most)])


def make_printable(name: str) -> str:
    """Return a name in which control characters, and bytes that are not UTF-8, are written as
    ``\\n`` and ``\\xff``."""
    try:
        name = os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:
        name = name.encode(errors="backslashreplace").decode()
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), name)
