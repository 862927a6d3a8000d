"""The model families, by name; each is one file."""

from limner.families.sd import SD
from limner.families.sdxl import SDXL
from limner.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL)}
