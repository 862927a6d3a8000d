"""Every scheduler class of diffusers is served as diffusers noises, or refused."""

import importlib
import inspect
import json
import pkgutil
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.base_model.open import open_base
from limner.config.schema import ModelSettings, ObjectiveSettings
from limner.diffusion import make_objective
from limner.diffusion.base_schedulers import FLOW, GAUSSIAN, REFUSED, describe_doubts
from limner.diffusion.noise_schedule import make_betas
from limner.errors import InputError
from limner.families import FAMILIES

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# In diffusers 0.42 these need a library that is not installed, and cannot be imported.
NEED_TORCHSDE = {"CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler"}


def list_stock_classes() -> dict[str, Any]:
    import diffusers.schedulers
    from diffusers import SchedulerMixin

    classes = {}
    for module in pkgutil.iter_modules(diffusers.schedulers.__path__):
        if module.name.startswith("scheduling_"):
            try:
                found = vars(importlib.import_module(f"diffusers.schedulers.{module.name}"))
            except ImportError as error:
                assert "torchsde" in str(error)
                continue
            for name, cls in found.items():
                if inspect.isclass(cls) and issubclass(cls, SchedulerMixin):
                    classes[name] = cls
    return {name: cls for name, cls in classes.items() if cls is not SchedulerMixin}


def refusal(scheduler: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        make_objective(scheduler, ObjectiveSettings())
    return str(caught.value)


@pytest.mark.frameworks
def test_every_class_of_diffusers_is_decided() -> None:
    decided = GAUSSIAN.keys() | REFUSED.keys() | {FLOW}
    assert not GAUSSIAN.keys() & REFUSED.keys()
    stock = list_stock_classes().keys()
    assert len(stock) > 40 and stock - decided == set()
    assert decided - stock <= NEED_TORCHSDE


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:__array_wrap__")  # diffusers' own, with numpy 2
@pytest.mark.parametrize("name", sorted(GAUSSIAN.keys() - NEED_TORCHSDE))
def test_a_served_class_has_its_own_betas(name: str) -> None:
    """With an empty config, with Stable Diffusion's numbers, and with zero terminal SNR."""
    cls = list_stock_classes()[name]
    known = inspect.signature(cls.__init__).parameters
    for config in ({}, STABLE_DIFFUSION, {"rescale_betas_zero_snr": True}):
        if config.keys() <= known.keys():
            np.testing.assert_allclose(
                make_betas({"_class_name": name, **config}),
                cls(**config).betas.numpy(),
                rtol=2e-3 if config.keys() == {"rescale_betas_zero_snr"} else 1e-5,
            )
    assert GAUSSIAN[name].rescales == ("rescale_betas_zero_snr" in known)
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"):
        if "beta_schedule" in known and name != "UnCLIPScheduler":
            served = schedule in GAUSSIAN[name].schedules
            try:
                betas = cls(beta_schedule=schedule).betas.numpy()
            except (NotImplementedError, ValueError):
                assert not served
                continue
            if served:
                config = {"_class_name": name, "beta_schedule": schedule}
                np.testing.assert_allclose(make_betas(config), betas, rtol=1e-4)


@pytest.mark.parametrize("name", [*REFUSED, "os", "NoSuchScheduler", None, 3, ["a"], {}])
def test_any_other_class_is_refused(name: object) -> None:
    message = refusal({"_class_name": name, "num_train_timesteps": 1000})
    assert "is not what Limner trains with" in message
    assert REFUSED.get(name, "no such class") in message if isinstance(name, str) else True


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "flow sigmas": ({"use_flow_sigmas": True}, "use_flow_sigmas is 'True'"),
    "continuous": ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    "turned around": ({"beta_start": 0.02, "beta_end": 0.001}, "0 < beta_start < beta_end < 1"),
    "equal": ({"beta_start": 0.01, "beta_end": 0.01}, "0 < beta_start < beta_end < 1"),
    "negative": ({"beta_start": -0.1}, "0 < beta_start < beta_end < 1"),
    "above one": ({"beta_end": 1.5}, "0 < beta_start < beta_end < 1"),
    "no number": ({"beta_start": float("nan")}, "beta_start is 'nan'"),
    "infinite": ({"beta_end": float("inf")}, "beta_end is 'inf'"),
    "a text": ({"beta_start": "x"}, "beta_start is 'x', a number is expected"),
    "a truth": ({"beta_start": True}, "beta_start is 'True'"),
    "huge": ({"beta_start": 10**400}, "beta_start is '1000"),
    "steps": ({"num_train_timesteps": 10**12}, "num_train_timesteps is '1000000000000'"),
    "no steps": ({"num_train_timesteps": 0}, "num_train_timesteps is '0'"),
    "half a step": ({"num_train_timesteps": 10.5}, "num_train_timesteps is '10.5'"),
    "steps as text": ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
    "a schedule": ({"beta_schedule": "laplace"}, "beta_schedule 'laplace' is not one of linear"),
    "schedules": ({"beta_schedule": ["linear"]}, "is not one of linear"),
    "few betas": ({"trained_betas": [0.1, 0.2]}, "not num_train_timesteps (1000) numbers"),
    "betas of one": ({"trained_betas": [1.0] * 1000}, "numbers between 0 and 1"),
    "betas of text": ({"trained_betas": "0.1"}, "numbers between 0 and 1"),
    "prediction": ({"prediction_type": "flow_prediction"}, "'flow_prediction' is not one of"),
    "predictions": ({"prediction_type": {}}, "'{}' is not one of"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_no_noise_schedule(name: str) -> None:
    changes, words = SETTINGS[name]
    assert words in refusal({"_class_name": "EulerDiscreteScheduler", **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shift": 0}, "shift is 0.0, a number above 0"),
        ({"shift": "x"}, "shift is 'x', a number is expected"),
        ({"shift": float("nan")}, "shift is 'nan'"),
        ({"num_train_timesteps": -4}, "num_train_timesteps is '-4'"),
        ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting is yes"),
    ],
)
def test_settings_that_are_no_flow(changes: dict[str, Any], words: str) -> None:
    assert words in refusal({"_class_name": FLOW, **changes})


def test_what_is_served_and_may_not_be_meant_is_told() -> None:
    zero = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    assert describe_doubts({"_class_name": "DDIMScheduler"}, "epsilon") == []
    assert describe_doubts(zero, "v_prediction") == []
    [doubt] = describe_doubts(zero, "epsilon")
    assert "pure noise, of which epsilon teaches nothing" in doubt
    [doubt] = describe_doubts({**zero, "_class_name": "PNDMScheduler"}, "sample")
    assert "a PNDMScheduler knows no such setting" in doubt


@pytest.mark.parametrize(
    ("in_index", "in_config", "words"),
    [
        ("EulerDiscreteScheduler", "DDIMScheduler", ""),  # as many published bases have it
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("EDMEulerScheduler", "EDMEulerScheduler", "arXiv:2206.00364"),
        ("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "it is of flow matching"),
        ("DDPMScheduler", "NoSuchScheduler", "no such class"),
        ("NoSuchScheduler", "DDPMScheduler", "no such class"),
    ],
)
def test_the_class_of_the_index_is_the_one_that_draws(
    sd: Path, tmp_path: Path, in_index: str, in_config: str, words: str
) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", in_index]
    (base / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": in_config, **STABLE_DIFFUSION}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    model = ModelSettings(str(base))
    if not words:
        opened = open_base(model, FAMILIES["sd"])
        assert opened.configs["scheduler"] == {**config, "_class_name": in_index}
        return
    with pytest.raises(InputError, match="is not what Limner trains with") as caught:
        open_base(model, FAMILIES["sd"])
    assert words in str(caught.value)
