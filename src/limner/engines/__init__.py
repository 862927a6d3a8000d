"""The engines, by name; each framework is imported only when its engine is asked for."""

import os
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from limner import config
from limner.base import Base
from limner.engine import Engine, Weights, World
from limner.family import Family


def join(settings: config.Engine) -> World:
    """Join the processes of this run; nothing is loaded yet."""
    if settings.kind == "jax":
        from limner.engines.jax.world import World as JaxWorld

        return JaxWorld(settings)
    # on busy cores, threads that spin while they wait cost more than they save; read when torch
    # loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from limner.engines.torch.world import World as TorchWorld

    return TorchWorld(settings.device, settings.precision)


def open_engine(
    cfg: config.Config,
    base: Base,
    family: Family,
    world: World,
    micro: int,
    tell: Callable[[str], None],
) -> Engine:
    """The engine of this process; weights are loaded when they are first needed."""
    if cfg.engine.kind == "jax":
        from limner.engines.jax.engine import JaxEngine

        return JaxEngine(cfg, base, family, world, micro, tell)  # type: ignore[arg-type]
    from limner.engines.torch.engine import TorchEngine

    return TorchEngine(cfg, base, family, world, micro, tell)  # type: ignore[arg-type]


def arithmetic(kind: str, world: World) -> list[str]:
    """What the last bits of the encoders' output depend on, besides their weights: kind of device,
    and version of the framework."""
    if kind == "jax":
        return [world.kind, metadata.version("jaxlib")]  # type: ignore[attr-defined]
    return [str(world.device.type), metadata.version("torch")]  # type: ignore[attr-defined]


def open_pipeline(
    weights: Weights, partner: Weights | None, engine: str = "torch", **settings: Any
) -> Any:
    """A stock diffusers pipeline, see ``engines.torch.pipeline.open_pipeline``; or one in JAX, see
    ``engines.jax.pipeline.open_pipeline``."""
    if engine == "jax":
        from limner.engines.jax import pipeline as own

        return own.open_pipeline(weights, partner, **settings)
    from limner.engines.torch import pipeline

    return pipeline.open_pipeline(weights, partner, **settings)


def draw(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **settings: Any
) -> list[np.ndarray]:
    """Pictures of a pipeline; see ``engines.torch.pipeline.draw``."""
    if hasattr(pipeline, "draw"):
        made: list[np.ndarray] = pipeline.draw(prompts, seeds, **settings)
        return made
    from limner.engines.torch import pipeline as stock

    return stock.draw(pipeline, prompts, seeds, **settings)


def open_gauge(kind: str, engine: Engine) -> Any:
    """What measures an engine from outside; see ``engines.torch.gauge.Gauge``."""
    if kind == "jax":
        from limner.engines.jax import gauge as own

        return own.Gauge(engine)  # type: ignore[arg-type]
    from limner.engines.torch import gauge

    return gauge.Gauge(engine)  # type: ignore[arg-type]


def shapes(kind: str, known: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of the network that a config describes.

    Raises:
        InputFault: for a network that the JAX engine has no code for.
    """
    if kind == "jax":
        from limner.engines.jax import weights

        return weights.expected(known["_class_name"], known)
    from limner.engines.torch import gauge

    return gauge.shapes(known)
