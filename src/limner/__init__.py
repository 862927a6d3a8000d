"""Limner fine-tunes text-to-image diffusion models."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limner.config.schema import Config
    from limner.data.source import Record, Source
    from limner.errors import LimnerError

__all__ = ["Config", "LimnerError", "Record", "Source", "export", "generate", "train"]
__version__ = "0.1.0"

# Imported when first used, so that no command waits for what it does not need.
LAZY_NAMES = {
    "Config": "limner.config.schema",
    "LimnerError": "limner.errors",
    "Record": "limner.data.source",
    "Source": "limner.data.source",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name in LAZY_NAMES:
        return getattr(importlib.import_module(LAZY_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names too that are not imported yet."""
    return sorted({*globals(), *__all__})


def train(
    recipe: "str | Path | Config", overrides: Sequence[str] = (), *, records: "Source | None" = None
) -> Path:
    """Train as a recipe says, or resume its run, and return the folder that holds the result.

    Args:
        recipe: path of a TOML file, or a ``limner.Config``.
        overrides: ``section.key=value`` settings that replace the recipe's.
        records: pictures and captions in place of ``data.folder`` and ``data.hub``: any object with
            ``len(records)`` and ``records[i] -> limner.Record``; the same ``i`` must always give
            the same record.

    Raises:
        LimnerError: of the kind that fits, with a message for the user.
    """
    from limner.config import toml
    from limner.config.schema import Config
    from limner.training import loop

    if isinstance(recipe, Config):
        config = toml.build(Config, toml.apply_overrides(toml.to_plain(recipe), overrides))
    else:
        config = toml.load_recipe(Path(recipe), overrides)
    return loop.run_training(config, records)


def generate(  # noqa: PLR0913 - all but two by keyword, as the options of the command
    model: str | Path,
    prompts: str | Sequence[str],
    *,
    output: str | Path = "pictures",
    grid: str | Path | None = None,
    base: str | Path | None = None,
    other_stage: str | Path | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    count: int = 1,
    steps: int = 25,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    size: int | None = None,
    batch_size: int = 4,
    engine: str = "torch",
    precision: str | None = None,
    device: str | None = None,
    safety_checker: bool = True,
) -> list[Path]:
    """Draw pictures of each prompt, write them as PNG files, and return their paths in that order.

    Args:
        model: the folder of a run (full or LoRA), a folder in the diffusers layout, or a Hub
            repository.
        prompts: one prompt, or several.
        output: the folder of the files.
        grid: a PNG file for a contact sheet of all pictures.
        base: base model of a LoRA; by default the one on which the run was trained.
        other_stage: the other stage of a two-stage model; by default the one with which the run
            was trained.
        seed: of the first picture of each prompt; picture k has seed + k, whatever the batch size.
        count: pictures of each prompt.
        steps: steps of the sampler.
        guidance_scale: None: the pipeline's own.
        scheduler: a name, as ``limner generate --help`` lists them; None: the model's own.
        size: pixels a side; None: the model's own.
        batch_size: pictures drawn at once.
        engine: ``torch``, through the stock pipeline, or ``jax``.
        precision: ``no`` (float32), ``fp16`` or ``bf16``; None: as the run drew its previews.
        device: a device of PyTorch; None: a GPU where there is one.
        safety_checker: whether the model's blackens what it finds unsafe, where it has one.

    Raises:
        LimnerError: of the kind that fits, with a message for the user.
    """
    from limner.commands.generate import DrawSettings, run_generate

    settings = DrawSettings(
        negative_prompt=negative_prompt,
        seed=seed,
        count=count,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        size=size,
        batch_size=batch_size,
        engine=engine,
        precision=precision,
        device=device,
        safety_checker=safety_checker,
    )
    return run_generate(
        str(model),
        [prompts] if isinstance(prompts, str) else prompts,
        settings,
        base=None if base is None else str(base),
        other_stage=None if other_stage is None else str(other_stage),
        output=Path(output).expanduser(),
        grid=None if grid is None else Path(grid).expanduser(),
    )


def export(
    run: str | Path,
    *,
    push: str | None = None,
    private: bool = False,
    combined: str | Path | None = None,
    other_stage: str | Path | None = None,
) -> Path:
    """Write the result of a run's newest checkpoint again, and return the folder that holds it.

    Args:
        run: the folder of a run.
        push: a Hub repository to push the result to.
        private: whether a repository that ``push`` creates is private.
        combined: a folder that receives both stages of a two-stage model; the run's own result
            is then neither written again nor pushed.
        other_stage: for ``combined``, the other stage: a run, a folder or a Hub repository; by
            default the one with which the run was trained.

    Raises:
        LimnerError: of the kind that fits, with a message for the user.
    """
    from limner.commands.export import run_export

    return run_export(
        Path(run).expanduser(),
        push=push,
        private=private,
        combined=None if combined is None else Path(combined).expanduser(),
        other_stage=None if other_stage is None else str(other_stage),
    )
