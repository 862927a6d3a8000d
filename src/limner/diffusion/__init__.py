"""Noise, objectives and samplers, on numpy alone; the objectives by the base's scheduler."""

from typing import Any

from limner.config.schema import ObjectiveSettings
from limner.diffusion.base_schedulers import FLOW, check_noise_settings, check_scheduler
from limner.diffusion.flow import FlowObjective
from limner.diffusion.gaussian import GaussianObjective
from limner.diffusion.objective import Objective
from limner.errors import InputError


def make_objective(scheduler: dict[str, Any], settings: ObjectiveSettings) -> Objective:
    """Make the objective of a base's ``scheduler_config.json`` and a recipe's settings.

    Raises:
        InputError: for a scheduler that is not served, or for settings that mean nothing to it.
    """
    name = scheduler.get("_class_name", "DDPMScheduler")
    check_scheduler(name, flow=name == FLOW)
    if name == FLOW:
        return FlowObjective.from_scheduler(scheduler, settings)
    check_noise_settings(scheduler)
    if settings.flow is not None:
        raise InputError(
            "objective.flow: it is for flow matching, and the base was trained on the noise "
            f"schedule of a {name}. Leave objective.flow out."
        )
    return GaussianObjective.from_scheduler(scheduler, settings)
