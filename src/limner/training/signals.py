"""Turns SIGTERM and Ctrl-C into a request that the loops look at, so that a run ends with a
checkpoint."""

import os
import signal
import threading
import time
from typing import Any

from limner.errors import Stopped


class Stop:
    """The first signal is a request once ``gently`` is true, and a fault before; one that comes
    seconds later ends the process as usual.

    A terminal's Ctrl-C reaches a launcher too, which passes it on: what comes twice at once is one
    request.
    """

    def __init__(self) -> None:
        self.asked, self.since, self.save_first = False, 0.0, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.before = {
                number: signal.signal(number, self.ask)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: Any) -> None:
        if self.asked and time.monotonic() - self.since > 3:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        elif not self.asked:
            self.asked, self.since = True, time.monotonic()
            if not self.save_first:
                self.check()
            os.write(
                2,
                b"\nlimner: stopping as soon as the state is saved; once more ends the run "
                b"without saving\n",
            )

    def check(self) -> None:
        """Raise ``Stopped`` when a stop was asked for while nothing has been trained."""
        if self.asked:
            raise Stopped(
                "stopped before training began; what was encoded is kept. Run the same command "
                "again to go on."
            )
