"""The schedulers that pictures are drawn with: their settings in diffusers, and what JAX serves.

What a ``scheduler_config.json`` leaves out is what the class says, by test.
"""

from collections.abc import Mapping
from typing import Any

from limner.diffusion.result_scheduler import SAMPLE_SCHEDULERS
from limner.errors import InputError
from limner.json_types import Plain

# By the names of ``--scheduler``: the class, and what is set whatever the base says.
SCHEDULERS: dict[str, tuple[str, Plain]] = {
    # Some of these classes clip latents unless they are told not to.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# The values of settings that JAX has no code for, so that nothing else is served.
SIGMAS: Plain = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
SOLVER: Plain = SIGMAS | {
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
}
SERVED_SETTINGS: dict[str, Plain] = {
    "DDIMScheduler": {"clip_sample": False, "thresholding": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": SIGMAS
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    },
    "DPMSolverMultistepScheduler": SOLVER
    | {
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "UniPCMultistepScheduler": SOLVER
    | {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
        "sigma_min": None,
        "sigma_max": None,
    },
}
# diffusers' defaults of what is served in more than one value.
USUAL: Plain = {"timestep_spacing": "linspace", "steps_offset": 0, "prediction_type": "epsilon"}
KARRAS: Plain = USUAL | {"use_karras_sigmas": False}
DEFAULTS: dict[str, Plain] = {
    "DDIMScheduler": USUAL | {"timestep_spacing": "leading", "set_alpha_to_one": True},
    "PNDMScheduler": USUAL | {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "EulerDiscreteScheduler": KARRAS,
    "DPMSolverMultistepScheduler": KARRAS,
    "UniPCMultistepScheduler": KARRAS,
}
# Defaults of settings that are served in one value, where that is not the default.
UNSERVED_DEFAULTS: dict[str, Plain] = {
    "DDIMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"skip_prk_steps": False},
}
# What a class takes for the value of another class's setting of the same name.
TRANSLATIONS: dict[str, dict[str, Plain]] = {
    "DPMSolverMultistepScheduler": {
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
        # DDPM's variances, which it has no use for.
        "variance_type": dict.fromkeys(("fixed_small", "fixed_small_log", "fixed_large"), None),
    },
    "UniPCMultistepScheduler": {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
    },
}
CHOICES: dict[str, tuple[str, ...]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}


def adapt_to_pipeline(config: Plain, pipeline: str, name: str | None) -> Plain:
    """Return a base's scheduler config as the stock pipeline takes it.

    That of Stable Diffusion 1.x and 2.x sets ``steps_offset`` to 1 and ``clip_sample`` to False.

    Args:
        pipeline: the class of the stock pipeline.
        name: of the scheduler that takes its place afterwards; None: none does.
    """
    if pipeline != "StableDiffusionPipeline":
        return config
    # A scheduler that takes the place of the base's knows what its config says, and no defaults.
    changed = {
        key: value
        for key, value in (("steps_offset", 1), ("clip_sample", False))
        if name is None or key in config
    }
    return config | changed


def settle_settings(config: Plain, name: str | None) -> Plain:
    """Return all settings of the sampler that draws, as its class in diffusers takes them.

    Args:
        config: of the base's scheduler.
        name: one of ``SCHEDULERS``; None: the class that the config names.

    Raises:
        InputError: for a class, or a setting's value, that JAX has no code for.
    """
    class_name, changes = SCHEDULERS[name] if name else (config.get("_class_name"), {})
    if class_name not in DEFAULTS:
        raise InputError(
            f"scheduler: {name or class_name!r} has no table here; choose one of "
            f"{', '.join(list_served())}"
        )
    given = config | changes
    for key, values in TRANSLATIONS.get(class_name, {}).items():
        if isinstance(given.get(key), str) and given[key] in values:
            given[key] = values[given[key]]
    served = SERVED_SETTINGS[class_name]
    settings = served | UNSERVED_DEFAULTS.get(class_name, {}) | DEFAULTS[class_name] | given
    unsupported = list_unsupported(class_name, settings, given)
    if unsupported:
        raise InputError(
            f"scheduler: of a {class_name} with {'; '.join(unsupported)} there is no table here; "
            f"choose one of {', '.join(list_served())} by name, or --engine torch"
        )
    return settings | {"_class_name": class_name}


def list_unsupported(class_name: str, settings: Plain, given: Plain) -> list[str]:
    """Say which settings of a sampler there is no code for.

    Args:
        given: those that its config has.
    """
    problems = [
        f"{key} is {settings[key]!r:.80}" + ("" if key in given else ", where its config says none")
        for key, value in SERVED_SETTINGS[class_name].items()
        if settings[key] != value
    ]
    choices = dict(CHOICES)
    if class_name not in SAMPLE_SCHEDULERS:
        choices["prediction_type"] = choices["prediction_type"][:2]
    return problems + [
        f"{key} is {settings[key]!r:.80}, and none of {', '.join(values)}"
        for key, values in choices.items()
        if settings[key] not in values
    ]


def list_served() -> list[str]:
    """Return the names of the samplers that JAX has code for."""
    return [name for name, (class_name, _) in SCHEDULERS.items() if class_name in DEFAULTS]


def read_whole_number(settings: Mapping[str, Any], name: str, default: int) -> int:
    """Return a setting that counts timesteps.

    Raises:
        InputError: when it is no whole number from 0.
    """
    value = settings.get(name, default)
    if type(value) is not int or value < 0:
        raise InputError(
            f"scheduler: {name} is {value!r:.80}, a whole number from 0 is expected. Fetch or save "
            "the model again."
        )
    return value
