"""Rectified flow (arXiv:2209.03003), with the densities and the shift of arXiv:2403.03206.

A straight line leads from the clean signal to the noise, and the network learns its direction:

    input = (1 - sigma) * x0 + sigma * e
    target = e - x0

Equal to diffusers' FlowMatchEulerDiscreteScheduler and the densities of its training scripts, by
test.
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from limner.config.schema import FlowSettings, ObjectiveSettings
from limner.diffusion.noise_schedule import read_count, read_number
from limner.diffusion.objective import NoiseLevels
from limner.errors import InputError

# Settings of diffusers' scheduler that move the sigmas of training, and what is served.
SERVED = {"use_dynamic_shifting": False, "invert_sigmas": False}

LARGEST_MODE_SCALE = 2 / (math.pi - 2)


@dataclass(frozen=True)
class FlowObjective:
    """Rectified flow with a constant shift.

    Args:
        table: diffusers' sigmas, from much noise to little, float64 [timesteps]; None: every sigma
            between 0 and 1 can come.
    """

    settings: FlowSettings
    shift: float
    timesteps: int  # of the scheduler; the network sees sigma times their number
    table: np.ndarray | None = field(default=None, repr=False)
    prediction_type = None

    @classmethod
    def from_scheduler(
        cls, scheduler: dict[str, Any], settings: ObjectiveSettings
    ) -> "FlowObjective":
        """Make the objective of a base's ``scheduler_config.json`` and a recipe's settings.

        Raises:
            InputError: for a scheduler with other sigmas than these, or for settings of Gaussian
                diffusion.
        """
        for name, served in SERVED.items():
            if scheduler.get(name, served) != served:
                raise InputError(
                    f"the base's scheduler: {name} is {str(scheduler[name])[:80]}, {served} is "
                    "what Limner trains with; choose another base"
                )
        meaningless = [
            f"objective.{name}: it means nothing to flow matching, with which the base was "
            f"trained. Leave objective.{name} out."
            for name in ("predict", "min_snr", "dream", "timestep_bias")
            if getattr(settings, name) is not None
        ]
        if meaningless:
            raise InputError("\n".join(meaningless))
        flow = settings.flow or FlowSettings()
        if not -1 <= flow.mode_scale <= LARGEST_MODE_SCALE:
            raise InputError(
                f"objective.flow.mode_scale: {flow.mode_scale} is not within -1 to "
                f"{LARGEST_MODE_SCALE:.4f}, where its density has an inverse"
            )
        shift, count = read_number(scheduler, "shift", 1.0), read_count(scheduler)
        if shift <= 0:
            raise InputError(
                f"the base's scheduler: shift is {shift}, a number above 0 is expected. Fetch or "
                "save the model again."
            )
        if flow.shift is not None:
            shift = flow.shift
        table = None
        if flow.sigmas == "table":
            table = shift_sigmas(np.arange(count, 0, -1) / count, shift)
        return cls(flow, shift, count, table)

    def at(self, u: np.ndarray, latent_shape: tuple[int, ...]) -> NoiseLevels:
        """See ``objective.Objective``; the shift is the same for latents of every shape."""
        place = draw_place(np.asarray(u, np.float64), self.settings)
        if self.table is None:
            sigma = shift_sigmas(1 - place, self.shift)
        else:
            # Rounding can carry the largest number past the last sigma.
            rows = np.minimum((place * len(self.table)).astype(np.int64), len(self.table) - 1)
            sigma = self.table[rows]
        ones = np.ones(len(sigma), np.float32)
        return NoiseLevels(
            timestep=(sigma * self.timesteps).astype(np.float32),
            signal_in=(1 - sigma).astype(np.float32),
            noise_in=sigma.astype(np.float32),
            signal_target=-ones,
            noise_target=ones,
            weight=ones,
            dream=np.zeros_like(ones),
        )


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move sigmas towards more noise: equation 23 of arXiv:2403.03206."""
    shifted: np.ndarray = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted


def draw_place(u: np.ndarray, settings: FlowSettings) -> np.ndarray:
    """Return where on the way from noise to signal examples lie, in [0, 1], before the shift.

    The inverse of a cumulative distribution, so that one uniform number is one place: section 3.1
    of arXiv:2403.03206.

    Args:
        u: uniform numbers in [0, 1).
    """
    if settings.density == "logit_normal":
        # The normal distribution has no quantile at 0; u is a multiple of 2 ** -53.
        quantile = NormalDist(settings.logit_mean, settings.logit_std).inv_cdf
        logits = np.array([quantile(max(float(one), 2.0**-54)) for one in u])
        return np.asarray(1 / (1 + np.exp(-logits)))
    if settings.density == "mode":
        heavy = np.cos(np.pi / 2 * u) ** 2 - 1 + u
        return np.asarray(1 - u - settings.mode_scale * heavy)
    return u
