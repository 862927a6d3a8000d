"""Pictures through the stock diffusers pipelines: from a folder or the Hub, or from weights that are being trained."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limner.base import Base
from limner.engines.torch.parts import TorchParts, quiet
from limner.family import Family
from limner.faults import InputFault

SCHEDULERS = {  # latents are never clipped, which some classes do unless they are told
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}), "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}), "euler-a": ("EulerAncestralDiscreteScheduler", {}), "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}), "unipc": ("UniPCMultistepScheduler", {}),
}  # fmt: skip
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_pipeline(
    model: str, *, lora: Path | None, scheduler: str | None, precision: str, device: str | None,
    variant: str | None = None, revision: str | None = None, cache_dir: str | None = None,
) -> Any:  # fmt: skip
    """A stock pipeline ready to draw.

    Args:
        model: a folder in the diffusers layout, or a Hub repository.
        lora: a folder that holds ``pytorch_lora_weights.safetensors``.
        cache_dir: where downloads are kept; None: the Hub library's own place.

    Raises:
        InputFault: when the scheduler is unknown or the model cannot be loaded.
    """
    from diffusers import AutoPipelineForText2Image

    quiet()
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise InputFault(f"scheduler: {scheduler!r} is not one of {', '.join(SCHEDULERS)}")
    chosen = {"variant": variant, "revision": revision, "cache_dir": cache_dir}
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(model, dtype=DTYPES[precision], use_safetensors=True, **chosen)
    except (OSError, ValueError) as error:
        raise InputFault(f"{model}: cannot be loaded as a diffusers pipeline: {str(error).splitlines()[0]}") from error
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    if scheduler is not None:
        set_scheduler(pipeline, scheduler)
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def set_scheduler(pipeline: Any, name: str) -> None:
    """Exchange the pipeline's scheduler, on the same noise schedule and prediction type."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **settings)


def of_parts(family: Family, base: Base, parts: TorchParts, nets: dict[str, torch.nn.Module], predict: str) -> Any:
    """A stock pipeline around the components that are being trained, sharing their memory; the autoencoder keeps its own precision."""
    import diffusers

    components = {name: parts.component(name) for name in family.components if name not in (*nets, "scheduler")}
    if "vae" in components:
        components["vae"].decode = functools.partial(decode_apart, components["vae"])
    scheduler = type(parts.component("scheduler")).from_config(parts.component("scheduler").config, prediction_type=predict)
    cls = getattr(diffusers, family.pipeline)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} if family.pipeline == "StableDiffusionPipeline" else {}
    if family.pipeline == "StableDiffusionXLPipeline":
        extra = {"force_zeros_for_empty_prompt": family.empty_is_zeros(base.configs), "add_watermarker": False}
    return cls(**components, **nets, scheduler=scheduler, **extra)


def decode_apart(vae: Any, latents: torch.Tensor, **settings: Any) -> Any:
    """The autoencoder's ``decode`` without autocast, in which that of SDXL overflows."""
    with torch.autocast(latents.device.type, enabled=False):
        return type(vae).decode(vae, latents.to(vae.dtype), **settings)


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    size: int | None,
    negative: str | None = None,
    batch: int = 4,
) -> list[np.ndarray]:
    """One picture per prompt and seed, uint8 [size, size, 3]. The starting noise is drawn on the host: the same for every device and batch size."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]]
        shape = {} if size is None else {"height": size, "width": size}
        against = None if negative is None else [negative] * len(part)
        made = pipeline(
            part, negative_prompt=against, generator=generators, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="np", **shape
        )
        pictures += [(picture * 255).round().astype(np.uint8) for picture in made.images]
    return pictures
