"""Rectified flow: sigmas, densities and noised inputs are those of diffusers."""

from typing import Any

import numpy as np
import pytest

from limner.config import toml
from limner.config.schema import ObjectiveSettings
from limner.diffusion import make_objective
from limner.diffusion.flow import FlowObjective, draw_place, shift_sigmas
from limner.errors import InputError

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SHAPE = (16, 8, 8)
EVERYWHERE = (np.arange(1000) + 0.5) / 1000


def objective(**flow: Any) -> FlowObjective:
    made = make_objective(SCHEDULER, toml.build(ObjectiveSettings, {"flow": flow}))
    assert isinstance(made, FlowObjective)
    return made


@pytest.mark.frameworks
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_table_is_diffusers(shift: float) -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    n = objective(density="uniform", sigmas="table", shift=shift).at(EVERYWHERE, SHAPE)
    np.testing.assert_allclose(n.noise_in, scheduler.sigmas, rtol=1e-6)
    np.testing.assert_allclose(n.timestep, scheduler.timesteps, rtol=1e-6)
    x0, e = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))
    noisy = scheduler.scale_noise(x0, scheduler.timesteps, e)
    made = n.signal_in[:, None] * x0.numpy() + n.noise_in[:, None] * e.numpy()
    np.testing.assert_allclose(made, noisy, rtol=1e-5, atol=1e-6)
    target = n.signal_target[:, None] * x0.numpy() + n.noise_target[:, None] * e.numpy()
    np.testing.assert_array_equal(target, e - x0)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("density", "given"),
    [
        ("logit_normal", {}),
        ("logit_normal", {"logit_mean": -0.5, "logit_std": 1.7}),
        ("mode", {}),
        ("mode", {"mode_scale": 0.4}),
        ("uniform", {}),
    ],
)
def test_densities_are_diffusers(
    density: str, given: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same uniform numbers, put where diffusers draws its own."""
    import torch
    from diffusers.training_utils import compute_density_for_timestep_sampling

    u = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def normal(mean: float, std: float, **sized: Any) -> torch.Tensor:
        return mean + std * torch.special.ndtri(u)

    monkeypatch.setattr(torch, "normal", normal)
    monkeypatch.setattr(torch, "rand", lambda **sized: u)
    usual = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}
    name = "none" if density == "uniform" else density
    want = compute_density_for_timestep_sampling(name, batch_size=500, **(usual | given))
    made = draw_place(u.numpy(), objective(density=density, **given).settings)
    np.testing.assert_allclose(made, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("density", ["logit_normal", "mode", "uniform"])
def test_one_uniform_number_is_one_place(density: str) -> None:
    """Monotonic, so that evenly spread numbers are evenly spread over the density; within 0 to 1 at
    both ends."""
    ends = np.array([0.0, 2.0**-53, *EVERYWHERE, np.nextafter(1.0, 0.0)])
    place = draw_place(ends, objective(density=density).settings)
    assert place.min() >= 0 and place.max() <= 1
    steps = np.diff(place)
    assert (steps >= 0).all() or (steps <= 0).all()
    for sigmas in ("continuous", "table"):
        n = objective(density=density, sigmas=sigmas).at(ends, SHAPE)
        assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in vars(n).values())


def test_the_shift_is_the_scheduler_s_unless_told() -> None:
    half = np.array([0.5])
    assert objective(density="uniform").at(half, SHAPE).noise_in == pytest.approx(0.75)
    assert objective(density="uniform", shift=1.0).at(half, SHAPE).noise_in == pytest.approx(0.5)
    assert shift_sigmas(np.array([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("scheduler", "settings", "words"),
    [
        ({"use_dynamic_shifting": True}, {}, "use_dynamic_shifting is True, False is what"),
        ({"invert_sigmas": True}, {}, "invert_sigmas is True"),
        ({}, {"min_snr": 5.0}, "objective.min_snr: it means nothing to flow matching"),
        ({}, {"dream": 1.0}, "objective.dream: it means nothing to flow matching"),
        ({}, {"predict": "epsilon"}, "objective.predict: it means nothing to flow matching"),
        (
            {},
            {"flow": {"mode_scale": 1.8}},
            "mode_scale: 1.8 is not within -1 to 1.7",
        ),
        ({}, {"timestep_bias": {}}, "objective.timestep_bias: it means nothing to flow"),
    ],
)
def test_what_a_flow_does_not_serve_is_refused(
    scheduler: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as refusal:
        make_objective(SCHEDULER | scheduler, toml.build(ObjectiveSettings, settings))
    assert words in str(refusal.value)
