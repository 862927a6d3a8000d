"""Pictures in a folder, with a metadata file or a caption file beside each."""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limner.config.schema import DataSettings
from limner.data.source import BadRecord, Record, Row, missing_column, read_captions
from limner.errors import InputError
from limner.protocols import Report

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
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


class Folder:
    """Pictures on disk, with a metadata file, or with a ``.txt`` beside each picture: one caption
    per line.

    Metadata is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, relative
    to it, in the folder or in its subfolder named like the split. Nothing outside the folder is
    ever read.
    """

    def __init__(self, config: DataSettings, report: Report):
        self.root = Path(config.folder or "")
        self.caption = config.caption
        self.base, metadata = _place(self.root, config.split)
        self.real = self.root.resolve()
        files = sorted(_walk(self.base))
        self.files = frozenset(files)
        self.composed = {_nfc(name): name for name in files}
        pictures = [name for name in files if name.lower().endswith(PICTURES)]
        if config.caption is None and metadata is None:
            self.rows = [(name, name, "") for name in pictures]
        elif metadata is None:
            self.rows = self._text_rows(pictures)
        else:
            self.rows = list(_read(metadata, config.caption))
        if not self.rows:
            wanted = (
                "pictures"
                if metadata is None
                else " and ".join(
                    [
                        "a row per picture with file_name",
                        *([config.caption] if config.caption else []),
                    ]
                )
            )
            raise InputError(
                f"{metadata or self.base}: "
                f"{'no pictures here' if metadata is None else 'no rows'}; {wanted} is expected"
            )
        named = {self._listed(name) for _, name, _ in self.rows if isinstance(name, str)}
        if alone := [name for name in pictures if name not in named]:
            wanted = (
                "a .txt with their caption" if metadata is None else f"a row in {metadata.name}"
            )
            names = ", ".join(alone[:5] + ["..."] * (len(alone) > 5))
            report(
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
        return Record(key, path, read_captions(value, key, where))

    def _text_rows(self, pictures: list[str]) -> list[Row]:
        texts = {_nfc(name[:-4]): name for name in self.files if name.lower().endswith(".txt")}
        if not pictures:
            raise InputError(
                f"{self.base}: no pictures here; pictures with {' or '.join(METADATA_FILES)}, or "
                "with a "
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
            raise InputError(f"{self.base}: {len(pictures)} pictures, but no captions; {hint}")
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
        raise InputError(
            f"data.folder: {root} is {'not a folder' if root.exists() else 'not there'}; give a "
            "folder with pictures and captions"
        )
    inner = root / split
    if split != "train" and not inner.is_dir():
        raise InputError(
            f"data.split: {root} has no folder {split!r}; make one, or leave data.split out"
        )
    places = [inner, root] if inner.is_dir() and split not in ("", ".") else [root]
    found = [
        place / name for place in places for name in METADATA_FILES if (place / name).is_file()
    ]
    if len(found) > 1:
        raise InputError(
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
        raise InputError(f"{metadata}: cannot be read: {error.strerror or error}") from error
    for setting, name in (("file_name", "file_name"), ("data.caption", caption)):
        if rows and name is not None and name not in columns:
            raise missing_column(setting, name, columns, str(metadata))
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
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(
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
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from error
    for where, row in rows:
        if None in row:
            raise InputError(
                f"{where} of {path.parent}: more fields than the {len(columns)} columns; put a "
                "caption that holds commas in double quotes"
            )
    return columns, rows


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; install it (pip install pyarrow), or write "
            "metadata.jsonl"
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
        return table.column_names, [
            (f"{path.name} row {i}", row) for i, row in enumerate(table.to_pylist(), 1)
        ]
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from error
