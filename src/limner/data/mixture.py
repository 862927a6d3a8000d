"""The data sets of a recipe as one source, one after the other."""

import bisect
import os
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

from limner.config.schema import DataSetSettings, DataSettings
from limner.data.folder import Folder
from limner.data.hub_dataset import HubDataset
from limner.data.source import BadRecord, Record, Source
from limner.errors import InputError
from limner.protocols import Report


class Mixture:
    """Several sources as one; keys begin with the data set's name."""

    def __init__(self, names: list[str], sources: list[Source]):
        self.names = names
        self.sources = sources
        self.ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Record:
        number = self.set_of(i)
        first_row = self.ends[number - 1] if number else 0
        try:
            record = self.sources[number][i - first_row]
        except BadRecord as bad:
            raise BadRecord(f"{self.names[number]}: {bad.key}", bad.reason) from bad
        return replace(record, key=f"{self.names[number]}: {record.key}")

    def set_of(self, row: int) -> int:
        """Return the number of a row's data set."""
        return bisect.bisect_right(self.ends, row)


def set_of(source: Source, row: int) -> int:
    """Return the number of a row's data set; 0 where a source is one data set."""
    return source.set_of(row) if isinstance(source, Mixture) else 0


def open_source(config: DataSettings, report: Report) -> Source:
    """Open the folder, the Hub data set or the several data sets of a recipe.

    Raises:
        InputError: for a source that cannot be used as a whole, or a data set that is named twice;
            a single bad record raises when it is read.
        HubError: when a data set cannot be downloaded.
    """
    if config.sets:
        return open_mixture(config, report)
    if config.folder is not None:
        return Folder(config, report)
    return HubDataset(config)


def open_mixture(config: DataSettings, report: Report) -> Mixture:
    """Open the data sets of ``data.sets``; see ``open_source``."""
    names = [describe_place(data_set) for data_set in config.sets]
    repeated = sorted(name for name in set(names) if names.count(name) > 1)
    if repeated:
        raise InputError(
            f"data.sets: {repeated[0]} is named twice. Name it once, with repeats, or with a "
            "weight beside the others'."
        )
    sources = []
    for number, data_set in enumerate(config.sets):
        try:
            sources.append(open_source(apply_set_settings(config, data_set), report))
        except InputError as error:
            raise InputError(f"data.sets[{number}]: {error}") from error
    return Mixture([shorten_place(name) for name in names], sources)


def apply_set_settings(config: DataSettings, data_set: DataSetSettings) -> DataSettings:
    """Return the settings of a recipe as those of one of its data sets."""
    overrides = {
        field.name: getattr(data_set, field.name)
        for field in fields(data_set)
        if field.name not in ("repeats", "weight")
    }
    # Where a family has no captions, its data sets need none either.
    if config.caption is None:
        overrides["caption"] = None
    return replace(config, sets=(), **overrides)


def describe_place(data_set: DataSetSettings) -> str:
    """Name a data set by all that tells it from others: place, configuration, files and split."""
    split = data_set.split if data_set.split != "train" else None
    if data_set.folder is not None:
        folder = os.path.realpath(data_set.folder)
        return folder if split is None else f"{folder} ({split})"
    parts = (data_set.hub, data_set.hub_config, data_set.hub_revision, data_set.hub_files, split)
    return " ".join(part for part in parts if part)


def shorten_place(name: str) -> str:
    """Return the last two parts of a data set's place, its name in messages."""
    return "/".join(Path(name).parts[-2:])
