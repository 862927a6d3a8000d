"""Read a LoRA file, for either engine, and say what of it does not fit."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner.engines.adapters import Shape
from limner.errors import InputError, join_first, say_count
from limner.json_types import read_object
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
# Fields of peft's LoraConfig: diffusers gives it all that a header has of a component.
LORA_SETTINGS = (
    "alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias "
    "corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core "
    "modules_to_save monteclora_config peft_type peft_version qalora_group_size r rank_pattern "
    "revision runtime_config target_modules target_parameters task_type trainable_token_indices "
    "use_bdlora use_dora use_qalora use_rslora velora_config"
)
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
        check_settings(path, settings, arrays)
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


def check_settings(path: Path, settings: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a header that does not describe the components that the file has."""
    for component in sorted({name.partition(".")[0] for name in names}):
        own = [name.partition(".")[2] for name in settings if name.startswith(f"{component}.")]
        if component.startswith("lora_"):
            continue
        if "target_modules" not in own:
            what = "no target_modules" if own else "nothing"
            raise InputError(
                f"{path}: lora_adapter_metadata in its header says {what} of {component}, it has "
                f"{', '.join(sorted(settings))[:160]}. {component}.r, {component}.lora_alpha and "
                f"{component}.target_modules are expected; mend the header, or leave it out."
            )
        if unknown := sorted(set(own) - set(LORA_SETTINGS.split())):
            raise InputError(
                f"{path}: lora_adapter_metadata in its header has {component}.{unknown[0]:.80}, "
                "which is no setting of a LoRA in peft. Leave it out of the header."
            )


def read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the adapters' settings in a file's header, as diffusers writes them.

    Raises:
        InputError: when they are no settings by name, or have a rank or alpha that is no number.
    """
    try:
        settings = read_object(metadata.get("lora_adapter_metadata", "{}"))
        for name, value in settings.items():
            check_number(name, value)
    except ValueError as error:
        raise InputError(
            f"{path}: lora_adapter_metadata in its header cannot be read ({error}). Fetch or copy "
            "it again."
        ) from error
    return settings


def check_number(name: str, value: object) -> None:
    """Refuse a rank or alpha that scales nothing, with a ``ValueError``."""
    last = name.rpartition(".")[2]
    if last in ("rank_pattern", "alpha_pattern") and value:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r:.80}, numbers by layer are expected")
        for layer, number in value.items():
            check_positive(f"{name} of {layer!r:.80}", number)
    if last in ("r", "lora_alpha"):
        check_positive(name, value)


def check_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0, with a ``ValueError``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r:.80}, a number above 0 is expected")


def rename_lora_array(name: str) -> str:
    """Return an array's name as diffusers writes it today."""
    for old, new in RENAMED_PARTS:
        name = name.replace(old, new)
    return name


def list_layers(arrays: Arrays) -> dict[str, Layer]:
    """Return what a file has both halves of, by the layers' names in it."""
    downs: Arrays = {}
    ups: Arrays = {}
    for name, array in arrays.items():
        # kohya's trainer has an underscore for the dot.
        today = rename_lora_array(name.replace(".lora_down.", ".lora_A.")).replace(
            ".lora_up.", ".lora_B."
        )
        for half, found in ((".lora_A.weight", downs), (".lora_B.weight", ups)):
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
