"""Learning rate and EMA decay as functions of the optimizer step: nothing to save, nothing to
restore, no clock of their own."""

import math
from collections.abc import Callable

SHAPES: dict[
    str, Callable[[float, int], float]
] = {  # factor of the peak, from the part done in [0, 1] and the number of cycles
    "constant": lambda done, cycles: 1.0,
    "constant_with_warmup": lambda done, cycles: 1.0,
    "linear": lambda done, cycles: 1.0 - done,
    "cosine": lambda done, cycles: 0.5 * (1.0 + math.cos(math.pi * done)),
    "cosine_with_restarts": lambda done, cycles: (
        0.0 if done >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (done * cycles % 1.0)))
    ),
    "polynomial": lambda done, cycles: 1.0 - done,  # power 1
}
POLYNOMIAL_END = 1e-7  # the floor of the polynomial schedule, as in diffusers


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup: int, total: int, cycles: int = 1
) -> float:
    """The learning rate of the update that follows ``step`` finished ones.

    Args:
        step: optimizer steps done, from 0.
        peak: the rate after the warm-up.
        schedule: a name in ``SHAPES``; ``constant`` has no warm-up, whatever ``warmup`` says, as in
            diffusers.
        warmup: steps of linear rise from 0.
        total: steps of the whole run.
        cycles: hard restarts of ``cosine_with_restarts``.
    """
    if schedule != "constant" and step < warmup:
        return peak * step / max(1, warmup)
    factor = SHAPES[schedule](min(1.0, (step - warmup) / max(1, total - warmup)), cycles)
    return (
        (peak - POLYNOMIAL_END) * factor + POLYNOMIAL_END
        if schedule == "polynomial"
        else peak * factor
    )


def ema_decay(step: int, top: float) -> float:
    """How much of the average the update that follows ``step`` finished ones keeps: min(top, (1 +
    step) / (10 + step)), 0 at first.

    Equal to the default of diffusers' ``EMAModel``: the first update copies the weights.
    """
    return 0.0 if step == 0 else min(top, (1 + step) / (10 + step))
