"""Read a LoRA file, and put it on the networks that pictures are drawn with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner.errors import InputError
from limner.families.family import Family
from limner.storage import safetensors

Arrays = dict[str, np.ndarray]

# Settings of an adapter that there is no code for.
UNSUPPORTED = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
# Parts of names as diffusers wrote them before -> as it writes them today.
RENAMED_PARTS = (
    (".lora_linear_layer", ""),
    (".lora.down.", ".lora_A."),
    (".lora.up.", ".lora_B."),
    (".down.weight", ".lora_A.weight"),
    (".up.weight", ".lora_B.weight"),
)


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file: arrays by component and name, and the adapters' settings."""

    path: Path
    settings: dict[str, Any]
    components: dict[str, Arrays]

    def scale(self, component: str) -> float:
        """Return alpha / rank of a component's layers."""
        rank = self.settings.get(f"{component}.r")
        if not rank:
            arrays = self.components[component]
            rank = next(a.shape[0] for name, a in arrays.items() if name.endswith("lora_A.weight"))
        alpha: float = self.settings.get(f"{component}.lora_alpha", rank)
        return alpha / rank

    def check_fit(self, component: str, weights: Mapping[str, Any]) -> None:
        """Compare a component's layers with the weights that they are for.

        Raises:
            InputError: listing arrays that belong to no linear layer.
        """
        arrays = self.components[component]
        misfits = [name for name in arrays if not fits_linear_layer(name, arrays, weights)]
        if misfits:
            expected = (
                "low-rank additions to linear layers of it are expected. Was it trained on another "
                "model, or is it of another kind?"
            )
            raise InputError(
                f"{self.path}: {len(misfits)} arrays have no place in the {component} "
                f"({', '.join(misfits[:3])}); {expected}"
            )


def read_lora(path: Path, family: Family) -> Lora:
    """Read a LoRA file.

    Raises:
        InputError: for a file that is damaged, of another family, or of a kind of adapter that
            there is no code for.
    """
    try:
        metadata = safetensors.read_header(path).metadata
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        stored = safetensors.read_float32(path)
    except ValueError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}). Fetch or copy it again."
        ) from error
    arrays = {rename_lora_array(name): array for name, array in stored.items()}
    for name, value in settings.items():
        if value and name.rpartition(".")[2] in UNSUPPORTED:
            raise InputError(
                f"{path}: it has {name}, which the JAX engine has no code for. Use --engine torch."
            )
    components: dict[str, Arrays] = {}
    for name, array in arrays.items():
        component, _, rest = name.partition(".")
        components.setdefault(component, {})[rest] = array
    for component in components:
        if component not in family.lora_targets:
            raise InputError(
                f"{path}: it is for {component}, which this family has not; was it trained on "
                "another model?"
            )
    return Lora(path, settings, components)


def rename_lora_array(name: str) -> str:
    """Return an array's name as diffusers writes it today."""
    for old, new in RENAMED_PARTS:
        name = name.replace(old, new)
    return name


def fits_linear_layer(name: str, arrays: Arrays, weights: Mapping[str, Any]) -> bool:
    """Return whether an array is A [rank, in] or B [out, rank] of a weight [out, in]."""
    layer, _, half = name.removesuffix(".weight").rpartition(".")
    weight, array = weights.get(f"{layer}.weight"), arrays[name]
    if weight is None or weight.ndim != 2 or array.ndim != 2:
        return False
    if half == "lora_A" and f"{layer}.lora_B.weight" in arrays:
        return bool(array.shape[1] == weight.shape[1])
    if half == "lora_B" and f"{layer}.lora_A.weight" in arrays:
        rank = arrays[f"{layer}.lora_A.weight"].shape[0]
        return bool(array.shape == (weight.shape[0], rank))
    return False
