"""Stable Diffusion XL: what a step computes is what diffusers' own classes compute, and what it makes loads in the stock pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from limner import config, rng, training
from limner.engines.torch import lora

SEED, SIZE = 3, 32


def settings(base: Path, pictures: Path, run: Path, **sections: Any) -> config.Config:
    raw: dict[str, Any] = {"run": str(run), "model": {"base": str(base), "family": "sdxl"}}
    raw |= {"data": {"folder": str(pictures), "size": SIZE, "crop": "random", "crops": 3, "flip": True, "drop_caption": 0.4, "resample": "box"}}
    raw |= {"train": {"steps": 1, "batch": 4, "seed": SEED}, "log": {"every": 1}, "objective": {"min_snr": 5.0}}
    return config.build(config.Config, {**raw, **{k: {**raw.get(k, {}), **v} for k, v in sections.items()}})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pictures(tmp_path_factory.mktemp("wide") / "pictures", 5, size=(40, 61))


def by_hand(base: Path, pictures: Path, adapt: config.Adapt, zeros: bool) -> tuple[float, float, np.ndarray, int]:
    """Loss, gradient norm, time ids and number of dropped captions of the first step, with diffusers' classes; only the draws are Limner's."""
    import torch
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline
    from diffusers.training_utils import compute_snr

    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    nets = {"unet": pipe.unet} | ({"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2} if adapt.text_encoders else {})
    learned = lora.add(nets, adapt, training.FAMILIES["sdxl"], SEED) if adapt.kind == "lora" else dict(pipe.unet.requires_grad_(True).named_parameters())
    if adapt.kind == "lora":  # both matrices, else the gradient of the first is zero at the start
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
        cut = picture.resize((width, height), Image.Resampling.BOX).crop((left, 0, left + SIZE, SIZE))
        seen = left
        if flip:
            cut, seen = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT), width - left - SIZE
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(cut)).latent_dist
        shape = posterior.mean.shape[1:]
        draw = torch.from_numpy(rng.at(SEED, "posterior", p).standard_normal(shape, np.float32))
        latents.append(((posterior.mean + posterior.std * draw) * pipe.vae.config.scaling_factor)[0].detach())
        noise.append(torch.from_numpy(rng.at(SEED, "noise", p).standard_normal(shape, np.float32)))
        times.append(int(rng.uniform(SEED, "timestep", p) * 1000))
        ids.append(pipe._get_add_time_ids((picture.height, picture.width), (0, seen), (SIZE, SIZE), torch.float32, 40)[0])
        drop = rng.uniform(SEED, "drop", p) < 0.4
        embeds, _, pooled, _ = pipe.encode_prompt("" if drop else rows[row]["text"], do_classifier_free_guidance=False)
        words.append(embeds[0] * (0 if drop and zeros else 1))
        pools.append(pooled[0] * (0 if drop and zeros else 1))
        dropped += drop
    scheduler, t = DDPMScheduler.from_config(pipe.scheduler.config), torch.tensor(times)
    noisy = scheduler.add_noise(torch.stack(latents), torch.stack(noise), t)
    told = {"text_embeds": torch.stack(pools), "time_ids": torch.stack(ids)}
    made = pipe.unet(noisy, t, torch.stack(words), added_cond_kwargs=told).sample
    snr = compute_snr(scheduler, t)
    loss = ((made - torch.stack(noise)).square().mean((1, 2, 3)) * torch.clamp(snr, max=5) / snr).mean()
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.double().norm() for p in learned.values() if p.grad is not None]))
    return loss.item(), norm.item(), torch.stack(ids).numpy(), dropped


@pytest.mark.parametrize("adapt", [config.Adapt(), config.Adapt("lora", 3), config.Adapt("lora", 3, text_encoders=True)], ids=["full", "lora", "texts"])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_step_is_what_diffusers_computes(adapt, zeros, sdxl, wide, tmp_path, monkeypatch):
    loss, norm, ids, dropped = by_hand(sdxl, wide, adapt, zeros)
    assert 0 < dropped < 4 and len({tuple(row) for row in ids.tolist()}) > 1 and (ids[:, 3] != 8).all()  # off the centre, which is at 8
    asked = {"kind": adapt.kind, "rank": adapt.rank, "text_encoders": adapt.text_encoders}
    add = lora.add

    def moved(*arguments):
        named = add(*arguments)
        for name, p in named.items():
            if ".lora_B." in name:
                p.data += 0.01
        return named

    monkeypatch.setattr(lora, "add", moved)
    cut = []
    batch = training.Stream.batch
    monkeypatch.setattr(training.Stream, "batch", lambda self, step, **k: [b := batch(self, step, **k), cut.append(b["cut"])][0])
    training.run(settings(sdxl, wide, tmp_path, adapt=asked, data={"empty_caption": "base" if zeros else "encoded"}), tell=lambda line: None)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_array_equal(cut[0], ids)
    assert cut[0].dtype == np.float32
    assert row["loss"] == pytest.approx(loss, rel=1e-5) and row["grad_norm"] == pytest.approx(norm, rel=1e-5)
