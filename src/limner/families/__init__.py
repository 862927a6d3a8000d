"""The model families, by name; each is one file."""

from limner.config import Config
from limner.families.kandinsky22 import DECODER, PRIOR
from limner.families.sd import SD
from limner.families.sdxl import SDXL
from limner.family import Family
from limner.faults import InputFault

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL, PRIOR, DECODER)}


def family_of(cfg: Config) -> Family:
    """The family of a recipe.

    Raises:
        InputFault: when there is none of that name, or for a setting that means nothing to it.
    """
    family = FAMILIES.get(cfg.model.family)
    if family is None:
        raise InputFault(f"model.family: {cfg.model.family!r} is not one of {', '.join(FAMILIES)}")
    plain = Config()
    if asked := [name for name in family.unused if cfg[name] != plain[name]]:
        raise InputFault(
            "\n".join(
                f"{name}: it means nothing to family {family.name!r}. Leave {name} out."
                for name in asked
            )
        )
    return family


def drawn_by(kind: str) -> Family | None:
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
