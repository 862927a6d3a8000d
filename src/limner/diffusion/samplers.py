"""Deterministic samplers as tables: what the network is given at each step is a weighted sum of the
starting noise and of all that it has said so far.

Row k of a table has the weights of step k: the first for the starting noise (unit variance), the
others for the network's outputs of steps 0, 1, ...; the last row is the finished sample. Each
sampler is written as ordinary arithmetic on such rows, in float64, and equals diffusers' scheduler
of that name by test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from limner.diffusion.noise_schedule import make_betas
from limner.errors import InputError


@dataclass(frozen=True)
class SamplerTable:
    """``timesteps`` [n], what the network is told; ``weights`` [n + 1, n + 1], of the noise and of
    outputs; both float32."""

    timesteps: np.ndarray
    coefficients: np.ndarray


@dataclass(frozen=True)
class SamplerSchedule:
    """A noise schedule, and what the network predicts on it."""

    alphas_bar: np.ndarray  # cumulative product of alphas, float64
    prediction_type: str
    config: dict[str, Any]

    def predict_clean(self, x: np.ndarray, out: np.ndarray, a: float, s: float) -> np.ndarray:
        """The clean signal that an output means, for x = a * clean + s * noise."""
        return {
            "epsilon": lambda: (x - s * out) / a,
            "v_prediction": lambda: a * x - s * out,
            "sample": lambda: out,
        }[self.prediction_type]()

    def space_timesteps(self, steps: int, usual: str = "leading") -> np.ndarray:
        """Timesteps from noisy to clean, as the scheduler's ``timestep_spacing`` says (table 2 of
        arXiv:2305.08891)."""
        count, kind = len(self.alphas_bar), self.config.get("timestep_spacing", usual)
        if kind == "leading":
            return (np.arange(steps) * (count // steps)).round()[::-1] + self.config.get(
                "steps_offset", 0
            )
        if kind == "trailing":
            return np.arange(count, 0, -count / steps).round() - 1
        return np.linspace(0, count - 1, steps).round()[::-1]


Sampler = Callable[
    [np.ndarray, int], np.ndarray
]  # a row, and the number of the step -> the row of the network's output


def ddim(
    schedule: SamplerSchedule,
    steps: int,
    start: np.ndarray,
    said: Callable[[], np.ndarray],
    give: Callable[[np.ndarray, float], None],
) -> np.ndarray:
    """Equation 12 of arXiv:2010.02502 with eta 0."""
    times, count, x = schedule.space_timesteps(steps), len(schedule.alphas_bar), start
    for t in times:
        before = int(t) - count // steps
        bar, after = (
            schedule.alphas_bar[int(t)],
            schedule.alphas_bar[before]
            if before >= 0
            else 1.0
            if schedule.config.get("set_alpha_to_one", True)
            else schedule.alphas_bar[0],
        )
        a, s = np.sqrt(bar), np.sqrt(1 - bar)
        give(x, t)
        clean = schedule.predict_clean(x, said(), a, s)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * (x - a * clean) / s
    return x


# Adams-Bashforth: weights of the newest outputs, by how many there are.
ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def pndm(
    schedule: SamplerSchedule,
    steps: int,
    start: np.ndarray,
    said: Callable[[], np.ndarray],
    give: Callable[[np.ndarray, float], None],
) -> np.ndarray:
    """Linear multistep (PLMS) of arXiv:2202.09778, without Runge-Kutta steps: the second timestep
    is looked at twice."""
    count, final = (
        len(schedule.alphas_bar),
        1.0 if schedule.config.get("set_alpha_to_one", False) else schedule.alphas_bar[0],
    )
    times = schedule.space_timesteps(steps)[::-1].astype(int)
    order = np.concatenate([times[:-1], times[-2:-1], times[-1:]])[::-1] if steps > 1 else times
    history: list[np.ndarray] = []
    x = kept = start
    for i, t in enumerate(order):
        now, before = t, t - count // steps
        give(x, t)
        out = said()
        if i == 1:
            now, before, mean = t + count // steps, t, (out + history[-1]) / 2
            x = kept
        else:
            history.append(out)
            mean = sum(
                w * h for w, h in zip(ADAMS[min(len(history), 4)], reversed(history), strict=False)
            )
        if i == 0:
            kept = x
        bar, after = schedule.alphas_bar[now], schedule.alphas_bar[before] if before >= 0 else final
        if schedule.prediction_type == "v_prediction":
            mean = np.sqrt(bar) * mean + np.sqrt(1 - bar) * x
        scale = bar * np.sqrt(1 - after) + np.sqrt(bar * (1 - bar) * after)
        x = np.sqrt(after / bar) * x - (after - bar) * mean / scale  # equation 9
    return x


def euler(
    schedule: SamplerSchedule,
    steps: int,
    start: np.ndarray,
    said: Callable[[], np.ndarray],
    give: Callable[[np.ndarray, float], None],
) -> np.ndarray:
    """Algorithm 2 of arXiv:2206.00364 without its correction and churn."""
    count = len(schedule.alphas_bar)
    kind = schedule.config.get("timestep_spacing", "linspace")
    times = (
        np.linspace(0, count - 1, steps)[::-1]
        if kind == "linspace"
        else schedule.space_timesteps(steps, "linspace")
    )
    known = np.sqrt((1 - schedule.alphas_bar) / schedule.alphas_bar)
    sigmas = np.append(np.interp(times, np.arange(count), known), 0.0)
    first = sigmas[0] if kind != "leading" else np.sqrt(sigmas[0] ** 2 + 1)
    x = start * first
    for i, t in enumerate(times):
        sigma = sigmas[i]
        scale = np.sqrt(sigma**2 + 1)
        give(x / scale, t)
        clean = schedule.predict_clean(x / scale, said(), 1 / scale, sigma / scale)
        x = x + (x - clean) / sigma * (sigmas[i + 1] - sigma)
    return x


def make_solver_sigmas(
    schedule: SamplerSchedule, steps: int, karras: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [n] and noise levels [n + 1] of the multistep solvers; Karras' spacing is equation
    5 of arXiv:2206.00364 with rho 7."""
    count, kind = len(schedule.alphas_bar), schedule.config.get("timestep_spacing", "linspace")
    if kind == "linspace":
        times = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
    elif kind == "leading":
        times = (np.arange(steps + 1) * (count // (steps + 1))).round()[::-1][
            :-1
        ] + schedule.config.get("steps_offset", 0)
    else:
        times = np.arange(count, 0, -count / steps).round() - 1
    known = np.sqrt((1 - schedule.alphas_bar) / schedule.alphas_bar)
    if not karras:
        return times, np.append(np.interp(times, np.arange(count), known), 0.0)
    low, high = known[0] ** (1 / 7), known[-1] ** (1 / 7)
    sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** 7
    return np.interp(np.log(sigmas), np.log(known), np.arange(count)).round(), np.append(
        sigmas, 0.0
    )


def split_sigma(sigma: float) -> tuple[float, float, float]:
    """Signal and noise of unit variance together, and half the log of their ratio, at a noise
    level."""
    a = 1 / np.sqrt(sigma**2 + 1)
    return a, sigma * a, np.inf if sigma == 0 else -np.log(sigma)


DEFAULTS: dict[str, dict[str, Any]] = {  # of a scheduler's settings, what there is a table for
    "ddim": {"thresholding": False},
    "pndm": {"skip_prk_steps": True},
    "euler": {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "use_karras_sigmas": False,
    },
    "dpm++": {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "lower_order_final": True,
        "use_lu_lambdas": False,
    },
    "unipc": {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "lower_order_final": True,
        "use_karras_sigmas": False,
    },
}
SIGMAS = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "thresholding": False,
}


for name in ("euler", "dpm++", "unipc"):
    DEFAULTS[name] |= SIGMAS


for name in ("dpm++", "unipc"):
    DEFAULTS[name]["solver_order"] = 2


def dpm_solver(
    schedule: SamplerSchedule,
    steps: int,
    start: np.ndarray,
    said: Callable[[], np.ndarray],
    give: Callable[[np.ndarray, float], None],
) -> np.ndarray:
    """DPM-Solver++(2M), algorithm 2 of arXiv:2211.01095; of first order at the first step, and at
    the last where they are few."""
    times, sigmas = make_solver_sigmas(
        schedule, steps, bool(schedule.config.get("use_karras_sigmas", False))
    )
    x, earlier = start, None
    for i, t in enumerate(times):
        a, s, lam = split_sigma(sigmas[i])
        after, noise, lam_after = split_sigma(sigmas[i + 1])
        give(x, t)
        clean = schedule.predict_clean(x, said(), a, s)
        h = lam_after - lam
        mean = clean
        last = i == steps - 1
        if earlier is not None and not (last and (steps < 15 or sigmas[-1] == 0)):
            r = (lam - split_sigma(sigmas[i - 1])[2]) / h
            mean = clean + (clean - earlier) / (2 * r)
        x = noise / s * x - after * np.expm1(-h) * mean
        earlier = clean
    return x


def unipc(
    schedule: SamplerSchedule,
    steps: int,
    start: np.ndarray,
    said: Callable[[], np.ndarray],
    give: Callable[[np.ndarray, float], None],
) -> np.ndarray:
    """UniPC of second order, B(h) = e^h - 1 (arXiv:2302.04867): each output first corrects the step
    that led to it."""
    times, sigmas = make_solver_sigmas(schedule, steps, False)
    x, before, order = start, start, 0
    cleans: list[np.ndarray] = []
    for i, t in enumerate(times):
        give(x, t)
        a, s, lam = split_sigma(sigmas[i])
        clean = schedule.predict_clean(x, said(), a, s)
        if i > 0:
            x = correct_step(before, cleans, clean, sigmas, i, order)
        cleans.append(clean)
        before, order = x, min(2, i + 1, steps - i)
        after, noise, lam_after = split_sigma(sigmas[i + 1])
        h = lam_after - lam
        x_next = noise / s * x - after * np.expm1(-h) * clean
        if order == 2:
            r = (split_sigma(sigmas[i - 1])[2] - lam) / h
            x_next = x_next - after * np.expm1(-h) * 0.5 * (cleans[-2] - clean) / r
        x = x_next
    return x


def correct_step(
    before: np.ndarray,
    cleans: list[np.ndarray],
    new: np.ndarray,
    sigmas: np.ndarray,
    i: int,
    order: int,
) -> np.ndarray:
    """UniC: the step from ``before`` again, with what the network says at its end."""
    _, s, lam = split_sigma(sigmas[i - 1])
    after, noise, lam_after = split_sigma(sigmas[i])
    h = lam_after - lam
    grown, base = np.expm1(-h), noise / s * before - after * np.expm1(-h) * cleans[-1]
    gain = new - cleans[-1]
    if order == 1:
        return base - after * grown * 0.5 * gain
    r = (split_sigma(sigmas[i - 2])[2] - lam) / h
    first = grown / -h - 1
    second = first / -h - 0.5
    rho = np.linalg.solve(
        np.array([[1.0, 1.0], [r, 1.0]]), np.array([first / grown, 2 * second / grown])
    )
    return base - after * grown * (rho[0] * (cleans[-2] - cleans[-1]) / r + rho[1] * gain)


SAMPLERS = {"ddim": ddim, "dpm++": dpm_solver, "euler": euler, "pndm": pndm, "unipc": unipc}
SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc",
    "DDPMScheduler": "ddim",
}


def make_table(
    config: dict[str, Any], steps: int, name: str | None = None, predict: str | None = None
) -> SamplerTable:
    """The table of a sampler on the noise schedule of a ``scheduler_config.json``.

    Args:
        name: one of ``SAMPLERS``; None: the one that the config is of, DDIM in the place of DDPM.
        predict: what the network predicts, where the config does not say it.

    Raises:
        InputError: for a sampler that is unknown.
    """
    chosen = name or SAMPLER_OF_CLASS.get(config.get("_class_name", ""), "")
    if chosen not in SAMPLERS:
        raise InputError(
            f"scheduler: {name or config.get('_class_name')!r} has no table here; choose one of "
            f"{', '.join(SAMPLERS)}"
        )
    known = (
        config
        if name is None
        else config | {"use_karras_sigmas": chosen == "dpm++", "set_alpha_to_one": False}
    )  # as --engine torch sets them
    own = SAMPLER_OF_CLASS.get(config.get("_class_name", "")) == chosen
    if strange := [
        f"{key} is {known[key]!r}"
        for key, usual in DEFAULTS[chosen].items()
        if own and known.get(key, usual) != usual
    ]:
        raise InputError(
            f"scheduler: of {chosen} with {', '.join(strange)} there is no table here; choose one "
            f"of {', '.join(SAMPLERS)} by name, or --engine torch"
        )
    if chosen == "pndm":
        known = {
            key: value for key, value in known.items() if key != "rescale_betas_zero_snr"
        }  # diffusers' scheduler has no such setting
    bar = np.cumprod(1 - make_betas(known))
    if known.get("rescale_betas_zero_snr") and chosen != "ddim":
        bar[-1] = (
            2**-24
        )  # as those schedulers do: at no signal at all their noise level would not be finite
    schedule = SamplerSchedule(bar, predict or known.get("prediction_type", "epsilon"), known)
    calls = steps + (chosen == "pndm" and steps > 1)
    rows, times = [], []

    def give(row: np.ndarray, t: float) -> None:
        rows.append(row)
        times.append(t)

    def said() -> np.ndarray:
        return np.eye(calls + 1)[len(rows)]

    rows.append(SAMPLERS[chosen](schedule, steps, np.eye(calls + 1)[0], said, give))
    return SamplerTable(np.array(times, np.float32), np.array(rows, np.float32))
