"""What a config must hold to, beyond the types of its settings."""

from collections.abc import Iterator
from typing import Any

from limner.config.schema import SETTINGS, BucketSettings, Config, DataSetSettings
from limner.errors import InputError


def check_config(config: Config, *, own_records: bool = False) -> None:
    """Refuse what cannot be honoured, before anything is loaded.

    Raises:
        InputError: naming the settings, what was given and what is expected.
    """
    problems = [
        *check_sources(config, own_records),
        *check_training(config),
        *check_ranges(config),
        *check_mixture(config.data.sets),
        *check_buckets(config.data.buckets),
        *check_changes(config.checkpoint.allow_changes),
    ]
    if problems:
        raise InputError("\n".join(problems))


def check_ranges(config: Config) -> Iterator[str]:
    """Complain of values outside the range that their setting declares."""
    for name, value in list_values(config):
        range_ = SETTINGS[name].declaration.range
        if value is not None and range_ is not None and not range_.contains(value):
            yield f"{name}: {value} {range_.refusal}"


def list_values(config: Config) -> Iterator[tuple[str, Any]]:
    """The value of every setting, but for those inside lists and inside what is not given."""
    for name in SETTINGS:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        yield name, value


def check_sources(config: Config, own_records: bool) -> Iterator[str]:
    """Complain of a base or of records that are missing or given twice."""
    data = config.data
    if not config.model.base:
        yield (
            "model.base: give a folder or a Hub repository in the diffusers layout, e.g. "
            "stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    given = [data.folder is not None, data.hub is not None, bool(data.sets)]
    if not own_records and sum(given) != 1:
        yield (
            "data: give exactly one of data.folder, data.hub and data.sets; data.folder=none "
            "takes the recipe's away"
        )
    if data.crop_variants is not None and data.crop != "random":
        yield (
            'data.crop_variants: only a random crop comes in several; set data.crop="random" or '
            "leave data.crop_variants out"
        )


def check_training(config: Config) -> Iterator[str]:
    """Complain of settings that contradict each other."""
    train, preview = config.train, config.preview
    if (train.steps is None) == (train.epochs is None):
        yield "train: give exactly one of train.steps and train.epochs"
    if train.batch_size is not None and train.accumulation_steps is not None:
        yield "train: give train.batch_size (global) or train.accumulation_steps, not both"
    if train.batch_size is None and train.micro_batch_size is None:
        yield (
            "train: give train.batch_size (global: what one optimizer step sees), or "
            "train.micro_batch_size"
        )
    if config.adapter.text_encoders and config.adapter.kind != "lora":
        yield 'adapter.text_encoders: text encoders learn by adapters only; set adapter.kind="lora"'
    hold_out = config.validation.hold_out
    if hold_out > 1 and hold_out != int(hold_out):
        yield (
            f"validation.hold_out: {hold_out} is neither a number of records nor a share of them "
            "below 1"
        )
    if preview.every is not None and preview.every_epochs is not None:
        yield "preview: give preview.every (steps) or preview.every_epochs, not both"


def check_mixture(sets: tuple[DataSetSettings, ...]) -> Iterator[str]:
    """Complain of several data sets that do not go together."""
    weighted = [one.weight is not None for one in sets]
    if any(weighted) and not all(weighted):
        yield "data.sets: give a weight to every data set, or to none"
    for i, one in enumerate(sets):
        name = f"data.sets[{i}]"
        if (one.folder is None) == (one.hub is None):
            yield f"{name}: give exactly one of folder and hub"
        if one.repeats < 1:
            yield (
                f"{name}.repeats: {one.repeats} is below 1; leave a data set out to have none of it"
            )
        if one.weight is not None and one.weight <= 0:
            yield (
                f"{name}.weight: {one.weight} is not above 0; leave a data set out to have none of "
                "it"
            )
        if one.weight is not None and one.repeats != 1:
            yield (
                f"{name}: a weight says already how often its records come; give weight or repeats"
            )


def check_buckets(buckets: BucketSettings | None) -> Iterator[str]:
    """Complain of sizes from which no buckets can be made."""
    if buckets is None:
        return
    step, smallest, largest = buckets.step, buckets.smallest, buckets.largest
    resolutions = list(buckets.resolutions)
    if step <= 0 or step % 8 != 0:
        yield (
            f"data.buckets.step: {step} is not a multiple of 8 above 0; latents have an eighth of "
            "a "
            "picture's sides"
        )
    if smallest is not None and smallest <= 0:
        yield f"data.buckets.smallest: {smallest} is not above 0"
    if largest is not None and largest < (smallest or 1):
        yield f"data.buckets.largest: {largest} is below the smallest side, {smallest or 1}"
    if any(resolution <= 0 for resolution in resolutions):
        yield f"data.buckets.resolutions: {resolutions} are not all above 0"
    if len(set(resolutions)) < len(resolutions):
        yield f"data.buckets.resolutions: {resolutions} has one of them twice"


def check_changes(names: tuple[str, ...]) -> Iterator[str]:
    """Complain of changes on resume that are not for the user to allow."""
    allowed = [n for n, one in SETTINGS.items() if one.declaration.resume == "on request"]
    for i, name in enumerate(names):
        if name not in allowed:
            yield (
                f"checkpoint.allow_changes[{i}]: {name!r} was given, one of "
                f"{', '.join(map(repr, allowed))} is expected"
            )
