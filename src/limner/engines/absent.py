"""What stands for an engine that is not installed, so that data and base can be checked."""

from typing import Any

from limner.config.schema import EngineSettings
from limner.engines.process import Processes
from limner.features.arrays import NumpyFeatures


class LoneProcess(Processes):
    """The only process, with no device."""

    rank = 0
    world_size = 1
    device_count = 1
    device_name = "no device"

    def __init__(self, settings: EngineSettings):
        super().__init__()
        self.precision = settings.precision or "no"

    def leave_group(self) -> None:
        """See ``Processes``."""

    def exchange(self, text: str) -> list[str]:
        """See ``Processes``."""
        return [text]

    def arithmetic_versions(self) -> list[str]:
        """See ``protocols.ProcessGroup``."""
        return []


class AbsentEngine:
    """Trains nothing; see ``protocols.Engine`` for what a real one does."""

    def get_encoders(self) -> Any:
        """Return encoders that join arrays, and encode nothing."""
        return NumpyFeatures()
