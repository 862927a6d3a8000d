"""Learning rate and EMA decay as pure functions of the optimizer step."""

import math
from collections.abc import Callable

from limner.config.schema import OptimizerSettings

# Name -> factor of the peak, given the progress after the warm-up in [0, 1] and the cycles.
SHAPES: dict[str, Callable[[float, int], float]] = {
    "constant": lambda progress, cycles: 1.0,
    "constant_with_warmup": lambda progress, cycles: 1.0,
    "linear": lambda progress, cycles: 1.0 - progress,
    "cosine": lambda progress, cycles: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_restarts": lambda progress, cycles: (
        0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (progress * cycles % 1.0)))
    ),
    "polynomial": lambda progress, cycles: 1.0 - progress,  # power 1
}
POLYNOMIAL_END = 1e-7  # the floor of the polynomial schedule, as in diffusers


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup: int, total: int, cycles: int = 1
) -> float:
    """Return the learning rate of the update after ``step`` finished ones.

    Args:
        step: optimizer steps finished, from 0.
        peak: the rate after the warm-up.
        schedule: a name in ``SHAPES``.
        warmup: steps of linear rise from 0.
        total: steps of the whole run.
        cycles: hard restarts of ``cosine_with_restarts``.
    """
    # As in diffusers, ``constant`` has no warm-up whatever ``warmup`` says.
    if schedule != "constant" and step < warmup:
        return peak * step / max(1, warmup)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    factor = SHAPES[schedule](progress, cycles)
    if schedule == "polynomial":
        return (peak - POLYNOMIAL_END) * factor + POLYNOMIAL_END
    return peak * factor


def ema_decay(step: int, top: float) -> float:
    """Return the share of the moving average that the update after ``step`` finished ones keeps.

    It is min(top, (1 + step) / (10 + step)), and 0 at first: the first update copies the weights.
    Equal to the default of diffusers' ``EMAModel``.
    """
    if step == 0:
        return 0.0
    return min(top, (1 + step) / (10 + step))


def schedule_step(optim: OptimizerSettings, step: int, total: int) -> tuple[float, float | None]:
    """Return learning rate and EMA decay of the update that follows ``step`` finished ones."""
    rate = learning_rate(
        step,
        peak=optim.learning_rate,
        schedule=optim.schedule,
        warmup=optim.warmup,
        total=total,
        cycles=optim.cycles,
    )
    decay = None if optim.ema is None else ema_decay(step, optim.ema)
    return rate, decay
