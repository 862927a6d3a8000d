"""The noise schedule of a diffusers scheduler config."""

import itertools
import math
from typing import Any

import numpy as np

from limner.errors import InputError


def make_betas(scheduler: dict[str, Any]) -> np.ndarray:
    """Return the betas of a ``scheduler_config.json``, float64 [timesteps].

    Raises:
        InputError: for an unknown ``beta_schedule``.
    """
    count = scheduler.get("num_train_timesteps", 1000)
    first = scheduler.get("beta_start", 0.0001)
    last = scheduler.get("beta_end", 0.02)
    name = scheduler.get("beta_schedule", "linear")
    # diffusers' UnCLIPScheduler has this schedule only, and writes no name of it.
    if scheduler.get("_class_name") == "UnCLIPScheduler":
        name = "squaredcos_cap_v2"
    if scheduler.get("trained_betas") is not None:
        betas = np.asarray(scheduler["trained_betas"], np.float64)
    elif name == "linear":
        betas = np.linspace(first, last, count)
    elif name == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, count) ** 2
    elif name == "squaredcos_cap_v2":
        betas = make_cosine_betas(count)
    elif name == "sigmoid":
        betas = 1 / (1 + np.exp(-np.linspace(-6, 6, count))) * (last - first) + first
    else:
        raise InputError(
            f"the base's scheduler: beta_schedule {name!r} is not one of linear, scaled_linear, "
            "squaredcos_cap_v2, sigmoid"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        return rescale_to_zero_terminal_snr(betas)
    return betas


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
