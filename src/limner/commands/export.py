"""Write a run's result again, push it, or combine two stages in one folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from limner import engines
from limner.base_model.base import INDEX, BaseModel
from limner.base_model.json_files import read_json
from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.diffusion import make_objective
from limner.errors import InputError, IntegrityError
from limner.families import FAMILIES
from limner.families.family import Family
from limner.json_types import Plain
from limner.storage import atomic, checkpoint
from limner.storage.run_folder import RunFolder
from limner.training.push import push_result
from limner.training.result import copy_component, read_result, write_result
from limner.training.resume import check_base_of_checkpoint

LORA_REFUSAL = "a LoRA is no folder of weights; limner generate puts it on its base"


def run_export(
    run: Path,
    *,
    push: str | None = None,
    private: bool = False,
    combined: Path | None = None,
    other_stage: str | None = None,
) -> Path:
    """Export the result of a run, and return the folder that holds it.

    Args:
        run: the folder of a run.
        push: the Hub repository to which the result is pushed.
        private: whether a repository that ``push`` creates is private.
        combined: a folder that receives both stages of a two-stage model, in place of the run's
            own result.
        other_stage: for ``combined``, the other stage: a run, a folder or a Hub repository; by
            default the one with which the run was trained.

    Raises:
        InputError: when the options do not go together, or there is nothing to export.
    """
    if private and push is None:
        raise InputError(
            "--private: nothing is pushed without --push REPOSITORY; give both, or neither"
        )
    if other_stage is not None and combined is None:
        raise InputError(
            "--other-stage: nothing is put together without --combined FOLDER; give both, or "
            "neither"
        )
    if combined is not None and push is not None:
        raise InputError(
            "--combined: the folder of both stages is not pushed; leave --push out, and push it "
            "with `hf upload`"
        )
    if combined is not None:
        combine_stages(run, combined, other_stage=other_stage)
        return combined
    export_run(run, push_to=push, private=private)
    return run


def export_run(
    run: Path, *, push_to: str | None, private: bool, report: Callable[[str], None] = print
) -> None:
    """Write the result of a run's newest whole checkpoint, and push it where ``push_to`` is given.

    Raises:
        InputError: when the folder holds no checkpoint, or its base is not what it was.
        IntegrityError: when no checkpoint is whole.
    """
    if not checkpoint.list_checkpoints(run):
        raise InputError(
            f"{run}: there is no checkpoint here, so there is nothing to export. Give the folder "
            "of a run."
        )
    with atomic.lock(run):
        atomic.sweep(run)
        newest = checkpoint.find_latest(run, report)
        if newest is None:
            raise IntegrityError(f"{run}: no checkpoint is whole, so there is nothing to export.")
        # The run may have been moved since its checkpoint was written.
        config: Config = toml.build(Config, {**newest.state.config, "run": str(run)})
        config = replace(config, export=replace(config.export, hub=push_to or config.export.hub))
        family = FAMILIES[config.model.family]
        base = open_base(config.model, family, for_generation=False)
        digest = base.fingerprint(*family.feature_components)
        check_base_of_checkpoint(newest, digest, base.scheduler_class)
        engines.check_base(config.engine.kind, base, family, report)
        objective = make_objective(base.configs["scheduler"], config.objective)
        write_result(newest, config, base, family, objective.prediction_type)
        report(f"{run}: the result of step {newest.step} is here")
        if push_to is not None:
            report(push_result(run, push_to, private, report))


def combine_stages(
    run: Path,
    target: Path,
    *,
    other_stage: str | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Write both stages of a model into one folder, which the stock pipeline of both loads.

    Args:
        run: the folder of a finished run of either stage.
        other_stage: the other stage: a run, a folder or a Hub repository; None: the one with which
            the run was trained.

    Raises:
        InputError: for a model of one stage, a LoRA, or a folder that is not empty.
        IntegrityError: when the run has no whole result.
    """
    kind = read_result(run)["kind"]
    model: ModelSettings = toml.build(
        ModelSettings, read_json(RunFolder(run).config).get("model", {})
    )
    family = FAMILIES[model.family]
    if family.stage is None:
        raise InputError(
            f"{run}: a {family.pipeline} makes pictures alone; there is nothing to put beside it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: it is there already, and not empty; choose another folder")
    if kind == "lora":
        raise InputError(f"{run}: {LORA_REFUSAL}")
    other_stage = other_stage or model.other_stage
    # The variant is for the other stage: the run's own result has plain weights.
    settings = ModelSettings(str(run), family.name, other_stage=other_stage)
    settings = replace(settings, variant=model.variant, cache_dir=model.cache_dir)
    base = open_base(settings, family)
    engines.check_base("torch", base, family, report)
    if base.other_stage is None or base.other_stage.adapter is not None:
        raise InputError(f"{other_stage}: {LORA_REFUSAL}")
    other_family = FAMILIES[family.stage.other_stage]
    index: Plain = {"_class_name": family.stage.combined_pipeline}
    index |= copy_stage(base, family, target)
    index |= copy_stage(base.other_stage, other_family, target)
    atomic.write_text(target / INDEX, json.dumps(index, indent=2) + "\n")
    report(
        f"{target}: {family.stage.combined_pipeline}.from_pretrained loads both stages from here"
    )


def copy_stage(base: BaseModel, family: Family, target: Path) -> dict[str, list[str]]:
    """Copy a stage's components into the folder of both, and return their index entries."""
    prefix = family.stage.prefix if family.stage else ""
    entries = {}
    for name in family.components:
        with atomic.write_folder(target / f"{prefix}{name}", manifest=False) as folder:
            copy_component(base, name, folder)
        entries[f"{prefix}{name}"] = list(base.component_class(name))
    return entries
