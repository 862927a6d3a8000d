"""Run a training: the loop, checkpoints and the result."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from limner import engines, protocols
from limner.base_model.open import open_base
from limner.config import rules, toml
from limner.config.schema import Config
from limner.data import contact_sheet
from limner.data.prefetch import prefetch
from limner.data.source import Source
from limner.diffusion import schedules
from limner.errors import NonFiniteError, Stopped, report_once
from limner.families import get_family
from limner.protocols import ProcessGroup, State
from limner.storage import atomic, checkpoint, layout
from limner.storage.run_folder import GRID_FILE
from limner.training import encode, push, result, sinks
from limner.training.monitor import Monitor, fetch_metrics
from limner.training.setup import Setup, link_stages, prepare
from limner.training.signals import Stop


def print_line(text: str) -> None:
    """Tell the user one thing, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)


def run_all(configs: Sequence[Config], report: protocols.Report = print_line) -> list[Path]:
    """Train one recipe after the other. Where one trains the other stage of a later one, its run is
    that one's other stage.

    Raises:
        LimnerError: what ``run`` raises; what is wrong with the recipes and bases of any is known
            before the first is trained.
    """
    with report_once():
        chained = [one for one, _ in link_stages(configs)]
    with Stop() as stop, contextlib.closing(engines.join_processes(configs[0].engine)) as process:
        with report_once():
            process.first(
                lambda: [
                    str(open_base(model, get_family(one), draws=False).folder)
                    for one, model in link_stages(configs)
                ]
            )
        return [run_in_group(one, None, report, stop, process) for one in chained]


def run_training(
    config: Config,
    source: Source | None = None,
    report: protocols.Report = print_line,
    *,
    only_encode: bool = False,
) -> Path:
    """Train as the config says, going on from the newest good checkpoint; returns the folder that
    holds the result.

    Args:
        only_encode: fill the caches, so that training will load no encoder, and stop there.
        source: pictures and captions of one's own, any object with ``len`` and ``[i] -> Record``;
            else ``data.folder`` or ``data.hub``.
        report: receives what is worth saying, a line at a time.

    Raises:
        LimnerError: of the kind that fits, with a message for the user; nothing that was whole is
            lost.
    """
    with report_once():
        rules.check_config(config, own_records=source is not None)
    with Stop() as stop, contextlib.closing(engines.join_processes(config.engine)) as process:
        return run_in_group(config, source, report, stop, process, only_encode)


def run_in_group(
    config: Config,
    source: Source | None,
    report: protocols.Report,
    stop: Stop,
    process: ProcessGroup,
    only_encode: bool = False,
) -> Path:
    """One run among processes that have met."""
    stop.save_first = False
    if process.rank:
        report = lambda text: None  # noqa: E731 - the first process speaks for all
    with report_once(Stopped, NonFiniteError), contextlib.ExitStack() as held:
        process.first(lambda: held.enter_context(atomic.lock(Path(config.run))))
        process.first(lambda: atomic.sweep(Path(config.run)))
        config = replace(config, engine=replace(config.engine, precision=process.precision))  # type: ignore[arg-type]
        with report_once():
            setup = prepare(config, source, process, report, stop)
        if only_encode:
            return encode.encode_only(setup)
        if setup.checkpoint is not None and is_finished(setup):
            report(
                f"{setup.folder}: finished at step {setup.checkpoint.step}; nothing to do. Ask "
                "for more "
                "with train.steps."
            )
            return setup.folder
        stop.save_first = True
        settings = {
            **toml.to_plain(setup.config),
            "train": {**toml.to_plain(config.train), "seed": setup.plan.seed},
        }
        process.first(
            lambda: atomic.write_text(
                setup.folder / "config.json", json.dumps(sinks.redact(settings), indent=1)
            )
        )
        if setup.checkpoint is None or setup.checkpoint.step < setup.plan.steps:
            encode.fill_caches(setup)
            train(setup)
        process.first(lambda: publish_result(setup))
    return Path(config.run)


def is_finished(setup: Setup) -> bool:
    """Whether the last step's checkpoint and the result are both there and whole, and pushed where
    that is wished for."""
    if setup.checkpoint is None or setup.checkpoint.step < setup.plan.steps:
        return False
    step, hub = setup.checkpoint.step, setup.config.export.hub
    return setup.process.first(
        lambda: (
            result.is_result_whole(setup.folder, step)
            and (hub is None or push.is_pushed(setup.folder, hub))
        )
    )


def train(setup: Setup) -> State:
    """The loop. Learning rate, decay and seeds are functions of the step; nothing else has a
    clock."""
    config, engine, stream, total = setup.config, setup.engine, setup.stream, setup.plan.steps
    state, step = engine.init_state(setup.plan.seed), 0
    if setup.checkpoint is not None:
        state, step = (
            engine.restore(
                state, layout.array_reader(setup.checkpoint, config.adapter, setup.family)
            ),
            setup.checkpoint.step,
        )
        setup.report(f"going on from {setup.checkpoint.folder.name}")
    watch = Monitor(setup, step)
    load = partial(stream.batch, rank=setup.process.rank, world=setup.process.world_size)
    preview_every = setup.plan.to_steps(config.preview.every, config.preview.every_epochs)
    with (
        contextlib.closing(prefetch(load, step, total, threads=config.data.threads)) as batches,
        watch,
    ):
        if setup.validation_entries and step == 0:
            with watch.timer_paused():
                watch.validate(state, step)
        for batch in batches:
            rate = schedules.learning_rate(
                step,
                peak=config.optim.learning_rate,
                schedule=config.optim.schedule,
                warmup=config.optim.warmup,
                total=total,
                cycles=config.optim.cycles,
            )
            decay = (
                None if config.optim.ema is None else schedules.ema_decay(step, config.optim.ema)
            )
            state, metrics = engine.step(
                state, batch, step=step, learning_rate=rate, ema=decay, seed=setup.plan.seed
            )
            step += 1
            watch.add_step(metrics, rate)
            stopping = setup.process.any(setup.stop.asked) and step < total
            last = step == total or stopping
            if is_due(step, config.log.every, last):
                watch.write_metrics(state, step)
            with watch.timer_paused():
                if setup.validation_entries and is_due(
                    step, config.validation.every, step == total
                ):
                    watch.validate(state, step)
                if config.preview.prompts and is_due(step, preview_every or total, step == total):
                    watch.draw_previews(state, step)
                if is_due(step, config.checkpoint.every, last):
                    save_checkpoint(setup, state, step)
            if stopping:
                raise Stopped(
                    f"stopped at step {step} of {total}; {setup.folder / f'checkpoint-{step}'} is "
                    "saved. Run the same command again to go on."
                )
    return state


def is_due(step: int, every: int, last: bool) -> bool:
    return last or step % every == 0


def save_checkpoint(setup: Setup, state: State, step: int) -> None:
    """A checkpoint, written by the first process while the others wait; never of a state with a
    fault."""
    fetch_metrics(setup, state, [])
    groups = setup.engine.snapshot(state)
    trained = setup.base.configs[setup.family.trained_component]
    setup.process.first(
        lambda: str(
            layout.save_groups(
                setup.folder, step, groups, setup.run_state, setup.config, setup.family, trained
            )
        )
    )


def publish_result(setup: Setup) -> None:
    """The result, from the last checkpoint on disk; then, where it is wished for, the push."""
    passed = setup.checkpoint is not None and setup.checkpoint.step >= setup.plan.steps
    last = (
        setup.checkpoint
        if passed and setup.checkpoint is not None
        else checkpoint.open_checkpoint(setup.folder / f"checkpoint-{setup.plan.steps}")
    )
    if (
        shown := sorted((setup.folder / "previews").glob("step-*"))
    ) and setup.config.preview.prompts:
        contact_sheet.draw_sheet_of_files(
            sorted(shown[-1].glob("*.png")), setup.config.preview.prompts, setup.folder / GRID_FILE
        )
    checkpoint.prune(
        setup.folder, last.step, setup.config.checkpoint.keep
    )  # a run that was killed between its last checkpoint and this had no time for it
    result.write_result(
        last, setup.config, setup.base, setup.family, setup.stream.objective.prediction_type
    )
    setup.report(f"{setup.folder}: the result of step {last.step} is here")
    if setup.config.export.hub is not None:
        push.push_result(
            setup.folder, setup.config.export.hub, setup.config.export.private, setup.report
        )
