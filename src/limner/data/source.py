"""The interface of data sources: records, or ``BadRecord`` for one that cannot be used."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from limner.data.image import Picture
from limner.errors import InputError, make_printable

LONGEST_CAPTION = 2**16  # characters


class BadRecord(Exception):
    """A record that cannot be used; raised by ``source[i]``."""

    def __init__(self, key: str, reason: str):
        key, reason = make_printable(key), make_printable(reason)
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One picture with its captions; ``key`` is its name in messages.

    A single text stands for one caption, a list for several; a text in place of a path is a path.
    """

    key: str
    image: Picture
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", make_printable(self.key))
        object.__setattr__(self, "captions", read_captions(self.captions, self.key))
        if isinstance(self.image, str):
            object.__setattr__(self, "image", Path(self.image))


class Source(Protocol):
    """Records by number: ``source[i]`` is the same each time and in any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


def read_captions(value: object, key: str, where: str = "") -> tuple[str, ...]:
    """Return the captions of a record from a text or a list of texts.

    Args:
        where: the line of a file that ``value`` is from, for the message.

    Raises:
        BadRecord: when there is none, or one is missing or no valid text.
    """
    prefix = f"{where}: " if where else ""
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
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
        if problem := explain_bad_caption(text):
            raise BadRecord(key, f"{prefix}{problem}")
    # numpy's strings become plain ones.
    return tuple(str(text) for text in values)


def explain_bad_caption(text: str) -> str | None:
    """Return the reason why a text is no caption; None for a good one."""
    if len(text) > LONGEST_CAPTION:
        return f"the caption has {len(text)} characters; {LONGEST_CAPTION} at most are allowed"
    if "\0" in text:
        return "the caption holds a NUL character: it is damaged, or UTF-16; save it as UTF-8"
    return None if is_unicode(text) else "the caption is not valid Unicode"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded, in a cache's key or in a file; half a surrogate pair cannot,
    nor can a byte of a file that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def explain_missing_column(
    setting: str, name: str, columns: Iterable[str], where: str
) -> InputError:
    """Return the error for a column that a table does not have.

    Args:
        setting: the setting for the column's name; ``file_name`` has none.
        where: the table.
    """
    columns = list(columns)
    close = difflib.get_close_matches(name, columns, 1)
    setting_hint = ""
    guess_hint = ""
    if setting != "file_name":
        setting_hint = f" ({setting})"
        guess_hint = f" Did you mean {setting}={close[0]}?" if close else ""
    return InputError(
        f"{where}: no column {name!r}{setting_hint}; its columns are "
        f"{', '.join(columns) or 'none'}.{guess_hint}"
    )
