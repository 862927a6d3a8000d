"""Dropout in JAX with masks of ``engines.dropout``."""

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from limner.engines.dropout import keep_elements, mix
from limner.engines.jax.attention import Array

INPUT_ARRAY = "lora_A.weight"  # of an adapter: what its input is multiplied by
OWN_NAME = "lora_dropout"  # of the dropout of that input, after the layer's name


@dataclass(frozen=True)
class AdapterDropout:
    """Dropout of what goes into the adapters of one component.

    Args:
        keys: of the micro-batch, int32 [rows, layers, 2]; see ``engines.dropout.make_keys``.
        layers: the names of all layers, in the order of the keys.
    """

    component: str
    rate: float
    keys: Array
    layers: tuple[str, ...]

    def __call__(self, prefix: str, x: Array) -> Array:
        """Drop elements of x, and scale the others up.

        Args:
            prefix: the layer's name in the component, and a dot.
            x: [rows, ...]; or, of captions in chunks, [rows * chunks, ...].
        """
        number = self.layers.index(f"{self.component}.{prefix}{OWN_NAME}")
        count = x.size // len(self.keys)
        hashes = mix(jax.lax.iota(np.uint32, count)).view(np.int32)
        keep = keep_elements(self.keys[:, number], hashes, self.rate)
        return jnp.where(keep.reshape(x.shape), x / (1 - self.rate), 0).astype(x.dtype)


def list_layers(arrays: Iterable[str], rate: float) -> tuple[str, ...]:
    """Return the names of all adapters' dropout layers: those that they have in PyTorch.

    Args:
        arrays: the names of the trained arrays in files.
    """
    if not rate:
        return ()
    stems = sorted(name.removesuffix(INPUT_ARRAY) for name in arrays if name.endswith(INPUT_ARRAY))
    return tuple(f"{stem}{OWN_NAME}" for stem in stems)
