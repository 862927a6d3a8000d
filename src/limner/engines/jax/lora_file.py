"""Read a LoRA file, and put it on the networks that pictures are drawn with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.engines.adapters import Shape
from limner.engines.lora_file import (
    Arrays,
    explain_unused,
    fits_layer,
    guess_prefix,
    read_lora_file,
    rename_lora_array,
)
from limner.errors import InputError
from limner.families.family import Family

# Settings of an adapter that there is no code for.
UNSUPPORTED = ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
# Arrays of adapters that there is no code for, by a part of their names.
UNSUPPORTED_KINDS = {".lokr_": "LoKr", ".lora_magnitude_vector": "DoRA"}
# peft's values of what a header with other settings of a component leaves out.
PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}


@dataclass(frozen=True)
class Lora:
    """The contents of a LoRA file: arrays by component and name, and the adapters' settings."""

    path: Path
    settings: dict[str, Any]
    components: dict[str, Arrays]

    def read_settings(self, component: str) -> dict[str, Any]:
        """Return the header's settings of a component; empty where there are none."""
        prefix = f"{component}."
        own = {
            name.removeprefix(prefix): value
            for name, value in self.settings.items()
            if name.startswith(prefix)
        }
        return PEFT_DEFAULTS | own if own else own

    def scale(self, component: str) -> float:
        """Return alpha / rank of a component's layers; 1 where the header says nothing."""
        settings = self.read_settings(component)
        return settings["lora_alpha"] / settings["r"] if settings else 1.0

    def check_fit(self, component: str, weights: Mapping[str, Any]) -> None:
        """Compare a component's layers with the weights that they are for.

        Raises:
            InputError: listing arrays that belong to no linear layer.
        """
        arrays = self.components[component]
        shapes = {name: weight.shape for name, weight in weights.items()}
        misfits = [
            f"{component}.{name}" for name in arrays if not fits_linear(name, arrays, shapes)
        ]
        if misfits:
            raise InputError(
                explain_unused(
                    self.path,
                    misfits,
                    f"the {component}",
                    "Low-rank additions to linear layers of it are expected. Was it trained on "
                    "another model, or is it of another kind, for --engine torch?",
                )
            )
        rank = self.read_settings(component).get("r")
        for name, array in arrays.items():
            if rank and name.endswith("lora_A.weight") and array.shape[0] != rank:
                raise InputError(
                    f"{self.path}: {component}.{name} has rank {array.shape[0]}, and the header "
                    f"says {rank}. Fetch or copy it again."
                )


def read_lora(path: Path, family: Family) -> Lora:
    """Read a LoRA file.

    Raises:
        InputError: for a file that is damaged, of another family, or of a kind of adapter that
            there is no code for.
    """
    stored, settings = read_lora_file(path)
    for part, kind in UNSUPPORTED_KINDS.items():
        if any(part in name for name in stored):
            raise InputError(
                f"{path}: it is {kind}, which the JAX engine has no code for. Use --engine torch."
            )
    arrays = {rename_lora_array(name): array for name, array in stored.items()}
    for name, value in settings.items():
        if value and name.rpartition(".")[2] in UNSUPPORTED:
            raise InputError(
                f"{path}: it has {name}, which the JAX engine has no code for. Use --engine torch."
            )
    components: dict[str, Arrays] = {}
    for name, array in arrays.items():
        component, _, rest = name.partition(".")
        # As transformers has named a CLIP text encoder's layers since 5.6.
        if component.startswith("text_encoder") and rest.startswith("encoder."):
            rest = f"text_model.{rest}"
        components.setdefault(component, {})[rest] = array
    strange = [name for name in stored if name.partition(".")[0] not in family.lora_targets]
    if strange:
        hint = guess_prefix(strange, family.lora_targets)
        raise InputError(explain_unused(path, strange, f"a {family.pipeline}", hint))
    return Lora(path, settings, components)


def fits_linear(name: str, arrays: Arrays, shapes: Mapping[str, Shape]) -> bool:
    """Return whether an array is half of an addition to a linear layer."""
    return arrays[name].ndim == 2 and fits_layer(name, arrays, shapes)
