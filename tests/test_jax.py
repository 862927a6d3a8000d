"""The JAX engine computes what PyTorch does: networks, gradients, features and pictures."""

import gc
import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from haste import compiled_in_haste
from jax_runs import float32_products, opened, settings  # noqa: F401

from limner import engines
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.engines.jax import clip, unet, vae, weights
from limner.engines.jax.nn import Params
from limner.engines.jax.tokenizer import WordTokenizer
from limner.errors import InputError
from limner.families import FAMILIES
from limner.protocols import ModelSource

pytestmark = pytest.mark.frameworks

jax = pytest.importorskip("jax")


DRAWS = np.random.default_rng(0)
TPU = SimpleNamespace(platform="tpu")


def normal(*shape: int) -> np.ndarray:
    return DRAWS.standard_normal(shape, np.float32)


def tensors(value: Any) -> Any:
    import torch

    return (
        {k: torch.tensor(v) for k, v in value.items()}
        if isinstance(value, dict)
        else torch.tensor(value)
    )


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that compiles sooner: one level, whose middle alone looks at the caption."""
    folder = tmp_path_factory.mktemp("shallow") / "sd"
    return tiny.stable_diffusion(folder, channels=(96,), attention=False)


@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.soak), "sdxl"])
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

    def forward(arrays: Any, x: Any, t: Any, remat: bool = False) -> Any:
        given = {"sample": x, "timestep": t, **inputs, "encoder_attention_mask": mask}
        return unet.unet(Params(arrays), known, given, remat=remat)

    def loss(arrays: Any, t: Any) -> Any:
        made = forward(arrays, x, t, remat=True)
        return jax.numpy.square(made - goal).mean(), made

    with compiled_in_haste():
        value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, made), gradient = value_and_gradient(arrays, t)
        (_, moved), _ = value_and_gradient(arrays, t + 200)
        half = jax.jit(forward)(arrays, x.astype(jax.numpy.bfloat16), t)
    plain = np.asarray(made)
    assert np.abs(plain - said.detach().numpy()).max() < 1e-5
    wanted = {name: p.grad.numpy() for name, p in net.named_parameters()}
    assert (
        gradient.keys() == wanted.keys()
        and sum(np.abs(g).max() > 0 for g in wanted.values()) > len(wanted) - 4
    )
    assert max(np.abs(np.asarray(gradient[name]) - g).max() for name, g in wanted.items()) < 1e-6
    half = np.asarray(half, np.float32)
    assert np.linalg.norm(half - plain) < 3e-2 * np.linalg.norm(plain)
    assert np.abs(np.asarray(moved) - plain).max() > 1e-3, "the timestep is not felt"


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
    with compiled_in_haste():
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
    no_place = "no place in the unet"
    for arrays, reason in (
        ({a: down}, no_place),
        ({a: normal(2, 65), b: up}, no_place),
        ({a: down, b: up, f"unet.{stem}.lora_magnitude_vector": normal(64)}, "it is DoRA"),
        ({conv.format("A"): normal(2, 32, 3, 3), conv.format("B"): normal(32, 2, 1, 1)}, no_place),
    ):
        with pytest.raises(InputError, match=reason):
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
    with compiled_in_haste():
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
        with compiled_in_haste():
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


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.soak)])
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
    shallow: Path, pictures: Path, tmp_path: Path
) -> None:
    drawn = []
    for kind in ("torch", "jax"):
        cfg = settings(shallow, pictures, tmp_path / kind, kind, optim={"ema": None})
        process = engines.join_processes(cfg.engine)
        engine = engines.open_engine(cfg, opened(shallow, "sd"), FAMILIES["sd"], process, 2, print)
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
    started = []
    monkeypatch.setattr(
        pipeline.Pipeline,
        "draw_from_noise",
        lambda self, prompts, noise, **call: started.append(noise) or np.zeros((2, 8, 8, 3)),
    )
    own.draw(["a"] * 2, [1, 2], steps=1, guidance_scale=1.0, size=32)
    [noise] = started
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    for row, seed in zip(noise, (1, 2), strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        stock = torch.randn((1, 4, 16, 16), generator=generator, dtype=dtype)
        difference = np.abs(row - stock[0].float().numpy())
        assert row.dtype == np.float32 and difference.max() < limit
        assert precision == "no" or (difference > 0).mean() < 1e-2


def test_previews_are_compiled_once(shallow: Path, pictures: Path, tmp_path: Path) -> None:
    """Whatever the weights have become in between."""
    cfg, compiles = settings(shallow, pictures, tmp_path / "run", "jax", optim={"ema": None}), []
    engine = engines.open_engine(
        cfg, opened(shallow, "sd"), FAMILIES["sd"], engines.join_processes(cfg.engine), 2, print
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
    family: str, shallow: Path, sdxl: Path
) -> None:
    import torch
    from diffusers import AutoPipelineForText2Image

    from limner.compat import flax
    from limner.compat.flax import FlaxStableDiffusionPipeline, FlaxStableDiffusionXLPipeline

    folder = {"sd": shallow, "sdxl": sdxl}[family]
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
