"""Where a command writes its files, looked at before the work is done."""

from pathlib import Path

from limner.errors import InputError

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
    """Refuse a place where no folder can be, as there is a file.

    Raises:
        InputError: naming the option.
    """
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists():
            raise InputError(f"{option}: {place} is a file; give a folder, or a new name for one")


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
