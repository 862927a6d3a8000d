"""Turn SIGTERM, Ctrl-C and the end of a terminal into a request to stop, which ends a run with a
checkpoint."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from limner.errors import LimnerError, Stopped, find_stop

# A terminal's Ctrl-C reaches a launcher too, which passes it on: signals within this time are one.
REPEAT_SECONDS = 3
# Seconds that a run without unsaved steps has to end in good order.
PROMPT_SECONDS = 10.0
# Seconds that a run which is told to stop a second time has to end in Python.
QUIT_SECONDS = 1.0
BEFORE_TRAINING = (
    "stopped before training began; what was encoded is kept. Run the same command again to go on."
)
NUMBERS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def end_process(error: LimnerError) -> None:
    """End this process at once with the error's message and code."""
    print(f"limner: {error}", file=sys.stderr, flush=True)
    os._exit(error.code)


class Stop:
    """A request to stop, made by a signal while this context is open.

    The first signal raises ``Stopped`` at once, or is a request once ``save_first`` is set. A later
    one does what it would do without this context, or any other that is open around it. Python
    handles a signal only when the main thread comes back to it: where that waits for a process, a
    compiler or an import, a thread ends the run, after the first signal if no step is unsaved, and
    after a later one in any case.

    Args:
        ends_process: whether the process ends with this context. After a stop Python still takes a
            second for that, in which further signals are then ignored: the exit code stays.
        words: of the ``Stopped`` that is raised at once.
    """

    def __init__(self, *, ends_process: bool = False, words: str = BEFORE_TRAINING) -> None:
        self.ends_process, self.words = ends_process, words
        self.over = False  # whether a stop has ended a context inside this one
        self.asked = False
        self.asked_at = 0.0  # seconds of the monotonic clock, of this process's first signal
        self.save_first = False
        self.unsaved = False  # whether there are steps that no checkpoint has
        self.tell_others: Callable[[], None] = lambda: None
        self.end: Callable[[LimnerError], None] = end_process
        self.hurrying = False
        self.previous_handlers: dict[int, Any] = {}
        self.closed = threading.Event()

    def __enter__(self) -> "Stop":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.previous_wakeup = signal.set_wakeup_fd(
                self.writer.fileno(), warn_on_full_buffer=False
            )
            threading.Thread(target=self.hear_signals, name="stop", daemon=True).start()
            for number in NUMBERS:
                # A closed terminal stops a run, but not one that nohup has started.
                if number not in (signal.SIGTERM, signal.SIGINT) and is_ignored(number):
                    continue
                self.previous_handlers[number] = signal.signal(number, self.handle_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()
        stopped = self.asked or self.over or find_stop(error) is not None
        for number, handler in self.previous_handlers.items():
            outer = getattr(handler, "__self__", None)
            if stopped and isinstance(outer, Stop):
                outer.over = True
            signal.signal(number, signal.SIG_IGN if stopped and self.ends_process else handler)
        if self.previous_handlers:
            signal.set_wakeup_fd(self.previous_wakeup)
            self.writer.close()  # the thread reads the end, and ends

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to stop, or end the process when it was asked before."""
        if self.over:
            return
        if not self.asked_at:
            self.asked = True
            self.asked_at = time.monotonic()
            if not self.save_first:
                self.check()
            # Straight to the descriptor: the signal may have interrupted a print.
            message = (
                b"\nlimner: stopping as soon as the state is saved; press Ctrl-C again "
                b"to quit without saving\n"
            )
            write_to_terminal(message)
        elif time.monotonic() - self.asked_at > REPEAT_SECONDS:
            signal.signal(number, find_handler(number, self.previous_handlers[number]))
            signal.raise_signal(number)

    def hear_signals(self) -> None:
        """Hear of signals while the main thread cannot, and of other processes' signals."""
        first: float | None = None  # when the first signal was heard
        with self.reader:
            while numbers := self.reader.recv(64):
                told = [number for number in NUMBERS if number in numbers]
                if told and first is None:
                    first = time.monotonic()
                    self.hurry()
                elif told and first is not None and time.monotonic() - first > REPEAT_SECONDS:
                    self.quit(told[0])

    def hear_others(self) -> None:
        """Ask this process's run to stop, as another process of it was told to."""
        self.asked = True
        self.hurry()

    def hurry(self) -> None:
        """Tell the others, and see to it that this process ends; once."""
        if not self.hurrying:
            self.hurrying = True
            self.tell_others()
            threading.Thread(target=self.end_promptly, name="stop", daemon=True).start()

    def end_promptly(self) -> None:
        """End the process as soon as it has had its time and no step is unsaved."""
        waited = self.closed.wait(PROMPT_SECONDS)
        while not waited and self.unsaved:
            waited = self.closed.wait(0.5)
        if not waited:
            self.end(
                Stopped(
                    "stopped; what was encoded and saved is kept. Run the same command again to "
                    "go on."
                )
            )

    def quit(self, number: int) -> None:
        """End this process with the code of a signal, unless it ends by itself in a moment."""
        if not self.closed.wait(QUIT_SECONDS):
            write_to_terminal(b"\nlimner: stopped by hand, without saving\n")
            os._exit(128 + number)

    def check(self) -> None:
        """Raise ``Stopped`` when a stop was asked for while nothing has been trained."""
        if self.asked:
            raise Stopped(self.words)


def is_ignored(number: int) -> bool:
    """Whether a signal was to be ignored when this process began."""
    return signal.getsignal(number) is signal.SIG_IGN


def write_to_terminal(message: bytes) -> None:
    """Write to standard error, if anybody reads it."""
    with contextlib.suppress(OSError):
        os.write(2, message)


def find_handler(number: int, handler: Any) -> Any:
    """Return what handled a signal before the outermost ``Stop`` was open."""
    stop = getattr(handler, "__self__", None)
    return (
        find_handler(number, stop.previous_handlers[number]) if isinstance(stop, Stop) else handler
    )
