"""Deterministic samplers in ordinary arithmetic, float64.

Each one takes a noise schedule, the number of steps, the starting noise (unit variance) and the
network, and returns the finished sample. Equal to diffusers' schedulers, by test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# The network: its input and the timestep -> its output.
Model = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class SamplerSchedule:
    """A noise schedule, and what the network predicts on it."""

    alphas_bar: np.ndarray  # cumulative product of alphas, float64
    prediction_type: str
    config: dict[str, Any]  # all settings; see ``sampler_settings``

    @property
    def sigmas(self) -> np.ndarray:
        """Noise over signal at each timestep."""
        return np.sqrt((1 - self.alphas_bar) / self.alphas_bar)

    def predict_clean(self, x: np.ndarray, output: np.ndarray, a: float, s: float) -> np.ndarray:
        """Return the clean signal by the network's output, for x = a * clean + s * noise."""
        if self.prediction_type == "epsilon":
            return (x - s * output) / a
        if self.prediction_type == "v_prediction":
            return a * x - s * output
        if self.prediction_type == "sample":
            return output
        raise KeyError(self.prediction_type)

    def alpha_bar_after_step(self, timestep: int) -> float:
        """Return alpha_bar where a step ends; the last step ends below timestep 0."""
        if timestep >= 0:
            return self.alphas_bar[timestep]
        if self.config["set_alpha_to_one"]:
            return 1.0
        return self.alphas_bar[0]

    def space_timesteps(self, steps: int) -> np.ndarray:
        """Return timesteps from noisy to clean: table 2 of arXiv:2305.08891."""
        count = len(self.alphas_bar)
        spacing = self.config["timestep_spacing"]
        if spacing == "leading":
            timesteps = (np.arange(steps) * (count // steps)).round()[::-1]
            return timesteps + self.config["steps_offset"]
        if spacing == "trailing":
            return np.arange(count, 0, -count / steps).round() - 1
        return np.linspace(0, count - 1, steps).round()[::-1]


def sample_ddim(
    schedule: SamplerSchedule, steps: int, noise: np.ndarray, model: Model
) -> np.ndarray:
    """Run DDIM: equation 12 of arXiv:2010.02502 with eta 0."""
    count = len(schedule.alphas_bar)
    x = noise
    for t in schedule.space_timesteps(steps):
        alpha_bar = schedule.alphas_bar[int(t)]
        next_alpha_bar = schedule.alpha_bar_after_step(int(t) - count // steps)
        a = np.sqrt(alpha_bar)
        s = np.sqrt(1 - alpha_bar)
        clean = schedule.predict_clean(x, model(x, t), a, s)
        x = np.sqrt(next_alpha_bar) * clean + np.sqrt(1 - next_alpha_bar) * (x - a * clean) / s
    return x


# Adams-Bashforth: weights of the newest outputs, by their number.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample_pndm(
    schedule: SamplerSchedule, steps: int, noise: np.ndarray, model: Model
) -> np.ndarray:
    """Run the linear multistep of PNDM (PLMS, arXiv:2202.09778) without Runge-Kutta steps."""
    stride = len(schedule.alphas_bar) // steps
    timesteps = schedule.space_timesteps(steps).astype(int)
    if steps > 1:
        # The second timestep comes twice: from the mean of the first two outputs the first step is
        # taken again.
        timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    outputs: list[np.ndarray] = []
    x = noise
    for i, t in enumerate(timesteps):
        output = model(x, t)
        if i == 1:
            start = t + stride
            x = noise
            mean = (output + outputs[-1]) / 2
        else:
            start = t
            outputs.append(output)
            mean = combine_outputs(outputs)
        end = start - stride
        alpha_bar = schedule.alphas_bar[start]
        next_alpha_bar = schedule.alpha_bar_after_step(end)
        if schedule.prediction_type == "v_prediction":
            mean = np.sqrt(alpha_bar) * mean + np.sqrt(1 - alpha_bar) * x
        # Equation 9.
        scale = alpha_bar * np.sqrt(1 - next_alpha_bar)
        scale += np.sqrt(alpha_bar * (1 - alpha_bar) * next_alpha_bar)
        x = np.sqrt(next_alpha_bar / alpha_bar) * x - (next_alpha_bar - alpha_bar) * mean / scale
    return x


def combine_outputs(outputs: list[np.ndarray]) -> np.ndarray:
    """Return the Adams-Bashforth sum of up to four newest outputs."""
    weights = ADAMS_BASHFORTH[min(len(outputs), 4)]
    return sum(w * output for w, output in zip(weights, reversed(outputs), strict=False))


def sample_euler(
    schedule: SamplerSchedule, steps: int, noise: np.ndarray, model: Model
) -> np.ndarray:
    """Run Euler's method: algorithm 2 of arXiv:2206.00364 without its correction and churn."""
    count = len(schedule.alphas_bar)
    spacing = schedule.config["timestep_spacing"]
    if spacing == "linspace":
        # Not rounded, unlike those of ``space_timesteps``.
        timesteps = np.linspace(0, count - 1, steps)[::-1]
    else:
        timesteps = schedule.space_timesteps(steps)
    sigmas = np.interp(timesteps, np.arange(count), schedule.sigmas)
    if schedule.config["use_karras_sigmas"]:
        sigmas = space_karras_sigmas(sigmas[-1], sigmas[0], steps)
        timesteps = find_timesteps(sigmas, schedule.sigmas)
    sigmas = np.append(sigmas, 0.0)
    # As ``init_noise_sigma`` of diffusers.
    x = noise * (np.sqrt(sigmas[0] ** 2 + 1) if spacing == "leading" else sigmas[0])
    for i, t in enumerate(timesteps):
        sigma = sigmas[i]
        scale = np.sqrt(sigma**2 + 1)
        scaled = x / scale
        clean = schedule.predict_clean(scaled, model(scaled, t), 1 / scale, sigma / scale)
        x = x + (x - clean) / sigma * (sigmas[i + 1] - sigma)
    return x


def space_solver_timesteps(schedule: SamplerSchedule, steps: int) -> np.ndarray:
    """Return timesteps of the multistep solvers, which end one step before the clean sample."""
    count = len(schedule.alphas_bar)
    spacing = schedule.config["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
    if spacing == "leading":
        timesteps = (np.arange(steps + 1) * (count // (steps + 1))).round()[::-1][:-1]
        return timesteps + schedule.config["steps_offset"]
    return np.arange(count, 0, -count / steps).round() - 1


def space_karras_sigmas(low: float, high: float, steps: int) -> np.ndarray:
    """Return noise levels from high to low: equation 5 of arXiv:2206.00364 with rho 7."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def find_timesteps(sigmas: np.ndarray, all_sigmas: np.ndarray) -> np.ndarray:
    """Return the timesteps of noise levels, with fractions."""
    return np.interp(np.log(sigmas), np.log(all_sigmas), np.arange(len(all_sigmas)))


def make_solver_sigmas(schedule: SamplerSchedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return timesteps [n] and sigmas [n + 1] of the multistep solvers."""
    all_sigmas = schedule.sigmas
    if schedule.config["use_karras_sigmas"]:
        sigmas = space_karras_sigmas(all_sigmas[0], all_sigmas[-1], steps)
        timesteps = find_timesteps(sigmas, all_sigmas).round()
    else:
        timesteps = space_solver_timesteps(schedule, steps)
        sigmas = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
    return timesteps, np.append(sigmas, 0.0)


def split_sigma(sigma: float) -> tuple[float, float]:
    """Return signal and noise, of unit variance together, whose ratio is ``sigma``."""
    signal = 1 / np.sqrt(sigma**2 + 1)
    return signal, sigma * signal


def half_log_snr(sigma: float) -> float:
    """Return lambda of arXiv:2211.01095, the log of signal over noise."""
    return np.inf if sigma == 0 else -np.log(sigma)


class SolverStep(NamedTuple):
    """A step of first order: x becomes ``x_factor * x + clean_factor * clean``."""

    h: float  # the step in lambda
    x_factor: float
    clean_factor: float


def make_solver_step(sigma: float, next_sigma: float) -> SolverStep:
    """Return the step of DPM-Solver++ between two noise levels."""
    _, s = split_sigma(sigma)
    next_a, next_s = split_sigma(next_sigma)
    h = half_log_snr(next_sigma) - half_log_snr(sigma)
    return SolverStep(h, next_s / s, -next_a * np.expm1(-h))


def sample_dpm_solver(
    schedule: SamplerSchedule, steps: int, noise: np.ndarray, model: Model
) -> np.ndarray:
    """Run DPM-Solver++(2M), algorithm 2 of arXiv:2211.01095."""
    timesteps, sigmas = make_solver_sigmas(schedule, steps)
    x = noise
    cleans: list[np.ndarray] = []
    for i, t in enumerate(timesteps):
        clean = schedule.predict_clean(x, model(x, t), *split_sigma(sigmas[i]))
        step = make_solver_step(sigmas[i], sigmas[i + 1])
        mean = clean
        # The first step has no earlier output; the last one ends at 0, where lambda is infinite.
        if i > 0 and i != steps - 1:
            r = (half_log_snr(sigmas[i]) - half_log_snr(sigmas[i - 1])) / step.h
            mean = clean + (clean - cleans[-1]) / (2 * r)
        x = step.x_factor * x + step.clean_factor * mean
        cleans.append(clean)
    return x


def sample_unipc(
    schedule: SamplerSchedule, steps: int, noise: np.ndarray, model: Model
) -> np.ndarray:
    """Run UniPC of second order with B(h) = e^h - 1 (arXiv:2302.04867).

    Each output first corrects the step before it.
    """
    timesteps, sigmas = make_solver_sigmas(schedule, steps)
    x = noise
    x_before = x
    order = 0
    cleans: list[np.ndarray] = []
    for i, t in enumerate(timesteps):
        clean = schedule.predict_clean(x, model(x, t), *split_sigma(sigmas[i]))
        if i > 0:
            x = correct_step(x_before, cleans, clean, sigmas[: i + 1], order)
        cleans.append(clean)
        x_before = x
        # First order at both ends: no earlier output is there, or the noise level becomes 0.
        order = min(2, i + 1, steps - i)
        step = make_solver_step(sigmas[i], sigmas[i + 1])
        x = step.x_factor * x + step.clean_factor * clean
        if order == 2:
            r = (half_log_snr(sigmas[i - 1]) - half_log_snr(sigmas[i])) / step.h
            x = x + step.clean_factor * 0.5 * (cleans[-2] - clean) / r
    return x


def correct_step(
    x: np.ndarray, cleans: list[np.ndarray], new_clean: np.ndarray, sigmas: np.ndarray, order: int
) -> np.ndarray:
    """Take the step to ``sigmas[-1]`` again, with the clean signal that was predicted at its end.

    This is UniC of arXiv:2302.04867.

    Args:
        x: the sample at ``sigmas[-2]``.
        cleans: the predictions up to there.
        new_clean: the prediction at ``sigmas[-1]``.
        order: 1 or 2.
    """
    step = make_solver_step(sigmas[-2], sigmas[-1])
    first_order = step.x_factor * x + step.clean_factor * cleans[-1]
    change = new_clean - cleans[-1]
    if order == 1:
        return first_order + step.clean_factor * 0.5 * change
    r = (half_log_snr(sigmas[-3]) - half_log_snr(sigmas[-2])) / step.h
    b = np.expm1(-step.h)
    phi_1 = b / -step.h - 1
    phi_2 = phi_1 / -step.h - 0.5
    rho = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([phi_1 / b, 2 * phi_2 / b]))
    earlier_change = (cleans[-2] - cleans[-1]) / r
    return first_order + step.clean_factor * (rho[0] * earlier_change + rho[1] * change)
