"""The bench verb: its figures against counts made by hand, the recipe's settings in them, and no
trace of it left on the disk."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from limner import engines
from limner.base_model.open import open_base
from limner.commands import bench, random_base
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.engines.torch import weights
from limner.engines.torch.engine import TorchEngine
from limner.engines.torch.processes import TorchProcessGroup
from limner.engines.torch.profiler import TorchProfiler
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.published import load_published
from limner.families.sd import SD
from limner.storage.safetensors import read_arrays

pytestmark = pytest.mark.frameworks


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def recipe(model: str, family: str = "sd", **sections) -> Config:
    common = {
        "model": {"base": model, "family": family},
        "data": {"size": 32},
        "engine": {"device": "cpu", "precision": "no"},
        "train": {"steps": 9, "batch_size": 4},
    }
    return toml.build(Config, common | sections)


def measured(cfg: Config, **options) -> tuple[dict, str]:
    said: list[str] = []
    return bench.run_bench(cfg, report=said.append, **options), "\n".join(said)


def count(base: Path, rows: int, *, size: int = 16, train: str = "all") -> float:
    """Operations of one real step with plain attention, whose products the counter knows on every
    device."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor

    net = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    net.set_attn_processor(AttnProcessor())
    net.requires_grad_(train == "all")
    with FlopCounterMode(display=False) as counter:
        out = net(
            torch.randn(rows, 4, size, size), torch.arange(rows), torch.randn(rows, 77, 32)
        ).sample
        if train == "all":
            out.sum().backward()
    return counter.get_total_flops()


def test_the_figures_of_a_recipe(sd, tmp_path):
    engine = {"device": "cpu", "precision": "no", "gradient_checkpointing": True}
    cfg = recipe(
        str(sd),
        train={"steps": 9, "micro_batch_size": 2, "accumulation_steps": 2},
        optim={"ema": 0.99},
        engine=engine,
    )
    figures, text = measured(cfg, steps=3, json_file=tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert (figures["batch"], figures["micro"], figures["accumulate"], figures["processes"]) == (
        4,
        2,
        2,
        1,
    )
    assert figures["tflop_per_step"] * 1e12 == pytest.approx(
        count(sd, 4), rel=1e-12
    )  # checkpointing recomputes; none of that is useful
    times = figures["step_seconds"]
    assert 0 < times["p10"] <= times["median"] <= times["p90"]
    assert figures["images_per_second"] == pytest.approx(4 / times["median"])
    assert figures["mfu_of_matmul"] == pytest.approx(
        figures["tflop_per_step"] / times["median"] / figures["matmul_tflops"]
    )
    assert figures["peak_memory"]["process"] > 50e6 and figures["published_tflops"] is None
    for words in (
        "batch 4 = 1 x 2 x 2, EMA, gradient checkpointing, sdpa attention",
        "(3 steps after 2)",
        str(sd),
        f"torch {torch.__version__}",
        "float32",
    ):
        assert words in text


def test_frozen_weights_need_no_gradient_and_are_counted_so(sd):
    full, _ = measured(recipe(str(sd)), steps=1)
    lora, _ = measured(recipe(str(sd), adapter={"kind": "lora", "rank": 2}), steps=1)
    forward = count(sd, 4, train="none") / 1e12
    assert forward < lora["tflop_per_step"] < full["tflop_per_step"] < 3.01 * forward
    assert lora["kind"] == "lora"


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_jax_counts_the_same_arithmetic(family, kind, sd, sdxl):
    """Its traced program has the products that PyTorch's kernels were counted to have; recomputing
    changes nothing about that."""
    pytest.importorskip("jax")
    base, record = str({"sd": sd, "sdxl": sdxl}[family]), FAMILIES[family]
    counts = []
    for engine in (
        {"kind": "torch"},
        {"kind": "jax", "gradient_checkpointing": True, "precision": "bf16"},
    ):
        cfg = recipe(base, family, adapter={"kind": kind}, engine=engine)
        found, process = open_base(cfg.model, record), engines.join_processes(cfg.engine)
        measure = engines.open_profiler(
            cfg.engine.kind, engines.open_engine(cfg, found, record, process, 2, print)
        )
        counts.append(measure.count_flops(bench.make_batch(cfg, found.configs, record, 4), 2))
    assert counts[0] > 1e9 and counts[1] == pytest.approx(counts[0], rel=1e-12)


def test_a_step_in_jax_is_measured(tmp_path):
    pytest.importorskip("jax")
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,), attention=False)
    figures, text = measured(
        recipe(str(base), adapter={"kind": "lora"}, engine={"kind": "jax"}), steps=2
    )
    assert (
        figures["images_per_second"] == pytest.approx(4 / figures["step_seconds"]["median"])
        and figures["peak_memory"]["process"] > 50e6
    )
    assert figures["mfu_of_matmul"] == pytest.approx(
        figures["tflop_per_step"] / figures["step_seconds"]["median"] / figures["matmul_tflops"]
    )
    assert "batch 4 = 1 x 1 x 4" in text and "jax 0." in text


def test_random_weights_have_one_set_of_names(sd, sdxl):
    """In both engines' eyes, at full size, of every network that both train."""
    pytest.importorskip("jax")
    for known in (load_published("sd")["unet"], load_published("sdxl")["unet"]):
        assert engines.parameter_shapes("jax", known) == engines.parameter_shapes("torch", known)


def test_arithmetic_grows_with_the_batch_and_not_with_the_micro_batch(sd):
    engine = TorchEngine(
        recipe(str(sd)),
        open_base(ModelSettings(base=str(sd)), SD),
        SD,
        TorchProcessGroup("cpu", "no"),
        2,
    )
    four, eight = (
        bench.make_batch(engine.config, engine.base.configs, SD, rows) for rows in (4, 8)
    )
    measure = TorchProfiler(engine).count_flops
    assert measure(four, 2) == measure(four, 4) == measure(eight, 2) / 2


def test_features_have_the_shapes_that_the_configs_promise(sd):
    configs = open_base(ModelSettings(base=str(sd)), SD).configs
    batch = bench.make_batch(recipe(str(sd)), configs, SD, 3)
    shapes = {
        "x0": (3, 4, 16, 16),
        "noise": (3, 4, 16, 16),
        "context": (3, 77, 32),
        "timestep": (3,),
    }
    assert {name: batch[name].shape for name in shapes} == shapes
    assert (
        abs(batch["x0"].std() - 1) < 0.1
    )  # noise in the place of latents, not zeros: arithmetic on zeros is faster on some devices
    at_512 = bench.make_batch(Config(), load_published("sd"), SD, 1)
    assert at_512["x0"].shape == (1, 4, 64, 64) and at_512["context"].shape == (1, 77, 768)


PUBLISHED = {
    "sd": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd3": 2_243_171_520,
    "kandinsky22-prior": 1_026_225_920,
    "kandinsky22-decoder": 1_253_057_288,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stand_ins_are_the_published_networks(family):
    net = weights.build_from_config(load_published(family)[FAMILIES[family].network.component])
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[family]
    assert all(p.is_meta for p in net.parameters())


def test_what_a_batch_of_kandinsky_looks_like():
    prior, decoder = (
        bench.make_batch(Config(), load_published(name), FAMILIES[name], 2)
        for name in ("kandinsky22-prior", "kandinsky22-decoder")
    )
    assert {name: prior[name].shape for name in ("x0", "context", "pooled", "mask")} == {
        "x0": (2, 1280),
        "context": (2, 77, 1280),
        "pooled": (2, 1280),
        "mask": (2, 77),
    }
    assert {name: decoder[name].shape for name in ("x0", "noise", "embedding")} == {
        "x0": (2, 4, 64, 64),
        "noise": (2, 4, 64, 64),
        "embedding": (2, 1280),
    }
    assert "context" not in decoder and prior["mask"].dtype == bool


def test_random_weights_where_the_base_is_not_at_hand(sd, tmp_path, monkeypatch):
    unet = open_base(ModelSettings(base=str(sd)), SD).configs["unet"]
    changed = {
        "unet": unet,
        "text_encoder": {"hidden_size": 32},
        "vae": {"latent_channels": 4, "block_out_channels": [1, 1]},
    }
    published = load_published("sd")
    small = replace(published, components=published.components | changed)
    monkeypatch.setattr(random_base, "load_published", lambda family: small)
    figures, text = measured(recipe("nobody/has-this"), steps=1)
    assert figures["weights"] == "random" and figures["base"] == "Stable Diffusion 1.5"
    assert "random, made for this measurement" in text
    assert list(tmp_path.glob("limner-bench-*")) == []


def test_a_base_in_the_hubs_cache_is_at_hand_when_it_is_whole(sd, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--small"
    shutil.copytree(sd, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    known = ModelSettings(base="somebody/small", cache_dir=str(tmp_path))
    assert random_base.find_local_base(known, SD) == str(repository / "snapshots" / commit)
    assert random_base.find_local_base(replace(known, base="somebody/else"), SD) is None
    next((repository / "snapshots" / commit / "unet").glob("*.safetensors")).unlink()
    assert random_base.find_local_base(known, SD) is None


def test_random_weights_are_drawn_as_layers_start(sd, tmp_path):
    random_base.write_random_component(
        tmp_path / "unet", open_base(ModelSettings(base=str(sd)), SD).configs["unet"]
    )
    arrays, _ = read_arrays(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    whole = arrays["mid_block.resnets.0.conv1.weight"]
    assert abs(whole).max() <= 1 / np.sqrt(64 * 9) and whole.std() == pytest.approx(
        1 / np.sqrt(3 * 64 * 9), rel=0.02
    )
    assert (arrays["conv_norm_out.weight"] == 1).all() and (arrays["conv_norm_out.bias"] == 0).all()


def test_a_damaged_base_is_refused_not_replaced(sd, tmp_path):
    (tmp_path / "broken").mkdir()
    with pytest.raises(InputError, match=r"model_index\.json"):
        measured(recipe(str(tmp_path / "broken")), steps=1)


def test_fewer_than_one_step_is_refused(sd):
    with pytest.raises(InputError, match="--steps: 0 is not above 0"):
        measured(recipe(str(sd)), steps=0)


def test_published_peaks_by_device_and_precision(sd, monkeypatch):
    engine = TorchEngine(
        recipe(str(sd)),
        open_base(ModelSettings(base=str(sd)), SD),
        SD,
        TorchProcessGroup("cpu", "no"),
        4,
    )
    measure = TorchProfiler(engine)
    assert measure.published_peak() is None
    measure.cuda = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert measure.published_peak() == pytest.approx(66.9e12)
    engine.half = torch.bfloat16
    assert measure.published_peak() == pytest.approx(989.4e12)
