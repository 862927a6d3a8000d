"""What both engines demand of a checkpoint's arrays, and what they call precisions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from limner.errors import IntegrityError
from limner.protocols import Arrays

# engine.precision -> the name that torch and jax.numpy give the dtype that is computed in.
PRECISIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def find_dtype(library: Any, precision: str) -> Any:
    """Return the dtype of a precision, e.g. ``torch.bfloat16``."""
    return getattr(library, PRECISIONS[precision])


def find_half_dtype(library: Any, precision: str) -> Any:
    """Return the dtype of a precision of 16 bits; None for float32."""
    return None if precision == "no" else find_dtype(library, precision)


def check_arrays(
    arrays: Arrays, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, source: str
) -> None:
    """Refuse arrays whose names, shapes or dtype are not the model's.

    Args:
        shapes: the model's, by name.
        source: where the arrays are from, for the message.

    Raises:
        IntegrityError: naming the first array that differs.
    """
    different = sorted(arrays.keys() ^ shapes.keys())
    if different:
        raise IntegrityError(
            f"{source}: {len(different)} names differ from the model's, such as {different[0]}"
        )
    for name, array in arrays.items():
        if array.shape != tuple(shapes[name]) or array.dtype != dtype:
            raise IntegrityError(
                f"{source}: {name} is {array.dtype} {list(array.shape)}, the model has "
                f"{dtype} {list(shapes[name])}"
            )


def join_moments(moments: Mapping[str, Arrays]) -> Arrays:
    """Return the optimizer's moments as one group of arrays, named ``moment/parameter``."""
    joined: Arrays = {}
    for moment, arrays in moments.items():
        joined |= {f"{moment}/{name}": array for name, array in arrays.items()}
    return joined


def split_moments(group: Arrays) -> dict[str, Arrays]:
    """Return the moments of a group by name; the inverse of ``join_moments``.

    Arrays without a moment in their name, such as ``step``, are left out.
    """
    moments: dict[str, Arrays] = {}
    for name, array in group.items():
        moment, slash, parameter = name.partition("/")
        if slash:
            moments.setdefault(moment, {})[parameter] = array
    return moments
