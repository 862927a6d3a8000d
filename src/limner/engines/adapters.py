"""Adapters: which layers get one, what its arrays are called in files, and how they start.

A kind of adapter is a record; both engines build what it lists, and start alike to the bit.
"""

import difflib
import math
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from limner import rng
from limner.config.schema import AdapterSettings
from limner.errors import InputError
from limner.families.family import Family
from limner.storage.layout import target_modules

Shape = tuple[int, ...]
ADAPTED_DIMENSIONS = (2, 4)  # of the weights of linear layers and of convolutions
MAX_SUGGESTED = 3  # names in a message
ReadWeight = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Start:
    """What the first values of an adapter's array may depend on."""

    shape: Shape
    settings: AdapterSettings
    generator: np.random.Generator  # addressed by the run's seed and the array's name
    read_weight: ReadWeight  # the layer's frozen weight, float32 [out, in, ...]


@dataclass(frozen=True)
class ArrayKind:
    """One array of an adapter, beside the weight [out, in, ...] of its layer."""

    suffix: str  # its name in files, after the layer's
    shape: Callable[[Shape, AdapterSettings], Shape]  # from the weight's
    start: Callable[[Start], np.ndarray]  # its first values, float32


@dataclass(frozen=True)
class AdapterArray:
    """One array that a run trains."""

    name: str  # in files, e.g. unet.mid_block.attentions.0.proj_in.lora_A.weight
    component: str
    weight: str  # the name of the layer's weight in the component
    weight_shape: Shape
    shape: Shape
    kind: ArrayKind

    def initial_values(
        self, settings: AdapterSettings, family: Family, seed: int, read_weight: ReadWeight
    ) -> np.ndarray:
        """Return the values that training starts from, float32."""
        # The trained network's name is not part of the address.
        address = self.name.removeprefix(f"{family.network.component}.")
        generator = rng.at(seed, "lora", zlib.crc32(address.encode()))
        return self.kind.start(Start(self.shape, settings, generator, read_weight))


def draw_normal(start: Start) -> np.ndarray:
    """Draw from a normal distribution with standard deviation 1 / rank: peft's ``gaussian``."""
    normal = start.generator.standard_normal(math.prod(start.shape), np.float32)
    return normal.reshape(start.shape) / np.float32(start.settings.rank)


def make_zeros(start: Start) -> np.ndarray:
    """Return zeros, with which an adapter adds nothing."""
    return np.zeros(start.shape, np.float32)


def down_shape(weight: Shape, settings: AdapterSettings) -> Shape:
    """Return [rank, in, ...]."""
    return (settings.rank, *weight[1:])


def up_shape(weight: Shape, settings: AdapterSettings) -> Shape:
    """Return [out, rank], for a convolution [out, rank, 1, 1]."""
    return (weight[0], settings.rank, *[1] * (len(weight) - 2))


# adapter.kind -> its arrays. LoRA (arXiv:2106.09685) adds B A x * alpha / rank to W x.
KINDS: dict[str, tuple[ArrayKind, ...]] = {
    "lora": (
        ArrayKind("lora_A.weight", down_shape, draw_normal),
        ArrayKind("lora_B.weight", up_shape, make_zeros),
    )
}


def get_alpha(settings: AdapterSettings) -> float:
    """Return alpha, which is equal to the rank unless it is given."""
    return settings.rank if settings.alpha is None else settings.alpha


def choose_targets(
    component: str, modules: Collection[str], settings: AdapterSettings, family: Family
) -> tuple[str, ...]:
    """Return the last parts of the names of a component's modules that get adapters.

    Args:
        modules: the names of the component's modules that have a weight.

    Raises:
        InputError: when a target of the trained network is the name of none of them.
    """
    targets = target_modules(settings, family, component)
    if component == family.network.component:
        for target in targets:
            if not any(is_target(module, [target]) for module in modules):
                raise InputError(
                    f"adapter.targets: the {component} has no module named {target} with a "
                    f"weight; {suggest_target(target, modules)}this family's own are "
                    f"{', '.join(family.lora_targets[component])}"
                )
    return targets


def suggest_target(target: str, modules: Collection[str]) -> str:
    """Return a hint at what a target may be meant to be; empty where there is none.

    ``to_out`` holds the layer ``to_out.0``.
    """
    inside = {f".{module}".rpartition(f".{target}.") for module in modules}
    names = sorted({f"{target}.{rest}" for _, cut, rest in inside if cut})
    if not names:
        last_parts = {module.rpartition(".")[2] for module in modules}
        names = difflib.get_close_matches(target, sorted(last_parts), n=1)
    if not names:
        return ""
    more = ", ..." if len(names) > MAX_SUGGESTED else ""
    return f"did you mean {', '.join(names[:MAX_SUGGESTED])}{more}? "


def is_target(module: str, targets: Iterable[str]) -> bool:
    """Return whether the last parts of a module's name are one of the targets."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def list_adapters(
    shapes: Mapping[str, Mapping[str, Shape]], settings: AdapterSettings, family: Family
) -> dict[str, AdapterArray]:
    """List the arrays of all adapters by their names in files, in the order of the weights.

    Args:
        shapes: of the arrays of each component that gets adapters, by component and name.

    Raises:
        InputError: when a target is the name of no module, or of one that can have no adapter.
    """
    listed: dict[str, AdapterArray] = {}
    for component, weights in shapes.items():
        layers = {
            name.removesuffix(".weight"): shape
            for name, shape in weights.items()
            if name.endswith(".weight")
        }
        targets = choose_targets(component, layers, settings, family)
        for layer, shape in layers.items():
            if not is_target(layer, targets):
                continue
            if len(shape) not in ADAPTED_DIMENSIONS:
                raise InputError(
                    f"adapter.targets: {layer} of the {component} is a norm or another layer with "
                    f"a weight of shape {list(shape)}, which can have no adapter; name linear "
                    "layers and convolutions"
                )
            for kind in KINDS[settings.kind]:
                name = f"{component}.{layer}.{kind.suffix}"
                own_shape = kind.shape(shape, settings)
                listed[name] = AdapterArray(
                    name, component, f"{layer}.weight", shape, own_shape, kind
                )
    return listed
