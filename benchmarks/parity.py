"""Whether Limner and diffusers' script learn the same from the same: loss curves, and the held-out
loss of both results by one independent computation.

    python benchmarks/parity.py SCRIPT BASE PICTURES WORK --steps 300 --seeds 0 1 2

Records are set aside that neither side sees. When both are done, diffusers' own scheduler and
models compute the loss of the base's UNet and of each result on them, at evenly spread timesteps
and with noise that is always the same.
"""

import argparse
import json
import random
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sides
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

TIMESTEPS = 10  # per held-out record
MEASURED = ("first", "last", "fall", "held_out", "step_seconds", "wall_seconds")


@torch.no_grad()
def held_out_loss(unet_folder: Path, base: Path, pictures: Path, size: int) -> float:
    """Mean squared error of what the scheduler asks for, over records and timesteps."""
    vae, text = (
        AutoencoderKL.from_pretrained(base / "vae"),
        CLIPTextModel.from_pretrained(base / "text_encoder"),
    )
    tokenizer, scheduler = (
        CLIPTokenizer.from_pretrained(base / "tokenizer"),
        DDPMScheduler.from_pretrained(base / "scheduler"),
    )
    unet = UNet2DConditionModel.from_pretrained(unet_folder, torch_dtype=torch.float32).eval()
    count = scheduler.config.num_train_timesteps
    generator, losses = torch.Generator().manual_seed(0), []
    for row in sides.read_rows(pictures):
        picture = Image.open(pictures / row["file_name"]).resize(
            (size, size), Image.Resampling.LANCZOS
        )
        pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)[
            None
        ]
        latent = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        ids = tokenizer(
            row["text"],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        context = text(ids)[0]
        t = ((torch.arange(TIMESTEPS) + 0.5) * count / TIMESTEPS).long()
        noise = torch.randn((TIMESTEPS, *latent.shape[1:]), generator=generator)
        x0 = latent.expand(TIMESTEPS, -1, -1, -1)
        target = (
            noise
            if scheduler.config.prediction_type == "epsilon"
            else scheduler.get_velocity(x0, noise, t)
        )
        predicted = unet(
            scheduler.add_noise(x0, noise, t), t, context.expand(TIMESTEPS, -1, -1)
        ).sample
        losses.append((predicted - target).square().mean().item())
    return statistics.fmean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sides.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--hold-out",
        type=int,
        default=64,
        help="records that neither side sees (default: %(default)s)",
    )
    a = parser.parse_args()
    s = sides.settings(a, a.steps)
    torch.set_num_threads(a.threads)
    transformers.utils.logging.disable_progress_bar()
    rows = sides.read_rows(a.pictures)
    random.Random(0).shuffle(rows)
    rows = rows[: a.limit]
    held = sides.copy_pictures(a.pictures, a.work / "held-out", rows[: a.hold_out])
    learned = sides.copy_pictures(a.pictures, a.work / "pictures", rows[a.hold_out :])
    before = held_out_loss(a.base / "unet", a.base, held, a.size)
    results = []
    for seed in a.seeds:
        for side in ("diffusers", "limner"):
            out = a.work / f"{side}-{seed}"
            if side == "diffusers":
                trace = sides.run_diffusers(a.script, a.base, learned, out, s, seed)
            else:
                trace = sides.run_limner(
                    a.base, learned, out, s, seed, cache=str(a.work / f"cache-{seed}")
                )
            results.append(
                figures(
                    side, seed, trace, held_out_loss(out / "unet", a.base, held, a.size), a.steps
                )
            )
            print(line(results[-1]), flush=True)
    asked = {
        "settings": asdict(s),
        "held_out_records": a.hold_out,
        "timesteps": TIMESTEPS,
        "records": len(rows) - a.hold_out,
    }
    report = summary(results, before) | asked | {"runs": results}
    print(table(report))
    if a.json:
        a.json.write_text(json.dumps(report, indent=1) + "\n")


def figures(
    side: str, seed: int, trace: sides.Trace, held_out: float, steps: int
) -> dict[str, float | int | str | list[float]]:
    """One run in numbers; first and last are means over a sixth of the steps, 50 of 300."""
    if len(trace.losses) != steps:
        raise SystemExit(
            f"{side}, seed {seed}: {len(trace.losses)} losses were logged, {steps} steps were "
            "asked for"
        )
    window = max(1, steps // 6)
    first, last = statistics.fmean(trace.losses[:window]), statistics.fmean(trace.losses[-window:])
    seconds = {"step_seconds": trace.step_seconds, "wall_seconds": trace.wall_seconds}
    return {
        "side": side,
        "seed": seed,
        "first": first,
        "last": last,
        "fall": 1 - last / first,
        "held_out": held_out,
        **seconds,
        "losses": trace.losses,
    }


def summary(results: list[dict], before: float) -> dict:
    """Means over the seeds, and how far apart the two sides end."""
    means = {
        side: {
            key: statistics.fmean(r[key] for r in results if r["side"] == side) for key in MEASURED
        }
        for side in ("diffusers", "limner")
    }
    return {
        "held_out_before": before,
        "means": means,
        "held_out_difference": means["limner"]["held_out"] / means["diffusers"]["held_out"] - 1,
    }


def line(r: dict) -> str:
    return (
        f"{r['side']:10} {r.get('seed', 'mean'):>5} {r['first']:8.4f} {r['last']:8.4f} "
        f"{r['fall']:7.1%} {r['held_out']:9.5f} "
        f"{r['step_seconds']:8.3f} {r['wall_seconds']:8.1f}"
    )


def table(report: dict) -> str:
    """All runs and their means, for a reader."""
    head = (
        f"\n{'side':10} {'seed':>5} {'first':>8} {'last':>8} {'fall':>7} {'held-out':>9} "
        f"{'s/step':>8} {'wall s':>8}"
    )
    means = [line({"side": side, **values}) for side, values in report["means"].items()]
    last = (
        f"held-out loss before training {report['held_out_before']:.5f}; of Limner's "
        f"results {report['held_out_difference']:+.2%} from the script's (means)"
    )
    return "\n".join([head, *map(line, report["runs"]), *means, last])


if __name__ == "__main__":
    main()
