"""Stable Diffusion 3.5: what a step computes is what diffusers' own classes and scheduler compute,
and what it makes loads in the stock pipeline."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from test_sdxl import GENERATE, finished

import limner
from limner import rng
from limner.config import toml
from limner.config.schema import AdapterSettings, Config, ModelSettings
from limner.data import contact_sheet
from limner.engines.torch import lora
from limner.errors import InputError
from limner.families import FAMILIES
from limner.protocols import ModelSource
from limner.training import loop
from limner.training.stream import Stream

pytestmark = pytest.mark.frameworks

SEED, SIZE = 3, 32
SD3 = FAMILIES["sd3"]


def settings(base: Path, pictures: Path, run: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base), "family": "sd3"},
        "data": {"folder": str(pictures), "size": SIZE, "drop_caption": 0.4, "resample": "box"},
        "train": {"steps": 1, "batch_size": 4, "seed": SEED},
        "log": {"every": 1},
    }
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pictures(tmp_path_factory.mktemp("wide") / "pictures", 5, size=(40, 61))


def draw_places(u: Any, density: str) -> Any:
    """Where between noise and signal, by torch's own quantile of the normal distribution."""
    import torch

    if density == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(u))
    if density == "mode":
        return 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def by_hand(
    base: Path, pictures: Path, adapter: AdapterSettings, sigmas: str, density: str
) -> tuple[float, float, np.ndarray]:
    """Loss, gradient norm and noised input of the first step, with diffusers' classes; only the
    draws are Limner's."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    net = pipe.transformer
    if adapter.kind == "lora":
        learned = lora.add_adapters({"transformer": net}, adapter, SD3, SEED)
        move_adapters(learned)
    else:
        learned = dict(net.requires_grad_(True).named_parameters())
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    order = rng.at(SEED, "order", 0).permutation(len(rows))
    latents, noise, places, words, pools = [], [], [], [], []
    for p in range(4):
        row = rows[int(order[p])]
        picture = Image.open(pictures / row["file_name"])
        width = int(SIZE * picture.width / picture.height)
        left = (width - SIZE) // 2
        cut = picture.resize((width, SIZE), Image.Resampling.BOX).crop((left, 0, left + SIZE, SIZE))
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(cut)).latent_dist
        shape = posterior.mean.shape[1:]
        draw = torch.from_numpy(rng.at(SEED, "posterior", p).standard_normal(shape, np.float32))
        sample = (posterior.mean + posterior.std * draw)[0].detach()
        config = pipe.vae.config
        latents.append((sample - config.shift_factor) * config.scaling_factor)
        noise.append(torch.from_numpy(rng.at(SEED, "noise", p).standard_normal(shape, np.float32)))
        u = torch.tensor(rng.uniform(SEED, "timestep", p), dtype=torch.float64)
        places.append(draw_places(u, density))
        drop = rng.uniform(SEED, "drop", p) < 0.4
        embeds, _, pooled, _ = pipe.encode_prompt(
            *["" if drop else row["text"]] * 3, do_classifier_free_guidance=False
        )
        words.append(embeds[0])
        pools.append(pooled[0])
    x0, e, place = torch.stack(latents), torch.stack(noise), torch.stack(places)
    scheduler = pipe.scheduler
    if sigmas == "table":
        timesteps = scheduler.timesteps[(place * 1000).long()]
        noisy = scheduler.scale_noise(x0, timesteps, e)
    else:
        scheduler.set_timesteps(sigmas=(1 - place).tolist())  # it shifts them
        timesteps = scheduler.timesteps
        column = scheduler.sigmas[:-1].view(-1, 1, 1, 1)
        noisy = (1 - column) * x0 + column * e
    made = net(noisy, torch.stack(words), torch.stack(pools), timesteps).sample
    loss = (made - (e - x0)).square().mean()
    loss.backward()
    norms = [p.grad.double().norm() for p in learned.values() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return loss.item(), norm.item(), noisy.numpy()


def move_adapters(named: dict[str, Any]) -> dict[str, Any]:
    """Give both matrices numbers: else the gradient of the first is zero at the start."""
    for name, parameter in named.items():
        if ".lora_B." in name:
            parameter.data += 0.01
    return named


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("sigmas", "density"),
    [("continuous", "logit_normal"), ("table", "logit_normal"), ("continuous", "mode")],
)
def test_a_step_is_what_diffusers_computes(
    sd3: Path, wide: Path, tmp_path: Path, monkeypatch: Any, kind: Any, sigmas: str, density: str
) -> None:
    adapter = AdapterSettings(kind, 3)
    loss, norm, noisy = by_hand(sd3, wide, adapter, sigmas, density)
    add, batch, seen = lora.add_adapters, Stream.batch, []
    monkeypatch.setattr(lora, "add_adapters", lambda *given: move_adapters(add(*given)))
    monkeypatch.setattr(
        Stream,
        "batch",
        lambda self, step, **given: [b := batch(self, step, **given), seen.append(b)][0],
    )
    asked = {"kind": kind} | ({"rank": 3} if kind == "lora" else {})
    flow = {"sigmas": sigmas, "density": density}
    loop.run_training(
        settings(sd3, wide, tmp_path, adapter=asked, objective={"flow": flow}),
        report=lambda line: None,
    )
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    [b] = seen
    made = (
        b["signal_in"][:, None, None, None] * b["x0"]
        + b["noise_in"][:, None, None, None] * b["noise"]
    )
    np.testing.assert_allclose(made, noisy, rtol=1e-5, atol=1e-5)


def test_captions_are_what_the_stock_pipeline_makes_of_them(sd3: Path) -> None:
    """Cut at 77 tokens by both CLIPs and at 256 by T5, which starts with no token of its own."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from limner.base_model.open import open_base
    from limner.engines.torch.encoders import TorchEncoders
    from limner.families.text import encode_captions, tokenize

    captions = ["", "a red circle", "red circle " * 12, "red, " * 200]
    encoders = TorchEncoders(open_base(ModelSettings(str(sd3), "sd3"), SD3), torch.device("cpu"))
    features = encode_captions(SD3.text, encoders, tokenize(SD3.text, encoders, captions, 1))
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            captions, captions, captions, do_classifier_free_guidance=False
        )
    assert features["context"].shape == (4, 77 + 256, 48)
    np.testing.assert_allclose(features["context"], embeds, atol=1e-5)
    np.testing.assert_allclose(features["pooled"], pooled, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_cached_equals_uncached_to_the_bit(
    sd3: Path, wide: Path, tmp_path: Path, kind: str
) -> None:
    common = {
        "adapter": {"kind": kind},
        "train": {"steps": 4, "micro_batch_size": 2},
        "optim": {"ema": 0.9, "learning_rate": 1e-2},
        "validation": {"hold_out": 1, "every": 2, "timesteps": 2},
    }
    curves = [
        finished(
            settings(sd3, wide, tmp_path / str(i), **common, data={"cache": cache, "flip": True})
        )
        for i, cache in enumerate(("off", "memory", str(tmp_path / "cache")))
    ]
    assert curves[0] == curves[1] == curves[2]


def test_results_draw_the_same_in_the_stock_pipeline(sd3: Path, wide: Path, tmp_path: Path) -> None:
    """Full weights with their table of positions, and adapters, in ``StableDiffusion3Pipeline`` and
    in ``limner generate``; both are other pictures than the base's."""
    from diffusers import StableDiffusion3Pipeline

    pictures = [draw_stock(StableDiffusion3Pipeline.from_pretrained(sd3))]
    for kind in ("full", "lora"):
        run = loop.run_training(
            settings(
                sd3,
                wide,
                tmp_path / kind,
                adapter={"kind": kind},
                optim={"learning_rate": 1e-2},
                preview={"prompts": ["a red circle"], "every": 1, "steps": 2},
            ),
            report=lambda line: None,
        )
        pipe = StableDiffusion3Pipeline.from_pretrained(run if kind == "full" else sd3)
        if kind == "lora":
            pipe.load_lora_weights(run)
        pictures.append(draw_stock(pipe))
        drawn = tmp_path / f"drawn-{kind}"
        limner.generate(
            str(run),
            prompts=["a red circle"],
            output=drawn,
            seed=7,
            steps=2,
            size=SIZE,
            guidance_scale=5.0,
            **GENERATE,
        )
        [file] = drawn.glob("*.png")
        made = contact_sheet.read_picture(file).astype(int)
        assert np.abs(made - np.rint(pictures[-1] * 255)).max() <= 1
        assert len(list((run / "previews").rglob("*.png"))) == 2  # first and last
        card = (run / "README.md").read_text()
        assert "StableDiffusion3Pipeline.from_pretrained" in card
    assert all(np.abs(picture - pictures[0]).max() > 1e-3 for picture in pictures[1:])


def draw_stock(pipe: Any) -> np.ndarray:
    """A picture, [height, width, 3] in 0 to 1, as the stock pipeline draws it."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    made: np.ndarray = pipe(
        "a red circle",
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    return made


def test_gradient_checkpointing_and_micro_batches_change_nothing(
    sd3: Path, wide: Path, tmp_path: Path
) -> None:
    losses = []
    for i, (micro, saves) in enumerate(((4, False), (1, False), (2, True))):
        curve, _ = finished(
            settings(
                sd3,
                wide,
                tmp_path / str(i),
                train={"steps": 3, "micro_batch_size": micro},
                engine={"gradient_checkpointing": saves},
            )
        )
        losses.append([row["loss"] for row in curve])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"objective": {"min_snr": 5.0}}, "objective.min_snr: it means nothing to flow matching"),
        ({"objective": {"predict": "epsilon"}}, "objective.predict: it means nothing to family"),
        ({"data": {"size": 30}}, "data.size: 30 pixels are no multiple of 4"),
        (
            {"data": {"size": 128}},
            "data.size: pictures of 128 pixels a side are longer than the 96",
        ),
        (
            {"data": {"size": 64, "buckets": {"step": 16}}},
            "data.buckets.largest: pictures of 128 pixels a side are longer than the 96",
        ),
        ({"data": {"caption_chunks": 2}}, "data.caption_chunks: it means nothing to family"),
        ({"adapter": {"kind": "lora", "text_encoders": True}}, "adapter.text_encoders: it means"),
        ({"engine": {"attention": "math"}}, "engine.attention"),
        ({"engine": {"kind": "jax"}}, "does not train a SD3Transformer2DModel"),
    ],
)
def test_what_means_nothing_is_refused(
    sd3: Path, wide: Path, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as refusal:
        loop.run_training(settings(sd3, wide, tmp_path, **sections), report=lambda line: None)
    assert words in str(refusal.value)


def test_settings_of_a_flow_are_refused_elsewhere(sd: Path, wide: Path, tmp_path: Path) -> None:
    cfg = settings(sd, wide, tmp_path, model={"family": "sd"}, objective={"flow": {"shift": 2.0}})
    with pytest.raises(InputError, match=r"objective.flow: it is for flow matching"):
        loop.run_training(cfg, report=lambda line: None)


def test_another_sampler_is_refused(sd3: Path) -> None:
    """Samplers of noise schedules would draw something else without a word."""
    from limner.engines.torch import pipeline

    with pytest.raises(InputError, match="scheduler: 'ddim' is for noise schedules"):
        pipeline.open_pipeline(
            ModelSource(str(sd3)), None, scheduler="ddim", precision="no", device="cpu"
        )


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vae", {"latent_channels": 4}, "in_channels is 8, the autoencoder's latent_channels is 4"),
        ("text_encoder_3", {"d_model": 64}, "joint_attention_dim is 48, the third text encoder's"),
        ("text_encoder", {"projection_dim": 9}, "pooled_projection_dim is 24, the projection_dim"),
        ("scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
    ],
)
def test_parts_of_other_models_are_refused(
    sd3: Path, wide: Path, tmp_path: Path, part: str, changes: dict[str, Any], words: str
) -> None:
    import shutil

    base = shutil.copytree(sd3, tmp_path / "base")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = base / part / name
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError) as refusal:
        loop.run_training(settings(base, wide, tmp_path / "run"), report=lambda line: None)
    assert words in str(refusal.value)
