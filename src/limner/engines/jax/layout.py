"""What a run learns: which arrays, the values that they begin with, and how they lie in a state."""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limner import rng
from limner.config.schema import AdapterSettings
from limner.errors import InputError
from limner.families.family import Family

SMALL = "small"  # the name in a state of all arrays that are smaller than LARGE
LARGE = 1 << 16  # numbers: smaller arrays lie together, and larger ones are divided


@dataclass(frozen=True)
class Layout:
    """How named arrays lie in a state: large ones by themselves, all small ones in one, so that
    what is done to each of them is done once.

    Args:
        shapes: of all arrays by name.
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def small(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if math.prod(shape) < LARGE]

    def pack(self, named: Any) -> Any:
        """Arrays by name, numpy's or JAX's, as a state has them."""
        few = {
            name: array for name, array in named.items() if math.prod(self.shapes[name]) >= LARGE
        }
        flat = [named[name].reshape(-1) for name in self.small]
        join: Any = (
            np.concatenate
            if all(isinstance(part, np.ndarray) for part in flat)
            else jnp.concatenate
        )
        return few | ({SMALL: join(flat)} if flat else {})

    def unpack(self, packed: Any) -> Any:
        """The inverse of ``pack``, of numpy's arrays or JAX's."""
        sizes = [math.prod(self.shapes[name]) for name in self.small]
        if not sizes:
            return dict(packed)
        flat = packed[SMALL]
        parts: Any = (
            np.split(flat, np.cumsum(sizes)[:-1])
            if isinstance(flat, np.ndarray)
            else jax.lax.split(flat, sizes)
        )
        own = {
            name: part.reshape(self.shapes[name])
            for name, part in zip(self.small, parts, strict=True)
        }
        return {name: own[name] if name in own else packed[name] for name in self.shapes}


def choose_targets(known: Iterable[str], adapter: AdapterSettings, family: Family) -> list[str]:
    """The modules of the trained network that get adapters, by the last parts of their names.

    Raises:
        InputError: when one names no linear layer of the network.
    """
    own = family.lora_targets[family.trained_component]
    stems = [name.removesuffix(".weight") for name in known if name.endswith(".weight")]
    if missing := [
        t
        for t in adapter.targets or own
        if not any(stem == t or stem.endswith(f".{t}") for stem in stems)
    ]:
        raise InputError(
            f"adapter.targets: the {family.trained_component} has no module named {missing[0]}; "
            "this family's "
            f"own are {', '.join(own)}"
        )
    return list(adapter.targets or own)


def make_adapters(
    nets: dict[str, dict[str, tuple[int, ...]]], adapter: AdapterSettings, family: Family, seed: int
) -> dict[str, np.ndarray]:
    """The low-rank additions of some components by the names that files use; the same starting
    values as the PyTorch engine's.

    Raises:
        InputError: for a target that is no linear layer.
    """
    out: dict[str, np.ndarray] = {}
    for component, known in nets.items():
        wanted = (
            choose_targets(known, adapter, family)
            if component == family.trained_component
            else list(family.lora_targets[component])
        )
        for name, shape in known.items():
            stem = name.removesuffix(".weight")
            if stem == name or not any(stem == t or stem.endswith(f".{t}") for t in wanted):
                continue
            if len(shape) != 2:
                raise InputError(
                    f"adapter.targets: {stem} is no linear layer, which the JAX engine's adapters "
                    "need"
                )
            a, b = f"{component}.{stem}.lora_A.weight", f"{component}.{stem}.lora_B.weight"
            address = zlib.crc32(a.removeprefix(f"{family.trained_component}.").encode())
            normal = (
                rng.at(seed, "lora", address)
                .standard_normal(adapter.rank * shape[1], "float32")
                .reshape(adapter.rank, shape[1])
            )
            out |= {
                a: normal / np.float32(adapter.rank),
                b: np.zeros((shape[0], adapter.rank), np.float32),
            }
    return out
