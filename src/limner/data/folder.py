"""Pictures in a folder, with metadata files, or with a caption file beside each."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from limner.config.schema import DataSettings
from limner.data.listing import (
    METADATA_FILES,
    Listing,
    compose_accents,
    explain_no_file,
    find_base,
    list_folder,
    report_other_splits,
)
from limner.data.metadata import Row, read_metadata
from limner.data.source import BadRecord, Record, read_captions
from limner.errors import InputError, join_first, make_printable, say_count
from limner.protocols import Report

CAPTION_FILE = 2**20  # characters


class Folder:
    """Pictures on disk, with metadata files, or with a ``.txt`` beside each: a caption per line.

    Metadata is ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, relative
    to it, in the folder, in its subfolder named like the split, or in several subfolders. Nothing
    outside the folder is ever read, and what is left out is reported.
    """

    def __init__(self, config: DataSettings, report: Report):
        self.root = Path(config.folder or "")
        self.real_root = Path(os.path.realpath(self.root))
        self.caption = config.caption
        everything = list_folder(self.root)
        everything.report_left_out(report)
        self.prefix = find_base(everything, config.split, report)
        self.base = self.root / self.prefix
        self.names = frozenset(everything.files)
        self.names_by_nfc = group_by(compose_accents, everything.files)
        self.files = Listing(self.root, [n for n in everything.files if n.startswith(self.prefix)])
        self.metadata = self.find_metadata(everything)
        self.rows = self.read_rows()
        used = {name for row in self.rows if (name := self.find_file(row)) is not None}
        self.report_unlisted(report)
        self.report_shared(report)
        if not self.prefix and os.path.normpath(config.split) != ".":
            report_other_splits(self.root, used, report)
        self.find_left_out(everything, used).report_left_out(report)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        where, name, captions, folder = self.rows[i]
        key = self.find_file(self.rows[i])
        reason = explain_bad_name(name)
        if key is None and reason is not None:
            printable = isinstance(name, str) and name and name.isprintable()
            raise BadRecord(name if printable else repr(name), f"{where}: {reason}")
        if key is None and (alike := self.find_spellings(self.rows[i])):
            raise BadRecord(
                name,
                f"{where}: file_name could be {' or '.join(map(ascii, alike))}, whose accents are "
                "written differently; rename one",
            )
        key = key or folder + os.path.normpath(name)
        path = self.root / key
        if not os.path.isfile(path):
            reason = explain_no_file(path, f"there is no such file in {self.root / folder}")
            raise BadRecord(key, f"{where}: {reason}" if self.metadata else reason)
        self.check_inside(path, key, where)
        if isinstance(captions, Path):
            self.check_inside(captions, key, where)
            captions = read_caption_file(captions, key)
        return Record(key, path, read_captions(captions, key, where))

    def find_metadata(self, everything: Listing) -> list[str]:
        """Return the metadata files that are read: all below the base; where it has none, the one
        in the root.

        Raises:
            InputError: for a link out of the folder, or several files in one folder.
        """
        names = self.files.metadata or [name for name in everything.metadata if "/" not in name]
        for name in names:
            folder = os.path.dirname(name)
            alike = [os.path.join(folder, other) for other in METADATA_FILES]
            alike = [other for other in alike if other in names]
            if len(alike) > 1:
                raise InputError(
                    f"{self.root}: {len(alike)} metadata files ({join_first(alike)}); keep the one "
                    "that holds"
                )
            if not self.is_inside(self.root / name):
                raise InputError(
                    f"{self.root / name} is a link to a place outside {self.root}; put the file "
                    "itself there"
                )
            if not os.path.lexists(os.path.realpath(self.root / name)):
                raise InputError(f"{self.root}: {explain_no_file(self.root / name)}")
        return names

    def read_rows(self) -> list[Row]:
        """Read the metadata files, or pair pictures with their caption files.

        Raises:
            InputError: when there is no record.
        """
        if self.metadata:
            return self.read_all_metadata()
        if self.caption is not None:
            return self.pair_with_texts()
        if not self.files.pictures:
            raise InputError(f"{self.base}: no pictures here; pictures is expected")
        return [Row(name, name, "") for name in self.files.pictures]

    def read_all_metadata(self) -> list[Row]:
        """Read the rows of all metadata files.

        Raises:
            InputError: when there are none, or when two files have rows for the same picture.
        """
        rows: list[Row] = []
        files: dict[str, str] = {}  # the metadata file of each picture
        most_rows = 10_000 + 1_000 * len(self.names)
        for metadata in self.metadata:
            shown = make_printable(metadata.removeprefix(self.prefix))
            folder = metadata[: metadata.rfind("/") + 1]
            for row in read_metadata(self.root / metadata, shown, self.caption, most_rows):
                row = Row(*row[:3], folder)
                picture = self.find_file(row)
                if picture is not None and files.setdefault(picture, metadata) != metadata:
                    raise InputError(
                        f"{self.root}: {make_printable(picture)} has rows in "
                        f"{make_printable(files[picture])} and in {make_printable(metadata)}; "
                        "keep those that hold"
                    )
                if picture is None or picture.startswith(self.prefix):
                    rows.append(row)
        if not rows:
            columns = "file_name" + (f" and {self.caption}" if self.caption else "")
            raise InputError(
                f"{self.root / self.metadata[0]}: no rows; a row per picture with {columns} is "
                "expected"
            )
        return rows

    def pair_with_texts(self) -> list[Row]:
        """Return a row for each picture that has a ``.txt`` of the same name."""
        pictures = self.files.pictures
        if not pictures:
            raise InputError(
                f"{self.base}: no pictures here; pictures with {' or '.join(METADATA_FILES)}, or "
                "with a .txt beside each, are expected"
            )
        texts = self.match_texts()
        rows = [
            Row(texts[name], name, self.root / texts[name]) for name in pictures if name in texts
        ]
        if not rows:
            raise InputError(self.explain_missing_captions())
        return rows

    def match_texts(self) -> dict[str, str]:
        """Return the text of each picture that has one: that of its very name, else one whose name
        has its accents written in another way, and is no other picture's.

        Raises:
            InputError: when it could be one of several.
        """
        stems = {name: os.path.splitext(name)[0] for name in self.files.pictures}
        texts = group_by(cut_ending, self.files.texts)
        others = [name for name in self.files.texts if cut_ending(name) not in stems.values()]
        others_by_nfc = group_by(lambda name: compose_accents(cut_ending(name)), others)
        pairs = {}
        for picture, stem in stems.items():
            alike = texts.get(stem) or others_by_nfc.get(compose_accents(stem), [])
            if len(alike) > 1 and f"{stem}.txt" not in alike:
                raise InputError(
                    f"{self.root}: {make_printable(picture)} could have its caption from any of "
                    f"{', '.join(map(ascii, alike))}; keep one"
                )
            if alike:
                pairs[picture] = f"{stem}.txt" if f"{stem}.txt" in alike else alike[0]
        return pairs

    def explain_missing_captions(self) -> str:
        """Return the message for pictures without captions."""
        pictures = self.files.pictures
        count = f"{self.base}: {say_count(len(pictures), 'picture', 'pictures')}, but no captions"
        for name in self.files.files:
            meant = find_meant(os.path.basename(name))
            if meant is not None:
                return (
                    f"{count}; {make_printable(name)} is not read by that name: if it holds the "
                    f"captions, call it {meant}"
                )
        example = json.dumps(
            {"file_name": pictures[0], self.caption: "what it shows"}, ensure_ascii=False
        )
        return (
            f"{count}; write metadata.jsonl with a line such as {make_printable(example)} for "
            "each, or a .txt beside each"
        )

    def report_unlisted(self, report: Report) -> None:
        """Say which files are used because metadata names them, though what they lie in was told
        as left out."""
        paths = {
            row.folder + os.path.normpath(row.file_name)
            for row in self.rows
            if explain_bad_name(row.file_name) is None and self.find_file(row) is None
        }
        files = [path for path in sorted(paths) if os.path.isfile(self.root / path)]
        used = Listing(self.root)
        used.leave_out(
            "file in what is left out is used all the same, since metadata names it",
            "files in what is left out are used all the same, since metadata names them",
            (path for path in files if self.is_inside(self.root / path)),
        )
        used.report_left_out(report)

    def report_shared(self, report: Report) -> None:
        """Say which pictures have one text, as ``a.png`` and ``a.jpg`` have."""
        rows = [row for row in self.rows if isinstance(row.captions, Path)]
        counts = Counter(row.where for row in rows)
        shared = Listing(self.root)
        shared.leave_out(
            "picture shares its .txt with another",
            "pictures share their .txt with another",
            (row.file_name for row in rows if counts[row.where] > 1),
        )
        shared.report_left_out(report)

    def find_left_out(self, everything: Listing, used: set[str]) -> Listing:
        """Return what is in the folder and in no record, by reason.

        Args:
            used: the files of all records.
        """
        pictures, texts, metadata = self.files.pictures, self.files.texts, set(self.metadata)
        read = {row.where for row in self.rows if isinstance(row.captions, Path)}
        unread, need = "left out, because no picture has the same name", ".txt with {} caption"
        if self.metadata:
            name = os.path.basename(self.metadata[0])
            need = f"row in {name if len(self.metadata) == 1 else 'a metadata file'}"
            unread = f"not read, since {name} has the captions"
        elif self.caption is None:
            unread = "not read, since data.caption is none"
        rest = set(self.files.files).difference(pictures, texts, metadata, used)
        left_out = Listing(self.root)
        total = f"of {len(pictures)} pictures"
        left_out.leave_out(
            f"{total} is left out, because it has no {need.format('its')}",
            f"{total} are left out, because they have no {need.format('their')}",
            (name for name in pictures if name not in used),
        )
        texts = [name for name in texts if name not in read and name not in used]
        stems = {compose_accents(os.path.splitext(name)[0]) for name in pictures}
        if self.metadata or self.caption is None:
            stems = set()
        second = [name for name in texts if compose_accents(cut_ending(name)) in stems]
        left_out.leave_out(
            "text is left out, because its picture has another",
            "texts are left out, because their pictures have others",
            second,
        )
        left_out.leave_out(
            f"text is {unread}",
            f"texts are {unread}",
            (name for name in texts if name not in second),
        )
        left_out.leave_out(
            "file that is no picture is left out",
            "files that are no pictures are left out",
            sorted(rest),
        )
        where = f"not in {self.prefix}, which is data.split"
        left_out.leave_out(
            f"file is left out, since it is {where}",
            f"files are left out, since they are {where}",
            (n for n in everything.files if not n.startswith(self.prefix) and n not in metadata),
        )
        return left_out

    def find_file(self, row: Row) -> str | None:
        """Return a row's file as the disk spells it, relative to the root; None where there is
        none, or several differ in their accents alone."""
        spellings = self.find_spellings(row)
        return spellings[0] if len(spellings) == 1 else None

    def find_spellings(self, row: Row) -> list[str]:
        """Return the files that a row may mean: the one of its very name, else those of its name
        with composed or decomposed accents. It may have either slash."""
        name = row.file_name
        if not isinstance(name, str):
            return []
        # A name that is listed is one, whatever it would mean elsewhere: "C: the sea.png".
        paths = [row.folder + name]
        if explain_bad_name(name) is None:
            spellings = (name, name.replace("\\", "/"))
            paths += [os.path.normpath(row.folder + spelling) for spelling in spellings]
        for path in paths:
            if path in self.names:
                return [path]
            if compose_accents(path) in self.names_by_nfc:
                return self.names_by_nfc[compose_accents(path)]
        return []

    def check_inside(self, path: Path, key: str, where: str) -> None:
        """Refuse a link that leads out of the folder."""
        if not self.is_inside(path):
            raise BadRecord(key, f"{where}: {path.name} is a link to a place outside {self.root}")

    def is_inside(self, path: Path) -> bool:
        """Whether a file is in the folder, after all links; one that leads to itself is."""
        # Not by ``Path.resolve``, which raises RuntimeError for a link that leads to itself.
        return Path(os.path.realpath(path)).is_relative_to(self.real_root)


def group_by(read_key: Callable[[str], str], names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by a part or form of them, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(read_key(name), []).append(name)
    return groups


def cut_ending(text: str) -> str:
    """Return the name of a text without ``.txt``."""
    return text[: -len(".txt")]


def find_meant(name: str) -> str | None:
    """Return the metadata file that a file is meant to be, which is called ``Metadata.JSONL`` or
    ``metadata.csv.txt``; None where it is another."""
    lower = name.lower()
    return next((meant for meant in METADATA_FILES if lower.startswith(meant)), None)


def explain_bad_name(name: object) -> str | None:
    """Return the reason why a file name is refused before it is looked up; None for a good one."""
    if not isinstance(name, str) or not name.strip():
        return "file_name is missing or not a text"
    if "\0" in name:
        return "file_name holds a NUL character"
    # Either slash may be meant; what a folder's name and '..' undo between them is of no matter.
    spellings = os.path.normpath(name), os.path.normpath(name.replace("\\", "/"))
    if any(spelling.split("/")[0] == ".." for spelling in spellings):
        return "file_name leads out of the metadata file's folder with '..'"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return "file_name is absolute; it must be relative to the metadata file"
    return None


def read_caption_file(path: Path, key: str) -> list[str]:
    """Read the captions of one picture, one per line; an empty file is one empty caption."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(CAPTION_FILE + 1)
    except FileNotFoundError as error:
        raise BadRecord(key, explain_no_file(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BadRecord(key, f"{path.name} cannot be read: {reason}") from error
    if len(text) > CAPTION_FILE:
        raise BadRecord(key, f"{path.name} has more than {CAPTION_FILE} characters")
    # Not by ``splitlines``, for which a line ends at marks too that captions may hold.
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line] or [""]
