"""Trains the small autoencoder of the bundled model on captioned pictures; run it again to
continue.

    python model/autoencoder.py PICTURES WORK --steps 7000

PICTURES is a folder of RGBA files; WORK receives checkpoints and, at the end, ``vae/`` in the
diffusers layout. The loss is L1 at three scales plus a small KL term. Pictures are put on
backgrounds of random colours and zoomed, so that the autoencoder serves other styles too.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

from limner import rng
from limner.storage import checkpoint

CONFIG = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}
KL = 3e-4
EMA = 0.999


def load(folder: Path) -> np.ndarray:
    """All pictures as premultiplied RGBA, uint8, [pictures, 96, 96, 4]."""
    return np.stack(
        [
            np.asarray(
                Image.open(p)
                .convert("RGBA")
                .convert("RGBa")
                .resize((96, 96), Image.Resampling.LANCZOS)
            )
            for p in sorted(folder.glob("*.png"))
        ]
    )


def example(pictures: np.ndarray, seed: int, position: int) -> np.ndarray:
    """One training picture in [-1, 1], [3, 64, 64]: half as it is on white, half zoomed, flipped,
    inverted, on a random colour."""
    g = rng.at(seed, "autoencoder", position)
    rgba = pictures[g.integers(len(pictures))].astype(np.float32) / 255
    plain = g.random() < 0.5
    side = 96 if plain else int(g.integers(56, 97))
    top, left = g.integers(0, 97 - side, 2)
    crop = torch.from_numpy(rgba[top : top + side, left : left + side].transpose(2, 0, 1).copy())[
        None
    ]
    crop = F.interpolate(crop, (64, 64), mode="bilinear", antialias=True)[0].numpy()
    back = np.ones(3) if plain or g.random() < 0.4 else g.random(3)
    rgb = crop[:3] + (1 - crop[3:]) * back[:, None, None].astype(np.float32)
    if not plain and g.random() < 0.15:
        rgb = 1 - rgb
    return np.ascontiguousarray(rgb[:, :, ::-1] if g.random() < 0.5 else rgb, np.float32) * 2 - 1


def loss_of(
    vae: AutoencoderKL, x: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 at full, half and quarter size, weighted 1, 0.5, 0.5, plus the KL divergence per latent
    number; and the plain L1."""
    with torch.autocast(
        "cpu",
        torch.bfloat16,
        enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_amx_tile_supported(),
    ):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    y = y.float()
    l1 = (y - x).abs().mean()
    half = (F.avg_pool2d(y, 2) - F.avg_pool2d(x, 2)).abs().mean() + (
        F.avg_pool2d(y, 4) - F.avg_pool2d(x, 4)
    ).abs().mean()
    return l1 + 0.5 * half + KL * posterior.kl().mean() / noise[0].numel(), l1.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    a = parser.parse_args()
    pictures = load(a.pictures)
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    names, params = zip(*vae.named_parameters(), strict=True)
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(
        params, lr=a.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    first = 0
    if (found := checkpoint.find_latest(a.work)) is not None:
        first = found.step
        for kind, targets in (("model", params), ("ema", average)):
            for name, p in zip(names, targets, strict=True):
                p.data.copy_(torch.tensor(found.arrays(f"{kind}.safetensors")[name]))
        moments = found.arrays("optimizer.safetensors")
        for name, p in zip(names, params, strict=True):
            optimizer.state[p] = {
                k: torch.tensor(moments[f"{k}/{name}"]) for k in ("step", "exp_avg", "exp_avg_sq")
            }
    began = time.monotonic()
    for step in range(first, a.steps):
        x = torch.from_numpy(
            np.stack([example(pictures, 0, step * a.batch + i) for i in range(a.batch)])
        )
        noise = torch.from_numpy(
            rng.at(0, "posterior", step).standard_normal((a.batch, 4, 16, 16), np.float32)
        )
        optimizer.param_groups[0]["lr"] = (
            a.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / a.steps))
        )
        loss, l1 = loss_of(vae, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(
            average, [p.detach() for p in params], 1 - min(EMA, (1 + step) / (10 + step))
        )
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}: loss {loss.item():.4f} L1 {l1.item():.4f} "
                f"({(step + 1 - first) * a.batch / (time.monotonic() - began):.1f} pictures/s)",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == a.steps:
            state = {n: m.numpy() for n, m in zip(names, average, strict=True)}
            moments = {
                f"{k}/{n}": np.asarray(optimizer.state[p][k])
                for n, p in zip(names, params, strict=True)
                for k in ("step", "exp_avg", "exp_avg_sq")
            }
            files = [
                (
                    "model.safetensors",
                    {n: p.detach().numpy() for n, p in zip(names, params, strict=True)},
                    {},
                ),
                ("ema.safetensors", state, {}),
                ("optimizer.safetensors", moments, {}),
            ]
            checkpoint.save(a.work, step + 1, files, {}, keep=2)
    finish(vae, params, average, pictures, a.work)


@torch.no_grad()
def finish(
    vae: AutoencoderKL, params: tuple, average: list, pictures: np.ndarray, work: Path
) -> None:
    """Take the averaged weights, set the scaling factor so that latents have unit variance, and
    write ``vae/``."""
    for p, m in zip(params, average, strict=True):
        p.data.copy_(m)
    vae.eval()
    x = torch.from_numpy(pictures.astype(np.float32) / 255).permute(0, 3, 1, 2)
    x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    x = (x[:, :3] + 1 - x[:, 3:]) * 2 - 1
    posteriors = [vae.encode(part).latent_dist for part in x.split(64)]
    latents = torch.cat(
        [
            d.mean + d.std * torch.randn(d.mean.shape, generator=torch.Generator().manual_seed(i))
            for i, d in enumerate(posteriors)
        ]
    )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    l1 = torch.cat(
        [
            (vae.decode(d.mean).sample - part).abs().mean((1, 2, 3))
            for d, part in zip(posteriors, x.split(64), strict=True)
        ]
    ).mean()
    vae.save_pretrained(work / "vae")
    print(
        f"L1 {l1.item():.4f} over {len(x)} pictures, scaling factor {vae.config.scaling_factor}, "
        f"latent std per channel {latents.std((0, 2, 3)).tolist()}"
    )


if __name__ == "__main__":
    main()
