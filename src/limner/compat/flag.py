"""A flag of a diffusers script, and the functions that turn parsed flags into settings."""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.json_types import Plain, read_object

TRACKERS = ("tensorboard", "wandb", "comet_ml")


@dataclass(frozen=True)
class Flag:
    """One flag of a script, and the settings that depend on it."""

    kind: type  # bool: a switch; list: one or more texts
    default: str | float | None
    settings: str  # dotted names, separated by spaces; empty: no setting depends on the flag
    help: str  # where no setting depends on the flag, the reason for that
    # Computes the settings' value from all flags. A dict gives each setting a value of its own;
    # without a function the settings take the flag's value.
    value: Callable[[Namespace], Any] | None = None
    choices: tuple[str, ...] | None = None
    required: bool = False
    needs: str = ""  # the flag without which this one does nothing

    @property
    def setting_names(self) -> list[str]:
        """The dotted names of the settings, one by one."""
        return self.settings.split()


@dataclass(frozen=True)
class Script:
    """One of the diffusers scripts: its flags, and the settings that no flag decides."""

    flags: dict[str, Flag]
    fixed_settings: Plain


def scale_learning_rate(arguments: Namespace) -> float:
    """Return the peak, which ``--scale_lr`` multiplies by the global batch size."""
    peak: float = arguments.learning_rate
    # The scripts of Kandinsky have no --scale_lr.
    return peak * count_global_batch(arguments) if vars(arguments).get("scale_lr") else peak


def scale_flax_learning_rate(arguments: Namespace) -> float:
    """Return the peak, which ``--scale_lr`` multiplies by the batch of this process's devices."""
    peak: float = arguments.learning_rate
    if not arguments.scale_lr:
        return peak
    import jax

    return peak * arguments.train_batch_size * jax.local_device_count()


def count_global_batch(arguments: Namespace) -> int:
    """Return the number of examples of one optimizer step, over all processes."""
    if arguments.resume_from_checkpoint:
        # A resumed run keeps the batch of its checkpoint on any number of processes.
        batch_size = read_checkpoint_batch(Path(arguments.output_dir))
        if batch_size is not None:
            return batch_size
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return int(arguments.gradient_accumulation_steps * arguments.train_batch_size * processes)


def read_checkpoint_batch(run: Path) -> int | None:
    """Return the batch size of a run's newest checkpoint, or None without a readable one."""
    from limner.storage import checkpoint
    from limner.storage.run_state import STATE_FILE

    checkpoints = checkpoint.list_checkpoints(run)
    if not checkpoints:
        return None
    try:
        text = (checkpoints[0] / STATE_FILE).read_text(encoding="utf-8")
        return int(read_object(text)["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def collect_adam_betas(arguments: Namespace) -> list[float]:
    """Return the decays of AdamW's first and second moment."""
    return [arguments.adam_beta1, arguments.adam_beta2]


def choose_ema_decay(arguments: Namespace) -> float | None:
    """Return the decay of the moving average, or None without ``--use_ema``."""
    return 0.9999 if arguments.use_ema else None


def choose_dream_exponent(arguments: Namespace) -> float | None:
    """Return DREAM's exponent, or None without ``--dream_training``."""
    return arguments.dream_detail_preservation if arguments.dream_training else None


def choose_timestep_bias(arguments: Namespace) -> Plain | None:
    """Return the table of the timestep bias, or None where all timesteps are drawn alike."""
    if arguments.timestep_bias_strategy == "none":
        return None
    names = ("strategy", "multiplier", "begin", "end", "portion")
    bias = {name: getattr(arguments, f"timestep_bias_{name}") for name in names}
    return {"objective.timestep_bias": bias}


def choose_trackers(arguments: Namespace) -> tuple[str, ...]:
    """Return the trackers to which metrics go besides metrics.jsonl."""
    from limner.training.sinks import list_installed_sinks

    if arguments.report_to == "none":
        return ()
    if arguments.report_to == "all":
        return list_installed_sinks()
    # TensorBoard is the scripts' default, so that a missing TensorBoard must stop nobody.
    if arguments.report_to == "tensorboard" and "tensorboard" not in list_installed_sinks():
        return ()
    return (arguments.report_to,)


def collect_preview_prompts(arguments: Namespace) -> list[str] | None:
    """Return the prompts of previews, or None without prompts or pictures."""
    values = vars(arguments)
    if not values.get("num_validation_images", 1):
        return None
    if values.get("validation_prompts"):
        return list(values["validation_prompts"])
    prompt = values.get("validation_prompt")
    return None if prompt is None else [prompt]


def choose_preview_epochs(arguments: Namespace) -> int | None:
    """Return the epochs from one preview to the next, or None without previews."""
    return arguments.validation_epochs if collect_preview_prompts(arguments) else None


def choose_preview_count(arguments: Namespace) -> int | None:
    """Return the number of pictures of each prompt, or None without previews."""
    return arguments.num_validation_images if collect_preview_prompts(arguments) else None


def choose_preview_decoder(arguments: Namespace) -> str | None:
    """Return the decoder that draws a prior's previews, or None without previews."""
    decoder: str = arguments.pretrained_decoder_model_name_or_path
    return decoder if collect_preview_prompts(arguments) else None


def choose_resume_point(arguments: Namespace) -> str:
    """Return the checkpoint to resume from: a name, a path, ``latest`` or ``never``."""
    which: str = arguments.resume_from_checkpoint
    if not which:
        return "never"
    if Path(which).is_dir():
        return which
    # diffusers looks at the last part of a path only.
    name = Path(which).name
    return name if Path(arguments.output_dir, name).is_dir() else which


def choose_hub_repository(arguments: Namespace) -> str | None:
    """Return the repository to push to, by default named as the output folder."""
    if not arguments.push_to_hub:
        return None
    return arguments.hub_model_id or Path(os.path.abspath(arguments.output_dir)).name
