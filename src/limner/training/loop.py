"""Run a training: the loop, checkpoints and the result."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from limner import engines
from limner.base_model.open import open_base
from limner.config import toml
from limner.config.rules import check_config
from limner.config.schema import SETTINGS, Config, ModelSettings, OptimizerSettings
from limner.data import contact_sheet
from limner.data.prefetch import prefetch
from limner.data.source import Source
from limner.diffusion import schedules
from limner.errors import InputError, NonFiniteError, Stopped, report_once
from limner.families import get_family
from limner.protocols import ProcessGroup, Report, State
from limner.storage import atomic, checkpoint, layout
from limner.storage.run_folder import RunFolder
from limner.training import push, result, sinks
from limner.training.encode import encode_only, fill_caches
from limner.training.monitor import Monitor, fetch_metrics
from limner.training.resolve import resolve
from limner.training.setup import Setup, prepare
from limner.training.signals import Stop
from limner.training.status import StatusFile, keep_status


def print_line(text: str) -> None:
    """Tell the user one thing, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)


def ignore_line(text: str) -> None:
    """Say nothing: the first process speaks for all."""


def run_all(configs: Sequence[Config], report: Report = print_line) -> list[Path]:
    """Train one recipe after the other; a run serves the later ones as their other stage.

    Raises:
        LimnerError: what ``run_training`` raises. What is wrong with the recipes and bases of any
            is known before the first is trained.
    """
    with report_once():
        linked = link_stages(configs)
    with Stop() as stop, contextlib.closing(engines.join_processes(configs[0].engine)) as process:
        with report_once():
            process.first(lambda: open_bases(configs))
        return [run_in_group(config, None, report, stop, process) for config, _ in linked]


def link_stages(configs: Sequence[Config]) -> list[tuple[Config, ModelSettings]]:
    """Each recipe beside the earlier one that trains its other stage, and the model that can be
    looked at before that one has been trained.

    Raises:
        InputError: for recipes that cannot be trained one after the other.
    """
    shared = [name for name, one in SETTINGS.items() if one.declaration.shared]
    linked: list[tuple[Config, ModelSettings]] = []
    for config in configs:
        _, family = resolve(config)
        earlier = {one.model.family: one for one, _ in linked}
        if any(config.run == one.run for one, _ in linked):
            raise InputError(
                f"run: two recipes would train in {config.run}. Give each a run of its own, in the "
                "recipes."
            )
        if different := [name for name in shared if config[name] != configs[0][name]]:
            raise InputError(
                f"engine: recipes that are trained one after the other need the same {different[0]}"
            )
        before = earlier.get(family.other_stage) if family.other_stage else None
        if before is None:
            linked.append((config, config.model))
            continue
        trained = replace(config.model, other_stage=before.run)
        untrained = replace(config.model, other_stage=before.model.base)
        linked.append((replace(config, model=trained), untrained))
    return linked


def open_bases(configs: Sequence[Config]) -> None:
    """Open the base of every recipe, so that a bad one is refused before anything is trained."""
    for config, model in link_stages(configs):
        open_base(model, get_family(config), for_generation=False)


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
    with Stop() as stop, contextlib.closing(engines.join_processes(config.engine)) as process:
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
    with report_once(Stopped, NonFiniteError), contextlib.ExitStack() as stack:
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
        with keep_status(RunFolder(folder), step, setup.plan.steps, writes=writes) as status:
            if step < setup.plan.steps:
                fill_caches(setup)
                train(setup, status)
            process.first(lambda: publish_result(setup))
    return folder


def write_config(setup: Setup) -> None:
    """Keep the resolved config, without secrets, in the run's folder."""
    plain = sinks.redact(toml.to_plain(setup.config))
    atomic.write_text(RunFolder(setup.folder).config, json.dumps(plain, indent=1))


def is_finished(setup: Setup) -> bool:
    """Whether the last step's checkpoint and the result are whole, and pushed where asked for."""
    checkpoint, hub = setup.checkpoint, setup.config.export.hub
    if checkpoint is None or checkpoint.step < setup.plan.steps:
        return False
    step, folder = checkpoint.step, setup.folder
    return setup.process.first(
        lambda: (
            result.is_result_whole(folder, step) and (hub is None or push.is_pushed(folder, hub))
        )
    )


def train(setup: Setup, status: StatusFile) -> State:
    """Train until the last step, or until told to stop. Nothing but the step has a clock: learning
    rate, decay and seeds are functions of it."""
    config, engine, total = setup.config, setup.engine, setup.plan.steps
    state, step = start(setup)
    monitor = Monitor(setup, step, status)
    preview_every = setup.plan.to_steps(config.preview.every, config.preview.every_epochs) or total
    load = partial(setup.stream.batch, rank=setup.process.rank, world=setup.process.world_size)
    batches = prefetch(load, step, total, threads=config.data.threads)
    with contextlib.closing(batches), monitor:
        if setup.validation_entries and step == 0:
            with monitor.timer_paused():
                monitor.validate(state, step)
        for batch in batches:
            learning_rate, decay = schedule_step(config.optim, step, total)
            state, metrics = engine.step(
                state,
                batch,
                step=step,
                learning_rate=learning_rate,
                ema=decay,
                seed=setup.plan.seed,
            )
            step += 1
            monitor.add_step(metrics, learning_rate)
            stopping = setup.process.any(setup.stop.asked) and step < total
            finished = step == total
            if is_due(step, config.log.every, finished or stopping):
                monitor.write_metrics(state, step)
            with monitor.timer_paused():
                if setup.validation_entries and is_due(step, config.validation.every, finished):
                    monitor.validate(state, step)
                if config.preview.prompts and is_due(step, preview_every, finished):
                    monitor.draw_previews(state, step)
                if is_due(step, config.checkpoint.every, finished or stopping):
                    save_checkpoint(setup, state, step)
            if stopping:
                saved = RunFolder(setup.folder).checkpoint(step)
                raise Stopped(
                    f"stopped at step {step} of {total}; {saved} is saved. Run the same command "
                    "again to go on."
                )
    return state


def start(setup: Setup) -> tuple[State, int]:
    """The state to train from and its step: the base's weights, or the checkpoint's."""
    state = setup.engine.init_state(setup.plan.seed)
    if setup.checkpoint is None:
        return state, 0
    read = layout.array_reader(setup.checkpoint, setup.config.adapter, setup.family)
    state = setup.engine.restore(state, read)
    setup.report(f"going on from {setup.checkpoint.folder.name}")
    return state, setup.checkpoint.step


def schedule_step(optim: OptimizerSettings, step: int, total: int) -> tuple[float, float | None]:
    """Learning rate and EMA decay of the update that follows ``step`` finished ones."""
    learning_rate = schedules.learning_rate(
        step,
        peak=optim.learning_rate,
        schedule=optim.schedule,
        warmup=optim.warmup,
        total=total,
        cycles=optim.cycles,
    )
    decay = None if optim.ema is None else schedules.ema_decay(step, optim.ema)
    return learning_rate, decay


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether something is to be done after ``step``: at each interval, and at the last step."""
    return last or step % every == 0


def save_checkpoint(setup: Setup, state: State, step: int) -> None:
    """Write a checkpoint in the first process, while the others wait.

    Raises:
        NonFiniteError: before a state that is not finite is written.
    """
    fetch_metrics(setup, state, [])
    groups = setup.engine.snapshot(state)
    trained = setup.base.configs[setup.family.network.component]

    def save() -> str:
        folder = layout.save_groups(
            setup.folder, step, groups, setup.run_state, setup.config, setup.family, trained
        )
        return str(folder)

    setup.process.first(save)


def publish_result(setup: Setup) -> None:
    """Write the result from the last checkpoint on disk, and push it where asked for."""
    config, last, folder = setup.config, setup.checkpoint, RunFolder(setup.folder)
    if last is None or last.step < setup.plan.steps:
        last = checkpoint.open_checkpoint(folder.checkpoint(setup.plan.steps))
    previews = folder.list_previews()
    if previews and config.preview.prompts:
        contact_sheet.draw_sheet_of_files(
            sorted(previews[-1].glob("*.png")), config.preview.prompts, folder.grid
        )
    # A run that was killed between its last checkpoint and this had no time for it.
    checkpoint.prune(setup.folder, last.step, config.checkpoint.keep)
    prediction_type = setup.stream.objective.prediction_type
    result.write_result(last, config, setup.base, setup.family, prediction_type)
    setup.report(f"{setup.folder}: the result of step {last.step} is here")
    if config.export.hub is not None:
        push.push_result(setup.folder, config.export.hub, config.export.private, setup.report)
