"""Everything a run needs, checked before a weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from limner import engines, protocols, rng
from limner.base_model.base import BaseModel
from limner.base_model.open import open_base
from limner.config import rules
from limner.config.schema import Config, DataSettings, ModelSettings
from limner.data import buckets, index, mixture
from limner.data.index import Entry, Index
from limner.data.order import Order
from limner.data.source import Source
from limner.diffusion.objective import Objective
from limner.errors import InputError
from limner.families import get_family
from limner.families.family import Family
from limner.features import caches
from limner.features.encoder import FeatureEncoder
from limner.protocols import Engine, ProcessGroup
from limner.storage import checkpoint
from limner.storage.checkpoint import Checkpoint
from limner.storage.run_folder import SKIPPED_FILE
from limner.training import batch_plan, push, sinks
from limner.training.batch_plan import BatchPlan
from limner.training.resume import make_run_state, must_match
from limner.training.signals import Stop
from limner.training.stream import Stream

SHARED_SETTINGS = (
    "kind",
    "device",
    "precision",
    "devices",
    "fsdp",
    "compile_cache",
)  # what processes have settled when they have met


@dataclass
class Setup:
    """Everything that training needs, checked and ready; see ``prepare``."""

    config: Config
    plan: BatchPlan
    family: Family
    base: BaseModel
    process: ProcessGroup
    engine: Engine
    stream: Stream
    validation_entries: tuple[Entry, ...]
    checkpoint: Checkpoint | None
    run_state: dict[str, Any]
    report: protocols.Report
    stop: Stop
    caches_verified: bool = False  # whether all that can be cached is, in every process

    @property
    def folder(self) -> Path:
        return Path(self.config.run)


def link_stages(configs: Sequence[Config]) -> list[tuple[Config, ModelSettings]]:
    """Each recipe beside the earlier one that trains its other stage, and the model that can be
    looked at before that one has been trained."""
    out: list[tuple[Config, ModelSettings]] = []
    for config in configs:
        rules.check_config(config)
        family, earlier = get_family(config), {one.model.family: one for one, _ in out}
        if config.run in (one.run for one, _ in out):
            raise InputError(
                f"run: two recipes would train in {config.run}. Give each a run of its own, in the "
                "recipes."
            )
        if different := [
            name
            for name in SHARED_SETTINGS
            if getattr(config.engine, name) != getattr(configs[0].engine, name)
        ]:
            raise InputError(
                "engine: recipes that are trained one after the other need the same "
                f"engine.{different[0]}"
            )
        before = earlier.get(family.stage.other_stage) if family.stage is not None else None
        if before is None:
            out.append((config, config.model))
        else:
            out.append(
                (
                    replace(config, model=replace(config.model, other_stage=before.run)),
                    replace(config.model, other_stage=before.model.base),
                )
            )
    return out


def prepare(
    config: Config,
    source: Source | None,
    process: ProcessGroup,
    report: protocols.Report,
    stop: Stop,
) -> Setup:
    """Look at everything that can be wrong, before any weight is loaded."""
    folder = Path(config.run)
    family = get_family(config)
    where = process.first(lambda: find_resume_point(folder, config.checkpoint.resume, report))
    found = None if where is None else checkpoint.open_verified(Path(where))
    seed = (
        found.state["seed"]
        if found
        else process.first(
            lambda: batch_plan.draw_seed() if config.train.seed is None else config.train.seed
        )
    )
    config = replace(
        config,
        data=replace(config.data, caption=config.data.caption if family.text_components else None),
    )
    source = mixture.open_source(config.data, report) if source is None else source
    opened = open_base_everywhere(config, family, process)
    if opened.other_stage is not None:
        config = replace(
            config,
            model=replace(config.model, other_stage=config.model.other_stage or config.model.base),
        )
    base_digest = process.first(
        lambda: opened.fingerprint(
            *family.components, *(family.stage.needed_components if family.stage else ())
        )
    )
    objective = Objective.from_scheduler(opened.configs["scheduler"], config.objective)
    sinks.require_packages(config.log.to)
    if config.export.hub is not None:
        full_name = process.first(
            partial(push.check_push, config.export.hub, config.export.private)
        )
        config = replace(config, export=replace(config.export, hub=full_name))
    looked = Index.from_plain(process.first(lambda: index_records(source, config, report)))
    used = (
        looked if config.data.max_records is None else looked.sample(config.data.max_records, seed)
    )
    learned, held_out = split_validation(used.entries, config.validation.hold_out, seed)
    order = partial(make_order, learned, source, config.data, seed)
    numbers = batch_plan.make_plan(
        config,
        process.world_size,
        len(learned),
        found.state if found else None,
        seed,
        order,
        process.device_count,
    )
    identity = make_run_state(config, numbers, used.digest, base_digest)
    if found is not None:
        for line in must_match(found.state, identity, found.step):
            report(line)
        if numbers.steps < found.step:
            report(f"checkpoint-{found.step} is past the {numbers.steps} steps that are asked for")
    report_small_buckets(order(numbers.batch_size), numbers.batch_size, report)
    engine = engines.open_engine(config, opened, family, process, numbers.micro_batch_size, report)
    kept, how = (
        caches.open_stores(config, family, opened, process, report),
        caches.feature_settings(config, process),
    )
    encoded = FeatureEncoder(family, engine.get_encoders, *kept, **how)
    stream = Stream(
        learned,
        order(numbers.batch_size),
        source,
        config.data,
        config.objective,
        objective,
        family,
        opened.configs,
        encoded,
        seed=numbers.seed,
        batch_size=numbers.batch_size,
        text_encoders=config.adapter.text_encoders,
    )
    return Setup(
        config,
        numbers,
        family,
        opened,
        process,
        engine,
        stream,
        held_out,
        found,
        identity,
        report,
        stop,
    )


def open_base_everywhere(config: Config, family: Family, process: ProcessGroup) -> BaseModel:
    """The base in every process; the first one downloads what is not there."""
    draws = bool(config.preview.prompts)
    process.first(lambda: str(open_base(config.model, family, draws=draws).folder))
    return open_base(config.model, family, draws=draws)


def split_validation(
    entries: tuple[Entry, ...], count: int, seed: int
) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """The records to train on, and ``count`` others that are only watched, drawn by the seed."""
    if count >= len(entries):
        raise InputError(
            f"validation.hold_out: {count} records are held out of {len(entries)}, so that none is "
            "left to train on"
        )
    held = {int(i) for i in rng.at(seed, "hold out", 0).permutation(len(entries))[:count]}
    return tuple(e for i, e in enumerate(entries) if i not in held), tuple(
        entries[i] for i in sorted(held)
    )


def report_small_buckets(order: Order, batch: int, report: protocols.Report) -> None:
    """Say which buckets cannot fill a single batch, and what that costs."""
    small = [
        (shape, records, empty)
        for shape, records, _, empty in order.count_batches()
        if order.with_buckets and records < batch
    ]
    if small:
        named = ", ".join(f"{wide}x{tall}: {records}" for (tall, wide), records, _ in small[:5]) + (
            ", ..." if len(small) > 5 else ""
        )
        rows = f"{sum(empty for *_, empty in small)} rows of every epoch's batches are empty for it"
        report(
            f"{len(small)} of {len(order.shapes)} buckets have fewer pictures than a batch of "
            f"{batch} ({named}); {rows}, and nothing is repeated"
        )


def make_order(
    entries: tuple[Entry, ...],
    source: Source,
    data: DataSettings,
    seed: int,
    batch: int,
) -> Order:
    """The order in which a run sees its records."""
    shapes, owners = (
        [buckets.choose_shape(e.size, data) for e in entries],
        [mixture.set_of(source, e.row) for e in entries],
    )
    repeats, weights = (
        [one.repeats for one in data.sets] or [1],
        [one.weight for one in data.sets if one.weight is not None],
    )
    return Order(seed, batch, shapes, owners, repeats, weights, whole=data.buckets is not None)


def find_resume_point(folder: Path, resume: str, report: protocols.Report) -> str | None:
    """The folder of the checkpoint to go on from, verified; None to begin afresh."""
    there = checkpoint.list_checkpoints(folder)
    if resume == "never":
        if there:
            raise InputError(
                f"{folder} holds {there[0].name}. To go on from it pass --resume_from_checkpoint "
                "latest (or checkpoint.resume=auto); "
                "to begin afresh choose another folder."
            )
        return None
    found = checkpoint.find_checkpoint(folder, "latest" if resume == "auto" else resume, report)
    if found is None and there:
        raise InputError(
            f"{folder} holds {there[0].name}, but no checkpoint that can be gone on from. Choose "
            "another folder, or move these away to begin afresh."
        )
    if found is None and resume == "latest":
        report(f"{folder}: there is no checkpoint yet; beginning afresh")
    return None if found is None else str(found.folder)


def index_records(source: Source, config: Config, report: protocols.Report) -> dict[str, Any]:
    """Read every record once; what is bad is refused, or written to ``skipped.jsonl``."""
    looked = index.build_index(
        source, config.data, known=caches.known_pictures_file(config), report=report
    )
    if looked.skipped:
        index.write_skipped(Path(config.run), looked.skipped)
        report(f"{Path(config.run) / SKIPPED_FILE} names each of them, with the reason")
    return looked.to_plain()
