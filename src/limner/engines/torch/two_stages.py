"""Stock pipelines of two stages, which make pictures together."""

from collections.abc import Sequence
from typing import Any

import torch

from limner.base_model.base import BaseModel
from limner.base_model.open import read_pipeline_class
from limner.engines.torch.encoders import TorchEncoders
from limner.engines.torch.loading import load_stage, make_scheduler
from limner.engines.torch.lora_file import load_lora
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.family import Family, Stage
from limner.protocols import ModelSource

# The families that are one of two stages.
STAGES: dict[str, tuple[Family, Stage]] = {
    name: (family, family.stage) for name, family in FAMILIES.items() if family.stage is not None
}


def open_two_stages(one: ModelSource, other: ModelSource, dtype: torch.dtype) -> Any:
    """Open the stock pipeline of two stages, in whatever order they are named.

    Raises:
        InputError: when they are not one of each.
    """
    sources = (one, other)
    kinds = [read_pipeline_class(source) for source in sources]
    names = match_stages(sources, kinds)
    if None in names or names[0] == names[1]:
        named = ", ".join(
            f"{source.model} is of a {kind}" for source, kind in zip(sources, kinds, strict=True)
        )
        pipelines = " and a ".join(family.pipeline for family, _ in STAGES.values())
        raise InputError(f"{named}; a {pipelines} make pictures together")
    halves = {
        name: load_stage(source, dtype, *STAGES[name])
        for name, source in zip(names, sources, strict=True)
        if name is not None
    }
    return combine_stages(halves)


def match_stages(sources: Sequence[ModelSource], kinds: Sequence[str]) -> list[str | None]:
    """Return the family that each of two models serves as; None where it can be none.

    A model that holds both stages serves as what the other one is not.

    Args:
        kinds: the pipeline class of each.
    """
    names = [match_stage(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    whole = [kind in {stage.combined_pipeline for _, stage in STAGES.values()} for kind in kinds]
    if names == [None, None] and whole[0]:
        names[0] = list(STAGES)[-1]
    for i, other in enumerate(reversed(list(names))):
        if names[i] is None and whole[i] and other is not None:
            names[i] = STAGES[other][1].other_stage
    return names


def match_stage(source: ModelSource, kind: str) -> str | None:
    """Return the family of a model that is one stage; None for any other model."""
    for name, (family, _) in STAGES.items():
        if name == source.family or kind == family.pipeline:
            return name
    return None


def combine_stages(halves: dict[str, Any]) -> Any:
    """Return the stock pipeline of both stages, made of the components of theirs.

    Args:
        halves: the pipelines by family.
    """
    import diffusers

    components: dict[str, Any] = {}
    combined = ""
    for name, half in halves.items():
        _, stage = STAGES[name]
        combined = stage.combined_pipeline
        for component_name, component in half.components.items():
            components[f"{stage.prefix}{component_name}"] = component
    return getattr(diffusers, combined)(**components)


def add_other_stage(pipeline: Any, family: Family, base: BaseModel, encoders: TorchEncoders) -> Any:
    """Return the pipeline that draws: of a stage the pipeline of both, else the one given.

    The other stage is loaded for as long as pictures are drawn.
    """
    import diffusers

    if base.other_stage is None or family.name not in STAGES:
        return pipeline
    _, stage = STAGES[family.name]
    other, _ = STAGES[stage.other_stage]
    own = TorchEncoders(base.other_stage, encoders.device)
    for name in stage.needed_components:
        if name in encoders.loaded:
            own.loaded[name] = encoders.loaded[name]
    components = {name: own.component(name) for name in other.components if name != "scheduler"}
    scheduler = make_scheduler(base.other_stage, base.other_stage.prediction_type)
    components["scheduler"] = scheduler
    half = getattr(diffusers, other.pipeline)(**components)
    if base.other_stage.adapter is not None:
        load_lora(half, base.other_stage.adapter)
    return combine_stages({family.name: pipeline, other.name: half})
