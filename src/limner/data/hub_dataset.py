"""A data set on the Hub or on disk that ``datasets.load_dataset`` knows."""

import errno
import re
from pathlib import Path

import numpy as np

from limner.config.schema import DataSettings
from limner.data.source import BadRecord, Record, missing_column, read_captions
from limner.errors import DiskError, HubError, InputError, LimnerError


class HubDataset:
    """A data set that ``datasets.load_dataset`` knows by name or path; its pictures are read from
    their files' bytes, as they are."""

    def __init__(self, config: DataSettings):
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                "data.hub: Hub data sets need the package datasets; install it (pip install "
                "limner[hub]), or give data.folder"
            ) from error
        self.image, self.caption = config.image, config.caption
        try:
            table = datasets.load_dataset(
                config.hub,
                config.hub_config,
                split=config.split,
                revision=config.hub_revision,
                data_dir=config.hub_files,
                cache_dir=config.cache_dir,
            )
        except Exception as error:
            raise explain_failure(error, config) from error
        for setting, name in (("data.image", config.image), ("data.caption", config.caption)):
            if name is not None and name not in table.column_names:
                raise missing_column(setting, name, table.column_names, f"data.hub: {config.hub}")
        table = table.select_columns(
            [name for name in (config.image, config.caption) if name is not None]
        )
        feature = table.features[config.image]
        if isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in (
            "string",
            "large_string",
            "binary",
            "large_binary",
        ):
            table = table.cast_column(config.image, datasets.Image(decode=False))
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
        return Record(
            key, value, read_captions("" if self.caption is None else row[self.caption], key)
        )


def explain_failure(error: Exception, config: DataSettings) -> LimnerError:
    """What kept ``load_dataset`` from its work, and what to do about it."""
    cause = (
        error.__cause__
        if type(error).__name__ == "DatasetGenerationError"
        and isinstance(error.__cause__, Exception)
        else error
    )
    text, name = " ".join(str(cause).split()) or type(cause).__name__, f"data.hub: {config.hub}"
    if isinstance(cause, OSError) and cause.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        return DiskError(
            f"{name}: {cause.strerror} "
            f"({cause.filename or config.cache_dir or 'cache of datasets'}). Make room, or set "
            "data.cache_dir."
        )
    if re.search(r"gated|authenticated|ask for access|\b40[13]\b", text):
        return HubError(
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
        return HubError(
            f"{name}: cannot be downloaded: {text} Check the connection (and HF_HUB_OFFLINE), "
            "then start again."
        )
    if "nknown split" in text:
        return InputError(f"{name}: data.split={config.split}: {text}")
    if "onfig name is missing" in text or "BuilderConfig" in text:
        return InputError(f"{name}: data.hub_config={config.hub_config}: {text}")
    if type(cause).__name__ == "DatasetNotFoundError":
        return InputError(
            f"{name}: {text} Check the name and data.hub_revision; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    return InputError(f"{name}: cannot be loaded: {text} ({type(cause).__name__})")
