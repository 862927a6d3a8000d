"""Compare the files of a base with PyTorch's models before a weight is read, and load them."""

import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.comparison import (
    ExpectedArrays,
    check_arrays,
    check_counts,
    explain_faults,
    list_some,
    read_stored,
)
from limner.base_model.configs import list_components, list_components_with_weights
from limner.base_model.json_files import read_json
from limner.base_model.weight_files import (
    choose_weight_files,
    has_usable_weights,
    list_files,
    parse_variant,
)
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.family import Family
from limner.json_types import Plain

KNOWN_CLASSES = {
    "StableDiffusionSafetyChecker",
    *(class_name for family in FAMILIES.values() for class_name in family.components.values()),
}


def check_base(base: BaseModel, family: Family) -> None:
    """Compare all components of a base with their configs, and load its tokenizers.

    Raises:
        InputError: naming the folder and what differs.
    """
    for name in list_components_with_weights(family):
        folder = base.component_folder(name)
        # Of another stage there is only what is used of it.
        if has_usable_weights(name, list_files(folder), base.variant):
            check_component(folder, *base.component_class(name), base.variant)
    for name in family.text.tokenizers:
        load_component(base, name)
    if base.other_stage is not None and family.other_stage is not None:
        check_base(base.other_stage, FAMILIES[family.other_stage])


def check_pipeline(folder: Path, variant: str | None) -> None:
    """Compare the networks of a pipeline's folder with their configs, those of classes that a
    family has.

    Raises:
        InputError: naming the folder and what differs.
    """
    for name, (library, class_name) in list_components(read_json(folder / INDEX)).items():
        component = folder / name
        # Other classes may be saved under names that their libraries alone know.
        is_known = class_name in KNOWN_CLASSES
        if is_known and has_usable_weights(name, list_files(component), variant):
            check_component(component, library, class_name, variant)


def check_component(folder: Path, library: str, class_name: str, variant: str | None) -> None:
    """Compare the arrays of a component's files with its class, built from its config.

    Raises:
        InputError: listing what differs.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    stored = {
        name: array
        for name, (_, array) in read_stored(choose_weight_files(folder, variant)).items()
    }
    check_counts(config_file, config, len(stored))
    cls = find_class(library, class_name)
    with explain_faults(f"{config_file}: no {class_name} can be made of it"):
        net = build_model(cls, config)
    check_arrays(folder, class_name, stored, list_expected(net))


def find_class(library: str, class_name: str) -> Any:
    """Return the class of a component.

    Raises:
        InputError: when the library has none of that name.
    """
    import diffusers
    import transformers

    places: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    if library == "stable_diffusion":
        from diffusers.pipelines import stable_diffusion

        places[library] = stable_diffusion
    # As diffusers does with bases of before transformers 4.26.
    class_name = {"CLIPFeatureExtractor": "CLIPImageProcessor"}.get(class_name, class_name)
    cls = getattr(places.get(library), class_name, None)
    if cls is None:
        raise InputError(
            f"{library}.{class_name}: there is no such class in the version that is installed. "
            "Choose a base of stock components."
        )
    return cls


def build_model(cls: Any, config: Plain) -> torch.nn.Module:
    """Build a network of diffusers or transformers on the meta device, without memory for it."""
    with torch.device("meta"):
        if hasattr(cls, "config_class") and cls.config_class is not None:
            net: torch.nn.Module = cls(cls.config_class.from_dict(config))
            return net
        check_types(cls, config)
        net = cls.from_config(config)
        return net


def build_on_meta(base: BaseModel) -> torch.nn.Module:
    """Build the trained network of a base on the meta device."""
    name = base.trained_component
    return build_model(find_class(*base.component_class(name)), base.configs[name])


def build_from_config(config: Plain) -> torch.nn.Module:
    """Build a network of diffusers from its config alone, on the meta device."""
    return build_model(find_class("diffusers", config["_class_name"]), config)


def check_types(cls: Any, config: Plain) -> None:
    """Refuse texts where a class of diffusers has numbers, and numbers where it has texts.

    Raises:
        TypeError: naming the setting; diffusers would notice at the first step, or never.
    """
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        value, usual = config.get(name), parameter.default
        if value is None or type(usual) not in (bool, int, float, str):
            continue
        if isinstance(usual, str) != isinstance(value, str) or isinstance(value, dict):
            raise TypeError(f"{name} is {str(value)[:80]!r}, something like {usual!r} is expected")


def list_expected(net: torch.nn.Module) -> ExpectedArrays:
    """Return the arrays that a network is loaded from."""
    shapes = {}
    names = defaultdict(list)
    for name, array in net.state_dict(keep_vars=True).items():
        shapes[name] = tuple(array.shape)
        names[id(array)].append(name)
    return ExpectedArrays(shapes, tuple(tuple(group) for group in names.values() if group[1:]))


def load_component(base: BaseModel, name: str) -> Any:
    """Load a component of a base: the class of its model_index, weights from safetensors only.

    Raises:
        InputError: when it cannot be loaded, or not all of it is in its files.
    """
    silence_progress_bars()
    cls = find_class(*base.component_class(name))
    folder = base.component_folder(name)
    with explain_faults(f"{folder}: no {cls.__name__} can be loaded from it"):
        # Tokenizers and schedulers have no weights.
        if not hasattr(cls, "dtype"):
            return check_tokenizer(base, name, cls.from_pretrained(folder))
        net, report = cls.from_pretrained(
            folder,
            use_safetensors=True,
            variant=parse_variant(base.weight_files(name)[0]),
            dtype=torch.float32,
            output_loading_info=True,
        )
    kinds = ("missing_keys", "mismatched_keys", "error_msgs")
    if replaced := sorted(str(one) for kind in kinds for one in report[kind]):
        raise InputError(
            f"{folder}: not all of a {cls.__name__} is in its files: {list_some(replaced)}. Fetch "
            "or copy the model again."
        )
    return net


def check_tokenizer(base: BaseModel, name: str, tokenizer: Any) -> Any:
    """Return a tokenizer, or whatever else has no weights, if its text encoder knows all its ids.

    Raises:
        ValueError: when the vocabulary is empty, or larger than the text encoder's.
    """
    if not name.startswith("tokenizer"):
        return tokenizer
    encoder = base.configs[name.replace("tokenizer", "text_encoder")]
    size, known = len(tokenizer), encoder.get("vocab_size")
    if size == 0 or tokenizer.pad_token_id is None:
        raise ValueError(f"its vocabulary has {size} tokens, and no padding among them")
    if type(known) is int and size > known:
        raise ValueError(f"its vocabulary has {size} tokens, the text encoder knows {known}")
    positions = encoder.get("max_position_embeddings")
    if positions is not None and not 2 < tokenizer.model_max_length <= positions:
        raise ValueError(
            f"model_max_length is {tokenizer.model_max_length}, the text encoder has {positions} "
            "positions"
        )
    return tokenizer


def silence_progress_bars() -> None:
    """Switch off the progress bars of the libraries: Limner has its own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
