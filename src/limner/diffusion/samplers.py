"""Deterministic samplers as tables of coefficients.

A deterministic sampler gives the network, at each step, a weighted sum of the starting noise and of
all outputs so far. Row k of a table holds the weights of step k: the first for the starting noise
(unit variance), the others for the outputs of steps 0, 1, ...; the last row is the finished sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from limner.diffusion.base_schedulers import GAUSSIAN
from limner.diffusion.noise_schedule import make_betas
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.diffusion.sampler_algorithms import (
    SamplerSchedule,
    sample_ddim,
    sample_dpm_solver,
    sample_euler,
    sample_pndm,
    sample_unipc,
)
from limner.diffusion.sampler_settings import CHOICES, read_whole_number, settle_settings
from limner.errors import InputError
from limner.json_types import Plain

SAMPLERS = {
    "DDIMScheduler": sample_ddim,
    "DPMSolverMultistepScheduler": sample_dpm_solver,
    "EulerDiscreteScheduler": sample_euler,
    "PNDMScheduler": sample_pndm,
    "UniPCMultistepScheduler": sample_unipc,
}

# Classes whose timesteps are leading where their config does not say; those of all others are
# evenly spaced from end to end.
LEADING = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
)
# Classes that space one timestep more than they take, unless they are trailing.
ONE_MORE = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


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
        name: of a scheduler; None: the one of the config.
        predict: the prediction type; None: the one of the config.

    Raises:
        InputError: for a sampler, a setting or a number of steps without a table.
    """
    if predict is not None:
        config = adapt_scheduler(config, str(config.get("_class_name")), predict)
    settings = settle_settings(config, name)
    sampler = settings["_class_name"]
    schedule = SamplerSchedule(
        make_sampler_alphas_bar(settings), settings["prediction_type"], settings
    )
    check_steps(steps, sampler, settings)
    # PNDM calls the network twice at its second timestep.
    calls = steps + 1 if sampler == "PNDMScheduler" and steps > 1 else steps
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


def check_steps(
    steps: int, class_name: str, config: Mapping[str, Any], name: str = "steps"
) -> None:
    """Refuse steps that are no timesteps of the noise schedule, with which stock schedulers end in
    an error or in numbers that are not finite. A flow has no end of them.

    Args:
        config: of the scheduler, as the pipeline takes it.
        name: of the setting in the message.

    Raises:
        InputError: saying how many there may be.
    """
    if class_name not in GAUSSIAN or class_name == "UnCLIPScheduler":
        return
    count = read_whole_number(config, "num_train_timesteps", 1000)
    offset = read_whole_number(config, "steps_offset", 0)
    spacing = config.get("timestep_spacing", "leading" if class_name in LEADING else "linspace")
    spaced = steps + 1 if class_name in ONE_MORE and spacing != "trailing" else steps
    # Leading timesteps are multiples of a whole number, and begin at the offset.
    first = offset if spacing == "leading" else 0
    if spaced > count or (first and (spaced - 1) * (count // spaced) + first >= count):
        raise InputError(
            f"{name}: {steps} are more than the scheduler's {count} timesteps, of which the first "
            f"is {first}; take fewer"
        )


def check_drawing(scheduler: Plain) -> None:
    """Refuse a scheduler of Gaussian diffusion with which a stock pipeline draws nothing.

    Raises:
        InputError: for betas that are no noise schedule, or a setting of an unknown value.
    """
    if scheduler.get("_class_name") not in GAUSSIAN:
        return
    make_betas(scheduler)
    for name, values in CHOICES.items():
        if name in scheduler and scheduler[name] not in values:
            raise InputError(
                f"the base's scheduler: {name} is {str(scheduler[name])[:80]!r}, one of "
                f"{', '.join(values)} is expected. Fetch or save the model again."
            )


def make_sampler_alphas_bar(settings: dict[str, Any]) -> np.ndarray:
    """Return the alphas_bar of a scheduler's settings as diffusers' scheduler makes them."""
    sampler = settings["_class_name"]
    zero_snr = bool(settings.get("rescale_betas_zero_snr"))
    if zero_snr and sampler == "PNDMScheduler":
        # diffusers' PNDMScheduler has no such setting.
        settings = settings | {"rescale_betas_zero_snr": False}
        zero_snr = False
    alphas_bar = np.cumprod(1 - make_betas(settings))
    if zero_snr and sampler != "DDIMScheduler":
        # As in those schedulers: at no signal at all sigma would be infinite.
        alphas_bar[-1] = 2**-24
    return alphas_bar
