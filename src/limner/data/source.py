"""What a data source gives: records, or a ``BadRecord`` for one that cannot be used."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limner.data.image import Picture
from limner.errors import InputError

Row = tuple[str, Any, Any]  # where it is written, file name, caption or captions


class BadRecord(Exception):
    """One record that cannot be used; raised by ``source[i]``."""

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True)
class Record:
    """One picture with one or several captions; ``key`` is its name in messages.

    A single text stands for one caption, a list for several; a text in place of a path is a path.
    """

    key: str
    image: Picture
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", read_captions(self.captions, self.key))
        if isinstance(self.image, str):
            object.__setattr__(self, "image", Path(self.image))


class Source(Protocol):
    """Records by number. ``[i]`` gives the same record each time, from any thread, or raises
    ``BadRecord``."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


def read_captions(value: Any, key: str, where: str = "") -> tuple[str, ...]:
    values = (
        [value]
        if isinstance(value, str) or not isinstance(value, list | tuple | np.ndarray)
        else list(value)
    )
    prefix = f"{where}: " if where else ""
    if not values:
        raise BadRecord(key, f"{prefix}the list of captions is empty")
    for text in values:
        if text is None:
            raise BadRecord(key, f"{prefix}the caption is missing (null)")
        if not isinstance(text, str):
            raise BadRecord(
                key,
                f"{prefix}the caption is {text!r:.60} ({type(text).__name__}); a text or a list "
                "of texts is expected",
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise BadRecord(key, f"{prefix}the caption is not valid Unicode")
    return tuple(str(text) for text in values)


def missing_column(setting: str, name: str, columns: Iterable[str], where: str) -> InputError:
    columns = list(columns)
    close = difflib.get_close_matches(name, columns, 1)
    hint = f" Did you mean {setting}={close[0]}?" if close and setting != "file_name" else ""
    return InputError(
        f"{where}: no column {name!r}{'' if setting == 'file_name' else f' ({setting})'}; its "
        f"columns are {', '.join(columns) or 'none'}.{hint}"
    )
