"""What holds on a GPU, and how exactly: `make test-gpu`. Elsewhere these tests are skipped."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_engine import batch, reference, same, steps, weights
from test_sdxl import CASES, finished, settings

from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, OptimizerSettings
from limner.engines.torch.engine import TorchEngine
from limner.engines.torch.optimizer import make_optimizer, split_for_adamw8bit
from limner.engines.torch.processes import join_processes
from limner.families.sd import SD

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU: make test-gpu"),
]
REPEATABLE = {"device": "cuda", "deterministic": True}


def make(base: Path, engine: dict[str, object], **sections: object) -> TorchEngine:
    """An engine on the GPU."""
    raw = {"model": {"base": str(base)}, "train": {"steps": 10, "batch_size": 4}, "engine": engine}
    config = toml.build(Config, raw | sections)
    process = join_processes(config.engine)
    return TorchEngine(config, open_base(config.model, SD), SD, process, 4, print)


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_float32_unless_tf32_is_asked_for(base, tf32):
    make(base, {"device": "cuda", "tf32": tf32})
    g = torch.Generator().manual_seed(0)
    picture, kernel = (torch.randn(s, generator=g) for s in ((2, 64, 32, 32), (64, 64, 3, 3)))
    exact = torch.nn.functional.conv2d(picture.double(), kernel.double())
    here = torch.nn.functional.conv2d(picture.cuda(), kernel.cuda()).cpu().double()
    rows = torch.randn(512, 1024, generator=g)
    product = (rows.cuda() @ rows.cuda().T).cpu().double()
    wanted = rows.double() @ rows.double().T
    for found, want in ((here, exact), (product, wanted)):
        error = float((found - want).norm() / want.norm())
        assert (error > 1e-5) == tf32 and error < 1e-2


def test_a_step_is_what_diffusers_computes_on_the_cpu(base):
    engine = make(base, {"device": "cuda"}, optim={"max_grad_norm": 1e9})
    state, b = engine.init_state(0), batch(engine)
    unet, loss = reference(base, b, "epsilon", None)
    row = engine.fetch_metrics(
        state, [engine.step(state, b, step=0, learning_rate=0.0, ema=None, seed=0)[1]]
    )[0]
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    parameters = state.parameters
    gradients = {name: view.cpu() for name, view in parameters.views(parameters.flat.grad).items()}
    wanted = {name: unet.get_parameter(name).grad for name in gradients}
    # Of the whole gradient: a bias before a norm has none but rounding errors.
    far = sum(float((gradients[name] - wanted[name]).square().sum()) for name in gradients)
    whole = sum(float(gradient.square().sum()) for gradient in wanted.values())
    assert (far / whole) ** 0.5 < 1e-4


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_steps_repeat_to_the_bit(base, precision):
    engine = make(base, REPEATABLE | {"precision": precision})
    seen = []
    for _ in range(3):
        state = engine.init_state(0)
        seen.append((steps(engine, state, 4), weights(engine, state)))
    for losses, arrays in seen[1:]:
        assert losses == seen[0][0] and same(arrays, seen[0][1])


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_same_bits_cached_or_not(name, precision, sdxl, tmp_path):
    pictures = tiny.pictures(tmp_path / "pictures", 5, size=(40, 61))
    common = copy.deepcopy(CASES[name])
    common |= {"optim": {"ema": 0.5}, "engine": REPEATABLE | {"precision": precision}}
    seen = []
    for caching, parts in (("off", [4]), ("off", [2, 4]), (str(tmp_path / "cache"), [4])):
        run = tmp_path / f"run-{len(seen)}"
        for count in parts:
            sections = common | {
                "train": {"steps": count, "micro_batch_size": 2},
                "data": common["data"] | {"cache": caching},
            }
            config = settings(sdxl, pictures, run, **sections)
            rows, arrays = finished(config)
        seen.append((rows, arrays))
    assert len([row for row in seen[0][0] if "loss" in row]) == 4
    for rows, arrays in seen[1:]:
        assert rows == seen[0][0] and arrays == seen[0][1]


def test_adamw8bit_in_pieces_is_adamw8bit():
    pytest.importorskip("bitsandbytes")
    kind, ends = OptimizerSettings(kind="adamw8bit"), []
    g = torch.Generator("cuda").manual_seed(0)
    start, gradients = (torch.randn(3, 3 << 16, device="cuda", generator=g) for _ in range(2))
    for most in (1 << 30, 1 << 16):
        flat = torch.nn.Parameter(start[0].clone())
        flat.grad = torch.zeros_like(flat)
        optimizer = make_optimizer(kind, flat)
        optimizer.param_groups[0]["params"] = split_for_adamw8bit(flat, most)
        for gradient in gradients:
            flat.grad.copy_(gradient)
            optimizer.step()
        ends.append(flat.detach().cpu())
    assert torch.equal(*ends) and not torch.equal(ends[0], start[0].cpu())


def test_adamw8bit_reaches_the_end_of_a_buffer_of_sdxl():
    """Above 2**31 - 1 numbers bitsandbytes itself ends the process."""
    pytest.importorskip("bitsandbytes")
    count = 2_567_500_032
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GiB")
    flat = torch.nn.Parameter(torch.zeros(count, device="cuda"))
    flat.grad = torch.ones_like(flat)
    optimizer = make_optimizer(OptimizerSettings(kind="adamw8bit", learning_rate=1e-3), flat)
    optimizer.step()
    for start in (0, 1 << 30, 1 << 31, count - 1024):
        moved = flat.detach()[start : start + 1024].cpu().numpy()
        np.testing.assert_allclose(moved, -1e-3, rtol=1e-3)
