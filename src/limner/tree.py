"""Plain data to a tree of frozen dataclasses and back: every key must exist, every value must have
the declared type."""

import dataclasses
import datetime
import difflib
import json
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from limner.faults import InputFault

# Settings that name places: ``~`` stands for the user's home in them.
PATHS: tuple[str, ...] = (
    "run",
    "model.base",
    "model.cache_dir",
    "model.vae",
    "data.folder",
    "data.hub",
    "data.hub_files",
    "data.cache_dir",
    "data.cache",
)
PATHS += ("checkpoint.resume", "data.sets.folder", "data.sets.hub", "data.sets.hub_files")


def build(cls: type, raw: dict[str, Any], where: str = "") -> Any:
    """A dataclass from plain data; every key must exist, every value must have the declared type.

    Raises:
        InputFault: for an unknown key (with the closest known one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            known = (
                f"did you mean {where}{close[0]}?" if close else f"known here: {', '.join(hints)}"
            )
            raise InputFault(f"{where}{key}: no such setting; {known}")
    return cls(**{k: _at_home(where + k, _value(hints[k], v, where + k)) for k, v in raw.items()})


def _at_home(name: str, value: Any) -> Any:
    return (
        os.path.expanduser(value)
        if re.sub(r"\[\d+\]", "", name) in PATHS and isinstance(value, str)
        else value
    )


def _value(kind: Any, value: Any, where: str) -> Any:
    options = (
        typing.get_args(kind)
        if typing.get_origin(kind) in (types.UnionType, typing.Union)
        else (kind,)
    )  # Literal | None is a Union
    for option in options:
        origin, arguments = typing.get_origin(option) or option, typing.get_args(option)
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build(option, value, where + ".")  # type: ignore[arg-type]
        if origin is Literal and value in arguments:
            return value
        if (
            origin is tuple
            and isinstance(value, list | tuple)
            and (arguments[-1] is ... or len(value) == len(arguments))
        ):
            return tuple(_value(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if (
            option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max
        ):  # neither NaN nor infinite
            return float(value)
        if (option is types.NoneType and value is None) or (
            isinstance(option, type) and option is not float and type(value) is option
        ):
            return value
    raise InputFault(f"{where}: {value!r} was given, {_expected(options)} is expected")


def _expected(options: tuple[Any, ...]) -> str:
    names = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        types.NoneType: "",
    }
    parts = []
    for option in options:
        if typing.get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif typing.get_origin(option) is tuple:
            arguments = typing.get_args(option)
            parts.append(
                ("a list" if arguments[-1] is ... else f"a list of {len(arguments)}")
                + f", each {_expected(arguments[:1])}"
            )
        elif dataclasses.is_dataclass(option):
            parts.append(f"a table with {', '.join(f.name for f in dataclasses.fields(option))}")
        else:
            parts.append(names.get(option, str(option)))
    return " or ".join(p for p in parts if p)


def override(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Put ``section.key=value`` pairs into plain data; ``none`` stands for no value."""
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputFault(
                f"{item}: not a setting; write section.key=value, e.g. train.steps=500"
            )
        *sections, key = name.split(".")
        node = raw
        for section in sections:
            node[section] = {} if node.get(section) is None else node[section]
            node = node[section]
            if not isinstance(node, dict):
                raise InputFault(f"{name}: {section} is a value, it has no settings below it")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = None if text == "none" else text
        node[key] = (
            text if isinstance(value, datetime.date | datetime.time) else value
        )  # no setting is a date, but a folder may be called like one
    return raw


def plain(value: Any) -> dict[str, Any]:
    """A config as JSON knows it: what is saved with the run, and what ``build`` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def flat(raw: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 5}}`` as ``{"train.steps": 5}``."""
    out: dict[str, Any] = {}
    for key, value in raw.items():
        out |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return out
