"""What lies in a data folder: the files that records are made of, and all else with the reason."""

import errno
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from limner.errors import InputError, join_first, make_printable, say_count
from limner.protocols import Report
from limner.storage.run_folder import RunFolder

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
# Names of subfolders that are parts of a data set, not kinds of pictures; those in a row mean the
# same, as they do to the library datasets.
SPLITS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
SPLIT_NAMES = frozenset(name for names in SPLITS for name in names)

Reason = tuple[str, str]  # what is said of one file, and of several
HIDDEN = "hidden file or folder is left out", "hidden files and folders are left out"
LINK = "link to a folder is not followed", "links to folders are not followed"
RUN = "folder of a run is left out", "folders of runs are left out"
RUN_FILES = frozenset((RunFolder(Path()).config.name, RunFolder(Path()).status.name))
PIPE = "pipe, socket or device is left out", "pipes, sockets and devices are left out"


@dataclass
class Listing:
    """The files below a folder, relative to it, in order; and by its reason what is left out."""

    root: Path
    files: list[str] = field(default_factory=list)
    left_out: dict[Reason, list[str]] = field(default_factory=dict)

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

    def leave_out(self, one: str, several: str, names: Iterable[str]) -> None:
        """Note that files or folders are left out, and what is said of one, or of several."""
        if names := list(names):
            self.left_out.setdefault((one, several), []).extend(names)

    def report_left_out(self, report: Report) -> None:
        """Say what is left out, in a line for each reason."""
        for reason, names in self.left_out.items():
            report(f"{self.root}: {say_count(len(names), *reason)}: {join_first(names)}")


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
    """Refuse a folder of pictures that is not there, or cannot be looked at."""
    if os.path.isdir(root):
        return
    try:
        os.stat(root)
        problem = "is not a folder"
    except PermissionError as error:
        problem = f"cannot be read ({error.strerror})"
    except (OSError, ValueError):  # the second for a name that no file can have
        problem = "is not there"
    raise InputError(f"data.folder: {root} {problem}; give a folder with pictures and captions")


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
            why = f"cannot be listed ({error.strerror})"
            listing.leave_out(f"folder {why}", f"folders {why}", [folder])
            continue
        # Its previews would be trained on when the command is run again.
        if folder and RUN_FILES.issubset(entry.name for entry in found):
            listing.leave_out(*RUN, [folder])
            continue
        for entry in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_ignored(entry.name):
                listing.leave_out(*HIDDEN, [name])
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif os.path.isdir(entry.path):
                listing.leave_out(*LINK, [name])
            elif is_file(entry):
                listing.files.append(name)
            else:
                listing.leave_out(*PIPE, [name])
    listing.files.sort()
    return listing


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link that leads nowhere: its record is named as one without
    a file."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def explain_no_file(path: Path, otherwise: str = "there is no such file") -> str:
    """Return the reason why a path is no file that can be read.

    Args:
        otherwise: of what is not there, and is no link.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            return f"{path.name} is a link that leads back to itself, so there is no such file"
        if error.errno == errno.ENOENT and os.path.islink(path):
            target = make_printable(os.path.realpath(path))
            return f"{path.name} is a link to {target}, and there is no such file"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EIO):
            return f"{path.name} cannot be read: {error.strerror}"
    except ValueError:  # a name that no file can have
        pass
    return otherwise


def find_base(listing: Listing, split: str, report: Report) -> str:
    """Return the subfolder of a split, with a slash behind it; empty where the whole folder is
    read.

    ``train``, which need not be asked for, is a split only where all other folders of pictures are
    called like splits; else it is a folder among others, and a line says so.

    Raises:
        InputError: when the folder of the split is not there, or could be one of several.
    """
    root = listing.root
    if os.path.normpath(split) == ".":
        return ""
    used = [name for name in listing.files if is_picture(name) or is_metadata(name)]
    folder = find_split(root, {name.split("/")[0] for name in used if "/" in name}, split)
    if folder is None:
        if split == "train":
            return ""
        raise InputError(
            f"data.split: {root} has no folder {split!r}; make one, or leave data.split out"
        )
    if split == "train":
        beside = list_other_folders(used)
        if beside:
            report(
                f"{root}: {folder} is read as any other subfolder, since these lie beside it: "
                f"{join_first(beside)}. To read it alone, set data.folder to it."
            )
            return ""
    if folder != os.path.normpath(split):
        report(f"{root}: {folder} is read, for data.split = {split!r}")
    return f"{folder}/"


def list_other_folders(used: Iterable[str]) -> list[str]:
    """Return the folders in the root that are not called like splits, and its own pictures."""
    tops = {name.split("/")[0] for name in used if "/" in name or is_picture(name)}
    return sorted(top for top in tops if top.lower() not in SPLIT_NAMES)


def find_split(root: Path, folders: set[str], split: str) -> str | None:
    """Return the folder of a split: the one of its very name, else the one that is called so but
    for small and large letters, or as splits of its kind are; None where there is none.

    Args:
        folders: those in the root that hold pictures or metadata.

    Raises:
        InputError: when it could be one of several.
    """
    exact = os.path.normpath(split)
    if exact in folders:
        return exact
    kinds = [names for names in SPLITS if exact.lower() in names]
    for meant in ((exact.lower(),), *kinds):
        alike = sorted(folder for folder in folders if folder.lower() in meant)
        if len(alike) > 1:
            raise InputError(
                f"data.split: {root} has {' and '.join(alike)}, and {split!r} could be any of "
                "them; give the name of one"
            )
        if alike:
            return alike[0]
        if split != "train" and os.path.isdir(root / split):
            return exact
    return None


def report_other_splits(root: Path, pictures: Iterable[str], report: Report) -> None:
    """Say which folders, of the first two levels, are trained on though they are called like parts
    of a data set that are kept from training: ``test``, ``images/val2017``."""
    others = set()
    for picture in pictures:
        parts = picture.split("/")[:-1][:2]
        for depth, part in enumerate(parts, 1):
            words = re.split("[^a-z]+", part.lower())
            if any(word in SPLIT_NAMES.difference(SPLITS[0]) for word in words):
                others.add("/".join(parts[:depth]))
    if others:
        report(
            f"{root}: trained on too, though called like what is kept from training: "
            f"{join_first(sorted(others))}. To read one part alone, set data.folder or data.split."
        )
