"""``limner bench``: step time, memory and useful arithmetic of a recipe.

Features are random numbers of the right shapes, so that only the trained network is loaded.
"""

import contextlib
import datetime
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner import engines
from limner.base_model.base import BaseModel
from limner.commands.random_base import open_base_or_stand_in
from limner.config.schema import Config
from limner.data.index import Entry
from limner.data.order import Order
from limner.data.source import Record
from limner.diffusion import make_objective, schedules
from limner.errors import InputError, NonFiniteError
from limner.families.family import Family
from limner.features.encoder import FeatureEncoder
from limner.features.random_features import StandInEncoders
from limner.json_types import Plain
from limner.protocols import (
    BaseConfigs,
    Batch,
    Engine,
    Metrics,
    NonFiniteStep,
    ProcessGroup,
    Report,
    State,
)
from limner.storage import atomic, outputs
from limner.training.batch_plan import BatchPlan, make_plan
from limner.training.resolve import resolve
from limner.training.stream import Stream

WARM_UP = 2  # steps before the first that counts


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class BenchFigures:
    """What a measurement found; the JSON file has these names."""

    device: str
    precision: str
    versions: str
    date: str
    processes: int
    batch: int
    micro: int
    accumulate: int
    size: int  # pixels
    kind: str  # full or lora
    ema: bool
    gradient_checkpointing: bool
    attention: str
    measured_steps: int
    warm_up_steps: int
    step_seconds: StepSeconds
    images_per_second: float
    peak_memory: dict[str, int]  # bytes
    tflop_per_step: float
    tflops_per_device: float
    matmul_tflops: float
    mfu_of_matmul: float
    published_tflops: float | None
    mfu_of_published: float | None
    weights: str
    base: str


def run_bench(
    config: Config, *, steps: int = 10, json_file: Path | None = None, report: Report = print
) -> Plain:
    """Measure ``steps`` steps of a recipe after the warm-up, print a table, and return the figures
    that the JSON file has.

    Raises:
        InputError: for a recipe that ``train`` would refuse too, or fewer than one step.
    """
    outputs.check_output_file("--json", json_file)
    if steps < 1:
        raise InputError(f"--steps: {steps} is not above 0")
    config, family = resolve(config, own_records=True)
    with (
        contextlib.closing(engines.join_processes(config.engine)) as process,
        open_base_or_stand_in(config, family, process) as (base, weights),
    ):
        figures = measure_steps(config, base, family, process, weights, steps, report)
        if process.rank == 0:
            report(format_figures(figures))
            if json_file is not None:
                atomic.write_text(json_file, json.dumps(asdict(figures), indent=1) + "\n")
    return asdict(figures)


def measure_steps(
    config: Config,
    base: BaseModel,
    family: Family,
    process: ProcessGroup,
    weights: str,
    steps: int,
    report: Report,
) -> BenchFigures:
    """Measure in one process, which trains on its share of the global batch."""
    seed, devices = config.train.seed or 0, process.device_count
    plan = make_plan(config, process.world_size, 1, None, seed, devices=devices)
    engine = engines.open_engine(config, base, family, process, plan.micro_batch_size, report)
    profiler = engines.open_profiler(config.engine.kind, engine)
    batch = make_batch(config, base.configs, family, plan.batch_size // process.world_size)
    flops = profiler.count_flops(batch, plan.micro_batch_size)
    seconds = time_steps(config, engine, profiler, process, plan, batch, steps)
    memory = profiler.peak_memory()
    median = float(np.median(seconds))
    reached = flops / median / devices
    peak, published = profiler.measure_matmul(), profiler.published_peak()
    return BenchFigures(
        **profiler.describe_machine(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        processes=process.world_size,
        batch=plan.batch_size,
        micro=plan.micro_batch_size,
        accumulate=plan.accumulation_steps,
        size=config.data.size,
        kind=config.adapter.kind,
        ema=config.optim.ema is not None,
        gradient_checkpointing=config.engine.gradient_checkpointing,
        attention=config.engine.attention,
        measured_steps=steps,
        warm_up_steps=WARM_UP,
        step_seconds=StepSeconds(
            median, float(np.percentile(seconds, 10)), float(np.percentile(seconds, 90))
        ),
        images_per_second=plan.batch_size / median,
        peak_memory=memory,
        tflop_per_step=flops * process.world_size / 1e12,
        tflops_per_device=reached / 1e12,
        matmul_tflops=peak / 1e12,
        mfu_of_matmul=reached / peak,
        published_tflops=published and published / 1e12,
        mfu_of_published=published and reached / published,
        weights=weights,
        base=base.name,
    )


def time_steps(
    config: Config,
    engine: Engine,
    profiler: Any,
    process: ProcessGroup,
    plan: BatchPlan,
    batch: Batch,
    steps: int,
) -> list[float]:
    """Seconds of each step after the warm-up."""
    state = engine.init_state(plan.seed)
    marks: list[object] = []
    metrics: list[Metrics] = []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            wait_for_steps(engine, state, metrics)
            process.barrier()
            marks.append(profiler.mark())
        _, decay = schedules.schedule_step(config.optim, step, WARM_UP + steps)
        state, of_step = engine.step(
            state,
            batch,
            step=step,
            learning_rate=config.optim.learning_rate,
            ema=decay,
            seed=plan.seed,
        )
        metrics.append(of_step)
        if step >= WARM_UP:
            marks.append(profiler.mark(of_step))
    wait_for_steps(engine, state, metrics)
    seconds: list[float] = profiler.seconds(marks)
    return seconds


def wait_for_steps(engine: Engine, state: State, metrics: list[Metrics]) -> None:
    """Wait for the steps so far. Their losses must be numbers: arithmetic on infinities is not what
    training costs."""
    try:
        engine.fetch_metrics(state, metrics)
    except NonFiniteStep as error:
        raise NonFiniteError(
            f"step {error.step + 1} of the measurement has no finite loss, with random latents. "
            "Measure in engine.precision=bf16 or no."
        ) from None


def make_batch(config: Config, configs: BaseConfigs, family: Family, rows: int) -> Batch:
    """A batch as the stream makes it, of one blank picture and random features."""
    size, encoders = config.data.size, StandInEncoders(configs)
    entry = Entry(0, "blank", ("",), "", size, size)
    return Stream(
        entries=(entry,),
        order=Order(0, rows, [(size, size)], [0], [1], [], with_buckets=False),
        source=BlankPicture(size),
        data=config.data,
        noise=config.objective,
        objective=make_objective(configs["scheduler"], config.objective),
        family=family,
        configs=configs,
        features=FeatureEncoder(
            family, lambda: encoders, None, None, 8, chunks=config.data.caption_chunks
        ),
        seed=0,
        batch_size=rows,
        text_encoders=config.adapter.text_encoders,
    ).batch(0)


@dataclass(frozen=True)
class BlankPicture:
    """A source of one record: a black square."""

    size: int  # pixels

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Record:
        return Record("blank", np.zeros((self.size, self.size, 3), np.uint8), ("",))


def format_figures(f: BenchFigures) -> str:
    """The figures as a table."""
    options = [
        *(["EMA"] if f.ema else []),
        *(["gradient checkpointing"] if f.gradient_checkpointing else []),
        f"{f.attention} attention",
    ]
    base = f.base
    if f.weights == "random":
        base = f"random, made for this measurement: {f.base} (the recipe's base is not at hand)"
    processes = f"{f.processes} process{'es' if f.processes > 1 else ''}"
    memory = [f"{name} {size / 2**30:.2f} GiB" for name, size in f.peak_memory.items()]
    seconds = f.step_seconds
    rows = [
        (
            "recipe",
            f"{f.kind}, {f.size} pixels, batch {f.batch} = {f.processes} x {f.accumulate} x "
            f"{f.micro}, {', '.join(options)}",
        ),
        ("weights", base),
        ("where", f"{f.device}, {processes}, {f.precision}, {f.versions}, {f.date}"),
        (
            "step time",
            f"median {seconds.median:.4g} s, p10 {seconds.p10:.4g} s, p90 {seconds.p90:.4g} s "
            f"({f.measured_steps} steps after {f.warm_up_steps})",
        ),
        ("images/s", f"{f.images_per_second:.4g}"),
        ("peak memory", ", ".join(memory)),
        (
            "arithmetic",
            f"{f.tflop_per_step:.4g} TFLOP a step, {f.tflops_per_device:.4g} TFLOP/s a device "
            "(nothing recomputed is counted)",
        ),
        (
            "MFU",
            f"{f.mfu_of_matmul:.1%} of {f.matmul_tflops:.4g} TFLOP/s, a large matrix product "
            "measured in this run",
        ),
    ]
    if f.published_tflops and f.mfu_of_published:
        published = (
            f"{f.mfu_of_published:.1%} of {f.published_tflops:.4g} TFLOP/s, the published "
            "dense peak"
        )
        rows.append(("", published))
    return "\n".join(f"{name:<12}{text}" for name, text in rows)
