"""Everything a run needs, checked before a weight is loaded.

Each command comes as far as it needs: ``show`` and ``bench`` resolve the config, ``check``,
``encode`` and ``train`` prepare the run. What ``train`` would refuse, ``check`` refuses in the same
lines.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from limner import engines
from limner.base_model.base import BaseModel
from limner.config.schema import Config
from limner.data import image
from limner.data.index import Entry, Index
from limner.data.source import Source
from limner.families.family import Family
from limner.features import caches
from limner.protocols import Engine, ProcessGroup, Report
from limner.storage.checkpoint import Checkpoint
from limner.storage.run_state import RunState
from limner.training.batch_plan import BatchPlan
from limner.training.records import RunRecords, plan_records, report_small_buckets
from limner.training.resolve import Settled, settle
from limner.training.resume import make_run_state, report_changes
from limner.training.signals import Stop
from limner.training.stream import Stream


@dataclass
class Setup:
    """Everything that training needs, checked and ready; see ``prepare``."""

    config: Config  # resolved: nothing in it is left to the launcher, the base or chance
    plan: BatchPlan
    family: Family
    base: BaseModel
    process: ProcessGroup
    engine: Engine
    source: Source
    index: Index
    stream: Stream
    validation_entries: tuple[Entry, ...]
    checkpoint: Checkpoint | None
    run_state: RunState
    report: Report
    stop: Stop
    caches_verified: bool = False  # whether all that can be cached is, in every process

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.run)


def prepare(
    config: Config,
    source: Source | None,
    process: ProcessGroup,
    report: Report,
    stop: Stop,
    *,
    read_only: bool = False,
) -> Setup:
    """Look at everything that can be wrong, before any weight is loaded.

    Args:
        source: the caller's own records; None: those that the config names.
        read_only: nothing is written or made, neither in the run's folder nor in the cache nor on
            the Hub, and bad records do not stop it.

    Raises:
        LimnerError: of the kind that fits, for all that would keep the run from going well.
    """
    # Without a cache it would be missing when the first picture is cut.
    image.load_vips()
    settled = settle(config, source, process, report, read_only=read_only)
    base, checkpoint = settled.base, settled.checkpoint
    records = plan_records(settled, process, report, read_only=read_only)
    config = settle_previews(settled.config, records, report)
    plan = records.plan
    run_state = identify_run(settled, config, records, process)
    if checkpoint is not None:
        report_changes(checkpoint, run_state, plan, report)
    report_small_buckets(records.order, plan.batch_size, report)
    micro = plan.micro_batch_size
    engine = engines.open_engine(config, base, settled.family, process, micro, report)
    return Setup(
        config=config,
        plan=plan,
        family=settled.family,
        base=base,
        process=process,
        engine=engine,
        source=settled.source,
        index=records.index,
        stream=open_stream(settled, records, engine, process, report, read_only=read_only),
        validation_entries=records.validation,
        checkpoint=checkpoint,
        run_state=run_state,
        report=report,
        stop=stop,
    )


def settle_previews(config: Config, records: RunRecords, report: Report) -> Config:
    """Put the captions that ``preview.captions`` asks for among the prompts."""
    preview = config.preview
    entries = (*records.validation, *records.training)
    captions = dict.fromkeys(text for entry in entries for text in entry.captions[:1] if text)
    if len(captions) < preview.captions:
        report(f"preview.captions: {preview.captions} are asked for, {len(captions)} are there")
    prompts = (*preview.prompts, *list(captions)[: preview.captions])
    return replace(config, preview=replace(preview, prompts=prompts, captions=0))


def open_stream(
    settled: Settled,
    records: RunRecords,
    engine: Engine,
    process: ProcessGroup,
    report: Report,
    *,
    read_only: bool,
) -> Stream:
    """Open the stream of batches; with ``read_only`` without a cache."""
    config, family, base = settled.config, settled.family, settled.base
    image_store, text_store = None, None
    if not read_only:
        image_store, text_store = caches.open_stores(config, family, base, process, report)
    features = caches.open_feature_encoder(
        config, family, process, engine.get_encoders, image_store, text_store
    )
    return Stream(
        entries=records.training,
        order=records.order,
        source=settled.source,
        data=config.data,
        noise=config.objective,
        objective=settled.objective,
        family=family,
        configs=base.configs,
        features=features,
        seed=records.plan.seed,
        batch_size=records.plan.batch_size,
        text_encoders=config.adapter.text_encoders,
    )


def identify_run(
    settled: Settled, config: Config, records: RunRecords, process: ProcessGroup
) -> RunState:
    """What a checkpoint remembers of this run: its settings, records and base."""
    base, components = settled.base, settled.family.feature_components
    digest = process.first(lambda: base.fingerprint(*components))
    return make_run_state(
        config, records.plan, records.digest, digest, base.scheduler_class, records.held_out_apart
    )
