"""The model families, by name; each is one file."""

from limner.config.schema import SETTINGS, Config
from limner.errors import InputError
from limner.families.family import Family
from limner.families.kandinsky22 import DECODER, PRIOR
from limner.families.sd import SD
from limner.families.sd3 import SD3
from limner.families.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL, SD3, PRIOR, DECODER)}


def get_family(config: Config) -> Family:
    """Return the family of a recipe.

    Raises:
        InputError: when there is none of that name, or for a setting that means nothing to it.
    """
    family = FAMILIES.get(config.model.family)
    if family is None:
        raise InputError(
            f"model.family: {config.model.family!r} is not one of {', '.join(FAMILIES)}"
        )
    plain = Config()
    unmeant = [n for n, one in SETTINGS.items() if one.declaration.needs in family.lacks]
    lines = [
        f"{name}: it means nothing to family {family.name!r}. Leave {name} out."
        for name in unmeant
        if config[name] != plain[name]
    ]
    if lines:
        raise InputError("\n".join(lines))
    return family


def find_pipeline_family(pipeline_class: str) -> Family | None:
    """Return the family of a pipeline class, Flax's or not; None where no family has it alone."""
    name = pipeline_class.removeprefix("Flax")
    for family in FAMILIES.values():
        if family.stage is None and family.pipeline == name:
            return family
    return None
