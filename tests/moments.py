"""Every moment of a writer: its n-th call to the operating system fails, or is its last."""

import builtins
import io
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

CHANGES: list[tuple[Any, str]] = [
    (os, name) for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
] + [(io, "open"), (builtins, "open")]
CALLS = [*CHANGES, (os, "open"), (os, "scandir"), (os, "stat")]


@contextmanager
def at_call(
    n: int, happen: Callable[[str], NoReturn], calls: list[tuple[Any, str]] = CALLS
) -> Iterator[list[int]]:
    """``happen`` in place of the n-th call; gives the number of calls made so far."""
    count = [0]

    def wrap(name: str, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                happen(name)
            return real(*args, **kwargs)

        return call

    before = [(place, name, getattr(place, name)) for place, name in calls]
    try:
        for place, name, real in before:
            setattr(place, name, wrap(name, real))
        yield count
    finally:
        for place, name, real in before:
            setattr(place, name, real)


def failing(n: int, number: int) -> Any:
    """The n-th call is refused by the disk with an errno."""

    def refuse(name: str) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return at_call(n, refuse)


def dies_at(n: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that is gone, without a word, at its n-th call that may change the
    disk; False where it came to its end before."""

    def mortal() -> None:
        with at_call(n, lambda name: os._exit(9), CHANGES):
            action()

    status = in_child(mortal)
    assert status in (0, 9), "the action failed by itself"
    return status == 9


def dies_writing(size: int, action: Callable[[], object]) -> bool:
    """Run ``action`` in a child that the system kills when a file would grow beyond ``size`` bytes;
    False where none did."""

    def mortal() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    status = in_child(mortal)
    assert status in (0, -signal.SIGXFSZ), "the action failed by itself"
    return status != 0


def in_child(action: Callable[[], object]) -> int:
    """The exit status of a child that runs ``action`` and nothing after it; the negative number of
    the signal that killed it."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # newer Pythons warn of fork beside threads; the child only writes files
        child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
