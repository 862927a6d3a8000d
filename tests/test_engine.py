"""The torch engine against independent computations with diffusers' own classes, and its own
promises: nothing non-finite, nothing moved by looking."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_dream_and_update_latents, compute_snr

from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, EngineSettings
from limner.diffusion import make_objective
from limner.engines.torch import arithmetic, initial_state, optimizer
from limner.engines.torch.engine import TorchEngine, TorchState
from limner.engines.torch.processes import TorchProcessGroup, join_processes
from limner.errors import InputError, IntegrityError
from limner.families.sd import SD
from limner.protocols import Batch, NonFiniteStep

pytestmark = pytest.mark.frameworks


def make(base: Path, micro: int = 4, precision: str = "no", **sections) -> TorchEngine:
    cfg = toml.build(
        Config,
        {"model": {"base": str(base)}, "train": {"steps": 10, "batch_size": 4}, **sections},
    )
    said: list[str] = []
    engine = TorchEngine(
        cfg, open_base(cfg.model, SD), SD, TorchProcessGroup("cpu", precision), micro, said.append
    )
    engine.said = said
    return engine


def batch(engine: TorchEngine, seed: int = 0, rows: int = 4) -> Batch:
    g = np.random.default_rng(seed)
    objective = make_objective(engine.base.configs["scheduler"], engine.config.objective)
    numbers = vars(objective.at(g.random(rows), (4, 8, 8)))
    normal = lambda *shape: g.standard_normal((rows, *shape)).astype(np.float32)  # noqa: E731
    return {
        "x0": normal(4, 16, 16),
        "noise": normal(4, 16, 16),
        "context": normal(77, 32),
        "position": np.arange(seed * rows, (seed + 1) * rows),
        **numbers,
    }


def steps(
    engine: TorchEngine, state: TorchState, count: int, first: int = 0, **options
) -> list[dict[str, float]]:
    out = []
    for step in range(first, first + count):
        state, metrics = engine.step(
            state,
            batch(engine, step),
            step=step,
            **{"learning_rate": 1e-3, "ema": None, "seed": 0, **options},
        )
        out.append(metrics)
    return engine.fetch_metrics(state, out)


def weights(engine: TorchEngine, state: TorchState) -> dict[str, np.ndarray]:
    return {
        f"{group}/{name}": array.copy()
        for group, arrays in engine.snapshot(state)
        for name, array in arrays.items()
    }


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


def reference(
    base: Path, b: Batch, prediction: str, gamma: float | None
) -> tuple[UNet2DConditionModel, torch.Tensor]:
    """The network after one backward pass, and the loss, as diffusers' scheduler and training
    utilities make them."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    x0, noise, t, context = (torch.from_numpy(b[k]) for k in ("x0", "noise", "timestep", "context"))
    t = t.long()
    target = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    each = (
        (unet(scheduler.add_noise(x0, noise, t), t, context).sample - target)
        .square()
        .mean((1, 2, 3))
    )
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        each = each * snr.clamp(max=gamma) / (snr + (prediction == "v_prediction"))
    loss = each.mean()
    loss.backward()
    return unet, loss.detach()


@pytest.mark.parametrize(
    ("prediction", "gamma"), [("epsilon", None), ("epsilon", 5.0), ("v_prediction", 5.0)]
)
def test_a_step_is_diffusers_objective_then_clipped_adamw(sd, prediction, gamma):
    engine = make(
        sd,
        micro=2,
        objective={"predict": prediction, "min_snr": gamma},
        optim={"max_grad_norm": 0.5, "eps": 1e-3},
    )
    state, b = engine.init_state(0), batch(engine)
    unet, loss = reference(sd, b, prediction, gamma)
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5)
    torch.optim.AdamW(unet.parameters(), lr=1e-3, eps=1e-3).step()
    state, metrics = engine.step(state, b, step=0, learning_rate=1e-3, ema=None, seed=0)
    [values] = engine.fetch_metrics(state, [metrics])
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    ours = dict(engine.snapshot(state))["model"]
    for name, p in unet.named_parameters():
        np.testing.assert_allclose(
            ours[name], p.detach().numpy(), rtol=0, atol=1e-6, err_msg=name
        )  # with this eps Adam is smooth where a gradient is tiny


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_update_after_clipping_has_the_norm_that_was_asked_for(sd, kind):
    engine = make(
        sd,
        adapter={"kind": kind},
        optim={"max_grad_norm": 1e-3, "betas": [0.0, 0.0], "eps": 1e3, "weight_decay": 0.0},
    )
    state = engine.init_state(0)
    before = state.parameters.flat.detach().clone()
    [values] = steps(
        engine, state, 1, learning_rate=1e6
    )  # with such an epsilon Adam's update is the clipped gradient itself, times lr / eps
    assert values["grad_norm"] > 0.01
    update = (before - state.parameters.flat.detach()) / 1e3
    assert update.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("kind", "dropout"), [("full", 0.0), ("lora", 0.0), ("lora", 0.3)])
def test_micro_batches_change_rounding_only(sd, kind, dropout):
    norms = []
    for micro in (4, 2, 1):
        engine = make(sd, micro=micro, adapter={"kind": kind, "dropout": dropout})
        norms.append([v for m in steps(engine, engine.init_state(3), 3) for v in m.values()])
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    np.testing.assert_allclose(norms[2], norms[0], rtol=1e-5)


@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora", "dropout": 0.3}])
def test_gradient_checkpointing_gives_equal_gradients(sd, adapter):
    gradients = []
    for on in (False, True):
        engine = make(sd, engine={"gradient_checkpointing": on}, adapter=adapter)
        state = engine.init_state(0)
        assert state.net.is_gradient_checkpointing is on
        steps(engine, state, 1, learning_rate=0.0)
        gradients.append(state.parameters.flat.grad.clone())
    assert gradients[0].norm() > 0
    np.testing.assert_allclose(
        gradients[1].numpy(),
        gradients[0].numpy(),
        rtol=1e-6,
        atol=1e-6 * gradients[0].abs().max().item(),
    )


@pytest.mark.parametrize("offload", [False, True])
def test_the_average_is_diffusers_emamodel(sd, offload):
    from limner.diffusion.schedules import ema_decay

    engine = make(sd, optim={"ema": 0.5, "ema_offload": offload})
    state = engine.init_state(0)
    average = EMAModel([torch.nn.Parameter(state.parameters.flat.detach().clone())], decay=0.5)
    for step in range(4):
        steps(engine, state, 1, first=step, ema=ema_decay(step, 0.5))
        average.step([torch.nn.Parameter(state.parameters.flat.detach().clone())])
    assert not torch.equal(state.ema, state.parameters.flat)
    np.testing.assert_allclose(
        state.ema.numpy(), average.shadow_params[0].detach().numpy(), rtol=1e-6, atol=1e-7
    )


def test_dream_is_diffusers_dream(sd):
    engine = make(sd, objective={"dream": 2.0})
    state, b = engine.init_state(0), batch(engine)
    scheduler = DDPMScheduler.from_pretrained(sd, subfolder="scheduler")
    x0, noise, t, context = (torch.from_numpy(b[k]) for k in ("x0", "noise", "timestep", "context"))
    t = t.long()
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").train()
    noisy, target = compute_dream_and_update_latents(
        unet, scheduler, t, noise, scheduler.add_noise(x0, noise, t), noise, context, 2.0
    )
    want = (unet(noisy, t, context).sample - target).square().mean((1, 2, 3))
    plain = engine.losses(state, b, average=False)  # what is watched is the plain loss
    state, metrics = engine.step(state, b, step=0, learning_rate=0.0, ema=None, seed=0)
    [values] = engine.fetch_metrics(state, [metrics])
    assert values["loss"] == pytest.approx(want.mean().item(), rel=1e-5)
    assert abs(plain.mean() - values["loss"]) > 0.01


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("where", ["x0", "context", "weight"])
def test_what_is_not_finite_never_reaches_weights_or_average(sd, kind, where):
    engine = make(sd, adapter={"kind": kind}, optim={"ema": 0.9})
    state = engine.init_state(0)
    steps(engine, state, 1, ema=0.0)
    before = weights(engine, state)
    bad = batch(engine, 1)
    bad[where].reshape(-1)[0] = np.nan if where != "weight" else np.inf
    engine.step(state, bad, step=1, learning_rate=1e-3, ema=0.5, seed=0)
    assert same(before, weights(engine, state))
    with pytest.raises(NonFiniteStep) as caught:
        steps(engine, state, 1, first=2, ema=0.5)
    assert caught.value.step == 1
    assert all(np.isfinite(a).all() for a in weights(engine, state).values())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_float32_masters_and_learns(sd, kind, precision):
    engine = make(sd, precision=precision, adapter={"kind": kind}, optim={"ema": 0.9})
    state = engine.init_state(0)
    exact = make(sd, adapter={"kind": kind})
    reference_state = exact.init_state(0)
    ours, theirs = steps(engine, state, 4, ema=0.5), steps(exact, reference_state, 4)
    np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in theirs], rtol=3e-2)
    np.testing.assert_allclose(
        [m["grad_norm"] for m in ours], [m["grad_norm"] for m in theirs], rtol=0.1
    )
    assert state.parameters.flat.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in state.net.parameters() if p.requires_grad)
    assert ours[0]["loss"] != theirs[0]["loss"]  # it really was computed in another precision


def test_a_scaler_overflow_is_no_fault_and_its_state_is_saved(sd):
    engine = make(sd, precision="fp16", optim={"ema": 0.9})
    state = engine.init_state(0)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**26})
    before = weights(engine, state)
    steps(engine, state, 1, ema=0.5)
    after = weights(engine, state)
    assert same(
        {k: v for k, v in before.items() if not k.startswith(("scaler", "optimizer"))},
        {k: v for k, v in after.items() if not k.startswith(("scaler", "optimizer"))},
    )
    assert after["scaler/scale"] == 2.0**25
    trained = {name: array for name, array in before.items() if name.startswith("model")}
    for step in range(1, 16):
        steps(engine, state, 1, first=step, ema=0.5)
        if moved := not same(
            trained,
            {name: array for name, array in weights(engine, state).items() if name in trained},
        ):
            break
    assert moved
    twin = engine.init_state(1)
    groups = dict(engine.snapshot(state))
    engine.restore(twin, groups.__getitem__)
    assert same(weights(engine, state), weights(engine, twin))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_restore_is_the_inverse_of_snapshot_and_refuses_strangers(sd, kind):
    engine = make(
        sd, adapter={"kind": kind, "dropout": 0.1 if kind == "lora" else 0.0}, optim={"ema": 0.9}
    )
    state = engine.init_state(0)
    steps(engine, state, 3, ema=0.5)
    groups = copy.deepcopy(dict(engine.snapshot(state)))
    twin = engine.restore(engine.init_state(5), groups.__getitem__)
    assert same(weights(engine, state), weights(engine, twin))
    steps(engine, state, 2, first=3, ema=0.5), steps(engine, twin, 2, first=3, ema=0.5)
    assert same(weights(engine, state), weights(engine, twin))
    name = next(iter(groups["model"]))
    for change in (
        {name: groups["model"][name][..., :1]},
        {name: groups["model"][name].astype(np.float64)},
        {"stranger": np.zeros(1, np.float32)},
    ):
        with pytest.raises(IntegrityError):
            engine.restore(
                engine.init_state(5),
                lambda g, c=change: {**groups[g], **c} if g == "model" else groups[g],
            )


def test_looking_moves_nothing(sd):
    engine = make(sd, optim={"ema": 0.9}, adapter={"kind": "lora", "dropout": 0.2})
    quiet, watched = engine.init_state(0), engine.init_state(0)
    for step in range(3):
        steps(engine, quiet, 1, first=step, ema=0.5)
        steps(engine, watched, 1, first=step, ema=0.5)
        engine.losses(watched, batch(engine, 99), average=True)
        engine.losses(watched, batch(engine, 99), average=False)
        [picture] = engine.draw_previews(
            watched, ["red circle"], [step], steps=2, guidance_scale=3.0, size=32
        )
        assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
        dict(engine.snapshot(watched))
    assert same(weights(engine, quiet), weights(engine, watched))


def test_losses_with_the_average_use_the_average(sd):
    engine = make(sd, optim={"ema": 0.9})
    state = engine.init_state(0)
    b = batch(engine, 7)
    first = engine.losses(state, b, average=False)
    steps(engine, state, 3, ema=0.999)
    assert (
        np.abs(engine.losses(state, b, average=True) - first).max()
        < 0.1 * np.abs(engine.losses(state, b, average=False) - first).max()
    )


def test_lora_starts_from_the_base_and_from_the_same_values_everywhere(sd):
    full, lora = make(sd), make(sd, adapter={"kind": "lora", "rank": 2, "alpha": 6.0})
    b = batch(full)
    state = lora.init_state(11)
    np.testing.assert_array_equal(
        full.losses(full.init_state(0), b, average=False), lora.losses(state, b, average=False)
    )
    assert same(weights(lora, state), weights(lora, lora.init_state(11)))
    assert not same(weights(lora, state), weights(lora, lora.init_state(12)))
    names = list(dict(lora.snapshot(state))["model"])
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names)
    assert {n.rsplit(".lora_", 1)[0].split(".")[-1] for n in names} == {"to_q", "to_k", "to_v", "0"}
    module = next(m for m in state.net.modules() if hasattr(m, "scaling"))
    assert module.scaling["default"] == 3.0
    with pytest.raises(InputError, match="no module named to_x"):
        make(sd, adapter={"kind": "lora", "targets": ["to_x"]}).init_state(0)


class EightBit(torch.optim.Optimizer):
    """What bitsandbytes' AdamW keeps of a parameter, in a simple optimizer: a number of 8 bits for
    each number, a largest one for each block of 256, a table, and a count."""

    def __init__(self, parameters, lr, **others):
        super().__init__(parameters, {"lr": lr})
        assert all(len(p) >= 4096 for p in self.param_groups[0]["params"]), "moments of 32 bits"

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            memory = self.state[p] or {
                "step": 0,
                "state1": torch.zeros(len(p), dtype=torch.uint8),
                "absmax1": torch.zeros(len(p) // 256),
                "qmap1": torch.linspace(-1, 1, 256),
            }
            old = memory["qmap1"][memory["state1"].long()].view(-1, 256)
            moment = 0.9 * old * memory["absmax1"][:, None] + p.grad.view(-1, 256)
            largest = moment.abs().amax(1)
            share = (moment / largest.clamp(min=1e-30)[:, None] + 1) * 127.5
            p -= self.param_groups[0]["lr"] * moment.sign().flatten()
            self.state[p] = {
                "step": memory["step"] + 1,
                "state1": share.round().to(torch.uint8).flatten(),
                "absmax1": largest,
                "qmap1": memory["qmap1"],
            }


def test_an_optimizer_of_8_bits_in_pieces_is_the_one_in_one_piece(sd, monkeypatch):
    """Of the weights, the checkpoint, and a run that goes on from the other's checkpoint."""
    for module in (initial_state, optimizer):
        monkeypatch.setattr(module, "load_adamw8bit", lambda: EightBit)
    engine = make(sd, optim={"kind": "adamw8bit"})
    whole = engine.init_state(0)
    numbers = whole.parameters.flat.numel()
    losses = steps(engine, whole, 2)
    middle = dict(engine.snapshot(whole))
    for most in (numbers // 3 // 256 * 256, numbers - 256):
        monkeypatch.setattr(optimizer, "ADAMW8BIT_MOST", most)
        pieces = engine.init_state(0)
        lengths = [len(p) for p in pieces.optimizer.param_groups[0]["params"]]
        assert 1 < len(lengths) <= 4 and sum(lengths) == numbers and max(lengths) <= most
        assert steps(engine, pieces, 2) == losses
        assert same(weights(engine, pieces), weights(engine, whole))
        resumed = engine.restore(engine.init_state(1), middle.__getitem__)
        assert steps(engine, resumed, 2, first=2) == steps(engine, pieces, 2, first=2)
        assert same(weights(engine, resumed), weights(engine, pieces))


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_is_as_the_recipe_says_whatever_was_said_before(sd, tf32):
    arithmetic.set_precision_of_float32(not tf32)
    make(sd, engine={"tf32": tf32})
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_kernels_repeat_their_bits_where_that_is_asked_for(monkeypatch):
    """On a GPU; the flags can be set without one."""
    try:
        for device, wanted, repeatable in (
            ("cuda", True, True),
            ("cuda", False, False),
            ("cpu", True, False),
        ):
            arithmetic.choose_kernels(torch.device(device), wanted)
            assert torch.are_deterministic_algorithms_enabled() == repeatable
            assert torch.backends.cudnn.deterministic == repeatable
    finally:
        arithmetic.choose_kernels(torch.device("cpu"), False)
    for chosen in (None, ":16:8", ":0:0"):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if chosen is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen)
        settings = EngineSettings(device="cpu", deterministic=True)
        if chosen == ":0:0":
            with pytest.raises(InputError, match=r"engine\.deterministic: .* is ':0:0'"):
                join_processes(settings)
        else:
            join_processes(settings).close()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (chosen or ":4096:8")


def test_what_cannot_run_is_refused_or_said(sd):
    with pytest.raises(InputError, match="adamw8bit"):
        make(sd, optim={"kind": "adamw8bit"}).init_state(0)
    engine = make(sd, engine={"attention": "xformers"})
    state = engine.init_state(0)
    assert len(engine.said) == 1 and "xFormers cannot run here" in engine.said[0]
    plain = make(sd)
    np.testing.assert_array_equal(
        engine.losses(state, batch(engine), average=False),
        plain.losses(plain.init_state(0), batch(plain), average=False),
    )


def test_dropout_is_addressed_by_the_example(sd):
    engine = make(sd, adapter={"kind": "lora", "dropout": 0.5})
    one, other = engine.init_state(0), engine.init_state(0)
    torch.manual_seed(1)
    first = steps(engine, one, 3)
    torch.manual_seed(2)
    assert steps(engine, other, 3) == first
    plain = make(sd, adapter={"kind": "lora"})
    assert steps(plain, plain.init_state(0), 3) != first


def losses_of(engine: TorchEngine, state: TorchState, b: Batch, **options) -> float:
    """The loss of a step that changes nothing."""
    options = {"step": 0, "learning_rate": 0.0, "ema": None, "seed": 0} | options
    _, metrics = engine.step(state, b, **options)
    return engine.fetch_metrics(state, [metrics])[0]["loss"]


@pytest.mark.parametrize("where", ["adapters", "base"])
def test_a_mask_is_the_example_s_and_the_seed_s(sd, tmp_path, where):
    """Not the step's, nor that of the row in which the example lies; of LoRA, and of a network that
    has dropout itself."""
    if where == "adapters":
        engine = make(sd, adapter={"kind": "lora", "dropout": 0.5})
    else:
        engine = make(tiny.stable_diffusion(tmp_path / "sd", dropout=0.5))
    state, b = engine.init_state(0), batch(engine)
    for step in range(2):
        steps(engine, state, 1, first=step)
    loss = losses_of(engine, state, b)
    assert losses_of(engine, state, b, step=7) == loss
    turned = {name: array[::-1] for name, array in b.items()}
    assert losses_of(engine, state, turned) == pytest.approx(loss, rel=1e-6)
    others = [
        losses_of(engine, state, b, seed=1),
        losses_of(engine, state, b | {"position": b["position"] + 1}),
        engine.losses(state, b, average=False).mean(),
    ]
    assert len({loss, *others}) == 4 and min(abs(other / loss - 1) for other in others) > 1e-5


def test_dropout_without_an_address_is_refused(sd, tmp_path):
    """As that inside the attention of a text encoder."""
    base = tmp_path / "sd"
    shutil.copytree(sd, base)
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    make(base, adapter={"kind": "lora"})
    with pytest.raises(InputError, match=r"text_encoder: .* attention_dropout of 0\.1"):
        make(base, adapter={"kind": "lora", "text_encoders": True})


def test_an_input_noise_of_its_own_is_what_the_network_sees(sd):
    engine = make(sd)
    state, b = engine.init_state(0), batch(engine)
    same_noise = engine.losses(state, {**b, "input_noise": b["noise"]}, average=False)
    np.testing.assert_array_equal(same_noise, engine.losses(state, b, average=False))
    assert not np.allclose(
        same_noise, engine.losses(state, {**b, "input_noise": b["noise"] * 2}, average=False)
    )


def test_the_batch_weights_multiply_the_loss(sd):
    engine = make(sd)
    state, b = engine.init_state(0), batch(engine)
    half = {
        **b,
        "weight": replace(make_objective(engine.base.configs["scheduler"], engine.config.objective))
        .at(np.zeros(4), (4, 8, 8))
        .weight
        * 0.5,
    }
    np.testing.assert_allclose(
        engine.losses(state, half, average=False),
        0.5 * engine.losses(state, b, average=False),
        rtol=1e-6,
    )
