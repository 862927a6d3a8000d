"""Read recipes, apply overrides, refuse what is no setting."""

import dataclasses
import datetime
import difflib
import errno
import json
import os
import re
import stat
import sys
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from limner.config.schema import SETTINGS, Config
from limner.errors import InputError, shorten
from limner.json_types import Plain
from limner.redaction import redact

MAX_RECIPE = 1_000_000  # characters


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe (TOML), then ``section.key=value`` overrides whose values are TOML, or plain words.

    ``recipes/<name>`` is one of Limner's own where there is no such file here.

    Raises:
        InputError: when the file is missing, is not TOML, or holds what ``build`` refuses.
    """
    try:
        raw = parse_toml(read_small_file(find_recipe(path)))
    except OSError as error:
        raise InputError(
            f"{shorten(str(path))}: {error.strerror}. Give the path of a recipe, a TOML file "
            "such as recipes/sd15-lora.toml."
        ) from error
    except ValueError as error:
        raise InputError(f"{shorten(str(path))}: not a TOML file: {shorten(str(error))}") from error
    raw = apply_overrides(raw, overrides)
    refuse_without_kind(raw)
    return build(Config, raw)


def refuse_without_kind(raw: Plain) -> None:
    """Refuse settings of an adapter in a recipe that names no kind of one: the whole network would
    learn. As values they may be the defaults, which are as good as not given.

    Raises:
        InputError: naming them.
    """
    adapter = raw.get("adapter")
    if isinstance(adapter, dict) and adapter and "kind" not in adapter:
        raise InputError(
            f"adapter: {', '.join(adapter)} is given without adapter.kind, so that the whole "
            'network would learn. Give adapter.kind="lora", or leave the section out.'
        )


def read_small_file(path: Path) -> str:
    """Read a text file of up to a megabyte, without the byte order mark of some editors.

    Raises:
        OSError: when it cannot be read, and for what is no file, such as a pipe.
        ValueError: for one that is larger or not UTF-8, and a path that holds a NUL character.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_RECIPE + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds NUL characters, as UTF-16 does; save it as UTF-8")
    if len(text) > MAX_RECIPE:
        raise ValueError(f"more than {MAX_RECIPE:,} characters")
    return text


def parse_toml(text: str) -> Plain:
    """Parse TOML that anybody may have written.

    Raises:
        ValueError: for what is no TOML, or is nested deeper than Python can follow.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


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


def format_value(value: object) -> str:
    """A plain value as TOML writes it; TOML has no word for a setting that is not set."""
    if isinstance(value, dict):
        pairs = [f"{k} = {format_value(v)}" for k, v in value.items() if v is not None]
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
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


def explain_renamed(name: str, value: object) -> list[str]:
    """A line for a setting under its old name, or for each setting of a section under its old
    name."""
    if name not in RENAMED:
        return []
    if "." not in name and isinstance(value, dict) and value:
        return [f"{name}.{key}: renamed to {RENAMED[name]}.{key}" for key in value]
    return [f"{name}: renamed to {RENAMED[name]}"]


def build(cls: type, raw: Plain, where: str = "") -> Any:
    """A dataclass from plain data; every key must exist, every value must have the declared type.

    Raises:
        InputError: for an unknown key (with the closest known one) or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    if renamed := [line for key in raw for line in explain_renamed(where + key, raw[key])]:
        raise InputError("\n".join(renamed))
    for key in raw:
        if key not in hints:
            key = shorten(key)
            close = difflib.get_close_matches(key, hints, 1)
            known = (
                f"did you mean {where}{close[0]}?" if close else f"known here: {', '.join(hints)}"
            )
            raise InputError(f"{where}{key}: no such setting; {known}")
    return cls(
        **{k: expand_home(where + k, convert(hints[k], v, where + k)) for k, v in raw.items()}
    )


def expand_home(name: str, value: object) -> object:
    """Put the user's home in place of ``~`` where a setting names a place."""
    setting = SETTINGS.get(re.sub(r"\[\d+\]", "", name))
    if setting is None or not setting.declaration.path or not isinstance(value, str):
        return value
    return os.path.expanduser(value)


def convert(kind: object, value: object, where: str) -> Any:
    """Convert a plain value to a declared type: a whole number to a float, a list to a tuple, a
    table to its dataclass.

    Args:
        where: the setting's name, for the message.

    Raises:
        InputError: for a value of another type.
    """
    # Literal | None is a Union.
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    options = typing.get_args(kind) if is_union else (kind,)
    for option in options:
        if fits(option, value):
            return convert_fitting(option, value, where)
        # One text counts as a list of one, which a shell makes hard to write. What begins with a
        # bracket is a list that lost its quotes there.
        if isinstance(value, str) and not value.startswith("[") and fits(option, [value]):
            return convert_fitting(option, [value], where)
    given = shorten(repr(value))
    raise InputError(f"{where}: {given} was given, {describe_types(options)} is expected")


def fits(option: object, value: Any) -> bool:
    """Whether a value, not what is in it, is of one type; of no union."""
    arguments = typing.get_args(option)
    if dataclasses.is_dataclass(option):
        return isinstance(value, dict)
    if typing.get_origin(option) is Literal:
        return value in arguments
    if typing.get_origin(option) is tuple:
        fixed = arguments[-1] is not ...
        return isinstance(value, list | tuple) and (not fixed or len(value) == len(arguments))
    if option is float:  # neither NaN nor infinite
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is option  # True is no whole number


def convert_fitting(option: Any, value: Any, where: str) -> Any:
    """Convert a value that ``fits``; see ``convert``."""
    if dataclasses.is_dataclass(option):
        return build(option, value, where + ".")  # type: ignore[arg-type]
    if typing.get_origin(option) is tuple:
        inner = typing.get_args(option)[0]
        return tuple(convert(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    return float(value) if option is float else value


TYPE_NAMES: dict[object, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "",
}


def describe_types(options: Iterable[object]) -> str:
    """Return what a value may be, as the end of a refusal says it; None is passed over."""
    return " or ".join(text for text in map(describe_type, options) if text)


def describe_type(option: object) -> str:
    """Return what a value of one type is; see ``describe_types``."""
    arguments = typing.get_args(option)
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if typing.get_origin(option) is tuple:
        kind = "a list" if arguments[-1] is ... else f"a list of {len(arguments)}"
        example = ', such as ["a", "b"]' if arguments[0] is str else ""
        return f"{kind}, each {describe_types(arguments[:1])}{example}"
    if dataclasses.is_dataclass(option):
        return f"a table with {', '.join(f.name for f in dataclasses.fields(option))}"
    return TYPE_NAMES.get(option, str(option))


def apply_overrides(raw: Plain, overrides: Iterable[str]) -> Plain:
    """Put ``section.key=value`` pairs into plain data; ``none`` stands for no value."""
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(
                f"{shorten(item)}: not a setting; write section.key=value, e.g. train.steps=500"
            )
        *sections, key = name.split(".")
        node = raw
        for section in sections:
            node[section] = {} if node.get(section) is None else node[section]
            node = node[section]
            if not isinstance(node, dict):
                raise InputError(f"{name}: {section} is a value, it has no settings below it")
        try:
            value = parse_toml(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = None if text == "none" else text
        except ValueError as error:
            raise InputError(f"{shorten(item)}: {error}") from error
        node[key] = (
            text if isinstance(value, datetime.date | datetime.time) else value
        )  # no setting is a date, but a folder may be called like one
    return raw


def to_plain(value: Any) -> Plain:
    """A config as JSON knows it: what is saved with the run, and what ``build`` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def to_saved(config: Config) -> Plain:
    """A config as it is kept with a run and read back: without secrets.

    A name or a place is as it was given, whatever the environment holds: only its form makes it a
    secret. A prompt may be anything.
    """
    plain: Plain = redact(to_plain(config), environment=False)
    plain["preview"]["prompts"] = redact(plain["preview"]["prompts"])
    return plain


def flatten(raw: Plain, where: str = "") -> Plain:
    """``{"train": {"steps": 5}}`` as ``{"train.steps": 5}``."""
    out: Plain = {}
    for key, value in raw.items():
        out |= flatten(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return out
