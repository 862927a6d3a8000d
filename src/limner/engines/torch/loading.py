"""Stock diffusers pipelines from a folder or the Hub."""

import functools
from pathlib import Path
from typing import Any

import torch

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.comparison import describe_fault
from limner.base_model.json_files import read_json
from limner.base_model.open import open_base, read_pipeline_class
from limner.config.schema import ModelSettings
from limner.diffusion.result_scheduler import adapt_scheduler
from limner.engines.torch.lora_file import load_lora
from limner.engines.torch.safety_checker import has_safety_checker
from limner.engines.torch.weights import check_pipeline
from limner.errors import InputError, LimnerError
from limner.families import FAMILIES, find_pipeline_family
from limner.families.family import Family, Stage
from limner.json_types import Plain
from limner.progress import print_line
from limner.protocols import ModelSource


def load_pipeline(weights: ModelSource, dtype: torch.dtype, safety_checker: bool = True) -> Any:
    """Load the pipeline of a model, with its LoRA.

    Args:
        safety_checker: whether the model's is loaded, if it has one.

    Raises:
        InputError: when it cannot be loaded.
    """
    import diffusers

    pipeline = load_class(diffusers.AutoPipelineForText2Image, weights, dtype, safety_checker)
    if weights.lora is not None:
        load_lora(pipeline, weights.lora)
    return pipeline


def load_stage(weights: ModelSource, dtype: torch.dtype, family: Family, stage: Stage) -> Any:
    """Load the pipeline of one stage, with its LoRA; the model may hold both stages.

    Raises:
        InputError: when it cannot be loaded.
    """
    import diffusers

    if read_pipeline_class(weights) == stage.combined_pipeline:
        both = load_class(getattr(diffusers, stage.combined_pipeline), weights, dtype)
        pipeline = getattr(both, stage.part)
    else:
        pipeline = load_class(getattr(diffusers, family.pipeline), weights, dtype)
    if weights.lora is not None:
        load_lora(pipeline, weights.lora)
    return pipeline


def load_class(
    pipeline_class: Any, weights: ModelSource, dtype: torch.dtype, safety_checker: bool = True
) -> Any:
    """Load a model as a pipeline of this class; an old Flax model is imported first.

    Args:
        safety_checker: whether the model's is loaded, if it has one.

    Raises:
        InputError: when it cannot be loaded.
    """
    try:
        folder = find_folder(weights)
        check_pipeline(folder, weights.variant, print_line)
        without = leave_out_checker(folder, weights.variant, safety_checker)
        # diffusers refuses a variant of which a folder has nothing, as a run's own result.
        variant = weights.variant if any(folder.glob(f"*/*.{weights.variant}*")) else None
        return pipeline_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, **without
        )
    except (LimnerError, MemoryError):
        raise
    # Of the libraries, for whatever is wrong with a file.
    except Exception as error:
        imported = import_flax(weights)
        if imported is not None:
            return load_class(pipeline_class, imported, dtype, safety_checker)
        raise InputError(
            f"{weights.model}: cannot be loaded as a diffusers pipeline: "
            f"{describe_fault(error)}{hint_at_other_stage(weights)}"
        ) from error


def leave_out_checker(folder: Path, variant: str | None, is_wanted: bool) -> Plain:
    """Return what a pipeline's class is told to load no safety checker; nothing where it is wanted
    and can be loaded."""
    index = read_json(folder / INDEX)
    if "safety_checker" not in index:
        return {}
    if is_wanted and has_safety_checker(index, folder, variant, print_line):
        return {}
    return {"safety_checker": None, "requires_safety_checker": False}


def find_folder(weights: ModelSource) -> Path:
    """Return the folder of a pipeline; what the Hub has is fetched first.

    Raises:
        HubError: when the Hub refuses or cannot be reached.
        OSError, ValueError: when it is not whole.
    """
    import diffusers

    if Path(weights.model).is_dir():
        return Path(weights.model)
    # Asked first: what the Hub refuses of it is said in words.
    read_pipeline_class(weights)
    download = functools.partial(
        diffusers.DiffusionPipeline.download,
        weights.model,
        use_safetensors=True,
        **weights.settings,
    )
    try:
        return Path(download())
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        # Perhaps only the safety checker has none: pictures are then drawn without it.
        return Path(download(safety_checker=None))


def make_scheduler(base: BaseModel, prediction_type: str | None) -> Any:
    """Make the scheduler that a result on this base is drawn with; see ``result_scheduler``."""
    import diffusers

    class_name = base.scheduler_class
    config = adapt_scheduler(base.configs["scheduler"], class_name, prediction_type)
    return getattr(diffusers, config["_class_name"]).from_config(config)


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
    if not any(family.other_stage and family.pipeline == kind for family in FAMILIES.values()):
        return ""
    return (
        f". A {kind} makes pictures together with its other stage; name that too, with "
        "--other-stage"
    )
