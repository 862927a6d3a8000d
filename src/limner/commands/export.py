"""``limner export``: write a result again, push it, or combine two stages in one folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from limner.base_model.base import INDEX, read_json
from limner.base_model.open import open_base
from limner.config import toml
from limner.config.schema import Config, ModelSettings
from limner.diffusion.objective import Objective
from limner.errors import InputError, IntegrityError
from limner.families import FAMILIES
from limner.storage import atomic, checkpoint
from limner.training.push import push_result
from limner.training.result import copy_component, read_result, write_result


def export_run(
    run: Path, *, push_to: str | None, private: bool, report: Callable[[str], None] = print
) -> None:
    """Write the result of a run's newest good checkpoint, and push it where that is wished for.

    Raises:
        InputError: when the folder holds no checkpoint.
    """
    if not checkpoint.list_checkpoints(run):
        raise InputError(
            f"{run}: there is no checkpoint here, so there is nothing to export. Give the folder "
            "of a run."
        )
    with atomic.lock(run):
        atomic.sweep(run)
        found = checkpoint.find_latest(run, report)
        if found is None:
            raise IntegrityError(f"{run}: no checkpoint is whole, so there is nothing to export.")
        config = toml.build(Config, {**found.state["config"], "run": str(run)})
        config = replace(config, export=replace(config.export, hub=push_to or config.export.hub))
        family = FAMILIES[config.model.family]
        base = open_base(config.model, family, draws=False)
        write_result(
            found,
            config,
            base,
            family,
            Objective.from_scheduler(base.configs["scheduler"], config.objective).prediction_type,
        )
        report(f"{run}: the result of step {found.step} is here")
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
        other_stage: the other stage: a run, a folder or a Hub repository; None: the one that the
            run was trained beside.

    Raises:
        InputError: for a run of another kind, or a folder that is not empty.
    """
    found = read_result(run)
    model = toml.build(ModelSettings, read_json(run / "config.json").get("model", {}))
    family = FAMILIES[model.family]
    if family.stage is None:
        raise InputError(
            f"{run}: a {family.pipeline} makes pictures alone; there is nothing to put beside it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: it is there already, and not empty; choose another folder")
    own = None
    if found["kind"] != "lora":
        own = open_base(
            ModelSettings(
                str(run),
                family.name,
                other_stage=other_stage or model.other_stage,
                cache_dir=model.cache_dir,
            ),
            family,
        )
    if own is None or own.other_stage is None or own.other_stage.adapter is not None:
        raise InputError(
            f"{run if own is None else other_stage or model.other_stage}: a LoRA is no folder of "
            "weights; "
            "limner generate puts it on its base"
        )
    index = {"_class_name": family.stage.combined_pipeline}
    for half, opened in ((family, own), (FAMILIES[family.stage.other_stage], own.other_stage)):
        for name in half.components:
            place = f"{half.stage.prefix if half.stage else ''}{name}"
            with atomic.write_folder(target / place, manifest=False) as path:
                copy_component(opened, name, path)
            index[place] = list(opened.component_class(name))  # type: ignore[assignment]
    atomic.write_text(target / INDEX, json.dumps(index, indent=2) + "\n")
    report(
        f"{target}: {family.stage.combined_pipeline}.from_pretrained loads both stages from here"
    )
