"""Dropout masks as a hash of seed, example, layer and element: no generator, no state.

The mask of an example in a layer is the same however examples are divided over processes and
micro-batches, on every device, in both engines, and when activations are computed a second time.

The host makes two keys for every example and layer. The device makes the mask from them with one
product and one sum of 32-bit integers: there the passes over memory count.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from limner import rng
from limner.base_model.base import BaseModel
from limner.errors import InputError
from limner.protocols import Batch


def mix(numbers: Any) -> Any:
    """Hash numbers, an array of uint32 of numpy or JAX, one to one.

    The function is one of two multiplications that https://github.com/skeeto/hash-prospector found
    to spread every bit of its input almost evenly.
    """
    numbers = numbers ^ (numbers >> np.uint32(16))
    numbers = numbers * np.uint32(0x21F0AAAD)
    numbers = numbers ^ (numbers >> np.uint32(15))
    numbers = numbers * np.uint32(0xD35A2D97)
    return numbers ^ (numbers >> np.uint32(15))


def add_keys(batch: Batch, seed: int, layers: Sequence[str]) -> Batch:
    """Return the batch with ``dropout_keys``, see ``make_keys``, where there are layers."""
    if not layers:
        return batch
    return batch | {"dropout_keys": make_keys(seed, batch["position"], layers)}


def make_keys(seed: int, positions: np.ndarray, layers: Sequence[str]) -> np.ndarray:
    """Make the keys of some examples' masks, int32 [rows, layers, 2].

    Args:
        seed: of the run.
        positions: of the examples in the stream [rows].
        layers: the names of the layers.
    """
    examples = np.stack(
        [
            rng.at(seed, "dropout", int(position)).integers(2**32, size=2, dtype=np.uint32)
            for position in positions
        ]
    )
    names = np.array([zlib.crc32(layer.encode()) for layer in layers], np.uint32)
    keys: np.ndarray = mix(examples[:, None] ^ mix(names)[:, None])
    # An odd factor maps the elements' hashes one to one.
    keys[..., 0] |= 1
    return keys.view(np.int32)


def keep_elements(keys: Any, hashes: Any, rate: float) -> Any:
    """Return which elements of some examples are kept, bool [rows, count].

    Integers wrap around. With random keys the results are uniform, and any two of them as good as
    independent (multiply-shift hashing, Dietzfelbinger, STACS 1996).

    Args:
        keys: of the examples in one layer, int32 [rows, 2], of any framework.
        hashes: ``mix`` of 0 to count - 1, viewed as int32 [count].
        rate: the share of elements that is dropped.
    """
    factor, offset = keys[:, :1], keys[:, 1:]
    lowest_kept = min(round(rate * 2**32), 2**32 - 1) - 2**31
    return factor * hashes + offset >= lowest_kept


def refuse_attention_dropout(base: BaseModel, components: Sequence[str]) -> None:
    """Refuse dropout inside the attention of the networks to be trained: its masks have no address.

    Raises:
        InputError: naming the component.
    """
    for component in components:
        rate = base.configs[component].get("attention_dropout") or 0.0
        if rate > 0:
            raise InputError(
                f"{component}: its config.json has an attention_dropout of {rate}, with which it "
                "cannot be trained here. Set it to 0 there, or adapter.text_encoders=false"
            )
