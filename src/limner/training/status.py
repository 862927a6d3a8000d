"""The status file of a run, by which others follow it; see ``storage.run_folder.RunStatus``."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from limner.errors import DiskError, LostProcess, Stopped, find_stop
from limner.storage.run_folder import RunFolder, RunStatus, write_status


class StatusFile:
    """The status of one run, written by its first process. A full disk stops nobody here."""

    def __init__(self, folder: RunFolder, status: RunStatus, *, writes: bool):
        self.folder, self.status, self.writes = folder, status, writes

    def update(self, **changes: object) -> None:
        """Change fields of the status, and write it."""
        self.status = replace(self.status, **changes)  # type: ignore[arg-type]
        if self.writes:
            with contextlib.suppress(DiskError):
                write_status(self.folder, self.status)

    def write_end(self, error: BaseException) -> None:
        """Say how the run has ended."""
        error = find_stop(error) or error
        if isinstance(error, Stopped) and not isinstance(error, LostProcess):
            self.update(state="stopped")
        elif isinstance(error, KeyboardInterrupt):
            self.update(state="stopped", error="stopped by hand")
        else:
            self.update(state="failed", error=str(error) or type(error).__name__)


@contextlib.contextmanager
def keep_status(folder: RunFolder, step: int, steps: int, *, writes: bool) -> Iterator[StatusFile]:
    """Say that a run goes on while the block lasts, and how it ended after it.

    Args:
        step: optimizer steps that are done, of ``steps``.
        writes: whether this process writes the file.
    """
    file = StatusFile(folder, RunStatus("running", step, steps), writes=writes)
    file.update()
    try:
        yield file
    except BaseException as error:
        file.write_end(error)
        raise
    file.update(state="finished")
