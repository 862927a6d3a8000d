"""Example code that draws a picture with a result."""

from collections.abc import Sequence
from dataclasses import dataclass

from limner.families import FAMILIES
from limner.families.family import Family, Stage


@dataclass(frozen=True)
class ExampleNames:
    """What stands in the code, as Python literals."""

    result: str  # a folder or a repository
    base: str
    other_stage: str
    prompt: str
    lora_file: str | None  # of the result; None: the result is a whole pipeline


def write_example(family: Family, names: ExampleNames) -> list[str]:
    """Return lines of Python that draw a picture with stock diffusers."""
    if family.stage is not None:
        return write_two_stage_example(family, family.stage, names)
    whole = names.result if names.lora_file is None else names.base
    lines = [f"pipeline = {family.pipeline}.from_pretrained({whole})"]
    if names.lora_file is not None:
        lines.append(f"pipeline.load_lora_weights({names.result})")
    return wrap_lines([family.pipeline], [*lines, f"image = pipeline({names.prompt}).images[0]"])


def write_two_stage_example(family: Family, stage: Stage, names: ExampleNames) -> list[str]:
    """Return lines of Python that draw a picture with both stages."""
    other = FAMILIES[stage.other_stage]
    assert other.stage is not None
    whole = names.result if names.lora_file is None else names.base
    lines = [
        f"{stage.variable} = {family.pipeline}.from_pretrained({whole})",
        f"{other.stage.variable} = {other.pipeline}.from_pretrained({names.other_stage})",
    ]
    if names.lora_file is not None:
        component = family.network.component
        lines.append(
            f"{stage.variable}.{component}.load_lora_adapter({names.result}, "
            f'prefix="{component}", weight_name={names.lora_file})'
        )
    pipelines = sorted([family.pipeline, other.pipeline])
    return wrap_lines(pipelines, [*lines, *stage.draw(names.prompt)])


def wrap_lines(pipelines: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Return the lines between the imports and the saving of ``image``."""
    return [f"from diffusers import {', '.join(pipelines)}\n", *lines, 'image.save("image.png")']
