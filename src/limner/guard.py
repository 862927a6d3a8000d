"""A command, guarded: what goes wrong becomes one message and an exit code."""

import importlib.metadata
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from limner.errors import InputError, LimnerError, find_stop, make_printable
from limner.redaction import redacted_output


def run_guarded(action: Callable[[], object]) -> int:
    """Run an action; an error for the user becomes one message and its exit code."""
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        # File names and captions hold what a terminal's encoding may lack.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with redacted_output():
        return run_explained(action)


def run_explained(action: Callable[[], object]) -> int:
    """Run an action; see ``run_guarded``."""
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("limner: stopped by hand", file=sys.stderr)
        return 130
    except Exception as error:
        return explain_error(find_stop(error) or error)
    return 0


def explain_error(error: Exception) -> int:
    """Print what is to be said of an error, and return its exit code."""
    if isinstance(error, LimnerError):
        if not error.reported:
            # Names that were given, or found, are in it as they are; its own lines stay lines.
            lines = [make_printable(line) for line in str(error).split("\n")]
            print("limner: " + "\n".join(lines), file=sys.stderr)
        return error.code
    if isinstance(error, ModuleNotFoundError):
        message = explain_missing((error.name or "").split(".")[0])
        if message is not None:
            print(f"limner: {message}", file=sys.stderr)
            return InputError.code
    return print_defect()


def print_defect() -> int:
    """Print the traceback of a defect of the program, and return its exit code; Python's own would
    come after the last stream that knows of secrets."""
    print(traceback.format_exc(), end="", file=sys.stderr)
    return LimnerError.code


def explain_missing(package: str) -> str | None:
    """Return what to install where a package is missing that an extra of Limner brings.

    The command names packages, not ``limner[extra]``: that fails where Limner came from a folder.
    """
    extras: dict[str, list[str]] = {}  # extra -> its requirements, as pip takes them
    wanted = None
    for line in importlib.metadata.requires("limner") or ():
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
        if extra is None:
            continue
        requirement = requirement.replace(" ", "")
        extras.setdefault(extra[1], []).append(requirement)
        name = re.split(r"[<>=!~\[]", requirement)[0]
        if name.replace("-", "_") == package and wanted is None:
            wanted = extra[1]
    if wanted is None or wanted == "dev":
        return None
    needed = " ".join(f'"{requirement}"' for requirement in extras[wanted])
    return f"{package} is missing. Install what limner[{wanted}] needs: pip install {needed}"


def quiet_libraries() -> None:
    """Silence the libraries' advice, but not their errors."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    # Of what is wrong beside the pixels of a picture; what is wrong with them is an error.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(diffusers|transformers|torch|peft|accelerate)"
    )
