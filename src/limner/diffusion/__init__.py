"""Noise, objectives and samplers, on numpy alone; the objectives by the base's scheduler."""

from typing import Any

from limner.config.schema import ObjectiveSettings
from limner.diffusion.gaussian import GaussianObjective
from limner.diffusion.objective import Objective


def make_objective(scheduler: dict[str, Any], settings: ObjectiveSettings) -> Objective:
    """Make the objective of a base's ``scheduler_config.json`` and a recipe's settings.

    Raises:
        InputError: for settings that mean nothing to it.
    """
    return GaussianObjective.from_scheduler(scheduler, settings)
