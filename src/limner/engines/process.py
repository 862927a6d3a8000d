"""What the processes of a run do together, whatever carries their words."""

import functools
import json
import operator
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from limner.errors import from_message, to_message
from limner.protocols import ProcessGroup

T = TypeVar("T")
# The first process may download or encode for hours while the others wait for it.
PATIENCE = timedelta(days=7)


class Processes(ProcessGroup):
    """One process of a run among the others, over one primitive: ``exchange``.

    All processes call the same methods in the same order; one that does not is waited for until
    ``PATIENCE`` is over.
    """

    @abstractmethod
    def exchange(self, text: str) -> list[str]:
        """Return the texts of all processes in the order of ranks; an empty text costs nothing."""

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process; return its result, or raise its error, in all.

        The result travels as JSON, with one process too: a tuple becomes a list.

        Raises:
            LimnerError: in the other processes, of the first one's class and ``reported``; for an
                error of another class, a plain ``LimnerError``.
        """
        message: str = ""
        error: BaseException | None = None
        if self.rank == 0:
            try:
                message = json.dumps({"result": action()})
            # The others wait for a message, so even an interrupt or a bug must become one.
            except BaseException as caught:
                message = json.dumps(to_message(caught))
                error = caught
        answer = json.loads(self.exchange(message)[0])
        if error is not None:
            raise error
        if "error" in answer:
            raise from_message(answer)
        return answer["result"]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return any(self.exchange("set" if flag else ""))

    def total(self, values: list[float]) -> list[float]:
        """Add up each value over the processes, in float64 and in the order of ranks."""
        # JSON writes the digits that identify a float64, so every process adds the same bits.
        text = json.dumps([float(value) for value in values])
        rows = [json.loads(row) for row in self.exchange(text)]
        # Not sum(): since Python 3.12 it adds floats in another way.
        return [functools.reduce(operator.add, column) for column in zip(*rows, strict=True)]

    def barrier(self) -> None:
        """Wait until every process has come this far."""
        self.exchange("")
