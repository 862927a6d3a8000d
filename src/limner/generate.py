"""Pictures from a prompt: a run's result, a model folder or a Hub repository, through the stock
diffusers pipeline."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from limner import durable, engines
from limner.engine import Weights
from limner.faults import InputFault
from limner.snapshot import LORA


def run(
    model: str,
    prompts: Sequence[str],
    *,
    prompt_file: Path | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    count: int = 1,
    steps: int = 25,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    size: int | None = None,
    batch_size: int = 4,
    base: str | None = None,
    precision: str = "no",
    device: str | None = None,
    partner: str | None = None,
    engine: str = "torch",
    output: Path = Path("pictures"),
    grid: Path | None = None,
) -> list[Path]:
    """Draw ``count`` pictures for each prompt and write them as PNG files; returns their paths,
    prompt by prompt.

    Args:
        model: the folder of a run (full or LoRA), a folder in the diffusers layout, or a Hub
            repository.
        seed: of the first picture of each prompt; picture k has seed + k, whatever the batch size.
        guidance_scale: None: the pipeline's own, 7.5 for Stable Diffusion, 5 for XL, 4 for
            Kandinsky.
        base: base model of a LoRA; by default the one that the run was trained on.
        engine: ``torch``, through the stock pipeline, or ``jax``.
        partner: the other one of a model in two stages, named as ``model`` is; by default the one
            that the run was trained beside.

    Raises:
        InputFault: when there is no prompt, or no model at that place.
    """
    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file is not None else [])]
    if not wanted:
        raise InputFault(
            'no prompt: give one or more, e.g. limner generate RUN "a red apple", or '
            "--prompt-file FILE"
        )
    if min(count, steps, batch_size) < 1:
        raise InputFault(
            f"count, steps and batch size must be at least 1; they are {count}, {steps}, "
            f"{batch_size}"
        )
    weights, beside = locate(model, base)
    beside = partner or beside
    other = None if beside is None else locate(beside, None)[0]
    captions = [prompt for prompt in wanted for _ in range(count)]
    seeds = [seed + k for _ in wanted for k in range(count)]
    pipeline = engines.open_pipeline(
        weights, other, engine, scheduler=scheduler, precision=precision, device=device
    )
    pictures = engines.draw(
        pipeline,
        captions,
        seeds,
        steps=steps,
        guidance_scale=guidance_scale,
        size=size,
        negative=negative_prompt,
        batch=batch_size,
    )
    paths = []
    with durable.disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for i, (caption, number, picture) in enumerate(zip(captions, seeds, pictures, strict=True)):
            paths.append(output / f"{i:03d}-{slug(caption)}-{number}.png")
            Image.fromarray(picture).save(paths[-1])
        if grid is not None:
            grid.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(
                [pictures[i : i + count] for i in range(0, len(pictures), count)], wanted
            ).save(grid)
    print("\n".join(map(str, [*paths, *([grid] if grid else [])])))
    return paths


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines do not count."""
    try:
        return [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise InputFault(
            f"{path}: cannot be read as a text file with one prompt per line: {error}"
        ) from error


def locate(model: str, base: str | None) -> tuple[Weights, str | None]:
    """Where the weights are of what the user named, and what its run was trained beside, of a model
    in two stages."""
    model, base = os.path.expanduser(model), base and os.path.expanduser(base)
    folder = Path(model)
    trained: dict[str, str | None] = {}
    if (folder / "config.json").is_file():
        trained = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model", {})
    beside = trained.get("partner")
    family = trained.get("family")
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return Weights(model, family=family), beside
    if not (folder / LORA).exists():
        raise InputFault(
            f"{folder}: neither a diffusers folder (model_index.json) nor a LoRA ({LORA}); a run "
            "has its result here when it has finished"
        )
    source = base or trained.get("base")
    if not source:
        raise InputFault(f"{folder}: the base model of this LoRA is not known; give it with --base")
    own = {
        name: trained.get(name)
        for name in (("cache_dir",) if base else ("cache_dir", "variant", "revision"))
    }
    return Weights(source, folder, family, **own), beside


def slug(text: str) -> str:
    """A file name's part made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    captions: Sequence[str],
    *,
    heads: Sequence[str] = (),
    tile: int | None = None,
) -> Image.Image:
    """One row per caption, one column per picture, with captions at the left and column heads
    above; pictures uint8 [h, w, 3]."""
    side = tile or max(128, max(p.shape[0] for row in rows for p in row))
    font, margin, left, top = ImageFont.load_default(13), 6, 200, 28 if heads else 6
    sheet = Image.new(
        "RGB",
        (left + (side + margin) * max(map(len, rows)) + margin, top + (side + margin) * len(rows)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.text((left + margin + x * (side + margin), 8), head, fill="black", font=font)
    for y, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        pen.multiline_text(
            (margin, top + y * (side + margin) + 8), wrap(caption, 26), fill="black", font=font
        )
        for x, picture in enumerate(row):
            scaled = Image.fromarray(picture).resize(
                (side, side),
                Image.Resampling.NEAREST if picture.shape[0] < side else Image.Resampling.LANCZOS,
            )
            sheet.paste(scaled, (left + margin + x * (side + margin), top + y * (side + margin)))
    return sheet


def read_picture(path: Path) -> np.ndarray:
    """A PNG file as uint8 [height, width, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def sheet_of_files(paths: Sequence[Path], captions: Sequence[str], target: Path) -> None:
    """A contact sheet of pictures on disk, as many for each caption; whole or absent."""
    pictures = [read_picture(path) for path in paths]
    count = len(pictures) // len(captions)
    if not count:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with durable.disk_errors(target):
        contact_sheet(
            [pictures[i * count : (i + 1) * count] for i in range(len(captions))], captions
        ).save(temporary, format="PNG")
        os.replace(temporary, target)


def wrap(text: str, width: int) -> str:
    """Lines of at most ``width`` characters where words allow."""
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:6])
