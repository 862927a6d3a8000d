"""Stable Diffusion XL: what a step computes is what diffusers' own classes compute, and what it
makes loads in the stock pipeline."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import limner
from limner import rng
from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import AdapterSettings, Config, ModelSettings
from limner.data import contact_sheet
from limner.engines.torch import encoders, initial_state, lora, pipeline
from limner.engines.torch.encoders import TorchEncoders
from limner.engines.torch.pipeline import SCHEDULERS
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.text import encode_captions
from limner.families.text import tokenize as tokenize_all
from limner.protocols import ModelSource
from limner.storage import checkpoint
from limner.training import loop
from limner.training.stream import Stream

pytestmark = pytest.mark.frameworks

SEED, SIZE = 3, 32


def settings(base: Path, pictures: Path, run: Path, **sections: Any) -> Config:
    raw: dict[str, Any] = {"run": str(run), "model": {"base": str(base), "family": "sdxl"}}
    raw |= {
        "data": {
            "folder": str(pictures),
            "size": SIZE,
            "crop": "random",
            "crop_variants": 3,
            "flip": True,
            "drop_caption": 0.4,
            "resample": "box",
        }
    }
    raw |= {
        "train": {"steps": 1, "batch_size": 4, "seed": SEED},
        "log": {"every": 1},
        "objective": {"min_snr": 5.0},
    }
    return toml.build(Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pictures(tmp_path_factory.mktemp("wide") / "pictures", 5, size=(40, 61))


def by_hand(
    base: Path, pictures: Path, adapter: AdapterSettings, zeros: bool
) -> tuple[float, float, np.ndarray, int]:
    """Loss, gradient norm, time ids and number of dropped captions of the first step, with
    diffusers' classes; only the draws are Limner's."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline
    from diffusers.training_utils import compute_snr

    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    nets = {"unet": pipe.unet} | (
        {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        if adapter.text_encoders
        else {}
    )
    learned = (
        lora.add_adapters(nets, adapter, FAMILIES["sdxl"], SEED)
        if adapter.kind == "lora"
        else dict(pipe.unet.requires_grad_(True).named_parameters())
    )
    if adapter.kind == "lora":  # both matrices, else the gradient of the first is zero at the start
        for name, p in learned.items():
            if ".lora_B." in name:
                p.data += 0.01
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    order = rng.at(SEED, "order", 0).permutation(len(rows))
    latents, noise, times, ids, words, pools, dropped = [], [], [], [], [], [], 0
    for p in range(4):
        row = int(order[p])
        picture = Image.open(pictures / rows[row]["file_name"])
        crop, flip = int(rng.uniform(SEED, "crops", p) * 3), rng.uniform(SEED, "flip", p) < 0.5
        width, height = int(SIZE * picture.width / picture.height), SIZE
        left = int(rng.at(SEED, "crop", row, crop + 1).random(2)[1] * (width - SIZE + 1))
        cut = picture.resize((width, height), Image.Resampling.BOX).crop(
            (left, 0, left + SIZE, SIZE)
        )
        seen = left
        if flip:
            cut, seen = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT), width - left - SIZE
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(cut)).latent_dist
        shape = posterior.mean.shape[1:]
        draw = torch.from_numpy(rng.at(SEED, "posterior", p).standard_normal(shape, np.float32))
        latents.append(
            ((posterior.mean + posterior.std * draw) * pipe.vae.config.scaling_factor)[0].detach()
        )
        noise.append(torch.from_numpy(rng.at(SEED, "noise", p).standard_normal(shape, np.float32)))
        times.append(int(rng.uniform(SEED, "timestep", p) * 1000))
        ids.append(
            pipe._get_add_time_ids(
                (picture.height, picture.width), (0, seen), (SIZE, SIZE), torch.float32, 40
            )[0]
        )
        drop = rng.uniform(SEED, "drop", p) < 0.4
        embeds, _, pooled, _ = pipe.encode_prompt(
            "" if drop else rows[row]["text"], do_classifier_free_guidance=False
        )
        words.append(embeds[0] * (0 if drop and zeros else 1))
        pools.append(pooled[0] * (0 if drop and zeros else 1))
        dropped += drop
    scheduler, t = DDPMScheduler.from_config(pipe.scheduler.config), torch.tensor(times)
    noisy = scheduler.add_noise(torch.stack(latents), torch.stack(noise), t)
    told = {"text_embeds": torch.stack(pools), "time_ids": torch.stack(ids)}
    made = pipe.unet(noisy, t, torch.stack(words), added_cond_kwargs=told).sample
    snr = compute_snr(scheduler, t)
    loss = (
        (made - torch.stack(noise)).square().mean((1, 2, 3)) * torch.clamp(snr, max=5) / snr
    ).mean()
    loss.backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.double().norm() for p in learned.values() if p.grad is not None])
    )
    return loss.item(), norm.item(), torch.stack(ids).numpy(), dropped


@pytest.mark.parametrize(
    "adapter",
    [AdapterSettings(), AdapterSettings("lora", 3), AdapterSettings("lora", 3, text_encoders=True)],
    ids=["full", "lora", "texts"],
)
@pytest.mark.parametrize("zeros", [True, False])
def test_a_step_is_what_diffusers_computes(adapter, zeros, sdxl, wide, tmp_path, monkeypatch):
    loss, norm, ids, dropped = by_hand(sdxl, wide, adapter, zeros)
    assert (
        0 < dropped < 4 and len({tuple(row) for row in ids.tolist()}) > 1 and (ids[:, 3] != 8).all()
    )  # off the centre, which is at 8
    asked = {"kind": adapter.kind, "rank": adapter.rank, "text_encoders": adapter.text_encoders}
    add = lora.add_adapters

    def moved(*arguments):
        named = add(*arguments)
        for name, p in named.items():
            if ".lora_B." in name:
                p.data += 0.01
        return named

    monkeypatch.setattr(lora, "add_adapters", moved)
    cut = []
    batch = Stream.batch
    monkeypatch.setattr(
        Stream,
        "batch",
        lambda self, step, **k: [b := batch(self, step, **k), cut.append(b["size_and_crop"])][0],
    )
    loop.run_training(
        settings(
            sdxl,
            wide,
            tmp_path,
            adapter=asked,
            data={"empty_caption": "base" if zeros else "encoded"},
        ),
        report=lambda line: None,
    )
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_array_equal(cut[0], ids)
    assert cut[0].dtype == np.float32
    assert row["loss"] == pytest.approx(loss, rel=1e-5) and row["grad_norm"] == pytest.approx(
        norm, rel=1e-5
    )


def finished(cfg: Config) -> tuple[list[Any], dict[str, bytes]]:
    """The curve without clocks, and the bytes of all arrays of the last checkpoint."""
    run = loop.run_training(cfg, report=lambda line: None)
    rows = [
        {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    found = checkpoint.open_checkpoint(run / f"checkpoint-{cfg.train.steps}")
    files = sorted(
        p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*.safetensors")
    )
    return rows, {
        f"{file}:{name}": array.tobytes()
        for file in files
        for name, array in found.arrays(file).items()
    }


CASES: dict[str, dict[str, Any]] = {
    "full": {"data": {}},
    "lora": {"adapter": {"kind": "lora"}, "data": {"caption_chunks": 2}},
    "buckets and half": {"data": {"buckets": {"step": 8}, "cache_dtype": "float16"}},
    "text encoders": {
        "adapter": {"kind": "lora", "text_encoders": True},
        "data": {"empty_caption": "encoded"},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_cached_equals_uncached_to_the_bit(name, sdxl, tmp_path):
    """With flips, random crops, several captions and caption dropout."""
    captions = [
        [f"a {colour} circle", f"{colour}, number {i}", "words " * 90]
        for i, colour in enumerate(("red", "green", "blue", "grey", "pink"))
    ]
    pictures = tiny.pictures(tmp_path / "pictures", 5, size=(40, 61), captions=captions)
    common = CASES[name] | {
        "train": {"steps": 3, "micro_batch_size": 2},
        "validation": {"hold_out": 1, "every": 2, "timesteps": 2},
        "optim": {"ema": 0.5},
    }
    seen = {}
    for cache in (
        "off",
        "memory",
        str(tmp_path / "cache"),
        str(tmp_path / "cache"),
    ):  # the last one finds all there is
        run = tmp_path / f"run-{len(seen)}"
        cfg = settings(
            sdxl, pictures, run, **{**common, "data": {**common["data"], "cache": cache}}
        )
        seen[run] = finished(cfg)
    first, *others = seen.values()
    assert len([row for row in first[0] if "loss" in row]) == 3 and len(first[1]) > 20
    assert all(other == first for other in others)


def test_encoded_ahead_of_time_training_loads_no_encoder(sdxl, wide, tmp_path, monkeypatch):
    cfg = settings(
        sdxl,
        wide,
        tmp_path / "run",
        data={"cache": str(tmp_path / "cache"), "buckets": {"step": 8}},
    )
    said: list[str] = []
    assert loop.run_training(cfg, report=said.append, only_encode=True) == tmp_path / "cache"
    assert (
        said[-1] == f"{tmp_path / 'cache'}: 24 pictures and 6 captions are encoded"
    )  # 5 pictures, 3 crops of which some coincide, flipped or not
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    loaded: list[str] = []
    monkeypatch.setattr(
        encoders,
        "load_component",
        lambda base, name, load=encoders.load_component: [loaded.append(name), load(base, name)][1],
    )
    monkeypatch.setattr(
        initial_state,
        "load_component",
        lambda base, name, load=encoders.load_component: [loaded.append(name), load(base, name)][1],
    )
    loop.run_training(cfg, report=said.append)
    assert set(loaded) == {"tokenizer", "tokenizer_2", "unet"}


def test_the_cache_knows_content_and_encoders_not_names_or_settings(sdxl, tmp_path, monkeypatch):
    """What is encoded again after: nothing; other settings; a renamed picture; an edited caption;
    other weights at the same place."""
    pictures, base, encoded = (
        tiny.pictures(tmp_path / "pictures", 4, size=(40, 61)),
        tmp_path / "base",
        {"encode_vae": 0, "encode_text": 0},
    )
    shutil.copytree(sdxl, base)
    for name in encoded:
        whole = getattr(TorchEncoders, name)
        monkeypatch.setattr(
            TorchEncoders,
            name,
            lambda *a, name=name, whole=whole, **k: [
                encoded.update({name: encoded[name] + 1}),
                whole(*a, **k),
            ][1],
        )

    def calls(run: str, **sections: Any) -> tuple[bool, bool]:
        encoded.update(encode_vae=0, encode_text=0)
        data = {
            "cache": str(tmp_path / "cache"),
            "crop": "center",
            "crop_variants": None,
            "flip": False,
            **sections.pop("data", {}),
        }
        loop.run_training(
            settings(base, pictures, tmp_path / run, data=data, **sections),
            report=lambda line: None,
        )
        return encoded["encode_vae"] > 0, encoded["encode_text"] > 0

    assert calls("1") == (True, True)
    assert calls(
        "2", optim={"learning_rate": 1e-3}, train={"batch_size": 2}, data={"threads": 1}
    ) == (
        False,
        False,
    )
    (pictures / "000.png").rename(pictures / "moved.png")
    lines = (pictures / "metadata.jsonl").read_text().replace("000.png", "moved.png")
    (pictures / "metadata.jsonl").write_text(lines)
    assert calls("3") == (False, False)
    (pictures / "metadata.jsonl").write_text(lines.replace("a red circle", "a crimson circle"))
    assert calls("4") == (False, True)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert calls("5") == (True, False)
    assert calls("6", data={"cache_dtype": "float16"}) == (True, True)


def test_results_draw_the_same_in_the_stock_pipeline(sdxl, wide, tmp_path):
    """Full weights, and adapters on all three networks, in ``StableDiffusionXLPipeline`` and in
    ``limner generate``."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pictures = []
    for kind in ("full", "lora"):
        asked = {"kind": kind, "text_encoders": kind == "lora"}
        run = loop.run_training(
            settings(sdxl, wide, tmp_path / kind, adapter=asked, optim={"learning_rate": 1e-2}),
            report=lambda line: None,
        )
        pipe = StableDiffusionXLPipeline.from_pretrained(run if kind == "full" else sdxl)
        if kind == "lora":
            pipe.load_lora_weights(run)
        pipe.set_progress_bar_config(disable=True)
        assert kind == "full" or all(
            net.peft_config["default_0"].r == 4
            for net in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
        )
        stock = pipe(
            "a red circle",
            height=32,
            width=32,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images[0]
        limner.generate(
            str(run),
            prompts=["a red circle"],
            output=tmp_path / f"drawn-{kind}",
            seed=7,
            steps=2,
            size=32,
            guidance_scale=5.0,
            **GENERATE,
        )
        (drawn,) = (tmp_path / f"drawn-{kind}").glob("*.png")
        assert (
            np.abs(contact_sheet.read_picture(drawn).astype(int) - np.rint(stock * 255)).max() <= 1
        )
        pictures.append(stock)
    plain = StableDiffusionXLPipeline.from_pretrained(sdxl)
    plain.set_progress_bar_config(disable=True)
    base = plain(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    assert all(np.abs(picture - base).max() > 1e-3 for picture in pictures)


def test_latents_are_never_clipped(sdxl):
    """DDIM and DDPM clip unless they are told not to, and the config of another scheduler does not
    tell them."""
    for name in SCHEDULERS:
        stock = pipeline.open_pipeline(
            ModelSource(str(sdxl)), None, scheduler=name, precision="no", device="cpu"
        )
        assert not stock.scheduler.config.get(
            "clip_sample", False
        ) and not stock.scheduler.config.get("thresholding", False), name


GENERATE: dict[str, Any] = {
    "negative_prompt": None,
    "count": 1,
    "scheduler": None,
    "batch_size": 4,
    "base": None,
    "precision": "no",
}
GENERATE |= {"device": "cpu", "grid": None}


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "text_encoder_2",
            None,
            "text_encoder_2 is missing, CLIPTextModelWithProjection is expected for family 'sdxl'",
        ),
        (
            "unet",
            {"addition_embed_type": None},
            "addition_embed_type is None, text_time is expected",
        ),
        (
            "unet",
            {"cross_attention_dim": 64},
            "cross_attention_dim is 64, the hidden_size of both text encoders together is 80",
        ),
        (
            "unet",
            {"projection_class_embeddings_input_dim": 80},
            "projection_class_embeddings_input_dim is 80, the second text encoder's projection_dim",
        ),
    ],
)
def test_a_base_that_does_not_fit_is_refused_before_weights_are_loaded(
    sdxl, wide, tmp_path, part, change, words
):
    base = tmp_path / "base"
    shutil.copytree(sdxl, base)
    if change is None:
        index = json.loads((base / "model_index.json").read_text())
        del index[part]
        (base / "model_index.json").write_text(json.dumps(index))
    else:
        known = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps(known | change))
    with pytest.raises(InputError, match=re.escape(words)):
        loop.run_training(settings(base, wide, tmp_path / "run"), report=lambda line: None)


def test_another_autoencoder(sdxl, wide, tmp_path):
    """It is what pictures are encoded and exported with; one with another number of channels, or no
    autoencoder at all, is refused."""
    other = tiny.stable_diffusion_xl(tmp_path / "other", seed=5)
    plain = finished(settings(sdxl, wide, tmp_path / "plain"))[0]
    for i, place in enumerate((other, other / "vae")):
        cfg = settings(sdxl, wide, tmp_path / f"run-{i}", model={"vae": str(place)})
        assert finished(cfg)[0] != plain
        named = "diffusion_pytorch_model.safetensors"
        assert (tmp_path / f"run-{i}" / "vae" / named).read_bytes() == (
            other / "vae" / named
        ).read_bytes()
    wide_latents = tiny.stable_diffusion_xl(tmp_path / "wide", latent_channels=16)
    with pytest.raises(
        InputError, match="in_channels is 4, the autoencoder's latent_channels is 16"
    ):
        loop.run_training(settings(sdxl, wide, tmp_path / "no", model={"vae": str(wide_latents)}))
    with pytest.raises(InputError, match="is of a UNet2DConditionModel, AutoencoderKL is expected"):
        loop.run_training(settings(sdxl, wide, tmp_path / "no", model={"vae": str(sdxl / "unet")}))


def test_long_captions_in_chunks(sdxl):
    """Each chunk is a caption of its own; what fits into one chunk means the same with more of
    them; empty chunks are not looked at."""
    import torch

    family = FAMILIES["sdxl"]
    opened = open_base(ModelSettings(base=str(sdxl), family="sdxl"), family)
    frozen = TorchEncoders(opened, torch.device("cpu"))
    words, inner = [f"w{i}" for i in range(60)], 75
    for one in family.text.inputs:
        tokenize = frozen.component(one.tokenizer)
        for text in ("", "a red circle", " ".join(words), " ".join(words * 4)):
            ids = tokenize(text, truncation=False, verbose=False).input_ids[1:-1]
            made = one.tokenize(frozen, [text], 3)[0]
            for chunk in range(3):
                piece = tokenize.decode(ids[chunk * inner : (chunk + 1) * inner])
                wanted = tokenize(
                    piece, padding="max_length", max_length=77, truncation=True
                ).input_ids
                assert made[chunk].tolist() == wanted, (text, chunk)
    one, many = (
        encode_captions(
            family.text, frozen, tokenize_all(family.text, frozen, ["a red circle"], chunks)
        )
        for chunks in (1, 3)
    )
    np.testing.assert_allclose(many["context"][:, :77], one["context"], atol=1e-6)
    assert many["mask"].tolist() == [[True] * 77 + [False] * 154] and "mask" not in one
    net = encoders.load_component(opened, "unet").eval()
    x, t, cut = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([500]),
        torch.full((1, 6), 32.0),
    )
    made = []
    for features in (one, many):
        given = {name: torch.from_numpy(array) for name, array in features.items()} | {
            "size_and_crop": cut
        }
        with torch.no_grad():
            made.append(net(**family.network.enter(x, t, given)).sample.numpy())
    np.testing.assert_allclose(made[1], made[0], atol=1e-5)
