"""Nothing of the size of the model is held twice: five flat buffers are all that full fine-tuning
needs, whatever is done with them."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.engines.torch import state as module
from limner.engines.torch.encoders import TorchEncoders
from limner.engines.torch.engine import TorchEngine, TorchState
from limner.engines.torch.processes import TorchProcessGroup
from limner.families.sd import SD

pytestmark = pytest.mark.frameworks


class Largest(TorchDispatchMode):
    """The most numbers that any operation inside has put into memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.numbers = max(self.numbers, out.numel())
        return out


def started(base: Path) -> tuple[TorchEngine, TorchState]:
    cfg = toml.build(
        Config,
        {
            "model": {"base": str(base)},
            "train": {"steps": 2, "batch_size": 2},
            "optim": {"ema": 0.9},
        },
    )
    engine = TorchEngine(cfg, open_base(cfg.model, SD), SD, TorchProcessGroup("cpu", "no"), 2)
    state = engine.init_state(0)
    normal = np.random.default_rng(0).standard_normal
    factors = ("signal_in", "noise_in", "signal_target", "noise_target", "weight", "dream")
    numbers = {"timestep": np.array([3, 700])}
    numbers |= {name: np.ones(2, np.float32) for name in factors}
    batch = {
        "x0": normal((2, 4, 16, 16), np.float32),
        "noise": normal((2, 4, 16, 16), np.float32),
        "context": normal((2, 77, 32), np.float32),
        **numbers,
    }
    state, metrics = engine.step(state, batch, step=0, learning_rate=1e-3, ema=0.5, seed=0)
    engine.fetch_metrics(state, [metrics])
    return engine, state


def test_weights_and_average_change_places_a_piece_at_a_time(sd, monkeypatch):
    monkeypatch.setattr(module, "SWAP_PIECE", 1000)
    engine, state = started(sd)
    weights, average = state.parameters.flat.detach().clone(), state.ema.clone()
    assert not torch.equal(weights, average)
    with Largest() as most, engine.using_average(state, average=True):
        assert torch.equal(state.parameters.flat, average)
    assert torch.equal(state.parameters.flat, weights) and torch.equal(state.ema, average)
    assert most.numbers == 1000


def test_the_network_lives_in_the_flat_buffers(sd):
    _, state = started(sd)
    for flat, tensors in (
        (state.parameters.flat, [p.data for p in state.net.parameters()]),
        (state.parameters.flat.grad, [p.grad for p in state.net.parameters()]),
    ):
        assert {t.untyped_storage().data_ptr() for t in tensors} == {
            flat.untyped_storage().data_ptr()
        }


def test_a_snapshot_on_the_cpu_copies_nothing_of_size(sd):
    engine, state = started(sd)
    with Largest() as most:
        groups = dict(engine.snapshot(state))
    assert most.numbers <= 1
    assert np.shares_memory(
        groups["model"]["conv_in.weight"], state.parameters.flat.detach().numpy()
    )
    assert np.shares_memory(groups["ema"]["conv_in.weight"], state.ema.numpy())


def test_restoring_reads_a_parameter_at_a_time(sd):
    engine, state = started(sd)
    groups = {
        name: {key: array.copy() for key, array in arrays.items()}
        for name, arrays in engine.snapshot(state)
    }
    fresh = engine.init_state(0)
    with Largest() as most:
        engine.restore(fresh, groups.__getitem__)
    assert (
        most.numbers == fresh.parameters.flat.numel()
    )  # each moment's own buffer, and nothing beside it
    assert torch.equal(fresh.parameters.flat, state.parameters.flat)


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_released_encoders_are_gone(sd, name):
    parts = TorchEncoders(open_base(ModelSettings(base=str(sd)), SD), torch.device("cpu"))
    held = weakref.ref(parts.component(name))
    parts.release()
    gc.collect()
    assert held() is None
