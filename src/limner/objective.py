"""What the network is asked to predict, as numbers per example, computed on the host in float64.

Every Gaussian diffusion objective is linear in the clean signal x0 and the noise e:

    input = a * x0 + s * e        target = p * x0 + q * e        loss = w * mean((prediction -
    target) ** 2)

so that schedule, prediction type and weighting are all decided here, and an engine only multiplies
and adds. Equal to diffusers' DDPMScheduler and to Min-SNR, timestep bias and DREAM of its training
scripts, by test.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from limner import config
from limner.faults import InputFault

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noising:
    """The numbers of a batch, each of shape [batch]: ``t`` (int64) is what the network is told, the
    others are float32.

    ``d`` is DREAM's lambda, ``sqrt(1 - alpha_bar) ** detail_preservation``; 0 where DREAM is off.
    """

    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    p: np.ndarray
    q: np.ndarray
    w: np.ndarray
    d: np.ndarray


@dataclass(frozen=True)
class Objective:
    """A discrete-time objective on a noise schedule of ``len(alphas_bar)`` timesteps."""

    alphas_bar: np.ndarray = field(repr=False)
    predict: str = "epsilon"
    min_snr: float | None = None
    dream: float | None = None
    weights: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of(cls, scheduler: dict[str, Any], wanted: config.Objective) -> "Objective":
        """The objective of a base's ``scheduler_config.json``, with what the recipe overrides.

        Raises:
            InputFault: for a beta schedule or prediction type that is unknown, or DREAM with
                anything but epsilon.
        """
        predict = wanted.predict or scheduler.get("prediction_type", "epsilon")
        if predict not in PREDICTIONS:
            raise InputFault(
                f"objective.predict: {predict!r} is not one of {', '.join(PREDICTIONS)}"
            )
        if wanted.dream is not None and predict != "epsilon":
            raise InputFault(
                "objective.dream: DREAM is defined for epsilon prediction, this run predicts "
                f"{predict}. Leave objective.dream out."
            )
        bar = np.cumprod(1.0 - betas(scheduler))
        return cls(bar, predict, wanted.min_snr, wanted.dream, bias(wanted.timestep_bias, len(bar)))

    def at(self, u: np.ndarray) -> Noising:
        """Noise levels for uniform numbers ``u`` in [0, 1), shape [batch].

        Min-SNR weights are equations 5 and 6 of arXiv:2303.09556: min(SNR, gamma) / SNR for
        epsilon, / (SNR + 1) for v, * 1 for x0; at zero SNR the epsilon weight is its limit, 1.
        """
        t = self.timesteps(np.asarray(u, np.float64))
        bar = self.alphas_bar[t]
        a, s = np.sqrt(bar), np.sqrt(1.0 - bar)
        p, q = {
            "epsilon": (0 * a, 0 * s + 1),
            "v_prediction": (-s, a),
            "sample": (0 * a + 1, 0 * s),
        }[self.predict]
        w = np.ones_like(a)
        if self.min_snr is not None:
            snr = bar / (1.0 - bar)
            capped = np.minimum(snr, self.min_snr)
            w = {
                "epsilon": capped / np.where(snr > 0, snr, 1.0) + (snr == 0),
                "v_prediction": capped / (snr + 1.0),
                "sample": capped,
            }[self.predict]
        d = np.zeros_like(s) if self.dream is None else s**self.dream
        return Noising(t, *(np.asarray(x, np.float32) for x in (a, s, p, q, w, d)))

    def timesteps(self, u: np.ndarray) -> np.ndarray:
        """Uniform over the timesteps, or distributed as ``weights`` (the inverse of their
        cumulative sum)."""
        count = len(self.alphas_bar)
        if self.weights is None:
            return np.minimum((u * count).astype(np.int64), count - 1)
        return np.minimum(
            np.searchsorted(np.cumsum(self.weights), u, side="right"), count - 1
        ).astype(np.int64)


def betas(scheduler: dict[str, Any]) -> np.ndarray:
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
        raise InputFault(
            f"the base's scheduler: beta_schedule {name!r} is not one of linear, scaled_linear, "
            "squaredcos_cap_v2, sigmoid"
        )
    return zero_terminal_snr(out) if scheduler.get("rescale_betas_zero_snr") else out


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alpha_bar) so that the last timestep is pure noise: algorithm 1 of
    arXiv:2305.08891."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1.0 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def bias(wanted: config.TimestepBias | None, count: int) -> np.ndarray | None:
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
        raise InputFault(
            f"objective.timestep_bias: timesteps {first} to {last} are not within 0 to {count}"
        )
    if wanted.multiplier <= 0:
        raise InputFault(f"objective.timestep_bias.multiplier: {wanted.multiplier} is not above 0")
    weights = np.ones(count)
    weights[first:last] *= wanted.multiplier
    return weights / weights.sum()
