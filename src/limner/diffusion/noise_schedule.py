"""The noise schedule of a diffusers scheduler config."""

import itertools
import math
from typing import Any

import numpy as np

from limner.errors import InputError


def make_betas(scheduler: dict[str, Any]) -> np.ndarray:
    """The noise schedule that a diffusers scheduler config describes, in float64: shape
    [timesteps]."""
    count = scheduler.get("num_train_timesteps", 1000)
    first, last = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    name = (
        "squaredcos_cap_v2"
        if scheduler.get("_class_name") == "UnCLIPScheduler"
        else scheduler.get("beta_schedule", "linear")
    )  # it has no other
    if scheduler.get("trained_betas") is not None:
        out = np.asarray(scheduler["trained_betas"], np.float64)
    elif name == "linear":
        out = np.linspace(first, last, count)
    elif name == "scaled_linear":
        out = np.linspace(first**0.5, last**0.5, count) ** 2
    elif name == "squaredcos_cap_v2":  # equation 17 of arXiv:2102.09672
        bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        out = np.array(
            [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)]
        )
    elif name == "sigmoid":
        out = 1 / (1 + np.exp(-np.linspace(-6, 6, count))) * (last - first) + first
    else:
        raise InputError(
            f"the base's scheduler: beta_schedule {name!r} is not one of linear, scaled_linear, "
            "squaredcos_cap_v2, sigmoid"
        )
    return rescale_to_zero_terminal_snr(out) if scheduler.get("rescale_betas_zero_snr") else out


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last timestep is pure noise: algorithm 1 of
    arXiv:2305.08891."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
