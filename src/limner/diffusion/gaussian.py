"""Gaussian diffusion on a discrete noise schedule.

Equal to diffusers' DDPMScheduler and to Min-SNR, timestep bias and DREAM of its training scripts,
by test.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limner.config.schema import ObjectiveSettings, TimestepBiasSettings
from limner.diffusion.noise_schedule import make_betas
from limner.diffusion.objective import NoiseLevels
from limner.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class GaussianObjective:
    """A discrete-time objective on a noise schedule of ``len(alphas_bar)`` timesteps."""

    alphas_bar: np.ndarray = field(repr=False)
    prediction_type: str = "epsilon"
    min_snr: float | None = None  # gamma
    dream: float | None = None  # detail preservation
    probabilities: np.ndarray | None = field(default=None, repr=False)  # None: all are equal

    @classmethod
    def from_scheduler(
        cls, scheduler: dict[str, Any], settings: ObjectiveSettings
    ) -> "GaussianObjective":
        """Make the objective of a base's ``scheduler_config.json`` and a recipe's settings.

        Raises:
            InputError: for an unknown beta schedule or prediction type, or for DREAM with anything
                but epsilon.
        """
        predict = settings.predict or scheduler.get("prediction_type", "epsilon")
        if predict not in PREDICTION_TYPES:
            whose = "objective.predict" if settings.predict else "the base's scheduler"
            raise InputError(
                f"{whose}: {str(predict)[:80]!r} is not one of {', '.join(PREDICTION_TYPES)}"
            )
        if settings.dream is not None and predict != "epsilon":
            raise InputError(
                "objective.dream: DREAM is defined for epsilon prediction, this run predicts "
                f"{predict}. Leave objective.dream out."
            )
        alphas_bar = np.cumprod(1.0 - make_betas(scheduler))
        probabilities = bias_timesteps(settings.timestep_bias, len(alphas_bar))
        return cls(alphas_bar, predict, settings.min_snr, settings.dream, probabilities)

    def at(self, u: np.ndarray, latent_shape: tuple[int, ...]) -> NoiseLevels:
        """See ``objective.Objective``; the same for latents of every shape."""
        timestep = self.to_timesteps(np.asarray(u, np.float64))
        alpha_bar = self.alphas_bar[timestep]
        a = np.sqrt(alpha_bar)
        s = np.sqrt(1.0 - alpha_bar)
        zeros = np.zeros_like(a)
        ones = np.ones_like(a)
        p, q = {
            "epsilon": (zeros, ones),
            "v_prediction": (-s, a),
            "sample": (ones, zeros),
        }[self.prediction_type]
        return NoiseLevels(
            timestep=timestep.astype(np.float32),
            signal_in=a.astype(np.float32),
            noise_in=s.astype(np.float32),
            signal_target=p.astype(np.float32),
            noise_target=q.astype(np.float32),
            weight=self.weigh_by_snr(alpha_bar).astype(np.float32),
            dream=(zeros if self.dream is None else s**self.dream).astype(np.float32),
        )

    def weigh_by_snr(self, alpha_bar: np.ndarray) -> np.ndarray:
        """Return the Min-SNR weights of the loss, or ones: equations 5 and 6 of arXiv:2303.09556.

        They are min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and * 1 for x0.
        """
        if self.min_snr is None:
            return np.ones_like(alpha_bar)
        snr = alpha_bar / (1.0 - alpha_bar)
        capped = np.minimum(snr, self.min_snr)
        if self.prediction_type == "v_prediction":
            return capped / (snr + 1.0)
        if self.prediction_type == "sample":
            return capped
        # At zero SNR the weight of epsilon is its limit, 1.
        return capped / np.where(snr > 0, snr, 1.0) + (snr == 0)

    def to_timesteps(self, u: np.ndarray) -> np.ndarray:
        """Return timesteps, int64, for uniform numbers, by the inverse cumulative distribution."""
        count = len(self.alphas_bar)
        if self.probabilities is None:
            timesteps = (u * count).astype(np.int64)
        else:
            timesteps = np.searchsorted(np.cumsum(self.probabilities), u, side="right")
        # Rounding can carry the largest u past the last timestep.
        return np.minimum(timesteps, count - 1).astype(np.int64)


def bias_timesteps(bias: TimestepBiasSettings | None, count: int) -> np.ndarray | None:
    """Return the probability of each timestep, shape [count]; None where all are equal.

    The chosen timesteps are ``multiplier`` times as probable as the others.
    """
    if bias is None:
        return None
    chosen = int(bias.portion * count)
    first, last = {
        "later": (count - chosen, count),
        "earlier": (0, chosen),
        "range": (bias.begin, bias.end),
    }[bias.strategy]
    if not 0 <= first <= last <= count:
        raise InputError(
            f"objective.timestep_bias: timesteps {first} to {last} are not within 0 to {count}"
        )
    if bias.multiplier <= 0:
        raise InputError(f"objective.timestep_bias.multiplier: {bias.multiplier} is not above 0")
    weights = np.ones(count)
    weights[first:last] *= bias.multiplier
    return weights / weights.sum()
