"""What a checkpoint remembers of its run, and what may change when it is resumed."""

import json

import numpy as np

from limner import rng
from limner.base_model.base import INDEX
from limner.config import toml
from limner.config.rules import settle_idle
from limner.config.schema import SETTINGS, Config
from limner.errors import InputError
from limner.json_types import Plain
from limner.protocols import Report
from limner.redaction import redact
from limner.storage import atomic
from limner.storage.checkpoint import Checkpoint
from limner.storage.run_state import RunState
from limner.training.batch_plan import BatchPlan

# Settings that say which weights a base has, besides its name.
PARTS_OF_BASE = ("revision", "trained_revision", "variant", "vae", "other_stage")


def make_run_state(
    config: Config,
    plan: BatchPlan,
    data_digest: str,
    base_digest: str,
    scheduler: str = "",
    held_out_apart: bool = True,
) -> RunState:
    """What a checkpoint remembers of its run, besides arrays."""
    return RunState(
        config=toml.to_saved(config),
        seed=plan.seed,
        batch_size=plan.batch_size,
        world_size=plan.world_size,
        records=plan.records,
        mixture=[[one.repeats, one.weight] for one in config.data.sets],
        data_digest=data_digest,
        base_digest=base_digest,
        random_digest=digest_random_numbers(plan.seed),
        numpy_version=np.__version__,
        scheduler=scheduler,
        held_out_apart=held_out_apart,
    )


def digest_random_numbers(seed: int) -> str:
    """A digest of some draws: another numpy might make other normal numbers from the same bits."""
    noise = [rng.at(seed, "noise", p).standard_normal(64, np.float32) for p in range(4)]
    order = rng.at(seed, "order", 0).permutation(32)
    return atomic.digest_json([np.concatenate(noise).tobytes().hex(), order.tolist()])


def report_changes(
    checkpoint: Checkpoint, run_state: RunState, plan: BatchPlan, report: Report
) -> None:
    """Say what differs from the checkpoint by permission.

    Raises:
        InputError: for a difference without permission.
    """
    for line in check_unchanged(checkpoint.state, run_state, checkpoint.step):
        report(line)
    if plan.steps < checkpoint.step:
        report(f"checkpoint-{checkpoint.step} is past the {plan.steps} steps that are asked for")


def check_unchanged(saved: RunState, now: RunState, step: int) -> list[str]:
    """Refuse to go on from a checkpoint when what the weights depend on has changed.

    Returns:
        A line for each change that is allowed.

    Raises:
        InputError: naming each setting, its value in the checkpoint and its value now.
    """
    allowed = now.config["checkpoint"]["allow_changes"]
    changed = list_changed_settings(saved, now)
    problems = [line for name, line in changed.items() if name not in allowed]
    problems += list_changed_inputs(saved, now)
    if problems:
        on_request = [
            name for name in changed if name not in allowed and declares(name, "on request")
        ]
        hint = (
            f" To change it all the same: checkpoint.allow_changes={json.dumps(on_request)}."
            if on_request
            else ""
        )
        raise InputError(
            f"checkpoint-{step} cannot be resumed, because this has changed:\n  "
            + "\n  ".join(problems)
            + "\nPut it back, or begin a new run in another folder."
            + hint
        )
    return [f"from step {step} on, {line}" for name, line in changed.items() if name in allowed]


def declares(name: str, resume: str) -> bool:
    """Whether a setting's declaration says this of resuming; one that is unknown now is fixed."""
    setting = SETTINGS.get(name)
    return setting is not None and setting.declaration.resume == resume


def list_changed_settings(saved: RunState, now: RunState) -> dict[str, str]:
    """Settings that are not free to change and have changed, each with a line about it.

    One that did not exist when the run began had its default, which means what was done before. One
    that does nothing beside the others counts as its default.
    """
    before = toml.flatten(toml.to_plain(Config())) | toml.flatten(
        redact(saved.config, environment=False)
    )
    before, after = settle_idle(before), settle_idle(toml.flatten(now.config))
    return {
        name: f"{name}: was {before.get(name)!r}, now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not declares(name, "free")
    }


def list_changed_inputs(saved: RunState, now: RunState) -> list[str]:
    """Lines about records, base and random numbers that are others than the checkpoint's."""
    lines = []
    if saved.mixture != now.mixture:
        lines.append(f"data.sets: repeats and weights were {saved.mixture}, now {now.mixture}")
    if saved.data_digest != now.data_digest:
        before, after = (
            f"{state.records} records of {describe_source(state.config['data'])}"
            for state in (saved, now)
        )
        lines.append(
            f"the data set: was {before}, now {after}, and the pictures or captions are not the "
            "same"
        )
    model = now.config["model"]
    lines += list_changed_base(saved, now.base_digest, now.scheduler, model)
    if saved.random_digest != now.random_digest:
        lines.append(
            f"random numbers: numpy {saved.numpy_version} drew others than numpy "
            f"{now.numpy_version} does; install numpy {saved.numpy_version}"
        )
    return lines


def list_changed_base(saved: RunState, digest: str, scheduler: str, model: Plain) -> list[str]:
    """A line about a base that is another than the checkpoint's; none where it is the same.

    Args:
        digest: of the base now; see ``BaseModel.fingerprint``.
        scheduler: the class of its scheduler now.
        model: the settings of the base now.
    """
    if saved.base_digest == digest:
        if saved.scheduler in ("", scheduler):
            return []
        return [f"the base's scheduler in {INDEX}: was {saved.scheduler}, now {scheduler}"]
    before = saved.config["model"]
    others = "".join(
        f", model.{name} was {before.get(name)!r}, now {model.get(name)!r}"
        for name in PARTS_OF_BASE
        if before.get(name) != model.get(name)
    )
    return [
        f"the base model: was {before['base']}, now {model['base']}{others}, and the weights or "
        "configuration are not the same"
    ]


def check_base_of_checkpoint(checkpoint: Checkpoint, digest: str, scheduler: str) -> None:
    """Refuse to make a result of a checkpoint and of parts that it was not trained with; the
    arguments are those of ``list_changed_base``.

    Raises:
        InputError: when the base is another than the checkpoint's.
    """
    state = checkpoint.state
    if lines := list_changed_base(state, digest, scheduler, state.config["model"]):
        raise InputError(
            f"checkpoint-{checkpoint.step} cannot be exported, because this has changed:\n  "
            + "\n  ".join(lines)
            + "\nPut it back: what does not learn is copied from it."
        )


def describe_source(data: Plain) -> str:
    """What a data section of a config names."""
    return (
        data["folder"]
        or data["hub"]
        or ", ".join(one["folder"] or one["hub"] for one in data.get("sets") or [])
        or "the caller's own"
    )
