"""The scheduler that a result is drawn with, in previews, by ``limner generate`` and in what is
exported."""

from collections.abc import Mapping

from limner.diffusion.base_schedulers import GAUSSIAN
from limner.json_types import Plain

# Stock schedulers that draw with a network that predicts the sample.
SAMPLE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
# What DDIM takes over from the config of another scheduler.
DDIM_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "steps_offset",
    "set_alpha_to_one",
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "_diffusers_version",
)


def adapt_scheduler(
    config: Mapping[str, object], class_name: str, prediction_type: str | None
) -> Plain:
    """Return the config of the scheduler that a result is drawn with: the base's, with the
    prediction type that was trained.

    A scheduler that cannot draw with this prediction type is replaced by DDIM.

    Args:
        class_name: of the base's scheduler, as its model_index.json says.
        prediction_type: None: the base's own.
    """
    config = {**config, "_class_name": class_name}
    if prediction_type in (None, config.get("prediction_type", "epsilon")):
        return config
    if prediction_type != "sample" or class_name in SAMPLE_SCHEDULERS:
        return config | {"prediction_type": prediction_type}
    # What the config leaves to its class, DDIM would take otherwise.
    defaults = GAUSSIAN[class_name]
    betas = {name: getattr(defaults, name) for name in ("beta_start", "beta_end", "beta_schedule")}
    return {
        "_class_name": "DDIMScheduler",
        **betas,
        **{name: config[name] for name in DDIM_SETTINGS if name in config},
        "clip_sample": False,
        "prediction_type": prediction_type,
    }
