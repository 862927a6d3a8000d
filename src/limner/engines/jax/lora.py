"""Adapters in JAX: arrays beside those of the frozen network, under the names that files use."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from limner.config.schema import AdapterSettings
from limner.engines.adapters import AdapterArray, Shape, list_adapters
from limner.errors import InputError
from limner.families.family import Family


def list_linear_adapters(
    shapes: Mapping[str, Mapping[str, Shape]], settings: AdapterSettings, family: Family
) -> dict[str, AdapterArray]:
    """List the arrays of all adapters; see ``engines.adapters.list_adapters``.

    Raises:
        InputError: for a target that names no module, or no linear layer.
    """
    listed = list_adapters(shapes, settings, family)
    for array in listed.values():
        if len(array.weight_shape) != 2:
            layer = array.weight.removesuffix(".weight")
            raise InputError(
                f"adapter.targets: {layer} is no linear layer, which the JAX engine's adapters need"
            )
    return listed


def make_adapters(
    nets: dict[str, dict[str, np.ndarray]], settings: AdapterSettings, family: Family, seed: int
) -> dict[str, np.ndarray]:
    """Return the first values of all adapters of some components, by their names in files.

    Args:
        nets: the arrays of each component.

    Raises:
        InputError: see ``list_linear_adapters``.
    """
    shapes = {
        component: {name: array.shape for name, array in arrays.items()}
        for component, arrays in nets.items()
    }
    return {
        name: array.initial_values(
            settings, family, seed, partial(nets[array.component].__getitem__, array.weight)
        )
        for name, array in list_linear_adapters(shapes, settings, family).items()
    }
