"""Turn SIGTERM and Ctrl-C into a request to stop, so that a run ends with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from limner.errors import Stopped

# A terminal's Ctrl-C reaches a launcher too, which passes it on: signals within this time are one.
REPEAT_SECONDS = 3


class Stop:
    """A request to stop, made by a signal while this context is open.

    The first signal raises ``Stopped`` at once, or is a request once ``save_first`` is set. A later
    one does what it would do without this context.
    """

    def __init__(self) -> None:
        self.asked = False
        self.asked_at = 0.0  # seconds of the monotonic clock
        self.save_first = False
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to stop, or end the process when it was asked before."""
        if not self.asked:
            self.asked = True
            self.asked_at = time.monotonic()
            if not self.save_first:
                self.check()
            # Straight to the descriptor: the signal may have interrupted a print.
            message = (
                b"\nlimner: stopping as soon as the state is saved; press Ctrl-C again "
                b"to quit without saving\n"
            )
            os.write(2, message)
        elif time.monotonic() - self.asked_at > REPEAT_SECONDS:
            signal.signal(number, self.previous_handlers[number])
            signal.raise_signal(number)

    def check(self) -> None:
        """Raise ``Stopped`` when a stop was asked for while nothing has been trained."""
        if self.asked:
            raise Stopped(
                "stopped before training began; what was encoded is kept. Run the same command "
                "again to go on."
            )
