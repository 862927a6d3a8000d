"""Where a command writes its files, looked at before the work is done."""

import errno
import os
from pathlib import Path

from limner.errors import DiskError, InputError
from limner.storage import atomic

# In which colour is saved as it is.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def check_output_file(option: str, path: Path | None) -> None:
    """Refuse a place where no file can be written: a folder, or below a file.

    Raises:
        InputError: naming the option.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; give the name of a file in it")
    check_output_folder(option, path.parent)


def check_output_folder(option: str, path: Path) -> None:
    """Refuse a place where no folder can be, as there is a file, or a link to nothing.

    Raises:
        InputError: naming the option.
    """
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists():
            raise InputError(f"{option}: {place} is a file; give a folder, or a new name for one")
        if place.is_symlink():
            raise InputError(f"{option}: {describe_dangling(path, place)}")


def check_output_picture(option: str, path: Path | None) -> None:
    """Refuse a file in which no picture can be written; its suffix says the format.

    Raises:
        InputError: naming the option.
    """
    if path is not None and path.suffix.lower() not in PICTURES:
        raise InputError(
            f"{option}: {path} is of no format that pictures are written in; call it "
            f"{path.stem}.png, or one of {', '.join(PICTURES)}"
        )
    check_output_file(option, path)


def check_folder_place(path: Path) -> None:
    """Refuse a place where no folder can be made: at a file or below one, or at a link to nothing.

    Raises:
        DiskError: naming what is in the way.
    """
    for place in (path, *path.parents):
        with atomic.disk_errors(path):
            if place.is_dir():
                return
            if place.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
            if place.is_symlink():
                raise DiskError(describe_dangling(path, place))


def describe_dangling(path: Path, link: Path) -> str:
    """Say that no folder can be made where a link is in the way, which leads to nothing."""
    where = "it" if link == path else str(link)
    return (
        f"{path}: {where} is a link to {os.readlink(link)}, which is not there. Make that folder, "
        "remove the link, or choose another folder."
    )
