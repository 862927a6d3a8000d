"""Data sets that the package ``datasets`` loads, from the Hub or from disk."""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from limner.config.schema import DataSettings
from limner.data.listing import is_picture
from limner.data.source import BadRecord, Record, explain_missing_column, read_captions
from limner.errors import DiskError, HubError, InputError, LimnerError, join_first, say_count
from limner.storage import atomic

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NETWORK_LIBRARIES = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
# What datasets calls its readers of files; their folder is data.hub_files.
READERS = (
    *("arrow", "csv", "hdf5", "imagefolder", "json", "lance", "pandas", "parquet", "text"),
    *("webdataset", "xml"),
)
# Types of a column that holds pictures as paths or as the bytes of files.
FILE_DTYPES = ("string", "large_string", "binary", "large_binary")

# Part of a table by its name; what datasets puts behind the total may differ between parts.
PART = re.compile(r"(.*?)(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?((?:\.\w+)+)")


class HubDataset:
    """A data set by its name or path; pictures are the bytes of their files."""

    def __init__(self, config: DataSettings):
        self.image = config.image
        self.caption = config.caption
        self.table = load_table(config)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> Record:
        row = self.table[i]
        picture = row[self.image]
        key = f"row {i}"
        if isinstance(picture, dict):
            path = picture.get("path")
            key = f"{key} ({Path(path).name})" if path else key
            picture = path if picture.get("bytes") is None else picture["bytes"]
        if picture is None:
            raise BadRecord(key, f"the picture is missing ({self.image} is null)")
        if isinstance(picture, str) and "://" in picture:
            raise BadRecord(
                key, f"{picture} is an address, not a picture; download the pictures first"
            )
        if isinstance(picture, list):
            picture = read_pixels(picture, key)
        caption = "" if self.caption is None else row[self.caption]
        return Record(key, picture, read_captions(caption, key))


def load_table(config: DataSettings) -> Any:
    """Load a ``datasets.Dataset`` with the columns of pictures and captions only.

    Raises:
        InputError, HubError, DiskError: see ``explain_failure`` and ``find_cache``.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "data.hub: Hub data sets need the package datasets; install it (pip install "
            "limner[hub]), or give data.folder"
        ) from error
    if config.hub in READERS and config.hub_files is None:
        # Without one, datasets would read whatever lies in the folder of the command.
        raise InputError(
            f"data.hub: {config.hub} is a kind of files, which lie in a folder; give it as "
            "data.hub_files"
        )
    cache = find_cache(config)
    where: dict[str, Any] = {
        "revision": config.hub_revision,
        "data_dir": config.hub_files,
        "cache_dir": cache,
    }
    try:
        if find_folders(config):
            builder = datasets.load_dataset_builder(config.hub, config.hub_config, **where)
            check_parts(builder.config.data_files or {}, config)
        table = datasets.load_dataset(config.hub, config.hub_config, split=config.split, **where)
    except InputError:
        raise
    except Exception as error:
        raise explain_failure(error, config) from error
    columns = [config.image]
    if config.caption is not None:
        columns.append(config.caption)
    for setting, name in zip(("data.image", "data.caption"), columns, strict=False):
        if name not in table.column_names:
            raise explain_missing_column(
                setting, name, table.column_names, f"data.hub: {config.hub}"
            )
    table = table.select_columns(columns)
    feature = table.features[config.image]
    if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in FILE_DTYPES:
        # Limner decodes pictures itself, all of them in the same way.
        table = table.cast_column(config.image, datasets.Image(decode=False))
    return table


def read_pixels(values: list[Any], key: str) -> np.ndarray:
    """Return nested lists of numbers as an array.

    Raises:
        BadRecord: when they are no array of numbers.
    """
    try:
        pixels = np.asarray(values)
    except ValueError as error:
        raise BadRecord(key, f"its rows of pixels are not equally long: {error}") from error
    if pixels.dtype.kind not in "biuf":
        raise BadRecord(key, f"its pixels are no numbers ({pixels.dtype})")
    return pixels


def find_cache(config: DataSettings) -> str | None:
    """Return the folder of what ``datasets`` keeps; for folders on disk one that their content
    names: ``datasets`` knows files by size and time, and would go on with the old ones after an
    edit that keeps both.

    Raises:
        InputError: naming what cannot be read.
    """
    import datasets

    folders = find_folders(config)
    if not folders:
        return config.cache_dir
    digest = xxhash.xxh3_128()
    try:
        for folder in folders:
            for file in list_files(folder):
                digest.update(os.fsencode(file.relative_to(folder)) + b"\0")
                digest.update(atomic.digest_file(file).encode())
    except OSError as error:
        raise InputError(
            f"data.hub: {config.hub}: {error.filename} cannot be read: {error.strerror}"
        ) from error
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE)
    return str(cache / "by-content" / digest.hexdigest())


def find_folders(config: DataSettings) -> list[Path]:
    """Return the folders on disk that a data set is read from; none for one of the Hub."""
    files = Path(config.hub_files or "")
    if config.hub in READERS:
        folders = [files]
    else:
        folders = [Path(config.hub or "")]
        # What lies in the first folder need not be read twice; datasets refuses an absolute one.
        if ".." in files.parts:
            folders.append(folders[0] / files)
    return [folder for folder in folders if os.path.isdir(folder)]


def list_files(folder: Path) -> list[Path]:
    """Return all files below a folder, in order; as for ``datasets``, links to folders lead
    nowhere.

    Raises:
        OSError: for a folder that cannot be listed, which ``datasets`` would leave out unsaid.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = (
        Path(top) / name for top, _, names in os.walk(folder, onerror=refuse) for name in names
    )
    return sorted(path for path in found if path.is_file())


def check_parts(data_files: Mapping[str, Sequence[str]], config: DataSettings) -> None:
    """Refuse files that are parts of a table, when others of its parts are not on disk:
    ``datasets`` would read those that are there.

    Args:
        data_files: the files of each split, as ``datasets`` has found them.

    Raises:
        InputError: naming the missing ones.
    """
    splits = re.findall(r"\w+(?:[.-]\w+)*", config.split)
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for split, files in data_files.items():
        for file in files if str(split) in splits or "all" in splits else ():
            # Pictures may be called so, and be chosen among.
            if (part := PART.fullmatch(str(file))) and not is_picture(str(file)):
                name, number, total, ending = part.groups()
                numbers.setdefault((name, total, ending), set()).add(int(number))
    missing = []
    for (name, total, ending), there in numbers.items():
        # They are counted from 0, or from 1.
        first = int(int(total) in there)
        absent = sorted(set(range(first, first + int(total))).difference(there))
        paths = [f"{name}{number:05}-of-{total}{ending}" for number in absent]
        missing += [path for path in paths if not os.path.exists(path)]
    if missing:
        said = say_count(len(missing), "part is missing", "parts are missing")
        raise InputError(
            f"data.hub: {config.hub}: {said} of those that the names of the others count: "
            f"{join_first(missing)}. Put all parts there, or rename what is to be read alone."
        )


def explain_failure(error: Exception, config: DataSettings) -> LimnerError:
    """Return the user's error for a failure of ``load_dataset``."""
    # This one only wraps the error that counts.
    if type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__
    name = f"data.hub: {config.hub}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = error.filename or config.cache_dir or "cache of datasets"
        return DiskError(f"{name}: {error.strerror} ({place}). Make room, or set data.cache_dir.")
    if re.search(r"gated|authenticated|ask for access|\b40[13]\b", text):
        return HubError(
            f"{name}: access is refused: {text} Log in with `hf auth login` or set HF_TOKEN, and "
            "accept the data set's terms on its page."
        )
    if is_network_error(error):
        return HubError(
            f"{name}: cannot be downloaded: {text} Check the connection (and HF_HUB_OFFLINE), "
            "then start again."
        )
    # The first letters are left out: the library writes them large or small.
    if "nknown split" in text:
        return InputError(f"{name}: data.split={config.split}: {text}")
    if "onfig name is missing" in text or "BuilderConfig" in text:
        return InputError(f"{name}: data.hub_config={config.hub_config}: {text}")
    if type(error).__name__ == "DatasetNotFoundError":
        return InputError(
            f"{name}: {text} Check the name and data.hub_revision; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    return InputError(f"{name}: cannot be loaded: {text} ({type(error).__name__})")


def is_network_error(error: Exception) -> bool:
    """Whether an error is about the connection, by its class or the library that raised it."""
    library = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or library in NETWORK_LIBRARIES
