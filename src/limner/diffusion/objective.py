"""What the network is asked to predict, as numbers per example, computed on the host in float64.

Every Gaussian diffusion objective is linear in the clean signal x0 and the noise e:

    input = a * x0 + s * e        target = p * x0 + q * e        loss = w * mean((prediction -
    target) ** 2)

so that schedule, prediction type and weighting are all decided here, and an engine only multiplies
and adds. Equal to diffusers' DDPMScheduler and to Min-SNR, timestep bias and DREAM of its training
scripts, by test.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limner.config.schema import ObjectiveSettings, TimestepBiasSettings
from limner.diffusion.noise_schedule import make_betas
from limner.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class NoiseLevels:
    """The numbers of a batch, each of shape [batch]: ``t`` (int64) is what the network is told, the
    others are float32.

    ``d`` is DREAM's lambda, ``sqrt(1 - alpha_bar) ** detail_preservation``; 0 where DREAM is off.
    """

    timestep: np.ndarray
    signal_in: np.ndarray
    noise_in: np.ndarray
    signal_target: np.ndarray
    noise_target: np.ndarray
    weight: np.ndarray
    dream: np.ndarray


@dataclass(frozen=True)
class Objective:
    """A discrete-time objective on a noise schedule of ``len(alphas_bar)`` timesteps."""

    alphas_bar: np.ndarray = field(repr=False)
    prediction_type: str = "epsilon"
    min_snr: float | None = None
    dream: float | None = None
    probabilities: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def from_scheduler(cls, scheduler: dict[str, Any], wanted: ObjectiveSettings) -> "Objective":
        """The objective of a base's ``scheduler_config.json``, with what the recipe overrides.

        Raises:
            InputError: for a beta schedule or prediction type that is unknown, or DREAM with
                anything but epsilon.
        """
        predict = wanted.predict or scheduler.get("prediction_type", "epsilon")
        if predict not in PREDICTION_TYPES:
            raise InputError(
                f"objective.predict: {predict!r} is not one of {', '.join(PREDICTION_TYPES)}"
            )
        if wanted.dream is not None and predict != "epsilon":
            raise InputError(
                "objective.dream: DREAM is defined for epsilon prediction, this run predicts "
                f"{predict}. Leave objective.dream out."
            )
        bar = np.cumprod(1.0 - make_betas(scheduler))
        return cls(
            bar,
            predict,
            wanted.min_snr,
            wanted.dream,
            bias_timesteps(wanted.timestep_bias, len(bar)),
        )

    def at(self, u: np.ndarray) -> NoiseLevels:
        """Noise levels for uniform numbers ``u`` in [0, 1), shape [batch].

        Min-SNR weights are equations 5 and 6 of arXiv:2303.09556: min(SNR, gamma) / SNR for
        epsilon, / (SNR + 1) for v, * 1 for x0; at zero SNR the epsilon weight is its limit, 1.
        """
        t = self.to_timesteps(np.asarray(u, np.float64))
        bar = self.alphas_bar[t]
        a, s = np.sqrt(bar), np.sqrt(1.0 - bar)
        p, q = {
            "epsilon": (0 * a, 0 * s + 1),
            "v_prediction": (-s, a),
            "sample": (0 * a + 1, 0 * s),
        }[self.prediction_type]
        w = np.ones_like(a)
        if self.min_snr is not None:
            snr = bar / (1.0 - bar)
            capped = np.minimum(snr, self.min_snr)
            w = {
                "epsilon": capped / np.where(snr > 0, snr, 1.0) + (snr == 0),
                "v_prediction": capped / (snr + 1.0),
                "sample": capped,
            }[self.prediction_type]
        d = np.zeros_like(s) if self.dream is None else s**self.dream
        return NoiseLevels(t, *(np.asarray(x, np.float32) for x in (a, s, p, q, w, d)))

    def to_timesteps(self, u: np.ndarray) -> np.ndarray:
        """Uniform over the timesteps, or distributed as ``weights`` (the inverse of their
        cumulative sum)."""
        count = len(self.alphas_bar)
        if self.probabilities is None:
            return np.minimum((u * count).astype(np.int64), count - 1)
        return np.minimum(
            np.searchsorted(np.cumsum(self.probabilities), u, side="right"), count - 1
        ).astype(np.int64)


def bias_timesteps(wanted: TimestepBiasSettings | None, count: int) -> np.ndarray | None:
    """Probabilities of the timesteps: those of the chosen part weigh ``multiplier`` times the
    others. Shape [count], sum 1."""
    if wanted is None:
        return None
    chosen = int(wanted.portion * count)
    first, last = {
        "later": (count - chosen, count),
        "earlier": (0, chosen),
        "range": (wanted.begin, wanted.end),
    }[wanted.strategy]
    if not 0 <= first <= last <= count:
        raise InputError(
            f"objective.timestep_bias: timesteps {first} to {last} are not within 0 to {count}"
        )
    if wanted.multiplier <= 0:
        raise InputError(f"objective.timestep_bias.multiplier: {wanted.multiplier} is not above 0")
    weights = np.ones(count)
    weights[first:last] *= wanted.multiplier
    return weights / weights.sum()
