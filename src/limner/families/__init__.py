"""The model families, by name; each is one file."""

from limner.config.schema import Config
from limner.errors import InputError
from limner.families.family import Family
from limner.families.kandinsky22 import DECODER, PRIOR
from limner.families.sd import SD
from limner.families.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL, PRIOR, DECODER)}


def get_family(config: Config) -> Family:
    """The family of a recipe.

    Raises:
        InputError: when there is none of that name, or for a setting that means nothing to it.
    """
    family = FAMILIES.get(config.model.family)
    if family is None:
        raise InputError(
            f"model.family: {config.model.family!r} is not one of {', '.join(FAMILIES)}"
        )
    plain = Config()
    if asked := [name for name in family.ignored_settings if config[name] != plain[name]]:
        raise InputError(
            "\n".join(
                f"{name}: it means nothing to family {family.name!r}. Leave {name} out."
                for name in asked
            )
        )
    return family


def find_pipeline_family(kind: str) -> Family | None:
    """The family whose whole pipeline is of a class, or was of Flax's class of that name; None: no
    one's is."""
    return next(
        (
            family
            for family in FAMILIES.values()
            if family.stage is None and family.pipeline == kind.removeprefix("Flax")
        ),
        None,
    )
