"""The arrays of published models, as data: what is compared where no engine is installed.

``tests/published_shapes.py`` makes the table, and a test makes it again.
"""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from limner.base_model.base import BaseModel
from limner.base_model.comparison import (
    ExpectedArrays,
    Shape,
    check_arrays,
    check_counts,
    read_stored,
)
from limner.base_model.configs import list_components_with_weights
from limner.families.family import Family
from limner.json_types import Plain

TABLE = Path(__file__).with_name("published_shapes.json.gz")


def check_base(base: BaseModel, family: Family) -> list[str]:
    """Compare the components of a base that are built as those of a published model.

    Returns:
        The names of the components that are built otherwise, which were not compared.

    Raises:
        InputError: naming the folder and what differs.
    """
    unknown = []
    for name in list_components_with_weights(family):
        folder, class_name = base.component_folder(name), base.component_class(name)[1]
        stored = {one: array for one, (_, array) in read_stored(base.weight_files(name)).items()}
        check_counts(folder / "config.json", base.configs[name], len(stored))
        expected = find_expected(class_name, base.configs[name])
        if expected is None:
            unknown.append(name)
        else:
            check_arrays(folder, class_name, stored, expected)
    return unknown


def find_expected(class_name: str, config: Plain) -> ExpectedArrays | None:
    """Return the arrays of the published component with these settings; None for any other."""
    for entry in read_table():
        is_equal = all(
            config.get(name, usual) == value for name, (value, usual) in entry["settings"].items()
        )
        if entry["class"] == class_name and is_equal:
            tied = tuple(tuple(names) for names in entry["tied"])
            return ExpectedArrays(unfold_names(entry["arrays"]), tied)
    return None


@functools.cache
def read_table() -> list[Plain]:
    """Read the table."""
    table: list[Plain] = json.loads(gzip.decompress(TABLE.read_bytes()))
    return table


def fold_names(shapes: dict[str, list[int]]) -> Plain:
    """Return shapes as objects in one another, by the parts of the arrays' names."""
    folded: Plain = {}
    for name, shape in shapes.items():
        place: Any = folded
        *parents, last = name.split(".")
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = shape
    return folded


def unfold_names(folded: Plain, prefix: str = "") -> dict[str, Shape]:
    """Return the inverse of ``fold_names``."""
    shapes: dict[str, Shape] = {}
    for part, inner in folded.items():
        name = f"{prefix}{part}"
        if isinstance(inner, dict):
            shapes |= unfold_names(inner, f"{name}.")
        else:
            shapes[name] = tuple(inner)
    return shapes
