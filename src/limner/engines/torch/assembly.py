"""Stock pipelines put together of a base's parts: around networks that are being trained, or of a
run's result, which then draws what the run's previews drew."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from limner.base_model.base import BaseModel
from limner.base_model.open import check_trained_on, open_base
from limner.engines.state import find_half_dtype
from limner.engines.torch.encoders import TorchEncoders
from limner.engines.torch.loading import make_scheduler
from limner.engines.torch.lora_file import load_lora
from limner.engines.torch.safety_checker import has_safety_checker, load_safety_checker
from limner.engines.torch.two_stages import add_other_stage
from limner.engines.torch.weights import check_base
from limner.families import FAMILIES
from limner.families.family import Family
from limner.json_types import Plain
from limner.progress import print_line
from limner.protocols import ModelSource


def build_from_components(
    family: Family,
    base: BaseModel,
    encoders: TorchEncoders,
    nets: dict[str, torch.nn.Module],
    prediction_type: str | None,
    safety_checker: Plain | None = None,
    lora: Path | None = None,
) -> Any:
    """Build a stock pipeline around the networks that are being trained, sharing their memory.

    Args:
        nets: the networks; those that are not here are the base's.
        prediction_type: that of the networks; None: the base's.
        safety_checker: as ``load_safety_checker`` returns it; None: none.
        lora: a folder with a LoRA to put on the networks.
    """
    import diffusers

    frozen = [name for name in family.components if name not in (*nets, "scheduler")]
    components = {name: encoders.component(name) for name in frozen}
    components["scheduler"] = make_scheduler(base, prediction_type)
    options = family.pipeline_options(base.configs) | (safety_checker or {})
    pipeline = getattr(diffusers, family.pipeline)(**components, **nets, **options)
    if lora is not None:
        load_lora(pipeline, lora)
    pipeline = add_other_stage(pipeline, family, base, encoders)
    for name in ("vae", "movq"):
        if name in pipeline.components:
            keep_precision(pipeline.components[name])
    return pipeline


def keep_precision(autoencoder: Any) -> None:
    """Let an autoencoder decode without autocast, in which that of SDXL overflows."""
    autoencoder.decode = functools.partial(decode_without_autocast, autoencoder)


def decode_without_autocast(autoencoder: Any, latents: torch.Tensor, **settings: Any) -> Any:
    """Decode latents in the autoencoder's own precision."""
    with torch.autocast(latents.device.type, enabled=False):
        return type(autoencoder).decode(autoencoder, latents.to(autoencoder.dtype), **settings)


def open_lora_run(weights: ModelSource, *, as_previews: bool, safety_checker: bool) -> Any:
    """Open the pipeline of a run whose result is a LoRA, made of the parts of its previews.

    Args:
        as_previews: whether in the precision of the run; else float32.

    Raises:
        InputError: for a base that cannot be opened, or that the LoRA does not fit.
    """
    assert weights.family is not None
    family = FAMILIES[weights.family]
    base = open_base(weights.to_settings(family.name), family)
    check_trained_on(base, family, weights)
    check_base(base, family)
    half = find_half_dtype(torch, weights.precision) if as_previews else None
    encoders = TorchEncoders(base, torch.device("cpu"))
    nets = {}
    if half is not None:
        for name in family.trained_components(weights.text_encoders):
            # Not net.to(): diffusers' own warns of modules to keep in float32, naming none.
            nets[name] = torch.nn.Module.to(encoders.component(name), half)
    checker = None
    if safety_checker and has_safety_checker(
        base.configs.model_index, base.folder, base.variant, print_line
    ):
        checker = load_safety_checker(encoders)
    return build_from_components(
        family, base, encoders, nets, weights.prediction_type, checker, weights.lora
    )


def compute_as_previews(pipeline: Any, weights: ModelSource) -> None:
    """Let a pipeline's networks compute in the precision of the run, as they did for previews."""
    half = find_half_dtype(torch, weights.precision)
    if half is None:
        return
    for name, net in pipeline.components.items():
        if not isinstance(net, torch.nn.Module) or name == "safety_checker":
            continue
        if name in ("vae", "movq"):
            # An autoencoder that the recipe names ran in half precision, the base's did not.
            if weights.half_vae:
                torch.nn.Module.to(net, half)
            keep_precision(net)
        else:
            net.forward = functools.partial(call_in_half, net.forward, half)


def call_in_half(forward: Callable[..., Any], half: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    """Call a network under autocast, on the device of its first tensor."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    with torch.autocast(next(tensors).device.type, half):
        return forward(*args, **kwargs)
