"""Kinds of words on the command line: paths, and what is not written as it was meant."""

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NoReturn


def suggest_setting(option: str) -> str:
    """Return how a setting is written that was given as an option; empty for what is none."""
    name, _, value = option.lstrip("-").partition("=")
    if "." not in name:
        return ""
    return f". A setting is written without dashes: {name}={value or 'VALUE'}"


def to_path(text: str) -> Path:
    """Return a path as a user writes it: ``~`` is the home folder."""
    return Path(to_name(text)).expanduser()


def to_name(text: str) -> str:
    """Return what names a folder or a model, which an empty text does not."""
    if not text:
        raise argparse.ArgumentTypeError(
            "'' is no path; give one (of a shell's variable that is not set, nothing is left)"
        )
    return text


class RenamedOption(argparse.Action):
    """An old option, refused with its new name, which is ``const``."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        """End the command with a message."""
        parser.error(f"{option_string}: renamed to {self.const}")


def add_renamed_option(parser: ArgumentParser, old: str, new: str) -> None:
    """Make the parser refuse an old option with its new name, whatever follows it."""
    parser.add_argument(
        old,
        action=RenamedOption,
        const=new,
        nargs="?",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
