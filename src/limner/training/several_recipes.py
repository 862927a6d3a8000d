"""Train several recipes one after the other; a run serves the later ones as their other stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from limner import engines
from limner.base_model.open import open_base
from limner.config.schema import SETTINGS, Config, ModelSettings
from limner.errors import InputError, report_once
from limner.families import get_family
from limner.progress import print_line
from limner.protocols import Report
from limner.training.loop import run_in_group
from limner.training.resolve import check_places, resolve
from limner.training.signals import Stop


def run_all(configs: Sequence[Config], report: Report = print_line) -> list[Path]:
    """Train one recipe after the other; a run serves the later ones as their other stage.

    Raises:
        LimnerError: what ``run_training`` raises. What is wrong with the recipes and bases of any
            is known before the first is trained.
    """
    with report_once():
        linked = link_stages(configs)
        for config in configs:
            check_places(config)
    with Stop() as stop, engines.join_processes(configs[0].engine) as process:
        with report_once():
            process.first(lambda: open_bases(configs))
        return [run_in_group(config, None, report, stop, process) for config, _ in linked]


def link_stages(configs: Sequence[Config]) -> list[tuple[Config, ModelSettings]]:
    """Each recipe beside the earlier one that trains its other stage, and the model that can be
    looked at before that one has been trained.

    Raises:
        InputError: for recipes that cannot be trained one after the other.
    """
    shared = [name for name, one in SETTINGS.items() if one.declaration.shared]
    linked: list[tuple[Config, ModelSettings]] = []
    for config in configs:
        _, family = resolve(config)
        earlier = {one.model.family: one for one, _ in linked}
        if any(config.run == one.run for one, _ in linked):
            raise InputError(
                f"run: two recipes would train in {config.run}. Give each a run of its own, in the "
                "recipes."
            )
        if different := [name for name in shared if config[name] != configs[0][name]]:
            raise InputError(
                f"engine: recipes that are trained one after the other need the same {different[0]}"
            )
        before = earlier.get(family.other_stage) if family.other_stage else None
        if before is None:
            linked.append((config, config.model))
            continue
        trained = replace(config.model, other_stage=before.run)
        untrained = replace(config.model, other_stage=before.model.base)
        linked.append((replace(config, model=trained), untrained))
    return linked


def open_bases(configs: Sequence[Config]) -> None:
    """Open the base of every recipe, so that a bad one is refused before anything is trained."""
    for config, model in link_stages(configs):
        open_base(model, get_family(config), for_generation=False)
