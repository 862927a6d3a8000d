"""The noise schedule of a diffusers scheduler config."""

import itertools
import math
from typing import Any

import numpy as np

from limner.diffusion.base_schedulers import GAUSSIAN
from limner.errors import InputError
from limner.json_types import Plain

MAX_TIMESTEPS = 100_000  # a hundred times what any published model has


def make_betas(scheduler: Plain) -> np.ndarray:
    """Return the betas of a ``scheduler_config.json``, float64 [timesteps], each in (0, 1].

    What the config does not say is what its class says.

    Raises:
        InputError: for an unknown ``beta_schedule``, or for numbers that are no noise schedule.
    """
    defaults = GAUSSIAN.get(scheduler.get("_class_name", ""), GAUSSIAN["DDPMScheduler"])
    count = read_count(scheduler)
    name = scheduler.get("beta_schedule", defaults.beta_schedule)
    if defaults.schedules == ("squaredcos_cap_v2",):
        name = "squaredcos_cap_v2"
    if scheduler.get("trained_betas") is not None:
        betas = read_trained_betas(scheduler["trained_betas"], count)
    elif name not in defaults.schedules:
        raise InputError(
            f"the base's scheduler: beta_schedule {str(name)[:80]!r} is not one of "
            f"{', '.join(defaults.schedules)}"
        )
    elif name == "squaredcos_cap_v2":
        betas = make_cosine_betas(count)
    else:
        first = read_number(scheduler, "beta_start", defaults.beta_start)
        last = read_number(scheduler, "beta_end", defaults.beta_end)
        if not 0 < first < last < 1:
            raise InputError(
                f"the base's scheduler: beta_start is {first} and beta_end {last}; 0 < beta_start "
                "< beta_end < 1 is expected. Fetch or save the model again."
            )
        betas = spread_betas(name, first, last, count)
    if scheduler.get("rescale_betas_zero_snr"):
        return rescale_to_zero_terminal_snr(betas)
    return betas


def read_count(scheduler: Plain) -> int:
    """Return ``num_train_timesteps``.

    Raises:
        InputError: when it is no whole number from 2 to ``MAX_TIMESTEPS``.
    """
    count = scheduler.get("num_train_timesteps", 1000)
    if type(count) is not int or not 2 <= count <= MAX_TIMESTEPS:
        raise InputError(
            f"the base's scheduler: num_train_timesteps is {str(count)[:80]!r}, a whole number "
            f"from 2 to {MAX_TIMESTEPS} is expected. Fetch or save the model again."
        )
    return count


def read_number(scheduler: Plain, name: str, default: float) -> float:
    """Return a number of a config.

    Raises:
        InputError: when it is none, or not finite.
    """
    value = scheduler.get(name, default)
    # Neither NaN nor a whole number that no float holds is within.
    if type(value) not in (int, float) or not -1e30 < value < 1e30:
        raise InputError(
            f"the base's scheduler: {name} is {str(value)[:80]!r}, a number is expected. Fetch or "
            "save the model again."
        )
    return float(value)


def read_trained_betas(values: Any, count: int) -> np.ndarray:
    """Return the betas that a config lists, float64 [count].

    Raises:
        InputError: when they are not so many numbers between 0 and 1.
    """
    is_list = isinstance(values, list | tuple) and len(values) == count
    if not is_list or not all(type(one) in (int, float) and 0 < one < 1 for one in values):
        raise InputError(
            f"the base's scheduler: trained_betas are not num_train_timesteps ({count}) numbers "
            "between 0 and 1. Fetch or save the model again."
        )
    return np.asarray(values, np.float64)


def spread_betas(name: str, first: float, last: float, count: int) -> np.ndarray:
    """Return betas from the first to the last, float64 [count], by the schedule of that name."""
    if name == "linear":
        return np.linspace(first, last, count)
    if name == "scaled_linear":
        spread: np.ndarray = np.linspace(first**0.5, last**0.5, count) ** 2
        return spread
    # "sigmoid"
    return np.asarray(1 / (1 + np.exp(-np.linspace(-6, 6, count))) * (last - first) + first)


def make_cosine_betas(count: int) -> np.ndarray:
    """Return the betas of the cosine schedule: equation 17 of arXiv:2102.09672, capped at 0.999."""
    alphas_bar = [
        math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)
    ]
    return np.array(
        [min(1 - later / earlier, 0.999) for earlier, later in itertools.pairwise(alphas_bar)]
    )


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Make the last timestep pure noise: algorithm 1 of arXiv:2305.08891.

    sqrt(alpha_bar) is shifted to 0 at the last timestep, and scaled to be the same at the first.
    """
    sqrt_alphas_bar = np.sqrt(np.cumprod(1.0 - betas))
    first = sqrt_alphas_bar[0]
    last = sqrt_alphas_bar[-1]
    alphas_bar = ((sqrt_alphas_bar - last) * first / (first - last)) ** 2
    return 1.0 - np.concatenate([alphas_bar[:1], alphas_bar[1:] / alphas_bar[:-1]])
