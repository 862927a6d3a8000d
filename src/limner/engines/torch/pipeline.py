"""Stock diffusers pipelines: from a folder or the Hub, or around weights that are being trained."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from limner.base_model.base import BaseModel
from limner.base_model.open import open_base, read_pipeline_class
from limner.config.schema import ModelSettings
from limner.engines.state import find_dtype
from limner.engines.torch.encoders import TorchEncoders, silence_progress_bars
from limner.errors import InputError, LimnerError
from limner.families import FAMILIES, find_pipeline_family
from limner.families.family import Family
from limner.protocols import ModelSource
from limner.storage.layout import LORA_FILE

# Some of these classes clip latents unless they are told not to.
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


def open_pipeline(
    weights: ModelSource,
    other_stage: ModelSource | None,
    *,
    scheduler: str | None,
    precision: str,
    device: str | None,
) -> Any:
    """Open a stock pipeline, ready to draw.

    Args:
        other_stage: the other one of a model in two stages.

    Raises:
        InputError: when the scheduler is unknown or the model cannot be loaded.
    """
    silence_progress_bars()
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise InputError(f"scheduler: {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    dtype = find_dtype(torch, precision)
    if other_stage is None:
        pipeline = load_pipeline(weights, dtype)
    else:
        pipeline = open_two_stages(weights, other_stage, dtype)
    if scheduler is not None:
        set_scheduler(pipeline, scheduler)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_pipeline(weights: ModelSource, dtype: torch.dtype, family: Family | None = None) -> Any:
    """Load the pipeline of one model.

    Args:
        family: of one stage of two, whose pipeline is wanted; the model may hold both.

    Raises:
        InputError: when it cannot be loaded.
    """
    try:
        pipeline = load_diffusers(weights, dtype, family)
    except (OSError, ValueError) as error:
        imported = import_flax(weights)
        if imported is not None:
            return load_pipeline(imported, dtype, family)
        raise InputError(
            f"{weights.model}: cannot be loaded as a diffusers pipeline: "
            f"{str(error).splitlines()[0]}{hint_at_other_stage(weights)}"
        ) from error
    if weights.lora is not None:
        load_lora(pipeline, weights.lora, family)
    return pipeline


def load_diffusers(weights: ModelSource, dtype: torch.dtype, family: Family | None) -> Any:
    """Load a pipeline as diffusers does; see ``load_pipeline``."""
    import diffusers

    stage = None if family is None else family.stage
    if family is None or stage is None:
        cls: Any = diffusers.AutoPipelineForText2Image
    elif read_pipeline_class(weights) == stage.combined_pipeline:
        cls = getattr(diffusers, stage.combined_pipeline)
    else:
        cls = getattr(diffusers, family.pipeline)
        stage = None
    pipeline = cls.from_pretrained(
        weights.model, dtype=dtype, use_safetensors=True, **weights.settings
    )
    if stage is None:
        return pipeline
    return pipeline.prior_pipe if stage.prefix else pipeline.decoder_pipe


def find_pipeline_class(weights: ModelSource) -> str | None:
    """Return the pipeline class of a model; None where it says none."""
    try:
        return read_pipeline_class(weights)
    except LimnerError:
        return None


def import_flax(weights: ModelSource) -> ModelSource | None:
    """Import an old Flax model as a diffusers folder; return None for any other model."""
    kind = find_pipeline_class(weights)
    family = None if kind is None else find_pipeline_family(kind)
    if kind is None or family is None or not kind.startswith("Flax"):
        return None
    model = ModelSettings(
        weights.model, family.name, revision=weights.revision, cache_dir=weights.cache_dir
    )
    return ModelSource(str(open_base(model, family).folder), weights.lora, weights.family)


def hint_at_other_stage(weights: ModelSource) -> str:
    """Return what to say of one stage that is loaded alone; empty for any other model."""
    kind = find_pipeline_class(weights)
    if not any(family.stage and family.pipeline == kind for family in FAMILIES.values()):
        return ""
    return (
        f". A {kind} makes pictures together with its other stage; name that too, with "
        "--other-stage"
    )


def load_lora(pipeline: Any, folder: Path, family: Family | None) -> None:
    """Put a LoRA on a pipeline."""
    if family is None or family.stage is None:
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
        return
    # The pipeline of a stage has no loader, its one trained network has.
    network = getattr(pipeline, family.trained_component)
    network.load_lora_adapter(folder, prefix=family.trained_component, weight_name=LORA_FILE)


def open_two_stages(one: ModelSource, other: ModelSource, dtype: torch.dtype) -> Any:
    """Open the stock pipeline of two stages, in whatever order they are named.

    Raises:
        InputError: when they are not one of each.
    """
    sources = (one, other)
    families = match_stages(sources)
    first, second = families
    if first is None or second is None or first is second:
        kinds = [read_pipeline_class(source) for source in sources]
        named = ", ".join(
            f"{source.model} is of a {kind}" for source, kind in zip(sources, kinds, strict=True)
        )
        stages = " and a ".join(family.pipeline for family in FAMILIES.values() if family.stage)
        raise InputError(f"{named}; a {stages} make pictures together")
    return combine_stages(
        [(first, load_pipeline(one, dtype, first)), (second, load_pipeline(other, dtype, second))]
    )


def match_stages(sources: Sequence[ModelSource]) -> list[Family | None]:
    """Return the stage that each of two models serves as; None where it can be none.

    A model that holds both stages serves as what the other one is not.
    """
    stages = [family for family in FAMILIES.values() if family.stage is not None]
    kinds = [read_pipeline_class(source) for source in sources]
    families: list[Family | None] = []
    for source, kind in zip(sources, kinds, strict=True):
        matching = [f for f in stages if source.family == f.name or kind == f.pipeline]
        families.append(matching[0] if matching else None)
    holds_both = [
        all(family.stage and kind == family.stage.combined_pipeline for family in stages)
        for kind in kinds
    ]
    if not any(families) and holds_both[0]:
        families[0] = stages[-1]
    for i, other in enumerate(reversed(families)):
        if families[i] is None and holds_both[i] and other is not None and other.stage is not None:
            families[i] = FAMILIES[other.stage.other_stage]
    return families


def combine_stages(halves: list[tuple[Family, Any]]) -> Any:
    """Return the stock pipeline of both stages, made of the components of theirs."""
    import diffusers

    components: dict[str, Any] = {}
    combined = ""
    for family, half in halves:
        assert family.stage is not None
        combined = family.stage.combined_pipeline
        for name, component in half.components.items():
            components[f"{family.stage.prefix}{name}"] = component
    return getattr(diffusers, combined)(**components)


def set_scheduler(pipeline: Any, name: str) -> None:
    """Exchange a pipeline's scheduler, on the same noise schedule and prediction type."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)
    pipeline.scheduler = scheduler
    # Of two stages, that of the decoder, which draws.
    decoder = getattr(pipeline, "decoder_pipe", None)
    if decoder is not None:
        decoder.scheduler = scheduler


def build_from_components(
    family: Family,
    base: BaseModel,
    encoders: TorchEncoders,
    nets: dict[str, torch.nn.Module],
    prediction_type: str,
) -> Any:
    """Build a stock pipeline around the networks that are being trained, sharing their memory."""
    import diffusers

    frozen = [name for name in family.components if name not in (*nets, "scheduler")]
    components = {name: encoders.component(name) for name in frozen}
    for name in ("vae", "movq"):
        if name in components:
            keep_precision(components[name])
    scheduler = encoders.component("scheduler")
    components["scheduler"] = type(scheduler).from_config(
        scheduler.config, prediction_type=prediction_type
    )
    options: dict[str, Any] = {}
    if family.pipeline == "StableDiffusionPipeline":
        options = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    if family.pipeline == "StableDiffusionXLPipeline":
        options = {
            "force_zeros_for_empty_prompt": family.zeros_for_empty_prompt(base.configs),
            "add_watermarker": False,
        }
    pipeline = getattr(diffusers, family.pipeline)(**components, **nets, **options)
    if family.stage is None or base.other_stage is None:
        return pipeline
    other = FAMILIES[family.stage.other_stage]
    return combine_stages([(family, pipeline), (other, build_other_stage(family, base, encoders))])


def build_other_stage(family: Family, base: BaseModel, encoders: TorchEncoders) -> Any:
    """Build the stock pipeline of the other stage, for as long as pictures are drawn."""
    import diffusers

    assert family.stage is not None
    assert base.other_stage is not None
    other = FAMILIES[family.stage.other_stage]
    own = TorchEncoders(base.other_stage, encoders.device)
    for name in family.stage.needed_components:
        if name in encoders.loaded:
            own.loaded[name] = encoders.loaded[name]
    components = {name: own.component(name) for name in other.components}
    pipeline = getattr(diffusers, other.pipeline)(**components)
    if "movq" in components:
        keep_precision(components["movq"])
    if base.other_stage.adapter is not None:
        load_lora(pipeline, base.other_stage.adapter, other)
    return pipeline


def keep_precision(autoencoder: Any) -> None:
    """Let an autoencoder decode without autocast, in which that of SDXL overflows."""
    autoencoder.decode = functools.partial(decode_without_autocast, autoencoder)


def decode_without_autocast(autoencoder: Any, latents: torch.Tensor, **settings: Any) -> Any:
    """Decode latents in the autoencoder's own precision."""
    with torch.autocast(latents.device.type, enabled=False):
        return type(autoencoder).decode(autoencoder, latents.to(autoencoder.dtype), **settings)


class CallSettings(TypedDict):
    """What all pictures of a call have in common; None: the pipeline's own."""

    steps: int
    guidance_scale: float | None
    size: int | None


def draw_pictures(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str | None = None,
    batch: int = 4,
    **call: Unpack[CallSettings],
) -> list[np.ndarray]:
    """Draw one picture per prompt and seed, uint8 [size, size, 3].

    Args:
        negative: what no picture should show.
        batch: pictures at a time.
    """
    pipeline.set_progress_bar_config(disable=True)
    settings = name_settings(**call)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        # Noise is drawn on the host: the same for every device and batch size.
        generators = [
            torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]
        ]
        output = pipeline(
            part,
            negative_prompt=None if negative is None else [negative] * len(part),
            generator=generators,
            **settings,
        )
        pictures += [(picture * 255).round().astype(np.uint8) for picture in output.images]
    return pictures


def name_settings(*, steps: int, guidance_scale: float | None, size: int | None) -> dict[str, Any]:
    """Return the settings of a call under the stock pipelines' names."""
    settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if size is not None:
        settings |= {"height": size, "width": size}
    if guidance_scale is not None:
        settings["guidance_scale"] = guidance_scale
    return settings
