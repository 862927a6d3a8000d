"""How far something is: a bar on a terminal, a line every half minute anywhere else."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import NoReturn, Self

from tqdm import tqdm

from limner.redaction import redact_text

SECONDS = 30.0  # between two lines where standard error is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class ProgressLines:
    """Progress as lines on standard error, for files, queues and containers.

    Args:
        clock: seconds from any moment on.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total, self.description, self.unit = total, description, unit
        self.begun_with, self.done, self.clock = done, done, clock
        self.began = self.shown = clock()
        self.postfix = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count some more, and print a line where the last one is old."""
        self.done += count
        if self.clock() - self.shown >= SECONDS:
            self.print_line()

    def set_postfix(self, ordered_dict: Mapping[str, str]) -> None:
        """Put these values into the next line."""
        self.postfix = ", ".join(f"{name}={value}" for name, value in ordered_dict.items())

    def print_line(self) -> None:
        """Print how far it is."""
        self.shown = self.clock()
        text = tqdm.format_meter(
            self.done,
            self.total,
            self.shown - self.began,
            initial=self.begun_with,
            prefix=self.description,
            unit=self.unit,
            postfix=self.postfix,
            bar_format=LINE,
        )
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line of what took long enough for one before."""
        if self.shown > self.began:
            self.print_line()


def open_progress(
    total: int, description: str, unit: str = "it", *, done: int = 0, silent: bool = False
) -> "tqdm[NoReturn] | ProgressLines":
    """Begin to show how far something is, on standard error.

    Args:
        done: what was done before.
        silent: show nothing: another process does.
    """
    if silent or sys.stderr.isatty():
        return tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            disable=silent,
            dynamic_ncols=True,
        )
    return ProgressLines(total, description, unit, done)


def print_line(text: str) -> None:
    """Tell the user one thing, beside a progress bar."""
    tqdm.write(redact_text(text), file=sys.stderr)
