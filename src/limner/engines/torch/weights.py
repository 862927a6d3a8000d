"""Compare the files of a base with PyTorch's models before a weight is read, and load them."""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from limner.base_model.base import INDEX, BaseModel
from limner.base_model.comparison import (
    NUMBER_TYPES,
    Differences,
    ExpectedArrays,
    check_arrays,
    check_counts,
    explain_faults,
    explain_prefix,
    list_some,
    read_stored,
    refuse_differences,
)
from limner.base_model.configs import (
    check_places,
    list_components,
    list_components_with_weights,
)
from limner.base_model.json_files import read_json
from limner.base_model.weight_files import (
    choose_weight_files,
    has_usable_weights,
    list_files,
    parse_variant,
)
from limner.diffusion.samplers import check_drawing
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.family import Family
from limner.json_types import Plain
from limner.protocols import Report
from limner.storage.safetensors import StoredArray

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
        if base.has_usable_weights(name):
            check_component(folder, *base.component_class(name), base.variant)
    for name in family.text.tokenizers:
        load_component(base, name)
    if base.other_stage is not None and family.other_stage is not None:
        check_base(base.other_stage, FAMILIES[family.other_stage])


def check_pipeline(folder: Path, variant: str | None, report: Report) -> None:
    """Compare the networks of a pipeline's folder with their configs, say which are not, and load
    its tokenizers.

    Raises:
        InputError: naming the folder and what differs.
    """
    components = list_components(read_json(folder / INDEX))
    for name, (library, class_name) in components.items():
        component = folder / name
        names = list_files(component)
        if name == "scheduler":
            path = component / "scheduler_config.json"
            check_drawing(read_json(path) | {"_class_name": class_name})
        elif name.startswith("tokenizer"):
            encoder = name.replace("tokenizer", "text_encoder")
            if components.get(encoder, ("", ""))[1] in KNOWN_CLASSES:
                cls = find_class(library, class_name)
                check_places(component, read_json(component / "tokenizer_config.json"))
                load_tokenizer(component, cls, read_json(folder / encoder / "config.json"))
        elif not names and name != "safety_checker":
            raise InputError(
                f"{component}: it is named in {INDEX}, and no file of it is there. Fetch or copy "
                "the model again."
            )
        # The safety checker is left out; what has no safetensors weights is refused when loaded.
        may_load = name != "safety_checker" and any(".safetensors" in one for one in names)
        if may_load or has_usable_weights(name, names, variant, library):
            check_network(component, library, class_name, variant, report)


def check_network(
    folder: Path, library: str, class_name: str, variant: str | None, report: Report
) -> None:
    """Compare a network with its config, or say that it is quantized.

    Raises:
        InputError: listing what differs.
    """
    config = read_json(folder / "config.json")
    check_places(folder, config)
    if config.get("quantization_config"):
        report(f"{folder}: it is quantized: its arrays are not compared with its config")
    else:
        check_component(folder, library, class_name, variant)


def check_component(folder: Path, library: str, class_name: str, variant: str | None) -> None:
    """Compare the arrays of a component's files with its class, built from its config.

    Raises:
        InputError: listing what differs.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    stored = {
        name: array
        for name, (_, array) in read_stored(choose_weight_files(folder, variant, library)).items()
    }
    check_counts(config_file, config, len(stored))
    cls = find_class(library, class_name)
    if class_name not in KNOWN_CLASSES and is_of_transformers(cls):
        check_in_transformers(folder, cls, config, stored)
        return
    with explain_faults(f"{config_file}: no {class_name} can be made of it"):
        net = build_model(cls, config)
    check_arrays(folder, class_name, stored, list_expected(net))


def check_in_transformers(
    folder: Path, cls: Any, config: Plain, stored: Mapping[str, StoredArray]
) -> None:
    """Let transformers compare the arrays of a class: it knows those that it saves under other
    names, or joins when it reads them. No weight is read.

    Other heads, or halves, than those of the class are left out, as transformers does.

    Raises:
        InputError: listing what differs.
    """
    silence_progress_bars()
    config_file = folder / "config.json"
    with explain_faults(f"{config_file}: no {cls.__name__} can be made of it"), hide_warnings():
        net, report = cls.from_pretrained(
            None,
            config=cls.config_class.from_dict(config),
            state_dict={
                name: torch.empty(array.shape, device="meta") for name, array in stored.items()
            },
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    expected = list_expected(net)
    parts = {name.partition(".")[0] for name in expected.shapes}
    differences = Differences(
        missing=list(report["missing_keys"]),
        surplus=[name for name in report["unexpected_keys"] if name.partition(".")[0] in parts],
        misshapen=[
            f"{name} is {list(shape)}, {list(wanted)} is expected"
            for name, shape, wanted in report["mismatched_keys"]
        ],
        mistyped=[
            f"{name} is {array.dtype}"
            for name, array in stored.items()
            if array.dtype not in NUMBER_TYPES
            and name in expected.shapes.keys() - expected.integers
        ],
    )
    hint = explain_prefix(stored, expected.shapes) if differences.missing else ""
    refuse_differences(folder, differences, hint)


@contextlib.contextmanager
def hide_warnings() -> Iterator[None]:
    """Let transformers say nothing."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def find_class(library: str, class_name: str) -> Any:
    """Return the class of a component.

    Raises:
        InputError: when the library has none of that name.
    """
    import diffusers
    import transformers

    places: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    if library not in places:
        # A pipeline has its own folder in diffusers, with the classes that it alone is made of.
        of_pipeline = getattr(diffusers.pipelines, library, None)
        places[library] = of_pipeline if isinstance(of_pipeline, ModuleType) else None
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
        if is_of_transformers(cls):
            net: torch.nn.Module = cls(cls.config_class.from_dict(config))
            return net
        check_types(cls, config)
        net = cls.from_config(config)
        return net


def is_of_transformers(cls: Any) -> bool:
    """Return whether a class is a network of transformers; the others are of diffusers."""
    return getattr(cls, "config_class", None) is not None


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
    arrays = net.state_dict(keep_vars=True)
    names = defaultdict(list)
    for name, array in arrays.items():
        names[id(array)].append(name)
    # Of diffusers' classes; transformers has read its own.
    unused = getattr(net, "_keys_to_ignore_on_load_unexpected", None)
    return ExpectedArrays(
        shapes={name: tuple(array.shape) for name, array in arrays.items()},
        tied=tuple(tuple(group) for group in names.values() if group[1:]),
        integers=frozenset(name for name, one in arrays.items() if not one.is_floating_point()),
        unused=() if is_of_transformers(net) else tuple(unused or ()),
    )


def load_component(base: BaseModel, name: str) -> Any:
    """Load a component of a base: the class of its model_index, weights from safetensors only.

    Raises:
        InputError: when it cannot be loaded, or not all of it is in its files.
    """
    silence_progress_bars()
    cls = find_class(*base.component_class(name))
    folder = base.component_folder(name)
    with explain_faults(f"{folder}: no {cls.__name__} can be loaded from it"):
        # Tokenizers and image processors have no weights.
        if name.startswith("tokenizer"):
            encoder = base.configs[name.replace("tokenizer", "text_encoder")]
            return load_tokenizer(folder, cls, encoder)
        if not hasattr(cls, "dtype"):
            return cls.from_pretrained(folder)
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


def load_tokenizer(folder: Path, cls: Any, encoder: Plain) -> Any:
    """Load a tokenizer, if its text encoder knows all its ids and has as many positions.

    Args:
        encoder: the config of its text encoder.

    Raises:
        InputError: when it cannot be loaded, when the vocabulary is empty, or larger than the text
            encoder's.
    """
    with explain_faults(f"{folder}: no {cls.__name__} can be loaded from it"):
        tokenizer = cls.from_pretrained(folder)
        size, known = len(tokenizer), encoder.get("vocab_size")
        if size == 0 or tokenizer.pad_token_id is None:
            raise ValueError(f"its vocabulary has {size} tokens, and no padding among them")
        if type(known) is int and size > known:
            raise ValueError(f"its vocabulary has {size} tokens, the text encoder knows {known}")
        positions, length = encoder.get("max_position_embeddings"), tokenizer.model_max_length
        if positions is not None and not (type(length) is int and 2 < length <= positions):
            raise ValueError(
                f"model_max_length is {length}, the text encoder has {positions} positions"
            )
        return tokenizer


def silence_progress_bars() -> None:
    """Switch off the progress bars of the libraries: Limner has its own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
