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

# Packages by the name that is imported, where pip knows them by another.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


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
        check_current_folder()
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("limner: stopped by hand", file=sys.stderr)
        return 130
    except Exception as error:
        return explain_error(find_stop(error) or error)
    return 0


def check_current_folder() -> None:
    """Refuse a current folder that is gone: libraries that are imported there fail in their ways.

    Raises:
        InputError: saying so.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"the current folder cannot be found ({error.strerror}): it was removed, or may not be "
            "entered. Change to another folder, e.g. with `cd`, and run the command again."
        ) from error


def explain_error(error: Exception) -> int:
    """Print what is to be said of an error, and return its exit code."""
    if isinstance(error, LimnerError):
        if not error.reported:
            # Names that were given, or found, are in it as they are; its own lines stay lines.
            lines = [make_printable(line) for line in str(error).split("\n")]
            print("limner: " + "\n".join(lines), file=sys.stderr)
        return error.code
    message = None
    # A part that is missing of a package which is there is another matter.
    if isinstance(error, ModuleNotFoundError) and "." not in (error.name or "."):
        message = explain_missing(str(error.name))
    message = message or explain_broken(error)
    if message is None:
        return print_defect()
    print(f"limner: {message}", file=sys.stderr)
    return InputError.code


def print_defect() -> int:
    """Print the traceback of a defect of the program, and return its exit code; Python's own would
    come after the last stream that knows of secrets."""
    print(traceback.format_exc(), end="", file=sys.stderr)
    return LimnerError.code


def explain_missing(package: str) -> str | None:
    """Return what to install where a package is missing that Limner needs, or an extra of it.

    The command names packages, not ``limner[extra]``: that fails where Limner came from a folder.
    """
    extras: dict[str, list[str]] = {}  # extra, or none -> its requirements, as pip takes them
    wanted = None
    for line in importlib.metadata.requires("limner") or ():
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
        owner = "" if extra is None else extra[1]
        requirement = requirement.replace(" ", "")
        extras.setdefault(owner, []).append(requirement)
        name = re.split(r"[<>=!~\[]", requirement)[0].lower()
        if name.replace("-", "_") == DISTRIBUTIONS.get(package, package) and wanted is None:
            wanted = owner
    if wanted is None or wanted == "dev":
        return None
    needed = " ".join(f'"{requirement}"' for requirement in extras[wanted])
    whose = f"limner[{wanted}]" if wanted else "limner"
    return f"{package} is missing. Install what {whose} needs: pip install {needed}"


def explain_broken(error: BaseException) -> str | None:
    """Return what to do about a package that is there and fails while it is imported; None for any
    other error."""
    # diffusers and transformers make errors of their own of what their imports raise.
    while error.__cause__ is not None:
        error = error.__cause__
    package = find_imported_package(error)
    if package is None:
        return None
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return (
        f"{package} is installed, but cannot be imported: {reason}. Install it again: "
        f"pip install --force-reinstall {DISTRIBUTIONS.get(package, package)}"
    )


def find_imported_package(error: BaseException) -> str | None:
    """Return the package whose import, begun by Limner or a package, has raised an error."""
    package = None
    installed = importlib.metadata.packages_distributions()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__")).partition(".")[0]
        if module == "limner":
            package = None  # what this code does is no import of a package
        elif frame.f_code.co_name == "<module>" and module in installed:
            package = module
    return package


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
