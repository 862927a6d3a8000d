"""The tables of samplers are diffusers' schedulers, whatever the network says."""

import inspect
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.diffusion import samplers
from limner.diffusion.sampler_settings import (
    DEFAULTS,
    SERVED_SETTINGS,
    UNSERVED_DEFAULTS,
    adapt_to_pipeline,
    list_served,
)
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
@pytest.mark.parametrize("name", [*list_served(), "dpm++ as it is"])
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
        "EulerDiscrete": "use_exponential_sigmas",
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


PUBLISHED = json.loads((Path(__file__).parent / "data" / "schedulers.json").read_text())
MODELS = {row["model"]: row for row in PUBLISHED["schedulers"]}
STEPS = (1, 2, 4, 20, 25, 30, 50)


def make_stock(pipeline: str, class_name: str, config: dict[str, Any], name: str | None) -> Any:
    """The scheduler that a stock pipeline draws with: the base's own, or one by name."""
    import diffusers

    from limner.engines.torch.pipeline import set_scheduler

    warnings.simplefilter("ignore", FutureWarning)  # of settings that the pipelines change
    scheduler = getattr(diffusers, class_name).from_config(dict(config))
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet"))
    if pipeline == "StableDiffusionPipeline":
        stock = diffusers.StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        stock = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, scheduler=scheduler
        )
    if name is not None:
        set_scheduler(stock, name)
    return stock.scheduler


def predict(x: np.ndarray, timestep: float) -> np.ndarray:
    """A network that looks at its input and its timestep, float64."""
    return np.sin(1.3 * x + 0.01 * timestep) + 0.2 * np.cos(0.003 * timestep)


def compare_with_stock(
    pipeline: str, class_name: str, config: dict[str, Any], name: str | None, steps: int
) -> None:
    """The same timesteps, and latents to 1e-5, with a network in place of the UNet."""
    import torch

    scheduler = make_stock(pipeline, class_name, config, name)
    scheduler.set_timesteps(steps)
    noise = np.random.default_rng(steps).standard_normal((1, 4, 2, 2))
    x = torch.tensor(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(x, t).double().numpy(), float(t))
        x = scheduler.step(torch.tensor(output), t, x).prev_sample
    known = adapt_to_pipeline(config | {"_class_name": class_name}, pipeline, name)
    table = samplers.make_table(known, steps, name)
    # Those of Karras' noise levels are fractions, found in float32.
    is_euler = type(scheduler).__name__ == "EulerDiscreteScheduler"
    fractions = is_euler and scheduler.config.use_karras_sigmas
    np.testing.assert_allclose(
        table.timesteps,
        scheduler.timesteps.float(),
        rtol=0,
        atol=2e-3 if fractions else 0,
    )
    outputs = np.zeros((len(table.coefficients), *noise.shape))
    outputs[0] = noise
    for i, t in enumerate(table.timesteps):
        outputs[i + 1] = predict(np.tensordot(table.coefficients[i], outputs, 1), float(t))
    ours = np.tensordot(table.coefficients[-1], outputs, 1)
    largest = max(1.0, float(np.abs(x.numpy()).max()))
    assert np.abs(ours - x.double().numpy()).max() < 1e-5 * largest, steps


@pytest.mark.frameworks
@pytest.mark.parametrize("model", MODELS)
def test_published_schedulers_draw_what_the_stock_pipeline_draws(model: str) -> None:
    """The base's own, and each one by name on its noise schedule; or they are refused."""
    row = MODELS[model]
    served = row["class"] in DEFAULTS
    for name in ([None] if served else []) + list_served():
        for steps in STEPS:
            compare_with_stock(row["pipeline"], row["class"], row["config"], name, steps)
    if not served:
        with pytest.raises(InputError, match=f"'{row['class']}' has no table here"):
            samplers.make_table(row["config"] | {"_class_name": row["class"]}, 20)


def test_published_schedulers_are_many() -> None:
    assert len(MODELS) == len(PUBLISHED["schedulers"]) >= 12
    assert sum(row["class"] in DEFAULTS for row in MODELS.values()) >= 12
    assert all(row["source"] for row in MODELS.values())


@pytest.mark.frameworks
@pytest.mark.parametrize("class_name", DEFAULTS)
def test_what_a_config_leaves_out_is_what_the_class_says(class_name: str) -> None:
    """The defaults in the table are those of diffusers' constructors, and all are there that
    change a picture."""
    import diffusers

    signature = inspect.signature(getattr(diffusers, class_name).__init__)
    defaults = {k: p.default for k, p in signature.parameters.items() if k != "self"}
    ours = SERVED_SETTINGS[class_name] | UNSERVED_DEFAULTS.get(class_name, {})
    ours |= DEFAULTS[class_name]
    assert {name: defaults[name] for name in ours} == ours
    elsewhere = {
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        "rescale_betas_zero_snr",
        # Of thresholding, clipping and flows, which are refused.
        *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift"),
        *("use_dynamic_shifting", "time_shift_type", "shift_terminal"),
    }
    assert defaults.keys() - ours.keys() <= elsewhere


@pytest.mark.frameworks
@pytest.mark.parametrize("class_name", DEFAULTS)
@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_every_setting_is_served_as_stock_or_refused(pipeline: str, class_name: str) -> None:
    """One setting after the other is left out of a config, or has another value."""
    full = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
    }
    others: dict[str, list[Any]] = {
        "clip_sample": [True],
        "skip_prk_steps": [False],
        "steps_offset": [0, 3],
        "set_alpha_to_one": [True],
        "timestep_spacing": ["trailing", "linspace"],
        "prediction_type": ["v_prediction", "sample"],
        "beta_schedule": ["linear", "squaredcos_cap_v2"],
        "num_train_timesteps": [900],
        "use_karras_sigmas": [True],
        "use_exponential_sigmas": [True],
        "use_beta_sigmas": [True],
        "use_lu_lambdas": [True],
        "use_flow_sigmas": [True],
        "final_sigmas_type": ["sigma_min"],
        "euler_at_final": [True],
        "lower_order_final": [False],
        "solver_order": [1, 3],
        "algorithm_type": ["dpmsolver", "sde-dpmsolver++", "deis"],
        "solver_type": ["heun", "bh1", "bh2", "logrho"],
        "variance_type": ["fixed_small", "learned_range"],
        "predict_x0": [False],
        "disable_corrector": [[0]],
        "thresholding": [True],
        "interpolation_type": ["log_linear"],
        "lambda_min_clipped": [-5.1],
        "timestep_type": ["continuous"],
        "sigma_min": [0.1],
    }
    configs = [{k: v for k, v in full.items() if k != left_out} for left_out in full]
    configs += [full | {key: value} for key, values in others.items() for value in values]
    drawn = 0
    for config in [{}, *configs]:
        known = adapt_to_pipeline(config | {"_class_name": class_name}, pipeline, None)
        try:
            samplers.make_table(known, 7)
        except InputError as refusal:
            assert "there is no table here" in str(refusal), refusal
            continue
        compare_with_stock(pipeline, class_name, config, None, 7)
        drawn += 1
    assert drawn > len(full) + 5


@pytest.mark.frameworks
@pytest.mark.parametrize("spacing", [*SPACINGS, None])
@pytest.mark.parametrize("class_name", [*DEFAULTS, "DDPMScheduler", "HeunDiscreteScheduler"])
def test_steps_are_refused_where_the_stock_scheduler_fails(
    class_name: str, spacing: str | None
) -> None:
    """Drawn with 20 timesteps: what is served is finite, what is refused is above 18."""
    import diffusers
    import torch

    config = {"num_train_timesteps": 20, "clip_sample": False, "skip_prk_steps": True}
    config |= {} if spacing is None else {"timestep_spacing": spacing}
    for steps, offset in itertools.product((1, 7, 10, 18, 19, 20, 21, 40), (0, 1)):
        settings = config | {"steps_offset": offset}
        try:
            samplers.check_steps(steps, class_name, settings)
        except InputError:
            assert steps > 18
            continue
        scheduler = getattr(diffusers, class_name).from_config(settings)
        scheduler.set_timesteps(steps)
        assert max(scheduler.timesteps) < 20
        x = torch.ones(1, 4, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.step(x / 2, t, x).prev_sample
        assert steps <= 20 and x.isfinite().all()
    samplers.check_steps(10_000, "FlowMatchEulerDiscreteScheduler", config)


def test_steps_that_are_no_timesteps_are_refused() -> None:
    """Stock schedulers end in an index that is out of bounds."""
    config = BASE | {"_class_name": "DDIMScheduler", "clip_sample": False}
    assert len(samplers.make_table(config, 999).timesteps) == 999
    assert len(samplers.make_table(config | {"steps_offset": 0}, 1000).timesteps) == 1000
    for steps, offset in ((1000, 1), (1001, 0), (2000, 0), (999, 2), (20, 60)):
        with pytest.raises(InputError, match=f"steps: {steps} are more than the scheduler's 1000"):
            samplers.make_table(config | {"steps_offset": offset}, steps)
    for spacing in SPACINGS[1:]:
        with pytest.raises(InputError, match="steps: 1001 are more"):
            samplers.make_table(config | {"timestep_spacing": spacing}, 1001)
    for offset in (-1, 0.5, "1", None, True):
        with pytest.raises(InputError, match=r"steps_offset is .*a whole number from 0"):
            samplers.make_table(config | {"steps_offset": offset}, 5)


def test_rows_look_at_the_past_only() -> None:
    for name in list_served():
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
