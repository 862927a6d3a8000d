"""Read recipes, apply overrides, refuse what is no setting."""

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
from pathlib import Path
from typing import Any, Literal

from limner.config.schema import SETTINGS, Config
from limner.errors import InputError


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe (TOML), then ``section.key=value`` overrides whose values are TOML, or plain words.

    ``recipes/<name>`` is one of Limner's own where there is no such file here.

    Raises:
        InputError: when the file is missing, is not TOML, or holds what ``build`` refuses.
    """
    try:
        raw = tomllib.loads(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}. Give the path of a recipe, a TOML file such as "
            "recipes/sd15-lora.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from error
    return build(Config, apply_overrides(raw, overrides))


def find_recipe(path: Path) -> Path:
    """The recipe at a path; else Limner's own of that name, which lies in the installed package, or
    beside its sources."""
    path, package = path.expanduser(), Path(__file__).parents[1]
    own = (
        [folder / path for folder in (package, package.parents[1])]
        if path.parent == Path("recipes")
        else []
    )
    return next((file for file in (path, *own) if file.is_file()), path)


def format_value(value: Any) -> str:
    """A plain value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {format_value(v)}" for k, v in value.items()) + " }"
    return re.sub(
        "[\x7f\ud800-\udfff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(value, ensure_ascii=False),
    )


# Settings that had another name before 0.1.0; a name without a dot is a section's.
RENAMED = {
    "adapt": "adapter",
    "watch": "validation",
    "checkpoint.allow": "checkpoint.allow_changes",
    "data.bad": "data.on_bad_record",
    "data.chunks": "data.caption_chunks",
    "data.crops": "data.crop_variants",
    "data.limit": "data.max_records",
    "model.partner": "model.other_stage",
    "train.accumulate": "train.accumulation_steps",
    "train.batch": "train.batch_size",
    "train.micro": "train.micro_batch_size",
}


def explain_renamed(name: str, value: Any) -> list[str]:
    """A line for a setting under its old name, or for each setting of a section under its old
    name."""
    if name not in RENAMED:
        return []
    if "." not in name and isinstance(value, dict) and value:
        return [f"{name}.{key}: renamed to {RENAMED[name]}.{key}" for key in value]
    return [f"{name}: renamed to {RENAMED[name]}"]


def build(cls: type, raw: dict[str, Any], where: str = "") -> Any:
    """A dataclass from plain data; every key must exist, every value must have the declared type.

    Raises:
        InputError: for an unknown key (with the closest known one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    if renamed := [line for key in raw for line in explain_renamed(where + key, raw[key])]:
        raise InputError("\n".join(renamed))
    for key in raw:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, 1)
            known = (
                f"did you mean {where}{close[0]}?" if close else f"known here: {', '.join(hints)}"
            )
            raise InputError(f"{where}{key}: no such setting; {known}")
    return cls(
        **{k: expand_home(where + k, convert(hints[k], v, where + k)) for k, v in raw.items()}
    )


def expand_home(name: str, value: Any) -> Any:
    """Put the user's home in place of ``~`` where a setting names a place."""
    setting = SETTINGS.get(re.sub(r"\[\d+\]", "", name))
    if setting is None or not setting.declaration.path or not isinstance(value, str):
        return value
    return os.path.expanduser(value)


def convert(kind: Any, value: Any, where: str) -> Any:
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
            return tuple(convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if (
            option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max
        ):  # neither NaN nor infinite
            return float(value)
        if (option is types.NoneType and value is None) or (
            isinstance(option, type) and option is not float and type(value) is option
        ):
            return value
    raise InputError(f"{where}: {value!r} was given, {describe_types(options)} is expected")


def describe_types(options: tuple[Any, ...]) -> str:
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
                + f", each {describe_types(arguments[:1])}"
            )
        elif dataclasses.is_dataclass(option):
            parts.append(f"a table with {', '.join(f.name for f in dataclasses.fields(option))}")
        else:
            parts.append(names.get(option, str(option)))
    return " or ".join(p for p in parts if p)


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Put ``section.key=value`` pairs into plain data; ``none`` stands for no value."""
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(
                f"{item}: not a setting; write section.key=value, e.g. train.steps=500"
            )
        *sections, key = name.split(".")
        node = raw
        for section in sections:
            node[section] = {} if node.get(section) is None else node[section]
            node = node[section]
            if not isinstance(node, dict):
                raise InputError(f"{name}: {section} is a value, it has no settings below it")
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = None if text == "none" else text
        node[key] = (
            text if isinstance(value, datetime.date | datetime.time) else value
        )  # no setting is a date, but a folder may be called like one
    return raw


def to_plain(value: Any) -> dict[str, Any]:
    """A config as JSON knows it: what is saved with the run, and what ``build`` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def flatten(raw: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``{"train": {"steps": 5}}`` as ``{"train.steps": 5}``."""
    out: dict[str, Any] = {}
    for key, value in raw.items():
        out |= flatten(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return out
