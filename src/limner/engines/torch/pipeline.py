"""Open stock diffusers pipelines, and draw with them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch

from limner.base_model.comparison import describe_fault
from limner.diffusion.sampler_settings import SCHEDULERS
from limner.diffusion.samplers import check_steps
from limner.engines.pictures import report_broken, round_pictures
from limner.engines.state import find_dtype
from limner.engines.torch.arithmetic import set_precision_of_float32
from limner.engines.torch.assembly import compute_as_previews, open_lora_run
from limner.engines.torch.encoders import PipelineTokenizers
from limner.engines.torch.loading import load_pipeline
from limner.engines.torch.processes import choose_device
from limner.engines.torch.safety_checker import report_blackened
from limner.engines.torch.two_stages import open_two_stages
from limner.engines.torch.weights import silence_progress_bars
from limner.errors import InputError, LimnerError, find_stop
from limner.families import FAMILIES
from limner.features.caption_lengths import report_cut_prompts
from limner.progress import print_line
from limner.protocols import DrawCall, ModelSource, Report


def open_pipeline(
    weights: ModelSource,
    other_stage: ModelSource | None,
    *,
    scheduler: str | None,
    precision: str | None,
    device: str | None,
    safety_checker: bool = True,
) -> Any:
    """Open a stock pipeline, ready to draw.

    Args:
        other_stage: the other one of a model in two stages.
        precision: of all weights; None: that in which the run drew its previews.
        safety_checker: whether the model's safety checker looks at the pictures, if it has one.

    Raises:
        InputError: when the scheduler is unknown or the model cannot be loaded.
    """
    silence_progress_bars()
    set_precision_of_float32(weights.tf32)
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise InputError(f"scheduler: {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    place = choose_device(device, {}, "--device")
    dtype = find_dtype(torch, precision or "no")
    if weights.lora is not None and weights.family is not None:
        pipeline = open_lora_run(
            weights, as_previews=precision is None, safety_checker=safety_checker
        )
    elif other_stage is None:
        pipeline = load_pipeline(weights, dtype, safety_checker)
    else:
        pipeline = open_two_stages(weights, other_stage, dtype)
    if precision is None:
        compute_as_previews(pipeline, weights)
    else:
        pipeline.to(dtype)
    if scheduler is not None:
        set_scheduler(pipeline, scheduler)
    return pipeline.to(place)


def set_scheduler(pipeline: Any, name: str) -> None:
    """Exchange a pipeline's scheduler, on the same noise schedule and prediction type."""
    import diffusers

    if isinstance(pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        raise InputError(
            f"scheduler: {name!r} is for noise schedules, and this is a flow model. Leave it out; "
            "the model has its own."
        )
    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)
    pipeline.scheduler = scheduler
    # Of two stages, that of the decoder, which draws.
    decoder = getattr(pipeline, "decoder_pipe", None)
    if decoder is not None:
        decoder.scheduler = scheduler


def draw_pictures(  # noqa: PLR0913 - what is drawn, and who is told, most by keyword
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str | None = None,
    batch: int = 4,
    report: Report = print_line,
    check_stop: Callable[[], None] | None = None,
    keep: Callable[[list[np.ndarray]], None] = lambda pictures: None,
    **call: Unpack[DrawCall],
) -> list[np.ndarray]:
    """Draw one picture per prompt and seed, uint8 [size, size, 3].

    Args:
        negative: what no picture should show.
        batch: pictures at a time.
        report: told of pictures that the safety checker has blackened.
        check_stop: called after each step of the sampler; what it raises ends the drawing.
        keep: called with the pictures of each batch, as soon as they are drawn.

    Raises:
        InputError: for more steps than the scheduler has timesteps, or a size that is not drawn.
    """
    scheduler = pipeline.scheduler
    check_steps(call["steps"], type(scheduler).__name__, scheduler.config)
    check_size(pipeline, call["size"])
    pipeline.set_progress_bar_config(disable=True)
    settings = name_settings(check_stop, **call)
    # Not None where there is none: some pipelines' own is an empty text.
    if negative is not None:
        settings["negative_prompt"] = negative
    pictures: list[np.ndarray] = []
    black, broken = list[bool](), list[bool]()
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        drawn, flags, unsafe = draw_batch(pipeline, prompts[part], seeds[part], settings)
        keep(drawn)
        pictures += drawn
        broken += flags
        black += unsafe
    report_blackened(prompts, seeds, black, report)
    report_broken(prompts, seeds, broken, report)
    return pictures


def draw_batch(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]
) -> tuple[list[np.ndarray], list[bool], list[bool]]:
    """Draw one batch; return its pictures, which of them are not finite, and which are unsafe.

    Args:
        settings: as ``name_settings`` gives them, with one negative prompt for all, if any.
    """
    # Noise is drawn on the host: the same for every device and batch size.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if "negative_prompt" in settings:
        settings = settings | {"negative_prompt": [settings["negative_prompt"]] * len(prompts)}
    with explain_fault_of(pipeline):
        output = pipeline(list(prompts), generator=generators, **settings)
    pictures, broken = round_pictures(output.images)
    # None: of a pipeline that checks nothing.
    unsafe = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
    return pictures, broken, unsafe


def report_cut(pipeline: Any, prompts: Sequence[str], report: Report) -> None:
    """Name the prompts that the text encoders of a pipeline see cut, where its family is known."""
    kind = type(pipeline).__name__
    for family in FAMILIES.values():
        is_part = family.stage is not None and family.stage.combined_pipeline == kind
        if kind == family.pipeline or is_part:
            prefix = family.stage.prefix if family.stage is not None and is_part else ""
            tokenizers = PipelineTokenizers(pipeline, prefix)
            report_cut_prompts(family.text, tokenizers, prompts, report)


def check_size(pipeline: Any, size: int | None) -> None:
    """Refuse a size in whose place a stock pipeline would draw a larger one.

    Raises:
        InputError: for what is no multiple of as many latents as a latent has pixels; of Kandinsky.
    """
    decoder = getattr(pipeline, "decoder_pipe", pipeline)
    multiple = getattr(decoder, "movq_scale_factor", 1) ** 2
    if size is not None and size % multiple:
        raise InputError(
            f"size: {size} pixels are no multiple of {multiple}, and the stock pipeline would draw "
            f"{-(-size // multiple) * multiple}; choose {max(1, round(size / multiple)) * multiple}"
        )


@contextlib.contextmanager
def explain_fault_of(pipeline: Any) -> Iterator[None]:
    """Turn what a stock pipeline raises for settings that its networks do not fit into one message.

    Raises:
        InputError: in its place; a stop and a lack of memory stay what they are.
    """
    try:
        yield
    except (LimnerError, MemoryError, torch.OutOfMemoryError):
        raise
    # Whatever a config that is not the stock one leads to.
    except Exception as error:
        if find_stop(error) is not None:
            raise
        raise InputError(
            f"{type(pipeline).__name__}: it cannot draw with these components: "
            f"{describe_fault(error)}. Compare the model's configs with the stock ones."
        ) from error


def name_settings(
    check_stop: Callable[[], None] | None,
    *,
    steps: int,
    guidance_scale: float | None,
    size: int | None,
) -> dict[str, Any]:
    """Return the settings of a call under the stock pipelines' names."""
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if size is not None:
        settings |= {"height": size, "width": size}
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    if check_stop is not None:
        # The sampler's next step takes what this returns in the place of what it has: nothing.
        settings["callback_on_step_end"] = lambda *step: check_stop() or {}
    return settings
