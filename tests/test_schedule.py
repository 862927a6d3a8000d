"""Learning rate and EMA decay equal diffusers' at every step."""

import pytest

from limner.diffusion import schedules
from limner.diffusion.schedules import SHAPES

SCHEDULES = [
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
]


def of_diffusers(name: str, peak: float, warmup: int, total: int, cycles: int) -> list[float]:
    """The rate of each of ``total`` updates, by diffusers' scheduler on one process without
    accumulation."""
    import torch
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles
    )
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(total - 1):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.frameworks
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "total", "cycles"),
    [(0, 40, 1), (7, 60, 1), (10, 101, 3), (5, 5, 1), (1, 2, 2), (50, 20, 1)],
)
def test_equal_to_diffusers(name: str, warmup: int, total: int, cycles: int) -> None:
    peak = 3e-4
    rates = [
        schedules.learning_rate(
            s, peak=peak, schedule=name, warmup=warmup, total=total, cycles=cycles
        )
        for s in range(total)
    ]
    assert rates == pytest.approx(
        of_diffusers(name, peak, warmup, total, cycles), rel=1e-9, abs=peak * 1e-15
    )


def test_every_schedule_is_tested() -> None:
    assert sorted(SHAPES) == sorted(SCHEDULES)


@pytest.mark.frameworks
@pytest.mark.parametrize("top", [0.9999, 0.9, 0.3])
def test_ema_decay_is_equal_to_diffusers(top: float) -> None:
    """``EMAModel.step`` adds one to its count before it asks for the decay."""
    import torch
    from diffusers.training_utils import EMAModel

    model = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=top)
    for step in [*range(50), 10_000, 1_000_000]:
        assert schedules.ema_decay(step, top) == pytest.approx(model.get_decay(step + 1), rel=1e-15)
    assert schedules.ema_decay(0, top) == 0.0 and schedules.ema_decay(10**9, top) == top
