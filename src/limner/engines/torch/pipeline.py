"""Pictures through the stock diffusers pipelines: from a folder or the Hub, or from weights that
are being trained."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limner.base_model.base import BaseModel
from limner.base_model.open import open_base, read_pipeline_class
from limner.config.schema import ModelSettings
from limner.engines.torch.encoders import TorchEncoders, silence_progress_bars
from limner.errors import InputError, LimnerError
from limner.families import FAMILIES, find_pipeline_family
from limner.families.family import Family
from limner.protocols import ModelSource

# Latents are never clipped, which some classes do unless they are told.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_pipeline(
    weights: ModelSource,
    other_stage: ModelSource | None,
    *,
    scheduler: str | None,
    precision: str,
    device: str | None,
) -> Any:
    """A stock pipeline ready to draw.

    Args:
        other_stage: the other one of a model in two stages.

    Raises:
        InputError: when the scheduler is unknown or the model cannot be loaded.
    """
    silence_progress_bars()
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise InputError(f"scheduler: {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    pipeline = (
        open_two_stages(weights, other_stage, DTYPES[precision])
        if other_stage is not None
        else load_pipeline(weights, DTYPES[precision])
    )
    if scheduler is not None:
        set_scheduler(pipeline, scheduler)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_pipeline(weights: ModelSource, dtype: torch.dtype, family: Family | None = None) -> Any:
    """The pipeline of one model; with ``family`` that of one stage of two, from a folder of its own
    or from one that holds both."""
    import diffusers

    how: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, **weights.settings}
    try:
        if family is None or family.stage is None:
            pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(weights.model, **how)
        elif read_pipeline_class(weights) == family.stage.combined_pipeline:
            both = getattr(diffusers, family.stage.combined_pipeline).from_pretrained(
                weights.model, **how
            )
            pipeline = both.prior_pipe if family.stage.prefix else both.decoder_pipe
        else:
            pipeline = getattr(diffusers, family.pipeline).from_pretrained(weights.model, **how)
    except (OSError, ValueError) as error:
        if (plain := import_flax(weights)) is not None:
            return load_pipeline(plain, dtype, family)
        raise InputError(
            f"{weights.model}: cannot be loaded as a diffusers pipeline: "
            f"{str(error).splitlines()[0]}{hint_at_other_stage(weights)}"
        ) from error
    if weights.lora is not None:
        load_lora(pipeline, weights.lora, family)
    return pipeline


def import_flax(weights: ModelSource) -> ModelSource | None:
    """An old Flax model as the diffusers folder that it is; None where it is none."""
    try:
        kind = read_pipeline_class(weights)
    except LimnerError:
        return None
    family = find_pipeline_family(kind)
    if family is None or not kind.startswith("Flax"):
        return None
    model = ModelSettings(
        weights.model, family.name, revision=weights.revision, cache_dir=weights.cache_dir
    )
    return ModelSource(str(open_base(model, family).folder), weights.lora, weights.family)


def hint_at_other_stage(weights: ModelSource) -> str:
    """What to say of a model that needs another beside it; nothing of one that does not."""
    try:
        kind = read_pipeline_class(weights)
    except LimnerError:
        return ""
    hint = (
        f". A {kind} makes pictures together with its other stage; name that too, with "
        "--other-stage"
    )
    return (
        hint if any(kind == family.pipeline for family in FAMILIES.values() if family.stage) else ""
    )


def load_lora(pipeline: Any, folder: Path, family: Family | None) -> None:
    """Put a LoRA on a pipeline, or on the one network of a stage, whose pipeline has no loader of
    its own."""
    name = "pytorch_lora_weights.safetensors"
    if family is None or family.stage is None:
        pipeline.load_lora_weights(folder, weight_name=name)
    else:
        getattr(pipeline, family.trained_component).load_lora_adapter(
            folder, prefix=family.trained_component, weight_name=name
        )


def open_two_stages(one: ModelSource, other: ModelSource, dtype: torch.dtype) -> Any:
    """The stock pipeline of two stages, in whatever order they are named.

    Raises:
        InputError: when they are not one of each.
    """
    pair = [family for family in FAMILIES.values() if family.stage is not None]
    kinds = [read_pipeline_class(one), read_pipeline_class(other)]
    known = [
        next((f for f in pair if weights.family == f.name or kind == f.pipeline), None)
        for weights, kind in zip((one, other), kinds, strict=True)
    ]
    if not any(known) and all(f.stage and kinds[0] == f.stage.combined_pipeline for f in pair):
        known[0] = pair[-1]
    for i, family in enumerate(
        known
    ):  # a folder that holds both serves as what the other one is not
        if (
            family is None
            and (rest := known[1 - i]) is not None
            and rest.stage
            and kinds[i] == rest.stage.combined_pipeline
        ):
            known[i] = FAMILIES[rest.stage.other_stage]
    first, second = known
    if first is None or second is None or first is second:
        named = ", ".join(
            f"{weights.model} is of a {kind}"
            for weights, kind in zip((one, other), kinds, strict=True)
        )
        raise InputError(
            f"{named}; a {' and a '.join(f.pipeline for f in pair)} make pictures together"
        )
    return combine_stages(
        [(first, load_pipeline(one, dtype, first)), (second, load_pipeline(other, dtype, second))]
    )


def combine_stages(halves: list[tuple[Family, Any]]) -> Any:
    """The stock pipeline of both stages, around theirs."""
    import diffusers

    named = [(family.stage, half) for family, half in halves if family.stage is not None]
    components = {
        f"{stage.prefix}{name}": part
        for stage, half in named
        for name, part in half.components.items()
    }
    return getattr(diffusers, named[0][0].combined_pipeline)(**components)


def set_scheduler(pipeline: Any, name: str) -> None:
    """Exchange the pipeline's scheduler, of two stages that of the one which draws the picture, on
    the same noise schedule and prediction type."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    made = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)
    for one in (pipeline, getattr(pipeline, "decoder_pipe", None)):
        if one is not None:
            one.scheduler = made


def build_from_components(
    family: Family,
    base: BaseModel,
    parts: TorchEncoders,
    nets: dict[str, torch.nn.Module],
    predict: str,
) -> Any:
    """A stock pipeline around the components that are being trained, sharing their memory; the
    autoencoder keeps its own precision."""
    import diffusers

    components = {
        name: parts.component(name)
        for name in family.components
        if name not in (*nets, "scheduler")
    }
    for name in ("vae", "movq"):
        if name in components:
            components[name].decode = functools.partial(decode_without_autocast, components[name])
    scheduler = type(parts.component("scheduler")).from_config(
        parts.component("scheduler").config, prediction_type=predict
    )
    cls = getattr(diffusers, family.pipeline)
    extra = (
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if family.pipeline == "StableDiffusionPipeline"
        else {}
    )
    if family.pipeline == "StableDiffusionXLPipeline":
        extra = {
            "force_zeros_for_empty_prompt": family.zeros_for_empty_prompt(base.configs),
            "add_watermarker": False,
        }
    made = cls(**components, **nets, scheduler=scheduler, **extra)
    if family.stage is None or base.other_stage is None:
        return made
    return combine_stages(
        [
            (family, made),
            (FAMILIES[family.stage.other_stage], build_other_stage(family, base, parts)),
        ]
    )


def build_other_stage(family: Family, base: BaseModel, parts: TorchEncoders) -> Any:
    """The stock pipeline of the other stage, for as long as pictures are made."""
    import diffusers

    assert family.stage is not None and base.other_stage is not None
    other = FAMILIES[family.stage.other_stage]
    its = TorchEncoders(base.other_stage, parts.device)
    its.loaded = {
        name: parts.loaded[name] for name in family.stage.needed_components if name in parts.loaded
    }
    made = getattr(diffusers, other.pipeline)(
        **{name: its.component(name) for name in other.components}
    )
    if "movq" in made.components:
        made.movq.decode = functools.partial(decode_without_autocast, made.movq)
    if base.other_stage.adapter is not None:
        load_lora(made, base.other_stage.adapter, other)
    return made


def decode_without_autocast(vae: Any, latents: torch.Tensor, **settings: Any) -> Any:
    """An autoencoder's ``decode`` without autocast, in which that of SDXL overflows."""
    with torch.autocast(latents.device.type, enabled=False):
        return type(vae).decode(vae, latents.to(vae.dtype), **settings)


def draw_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float | None,
    size: int | None,
    negative: str | None = None,
    batch: int = 4,
) -> list[np.ndarray]:
    """One picture per prompt and seed, uint8 [size, size, 3]. The starting noise is drawn on the
    host: the same for every device and batch size."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [
            torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]
        ]
        settings: dict[str, Any] = {} if size is None else {"height": size, "width": size}
        settings |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        against = None if negative is None else [negative] * len(part)
        made = pipeline(
            part,
            negative_prompt=against,
            generator=generators,
            num_inference_steps=steps,
            output_type="np",
            **settings,
        )
        pictures += [(picture * 255).round().astype(np.uint8) for picture in made.images]
    return pictures
