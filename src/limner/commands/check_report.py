"""What ``limner check`` finds, as records for the JSON file and as a table for a reader."""

from collections.abc import Iterable
from dataclasses import dataclass

from limner.errors import say_count
from limner.features.caption_lengths import TruncatedCaption

NAMED = 5  # records that the table names; the JSON file has all


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used."""

    key: str
    reason: str


@dataclass(frozen=True)
class DataSetCount:
    """How many good records one data set of a mixture has."""

    name: str
    good: int


@dataclass(frozen=True)
class PictureReport:
    """How many pictures there are, how large, which are bad, which are there twice."""

    listed: int
    good: int
    bad: list[BadRecord]
    sizes: dict[str, str]  # smallest, median and largest by area, as WIDTHxHEIGHT
    sets: list[DataSetCount]
    same_content: list[list[str]]  # keys
    look_alike: list[list[str]]


@dataclass(frozen=True)
class BucketReport:
    """One size that pictures are cut to, and how an epoch's batches of it are filled."""

    size: str  # WIDTHxHEIGHT
    pictures: int
    batches: int
    empty_rows: int
    below_a_batch: bool


@dataclass(frozen=True)
class TokenReport:
    """Lengths of all captions under one tokenizer, start and end included."""

    limit: int
    shortest: int
    median: int
    longest: int
    cut: list[TruncatedCaption]


@dataclass(frozen=True)
class RepeatedCaption:
    """A caption that several records have."""

    caption: str
    times: int


@dataclass(frozen=True)
class CaptionReport:
    """How many captions there are, which are empty, repeated, or cut."""

    all: int
    distinct: int
    empty: list[str]  # keys
    repeated: list[RepeatedCaption]
    tokens: dict[str, TokenReport]  # by tokenizer


@dataclass(frozen=True)
class EpochReport:
    """What an epoch and the run come to."""

    batch: int
    records: int
    held_out: int
    examples: int
    of_sets: list[int]
    empty_rows: int
    steps: float
    variants: int
    new_crops_each_time: int
    run_steps: int
    run_epochs: float


@dataclass(frozen=True)
class CacheReport:
    """What encoded pictures and captions take on disk."""

    folder: str | None
    pictures: int
    picture_bytes: int
    captions: int
    caption_bytes: int


@dataclass(frozen=True)
class CheckReport:
    """All that ``limner check`` finds."""

    pictures: PictureReport
    buckets: list[BucketReport]
    captions: CaptionReport
    epoch: EpochReport
    cache: CacheReport
    problems: list[str]  # what training would refuse


def format_report(report: CheckReport) -> str:
    """The report as a table."""
    lines = [
        *format_pictures(report.pictures),
        "",
        *format_buckets(report.buckets),
        "",
        *format_captions(report.captions),
        "",
        *format_epoch(report.epoch),
        format_cache(report.cache),
    ]
    return "\n".join(lines)


def format_pictures(report: PictureReport) -> list[str]:
    """Counts, sizes and repetitions."""
    lines = [f"pictures    {report.listed} listed, {report.good} good, {len(report.bad)} bad"]
    lines += [f"            {one.good} of {one.name}" for one in report.sets]
    lines[-1] += first_few(f"{one.key}: {one.reason}" for one in report.bad)
    sizes, same, alike = report.sizes, report.same_content, report.look_alike
    return [
        *lines,
        f"sizes       {sizes['smallest']} to {sizes['largest']}, median {sizes['median']} "
        "(by area)",
        f"same        {say_count(len(same), 'picture is', 'pictures are')} there several times"
        + first_few(" = ".join(keys) for keys in same),
        f"alike       {say_count(len(alike), 'group', 'groups')} of pictures that look alike"
        + first_few(" ~ ".join(keys[:4]) for keys in alike),
    ]


def format_buckets(buckets: list[BucketReport]) -> list[str]:
    """A row for each size that pictures are cut to."""
    lines = [f"{'bucket':<12}{'pictures':>10}{'batches':>10}{'empty rows':>12}   in an epoch"]
    for one in buckets:
        note = "   fewer than a batch" if one.below_a_batch else ""
        lines.append(f"{one.size:<12}{one.pictures:>10}{one.batches:>10}{one.empty_rows:>12}{note}")
    return lines


def format_captions(report: CaptionReport) -> list[str]:
    """Counts, repetitions and lengths in tokens."""
    lines = [
        f"captions    {report.all}, {report.distinct} of them distinct; {len(report.empty)} empty"
        + first_few(report.empty)
    ]
    if report.repeated:
        often = [f"{one.times} times: {one.caption[:80]}" for one in report.repeated]
        count = say_count(len(often), "caption", "captions")
        lines.append(f"repeated    {count}{first_few(often)}")
    for name, tokens in report.tokens.items():
        cut = first_few(f"{one.key}: {one.tokens} tokens" for one in tokens.cut)
        lines.append(
            f"{name:<12}{tokens.shortest} to {tokens.longest} tokens, median {tokens.median}; "
            f"{say_count(len(tokens.cut), 'has', 'have')} more than {tokens.limit}, cut there{cut}"
        )
    return lines


def format_epoch(report: EpochReport) -> list[str]:
    """RunRecords and steps."""
    anew = ""
    if report.new_crops_each_time:
        anew = f", {report.new_crops_each_time} pictures cut anew each time"
    return [
        f"epoch       {report.examples} examples of {report.records} records "
        f"({report.held_out} held out), {report.variants} variants{anew}",
        f"            {report.steps:g} steps of {report.batch}, {report.empty_rows} rows empty; "
        f"the run: {report.run_steps} steps, {report.run_epochs:.2f} epochs",
    ]


def format_cache(report: CacheReport) -> str:
    """Room on the disk."""
    mebibytes = (report.picture_bytes + report.caption_bytes) / 2**20
    return (
        f"cache       {mebibytes:.1f} MiB for {report.pictures} pictures and {report.captions} "
        f"captions, in {report.folder or 'no folder'}"
    )


def first_few(names: Iterable[str]) -> str:
    """The first names, a line each, and how many more there are."""
    names = list(names)
    lines = "".join(f"\n    {name}" for name in names[:NAMED])
    more = len(names) - NAMED
    return lines + (f"\n    and {more} more" if more > 0 else "")
