"""Run a training: the loop and its checkpoints."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import limner
from limner import engines
from limner.config import toml
from limner.config.rules import check_config
from limner.config.schema import Config
from limner.data.prefetch import prefetch
from limner.data.source import Source
from limner.diffusion import schedules
from limner.errors import NonFiniteError, Stopped, is_first_on_host, report_once
from limner.progress import print_line
from limner.protocols import ProcessGroup, Report, State
from limner.storage import atomic, layout
from limner.storage.run_folder import RunFolder
from limner.training.announce import announce_run
from limner.training.encode import encode_only, fill_caches
from limner.training.monitor import Monitor, is_due, list_due, list_missing
from limner.training.publish import is_finished, publish_result
from limner.training.resolve import check_places
from limner.training.setup import Setup, prepare
from limner.training.signals import BEFORE_TRAINING, Stop
from limner.training.status import StatusFile, keep_status


def ignore_line(text: str) -> None:
    """Say nothing: the first process speaks for all."""


def run_training(
    config: Config,
    source: Source | None = None,
    report: Report = print_line,
    *,
    only_encode: bool = False,
) -> Path:
    """Train as the config says, going on from the newest good checkpoint.

    Args:
        source: the caller's own records, any object with ``len`` and ``[i] -> Record``; None: those
            that the config names.
        report: receives what is worth saying, a line at a time.
        only_encode: fill the caches, so that training will load no encoder, and stop there.

    Returns:
        The folder that holds the result.

    Raises:
        LimnerError: of the kind that fits, with a message for the user. Nothing that was whole is
            lost.
    """
    with report_once():
        check_config(config, own_records=source is not None)
        check_places(config, own_records=source is not None)
    # Frameworks take seconds to import: whoever looks on need not wonder.
    if is_first_on_host() and sys.stderr.isatty():
        report(f"limner {limner.__version__}: {config.run}, with {config.engine.kind}")
    with Stop() as stop, engines.join_processes(config.engine) as process:
        return run_in_group(config, source, report, stop, process, only_encode)


def run_in_group(
    config: Config,
    source: Source | None,
    report: Report,
    stop: Stop,
    process: ProcessGroup,
    only_encode: bool = False,
) -> Path:
    """Run one recipe among processes that have met; see ``run_training``."""
    stop.save_first = False
    folder = Path(config.run)
    if process.rank > 0:
        report = ignore_line
    stop.tell_others, stop.end = process.request_stop, process.end
    process.on_stop, process.on_end = stop.hear_others, lambda error: None
    with (
        report_once(Stopped, NonFiniteError),
        contextlib.ExitStack() as stack,
        process.explain_errors(),
    ):
        process.first(lambda: stack.enter_context(atomic.lock(folder)))
        process.first(lambda: atomic.sweep(folder))
        with report_once():
            setup = prepare(config, source, process, report, stop)
        if only_encode:
            return encode_only(setup)
        if setup.checkpoint is not None and is_finished(setup):
            report(
                f"{folder}: finished at step {setup.checkpoint.step}; nothing to do. Ask for more "
                "with train.steps."
            )
            return folder
        # From here on a signal saves a checkpoint before the run ends.
        stop.save_first = True
        process.first(lambda: write_config(setup))
        step = 0 if setup.checkpoint is None else setup.checkpoint.step
        writes = process.rank == 0
        with (
            keep_status(RunFolder(folder), step, setup.plan.steps, writes=writes) as status,
            process.explain_errors(),
        ):
            process.on_end = status.write_end
            missing = process.first(lambda: list_missing(setup, step))
            if step < setup.plan.steps or missing:
                fill_caches(setup)
                train(setup, status, missing)
            process.first(lambda: publish_result(setup))
    return folder


def write_config(setup: Setup) -> None:
    """Keep the resolved config, without secrets, in the run's folder."""
    plain = toml.to_saved(setup.config)
    atomic.write_text(RunFolder(setup.folder).config, json.dumps(plain, indent=1))


def train(setup: Setup, status: StatusFile, missing: Sequence[str]) -> State:
    """Train until the last step, or until told to stop. Nothing but the step has a clock: learning
    rate, decay and seeds are functions of it.

    Args:
        missing: looks at the state that are still to be taken at the step of the start.
    """
    config, engine, total = setup.config, setup.engine, setup.plan.steps
    state, step = start(setup)
    announce_run(setup, engine.count_trained(state))
    monitor = Monitor(setup, step, status)
    load = partial(setup.stream.batch, rank=setup.process.rank, world=setup.process.world_size)
    batches = prefetch(load, step, total, threads=config.data.threads)
    with contextlib.closing(batches), monitor:
        if not monitor.look(missing, state, step):
            raise make_stopped(setup, step)
        for batch in batches:
            learning_rate, decay = schedules.schedule_step(config.optim, step, total)
            state, metrics = engine.step(
                state,
                batch,
                step=step,
                learning_rate=learning_rate,
                ema=decay,
                seed=setup.plan.seed,
            )
            step += 1
            setup.stop.unsaved = True
            monitor.add_step(metrics, learning_rate)
            finished = step == total
            stopping = setup.process.any(setup.stop.asked) and not finished
            saving = is_due(step, config.checkpoint.every, finished)
            # A stop writes no row of its own: the checkpoint keeps what the next row is made of.
            if is_due(step, config.log.every, finished):
                monitor.write_metrics(state, step)
            with monitor.timer_paused():
                if saving:
                    save_checkpoint(setup, state, step, monitor.fetch_losses(state))
                due = list_due(setup, step, finished)
                stopping = stopping or not monitor.look(due, state, step)
                if stopping and not saving:
                    save_checkpoint(setup, state, step, monitor.fetch_losses(state))
            if stopping:
                status.update(step=step)
                raise make_stopped(setup, step)
    return state


def make_stopped(setup: Setup, step: int) -> Stopped:
    """The end of a run that was told to stop, and whose state is saved."""
    if step == 0:
        return Stopped(BEFORE_TRAINING)
    saved = RunFolder(setup.folder).checkpoint(step)
    return Stopped(
        f"stopped at step {step} of {setup.plan.steps}; {saved} is saved. Run the same command "
        "again to go on."
    )


def start(setup: Setup) -> tuple[State, int]:
    """The state to train from and its step: the base's weights, or the checkpoint's."""
    state = setup.engine.init_state(setup.plan.seed)
    if setup.checkpoint is None:
        return state, 0
    read = layout.array_reader(setup.checkpoint, setup.config.adapter, setup.family)
    state = setup.engine.restore(state, read)
    setup.report(f"resuming from {setup.checkpoint.folder.name}")
    return state, setup.checkpoint.step


def save_checkpoint(
    setup: Setup, state: State, step: int, unlogged_losses: Sequence[float]
) -> None:
    """Write a checkpoint in the first process, while the others wait.

    Args:
        unlogged_losses: of steps since the last regular row of metrics. They have been fetched, so
            that a state that is not finite is never written.
    """
    run_state = replace(setup.run_state, unlogged_losses=tuple(unlogged_losses))
    groups = setup.engine.snapshot(state)
    trained = setup.base.configs[setup.family.network.component]

    def save() -> str:
        with setup.process.saving:
            folder = layout.save_groups(
                setup.folder, step, groups, run_state, setup.config, setup.family, trained
            )
        return str(folder)

    setup.report(f"step {step}: saved {setup.process.first(save)}")
    setup.stop.unsaved = False
