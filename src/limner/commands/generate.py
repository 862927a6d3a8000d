"""Draw pictures from prompts, with a run's result, a model folder or a Hub repository."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limner import engines
from limner.base_model.base import INDEX
from limner.base_model.find import path_exists
from limner.base_model.hub import check_hub_name
from limner.base_model.json_files import read_json
from limner.commands.drawn_model import find_sources
from limner.config import toml
from limner.config.declare import GUIDANCE, PIXELS
from limner.data.contact_sheet import draw_contact_sheet
from limner.diffusion.base_schedulers import GAUSSIAN
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.diffusion.sampler_settings import SCHEDULERS, adapt_to_pipeline
from limner.diffusion.samplers import check_steps
from limner.errors import InputError, say_count
from limner.progress import print_line
from limner.protocols import ModelSource
from limner.redaction import redact_text
from limner.storage import atomic, outputs

SCHEDULER = Path("scheduler", "scheduler_config.json")
MOST = 100_000  # pictures, steps, or pictures at once


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn, whatever the model and the prompts."""

    negative_prompt: str | None = None
    seed: int = 0  # of the first picture of each prompt; picture k has seed + k
    count: int = 1  # pictures of each prompt
    steps: int = 25  # of the sampler
    # None: the pipeline's own, 7.5 for Stable Diffusion, 5 for XL, 4 for Kandinsky
    guidance_scale: float | None = None
    scheduler: str | None = None  # None: the model's own
    size: int | None = None  # pixels a side; None: the model's own
    batch_size: int = 4  # pictures drawn at once; it changes no picture
    engine: str = "torch"  # torch, through the stock pipeline, or jax
    # no (float32), fp16 or bf16, all weights included; None: as the previews of the run, in
    # float32 where there was none.
    precision: str | None = None
    device: str | None = None  # None: a GPU where there is one
    safety_checker: bool = True  # blacken what the model's finds unsafe, where it has one


@dataclass(frozen=True)
class Drawing:
    """One picture, with what it was drawn from."""

    prompt: str
    seed: int
    picture: np.ndarray  # uint8 [height, width, 3]


def run_generate(
    model: str,
    prompts: Sequence[str],
    settings: DrawSettings,
    *,
    base: str | None = None,
    other_stage: str | None = None,
    output: Path = Path("pictures"),
    grid: Path | None = None,
) -> list[Path]:
    """Draw pictures of each prompt, write them as PNG files, and return their paths in that order.

    Args:
        model: the folder of a run (full or LoRA), a folder in the diffusers layout, or a Hub
            repository.
        base: base model of a LoRA; by default the one on which the run was trained.
        other_stage: the other stage of a two-stage model, named as ``model`` is; by default the
            one with which the run was trained.
        output: the folder of the files.
        grid: a PNG file for a contact sheet of all pictures.

    Raises:
        InputError: when there is no prompt, or no model at that place.
    """
    if not prompts:
        raise InputError(
            'no prompt: give one or more, e.g. limner generate RUN "a red apple", or '
            "--prompt-file FILE"
        )
    check_settings(settings)
    outputs.check_output_folder("--output", output)
    outputs.check_output_picture("--grid", grid)
    # A shell's word that is no UTF-8 has lone surrogates, which tokenizers do not take.
    prompts = [prompt.encode("utf-8", "replace").decode() for prompt in prompts]
    check_grid(grid, list_paths(prompts, settings, output))
    pipeline = open_pipeline(model, base, other_stage, settings)
    negative = settings.negative_prompt
    engines.report_cut_prompts(pipeline, [*prompts, negative or ""], print_line)
    report_idle_options(settings)
    drawings, paths = draw_into(pipeline, prompts, settings, output)
    if grid is not None:
        with atomic.disk_errors(grid):
            write_grid(drawings, settings.count, grid)
    return paths


def check_grid(grid: Path | None, paths: Sequence[Path]) -> None:
    """Refuse a contact sheet in the place of one of its pictures.

    Args:
        paths: of the pictures.
    """
    if grid is not None and grid.resolve() in {path.resolve() for path in paths}:
        raise InputError(f"--grid: {grid} is the file of a picture that is drawn; choose another")


def check_settings(settings: DrawSettings) -> None:
    """Refuse numbers with which no picture can be drawn, before a model is opened."""
    counts = (settings.count, settings.steps, settings.batch_size)
    if min(counts) < 1 or max(counts) > MOST:
        raise InputError(
            f"count, steps and batch size must be at least 1 and at most {MOST}; they are "
            f"{', '.join(map(str, counts))}"
        )
    if not 0 <= settings.seed <= 2**63 - settings.count:
        raise InputError(f"seed: {settings.seed} is not within 0 to 2**63 - 1")
    size = settings.size
    if size is not None and (size < 8 or size % 8):
        nearest = min(max(1, round(size / 8)) * 8, PIXELS.most)
        raise InputError(f"size: {size} pixels are no multiple of 8; choose {nearest}")
    if size is not None and size > PIXELS.most:
        raise InputError(f"size: {size} is more than the {PIXELS.most:,} pixels that are possible")
    scale = settings.guidance_scale
    if scale is not None and not GUIDANCE.contains(scale):
        raise InputError(f"guidance scale: {scale} {GUIDANCE.refusal}")


def report_idle_options(settings: DrawSettings) -> None:
    """Say which options do nothing beside the others."""
    scale = settings.guidance_scale
    if scale is None or scale > 1:
        return
    if settings.negative_prompt:
        print_line(
            f"the negative prompt does nothing: with a guidance scale of {scale:g} pictures are "
            "drawn without guidance"
        )
    elif scale < 1:
        print_line(f"guidance scale: {scale:g} draws as 1 does, without guidance")


def open_pipeline(
    model: str, base: str | None, other_stage: str | None, settings: DrawSettings
) -> Any:
    """Open the pipeline of a model; arguments are those of ``run_generate``."""
    source, trained_with = find_sources(model, base)
    if other_stage is not None:  # part of what the fingerprint is of
        source = replace(source, base_digest=None)
    other_stage = other_stage or trained_with
    if other_stage is not None and not path_exists("--other-stage", other_stage):
        check_hub_name(other_stage, "--other-stage", "a run's folder, one in the diffusers layout")
    if source.lora is not None and source.family is not None:
        source, other_stage = replace(source, other_stage=other_stage), None
    other_source = None if other_stage is None else find_sources(other_stage, None)[0]
    if other_source is not None and other_source.family is None:
        # No run of its own: it is read as the run read it.
        other_source = replace(other_source, variant=source.variant, cache_dir=source.cache_dir)
    check_call(source, settings)
    return engines.open_pipeline(
        source,
        other_source,
        settings.engine,
        scheduler=settings.scheduler,
        precision=settings.precision,
        device=settings.device,
        safety_checker=settings.safety_checker,
    )


def check_call(source: ModelSource, settings: DrawSettings) -> None:
    """Refuse more steps than the scheduler of a model that is here has timesteps, and no size where
    the model states none; a model that is to be fetched is looked at when it is open.

    Raises:
        InputError: see ``samplers.check_steps``.
    """
    folder, name = Path(source.model), settings.scheduler
    if not (folder / SCHEDULER).is_file() or not (folder / INDEX).is_file():
        return
    scheduler, index = read_json(folder / SCHEDULER), read_json(folder / INDEX)
    unet = folder / "unet" / "config.json"
    # Stable Diffusion's pipeline; that of XL has a size of its own.
    needs_size = index.get("_class_name") == "StableDiffusionPipeline" and settings.size is None
    if needs_size and unet.is_file() and read_json(unet).get("sample_size", 0) is None:
        raise InputError(f"size: {unet} states none (sample_size is null); give --size")
    class_name = str(scheduler.get("_class_name"))
    if class_name not in GAUSSIAN:
        return
    scheduler = adapt_scheduler(scheduler, class_name, source.prediction_type)
    scheduler = adapt_to_pipeline(scheduler, str(index.get("_class_name")), name)
    class_name, changes = SCHEDULERS.get(name or "", (scheduler["_class_name"], {}))
    check_steps(settings.steps, class_name, scheduler | changes)


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    settings: DrawSettings,
    keep: Callable[[list[Drawing]], None] = lambda drawings: None,
) -> list[Drawing]:
    """Draw ``settings.count`` pictures of each prompt, prompt by prompt.

    Args:
        keep: called with the drawings of each batch, as soon as there are any.
    """
    captions = [prompt for prompt in prompts for _ in range(settings.count)]
    seeds = [settings.seed + k for _ in prompts for k in range(settings.count)]
    drawings: list[Drawing] = []

    def add(pictures: list[np.ndarray]) -> None:
        start = len(drawings)
        pairs = zip(captions[start:], seeds[start:], pictures, strict=False)
        drawings.extend(Drawing(*one) for one in pairs)
        keep(drawings[start:])

    engines.draw_pictures(
        pipeline,
        captions,
        seeds,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        size=settings.size,
        negative=settings.negative_prompt,
        batch=settings.batch_size,
        keep=add,
    )
    return drawings


def draw_into(
    pipeline: Any, prompts: Sequence[str], settings: DrawSettings, folder: Path
) -> tuple[list[Drawing], list[Path]]:
    """Draw as ``draw`` does, and write the files of each batch when it is drawn; say how many of
    them have replaced older ones."""
    paths = list_paths(prompts, settings, folder)
    written: list[Path] = []
    replaced: list[Path] = []

    def keep(drawings: list[Drawing]) -> None:
        part = paths[len(written) : len(written) + len(drawings)]
        replaced.extend(path for path in part if path.exists())
        write_drawings(drawings, part)
        written.extend(part)

    drawings = draw(pipeline, prompts, settings, keep)
    if replaced:
        print_line(
            f"{folder}: {say_count(len(replaced), 'older file', 'older files')} of the same "
            "number, prompt and seed replaced; --output chooses another folder"
        )
    return drawings, written


def list_paths(prompts: Sequence[str], settings: DrawSettings, folder: Path) -> list[Path]:
    """Return the PNG files of all pictures, named by number, prompt and seed."""
    names = [to_file_name(redact_text(prompt)) for prompt in prompts]
    pairs = [(name, settings.seed + k) for name in names for k in range(settings.count)]
    return [folder / f"{i:03d}-{name}-{seed}.png" for i, (name, seed) in enumerate(pairs)]


def write_drawings(drawings: Sequence[Drawing], paths: Sequence[Path]) -> None:
    """Write PNG files, each whole or absent."""
    for drawing, path in zip(drawings, paths, strict=True):
        with atomic.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as temporary:
            Image.fromarray(drawing.picture).save(temporary, format="PNG")


def write_grid(drawings: Sequence[Drawing], count: int, path: Path) -> None:
    """Write a contact sheet with the ``count`` pictures of each prompt in a row."""
    rows = [drawings[start : start + count] for start in range(0, len(drawings), count)]
    sheet = draw_contact_sheet(
        [[drawing.picture for drawing in row] for row in rows],
        [redact_text(row[0].prompt) for row in rows],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_prompts(path: Path) -> list[str]:
    """Read a text file with one prompt per line; empty lines do not count.

    Raises:
        InputError: when the file cannot be read as text.
    """
    try:
        # Not by ``splitlines``, for which a line ends at marks too that prompts may hold.
        lines = toml.read_small_file(path).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: cannot be read as a text file with one prompt per line: {reason}"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def to_file_name(text: str) -> str:
    """Return a part of a file name made of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"
