"""Training, whole: what is checked, what is encoded, and the loop. Run it again to continue."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from limner import (
    base,
    checkpoint,
    config,
    durable,
    encoding,
    engines,
    export,
    generate,
    log,
    plan,
    rng,
    schedule,
    snapshot,
)
from limner.data import buckets, index, records, sets
from limner.data.order import Order
from limner.data.prefetch import prefetch
from limner.data.stream import Stream
from limner.engine import Engine, State, World
from limner.families import family_of
from limner.family import Family
from limner.faults import InputFault, NonFinite, Stopped, told_once
from limner.features import Encoded
from limner.objective import Objective
from limner.signals import Stop
from limner.watcher import Watcher, fetch

Tell = Callable[[str], None]
SHARED = (
    "kind",
    "device",
    "precision",
    "devices",
    "fsdp",
    "compile_cache",
)  # what processes have settled when they have met


def say(text: str) -> None:
    """Tell the user one thing, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)


@dataclass
class Run:
    """Everything that training needs, checked and ready; see ``prepare``."""

    cfg: config.Config
    plan: plan.Plan
    family: Family
    base: base.Base
    process: World
    engine: Engine
    stream: Stream
    held_out: tuple[index.Entry, ...]
    found: checkpoint.Checkpoint | None
    identity: dict[str, Any]
    tell: Tell
    stop: Stop
    verified: bool = False  # whether all that can be cached is, in every process

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run)


def run_all(cfgs: Sequence[config.Config], tell: Tell = say) -> list[Path]:
    """Train one recipe after the other. Where one trains the partner of a later one, its run is
    that one's partner.

    Raises:
        Fault: what ``run`` raises; what is wrong with the recipes and bases of any is known before
            the first is trained.
    """
    with told_once():
        chained = [one for one, _ in chain(cfgs)]
    with Stop() as stop, contextlib.closing(engines.join(cfgs[0].engine)) as process:
        with told_once():
            process.first(
                lambda: [
                    str(base.open_base(model, family_of(one), draws=False).folder)
                    for one, model in chain(cfgs)
                ]
            )
        return [run_here(one, None, tell, stop, process) for one in chained]


def chain(cfgs: Sequence[config.Config]) -> list[tuple[config.Config, config.Model]]:
    """Each recipe beside the earlier one that trains its partner, and the model that can be looked
    at before that one has been trained."""
    out: list[tuple[config.Config, config.Model]] = []
    for cfg in cfgs:
        cfg.check()
        family, earlier = family_of(cfg), {one.model.family: one for one, _ in out}
        if cfg.run in (one.run for one, _ in out):
            raise InputFault(
                f"run: two recipes would train in {cfg.run}. Give each a run of its own, in the "
                "recipes."
            )
        if different := [
            name for name in SHARED if getattr(cfg.engine, name) != getattr(cfgs[0].engine, name)
        ]:
            raise InputFault(
                "engine: recipes that are trained one after the other need the same "
                f"engine.{different[0]}"
            )
        before = earlier.get(family.stage.partner) if family.stage is not None else None
        if before is None:
            out.append((cfg, cfg.model))
        else:
            out.append(
                (
                    replace(cfg, model=replace(cfg.model, partner=before.run)),
                    replace(cfg.model, partner=before.model.base),
                )
            )
    return out


def run(
    cfg: config.Config,
    source: records.Source | None = None,
    tell: Tell = say,
    *,
    only_encode: bool = False,
) -> Path:
    """Train as the config says, going on from the newest good checkpoint; returns the folder that
    holds the result.

    Args:
        only_encode: fill the caches, so that training will load no encoder, and stop there.
        source: pictures and captions of one's own, any object with ``len`` and ``[i] -> Record``;
            else ``data.folder`` or ``data.hub``.
        tell: receives what is worth saying, a line at a time.

    Raises:
        Fault: of the kind that fits, with a message for the user; nothing that was whole is lost.
    """
    with told_once():
        cfg.check(own_records=source is not None)
    with Stop() as stop, contextlib.closing(engines.join(cfg.engine)) as process:
        return run_here(cfg, source, tell, stop, process, only_encode)


def run_here(
    cfg: config.Config,
    source: records.Source | None,
    tell: Tell,
    stop: Stop,
    process: World,
    only_encode: bool = False,
) -> Path:
    """One run among processes that have met."""
    stop.gently = False
    if process.rank:
        tell = lambda text: None  # noqa: E731 - the first process speaks for all
    with told_once(Stopped, NonFinite), contextlib.ExitStack() as held:
        process.first(lambda: held.enter_context(durable.lock(Path(cfg.run))))
        process.first(lambda: durable.sweep(Path(cfg.run)))
        cfg = replace(cfg, engine=replace(cfg.engine, precision=process.precision))  # type: ignore[arg-type]
        with told_once():
            job = prepare(cfg, source, process, tell, stop)
        if only_encode:
            return encoding.encode_only(job)
        if job.found is not None and is_finished(job):
            tell(
                f"{job.folder}: finished at step {job.found.step}; nothing to do. Ask for more "
                "with train.steps."
            )
            return job.folder
        stop.gently = True
        settings = {
            **config.plain(job.cfg),
            "train": {**config.plain(cfg.train), "seed": job.plan.seed},
        }
        process.first(
            lambda: durable.write_text(
                job.folder / "config.json", json.dumps(log.redact(settings), indent=1)
            )
        )
        if job.found is None or job.found.step < job.plan.steps:
            encoding.encode(job)
            train(job)
        process.first(lambda: finish(job))
    return Path(cfg.run)


def prepare(
    cfg: config.Config, source: records.Source | None, process: World, tell: Tell, stop: Stop
) -> Run:
    """Look at everything that can be wrong, before any weight is loaded."""
    folder = Path(cfg.run)
    family = family_of(cfg)
    where = process.first(lambda: found_at(folder, cfg.checkpoint.resume, tell))
    found = None if where is None else checkpoint.trusted(Path(where))
    seed = (
        found.state["seed"]
        if found
        else process.first(lambda: plan.drawn_seed() if cfg.train.seed is None else cfg.train.seed)
    )
    cfg = replace(
        cfg, data=replace(cfg.data, caption=cfg.data.caption if family.captions else None)
    )
    source = sets.open_source(cfg.data, tell) if source is None else source
    opened = open_everywhere(cfg, family, process)
    if opened.partner is not None:
        cfg = replace(cfg, model=replace(cfg.model, partner=cfg.model.partner or cfg.model.base))
    base_digest = process.first(
        lambda: opened.fingerprint(
            *family.components, *(family.stage.needs if family.stage else ())
        )
    )
    objective = Objective.of(opened.configs["scheduler"], cfg.objective)
    log.require(cfg.log.to)
    if cfg.export.hub is not None:
        full_name = process.first(partial(export.check_push, cfg.export.hub, cfg.export.private))
        cfg = replace(cfg, export=replace(cfg.export, hub=full_name))
    looked = index.Index.of_plain(process.first(lambda: look(source, cfg, tell)))
    used = looked if cfg.data.limit is None else looked.limited(cfg.data.limit, seed)
    learned, held_out = split_held_out(used.entries, cfg.watch.hold_out, seed)
    order = partial(order_of, learned, source, cfg.data, seed)
    numbers = plan.make(
        cfg,
        process.world,
        len(learned),
        found.state if found else None,
        seed,
        order,
        process.devices,
    )
    identity = plan.identity(cfg, numbers, used.digest, base_digest)
    if found is not None:
        for line in plan.must_match(found.state, identity, found.step):
            tell(line)
        if numbers.steps < found.step:
            tell(f"checkpoint-{found.step} is past the {numbers.steps} steps that are asked for")
    tell_small_buckets(order(numbers.batch), numbers.batch, tell)
    engine = engines.open_engine(cfg, opened, family, process, numbers.micro, tell)
    kept, how = (
        encoding.stores(cfg, family, opened, process, tell),
        encoding.feature_settings(cfg, process),
    )
    encoded = Encoded(family, engine.parts, *kept, **how)
    stream = Stream(
        learned,
        order(numbers.batch),
        source,
        cfg.data,
        cfg.objective,
        objective,
        family,
        opened.configs,
        encoded,
        seed=numbers.seed,
        batch_size=numbers.batch,
        text_encoders=cfg.adapt.text_encoders,
    )
    return Run(
        cfg, numbers, family, opened, process, engine, stream, held_out, found, identity, tell, stop
    )


def open_everywhere(cfg: config.Config, family: Family, process: World) -> base.Base:
    """The base in every process; the first one downloads what is not there."""
    draws = bool(cfg.preview.prompts)
    process.first(lambda: str(base.open_base(cfg.model, family, draws=draws).folder))
    return base.open_base(cfg.model, family, draws=draws)


def split_held_out(
    entries: tuple[index.Entry, ...], count: int, seed: int
) -> tuple[tuple[index.Entry, ...], tuple[index.Entry, ...]]:
    """The records to train on, and ``count`` others that are only watched, drawn by the seed."""
    if count >= len(entries):
        raise InputFault(
            f"watch.hold_out: {count} records are held out of {len(entries)}, so that none is "
            "left to train on"
        )
    held = {int(i) for i in rng.at(seed, "hold out", 0).permutation(len(entries))[:count]}
    return tuple(e for i, e in enumerate(entries) if i not in held), tuple(
        entries[i] for i in sorted(held)
    )


def tell_small_buckets(order: Order, batch: int, tell: Tell) -> None:
    """Say which buckets cannot fill a single batch, and what that costs."""
    small = [
        (shape, records, empty)
        for shape, records, _, empty in order.counts()
        if order.whole and records < batch
    ]
    if small:
        named = ", ".join(f"{wide}x{tall}: {records}" for (tall, wide), records, _ in small[:5]) + (
            ", ..." if len(small) > 5 else ""
        )
        rows = f"{sum(empty for *_, empty in small)} rows of every epoch's batches are empty for it"
        tell(
            f"{len(small)} of {len(order.shapes)} buckets have fewer pictures than a batch of "
            f"{batch} ({named}); {rows}, and nothing is repeated"
        )


def order_of(
    entries: tuple[index.Entry, ...],
    source: records.Source,
    data: config.Data,
    seed: int,
    batch: int,
) -> Order:
    """The order in which a run sees its records."""
    shapes, owners = (
        [buckets.fit(e.size, data) for e in entries],
        [sets.set_of(source, e.row) for e in entries],
    )
    repeats, weights = (
        [one.repeats for one in data.sets] or [1],
        [one.weight for one in data.sets if one.weight is not None],
    )
    return Order(seed, batch, shapes, owners, repeats, weights, whole=data.buckets is not None)


def found_at(folder: Path, resume: str, tell: Tell) -> str | None:
    """The folder of the checkpoint to go on from, verified; None to begin afresh."""
    there = checkpoint.listed(folder)
    if resume == "never":
        if there:
            raise InputFault(
                f"{folder} holds {there[0].name}. To go on from it pass --resume_from_checkpoint "
                "latest (or checkpoint.resume=auto); "
                "to begin afresh choose another folder."
            )
        return None
    found = checkpoint.find(folder, "latest" if resume == "auto" else resume, tell)
    if found is None and there:
        raise InputFault(
            f"{folder} holds {there[0].name}, but no checkpoint that can be gone on from. Choose "
            "another folder, or move these away to begin afresh."
        )
    if found is None and resume == "latest":
        tell(f"{folder}: there is no checkpoint yet; beginning afresh")
    return None if found is None else str(found.folder)


def look(source: records.Source, cfg: config.Config, tell: Tell) -> dict[str, Any]:
    """Read every record once; what is bad is refused, or written to ``skipped.jsonl``."""
    looked = index.look(source, cfg.data, known=encoding.known_pictures(cfg), tell=tell)
    if looked.skipped:
        index.write_skipped(Path(cfg.run), looked.skipped)
        tell(f"{Path(cfg.run) / index.SKIPPED} names each of them, with the reason")
    return looked.to_plain()


def is_finished(job: Run) -> bool:
    """Whether the last step's checkpoint and the result are both there and whole, and pushed where
    that is wished for."""
    if job.found is None or job.found.step < job.plan.steps:
        return False
    step, hub = job.found.step, job.cfg.export.hub
    return job.process.first(
        lambda: (
            export.result_is_whole(job.folder, step)
            and (hub is None or export.is_pushed(job.folder, hub))
        )
    )


def train(job: Run) -> State:
    """The loop. Learning rate, decay and seeds are functions of the step; nothing else has a
    clock."""
    cfg, engine, stream, total = job.cfg, job.engine, job.stream, job.plan.steps
    state, step = engine.init(job.plan.seed), 0
    if job.found is not None:
        state, step = (
            engine.restore(state, snapshot.reader(job.found, cfg.adapt, job.family)),
            job.found.step,
        )
        job.tell(f"going on from {job.found.folder.name}")
    watch = Watcher(job, step)
    load = partial(stream.batch, rank=job.process.rank, world=job.process.world)
    preview_every = job.plan.every(cfg.preview.every, cfg.preview.every_epochs)
    with (
        contextlib.closing(prefetch(load, step, total, threads=cfg.data.threads)) as batches,
        watch,
    ):
        if job.held_out and step == 0:
            with watch.aside():
                watch.held_out(state, step)
        for batch in batches:
            rate = schedule.learning_rate(
                step,
                peak=cfg.optim.learning_rate,
                schedule=cfg.optim.schedule,
                warmup=cfg.optim.warmup,
                total=total,
                cycles=cfg.optim.cycles,
            )
            decay = None if cfg.optim.ema is None else schedule.ema_decay(step, cfg.optim.ema)
            state, metrics = engine.step(
                state, batch, step=step, learning_rate=rate, ema=decay, seed=job.plan.seed
            )
            step += 1
            watch.add(metrics, rate)
            stopping = job.process.any(job.stop.asked) and step < total
            last = step == total or stopping
            if due(step, cfg.log.every, last):
                watch.metrics(state, step)
            with watch.aside():
                if job.held_out and due(step, cfg.watch.every, step == total):
                    watch.held_out(state, step)
                if cfg.preview.prompts and due(step, preview_every or total, step == total):
                    watch.preview(state, step)
                if due(step, cfg.checkpoint.every, last):
                    save(job, state, step)
            if stopping:
                raise Stopped(
                    f"stopped at step {step} of {total}; {job.folder / f'checkpoint-{step}'} is "
                    "saved. Run the same command again to go on."
                )
    return state


def due(step: int, every: int, last: bool) -> bool:
    return last or step % every == 0


def save(job: Run, state: State, step: int) -> None:
    """A checkpoint, written by the first process while the others wait; never of a state with a
    fault."""
    fetch(job, state, [])
    groups = job.engine.snapshot(state)
    trained = job.base.configs[job.family.trains]
    job.process.first(
        lambda: str(
            snapshot.save(job.folder, step, groups, job.identity, job.cfg, job.family, trained)
        )
    )


def finish(job: Run) -> None:
    """The result, from the last checkpoint on disk; then, where it is wished for, the push."""
    passed = job.found is not None and job.found.step >= job.plan.steps
    last = (
        job.found
        if passed and job.found is not None
        else checkpoint.read(job.folder / f"checkpoint-{job.plan.steps}")
    )
    if (shown := sorted((job.folder / "previews").glob("step-*"))) and job.cfg.preview.prompts:
        generate.sheet_of_files(
            sorted(shown[-1].glob("*.png")), job.cfg.preview.prompts, job.folder / export.GRID
        )
    checkpoint.prune(
        job.folder, last.step, job.cfg.checkpoint.keep
    )  # a run that was killed between its last checkpoint and this had no time for it
    export.write(last, job.cfg, job.base, job.family, job.stream.objective.predict)
    job.tell(f"{job.folder}: the result of step {last.step} is here")
    if job.cfg.export.hub is not None:
        export.push(job.folder, job.cfg.export.hub, job.cfg.export.private, job.tell)
