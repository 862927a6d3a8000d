"""How the trained arrays lie in a state: large ones by themselves, all small ones in one."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SMALL = "small"  # the name in a state of all arrays that are smaller than LARGE
LARGE = 1 << 16  # numbers: smaller arrays lie together, and larger ones are divided


@dataclass(frozen=True)
class Layout:
    """How named arrays lie in a state.

    Hundreds of norms and biases are small: together, what is done to each of them is done once.

    Args:
        shapes: of all arrays by name.
    """

    shapes: dict[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def small(self) -> list[str]:
        """The names of the arrays that lie together."""
        return [name for name, shape in self.shapes.items() if math.prod(shape) < LARGE]

    def pack(self, named: Any) -> Any:
        """Return arrays by name, numpy's or JAX's, as a state has them."""
        packed = {
            name: array for name, array in named.items() if math.prod(self.shapes[name]) >= LARGE
        }
        flat = [named[name].reshape(-1) for name in self.small]
        if flat:
            on_host = all(isinstance(part, np.ndarray) for part in flat)
            packed[SMALL] = np.concatenate(flat) if on_host else jnp.concatenate(flat)
        return packed

    def unpack(self, packed: Any) -> Any:
        """Return arrays by name; the inverse of ``pack``."""
        sizes = [math.prod(self.shapes[name]) for name in self.small]
        if not sizes:
            return dict(packed)
        flat = packed[SMALL]
        parts: Any
        if isinstance(flat, np.ndarray):
            parts = np.split(flat, np.cumsum(sizes)[:-1])
        else:
            parts = jax.lax.split(flat, sizes)
        small = {
            name: part.reshape(self.shapes[name])
            for name, part in zip(self.small, parts, strict=True)
        }
        return {name: small[name] if name in small else packed[name] for name in self.shapes}
