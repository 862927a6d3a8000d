"""The tables of samplers are diffusers' schedulers, whatever the network says."""

import itertools
from typing import Any

import numpy as np
import pytest

from limner.diffusion import samplers
from limner.diffusion.samplers import SAMPLERS
from limner.errors import InputError

BASE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


SPACINGS = ["leading", "trailing", "linspace"]


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("predict", "spacing"),
    [
        *itertools.product(["epsilon", "v_prediction"], SPACINGS),
        ("v_prediction at no signal", "trailing"),
    ],
)
@pytest.mark.parametrize("name", [*SAMPLERS, "dpm++ as it is"])
def test_a_table_is_what_the_scheduler_does(name: str, predict: str, spacing: str) -> None:
    """Random numbers in the network's place: each step's input, its timestep, and the end."""
    import diffusers
    import torch

    from limner.engines.torch.pipeline import SCHEDULERS

    plain, (predict, _, zero) = name.endswith("as it is"), predict.partition(" ")
    kind, how = SCHEDULERS[name.split()[0]]
    how = (
        how
        | ({"use_karras_sigmas": False} if plain else {})
        | ({"rescale_betas_zero_snr": True} if zero else {})
    )
    if zero and name in (
        "pndm",
        "dpm++",
    ):  # one has no such setting, the other fails with Karras' noise levels there
        how = {name: value for name, value in how.items() if name != "rescale_betas_zero_snr"}
    for steps in (2, 3, 7, 25, 50):
        scheduler = getattr(diffusers, kind).from_config(
            {**BASE, "prediction_type": predict, "timestep_spacing": spacing}, **how
        )
        scheduler.set_timesteps(steps)
        draws = np.random.default_rng(steps)
        noise = draws.standard_normal((1, 4, 2, 2))
        x, given, said = torch.tensor(noise) * scheduler.init_noise_sigma, [], []
        for t in scheduler.timesteps:
            given.append(scheduler.scale_model_input(x, t).numpy().ravel())
            said.append(draws.standard_normal(noise.shape))
            x = scheduler.step(torch.tensor(said[-1]), t, x).prev_sample
        found = samplers.make_table({**dict(scheduler.config), "_class_name": kind}, steps)
        assert np.isfinite(found.coefficients).all()
        ours = found.coefficients.astype(np.float64) @ np.stack([noise, *said]).reshape(
            len(said) + 1, -1
        )
        want = np.stack([*given, x.numpy().ravel()])
        np.testing.assert_array_equal(
            found.timesteps, scheduler.timesteps.numpy().astype(np.float32)
        )
        assert np.abs(ours - want).max() < 1e-4 * max(1.0, np.abs(want).max()), steps


def test_settings_without_a_table_are_refused() -> None:
    settings = {
        "EulerDiscrete": "use_karras_sigmas",
        "DPMSolverMultistep": "euler_at_final",
        "UniPCMultistep": "thresholding",
    }
    for kind, setting in settings.items():
        with pytest.raises(InputError, match=f"{setting} is True there is no table here"):
            samplers.make_table({**BASE, "_class_name": f"{kind}Scheduler", setting: True}, 5)
    with pytest.raises(InputError, match="skip_prk_steps is False"):
        samplers.make_table({**BASE, "_class_name": "PNDMScheduler", "skip_prk_steps": False}, 5)
    assert (
        len(
            samplers.make_table(
                {**BASE, "_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
                5,
                "ddim",
            ).timesteps
        )
        == 5
    )


def test_rows_look_at_the_past_only() -> None:
    for name in SAMPLERS:
        weights = samplers.make_table(BASE, 9, name).coefficients
        assert (
            all((weights[k, k + 1 :] == 0).all() for k in range(len(weights)))
            and (weights[1:, 0] != 0).all()
        )


def test_a_sampler_that_is_unknown_is_refused() -> None:
    config: dict[str, Any] = {"_class_name": "EulerAncestralDiscreteScheduler", **BASE}
    with pytest.raises(
        InputError,
        match=r"'EulerAncestralDiscreteScheduler' has no table here; choose one of ddim, "
        r"dpm\+\+, euler, pndm, unipc",
    ):
        samplers.make_table(config, 5)
