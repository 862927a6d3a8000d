"""Example code that draws a picture with a result."""

from collections.abc import Sequence
from dataclasses import dataclass

from limner.families import FAMILIES
from limner.families.family import Family, Stage
from limner.json_types import Plain


@dataclass(frozen=True)
class ExampleNames:
    """What stands in the code, as Python literals."""

    result: str  # a folder or a repository
    base: str
    other_stage: str
    prompt: str
    lora_file: str | None  # of the result; None: the result is a whole pipeline
    # Of a LoRA: how its base is loaded besides by name, e.g. ``variant="fp16"``.
    options: tuple[str, ...] = ()
    # Of a LoRA: the class and settings of the scheduler, where the base's cannot draw with it.
    scheduler: tuple[str, Plain] | None = None
    classes: tuple[str, ...] = ()  # of diffusers, that the options name


def write_example(family: Family, names: ExampleNames) -> list[str]:
    """Return lines of Python that draw a picture with stock diffusers."""
    if family.stage is not None:
        return write_two_stage_example(family, family.stage, names)
    lines = load_trained(family, "pipeline", names)
    if names.lora_file is not None:
        lines.append(f"pipeline.load_lora_weights({names.result})")
    lines.append(f"image = pipeline({names.prompt}).images[0]")
    return wrap_lines([family.pipeline, *names.classes], lines)


def write_two_stage_example(family: Family, stage: Stage, names: ExampleNames) -> list[str]:
    """Return lines of Python that draw a picture with both stages."""
    other = FAMILIES[stage.other_stage]
    assert other.stage is not None
    lines = [
        *load_trained(family, stage.variable, names),
        f"{other.stage.variable} = {other.pipeline}.from_pretrained({names.other_stage})",
    ]
    if names.lora_file is not None:
        component = family.network.component
        lines.append(
            f"{stage.variable}.{component}.load_lora_adapter({names.result}, "
            f'prefix="{component}", weight_name={names.lora_file})'
        )
    pipelines = sorted([family.pipeline, other.pipeline])
    return wrap_lines([*pipelines, *names.classes], [*lines, *stage.draw(names.prompt)])


def load_trained(family: Family, variable: str, names: ExampleNames) -> list[str]:
    """Return the lines that load the pipeline of what was trained, but for a LoRA itself."""
    whole = names.result if names.lora_file is None else names.base
    arguments = ", ".join([whole, *names.options])
    lines = [f"{variable} = {family.pipeline}.from_pretrained({arguments})"]
    if names.scheduler is not None:
        class_name, settings = names.scheduler
        changes = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        lines.append(
            f"{variable}.scheduler = {class_name}.from_config("
            f"{variable}.scheduler.config, {changes})"
        )
    return lines


def wrap_lines(classes: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Return the lines between the imports and the saving of ``image``."""
    return [f"from diffusers import {', '.join(classes)}\n", *lines, 'image.save("image.png")']
