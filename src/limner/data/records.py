"""A source is anything with a length whose [i] is a Record: a folder with captions, a Hub data set,
or a user's own object."""

import csv
import difflib
import errno
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from limner import config
from limner.data.image import Picture
from limner.faults import DiskFault, Fault, HubFault, InputFault

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PICTURES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
)
IGNORED = frozenset(("__macosx", "thumbs.db", "desktop.ini"))
Tell = Callable[[str], None]
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
        object.__setattr__(self, "captions", _captions(self.captions, self.key))
        if isinstance(self.image, str):
            object.__setattr__(self, "image", Path(self.image))


class Source(Protocol):
    """Records by number. ``[i]`` gives the same record each time, from any thread, or raises
    ``BadRecord``."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Record: ...


def _captions(value: Any, key: str, where: str = "") -> tuple[str, ...]:
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


def _no_column(setting: str, name: str, columns: Iterable[str], where: str) -> InputFault:
    columns = list(columns)
    close = difflib.get_close_matches(name, columns, 1)
    hint = f" Did you mean {setting}={close[0]}?" if close and setting != "file_name" else ""
    return InputFault(
        f"{where}: no column {name!r}{'' if setting == 'file_name' else f' ({setting})'}; its "
        f"columns are {', '.join(columns) or 'none'}.{hint}"
    )


class Folder:
    """Pictures on disk, with a metadata file, or with a ``.txt`` beside each picture: one caption
    per line.

    Metadata is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, relative
    to it, in the folder or in its subfolder named like the split. Nothing outside the folder is
    ever read.
    """

    def __init__(self, cfg: config.Data, tell: Tell):
        self.root = Path(cfg.folder or "")
        self.caption = cfg.caption
        self.base, metadata = _place(self.root, cfg.split)
        self.real = self.root.resolve()
        files = sorted(_walk(self.base))
        self.files = frozenset(files)
        self.composed = {_nfc(name): name for name in files}
        pictures = [name for name in files if name.lower().endswith(PICTURES)]
        if cfg.caption is None and metadata is None:
            self.rows = [(name, name, "") for name in pictures]
        elif metadata is None:
            self.rows = self._text_rows(pictures)
        else:
            self.rows = list(_read(metadata, cfg.caption))
        if not self.rows:
            wanted = (
                "pictures"
                if metadata is None
                else " and ".join(
                    ["a row per picture with file_name", *([cfg.caption] if cfg.caption else [])]
                )
            )
            raise InputFault(
                f"{metadata or self.base}: "
                f"{'no pictures here' if metadata is None else 'no rows'}; {wanted} is expected"
            )
        named = {self._listed(name) for _, name, _ in self.rows if isinstance(name, str)}
        if alone := [name for name in pictures if name not in named]:
            wanted = (
                "a .txt with their caption" if metadata is None else f"a row in {metadata.name}"
            )
            names = ", ".join(alone[:5] + ["..."] * (len(alone) > 5))
            tell(
                f"{self.base}: {len(alone)} of {len(pictures)} pictures are left out, for want of "
                f"{wanted}: {names}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        where, name, value = self.rows[i]
        if reason := _refusal(name):
            raise BadRecord(
                name if isinstance(name, str) and name.isprintable() and name else repr(name),
                f"{where}: {reason}",
            )
        path = self.base / (self._listed(name) or name)
        key = str(path.relative_to(self.root).as_posix())
        if not os.path.isfile(path):
            raise BadRecord(key, f"{where}: there is no such file in {self.base}")
        self._check_inside(path, key, where)
        if isinstance(value, Path):
            self._check_inside(value, key, where)
            value = _lines(value, key)
        return Record(key, path, _captions(value, key, where))

    def _text_rows(self, pictures: list[str]) -> list[Row]:
        texts = {_nfc(name[:-4]): name for name in self.files if name.lower().endswith(".txt")}
        if not pictures:
            raise InputFault(
                f"{self.base}: no pictures here; pictures with {' or '.join(METADATA)}, or with a "
                ".txt beside each, are expected"
            )
        rows: list[Row] = [
            (texts[stem], name, self.base / texts[stem])
            for name in pictures
            if (stem := _nfc(os.path.splitext(name)[0])) in texts
        ]
        if not rows:
            example = json.dumps(
                {"file_name": pictures[0], self.caption: "what it shows"}, ensure_ascii=False
            )
            hint = (
                f"write metadata.jsonl with a line such as {example} for each, or a .txt "
                "beside each"
            )
            raise InputFault(f"{self.base}: {len(pictures)} pictures, but no captions; {hint}")
        return rows

    def _listed(self, name: str) -> str | None:
        """The file that a metadata row means, as the disk spells it: composed or decomposed
        accents, either slash."""
        for spelling in (os.path.normpath(name), os.path.normpath(name.replace("\\", "/"))):
            if spelling in self.files:
                return spelling
            if _nfc(spelling) in self.composed:
                return self.composed[_nfc(spelling)]
        return None

    def _check_inside(self, path: Path, key: str, where: str) -> None:
        if not path.resolve().is_relative_to(self.real):
            raise BadRecord(key, f"{where}: {path.name} is a link to a place outside {self.root}")


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _place(root: Path, split: str) -> tuple[Path, Path | None]:
    """The folder that file names are relative to, and its metadata file if there is one."""
    if not root.is_dir():
        raise InputFault(
            f"data.folder: {root} is {'not a folder' if root.exists() else 'not there'}; give a "
            "folder with pictures and captions"
        )
    inner = root / split
    if split != "train" and not inner.is_dir():
        raise InputFault(
            f"data.split: {root} has no folder {split!r}; make one, or leave data.split out"
        )
    places = [inner, root] if inner.is_dir() and split not in ("", ".") else [root]
    found = [place / name for place in places for name in METADATA if (place / name).is_file()]
    if len(found) > 1:
        raise InputFault(
            f"{root}: {len(found)} metadata files "
            f"({', '.join(str(p.relative_to(root)) for p in found)}); keep the one that holds"
        )
    if found:
        return found[0].parent, found[0]
    return places[0], None


def _walk(base: Path) -> Iterator[str]:
    """Names of all files below a folder, relative to it; nothing hidden, nothing that systems leave
    behind."""

    def ignored(name: str) -> bool:
        return name.startswith(".") or name.lower() in IGNORED

    for folder, inner, names in os.walk(base):
        inner[:] = [name for name in inner if not ignored(name)]
        for name in names:
            if not ignored(name):
                yield Path(folder, name).relative_to(base).as_posix()


def _refusal(name: Any) -> str | None:
    """Why a file name of a metadata row is not even looked up."""
    if not isinstance(name, str) or not name.strip():
        return "file_name is missing or not a text"
    if "\0" in name:
        return "file_name holds a NUL character"
    if ".." in re.split(r"[\\/]", name):
        return "file_name leads out of the folder with '..'"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return "file_name is absolute; it must be relative to the metadata file"
    return None


def _lines(path: Path, key: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRecord(
            key,
            f"{path.name} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is not UTF-8 text'}",
        ) from error
    return [line for part in text.splitlines() if (line := part.strip())] or [""]


def _read(metadata: Path, caption: str | None) -> Iterator[Row]:
    """The rows of a metadata file; it must have both columns. Without captions each row has an
    empty one."""
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[metadata.suffix]
    try:
        columns, rows = read(metadata)
    except OSError as error:
        raise InputFault(f"{metadata}: cannot be read: {error.strerror or error}") from error
    for setting, name in (("file_name", "file_name"), ("data.caption", caption)):
        if rows and name is not None and name not in columns:
            raise _no_column(setting, name, columns, str(metadata))
    return (
        (where, row.get("file_name"), "" if caption is None else row.get(caption))
        for where, row in rows
    )


Table = tuple[
    list[str], list[tuple[str, dict[str, Any]]]
]  # columns, and rows with where they are written


def _read_jsonl(path: Path) -> Table:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputFault(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputFault(
                f'{path}:{number}: {row!r:.60} is not a row; {{"file_name": ..., ...}} is expected'
            )
        rows.append((f"{path.name} line {number}", row))
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _read_csv(path: Path) -> Table:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(f"{path.name} line {reader.line_num}", row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputFault(f"{path}: not a CSV file in UTF-8: {error}") from error
    for where, row in rows:
        if None in row:
            raise InputFault(
                f"{where} of {path.parent}: more fields than the {len(columns)} columns; put a "
                "caption that holds commas in double quotes"
            )
    return columns, rows


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputFault(
            f"{path}: reading parquet needs pyarrow; install it (pip install pyarrow), or write "
            "metadata.jsonl"
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
        return table.column_names, [
            (f"{path.name} row {i}", row) for i, row in enumerate(table.to_pylist(), 1)
        ]
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputFault(f"{path}: not a parquet file: {error}") from error


class Hub:
    """A data set that ``datasets.load_dataset`` knows by name or path; its pictures are read from
    their files' bytes, as they are."""

    def __init__(self, cfg: config.Data):
        try:
            import datasets
        except ImportError as error:
            raise InputFault(
                "data.hub: Hub data sets need the package datasets; install it (pip install "
                "limner[hub]), or give data.folder"
            ) from error
        self.image, self.caption = cfg.image, cfg.caption
        try:
            table = datasets.load_dataset(
                cfg.hub,
                cfg.hub_config,
                split=cfg.split,
                revision=cfg.hub_revision,
                data_dir=cfg.hub_files,
                cache_dir=cfg.cache_dir,
            )
        except Exception as error:
            raise _hub_fault(error, cfg) from error
        for setting, name in (("data.image", cfg.image), ("data.caption", cfg.caption)):
            if name is not None and name not in table.column_names:
                raise _no_column(setting, name, table.column_names, f"data.hub: {cfg.hub}")
        table = table.select_columns(
            [name for name in (cfg.image, cfg.caption) if name is not None]
        )
        feature = table.features[cfg.image]
        if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (
            "string",
            "large_string",
            "binary",
            "large_binary",
        ):
            table = table.cast_column(cfg.image, datasets.Image(decode=False))
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Record:
        row = self.table[i]
        value, key = row[self.image], f"row {i}"
        if isinstance(value, dict):
            path = value.get("path")
            key = f"{key} ({Path(path).name})" if path else key
            value = value.get("bytes") if value.get("bytes") is not None else path
        if value is None:
            raise BadRecord(key, f"the picture is missing ({self.image} is null)")
        if isinstance(value, str) and "://" in value:
            raise BadRecord(
                key, f"{value} is an address, not a picture; download the pictures first"
            )
        if isinstance(value, list):
            value = np.asarray(value, dtype=np.uint8)
        return Record(key, value, _captions("" if self.caption is None else row[self.caption], key))


def _hub_fault(error: Exception, cfg: config.Data) -> Fault:
    """What kept ``load_dataset`` from its work, and what to do about it."""
    cause = (
        error.__cause__
        if type(error).__name__ == "DatasetGenerationError"
        and isinstance(error.__cause__, Exception)
        else error
    )
    text, name = " ".join(str(cause).split()) or type(cause).__name__, f"data.hub: {cfg.hub}"
    if isinstance(cause, OSError) and cause.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        return DiskFault(
            f"{name}: {cause.strerror} "
            f"({cause.filename or cfg.cache_dir or 'cache of datasets'}). Make room, or set "
            "data.cache_dir."
        )
    if re.search(r"gated|authenticated|ask for access|\b40[13]\b", text):
        return HubFault(
            f"{name}: access is refused: {text} Log in with `hf auth login` or set HF_TOKEN, and "
            "accept the data set's terms on its page."
        )
    library = type(cause).__module__.split(".")[0]
    if isinstance(cause, ConnectionError | TimeoutError) or library in (
        "httpx",
        "httpcore",
        "requests",
        "urllib3",
        "huggingface_hub",
    ):
        return HubFault(
            f"{name}: cannot be downloaded: {text} Check the connection (and HF_HUB_OFFLINE), "
            "then start again."
        )
    if "nknown split" in text:
        return InputFault(f"{name}: data.split={cfg.split}: {text}")
    if "onfig name is missing" in text or "BuilderConfig" in text:
        return InputFault(f"{name}: data.hub_config={cfg.hub_config}: {text}")
    if type(cause).__name__ == "DatasetNotFoundError":
        return InputFault(
            f"{name}: {text} Check the name and data.hub_revision; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    return InputFault(f"{name}: cannot be loaded: {text} ({type(cause).__name__})")
