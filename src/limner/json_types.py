"""Plain data: what a JSON or a TOML file holds."""

import json
from typing import Any

Plain = dict[str, Any]  # an object or a table; a value's type is looked at where it is read


def parse_json(text: str) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: for what is no JSON, and for what is nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_object(text: str) -> Plain:
    """Parse a JSON object; raises ``ValueError`` for any other value too."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
