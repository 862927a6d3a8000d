"""What the processes of a run do together, whatever carries their words."""

import contextlib
import functools
import json
import operator
import os
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from limner.engines.watch import Watch, connect
from limner.errors import LimnerError, LostProcess, from_message, to_message
from limner.protocols import ProcessGroup

T = TypeVar("T")
# The first process may download or encode for hours while the others wait for it.
PATIENCE = timedelta(days=7)
# Seconds that a process of several may take to end once it has an error: then it ends at once.
DEPARTURE = 12.0
# Seconds that the others have at least to begin: to start Python and import PyTorch or JAX.
MEETING = 60.0


class Processes(ProcessGroup):
    """One process of a run among the others, over one primitive: ``exchange``.

    All processes call the same methods in the same order; one that does not is waited for until
    ``PATIENCE`` is over, or until the watch finds that it has died, has left, or is stopped.
    """

    watch: Watch | None = None

    def __init__(self) -> None:
        self.on_stop: Callable[[], None] = lambda: None
        self.on_end: Callable[[LimnerError], None] = lambda error: None
        self.ending = threading.Event()
        self.saving = threading.RLock()

    @contextlib.contextmanager
    def meeting_in_time(self, count: int, patience: float) -> Iterator[None]:
        """End this process unless it has met the others inside, within ``patience``.

        Args:
            count: processes of the run, 0 for an unknown number above 1; one meets nobody.
        """
        if count == 1:
            yield
            return
        limit = max(patience, MEETING)
        number = f"the {count}" if count else "the"
        late = LostProcess(
            f"{number} processes of this run have not met within {limit:g} seconds "
            "(engine.patience): one was not started, has died or is stopped, or cannot reach the "
            "first one's host. Run the same command again, with all processes."
        )
        timer = threading.Timer(limit, self.end, [late])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def start_watch(self, host: str, patience: float) -> None:
        """Watch the other processes; all call it.

        Args:
            host: of the first process, as the others see it.
            patience: seconds that a process may be silent; ``engine.patience``.
        """
        if self.world_size == 1:
            return
        links, fault = connect(self.rank, self.world_size, host, self.exchange)
        if not fault:
            self.watch = Watch(links, patience, lambda: self.on_stop(), self.end_soon)
        elif self.rank == 0:
            print(
                f"limner: the processes cannot watch each other ({fault}); one that dies or stops "
                "will be waited for",
                file=sys.stderr,
            )

    def request_stop(self) -> None:
        """See ``ProcessGroup``."""
        if self.watch is not None:
            self.watch.tell({"stop": True})

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """See ``ProcessGroup``."""
        try:
            yield
        except LimnerError:
            raise
        except Exception as error:
            self.ending.set()
            lost = None if self.watch is None else self.watch.wait_for_verdict()
            if lost is None:
                raise
            raise lost from error

    def end_soon(self, error: LimnerError) -> None:
        """End this process; where its main thread has found the same, it has time for that."""
        if self.ending.wait(1.0):
            time.sleep(DEPARTURE)
        self.end(error)

    def end(self, error: LimnerError) -> NoReturn:
        """See ``ProcessGroup``."""
        # What is being saved is worth the wait.
        with self.saving:
            self.on_end(error)
            if self.watch is not None:
                self.watch.leave(to_message(error))
            if not error.reported:
                print(f"limner: {error}", file=sys.stderr, flush=True)
            os._exit(error.code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """See ``ProcessGroup``."""
        if self.watch is None:
            self.leave_group()
            return
        self.ending.set()
        self.watch.leave(None if error is None else to_message(error, "it"))
        if error is None:
            self.leave_group()
            return
        # To leave may mean to wait for one that is no longer there.
        known = error if isinstance(error, LimnerError) else LimnerError(f"{error}")
        timer = threading.Timer(DEPARTURE, self.end, [known])
        timer.daemon = True
        timer.start()
        self.leave_group()
        timer.cancel()
        # The error leads to every tensor of the run: were this thread the last to let go of it,
        # while Python ends, PyTorch would abort the process.
        timer.join()

    @abstractmethod
    def leave_group(self) -> None:
        """Leave what carries the words of the processes."""

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
