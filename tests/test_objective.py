"""The numbers of the objective are those of diffusers' schedulers and training scripts, at every
timestep."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from limner.config import toml
from limner.config.schema import ObjectiveSettings
from limner.diffusion.gaussian import PREDICTION_TYPES, GaussianObjective
from limner.errors import InputError
from limner.families.sd import SD

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03},
    "scaled_linear": STABLE_DIFFUSION,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02},
    "short": STABLE_DIFFUSION | {"num_train_timesteps": 50},
    "trained_betas": {"trained_betas": [0.01, 0.02, 0.05, 0.1, 0.3, 0.6], "num_train_timesteps": 6},
    "zero_snr": STABLE_DIFFUSION | {"rescale_betas_zero_snr": True},
    "linear_zero_snr": {"rescale_betas_zero_snr": True},
}


def of_diffusers(scheduler: dict[str, Any], predict: str = "epsilon") -> Any:
    """diffusers' scheduler, with the rescaling and the cumulative product of its betas done in
    float64.

    In float32 these are only exact to about 1e-5 (1000 factors, and 1 - alpha_bar loses digits at
    small t), which would hide an error of 1e-6 of ours; the betas are exact to float32, and the
    code that rescales, adds noise and makes targets is diffusers' own.
    """
    import torch
    from diffusers import DDPMScheduler
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    plain = {name: value for name, value in scheduler.items() if name != "rescale_betas_zero_snr"}
    made = DDPMScheduler(prediction_type=predict, **plain)
    betas = made.betas.double()
    made.alphas_cumprod = torch.cumprod(
        1.0 - (rescale_zero_terminal_snr(betas) if scheduler != plain else betas), 0
    )
    return made


def everywhere(scheduler: dict[str, Any]) -> np.ndarray:
    """Uniform numbers that stand for every timestep once, in order."""
    count = scheduler.get("num_train_timesteps", 1000)
    return (np.arange(count) + 0.5) / count


SHAPE = (4, 8, 8)  # of latents, which these objectives do not look at


def objective(scheduler: dict[str, Any], **settings: Any) -> GaussianObjective:
    return GaussianObjective.from_scheduler(scheduler, toml.build(ObjectiveSettings, settings))


@pytest.mark.frameworks
@pytest.mark.parametrize("predict", PREDICTION_TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_input_and_target_equal_diffusers(name: str, predict: str) -> None:
    import torch

    scheduler = SCHEDULES[name]
    reference = of_diffusers(scheduler, predict)
    n = objective(scheduler, predict=predict).at(everywhere(scheduler), SHAPE)
    t = torch.arange(len(n.timestep))
    assert n.timestep.tolist() == t.tolist() and n.timestep.dtype == np.float32
    x0, noise = torch.randn(
        2, len(t), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: reference.get_velocity(x0, noise, t),
        "sample": lambda: x0,
    }

    def mix(of_clean: np.ndarray, of_noise: np.ndarray) -> np.ndarray:
        return (
            of_clean.astype(np.float64)[:, None] * x0.numpy()
            + of_noise.astype(np.float64)[:, None] * noise.numpy()
        )

    np.testing.assert_allclose(
        mix(n.signal_in, n.noise_in), reference.add_noise(x0, noise, t).numpy(), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        mix(n.signal_target, n.noise_target), targets[predict]().numpy(), rtol=0, atol=1e-6
    )
    assert (n.weight == 1).all() and (n.dream == 0).all()
    assert {str(x.dtype) for name, x in vars(n).items() if name != "timestep"} == {"float32"}


@pytest.mark.frameworks
def test_stock_scheduler_agrees_in_float32() -> None:
    """Without any change to it, diffusers' scheduler differs by no more than its float32 product
    explains."""
    import torch
    from diffusers import DDPMScheduler

    n = objective(STABLE_DIFFUSION).at(everywhere({}), SHAPE)
    t = torch.arange(1000)
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    stock = DDPMScheduler(**STABLE_DIFFUSION)
    np.testing.assert_allclose(n.signal_in, stock.add_noise(ones, zeros, t)[:, 0], atol=1e-5)
    np.testing.assert_allclose(n.noise_in, stock.add_noise(zeros, ones, t)[:, 0], atol=1e-5)


@pytest.mark.frameworks
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0])
@pytest.mark.parametrize(
    "name", ["defaults", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "trained_betas"]
)
def test_min_snr_weights_equal_diffusers(name: str, gamma: float) -> None:
    """min(SNR, gamma) over SNR, over SNR + 1, or over nothing, as the scripts have it on top of
    ``compute_snr``.

    Relative, but for weights below 1e-8: the last beta of the cosine schedule is 0.999 in float32,
    which leaves 1 - beta five digits.
    """
    import torch
    from diffusers.training_utils import compute_snr

    scheduler = SCHEDULES[name]
    snr = (
        compute_snr(of_diffusers(scheduler), torch.arange(len(everywhere(scheduler))))
        .double()
        .numpy()
    )
    capped = np.minimum(snr, gamma)
    for predict, expected in {
        "epsilon": capped / snr,
        "v_prediction": capped / (snr + 1),
        "sample": capped,
    }.items():
        weights = (
            objective(scheduler, predict=predict, min_snr=gamma)
            .at(everywhere(scheduler), SHAPE)
            .weight
        )
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("min_snr", [None, 5.0])
@pytest.mark.parametrize("predict", PREDICTION_TYPES)
def test_zero_terminal_snr_is_finite(predict: str, min_snr: float | None) -> None:
    made = objective(SCHEDULES["zero_snr"], predict=predict, min_snr=min_snr)
    n = made.at(everywhere({}), SHAPE)
    assert all(np.isfinite(x).all() for x in vars(n).values())
    assert n.signal_in[-1] == 0.0 and n.noise_in[-1] == 1.0
    last = {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[predict] if min_snr else 1.0
    assert n.weight[-1] == last


def test_prediction_type_is_the_base_s_unless_overridden() -> None:
    assert objective({"prediction_type": "v_prediction"}).prediction_type == "v_prediction"
    assert (
        objective({"prediction_type": "v_prediction"}, predict="epsilon").prediction_type
        == "epsilon"
    )
    assert objective({}).prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("scheduler", "settings", "words"),
    [
        ({"prediction_type": "flow"}, {}, "'flow' is not one of epsilon, v_prediction, sample"),
        ({"beta_schedule": "exponential"}, {}, "beta_schedule 'exponential' is not one of linear"),
        (
            {},
            {"dream": 1.0, "predict": "v_prediction"},
            "DREAM is defined for epsilon prediction, this run predicts v_prediction",
        ),
        ({"prediction_type": "sample"}, {"dream": 1.0}, "this run predicts sample"),
        (
            {},
            {"timestep_bias": {"strategy": "range", "begin": 500, "end": 1001}},
            "timesteps 500 to 1001 are not within 0 to 1000",
        ),
        (
            {},
            {"timestep_bias": {"strategy": "range", "begin": 500, "end": 400}},
            "timesteps 500 to 400 are not within",
        ),
        ({}, {"timestep_bias": {"portion": 1.5}}, "are not within 0 to 1000"),
        ({}, {"timestep_bias": {"portion": -0.5}}, "are not within 0 to 1000"),
        (
            {},
            {"timestep_bias": {"multiplier": 0.0}},
            "timestep_bias.multiplier: 0.0 is not above 0",
        ),
    ],
)
def test_refusals(scheduler: dict, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        objective(scheduler, **settings)


def reference_weights(
    strategy: str, multiplier: float, portion: float = 0.25, begin: int = 0, end: int = 1000
) -> np.ndarray:
    """Section 2.2 of the reference: ones; the last, first or chosen timesteps times the multiplier;
    normalised."""
    weights = np.ones(1000)
    biased = int(portion * 1000)
    chosen = {
        "later": range(1000 - biased, 1000),
        "earlier": range(biased),
        "range": range(begin, end),
    }[strategy]
    for t in chosen:
        weights[t] *= multiplier
    return weights / weights.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "later", "multiplier": 3.0},
        {"strategy": "earlier", "multiplier": 2.0, "portion": 0.1},
        {"strategy": "range", "multiplier": 10.0, "begin": 200, "end": 300},
        {"strategy": "later", "multiplier": 0.25, "portion": 1.0},
        {"strategy": "later", "multiplier": 9.0, "portion": 0.0},
        {"strategy": "earlier", "multiplier": 9.0, "portion": 0.0},
        {"strategy": "later", "multiplier": 9.0, "portion": 0.0004},
        {"strategy": "range", "multiplier": 9.0, "begin": 40, "end": 40},
    ],
)
def test_timestep_bias(settings: dict[str, Any]) -> None:
    """A fine grid of uniform numbers hits each timestep in proportion to its weight; a portion of
    none biases nothing."""
    made = objective({}, timestep_bias=settings)
    expected = reference_weights(**settings)
    assert made.probabilities is not None
    np.testing.assert_allclose(made.probabilities, expected, rtol=1e-12)
    count = 200_000
    hits = np.bincount(made.to_timesteps((np.arange(count) + 0.5) / count), minlength=1000)
    np.testing.assert_allclose(hits / count, expected, atol=1.5 / count)


def test_timesteps_are_uniform_and_within_range() -> None:
    for made in (objective({}), objective({}, timestep_bias={"multiplier": 1.0})):
        assert made.to_timesteps(np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [0, 999]
        assert (np.bincount(made.to_timesteps(everywhere({}) + 1e-7)) == 1).all()


@pytest.mark.frameworks
@pytest.mark.parametrize("preservation", [0.5, 1.0, 2.0])
def test_dream_equals_diffusers(preservation: float) -> None:
    """Input, target and loss through the torch engine's own code, with a toy network, against
    ``compute_dream_and_update_latents``."""
    import torch
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_dream_and_update_latents

    from limner.engines.torch.engine import TorchEngine

    class Toy(torch.nn.Module):
        """Depends on all that a network is given, and remembers its last input."""

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            self.seen = sample
            return Output(
                0.7 * sample.roll(1, -1)
                + 0.001 * timestep.view(-1, 1, 1, 1)
                + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
            )

    class Output(tuple):
        def __new__(cls, sample: Any) -> "Output":
            return tuple.__new__(cls, (sample,))

        sample = property(lambda self: self[0])

    scheduler, u = STABLE_DIFFUSION, np.array([0.0, 0.3, 0.77, 0.999])
    n = objective(scheduler, dream=preservation).at(u, SHAPE)
    draws = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=draws)
    context = torch.randn(4, 5, 3, generator=draws)
    reference, t, toy = DDPMScheduler(**scheduler), torch.from_numpy(n.timestep).long(), Toy()
    noisy, target = compute_dream_and_update_latents(
        toy, reference, t, noise, reference.add_noise(x0, noise, t), noise, context, preservation
    )
    expected = (toy(noisy, t, context).sample - target).square().flatten(1).mean(1)

    settings = SimpleNamespace(objective=ObjectiveSettings(dream=preservation))
    engine = SimpleNamespace(
        config=settings,
        half=None,
        device=torch.device("cpu"),
        family=SimpleNamespace(network=SD.network),
    )
    batch = {"x0": x0, "noise": noise, "context": context} | {
        name: torch.from_numpy(x) for name, x in vars(n).items()
    }
    losses = TorchEngine.example_losses(engine, toy, batch)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        toy.seen, noisy, atol=1e-5
    )  # diffusers' float32 alpha_bar, see test_stock_scheduler_agrees_in_float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(n.dream, n.noise_in.astype(np.float64) ** preservation, rtol=1e-6)
