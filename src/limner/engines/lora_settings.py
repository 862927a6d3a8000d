"""The settings of a LoRA in its file's header, and which of them leave it a plain LoRA."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limner.errors import InputError
from limner.json_types import read_object

# Settings that go with arrays -> the part of those arrays' names.
ARRAYS_OF_SETTINGS = {"use_dora": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}
# peft's kinds of models; none of them changes what an adapter does.
TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True)
class Setting:
    """Which values of a setting are taken."""

    accepts: Callable[[object], bool]
    expected: str  # in words, for a message


def take_only(*values: object) -> Setting:
    """Return a setting that is taken at these values."""
    # Not by == alone, for which 0 is False.
    return Setting(
        lambda value: any(type(value) is type(one) and value == one for one in values),
        " or ".join(map(json.dumps, values)),
    )


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max  # type: ignore[operator]


def is_rank(value: object) -> bool:
    """Return whether a value is a whole number above 0; peft takes no 4.0."""
    return isinstance(value, int) and is_positive(value)


def is_probability(value: object) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return value == 0 or (is_positive(value) and value <= 1)  # type: ignore[operator]


def is_targets(value: object) -> bool:
    """Return whether a value is a text, or a list of texts, that is not empty."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts) and bool(texts)


ANY = Setting(lambda value: True, "anything")
SWITCH = take_only(None, False, True)
UNSET = take_only(None)
BY_LAYER = Setting(lambda value: isinstance(value, dict), "a table of numbers by layer")
# Settings by layer -> the setting that each of them is of one layer.
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
# Fields of peft's LoraConfig: diffusers gives it all that a header has of a component. Each is
# taken at the values that leave plain low-rank layers, or of which the file holds the arrays.
SETTINGS = {
    "alora_invocation_tokens": take_only(None, []),
    "alpha_pattern": BY_LAYER,
    "arrow_config": UNSET,
    "auto_mapping": ANY,
    "base_model_name_or_path": ANY,
    "bias": take_only("none"),
    "corda_config": UNSET,
    "ensure_weight_tying": take_only(None, False),
    "eva_config": UNSET,
    # Of which the file has no arrays; see ``check_excluded``.
    "exclude_modules": Setting(
        lambda value: value in (None, "", []) or (isinstance(value, list) and is_targets(value)),
        "a list of texts",
    ),
    "fan_in_fan_out": take_only(None, False),
    "inference_mode": ANY,
    # Others are arrays for a base that was changed, or that are no halves of a product.
    "init_lora_weights": take_only(None, True, False, "gaussian", "orthogonal"),
    "kasa_config": UNSET,
    "layer_replication": take_only(None, []),
    "layers_pattern": take_only(None, [], ""),
    "layers_to_transform": take_only(None, []),
    "loftq_config": take_only(None, {}),
    "lora_alpha": Setting(is_positive, "a number above 0"),
    "lora_bias": SWITCH,
    # While pictures are drawn there is no dropout.
    "lora_dropout": Setting(is_probability, "a number from 0 to 1"),
    "lora_ga_config": UNSET,
    "megatron_config": take_only(None, {}),
    "megatron_core": ANY,
    "modules_to_save": take_only(None, []),
    "monteclora_config": UNSET,
    "peft_type": take_only(None, "LORA"),
    "peft_version": ANY,
    "qalora_group_size": ANY,
    "r": Setting(is_rank, "a whole number above 0"),
    "rank_pattern": BY_LAYER,
    "revision": ANY,
    # peft leaves it out of what it writes, and takes no null.
    "runtime_config": Setting(lambda value: False, "nothing"),
    "target_modules": Setting(is_targets, "a text or a list of texts"),
    "target_parameters": take_only(None, []),
    "task_type": take_only(None, *TASKS),
    "trainable_token_indices": take_only(None, {}),
    "use_bdlora": UNSET,
    "use_dora": SWITCH,
    "use_qalora": take_only(None, False),
    "use_rslora": SWITCH,
    "velora_config": UNSET,
}


def read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the adapters' settings in a file's header, as diffusers writes them.

    Raises:
        InputError: when they are no settings by name, or have a rank or alpha that is no number.
    """
    try:
        settings = read_object(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise InputError(
            f"{path}: lora_adapter_metadata in its header cannot be read ({error}). Fetch or copy "
            "it again."
        ) from error
    for name, value in settings.items():
        if get_last_part(name) in (*PATTERNS, *PATTERNS.values()):
            check_value(path, name, value)
    return settings


def check_settings(path: Path, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a header that does not describe the low-rank layers that the file has.

    Args:
        names: of the file's arrays.

    Raises:
        InputError: naming the component or the setting.
    """
    for component in sorted({name.partition(".")[0] for name in names}):
        # Names of kohya's trainer have no dot after the component.
        if not component.startswith("lora_"):
            check_component(path, component, settings, names)
    for name, value in settings.items():
        if get_last_part(name) in SETTINGS:
            check_value(path, name, value)


def check_component(
    path: Path, component: str, settings: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Refuse what a header lacks of a component, has besides, or has other arrays for."""
    prefix = f"{component}."
    own = {
        name.removeprefix(prefix): settings[name] for name in settings if name.startswith(prefix)
    }
    if "target_modules" not in own:
        what = "no target_modules" if own else "nothing"
        raise InputError(
            f"{path}: lora_adapter_metadata in its header says {what} of {component}, it has "
            f"{', '.join(sorted(settings))[:160]}. {component}.r, {component}.lora_alpha and "
            f"{component}.target_modules are expected; mend the header, or leave it out."
        )
    if unknown := sorted(own.keys() - SETTINGS.keys()):
        raise InputError(
            f"{path}: lora_adapter_metadata in its header has {component}.{unknown[0]:.80}, "
            "which is no setting of a LoRA in peft. Leave it out of the header."
        )
    check_excluded(path, component, own.get("exclude_modules"), names)
    for setting, part in ARRAYS_OF_SETTINGS.items():
        holds = any(part in name for name in names if name.startswith(prefix))
        if holds != (own.get(setting) is True):
            raise InputError(
                f"{path}: lora_adapter_metadata in its header: {component}.{setting} is "
                f"{show_value(own.get(setting))}, and {'an' if holds else 'no'} array of "
                f"{component} has {part} in its name. Mend the header, or fetch the file again."
            )


def check_excluded(path: Path, component: str, excluded: object, names: Sequence[str]) -> None:
    """Refuse arrays of layers that a header excludes, which peft would leave out.

    Args:
        excluded: names of layers, or their ends.
    """
    if not isinstance(excluded, list):
        return
    ends = tuple(f".{end}" for end in excluded)
    left_out = [name for name in names if f".{name.partition('.lora')[0]}".endswith(ends) and ends]
    if left_out:
        raise InputError(
            f"{path}: lora_adapter_metadata in its header: {component}.exclude_modules leaves out "
            f"{min(left_out):.120}, of which the file has values. Mend the header, or leave it out."
        )


def check_value(path: Path, name: str, value: object) -> None:
    """Refuse a value at which a file is not read as plain low-rank layers.

    Args:
        name: of a setting that is known, after its component.

    Raises:
        InputError: naming the setting, or the layer that it is of.
    """
    setting = get_last_part(name)
    checks = [(name, value, SETTINGS[setting])]
    if setting in PATTERNS and isinstance(value, dict):
        of_one = SETTINGS[PATTERNS[setting]]
        checks = [(f"{name} of {layer!r:.80}", one, of_one) for layer, one in value.items()]
    for what, one, wanted in checks:
        if not wanted.accepts(one):
            raise InputError(
                f"{path}: lora_adapter_metadata in its header: {what} is {show_value(one)}, "
                f"{wanted.expected} is expected. Only plain low-rank layers are read: mend the "
                "header, or merge the LoRA into its base with what wrote it."
            )


def get_last_part(name: str) -> str:
    """Return a setting's name without its component."""
    return name.rpartition(".")[2]


def show_value(value: object) -> str:
    """Return a value as the header has it, cut short."""
    try:
        return json.dumps(value)[:80]
    except RecursionError:
        return "nested too deep"
