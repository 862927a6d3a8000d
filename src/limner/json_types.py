"""Plain data: what a JSON or a TOML file holds."""

from typing import Any

Plain = dict[str, Any]  # an object or a table; a value's type is looked at where it is read
