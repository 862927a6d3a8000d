"""Read the JSON files of a model's folder, whatever is in them."""

import math
from pathlib import Path

from limner.errors import InputError
from limner.json_types import Plain, parse_json

MAX_DEPTH = 100  # far more than any published file has, and than Python minds
MAX_BYTES = 1 << 26  # of a file; the largest published ones are tokenizers of 20 MB


def read_json(path: Path) -> Plain:
    """Read a JSON object from a file.

    Raises:
        InputError: when it is missing, or not an object in JSON.
    """
    try:
        value = parse_file(path)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; a folder in the diffusers layout has it. Is the model's "
            "folder complete?"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({str(error)[:200]}). Fetch or save the model again."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected. Fetch or save the model again.")
    return value


def parse_file(path: Path) -> object:
    """Parse a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is not JSON, too large or too deep, or no file, which might never end.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MB")
    value = parse_json(data.decode("utf-8"))
    check_values(value)
    return value


def check_values(value: object) -> None:
    """Refuse what is nested deeper than ``MAX_DEPTH``, and NaN; infinities schedulers write.

    Raises:
        ValueError: saying which.
    """
    layer = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for one in layer:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, float) and math.isnan(one):
                raise ValueError("NaN is no number")
        layer = inner
    if layer:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
