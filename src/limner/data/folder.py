"""Pictures in a folder, with a metadata file, or with a caption file beside each."""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from limner.config.schema import DataSettings
from limner.data.source import BadRecord, Record, explain_missing_column, read_captions
from limner.errors import InputError
from limner.json_types import Plain
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
# Files and folders that archivers and file managers leave behind.
IGNORED = frozenset(("__macosx", "thumbs.db", "desktop.ini"))


class Row(NamedTuple):
    """A record as it is written down."""

    where: str  # the line, for messages
    file_name: Any  # a text, if the metadata are right
    captions: Any  # a text or a list of texts, or the path of a caption file


class Folder:
    """Pictures on disk, with a metadata file, or with a ``.txt`` beside each: a caption per line.

    Metadata is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, relative
    to it, in the folder or in its subfolder named like the split. Nothing outside the folder is
    ever read.
    """

    def __init__(self, config: DataSettings, report: Report):
        self.root = Path(config.folder or "")
        self.real_root = self.root.resolve()
        self.caption = config.caption
        self.base, self.metadata = find_metadata(self.root, config.split)
        self.files = sorted(list_files(self.base))
        self.names = frozenset(self.files)
        self.names_by_nfc = {compose_accents(name): name for name in self.files}
        self.pictures = [name for name in self.files if name.lower().endswith(PICTURES)]
        self.rows = self.read_rows()
        self.report_left_out(report)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        where, name, captions = self.rows[i]
        reason = explain_bad_name(name)
        if reason is not None:
            printable = isinstance(name, str) and name and name.isprintable()
            raise BadRecord(name if printable else repr(name), f"{where}: {reason}")
        path = self.base / (self.find_file(name) or name)
        key = path.relative_to(self.root).as_posix()
        if not os.path.isfile(path):
            raise BadRecord(key, f"{where}: there is no such file in {self.base}")
        self.check_inside(path, key, where)
        if isinstance(captions, Path):
            self.check_inside(captions, key, where)
            captions = read_caption_file(captions, key)
        return Record(key, path, read_captions(captions, key, where))

    def read_rows(self) -> list[Row]:
        """Read the metadata file, or pair pictures with their caption files.

        Raises:
            InputError: when there is no record.
        """
        if self.metadata is not None:
            rows = list(read_metadata(self.metadata, self.caption))
            if not rows:
                columns = "file_name" + (f" and {self.caption}" if self.caption else "")
                raise InputError(
                    f"{self.metadata}: no rows; a row per picture with {columns} is expected"
                )
            return rows
        if self.caption is not None:
            return self.pair_with_texts()
        if not self.pictures:
            raise InputError(f"{self.base}: no pictures here; pictures is expected")
        return [Row(name, name, "") for name in self.pictures]

    def pair_with_texts(self) -> list[Row]:
        """Return a row for each picture that has a ``.txt`` of the same name."""
        if not self.pictures:
            raise InputError(
                f"{self.base}: no pictures here; pictures with {' or '.join(METADATA_FILES)}, or "
                "with a .txt beside each, are expected"
            )
        texts = {
            compose_accents(name[:-4]): name for name in self.files if name.lower().endswith(".txt")
        }
        rows = []
        for name in self.pictures:
            text = texts.get(compose_accents(os.path.splitext(name)[0]))
            if text is not None:
                rows.append(Row(text, name, self.base / text))
        if not rows:
            example = json.dumps(
                {"file_name": self.pictures[0], self.caption: "what it shows"}, ensure_ascii=False
            )
            raise InputError(
                f"{self.base}: {len(self.pictures)} pictures, but no captions; write "
                f"metadata.jsonl with a line such as {example} for each, or a .txt beside each"
            )
        return rows

    def report_left_out(self, report: Report) -> None:
        """Report pictures without a row."""
        listed = {
            self.find_file(row.file_name) for row in self.rows if isinstance(row.file_name, str)
        }
        left_out = [name for name in self.pictures if name not in listed]
        if not left_out:
            return
        if self.metadata is None:
            need = "a .txt with their caption"
        else:
            need = f"a row in {self.metadata.name}"
        names = ", ".join(left_out[:5] + ["..."] * (len(left_out) > 5))
        report(
            f"{self.base}: {len(left_out)} of {len(self.pictures)} pictures are left out, for want "
            f"of {need}: {names}"
        )

    def find_file(self, name: str) -> str | None:
        """Return a metadata row's file as the disk spells it.

        A row may have composed or decomposed accents, and either slash.
        """
        for spelling in (os.path.normpath(name), os.path.normpath(name.replace("\\", "/"))):
            if spelling in self.names:
                return spelling
            if compose_accents(spelling) in self.names_by_nfc:
                return self.names_by_nfc[compose_accents(spelling)]
        return None

    def check_inside(self, path: Path, key: str, where: str) -> None:
        """Refuse a link that leads out of the folder."""
        if not path.resolve().is_relative_to(self.real_root):
            raise BadRecord(key, f"{where}: {path.name} is a link to a place outside {self.root}")


def compose_accents(name: str) -> str:
    """Return a name in Unicode's form NFC: some systems decompose accents in file names."""
    return unicodedata.normalize("NFC", name)


def check_folder(root: Path) -> None:
    """Refuse a folder of pictures that is not there."""
    if not root.is_dir():
        raise InputError(
            f"data.folder: {root} is {'not a folder' if root.exists() else 'not there'}; give a "
            "folder with pictures and captions"
        )


def find_metadata(root: Path, split: str) -> tuple[Path, Path | None]:
    """Return the folder that file names are relative to, and its metadata file if there is one."""
    check_folder(root)
    split_folder = root / split
    if split != "train" and not split_folder.is_dir():
        raise InputError(
            f"data.split: {root} has no folder {split!r}; make one, or leave data.split out"
        )
    folders = [root]
    if split_folder.is_dir() and split not in ("", "."):
        folders = [split_folder, root]
    paths = [
        folder / name for folder in folders for name in METADATA_FILES if (folder / name).is_file()
    ]
    if len(paths) > 1:
        names = ", ".join(str(path.relative_to(root)) for path in paths)
        raise InputError(f"{root}: {len(paths)} metadata files ({names}); keep the one that holds")
    if paths:
        return paths[0].parent, paths[0]
    return folders[0], None


def list_files(base: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it; none that is hidden or ignored."""

    def is_ignored(name: str) -> bool:
        return name.startswith(".") or name.lower() in IGNORED

    for folder, subfolders, names in os.walk(base):
        # os.walk goes on into the folders that are left in its list.
        subfolders[:] = [name for name in subfolders if not is_ignored(name)]
        for name in names:
            if not is_ignored(name):
                yield Path(folder, name).relative_to(base).as_posix()


def explain_bad_name(name: object) -> str | None:
    """Return the reason why a file name is refused before it is looked up; None for a good one."""
    if not isinstance(name, str) or not name.strip():
        return "file_name is missing or not a text"
    if "\0" in name:
        return "file_name holds a NUL character"
    if ".." in re.split(r"[\\/]", name):
        return "file_name leads out of the folder with '..'"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return "file_name is absolute; it must be relative to the metadata file"
    return None


def read_caption_file(path: Path, key: str) -> list[str]:
    """Read the captions of one picture, one per line; an empty file is one empty caption."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadRecord(key, f"{path.name} cannot be read: {reason}") from error
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line] or [""]


def read_metadata(path: Path, caption: str | None) -> Iterator[Row]:
    """Read the rows of a metadata file with its columns of file names and captions.

    Args:
        caption: the column of captions; None: each row has an empty one.
    """
    readers = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
    try:
        columns, rows = readers[path.suffix](path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    for setting, name in (("file_name", "file_name"), ("data.caption", caption)):
        if rows and name is not None and name not in columns:
            raise explain_missing_column(setting, name, columns, str(path))
    return (
        Row(where, row.get("file_name"), "" if caption is None else row.get(caption))
        for where, row in rows
    )


# The columns of a metadata file, and its rows: (the line, the values by column).
Table = tuple[list[str], list[tuple[str, Plain]]]


def read_jsonl(path: Path) -> Table:
    """Read a file of one JSON object a line; its columns are all names in any line."""
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
    columns = dict.fromkeys(name for _, row in rows for name in row)
    return list(columns), rows


def read_csv(path: Path) -> Table:
    """Read a CSV file in UTF-8 whose first line names its columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(f"{path.name} line {reader.line_num}", row) for row in reader]
            columns = list(reader.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from error
    for where, row in rows:
        # DictReader puts the fields beyond the columns under None.
        if None in row:
            raise InputError(
                f"{where} of {path.parent}: more fields than the {len(columns)} columns; put a "
                "caption that holds commas in double quotes"
            )
    return columns, rows


def read_parquet(path: Path) -> Table:
    """Read a parquet file."""
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
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from error
    return table.column_names, [(f"{path.name} row {i}", row) for i, row in enumerate(rows, 1)]
