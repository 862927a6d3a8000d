"""The JAX engine computes what PyTorch does: networks, gradients, training curves and pictures; and
it needs no PyTorch for it."""

import gc
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import worker
from haste import compiled_in_haste

import limner
from limner import engines
from limner.base_model.open import open_base
from limner.commands import bench, generate
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.data import contact_sheet
from limner.engines.jax import clip, unet, vae, weights
from limner.engines.jax.nn import Params
from limner.engines.jax.tokenizer import WordTokenizer
from limner.errors import InputError
from limner.families import FAMILIES
from limner.protocols import ModelSource
from limner.storage import checkpoint
from limner.training import loop
from limner.training.stream import Stream

pytestmark = pytest.mark.frameworks

jax = pytest.importorskip("jax")


DRAWS = np.random.default_rng(0)
TPU = SimpleNamespace(platform="tpu")
STEPS = int(
    os.environ.get("CURVE_STEPS", "12")
)  # of the runs that both engines make; `make soak` has 100
HALFWAY = STEPS // 2


@pytest.fixture(autouse=True)
def float32_products():
    """As exact as float32 allows, on whatever device."""
    with jax.default_matmul_precision("highest"):
        yield


def opened(folder: Path, family: str) -> Any:
    return open_base(ModelSettings(base=str(folder), family=family), FAMILIES[family])


def normal(*shape: int) -> np.ndarray:
    return DRAWS.standard_normal(shape, np.float32)


def tensors(value: Any) -> Any:
    import torch

    return (
        {k: torch.tensor(v) for k, v in value.items()}
        if isinstance(value, dict)
        else torch.tensor(value)
    )


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_unet_and_its_gradient(family: str, base: Path, sdxl: Path) -> None:
    from limner.engines.torch.weights import load_component

    found = opened({"sd": base, "sdxl": sdxl}[family], family)
    known, net, arrays = (
        found.configs["unet"],
        load_component(found, "unet").eval(),
        weights.read_component(found, "unet"),
    )
    x, t, context, goal = (
        normal(2, 4, 16, 16),
        np.array([3, 700]),
        normal(2, 9, known["cross_attention_dim"]),
        normal(2, 4, 16, 16),
    )
    added = (
        {"text_embeds": normal(2, 40), "time_ids": 50 * np.abs(normal(2, 6))}
        if family == "sdxl"
        else None
    )
    inputs = {"encoder_hidden_states": context, "added_cond_kwargs": added}
    mask = np.arange(9) < np.array([[9], [5]])
    said = net(
        tensors(x),
        tensors(t),
        tensors(context),
        added_cond_kwargs=added and tensors(added),
        encoder_attention_mask=tensors(mask),
    ).sample
    (said - tensors(goal)).square().mean().backward()

    def loss(arrays: Any) -> Any:
        made = unet.unet(
            Params(arrays),
            known,
            {"sample": x, "timestep": t, **inputs, "encoder_attention_mask": mask},
            remat=True,
        )
        return jax.numpy.square(made - goal).mean(), made

    with compiled_in_haste():
        (_, made), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    assert np.abs(np.asarray(made) - said.detach().numpy()).max() < 1e-5
    wanted = {name: p.grad.numpy() for name, p in net.named_parameters()}
    assert (
        gradient.keys() == wanted.keys()
        and sum(np.abs(g).max() > 0 for g in wanted.values()) > len(wanted) - 4
    )
    assert max(np.abs(np.asarray(gradient[name]) - g).max() for name, g in wanted.items()) < 1e-6

    @jax.jit
    def run(arrays: Any, x: Any, t: Any) -> Any:
        return unet.unet(Params(arrays), known, {"sample": x, "timestep": t, **inputs})

    half = np.asarray(run(arrays, x.astype(jax.numpy.bfloat16), t), np.float32)
    plain, moved = np.asarray(run(arrays, x, t)), np.asarray(run(arrays, x, t + 200))
    assert np.linalg.norm(half - plain) < 3e-2 * np.linalg.norm(plain)
    assert np.abs(moved - plain).max() > 1e-3, "the timestep is not felt"


def test_latents_of_odd_sides(base: Path) -> None:
    """What is made smaller and larger again comes back to the size that it had."""
    import torch

    from limner.engines.torch.weights import load_component

    found = opened(base, "sd")
    x, t, context = normal(1, 4, 9, 7), np.array([500]), normal(1, 9, 32)
    with torch.no_grad():
        said = (
            load_component(found, "unet")
            .eval()(tensors(x), tensors(t), tensors(context))
            .sample.numpy()
        )
    inputs = {"sample": x, "timestep": t, "encoder_hidden_states": context}
    made = jax.jit(lambda a: unet.unet(Params(a), found.configs["unet"], inputs))(
        weights.read_component(found, "unet")
    )
    assert said.shape == (1, 4, 9, 7) and np.abs(np.asarray(made) - said).max() < 1e-5


@pytest.mark.parametrize("tokens", [128, 200])
def test_the_fused_kernel_for_tpus(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated: as near to float32 as plain products in bfloat16 are, gradients too, and where
    tokens are no multiple of what the kernel takes."""
    from jax.experimental.pallas import tpu

    from limner.engines.jax import attention, nn

    monkeypatch.setattr(attention, "LONG", 128)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    exact, goal = [normal(2, tokens, 48) for _ in range(3)], normal(2, tokens, 48)
    served = []

    def kernel(*arrays: Any) -> Any:
        served.append(attention.choose_kernel(TPU, mesh)(*arrays))
        return served[-1]

    def found(kernel: Any, arrays: Any) -> list[np.ndarray]:
        def loss(*arrays: Any) -> Any:
            made = nn.attention(*arrays, 2, kernel=kernel).astype(jax.numpy.float32)
            return (made * goal).sum(), made

        (_, made), gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(a, np.float32) for a in (made, *gradient)]

    half = [jax.numpy.asarray(a, jax.numpy.bfloat16) for a in exact]
    with tpu.force_tpu_interpret_mode():
        ours = found(kernel, half)
    assert len(served) == 1 and served[0] is not None
    for fused, plain, want in zip(ours, found(None, half), found(None, exact), strict=True):
        assert (
            np.linalg.norm(fused - want)
            < max(1.5 * np.linalg.norm(plain - want), 1e-3 * np.linalg.norm(want))
            < 1e-2 * np.linalg.norm(want)
        )
    assert attention.flash(*(a.reshape(2, tokens, 2, 24) for a in exact)) is None


def test_the_fused_kernel_is_lowered_for_a_mesh_of_tpus() -> None:
    """With its gradient, recomputed, in a loop over micro-batches; heads that it does not take are
    left to plain products."""
    from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

    from limner.engines.jax import attention

    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    kernel = attention.choose_kernel(TPU, mesh)

    def loss(*arrays: Any) -> Any:
        return jax.lax.map(
            lambda part: jax.checkpoint(lambda *a: kernel(*a).astype(jax.numpy.float32).sum())(
                *part
            ),
            arrays,
        ).sum()

    rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    assert kernel(*[jax.ShapeDtypeStruct((8, 1100, 2, 160), jax.numpy.bfloat16)] * 3) is None
    for width in (40, 64, 80):
        x = jax.ShapeDtypeStruct((2, 8, 1100, 2, width), jax.numpy.bfloat16, sharding=rows)
        program = (
            jax.jit(jax.grad(loss, (0, 1, 2)))
            .trace(x, x, x)
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
        assert program.count("tpu_custom_call") == 3, (
            "forward, and backward for queries and for keys"
        )


def test_kernels_are_for_devices_that_have_them() -> None:
    from limner.engines.jax.attention import choose_kernel, cudnn

    def card(version: str, capability: str = "8.0") -> Any:
        return SimpleNamespace(
            platform="gpu",
            client=SimpleNamespace(platform_version=version),
            compute_capability=capability,
        )

    assert (
        choose_kernel(card("PJRT C API\ncuda 12090", "8.6")) is cudnn
        and choose_kernel(card("cuda 12090", "10.0")) is cudnn
    )
    assert (
        choose_kernel(card("cuda 12090", "7.5"))
        is choose_kernel(card("rocm 60300", "gfx90a"))
        is choose_kernel(jax.devices()[0])
        is None
    )


def test_loras_of_others(base: Path, tmp_path: Path) -> None:
    """Names that diffusers used to write are read; what there is no code for, does not fit or is
    cut short is refused."""
    from safetensors.numpy import save_file

    stem, path = (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    down, up = normal(2, 64), normal(64, 2)

    def opened_with(arrays: dict[str, np.ndarray]) -> Any:
        save_file(arrays, path)
        return engines.open_pipeline(
            ModelSource(str(base), tmp_path),
            None,
            "jax",
            scheduler=None,
            precision="no",
            device=None,
        )

    nets = opened_with(
        {f"unet.{stem}.lora.down.weight": down, f"unet.{stem}.lora.up.weight": up}
    ).nets
    np.testing.assert_array_equal(nets["unet"].arrays[f"{stem}.lora_B.weight"], up)
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    nets = opened_with(
        {
            f"text_encoder.{text}.lora_linear_layer.{k}.weight": normal(*s)
            for k, s in (("down", (2, 32)), ("up", (32, 2)))
        }
    ).nets
    assert nets["text_encoder"].arrays[f"{text}.lora_A.weight"].shape == (2, 32)
    a, b = f"unet.{stem}.lora_A.weight", f"unet.{stem}.lora_B.weight"
    conv = "unet.down_blocks.0.resnets.0.conv1.lora_{}.weight"
    for arrays in (
        {a: down},
        {a: normal(2, 65), b: up},
        {a: down, b: up, f"unet.{stem}.lora_magnitude_vector": normal(64)},
        {conv.format("A"): normal(2, 32, 3, 3), conv.format("B"): normal(32, 2, 1, 1)},
    ):
        with pytest.raises(InputError, match="no place in the unet"):
            opened_with(arrays)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        engines.open_pipeline(
            ModelSource(str(base), tmp_path),
            None,
            "jax",
            scheduler=None,
            precision="no",
            device=None,
        )


def test_sizes_that_latents_cannot_have_are_refused(base: Path) -> None:
    from limner.engines.jax.pipeline import latent_side

    found = opened(base, "sd")
    assert latent_side(found, None) == 16 and latent_side(found, 30) == 15
    for size in (0, 1, 31):
        with pytest.raises(InputError, match=f"size: {size} pixels are no multiple of 2"):
            latent_side(found, size)


def test_the_autoencoder(base: Path) -> None:
    import torch

    from limner.engines.torch.weights import load_component

    found = opened(base, "sd")
    known, net, arrays = (
        found.configs["vae"],
        load_component(found, "vae").eval(),
        weights.read_component(found, "vae"),
    )
    pixels = np.clip(normal(2, 3, 32, 32), -1, 1)
    with torch.no_grad():
        posterior = net.encode(tensors(pixels)).latent_dist
        shown = net.decode(posterior.mean).sample.numpy()
    mean, std = jax.jit(lambda a: vae.encode(Params(a), known, pixels))(arrays)
    drawn = jax.jit(lambda a: vae.decode(Params(a), known, posterior.mean.numpy()))(arrays)
    assert (
        np.abs(mean - posterior.mean.numpy()).max() < 1e-5
        and np.abs(std - posterior.std.numpy()).max() < 1e-5
    )
    assert np.abs(drawn - shown).max() < 1e-5


@pytest.mark.parametrize("skip", [0, 1])
def test_the_text_encoders(skip: int, base: Path, sdxl: Path) -> None:
    import torch

    from limner.engines.torch.encoders import run_text_encoder
    from limner.engines.torch.weights import load_component

    for family, name in (
        ("sd", "text_encoder"),
        ("sdxl", "text_encoder"),
        ("sdxl", "text_encoder_2"),
    ):
        found = opened({"sd": base, "sdxl": sdxl}[family], family)
        known, arrays = found.configs[name], weights.read_component(found, name)
        ids = DRAWS.integers(0, known["vocab_size"] - 2, (3, 77))
        ids[0, 5:], ids[1, 70:] = known["eos_token_id"], known["eos_token_id"]
        with torch.no_grad():
            states, pooled = run_text_encoder(
                load_component(found, name).eval(), torch.tensor(ids), skip
            )
        made = jax.jit(
            lambda a, known=known, name=name, ids=ids: clip.encode_text(
                Params(a), known, ids, skip, name.endswith("2")
            )
        )(arrays)
        assert (
            np.abs(made[0] - states.numpy()).max() < 1e-5
            and np.abs(made[1] - pooled.numpy()).max() < 1e-5
        )


def test_the_tokenizer(base: Path, sdxl: Path, tmp_path: Path) -> None:
    """With tokenizer.json and from the two old files alone; another padding; every script of the
    world."""
    from transformers import CLIPTokenizer

    chance = random.Random(0)
    ranges = ((32, 127), (160, 0x2000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    texts = [
        "",
        "a red circle",
        " It's  naïve, “quotes” 12345 é́ \n tabs\t x",
        "<|endoftext|> inside",
        "THEY'LL",
        "a" * 500,
        "ﬁ İ",
    ]
    texts += [
        "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(20))
        for _ in range(200)
    ]
    for i, folder in enumerate((base / "tokenizer", sdxl / "tokenizer_2")):
        known, stock = (
            json.loads((folder / "tokenizer_config.json").read_text()),
            CLIPTokenizer.from_pretrained(folder),
        )
        old = tmp_path / str(i)
        old.mkdir()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / name, old)
        want = stock(texts, truncation=False, verbose=False).input_ids
        for place in (folder, old):
            words = WordTokenizer(place, known)
            assert words.encode(texts) == want
            assert (words.pad, words.limit) == (stock.pad_token_id, 77)


def test_encoders_give_the_features_that_torch_gives(base: Path, sdxl: Path) -> None:
    import torch

    from limner.engines.jax.encoders import JaxEncoders
    from limner.engines.torch.encoders import TorchEncoders
    from limner.families.text import encode_captions, tokenize

    captions = ["a red circle", "", "words " * 100]
    for family, folder in (("sd", base), ("sdxl", sdxl)):
        found, record = opened(folder, family), FAMILIES[family]
        ours, theirs = JaxEncoders(found), TorchEncoders(found, torch.device("cpu"))
        for chunks in (1, 2):
            a, b = (
                encode_captions(record.text, parts, tokenize(record.text, parts, captions, chunks))
                for parts in (ours, theirs)
            )
            assert a.keys() == b.keys()
            assert all(
                np.abs(a[name].astype(np.float32) - b[name].astype(np.float32)).max() < 1e-5
                for name in a
            )
        assert ours.list_token_ids("tokenizer", captions) == theirs.list_token_ids(
            "tokenizer", captions
        )
        pixels = np.clip(normal(2, 3, 32, 32), -1, 1)
        assert all(
            np.abs(a - b).max() < 1e-5
            for a, b in zip(
                ours.encode_vae("vae", pixels), theirs.encode_vae("vae", pixels), strict=True
            )
        )


def settings(
    base: Path,
    pictures: Path,
    run: Path,
    by: str,
    family: str = "sd",
    kind: str = "full",
    **sections: Any,
) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base), "family": family},
        "engine": {"kind": by},
        "data": {
            "folder": str(pictures),
            "size": 32,
            "flip": True,
            "drop_caption": 0.3,
            "threads": 1,
        },
        "adapter": {
            "kind": kind,
            "text_encoders": kind == "lora" and family == "sdxl",
            "rank": 3,
            "alpha": 6.0,
            "dropout": 0.1 if kind == "lora" and family == "sdxl" else 0.0,
        },
        "optim": {"learning_rate": 1e-5, "ema": 0.9},
        "objective": {"min_snr": 5.0},
        "train": {"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, "seed": 3},
        "log": {"every": 1},
        "validation": {"hold_out": 2, "every": HALFWAY, "timesteps": 2},
        "checkpoint": {"every": HALFWAY},
    }
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


def trained(cfg: Config) -> dict[str, list[float]]:
    run = loop.run_training(cfg, report=lambda line: None)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        name: [row[name] for row in rows if name in row]
        for name in ("loss", "grad_norm", "held_out_loss")
    }


@pytest.fixture(scope="module")
def pair(base: Path, sdxl: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of both engines from one recipe, made when they are first asked for."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}

    def runs(family: str, kind: str) -> tuple[dict[str, Any], dict[str, Any], Path, Path]:
        if (family, kind) not in made:
            places = [folder / f"{family}-{kind}-{engine}" for engine in ("torch", "jax")]
            cfgs = [
                settings({"sd": base, "sdxl": sdxl}[family], pictures, place, engine, family, kind)
                for place, engine in zip(places, ("torch", "jax"), strict=True)
            ]
            made[family, kind] = (*map(trained, cfgs), *places)
        return made[family, kind]

    return runs


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("sd", "full"),
        pytest.param("sd", "lora", marks=pytest.mark.soak),
        pytest.param("sdxl", "full", marks=pytest.mark.soak),
        ("sdxl", "lora"),
    ],
)
def test_both_engines_have_one_curve(family: str, kind: str, pair: Any) -> None:
    """With Min-SNR, an average, accumulation; SDXL's LoRA with both text encoders and dropout."""
    ours, theirs = pair(family, kind)[:2]
    assert (
        len(theirs["loss"]) == len(set(theirs["loss"])) == STEPS
        and len(theirs["held_out_loss"]) == 3
    )
    for name, rel in (("loss", 1e-5), ("held_out_loss", 1e-5), ("grad_norm", 2e-5)):
        assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=0)


def losses_with_dropout(
    base: Path, pictures: Path, by: str, micro: int, rate: float
) -> list[float]:
    """The losses of four steps of a LoRA, and the held-out ones of four examples after them."""
    cfg = settings(base, pictures, base, by, kind="lora", adapter={"dropout": rate})
    process, found = engines.join_processes(cfg.engine), opened(base, "sd")
    engine = engines.open_engine(cfg, found, FAMILIES["sd"], process, micro, print)
    state, rows = engine.init_state(3), bench.make_batch(cfg, found.configs, FAMILIES["sd"], 4)
    metrics = []
    for step in range(4):
        batch = rows | {"position": rows["position"] + 4 * step}
        options = {"step": step, "learning_rate": 1e-2, "ema": None, "seed": 3}
        state, of_step = engine.step(state, batch, **options)
        metrics.append(of_step)
    losses = [row["loss"] for row in engine.fetch_metrics(state, metrics)]
    return [*losses, *engine.losses(state, rows, average=False).tolist()]


def test_dropout_is_the_example_s_in_both_engines(pictures: Path, tmp_path: Path) -> None:
    """Whatever the micro-batches are; and none when nothing is learnt."""
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,))
    want = losses_with_dropout(base, pictures, "torch", 4, 0.3)
    for micro in (4, 2, 1):
        got = losses_with_dropout(base, pictures, "jax", micro, 0.3)
        assert got == pytest.approx(want, rel=1e-5, abs=0)
    without = losses_with_dropout(base, pictures, "torch", 4, 0.0)
    # An adapter adds nothing at first.
    assert want[0] == without[0]
    apart = [abs(a / b - 1) for a, b in zip(want[2:], without[2:], strict=True)]
    assert min(apart) > 1e-3


def test_dropout_without_an_address_is_refused(pictures: Path, tmp_path: Path) -> None:
    """That inside the attention of a text encoder that learns, as the PyTorch engine does."""
    base = tiny.stable_diffusion(tmp_path / "sd", channels=(64,))
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.1}))
    cfg = settings(base, pictures, tmp_path, "jax", kind="lora", adapter={"text_encoders": True})
    process = engines.join_processes(cfg.engine)
    with pytest.raises(InputError, match=r"text_encoder: .* attention_dropout of 0\.1"):
        engines.open_engine(cfg, opened(base, "sd"), FAMILIES["sd"], process, 2, print)


@pytest.mark.parametrize(("family", "kind"), [("sd", "full"), ("sdxl", "lora")])
def test_both_engines_leave_the_same_checkpoints_and_results(
    family: str, kind: str, pair: Any
) -> None:
    """Names, shapes and types; and numbers, as far as Adam lets round-off be seen."""
    places = pair(family, kind)[2:]
    for name in (f"checkpoint-{HALFWAY}", f"checkpoint-{STEPS}"):
        one, two = (checkpoint.open_checkpoint(place / name) for place in places)
        files = sorted(
            p.relative_to(one.folder).as_posix() for p in one.folder.rglob("*.safetensors")
        )
        assert files == sorted(
            p.relative_to(two.folder).as_posix() for p in two.folder.rglob("*.safetensors")
        )
        for file in files:
            a, b = one.arrays(file), two.arrays(file)
            assert a.keys() == b.keys() and all(
                (a[k].shape, a[k].dtype) == (b[k].shape, b[k].dtype) for k in a
            )
            if not file.startswith("optimizer"):
                assert max(np.abs(a[k] - b[k]).max() for k in a) < STEPS * 1e-5
    results = [json.loads((place / "result.json").read_text())["files"].keys() for place in places]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("sd", "full"), ("sdxl", "lora"), pytest.param("sd", "lora", marks=pytest.mark.soak)],
)
def test_a_picture_is_the_stock_pipeline_s(family: str, kind: str, pair: Any) -> None:
    """Of JAX's result, in both: the same latents, within 2 of 255."""
    import torch

    found, _ = generate.find_sources(str(pair(family, kind)[3]), None)
    noise, prompts = normal(2, 4, 16, 16), ["a red circle", "a blue one"]
    for name in ("ddim", "unipc"):
        stock = engines.open_pipeline(found, None, scheduler=name, precision="no", device="cpu")
        stock.set_progress_bar_config(disable=True)
        how = {
            "num_inference_steps": 4,
            "guidance_scale": 5.0,
            "height": 32,
            "width": 32,
            "output_type": "np",
        }
        want = stock(prompts, latents=torch.tensor(noise), **how).images * 255
        own = engines.open_pipeline(
            found, None, "jax", scheduler=name, precision="no", device="cpu"
        )
        made = np.stack(own.draw_from_noise(prompts, noise, steps=4, guidance_scale=5.0, size=32))
        assert np.abs(made - want).max() <= 2 and made.std() > 1
        again = np.stack(
            own.draw(
                [*prompts, *prompts], [0, 1, 0, 1], steps=4, guidance_scale=5.0, size=32, batch=3
            )
        )
        np.testing.assert_array_equal(again[:2], again[2:])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_one_seed_is_one_picture_in_both_engines(family: str, base: Path, sdxl: Path) -> None:
    """To 2 of 255, in a batch that is not filled too; another seed is another picture."""
    source = ModelSource(str({"sd": base, "sdxl": sdxl}[family]))
    prompts, seeds = ["a red circle", "a blue one", "red"], [7, 2**32 + 8, 7]
    drawn = []
    for engine in ("torch", "jax"):
        pipeline = engines.open_pipeline(
            source, None, engine, scheduler="ddim", precision="no", device="cpu"
        )
        pictures = engines.draw_pictures(
            pipeline, prompts, seeds, steps=4, guidance_scale=5.0, size=40, batch=2
        )
        drawn.append(np.stack(pictures).astype(int))
    stock, own = drawn
    assert own.shape == (3, 40, 40, 3) and np.abs(own - stock).max() <= 2
    assert np.abs(own[0] - own[1]).max() > 20 and own.std() > 1


def test_previews_start_from_the_same_noise_in_both_engines(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    drawn = []
    for kind in ("torch", "jax"):
        cfg = settings(base, pictures, tmp_path / kind, kind, optim={"ema": None})
        process = engines.join_processes(cfg.engine)
        engine = engines.open_engine(cfg, opened(base, "sd"), FAMILIES["sd"], process, 2, print)
        [picture] = engine.draw_previews(
            engine.init_state(0), ["a red circle"], [5], steps=2, guidance_scale=5.0, size=32
        )
        drawn.append(picture.astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 2 and drawn[0].std() > 1


@pytest.mark.parametrize(("precision", "limit"), [("no", 1e-6), ("bf16", 0.04)])
def test_noise_is_drawn_in_the_type_of_the_stock_pipeline(
    precision: str, limit: float, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from limner.engines.jax import pipeline

    own = engines.open_pipeline(
        ModelSource(str(base)), None, "jax", scheduler=None, precision=precision, device="cpu"
    )
    monkeypatch.setattr(
        pipeline.Pipeline, "draw_from_noise", lambda self, prompts, noise, **settings: [noise]
    )
    [noise] = own.draw(["a"] * 2, [1, 2], steps=1, guidance_scale=1.0, size=32)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    for row, seed in zip(noise, (1, 2), strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        stock = torch.randn((1, 4, 16, 16), generator=generator, dtype=dtype)
        difference = np.abs(row - stock[0].float().numpy())
        assert row.dtype == np.float32 and difference.max() < limit
        assert precision == "no" or (difference > 0).mean() < 1e-2


def test_the_command_draws_with_jax(pair: Any, tmp_path: Path) -> None:
    [made] = limner.generate(
        str(pair("sd", "full")[3]),
        ["a red circle"],
        steps=2,
        size=32,
        engine="jax",
        output=tmp_path,
    )
    assert contact_sheet.read_picture(made).shape == (32, 32, 3)


def test_previews_are_compiled_once(pictures: Path, tmp_path: Path) -> None:
    """Whatever the weights have become in between."""
    base = tiny.stable_diffusion(tmp_path / "base", channels=(96,))
    cfg, compiles = settings(base, pictures, tmp_path / "run", "jax", optim={"ema": None}), []
    engine = engines.open_engine(
        cfg, opened(base, "sd"), FAMILIES["sd"], engines.join_processes(cfg.engine), 2, print
    )
    state = engine.init_state(0)
    # As where there is a fused one: that of pictures is asked for.
    engine.model = replace(engine.model, kernel=lambda q, k, v: None)

    def heard(event: str, seconds: float, **how: Any) -> None:
        compiles.append(event) if event.endswith("backend_compile_duration") else None

    asked: list[int] = []

    def drawn(stop_after: int = 100) -> np.ndarray:
        """A stop is heard after each step of the sampler."""
        asked.clear()

        def check_stop() -> None:
            asked.append(1)
            if len(asked) > stop_after:
                raise InputError("stopped")

        [picture] = engine.draw_previews(
            state, ["a red circle"], [0], check_stop, steps=2, guidance_scale=5.0, size=32
        )
        assert len(asked) == 3  # PNDM asks the network once more
        return picture.astype(float)

    jax.monitoring.register_event_duration_secs_listener(heard)
    one, params, first = drawn(), state["params"], len(compiles)
    state["params"] = {name: 1.5 * a for name, a in params.items()}
    count = len(compiles)
    other = drawn()
    assert count > first > 2 and len(compiles) == count and np.abs(one - other).max() > 5
    with pytest.raises(InputError, match="stopped"):
        drawn(stop_after=0)
    assert len(asked) == 1
    words = {
        name: jax.numpy.asarray(a)
        for name, a in weights.read_component(engine.base, "text_encoder").items()
    }
    engine.pipeline.nets, gone = (
        {"text_encoder": Params(words)},
        weakref.ref(next(iter(words.values()))),
    )
    states = engine.pipeline.encode_text("text_encoder", np.zeros((1, 77), np.int64))[0]
    np.testing.assert_allclose(
        states,
        engine.encoders.encode_text("text_encoder", np.zeros((1, 77), np.int64))[0],
        atol=1e-5,
    )
    compiled = len(compiles)
    engine.pipeline.encode_text("text_encoder", np.ones((1, 77), np.int64))
    jax.monitoring.unregister_event_duration_listener(heard)
    engine.pipeline.nets, words = {}, {}
    gc.collect()
    assert len(compiles) == compiled and gone() is None


def bits(run: Path, step: int) -> dict[str, bytes]:
    found = checkpoint.open_checkpoint(run / f"checkpoint-{step}")
    files = sorted(
        p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*.safetensors")
    )
    return {
        f"{file}:{name}": array.tobytes()
        for file in files
        for name, array in found.arrays(file).items()
    }


@pytest.mark.parametrize(("family", "kind"), [("sd", "full"), ("sdxl", "lora")])
def test_a_resumed_run_ends_with_the_same_bits(
    family: str, kind: str, pair: Any, base: Path, sdxl: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = pair(family, kind)[3]
    shutil.copytree(whole / f"checkpoint-{HALFWAY}", tmp_path / "run" / f"checkpoint-{HALFWAY}")
    loop.run_training(
        settings(
            {"sd": base, "sdxl": sdxl}[family], pictures, tmp_path / "run", "jax", family, kind
        ),
        report=lambda line: None,
    )
    assert bits(tmp_path / "run", STEPS) == bits(whole, STEPS)


def test_a_number_that_is_not_finite_touches_nothing(
    pair: Any, base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limner.errors import NonFiniteError

    batch = Stream.batch

    def poisoned(self: Any, step: int, **how: Any) -> Any:
        found = batch(self, step, **how)
        return (
            found | {"noise": found["noise"] * np.float32(np.inf)} if step == HALFWAY + 2 else found
        )

    whole = pair("sd", "full")[3]
    shutil.copytree(whole / f"checkpoint-{HALFWAY}", tmp_path / "run" / f"checkpoint-{HALFWAY}")
    monkeypatch.setattr(Stream, "batch", poisoned)
    with pytest.raises(
        NonFiniteError, match=f"step {HALFWAY + 3}: the loss or the gradient is not a finite number"
    ):
        loop.run_training(
            settings(
                base,
                pictures,
                tmp_path / "run",
                "jax",
                log={"every": STEPS},
                checkpoint={"every": STEPS},
            ),
            report=lambda line: None,
        )
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == [
        f"checkpoint-{HALFWAY}"
    ]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.soak)])
def test_half_precision(
    precision: str, pair: Any, base: Path, pictures: Path, tmp_path: Path
) -> None:
    """The loss stays near float32's; fp16 scales it and remembers the scale."""
    exact = pair("sd", "full")[1]["loss"]
    with compiled_in_haste():
        got = trained(
            settings(
                base,
                pictures,
                tmp_path / "run",
                "jax",
                train={"steps": 3, "micro_batch_size": 4},
                engine={"precision": precision},
            )
        )
    assert got["loss"] == pytest.approx(exact[:3], rel=3e-2)
    if precision == "fp16":
        scaler = checkpoint.open_checkpoint(tmp_path / "run" / "checkpoint-3").arrays(
            "scaler.safetensors"
        )
        assert scaler["scale"] == 65536.0 and scaler["_growth_tracker"] == 3


WORKER = """
import json, sys
for name in ("torch", "diffusers", "transformers", "accelerate", "peft"):
    sys.modules[name] = None  # importing it fails
from pathlib import Path
from limner.config.schema import Config
from limner.config.toml import build
from limner.training import loop
for raw in json.loads(Path(sys.argv[1]).read_text()):
    loop.run_training(build(Config, raw), report=lambda line: None)
"""


def started(folder: Path, jobs: list[Config], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER)
    (folder / "jobs.json").write_text(json.dumps([toml.to_plain(job) for job in jobs]))
    whole = {
        **os.environ,
        "PYTHONPATH": str(Path(limner.__file__).parent.parent),
        "JAX_PLATFORMS": "cpu",
        **environment,
    }
    command = [sys.executable, str(folder / "worker.py"), str(folder / "jobs.json")]
    return subprocess.Popen(
        command, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(process: subprocess.Popen[str]) -> None:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said


def rows(run: Path, name: str = "loss") -> list[float]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


def together(folder: Path, jobs: list[Config]) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    how = {"LIMNER_PROCESSES": "2", "LIMNER_COORDINATOR": f"127.0.0.1:{port}", **worker.devices(2)}
    return [started(folder / f"p{rank}", jobs, LIMNER_RANK=str(rank), **how) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("[::1]:1234", "::1"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0"),
        ("host.example:8", "host.example"),
        ("10.0.0.1:80", "10.0.0.1"),
        ("", "localhost"),
    ],
)
def test_the_host_of_the_first_process_is_as_sockets_take_it(
    address: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from limner.engines.jax import processes

    monkeypatch.setenv("LIMNER_COORDINATOR", address)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert processes.initialize() == host


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_eight_devices_two_processes_and_back(again: bool, pictures: Path, tmp_path: Path) -> None:
    """Of a UNet of one level, which compiles sooner.

    One curve on 1 device, on 8 with weights divided over 4 of them, on 2 processes; a run goes from
    1 to 8 to 1, or on with the same bits on as many as before (``again``); none of it with
    PyTorch."""

    def job(
        name: str, engine: dict[str, Any], steps: int = 6, micro: int = 8, **sections: Any
    ) -> Config:
        common = {
            "train": {"steps": steps, "batch_size": 8, "micro_batch_size": micro},
            "checkpoint": {"every": 3},
            "engine": engine,
        }
        return settings(base, pictures, tmp_path / name, "jax", **common, **sections)

    base = tiny.stable_diffusion(tmp_path / "base", channels=(96,))
    one = trained(job("one", {}))
    trained(job("moving", {}, 2))
    wide = (
        [
            job("wide", {"fsdp": 4}),
            job("wide again", {"fsdp": 4}, 3),
            job("wide again", {"fsdp": 4}),
        ]
        if again
        else []
    )
    done(started(tmp_path / "eight", [job("moving", {"fsdp": 4}, 4), *wide], **worker.devices(8)))
    trained(job("moving", {}))
    drawn = {"preview": {"prompts": ["a red circle"], "steps": 2}}
    two = [job("two", {"fsdp": 2}, micro=4, **drawn)]
    for process in together(
        tmp_path,
        [*two, *(job("two again", {"fsdp": 2}, steps, micro=4) for steps in (3, 6) if again)],
    ):
        done(process)
    for name in ("moving", "two", *(["wide"] if again else [])):
        assert rows(tmp_path / name) == pytest.approx(one["loss"], rel=1e-6, abs=0), name
        assert rows(tmp_path / name, "held_out_loss")[-1] == pytest.approx(
            one["held_out_loss"][-1], rel=1e-6
        )
    for name in ("wide", "two") if again else ():
        assert bits(tmp_path / name, 6) == bits(tmp_path / f"{name} again", 6), name
    [shown] = (tmp_path / "two" / "previews" / "step-000006").glob("*.png")
    found, _ = generate.find_sources(str(tmp_path / "two"), None)
    pipeline = engines.open_pipeline(
        found, None, "jax", scheduler=None, precision="no", device="cpu"
    )
    [picture] = pipeline.draw(["a red circle"], [3], steps=2, guidance_scale=7.5, size=32)
    assert np.abs(contact_sheet.read_picture(shown).astype(int) - picture).max() <= 1
    state = checkpoint.open_checkpoint(tmp_path / "two" / "checkpoint-6")
    assert state.state.world_size == 2
    file = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (
        state.arrays(file),
        checkpoint.open_checkpoint(tmp_path / "one" / "checkpoint-6").arrays(file),
    )
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5


def test_what_one_of_two_processes_finds_is_said_once(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    """A refusal of the first one reaches the second, and nobody waits for ever."""
    pictures = shutil.copytree(pictures, tmp_path / "pictures")
    (pictures / "003.png").write_bytes(b"no picture")
    both = together(
        tmp_path,
        [
            settings(
                base,
                pictures,
                tmp_path / "run",
                "jax",
                train={"steps": 2, "batch_size": 4, "micro_batch_size": 2},
            )
        ],
    )
    said = [process.communicate(timeout=200)[0] for process in both]
    assert all(process.returncode == 1 for process in both)
    assert all("InputError" in text and "003.png" in text for text in said)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"engine": {"devices": 4}},
            r"engine\.devices: 4 devices are asked for, 1 are there \(cpu\)",
        ),
        ({"engine": {"fsdp": 2}}, r"engine\.fsdp: 2 does not divide the 1 devices"),
        ({"engine": {"device": "tpu"}}, r"engine\.device: 'tpu' is not there"),
        (
            {"engine": {"compile_cache": "/proc/nowhere"}},
            r"engine\.compile_cache: /proc/nowhere cannot be written",
        ),
        ({"optim": {"kind": "adamw8bit"}}, r"optim\.kind: adamw8bit is bitsandbytes'"),
        (
            {"adapter": {"kind": "lora", "targets": ["nothing"]}},
            r"adapter\.targets: the unet has no module named nothing",
        ),
        (
            {"optim": {"ema": 0.9, "ema_offload": True}},
            r"optim\.ema_offload: the JAX engine divides the average",
        ),
        (
            {"adapter": {"kind": "lora", "targets": ["conv1"]}},
            r"adapter\.targets: .*conv1 is no linear layer",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    sections: dict[str, Any], message: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        loop.run_training(
            settings(base, pictures, tmp_path, "jax", **sections), report=lambda line: None
        )


def test_rows_that_a_mesh_cannot_divide_are_refused(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    cfg = settings(base, pictures, tmp_path, "jax")
    process = engines.join_processes(cfg.engine)
    process.mesh = SimpleNamespace(size=3)  # type: ignore[attr-defined]
    with pytest.raises(
        InputError,
        match=r"train\.micro_batch_size: a micro-batch of 2 rows \(2 for each of 1 processes\) "
        r"cannot be divided among 3 devices",
    ):
        engines.open_engine(cfg, opened(base, "sd"), FAMILIES["sd"], process, 2, print)


def test_large_arrays_are_divided_and_the_small_ones_lie_together_everywhere(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    from jax.sharding import AbstractMesh

    from limner.engines.jax.layout import SMALL

    cfg = settings(base, pictures, tmp_path, "jax")
    engine = engines.open_engine(
        cfg, opened(base, "sd"), FAMILIES["sd"], engines.join_processes(cfg.engine), 2, print
    )
    engine.mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    shapes = {
        "long": (96, 1024),
        "odd": (8192, 9),
        "none": (255, 1023),
        "little": (32, 64),
        SMALL: (1 << 20,),
    }
    specs = {name: tuple(engine.sharding(name, shape).spec) for name, shape in shapes.items()}
    assert specs == {
        "long": (None, "fsdp"),
        "odd": ("fsdp", None),
        "none": (None, None),
        "little": (None, None),
        SMALL: (None,),
    }


def test_kandinsky_is_not_trained_yet(kandinsky: Path, pictures: Path, tmp_path: Path) -> None:
    raw = {
        "run": str(tmp_path),
        "model": {"base": str(kandinsky / "prior"), "family": "kandinsky22-prior"},
        "data": {"folder": str(pictures)},
    }
    raw |= {"train": {"steps": 1, "batch_size": 1}, "engine": {"kind": "jax"}}
    with pytest.raises(
        InputError, match="does not train a PriorTransformer of family 'kandinsky22-prior' yet"
    ):
        loop.run_training(toml.build(Config, raw), report=lambda line: None)


def test_strange_and_missing_arrays_are_listed(base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "sd"
    shutil.copytree(base, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(path)
    moved = arrays.pop("conv_in.weight")
    save_file(arrays | {"conv_inn.weight": moved}, path)
    with pytest.raises(
        InputError,
        match=r"1 array is missing: conv_in\.weight; 1 array has no place in the model: "
        r"conv_inn\.weight",
    ):
        weights.read_component(opened(folder, "sd"), "unet")
    save_file(arrays | {"conv_in.weight": moved[:, :3].copy()}, path)
    with pytest.raises(
        InputError, match=r"conv_in\.weight is \[32, 3, 3, 3\], \[32, 4, 3, 3\] is expected"
    ):
        weights.read_component(opened(folder, "sd"), "unet")
    known = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(
        json.dumps(known | {"resnet_time_scale_shift": "scale_shift"})
    )
    with pytest.raises(
        InputError,
        match="no code for this UNet2DConditionModel: resnet_time_scale_shift is 'scale_shift', "
        "'default' is expected",
    ):
        weights.read_component(opened(folder, "sd"), "unet")


def test_half_and_sharded_weights_are_read(base: Path, sd_fp16: Path) -> None:
    found = open_base(ModelSettings(base=str(sd_fp16), variant="fp16"), FAMILIES["sd"])
    assert len(found.weight_files("unet")) > 1
    ours, plain = (
        weights.read_component(found, "unet"),
        weights.read_component(opened(base, "sd"), "unet"),
    )
    assert ours.keys() == plain.keys() and all(a.dtype == np.float32 for a in ours.values())
    assert max(np.abs(ours[name] - plain[name]).max() for name in ours) < 1e-2


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.soak)])
def test_the_old_pipeline_draws_what_the_stock_one_draws(
    family: str, base: Path, sdxl: Path
) -> None:
    import torch
    from diffusers import AutoPipelineForText2Image

    from limner.compat import flax
    from limner.compat.flax import FlaxStableDiffusionPipeline, FlaxStableDiffusionXLPipeline

    folder = {"sd": base, "sdxl": sdxl}[family]
    pipe, params = {
        "sd": FlaxStableDiffusionPipeline,
        "sdxl": FlaxStableDiffusionXLPipeline,
    }[family].from_pretrained(str(folder))
    noise, prompts = normal(2, 4, 16, 16), ["a red circle", "blue"]
    stock = AutoPipelineForText2Image.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32}
    want = stock(prompts, latents=torch.tensor(noise), output_type="np", **how).images
    made = pipe(
        pipe.prepare_inputs(prompts), params, jax.random.PRNGKey(0), latents=noise, **how
    ).images
    assert made.shape == (2, 32, 32, 3) and np.abs(np.asarray(made) - want).max() < 2 / 255
    against = pipe.prepare_inputs(["green"] * 2)
    other = pipe(
        pipe.prepare_inputs(prompts),
        params,
        jax.random.PRNGKey(0),
        latents=noise,
        neg_prompt_ids=against,
        **how,
    ).images
    assert np.abs(np.asarray(other) - np.asarray(made)).max() > 1e-3
    with (
        pytest.raises(InputError, match="3 rows cannot be divided among 2 devices"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(jax, "device_count", lambda: 2)
        flax.shard(np.zeros((3, 77)))
