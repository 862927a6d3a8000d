"""Compare the arrays that a component's files hold with those that its config asks for."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.base_model.weight_files import check_length
from limner.errors import InputError, LimnerError, join_first, say_count
from limner.json_types import Plain
from limner.storage.safetensors import StoredArray

Shape = tuple[int, ...]
MAX_LISTED = 8  # names in a message
# Of an autoencoder's attention, before diffusers 0.17 -> today.
RENAMED_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What published files hold besides weights: numbers from 0 upwards; the half of a T5 that writes.
UNUSED = re.compile(r"(.*\.)?position_ids")
UNUSED_OF_CLASS = {"T5EncoderModel": re.compile(r"(decoder|lm_head)\..*")}
# Halves and bfloat16 are widened when they are read. What is smaller lacks its scales.
NUMBER_TYPES = ("F64", "F32", "F16", "BF16")
# Settings that say which layers are special, or from which one on.
PLACES = ("dual_attention_layers", "max_window_layers")
FEWEST = 64  # layers that are built, however few arrays there are
TYPES = ", ".join(NUMBER_TYPES)
# What is said of one array, and of several, by the kind of difference.
WORDS = {
    "missing": ("array is missing", "arrays are missing"),
    "surplus": ("array has no place in the model", "arrays have no place in the model"),
    "misshapen": ("array does not fit its config", "arrays do not fit its config"),
    "mistyped": (f"array is no number of {TYPES}", f"arrays are no numbers of {TYPES}"),
}
REMEDY = "Is it the model that its config says? Fetch or copy it again."


@dataclass(frozen=True)
class ExpectedArrays:
    """The arrays of a model: its shapes by name, and groups of names for one array."""

    shapes: Mapping[str, Shape]
    tied: tuple[tuple[str, ...], ...] = ()
    integers: frozenset[str] = frozenset()  # and others that are no floats
    unused: tuple[str, ...] = ()  # expressions for names in its files that it leaves out


@dataclass(frozen=True)
class Differences:
    """The names of arrays that are not as a config asks for, with what to say of each."""

    missing: list[str]
    surplus: list[str]
    misshapen: list[str]
    mistyped: list[str]


def read_stored(paths: Iterable[Path]) -> dict[str, tuple[Path, StoredArray]]:
    """Return where each array of a component lies; only headers are read.

    Raises:
        InputError: for a file that is damaged, or an array that two files hold.
    """
    stored: dict[str, tuple[Path, StoredArray]] = {}
    for path in paths:
        for name, array in check_length(path).arrays.items():
            if name in stored:
                raise InputError(
                    f"{path}: {name:.80} is in {stored[name][0].name} too. Fetch or copy the model "
                    "again."
                )
            stored[name] = (path, array)
    return stored


def check_counts(config_file: Path, config: Plain, arrays: int) -> None:
    """Refuse a config with more layers than the files have arrays, before a model is built.

    Raises:
        InputError: naming the setting.
    """
    channels = config.get("block_out_channels")
    levels = len(channels) if isinstance(channels, list) else 1
    for name, value in config.items():
        if isinstance(value, dict):  # of one of two networks in one, as CLIP's halves
            check_counts(config_file, value, arrays)
            continue
        numbers = flatten(value)
        count = len(numbers)
        # These are the numbers of layers, not how many there are.
        if "layers" in name and name not in PLACES:
            layers = sum(one for one in numbers if type(one) is int and one > 0)
            count = max(count, layers * levels if type(value) is int else layers)
        if count > max(arrays, FEWEST):
            raise InputError(
                f"{config_file}: {name} is {str(value)[:80]}, and the weights are {arrays} arrays. "
                f"{REMEDY}"
            )


def flatten(value: object) -> list[object]:
    """Return what a list holds, and the lists in it; anything else alone."""
    if not isinstance(value, list):
        return [value]
    return [inner for one in value for inner in flatten(one)]


def check_arrays(
    folder: Path, class_name: str, stored: Mapping[str, StoredArray], expected: ExpectedArrays
) -> None:
    """Compare a component's arrays with those of its model.

    Args:
        stored: by their names in the files.

    Raises:
        InputError: listing what is missing, unknown, or of another shape or type.
    """
    shapes = expected.shapes
    arrays, surplus = assign_arrays(class_name, stored, expected)
    held = arrays.keys() | {
        name for group in expected.tied if any(one in arrays for one in group) for name in group
    }
    missing = [name for name in shapes if name not in held]
    misshapen = [
        f"{name} is {list(array.shape)}, {list(shapes[name])} is expected"
        for name, array in arrays.items()
        if array.shape != tuple(shapes[name])
    ]
    mistyped = [
        f"{name} is {array.dtype}"
        for name, array in arrays.items()
        if array.dtype not in NUMBER_TYPES and name not in expected.integers
    ]
    hint = explain_prefix(stored, shapes) if missing else ""
    refuse_differences(folder, Differences(missing, surplus, misshapen, mistyped), hint)


def assign_arrays(
    class_name: str, stored: Mapping[str, StoredArray], expected: ExpectedArrays
) -> tuple[dict[str, StoredArray], list[str]]:
    """Return the arrays of a component by the model's names, and the names in its files of those
    that have no place in the model."""
    arrays: dict[str, StoredArray] = {}
    surplus = []
    for stored_name, array in stored.items():
        name = to_model_name(stored_name, expected.shapes)
        if name in expected.shapes and name not in arrays:
            arrays[name] = array
        elif not is_unused(name, class_name, expected):
            surplus.append(stored_name)
    return arrays, surplus


def is_unused(name: str, class_name: str, expected: ExpectedArrays) -> bool:
    """Return whether a model leaves out an array of its files, though its library wrote them."""
    unused_of_class = UNUSED_OF_CLASS.get(class_name)
    if UNUSED.fullmatch(name) or (unused_of_class and unused_of_class.fullmatch(name)):
        return True
    return any(re.search(pattern, name) for pattern in expected.unused)


def refuse_differences(folder: Path, differences: Differences, hint: str = "") -> None:
    """Refuse a component whose arrays differ from what its config asks for.

    Args:
        hint: what they may have in common.

    Raises:
        InputError: listing them.
    """
    problems = [
        f"{say_count(len(names), *words)}: {list_some(sorted(names))}"
        for kind, words in WORDS.items()
        if (names := getattr(differences, kind))
    ]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}. {hint}{REMEDY}")


def to_model_name(name: str, expected: Mapping[str, Any]) -> str:
    """Translate an array's name in a file to the one that the model asks for.

    CLIP models have ``text_model.`` or ``vision_model.`` or not, version by version; old
    autoencoders name their attention differently.
    """
    if name in expected:
        return name
    for other in (
        f"text_model.{name}",
        name.removeprefix("text_model."),
        f"vision_model.{name}",
        # Twice in a safety checker. Once it is of the vision half, which is no text encoder.
        name.replace("vision_model.vision_model.", "vision_model.", 1),
    ):
        if other in expected:
            return other
    stem, dot, tail = name.rpartition(".")
    parent, _, layer = stem.rpartition(".")
    renamed = f"{parent}.{RENAMED_LAYERS.get(layer, layer)}{dot}{tail}"
    return renamed if renamed in expected else name


def explain_prefix(stored: Iterable[str], expected: Mapping[str, Any]) -> str:
    """Name the prefix without which all names would be the model's; else return nothing."""
    names = list(stored)
    prefix = names[0].partition(".")[0] + "." if names else ""
    if not all(name.startswith(prefix) for name in names):
        return ""
    inner = [to_model_name(name.removeprefix(prefix), expected) for name in names]
    if not any(name in expected for name in inner):
        return ""
    return (
        f"Every name begins with {prefix!r}: it was saved from a model inside another one; save "
        "the inner one. "
    )


def list_some(names: list[str]) -> str:
    """Join the first names for a message."""
    return join_first([name[:120] for name in names], MAX_LISTED)


@contextlib.contextmanager
def explain_faults(what: str) -> Iterator[None]:
    """Turn what a library raises, for a file that is not what it should be, into one message.

    Args:
        what: cannot be done, with the file's name.

    Raises:
        InputError: in place of anything but Limner's own errors and a lack of memory.
    """
    try:
        yield
    except (LimnerError, MemoryError):
        raise
    # Tokenizers' errors are plain ones, and wrong types in a config lead to any kind.
    except Exception as error:
        raise InputError(
            f"{what}: {describe_fault(error)}. Fetch or save the model again."
        ) from error


def describe_fault(error: BaseException) -> str:
    """Return the first line that an error has to say, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}".rstrip(".")
