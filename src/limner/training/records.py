"""Which records a run sees, and in which order and batches."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from limner.config.schema import Config, DataSettings
from limner.data import buckets, mixture
from limner.data.index import Entry, Index, build_index, write_skipped
from limner.data.order import Order
from limner.data.source import Source
from limner.errors import join_first, say_count
from limner.features import caches
from limner.protocols import ProcessGroup, Report
from limner.storage.run_folder import RunFolder
from limner.training.batch_plan import BatchPlan, count_held_out, make_plan
from limner.training.hold_out import hold_out_records
from limner.training.resolve import Settled


@dataclass(frozen=True)
class RunRecords:
    """The records of a run, and the order and batches in which it sees them."""

    index: Index  # of all good records
    digest: str  # of those that are used
    training: tuple[Entry, ...]
    validation: tuple[Entry, ...]
    held_out_apart: bool  # whether no picture is on both sides
    plan: BatchPlan
    order: Order


def plan_records(
    settled: Settled, process: ProcessGroup, report: Report, *, read_only: bool
) -> RunRecords:
    """Decode every picture once, and divide the records into epochs and batches."""
    config, source, seed = settled.config, settled.source, settled.config.train.seed or 0
    index = index_records(source, config, process, report, read_only=read_only)
    used = index
    if config.data.max_records is not None:
        used = index.sample(config.data.max_records, seed)
    hold_out = count_held_out(config.validation.hold_out, len(used.entries))
    saved = settled.checkpoint.state if settled.checkpoint else None
    apart = saved is None or saved.held_out_apart
    training, validation = hold_out_records(used, hold_out, seed, apart, report)
    order_for = partial(make_order, training, source, config.data, seed)
    # The checkpoint's batch and seed win over the recipe's: positions in the stream depend on them.
    plan = make_plan(
        config,
        process.world_size,
        len(training),
        saved,
        seed,
        order_for,
        process.device_count,
    )
    order = order_for(plan.batch_size)
    return RunRecords(index, used.digest, training, validation, apart, plan, order)


def index_records(
    source: Source, config: Config, process: ProcessGroup, report: Report, *, read_only: bool
) -> Index:
    """Read every record once, in the first process. What is bad is refused, or left out and listed
    in ``skipped.jsonl``; with ``read_only`` it is only left out."""

    def build() -> object:
        known = caches.known_pictures_file(config)
        index = build_index(
            source, config.data, cache_file=known, report=report, only_look=read_only
        )
        if index.skipped and not read_only:
            write_skipped(Path(config.run), index.skipped)
            report(f"{RunFolder(Path(config.run)).skipped} names each of them, with the reason")
        return index.to_plain()

    return Index.from_plain(process.first(build))  # type: ignore[arg-type]


def make_order(
    entries: tuple[Entry, ...],
    source: Source,
    data: DataSettings,
    seed: int,
    batch_size: int,
) -> Order:
    """The order in which a run sees its records."""
    shapes = [buckets.choose_shape(entry.size, data) for entry in entries]
    sets = [mixture.set_of(source, entry.row) for entry in entries]
    repeats = [one.repeats for one in data.sets] or [1]
    weights = [one.weight for one in data.sets if one.weight is not None]
    with_buckets = data.buckets is not None
    return Order(seed, batch_size, shapes, sets, repeats, weights, with_buckets=with_buckets)


def report_small_buckets(order: Order, batch_size: int, report: Report) -> None:
    """Say which buckets cannot fill a single batch, and what that costs."""
    if not order.with_buckets:
        return
    small = [row for row in order.count_batches() if row[1] < batch_size]
    if not small:
        return
    names = [f"{width}x{height}: {records}" for (height, width), records, *_ in small]
    total, part = f"of {len(order.shapes)} buckets", "of every epoch's batches"
    padding = sum(rows for *_, rows in small)
    report(
        f"{say_count(len(small), f'{total} has', f'{total} have')} fewer pictures than a batch of "
        f"{batch_size} ({join_first(names)}); "
        f"{say_count(padding, f'row {part} is', f'rows {part} are')} empty for it, and nothing is "
        "repeated"
    )
