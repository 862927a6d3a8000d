"""Deterministic samplers as tables of coefficients.

A deterministic sampler gives the network, at each step, a weighted sum of the starting noise and of
all outputs so far. Row k of a table holds the weights of step k: the first for the starting noise
(unit variance), the others for the outputs of steps 0, 1, ...; the last row is the finished sample.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from limner.diffusion.noise_schedule import make_betas
from limner.diffusion.sampler_algorithms import (
    SamplerSchedule,
    sample_ddim,
    sample_dpm_solver,
    sample_euler,
    sample_pndm,
    sample_unipc,
)
from limner.errors import InputError

SAMPLERS = {
    "ddim": sample_ddim,
    "dpm++": sample_dpm_solver,
    "euler": sample_euler,
    "pndm": sample_pndm,
    "unipc": sample_unipc,
}
SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
    "DDPMScheduler": "ddim",
}
SIGMA_SETTINGS = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
}
# The only values that the samplers are written for; each one is the scheduler's default.
SUPPORTED_SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"thresholding": False},
    "pndm": {"skip_prk_steps": True},
    "euler": {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "use_karras_sigmas": False,
        **SIGMA_SETTINGS,
    },
    "dpm++": {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "lower_order_final": True,
        "use_lu_lambdas": False,
        **SIGMA_SETTINGS,
        "solver_order": 2,
    },
    "unipc": {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "lower_order_final": True,
        "use_karras_sigmas": False,
        **SIGMA_SETTINGS,
        "solver_order": 2,
    },
}


@dataclass(frozen=True)
class SamplerTable:
    """The steps of a sampler, float32."""

    timesteps: np.ndarray  # [n], the network's argument
    coefficients: np.ndarray  # [n + 1, n + 1], of the noise and of the outputs


def make_table(
    config: dict[str, Any], steps: int, name: str | None = None, predict: str | None = None
) -> SamplerTable:
    """Return the table of a sampler on the noise schedule of a ``scheduler_config.json``.

    Args:
        name: one of ``SAMPLERS``; None: the one of the config, DDIM in the place of DDPM.
        predict: the prediction type; None: the one of the config.

    Raises:
        InputError: for a sampler or a setting without a table.
    """
    schedule, sampler = make_sampler_schedule(config, name, predict)
    # PNDM calls the network twice at its second timestep.
    calls = steps + 1 if sampler == "pndm" and steps > 1 else steps
    # Unit vectors take the place of the noise and of the outputs: all that the sampler computes
    # from them are rows of weights.
    unit_vectors = np.eye(calls + 1)
    inputs: list[np.ndarray] = []
    timesteps: list[float] = []

    def record_call(x: np.ndarray, timestep: float) -> np.ndarray:
        inputs.append(x)
        timesteps.append(timestep)
        return unit_vectors[len(inputs)]

    sample = SAMPLERS[sampler](schedule, steps, unit_vectors[0], record_call)
    return SamplerTable(np.array(timesteps, np.float32), np.array([*inputs, sample], np.float32))


def make_sampler_schedule(
    config: dict[str, Any], name: str | None, predict: str | None
) -> tuple[SamplerSchedule, str]:
    """Return the noise schedule and the sampler's name; arguments are those of ``make_table``."""
    class_name = config.get("_class_name")
    sampler_of_config = SAMPLER_OF_CLASS.get(class_name or "", "")
    sampler = name or sampler_of_config
    if sampler not in SAMPLERS:
        raise InputError(
            f"scheduler: {name or class_name!r} has no table here; choose one of "
            f"{', '.join(SAMPLERS)}"
        )
    if name is not None:
        # The PyTorch engine sets the same for a sampler that is chosen by name.
        config = config | {"use_karras_sigmas": sampler == "dpm++", "set_alpha_to_one": False}
    if sampler == sampler_of_config:
        check_settings(config, sampler)
    alphas_bar = make_sampler_alphas_bar(config, sampler)
    predict = predict or config.get("prediction_type", "epsilon")
    return SamplerSchedule(alphas_bar, predict, config), sampler


def check_settings(config: dict[str, Any], sampler: str) -> None:
    """Refuse settings of a scheduler that its sampler is not written for."""
    unsupported = [
        f"{key} is {config[key]!r}"
        for key, supported in SUPPORTED_SETTINGS[sampler].items()
        if config.get(key, supported) != supported
    ]
    if unsupported:
        raise InputError(
            f"scheduler: of {sampler} with {', '.join(unsupported)} there is no table here; choose "
            f"one of {', '.join(SAMPLERS)} by name, or --engine torch"
        )


def make_sampler_alphas_bar(config: dict[str, Any], sampler: str) -> np.ndarray:
    """Return the alphas_bar of a scheduler config as diffusers' scheduler makes them."""
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if zero_snr and sampler == "pndm":
        # diffusers' PNDMScheduler has no such setting.
        config = config | {"rescale_betas_zero_snr": False}
        zero_snr = False
    alphas_bar = np.cumprod(1 - make_betas(config))
    if zero_snr and sampler != "ddim":
        # As in those schedulers: at no signal at all sigma would be infinite.
        alphas_bar[-1] = 2**-24
    return alphas_bar
