"""Measures a Stable Diffusion folder on the pictures it was trained on: how often is the captioned
picture among the nearest to what it draws?

    python model/measure.py MODEL PICTURES --sheet sheet.png

For captions spread evenly over ``metadata.jsonl`` one picture each is generated with its own fixed
seed, and compared with every picture of the folder by the Euclidean distance of 64x64 RGB pixels on
white. Prints JSON; the sheet shows each generated picture beside the captioned one, green where it
is the nearest, orange where it is among the 5 nearest, red otherwise.
"""

import argparse
import json
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image, ImageDraw

from limner import rng

SIDE, COLUMNS, CELL = 64, 8, (140, 100)
SCHEDULERS = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


def read(folder: Path) -> tuple[np.ndarray, list[str]]:
    """All pictures on white, uint8, [pictures, 64, 64, 3], and their captions."""
    entries = [
        json.loads(line)
        for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pictures = []
    for entry in entries:
        rgba = Image.open(folder / entry["file_name"]).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        pictures.append(np.asarray(white.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
    return np.stack(pictures), [entry["text"] for entry in entries]


def generate(pipeline: Any, prompts: list[str], seed: int, **how: float) -> np.ndarray:
    """One picture per prompt, uint8, [prompts, 64, 64, 3]; the noise of prompt i is addressed by
    (seed, i)."""
    noise = torch.from_numpy(
        np.stack(
            [
                rng.at(seed, "measure", i).standard_normal((4, SIDE // 4, SIDE // 4), np.float32)
                for i in range(len(prompts))
            ]
        )
    )
    made = []
    for first in range(0, len(prompts), 16):
        part = slice(first, first + 16)
        given = (
            {} if hasattr(pipeline, "prior_pipe") else {"latents": noise[part]}
        )  # of two stages each draws noise of its own shape
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))[part]]
        made.append(
            pipeline(
                prompts[part],
                **given,
                generator=generators,
                height=SIDE,
                width=SIDE,
                output_type="np",
                **how,
            ).images
        )
    return (np.concatenate(made) * 255).round().astype(np.uint8)


def ranks(made: np.ndarray, pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many pictures are nearer to each generated one than the picture of its caption; 0 is
    best."""
    a, b = (
        torch.from_numpy(x.reshape(len(x), -1).astype(np.float32) / 255) for x in (made, pictures)
    )
    distance = torch.cdist(a, b)
    return (
        (distance < distance[torch.arange(len(a)), torch.from_numpy(truth)][:, None]).sum(1).numpy()
    )


def sheet(
    made: np.ndarray, originals: np.ndarray, captions: list[str], rank: np.ndarray
) -> Image.Image:
    """Generated, original and caption, eight in a row."""
    page = Image.new("RGB", (COLUMNS * CELL[0], -(-len(made) // COLUMNS) * CELL[1]), "white")
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        x, y = i % COLUMNS * CELL[0] + 4, i // COLUMNS * CELL[1] + 4
        page.paste(Image.fromarray(made[i]), (x, y))
        page.paste(Image.fromarray(originals[i]), (x + SIDE + 4, y))
        color = "green" if rank[i] == 0 else "darkorange" if rank[i] < 5 else "red"
        draw.multiline_text(
            (x, y + SIDE + 2),
            "\n".join(textwrap.wrap(caption.removeprefix("an emoji of "), 22)[:2]),
            color,
            spacing=0,
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument(
        "--captions", type=int, default=64, help="how many, evenly spaced through metadata.jsonl"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddim")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="where to save the contact sheet")
    a = parser.parse_args()
    pictures, captions = read(a.pictures)
    truth = np.arange(a.captions) * len(captions) // a.captions
    pipeline = AutoPipelineForText2Image.from_pretrained(a.model, dtype=torch.float32)
    for stage in (pipeline, getattr(pipeline, "decoder_pipe", None)):
        if stage is not None:
            stage.scheduler = SCHEDULERS[a.scheduler].from_config(
                pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
            )
    pipeline.set_progress_bar_config(disable=True)
    began = time.monotonic()
    asked = [captions[i] for i in truth]
    made = generate(
        pipeline, asked, a.seed, num_inference_steps=a.steps, guidance_scale=a.guidance_scale
    )
    seconds = time.monotonic() - began
    rank = ranks(made, pictures, truth)
    result = {
        "captions": len(asked),
        "pictures": len(pictures),
        "nearest": float((rank == 0).mean()),
        "among_5_nearest": float((rank < 5).mean()),
    }
    settings = {
        "steps": a.steps,
        "guidance_scale": a.guidance_scale,
        "scheduler": a.scheduler,
        "seed": a.seed,
    }
    missed = {
        "seconds_per_picture": round(seconds / len(asked), 3),
        "missed": [c for c, r in zip(asked, rank, strict=True) if r >= 5],
    }
    print(json.dumps({**result, **settings, **missed}, indent=1, ensure_ascii=False))
    if a.sheet:
        sheet(made, pictures[truth], asked, rank).save(a.sheet)


if __name__ == "__main__":
    main()
