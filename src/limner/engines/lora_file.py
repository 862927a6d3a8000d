"""Read a LoRA file, for either engine, and say what of it does not fit."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner.engines.adapters import Shape
from limner.engines.lora_settings import check_settings, read_settings
from limner.errors import InputError, join_first, make_printable, say_count
from limner.storage import safetensors

Arrays = dict[str, np.ndarray]

MAX_LISTED = 3  # names in a message
# Parts of names as diffusers wrote them before -> as it writes them today.
RENAMED_PARTS = (
    (".lora_linear_layer", ""),
    (".lora.down.", ".lora_A."),
    (".lora.up.", ".lora_B."),
    (".down.weight", ".lora_A.weight"),
    (".up.weight", ".lora_B.weight"),
)
# What kohya's and LyCORIS' trainers write besides low-rank layers, by a part of its names.
OTHER_KINDS = {
    ".hada_": "LoHa",
    ".lora_mid.": "LoCon with a third factor (Tucker)",
    ".diff": "full differences of weights",
    ".w_norm": "norm layers",
    ".b_norm": "norm layers",
    ".oft_": "OFT",
}
HALVES = (".lora_A.weight", ".lora_B.weight")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Layer:
    """What a file adds to one layer: scale * up @ down."""

    down: np.ndarray  # [rank, in], for a convolution [rank, in, height, width]
    up: np.ndarray  # [out, rank], for a convolution [out, rank, 1, 1]
    scale: float  # alpha / rank, 1 without an alpha


def read_lora_file(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Read the arrays of a LoRA file as float32, and the settings in its header, if any.

    Raises:
        InputError: for a file that is damaged, empty, of another kind of adapter or dtype, or
            holds numbers that are not finite.
    """
    try:
        header = safetensors.read_header(path)
        check_dtypes(path, header)
        check_kind(path, list(header.arrays))
        check_names(path, list(header.arrays))
        check_shapes(path, header)
        arrays = safetensors.read_float32(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}). Fetch or copy it again."
        ) from error
    if not arrays:
        raise InputError(f"{path}: it holds no arrays, so it is no LoRA. Fetch or copy it again.")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(
            f"{path}: {list_names(broken, 'holds', 'hold')} numbers that are not finite. Take an "
            "earlier checkpoint, or fetch the file again."
        )
    check_alphas(path, arrays)
    settings = read_settings(path, header.metadata)
    if settings and not any(".lokr_" in name for name in arrays):
        check_settings(path, settings, list(arrays))
    layers = list_layers(arrays).values()
    if layers and not any(layer.up.any() for layer in layers):
        print(f"{path}: its lora_B (up) arrays are all zeros; it changes nothing", file=sys.stderr)
    return arrays, settings


def check_dtypes(path: Path, header: safetensors.Header) -> None:
    """Refuse arrays that hold no plain floating-point numbers; an alpha may be a whole number."""
    strange = {
        name: array.dtype
        for name, array in header.arrays.items()
        if array.dtype not in FLOATS and not (name.endswith(".alpha") and array.dtype[0] in "IU")
    }
    if strange:
        dtypes = " and ".join(sorted(set(strange.values())))
        raise InputError(
            f"{path}: {list_names(list(strange), 'is', 'are')} of dtype {dtypes}; "
            f"{', '.join(FLOATS)} are supported. Save it as float16 with what wrote it: numbers of "
            "8 bits and whole numbers mean something only with its scales."
        )


def check_kind(path: Path, names: Sequence[str]) -> None:
    """Refuse, by its kind, an adapter that neither engine reads."""
    for part, kind in OTHER_KINDS.items():
        if strange := [name for name in names if part in name]:
            raise make_kind_error(path, strange, kind)
    if strange := [name for name in names if ".lokr_" in name and name.startswith("lora_")]:
        raise make_kind_error(path, strange, "LoKr in kohya's layout")
    strange = [name for name in names if name.endswith(".alpha") and not name.startswith("lora_")]
    if strange:
        raise InputError(
            f"{path}: {list_names(strange, 'is', 'are')} alphas beside names of peft's, which are "
            "not read there. Multiply lora_B by alpha / rank and leave them out, or write the "
            "file in kohya's layout."
        )


def make_kind_error(path: Path, names: Sequence[str], kind: str) -> InputError:
    """Return the refusal of a kind of adapter that is not read."""
    return InputError(
        f"{path}: {list_names(names, 'is', 'are')} of another kind of adapter: {kind}, which is "
        "not read. Low-rank layers (LoRA) are expected; convert it to them, or merge it into its "
        "base."
    )


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse two arrays of one place, by names of two layouts or versions."""
    places: dict[str, str] = {}
    for name in names:
        # As transformers has named a CLIP text encoder's layers since 5.6.
        place = rename_to_peft(name).replace(".text_model.encoder.", ".encoder.")
        if place in places:
            raise InputError(
                f"{path}: {make_printable(places[place])} and {make_printable(name)} are two names "
                "of one array. Leave out the one that is not meant."
            )
        places[place] = name


def check_shapes(path: Path, header: safetensors.Header) -> None:
    """Refuse arrays without numbers, and halves of layers that are no matrices or kernels."""
    for name, array in header.arrays.items():
        is_half = rename_to_peft(name).endswith(HALVES)
        if (is_half and len(array.shape) not in (2, 4)) or 0 in array.shape:
            expected = (
                "two numbers above 0 are expected, of a convolution four"
                if is_half
                else "numbers above 0 are expected"
            )
            raise InputError(
                f"{path}: the shape of {make_printable(name)} is {list(array.shape)}, {expected}. "
                "Fetch the file again, or, where it was saved from shards (ZeRO-3, FSDP), gather "
                "them before it is saved."
            )


def check_alphas(path: Path, arrays: Arrays) -> None:
    """Refuse alphas that are not one number above 0."""
    for name, array in arrays.items():
        if name.endswith(".alpha") and (array.size != 1 or not array.reshape(-1)[0] > 0):
            given = (
                f"{float(array.reshape(-1)[0]):g}" if array.size == 1 else f"{array.size} numbers"
            )
            raise InputError(
                f"{path}: {name} is {given}, one number above 0 is expected. Fetch the file again, "
                "or leave the alpha out, where it is to be the rank."
            )


def rename_lora_array(name: str) -> str:
    """Return an array's name as diffusers writes it today."""
    for old, new in RENAMED_PARTS:
        name = name.replace(old, new)
    return name


def rename_to_peft(name: str) -> str:
    """Return an array's name with halves named as in peft, of kohya's trainer too."""
    # That has an underscore for the dot.
    return rename_lora_array(
        name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")
    )


def list_layers(arrays: Arrays) -> dict[str, Layer]:
    """Return what a file has both halves of, by the layers' names in it."""
    downs: Arrays = {}
    ups: Arrays = {}
    for name, array in arrays.items():
        today = rename_to_peft(name)
        for half, found in zip(HALVES, (downs, ups), strict=True):
            if today.endswith(half):
                found[today.removesuffix(half)] = array
    layers = {}
    for name in downs.keys() & ups.keys():
        alpha = arrays.get(f"{name}.alpha")
        scale = 1.0 if alpha is None else float(alpha.reshape(-1)[0]) / len(downs[name])
        layers[name] = Layer(downs[name], ups[name], scale)
    return layers


def fits_layer(name: str, arrays: Arrays, shapes: Mapping[str, Shape]) -> bool:
    """Return whether an array is half of an addition to a layer: A [rank, in] or B [out, rank].

    Args:
        arrays: all of a component's, by today's names.
        shapes: of the component's weights, [out, in], for a convolution [out, in, height, width].
    """
    layer, _, half = name.removesuffix(".weight").rpartition(".")
    weight, shape = shapes.get(f"{layer}.weight", ()), arrays[name].shape
    if len(weight) not in (2, 4) or len(shape) != len(weight):
        return False
    if half == "lora_A" and f"{layer}.lora_B.weight" in arrays:
        return shape[1:] == weight[1:]
    if half == "lora_B" and f"{layer}.lora_A.weight" in arrays:
        rank = arrays[f"{layer}.lora_A.weight"].shape[0]
        return shape == (weight[0], rank, *[1] * (len(weight) - 2))
    return False


def list_names(names: Sequence[str], one: str, several: str) -> str:
    """Return how many arrays there are, the first names, and the verb for one or for several."""
    named = join_first(names, MAX_LISTED)
    return say_count(len(names), f"array ({named}) {one}", f"arrays ({named}) {several}")


def explain_unused(path: Path, names: Sequence[str], place: str, hint: str = "") -> str:
    """Return what is said of arrays that have no place.

    Args:
        place: what they have no place in, e.g. ``the unet``.
        hint: what they may be, in place of the usual guess.
    """
    guess = hint or "Was it trained on another model, or is it of another kind?"
    return f"{path}: {list_names(names, 'has', 'have')} no place in {place}. {guess}"


def guess_prefix(names: Iterable[str], components: Iterable[str]) -> str:
    """Return a hint where one prefix, too many or too few, explains all names; else nothing."""
    names, known = list(names), tuple(f"{component}." for component in components)
    for component in known:
        cut = [name.find(component) for name in names]
        if min(cut) > 0 and len({name[:at] for name, at in zip(names, cut, strict=True)}) == 1:
            return f"Every name begins with {names[0][: cut[0]]!r}; write the file without it."
    if not any(name.startswith((*known, "lora_")) for name in names):
        expected = " or ".join(repr(component) for component in known)
        return f"Names are expected to begin with {expected}."
    return ""
