"""What a component's config.json says, with the class's own values for what it leaves out."""

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def complete(config: Mapping[str, Any], defaults: Config) -> Config:
    """Return a config with all settings that a network reads."""
    return {**defaults, **config}


def find_unserved(
    config: Config, served: Mapping[str, tuple[Any, ...]], defaults: Config
) -> list[str]:
    """Say which settings have a value that there is no code for, or one of another type.

    Args:
        config: complete.
        served: the values of settings that would need code of their own; the class's first.
        defaults: the class's values of what is read.
    """
    problems = []
    for name, values in served.items():
        value = config.get(name, values[0])
        # Some settings may be written once for each level.
        each = value if isinstance(value, list | tuple) and value else [value]
        if any(one not in values for one in each):
            expected = " or ".join(repr(one) for one in values)
            problems.append(f"{name} is {value!r:.80}, {expected} is expected")
    for name, default in defaults.items():
        if not is_alike(config[name], default):
            problems.append(f"{name} is {config[name]!r:.80}, {describe(default)} is expected")
    return problems


def is_alike(value: Any, default: Any) -> bool:
    """Return whether a value is of the kind of a default: numbers above 0, switches, lists."""
    if default is None:
        return value is None or is_alike(value, 1)
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(is_alike(v, default[0]) for v in value)
    if isinstance(value, list | tuple):
        return bool(value) and all(is_alike(one, default) for one in value)
    kinds = int if isinstance(default, int) else int | float
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return value > 0 if default else value >= 0


def describe(default: Any) -> str:
    """Return what a message calls values of the kind of a default."""
    if isinstance(default, tuple):
        return f"a list like {list(default)}"
    return {bool: "true or false", str: "a name"}.get(type(default), "a number")
