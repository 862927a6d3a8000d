"""The reference of all settings, made from their declarations.

python -m limner.config.reference docs/settings.md
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from limner.config.schema import Config, Setting, list_settings
from limner.config.toml import format_value

HEAD = """# Settings

A recipe is a TOML file with these settings; on the command line they are written
`section.key=value`. `limner show RECIPE` prints all of them with their values. This page is made
from `src/limner/config/schema.py` by `python -m limner.config.reference docs/settings.md`.

On resume: *free* settings may differ from the checkpoint's, those *on request* where
`checkpoint.allow_changes` names them, all others must be as they were.
"""


def format_reference() -> str:
    """The page in Markdown: a table for each section."""
    lines = [HEAD]
    own = [one for one in list_settings() if "." not in one.name]
    lines += [*format_table(own), ""]
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        if dataclasses.is_dataclass(kind):
            about = " ".join((kind.__doc__ or "").split())
            settings = list_settings(typing.cast(type, kind), f"{section.name}.")
            lines += [f"## {section.name}", about, "", *format_table(settings), ""]
    return "\n".join(lines)


def format_table(settings: typing.Iterable[Setting]) -> Iterator[str]:
    """A row for each setting."""
    yield "| setting | type | default | what it is | on resume |"
    yield "|---|---|---|---|---|"
    for one in settings:
        declaration = one.declaration
        about = [declaration.about]
        if declaration.range is not None:
            about.append(declaration.range.text)
        if declaration.unit:
            about.append(f"in {declaration.unit}")
        if declaration.needs:
            about.append(f"means nothing to families without {declaration.needs}")
        if declaration.beside is not None:
            about.append(f"does nothing without {declaration.beside.text}")
        resume = "" if declaration.resume == "fixed" else declaration.resume
        default = "none" if one.default is None else format_default(one.default)
        cells = [f"`{one.name}`", format_type(one.type), f"`{default}`", "; ".join(about), resume]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_default(value: object) -> str:
    """A default as TOML has it."""
    return format_value(list(value) if isinstance(value, tuple) else value)


def format_type(kind: Any) -> str:
    """A type as a user would say it."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        names_of = [format_type(one) for one in arguments if one is not types.NoneType]
        return " or ".join([*names_of, "none"])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin is tuple:
        return f"list of {format_type(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return "table"
    return names[kind]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(format_reference(), encoding="utf-8")
