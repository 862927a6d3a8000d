"""Which of diffusers' schedulers a base may have, decided for each class of diffusers 0.42.

Training asks a scheduler for its noise only: how it steps when pictures are drawn does not matter.
"""

from dataclasses import dataclass

from limner.errors import InputError
from limner.json_types import Plain

FLOW = "FlowMatchEulerDiscreteScheduler"
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class NoiseDefaults:
    """The betas of a class where its config is silent, and the schedules that it knows."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    schedules: tuple[str, ...] = SCHEDULES
    rescales: bool = False  # whether it has ``rescale_betas_zero_snr``


USUAL, LATENT = NoiseDefaults(), NoiseDefaults(beta_start=0.00085, beta_end=0.012)
RESCALING = NoiseDefaults(rescales=True)
DDPM = NoiseDefaults(schedules=(*SCHEDULES, "sigmoid"), rescales=True)
# All of these noise by sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * e, at whole timesteps.
GAUSSIAN: dict[str, NoiseDefaults] = {
    "DDIMParallelScheduler": RESCALING,
    "DDIMScheduler": RESCALING,
    "DDPMParallelScheduler": DDPM,
    "DDPMScheduler": DDPM,
    "DEISMultistepScheduler": USUAL,
    "DPMSolverMultistepScheduler": RESCALING,
    "DPMSolverSDEScheduler": LATENT,
    "DPMSolverSinglestepScheduler": USUAL,
    "EulerAncestralDiscreteScheduler": RESCALING,
    "EulerDiscreteScheduler": RESCALING,
    "HeunDiscreteScheduler": LATENT,
    "KDPM2AncestralDiscreteScheduler": LATENT,
    "KDPM2DiscreteScheduler": LATENT,
    "LMSDiscreteScheduler": USUAL,
    "PNDMScheduler": USUAL,
    "SASolverScheduler": USUAL,
    # It has one schedule only, and writes no name of it.
    "UnCLIPScheduler": NoiseDefaults(
        beta_schedule="squaredcos_cap_v2", schedules=("squaredcos_cap_v2",)
    ),
    "UniPCMultistepScheduler": RESCALING,
}
OTHER_FLOW = "it is of flow matching with sigmas of its own"
EDM = "it is of EDM (arXiv:2206.00364), which scales the network's input and output"
CONSISTENCY = "it is of a consistency model, which training on noise alone would undo"
TOKENS = "it is of a model of discrete tokens"
INVERSE = "it turns pictures into noise and draws none"
VIDEO = "it is of a video model, whose noise schedule is shifted"
REFUSED: dict[str, str] = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": CONSISTENCY,
    "CogVideoXDDIMScheduler": VIDEO,
    "CogVideoXDPMScheduler": VIDEO,
    "ConsistencyDecoderScheduler": CONSISTENCY,
    "CosineDPMSolverMultistepScheduler": EDM,
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": "its timesteps are ratios from 0 to 1",
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DiscreteDDIMScheduler": TOKENS,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": OTHER_FLOW,
    "FlowMatchHeunDiscreteScheduler": OTHER_FLOW,
    "FlowMatchLCMScheduler": OTHER_FLOW,
    "HeliosDMDScheduler": OTHER_FLOW,
    "HeliosScheduler": OTHER_FLOW,
    "IPNDMScheduler": "its betas are those of a sine, which no setting names",
    "LCMScheduler": CONSISTENCY,
    "LTXEulerAncestralRFScheduler": OTHER_FLOW,
    "MiniMaxH3Scheduler": OTHER_FLOW,
    "PiflowScheduler": OTHER_FLOW,
    "RFD4ProteinaScheduler": OTHER_FLOW,
    "RePaintScheduler": "it fills masked parts of a picture",
    "SCMScheduler": CONSISTENCY,
    "ScoreSdeVeScheduler": "its noise has no upper bound",
    "TCDScheduler": CONSISTENCY,
    "VQDiffusionScheduler": TOKENS,
}
# Settings that change what a scheduler of ``GAUSSIAN`` adds noise by, or tells the network.
DISCRETE_SETTINGS = {"use_flow_sigmas": False, "timestep_type": "discrete"}


def check_scheduler(name: object, *, flow: bool) -> None:
    """Refuse a scheduler class on whose noise a family is not trained.

    Args:
        flow: whether the family is trained as a rectified flow.

    Raises:
        InputError: saying why.
    """
    if name == FLOW if flow else isinstance(name, str) and name in GAUSSIAN:
        return
    why = "diffusers 0.42 has no such class"
    if isinstance(name, str):
        why = REFUSED.get(name, why)
        if name in GAUSSIAN:
            why = "it is of Gaussian diffusion, and the base of flow matching"
        elif name == FLOW:
            why = "it is of flow matching, and this family is trained by Gaussian diffusion"
    expected = FLOW if flow else "DDPMScheduler or another of Gaussian diffusion"
    raise InputError(
        f"the base's scheduler: {str(name)[:80]!r} is not what Limner trains with: {why}. Choose a "
        f"base with {expected}"
    )


def list_silent_settings(scheduler: Plain) -> Plain:
    """Return the betas that a config leaves to its class, where those are not the usual ones.

    Those of UnCLIPScheduler, which writes no name of its schedule, are left out.
    """
    defaults = GAUSSIAN.get(str(scheduler.get("_class_name")), USUAL)
    return {
        name: getattr(defaults, name)
        for name in ("beta_start", "beta_end")
        if name not in scheduler and getattr(defaults, name) != getattr(USUAL, name)
    }


def check_noise_settings(scheduler: Plain) -> None:
    """Refuse settings with which a class of ``GAUSSIAN`` adds noise otherwise.

    Raises:
        InputError: naming the setting.
    """
    for name, expected in DISCRETE_SETTINGS.items():
        if scheduler.get(name, expected) not in (expected, None):
            raise InputError(
                f"the base's scheduler: {name} is {str(scheduler[name])[:80]!r}, {expected!r} is "
                "what Limner trains with; choose another base"
            )


def describe_doubts(scheduler: Plain, prediction_type: str | None) -> list[str]:
    """Say what of a base's noise schedule is served, and may not be what was meant."""
    if not scheduler.get("rescale_betas_zero_snr"):
        return []
    doubts = []
    name = scheduler.get("_class_name")
    if name in GAUSSIAN and not GAUSSIAN[name].rescales:
        doubts.append(
            f"the base's scheduler: rescale_betas_zero_snr is trained with, but a {name} knows no "
            "such setting, so pictures are drawn without it"
        )
    if prediction_type == "epsilon":
        doubts.append(
            "the base's scheduler: rescale_betas_zero_snr makes the last timestep pure noise, of "
            "which epsilon teaches nothing; v_prediction is usual with it (objective.predict)"
        )
    return doubts
