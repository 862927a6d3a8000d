"""What lies in a data folder: the files that records are made of, and all else with the reason."""

import os
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

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
# Files and folders that archivers and file managers leave behind.
IGNORED = frozenset(("__macosx", "thumbs.db", "desktop.ini"))
# Names of subfolders that are parts of a data set, not kinds of pictures.
SPLITS = frozenset(
    [
        "train",
        "training",
        "test",
        "testing",
        "val",
        "valid",
        "validation",
        "dev",
        "eval",
        "evaluation",
    ]
)
NAMED = 5  # files that a line names


@dataclass
class Listing:
    """The files below a folder, relative to it, in order; and by its reason what is left out."""

    root: Path
    files: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def pictures(self) -> list[str]:
        """Files that are pictures by their names."""
        return [name for name in self.files if is_picture(name)]

    @property
    def texts(self) -> list[str]:
        """Files that may hold captions."""
        return [name for name in self.files if name.lower().endswith(".txt")]

    @property
    def metadata(self) -> list[str]:
        """Metadata files."""
        return [name for name in self.files if is_metadata(name)]

    def leave_out(self, reason: str, *names: str) -> None:
        """Note that files or folders are left out; a line begins with their number."""
        if names:
            self.left_out.setdefault(reason, []).extend(names)

    def report_left_out(self, report: Report) -> None:
        """Say what is left out, in a line for each reason."""
        for reason, names in self.left_out.items():
            named = ", ".join(names[:NAMED] + ["..."] * (len(names) > NAMED))
            report(f"{self.root}: {len(names)} {reason}: {named}")


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return name.lower().endswith(PICTURES)


def is_metadata(name: str) -> bool:
    """Whether a file has rows with captions, by its name."""
    return name.rsplit("/", 1)[-1] in METADATA_FILES


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or an archiver's or a file manager's own."""
    return name.startswith(".") or name.lower() in IGNORED


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


def list_folder(root: Path) -> Listing:
    """List the files below a folder. Links to folders are not followed.

    Raises:
        InputError: when the folder is not there, or cannot be listed.
    """
    check_folder(root)
    listing, folders = Listing(root), [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise InputError(f"data.folder: {root}: {error.strerror}") from error
            listing.leave_out(f"folders cannot be listed ({error.strerror})", folder)
            continue
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_ignored(entry.name):
                listing.leave_out("hidden files and folders are left out", name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif os.path.isdir(entry.path):
                listing.leave_out("links to folders are not followed", name)
            elif is_file(entry):
                listing.files.append(name)
            else:
                listing.leave_out("pipes, sockets and devices are left out", name)
    listing.files.sort()
    return listing


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link that leads nowhere: its record is named as one without
    a file."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def find_base(listing: Listing, split: str, report: Report) -> str:
    """Return the subfolder of a split, with a slash behind it; empty where the whole folder is
    read.

    ``train``, which need not be asked for, is a split only where all other folders of pictures are
    called like splits; else it is a folder among others, and a line says so.

    Raises:
        InputError: when the folder of the split is not there.
    """
    root, prefix = listing.root, f"{os.path.normpath(split)}/"
    if prefix == "./":
        return ""
    if split != "train":
        if not (root / split).is_dir():
            raise InputError(
                f"data.split: {root} has no folder {split!r}; make one, or leave data.split out"
            )
        return prefix
    used = [name for name in listing.files if is_picture(name) or is_metadata(name)]
    if not any(name.startswith(prefix) for name in used):
        return ""
    beside = {
        name.split("/")[0]
        for name in used
        if name.split("/")[0].lower() not in SPLITS and ("/" in name or is_picture(name))
    }
    if not beside:
        return prefix
    names = sorted(beside)
    report(
        f"{root}: train is read as any other subfolder, since these lie beside it: "
        f"{', '.join(names[:NAMED] + ['...'] * (len(names) > NAMED))}. To read it alone, set "
        "data.folder to it."
    )
    return ""
