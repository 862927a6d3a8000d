"""What is drawn with: the parts that a run, a model folder or a Hub repository stands for."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from limner.base_model.base import INDEX
from limner.base_model.configs import list_components
from limner.base_model.find import path_exists
from limner.base_model.hub import check_hub_name
from limner.base_model.json_files import read_json
from limner.base_model.weight_files import group_by_variant, list_files
from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError, IntegrityError
from limner.families import get_family
from limner.json_types import parse_json
from limner.progress import print_line
from limner.protocols import ModelSource
from limner.storage.checkpoint import list_checkpoints
from limner.storage.layout import LORA_FILE
from limner.storage.run_folder import RunFolder
from limner.storage.run_state import STATE_FILE
from limner.training.result import check_result_of_run

# The sections of a run's settings that its pictures depend on.
SECTIONS = ("model", "objective", "adapter", "engine")


def read_run_settings(config: Path) -> Config | None:
    """Read the settings of a run that its pictures depend on; None where there is no run.

    Raises:
        IntegrityError: when they are not what a run has written.
    """
    if not config.is_file():
        return None
    try:
        run = parse_json(config.read_text(encoding="utf-8"))
        # A model may have a file of this name that is not a run's.
        if not isinstance(run, dict) or not isinstance(run.get("model"), dict):
            return None
        settings: Config = toml.build(Config, {name: run.get(name) or {} for name in SECTIONS})
        get_family(settings)
    except (OSError, ValueError, InputError) as error:
        raise IntegrityError(
            f"{config}: not what a run has written ({error}). Remove it, and say with --base what "
            "was trained."
        ) from error
    return settings


def read_run(folder: Path) -> ModelSource:
    """Read what a run was trained on and how; of a folder that holds no run, nothing is known."""
    settings = read_run_settings(RunFolder(folder).config)
    if settings is None:
        return ModelSource("")
    model = settings.model
    return ModelSource(
        model.base,
        family=model.family,
        variant=model.variant,
        revision=model.revision,
        cache_dir=model.cache_dir,
        trained_revision=model.trained_revision,
        vae=model.vae,
        half_vae=model.vae is not None,
        tf32=settings.engine.tf32,
        other_stage=model.other_stage,
        prediction_type=settings.objective.predict,
        text_encoders=settings.adapter.text_encoders,
        precision=settings.engine.precision or "no",
    )


def find_sources(model: str, base: str | None) -> tuple[ModelSource, str | None]:
    """Find the weights of a model, and the other stage with which its run was trained.

    Args:
        model: as for ``run_generate``.
        base: base model of a LoRA; None: the one on which the run was trained.

    Raises:
        InputError: for a folder without a result, or a LoRA without a base.
    """
    model = os.path.expanduser(model)
    path_exists("the model", model)
    folder = Path(model)
    if folder.is_file():
        raise InputError(
            f"{model}: a file; a folder is expected. Of a LoRA give the folder that holds it as "
            f"{LORA_FILE}: limner generate {folder.parent} --base BASE"
        )
    run = read_run(folder)
    check_result_of_run(folder)
    if not folder.exists():
        check_hub_name(model, "model", "a run's folder, a folder in the diffusers layout")
    if not folder.is_dir() or (folder / INDEX).exists():
        refuse_base(folder, base)
        # A whole result has the scheduler and the autoencoder that it was trained with. The variant
        # is for the other stage.
        whole = replace(run, model=model, other_stage=None, prediction_type=None, vae=None)
        whole = replace(whole, variant=run.variant or choose_variant(folder))
        return replace(whole, revision=None, trained_revision=None), run.other_stage
    if not (folder / LORA_FILE).exists():
        raise InputError(
            f"{folder}: neither a diffusers folder ({INDEX}) nor a LoRA ({LORA_FILE}); a run "
            "has its result here when it has finished"
        )
    base_source = os.path.expanduser(base) if base else run.model
    if not base_source:
        raise InputError(f"{folder}: the base model of this LoRA is not known; give it with --base")
    setting = "--base" if base else f"{RunFolder(folder).config}: model.base"
    if not path_exists(setting, base_source):
        check_hub_name(base_source, setting, "the folder of the base with --base")
    if base:
        # These are of the run's own base.
        variant = choose_variant(Path(base_source))
        run = replace(run, variant=variant, revision=None, trained_revision=None)
    source = replace(run, model=base_source, lora=folder, other_stage=None)
    if not base:
        digest, scheduler = read_base_of_run(folder)
        source = replace(source, base_digest=digest, scheduler=scheduler)
    return source, run.other_stage


def refuse_base(model: Path, base: str | None) -> None:
    """Refuse a base beside what is no LoRA, or one that is not here."""
    if base is None:
        return
    is_here = model.is_dir()
    what = "is a whole model, not a LoRA" if is_here else "is not here"
    remedy = "Leave --base out." if is_here else "Fetch the LoRA, and give its folder."
    raise InputError(f"--base: {model} {what}, so that no base goes with it. {remedy}")


def choose_variant(folder: Path) -> str | None:
    """Return the variant of a model that has no plain weights, and say it; else None."""
    if not (folder / INDEX).is_file():
        return None
    for name, (library, _) in list_components(read_json(folder / INDEX)).items():
        variants = group_by_variant(list_files(folder / name), library)
        if len(variants) == 1 and None not in variants:
            [variant] = variants
            print_line(f"{folder}: its {name} has weights of variant {variant!r} only: it is drawn")
            return variant
    return None


def read_base_of_run(run: Path) -> tuple[str | None, str | None]:
    """Return the fingerprint of a run's base, and the class of its scheduler; None where no
    checkpoint says it."""
    for checkpoint in list_checkpoints(run):
        with contextlib.suppress(InputError):
            state = read_json(checkpoint / STATE_FILE)
            digest, scheduler = state.get("base_digest"), state.get("scheduler")
            return (
                digest if isinstance(digest, str) else None,
                scheduler if isinstance(scheduler, str) else None,
            )
    return None, None
