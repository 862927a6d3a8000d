"""Pictures from a prompt: a run's result, a model folder or a Hub repository, through the stock
diffusers pipeline."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from limner import engines
from limner.data.contact_sheet import draw_contact_sheet
from limner.errors import InputError
from limner.protocols import ModelSource
from limner.storage import atomic
from limner.storage.layout import LORA_FILE


def run_generate(
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
    other_stage: str | None = None,
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
        other_stage: the other one of a model in two stages, named as ``model`` is; by default the
            one that the run was trained beside.

    Raises:
        InputError: when there is no prompt, or no model at that place.
    """
    wanted = [*prompts, *(read_prompts(prompt_file) if prompt_file is not None else [])]
    if not wanted:
        raise InputError(
            'no prompt: give one or more, e.g. limner generate RUN "a red apple", or '
            "--prompt-file FILE"
        )
    if min(count, steps, batch_size) < 1:
        raise InputError(
            f"count, steps and batch size must be at least 1; they are {count}, {steps}, "
            f"{batch_size}"
        )
    weights, beside = find_sources(model, base)
    beside = other_stage or beside
    other = None if beside is None else find_sources(beside, None)[0]
    captions = [prompt for prompt in wanted for _ in range(count)]
    seeds = [seed + k for _ in wanted for k in range(count)]
    pipeline = engines.open_pipeline(
        weights, other, engine, scheduler=scheduler, precision=precision, device=device
    )
    pictures = engines.draw_pictures(
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
    with atomic.disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for i, (caption, number, picture) in enumerate(zip(captions, seeds, pictures, strict=True)):
            paths.append(output / f"{i:03d}-{to_file_name(caption)}-{number}.png")
            Image.fromarray(picture).save(paths[-1])
        if grid is not None:
            grid.parent.mkdir(parents=True, exist_ok=True)
            draw_contact_sheet(
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
        raise InputError(
            f"{path}: cannot be read as a text file with one prompt per line: {error}"
        ) from error


def find_sources(model: str, base: str | None) -> tuple[ModelSource, str | None]:
    """Where the weights are of what the user named, and what its run was trained beside, of a model
    in two stages."""
    model, base = os.path.expanduser(model), base and os.path.expanduser(base)
    folder = Path(model)
    trained: dict[str, str | None] = {}
    if (folder / "config.json").is_file():
        trained = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model", {})
    beside = trained.get("other_stage")
    family = trained.get("family")
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return ModelSource(model, family=family), beside
    if not (folder / LORA_FILE).exists():
        raise InputError(
            f"{folder}: neither a diffusers folder (model_index.json) nor a LoRA ({LORA_FILE}); a "
            "run "
            "has its result here when it has finished"
        )
    source = base or trained.get("base")
    if not source:
        raise InputError(f"{folder}: the base model of this LoRA is not known; give it with --base")
    own = {
        name: trained.get(name)
        for name in (("cache_dir",) if base else ("cache_dir", "variant", "revision"))
    }
    return ModelSource(source, folder, family, **own), beside


def to_file_name(text: str) -> str:
    """A file name's part made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"
