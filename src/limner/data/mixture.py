"""The data sets of a recipe as one source: one after the other, each record under a name that says
where it is from."""

import bisect
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
        self.names, self.sources = names, sources
        self.ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Record:
        number = self.set_of(i)
        inner = i - (self.ends[number - 1] if number else 0)
        try:
            record = self.sources[number][inner]
        except BadRecord as bad:
            raise BadRecord(f"{self.names[number]}: {bad.key}", bad.reason) from bad
        return replace(record, key=f"{self.names[number]}: {record.key}")

    def set_of(self, row: int) -> int:
        """The number of the data set that a row belongs to."""
        return bisect.bisect_right(self.ends, row)


def set_of(source: Source, row: int) -> int:
    """The number of the data set that a row of a source belongs to; 0 where there is one."""
    return source.set_of(row) if isinstance(source, Mixture) else 0


def open_source(config: DataSettings, report: Report) -> Source:
    """The folder, the Hub data set or the several data sets that the settings name.

    Raises:
        InputError: for what is wrong with a source as a whole, or a data set that is named twice;
            single records fault when they are read.
        HubError: when a data set cannot be downloaded.
    """
    if not config.sets:
        return Folder(config, report) if config.folder is not None else HubDataset(config)
    names = [describe_place(one) for one in config.sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"data.sets: {twice[0]} is named twice. Name it once, with repeats, or with a weight "
            "beside the others'."
        )
    sources = []
    for number, one in enumerate(config.sets):
        given = {
            f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("repeats", "weight")
        }
        if config.caption is None:
            given["caption"] = None
        try:
            sources.append(open_source(replace(config, sets=(), **given), report))
        except InputError as fault:
            raise InputError(f"data.sets[{number}]: {fault}") from fault
    return Mixture([shorten(name) for name in names], sources)


def describe_place(one: DataSetSettings) -> str:
    """What tells a data set from others: where it is, its configuration, files and split."""
    if one.folder is not None:
        return f"{Path(one.folder).resolve()}{f' ({one.split})' if one.split != 'train' else ''}"
    return " ".join(
        part
        for part in (
            one.hub,
            one.hub_config,
            one.hub_revision,
            one.hub_files,
            one.split if one.split != "train" else None,
        )
        if part
    )


def shorten(name: str) -> str:
    """A data set's name in messages: the last two parts of its place."""
    return "/".join(Path(name).parts[-2:])
