"""The engines by name: two packages whose modules and functions have the same names."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from limner.base_model import published_shapes
from limner.base_model.base import BaseModel
from limner.config.schema import Config, EngineSettings
from limner.engines.absent import AbsentEngine, LoneProcess
from limner.families.family import Family
from limner.protocols import Engine, ModelSource, ProcessGroup, Report

PACKAGES = {"torch": ("torch", "diffusers", "transformers"), "jax": ("jax", "tokenizers")}


def import_module(kind: str, name: str) -> Any:
    """Import a module of an engine, and with it the framework: now, and no earlier."""
    return importlib.import_module(f"limner.engines.{kind}.{name}")


def join_processes(settings: EngineSettings, *, to_check: bool = False) -> ProcessGroup:
    """Join the processes of this run; nothing is loaded yet.

    Args:
        to_check: nothing will be trained, so that the engine need not be installed.
    """
    if to_check and not is_installed(settings.kind):
        return LoneProcess(settings)
    group: ProcessGroup = import_module(settings.kind, "processes").join_processes(settings)
    return group


def is_installed(kind: str) -> bool:
    """Return whether the libraries of an engine are there; none is imported."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES[kind])


def check_base(kind: str, base: BaseModel, family: Family, report: Report = print) -> None:
    """Compare what the files of a base hold with what its configs say; no weight is read.

    Without the engine that is done for the components of published models, and ``report`` is told
    what was not compared.

    Raises:
        InputError: naming the folder and what differs.
    """
    if is_installed(kind):
        import_module(kind, "weights").check_base(base, family)
        return
    unknown = published_shapes.check_base(base, family)
    weights = f" the weights of {', '.join(unknown)} with their configs," if unknown else ""
    report(
        f"not checked, as engine.kind={kind!r} is not installed:{weights} the tokenizers, and "
        "captions against their limits"
    )


def open_engine(
    config: Config,
    base: BaseModel,
    family: Family,
    process: ProcessGroup,
    micro_batch_size: int,
    report: Report,
) -> Engine:
    """Open the engine of this process; weights are loaded when they are first needed."""
    if isinstance(process, LoneProcess):
        return AbsentEngine()  # type: ignore[return-value]
    module = import_module(config.engine.kind, "engine")
    engine: Engine = module.open_engine(config, base, family, process, micro_batch_size, report)
    return engine


def open_pipeline(
    weights: ModelSource,
    other_stage: ModelSource | None,
    engine: str = "torch",
    *,
    scheduler: str | None,
    precision: str | None,
    device: str | None,
    safety_checker: bool = True,
) -> Any:
    """Open a stock diffusers pipeline, or one in JAX; see the engine's ``pipeline``."""
    module = import_module(engine, "pipeline")
    return module.open_pipeline(
        weights,
        other_stage,
        scheduler=scheduler,
        precision=precision,
        device=device,
        safety_checker=safety_checker,
    )


def draw_pictures(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[np.ndarray]:
    """Draw pictures with a pipeline; see ``engines.torch.pipeline.draw_pictures``."""
    # A pipeline in JAX draws itself; stock ones are driven from outside.
    draw = getattr(pipeline, "draw", None)
    if draw is not None:
        return list(draw(prompts, seeds, **settings))
    stock = import_module("torch", "pipeline")
    return list(stock.draw_pictures(pipeline, prompts, seeds, **settings))


def report_cut_prompts(pipeline: Any, prompts: Sequence[str], report: Report) -> None:
    """Name the prompts that a pipeline's text encoders see cut; see ``caption_lengths``."""
    kind = "jax" if hasattr(pipeline, "draw") else "torch"
    import_module(kind, "pipeline").report_cut(pipeline, prompts, report)


def open_profiler(kind: str, engine: Engine) -> Any:
    """Return what measures an engine; see ``engines.torch.profiler.TorchProfiler``."""
    return import_module(kind, "profiler").open_profiler(engine)


def parameter_shapes(kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every array of the network that a config describes.

    Raises:
        InputError: for a network that the JAX engine has no code for.
    """
    shapes: dict[str, tuple[int, ...]]
    shapes = import_module(kind, "profiler").parameter_shapes(config)
    return shapes
