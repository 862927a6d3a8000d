"""What a config must hold to, beyond the types of its settings."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

from limner.config.declare import MOST, PIXELS, SEED, Beside, Range
from limner.config.schema import SETTINGS, BucketSettings, Config, DataSetSettings
from limner.config.toml import format_value
from limner.errors import InputError, shorten
from limner.json_types import Plain

NAME_BYTES, PATH_BYTES = 255, 4_000  # what file systems hold
MOST_REPEATS = 10_000  # each is a lap with an order of its own


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
        *check_idle(config, own_records),
    ]
    if problems:
        raise InputError("\n".join(problems))


def check_ranges(config: Config) -> Iterator[str]:
    """Complain of values outside the range that their setting declares, of numbers that nobody
    needs, and of texts that no file can be called."""
    for place, value in list_values(dataclasses.asdict(config)):
        name = re.sub(r"\[\d+\]", "", place)
        declaration = SETTINGS[name].declaration
        range_ = declaration.range
        most = find_most(value, range_)
        if range_ is not None and place == name and not range_.contains(value):
            yield f"{place}: {value} {range_.refusal}"
        elif most is not None and abs(value) > most:
            yield f"{place}: {shorten(repr(value))} is more than the {most:,} that are possible"
        elif isinstance(value, str) and value != SETTINGS[name].default:
            fault = find_fault(value, is_path=declaration.path)
            if fault is not None:
                yield f"{place}: {shorten(repr(value))} {fault}"


def find_most(value: Any, range_: Range | None) -> float | None:
    """Return the largest number that anybody needs in a setting; None where there is none."""
    most = MOST if range_ is None else range_.most
    if isinstance(value, int):
        return None if range_ is SEED else most
    return most if isinstance(value, float) and most < MOST else None


def list_values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a plain config that are given, each with its place, e.g.
    ``data.sets[0].folder``."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from list_values(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list | tuple) and not all(isinstance(one, float) for one in value):
        for i, inner in enumerate(value):
            yield from list_values(inner, f"{place}[{i}]")
    elif value is not None:
        yield place, value


def find_fault(text: str, *, is_path: bool) -> str | None:
    """What is wrong with a text that becomes a file's name or content, if anything is."""
    if "\0" in text:
        return "holds a NUL character, which no file can"
    if not is_path:
        return None
    if not text:
        return "is no path; give one (of a shell's variable that is not set, nothing is left)"
    try:
        parts = [os.fsencode(part) for part in text.split("/")]
    except UnicodeEncodeError:
        return "holds a character that no file's name can"
    longest = max(len(part) for part in parts)
    if longest > NAME_BYTES or len(os.fsencode(text)) > PATH_BYTES:
        return (
            f"is no place for a file: a name has at most {NAME_BYTES} bytes, and a path "
            f"{PATH_BYTES:,}"
        )
    return None


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
    for folder in (data.folder, *(one.folder for one in data.sets)):
        if folder is not None and os.path.abspath(folder) == os.path.abspath(config.run):
            yield (
                f"run: {config.run} is the folder of the pictures, and previews would be trained "
                "on; give another folder"
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
        if one.repeats > MOST_REPEATS:
            yield f"{name}.repeats: {one.repeats} is more than {MOST_REPEATS:,}, which are possible"
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
    if any(side > PIXELS.most for side in (step, smallest or 0, largest or 0, *resolutions)):
        yield f"data.buckets: no side may be above {PIXELS.most:,} pixels"
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


@dataclasses.dataclass(frozen=True)
class IdleSetting:
    """A setting that was given, and does nothing without another one."""

    place: str
    value: object
    default: object
    beside: Beside


def list_idle_settings(config: Config) -> Iterator[IdleSetting]:
    """The settings that have another value than their default, and do nothing without what is not
    given; see ``declare.Beside``."""
    for place, section in list_sections(config):
        for field in dataclasses.fields(section):
            name = f"{place}{field.name}"
            setting = SETTINGS.get(re.sub(r"\[\d+\]", "", name))
            value = getattr(section, field.name)
            if setting is None or value == field.default:
                continue
            beside, range_ = setting.declaration.beside, setting.declaration.range
            # What is out of range is refused for that.
            if beside is None or (range_ and value is not None and not range_.contains(value)):
                continue
            others = [config[n] if "." in n else getattr(section, n) for n in beside.names]
            if not is_given(beside, others):
                yield IdleSetting(name, value, field.default, beside)


def list_sections(section: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """A config's sections and all that are inside them, each with what its settings' names begin
    with, e.g. ``data.sets[0].``."""
    yield place, section
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from list_sections(value, f"{place}{field.name}.")
        elif isinstance(value, tuple):
            for i, inner in enumerate(value):
                if dataclasses.is_dataclass(inner):
                    yield from list_sections(inner, f"{place}{field.name}[{i}].")


def settle_idle(settings: Plain) -> Plain:
    """Return settings by name, with the default of each that does nothing beside the others."""
    return {
        name: SETTINGS[name].default if is_idle(name, settings) else value
        for name, value in settings.items()
    }


def is_idle(name: str, settings: Plain) -> bool:
    """Return whether a setting does nothing beside others, by name; see ``declare.Beside``."""
    setting = SETTINGS.get(name)
    beside = None if setting is None else setting.declaration.beside
    if beside is None:
        return False
    section = name.rpartition(".")[0]
    others = [settings.get(one if "." in one else f"{section}.{one}") for one in beside.names]
    return not is_given(beside, others)


def is_given(beside: Beside, others: list[Any]) -> bool:
    """Return whether one of the values of other settings is what must be beside a setting."""
    return any(one in beside.values if beside.values else one for one in others)


def check_idle(config: Config, own_records: bool) -> Iterator[str]:
    """Complain of settings that do nothing, where another run was meant."""
    for one in list_idle_settings(config):
        # A recipe's data set gives way to the caller's own records.
        if one.beside.refused and not (own_records and one.place.startswith("data.")):
            yield (
                f"{one.place}: {say_value(one.value)} does nothing without {one.beside.text}. Give "
                f"that, or leave {one.place} at its default, {say_value(one.default)}"
            )


def describe_idle_settings(config: Config) -> list[str]:
    """Lines about settings that do nothing, and do no harm."""
    names: dict[str, list[str]] = {}
    for one in list_idle_settings(config):
        if not one.beside.refused:
            names.setdefault(one.beside.text, []).append(one.place)
    return [
        f"{', '.join(places)}: {'does' if len(places) == 1 else 'do'} nothing without {text}"
        for text, places in names.items()
    ]


def say_value(value: object) -> str:
    """A setting's value as an override writes it."""
    return "none" if value is None else shorten(format_value(value))
