"""Read a component's arrays by the names and in the layouts of its safetensors files."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from limner.base_model.base import BaseModel
from limner.base_model.comparison import (
    RENAMED_LAYERS,
    ExpectedArrays,
    check_arrays,
    check_counts,
    explain_faults,
    read_stored,
    to_model_name,
)
from limner.base_model.configs import list_components_with_weights
from limner.engines.jax import clip, unet, vae
from limner.engines.jax.settings import complete
from limner.engines.jax.tokenizer import WordTokenizer
from limner.errors import InputError
from limner.families.family import Family
from limner.storage import safetensors

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

RENAMED_WEIGHTS = {f"{name}.weight" for name in RENAMED_LAYERS.values()}
# Class name -> what a config needs that there is no code for, and the shapes of its arrays.
COMPONENTS: dict[str, tuple[Callable[[Config], list[str]], Callable[[Config], Shapes]]] = {
    "UNet2DConditionModel": (unet.find_unsupported, unet.list_unet_shapes),
    "AutoencoderKL": (vae.find_unsupported, vae.list_vae_shapes),
    "CLIPTextModel": (
        clip.find_unsupported,
        lambda config: clip.list_text_encoder_shapes(config, projection=False),
    ),
    "CLIPTextModelWithProjection": (
        clip.find_unsupported,
        lambda config: clip.list_text_encoder_shapes(config, projection=True),
    ),
}


def serves(family: Family) -> bool:
    """Return whether there is code for every network of a family."""
    names = list_components_with_weights(family)
    return all(family.components[name] in COMPONENTS for name in names)


def expected_shapes(component_class: str, config: Config) -> Shapes:
    """Return the name and shape of every array of a component.

    Raises:
        InputError: for a config that there is no code for.
    """
    if component_class not in COMPONENTS:
        raise InputError(
            f'engine.kind="jax" knows no {component_class}; it has {", ".join(COMPONENTS)}. Use '
            'engine.kind="torch".'
        )
    find_unsupported, list_shapes = COMPONENTS[component_class]
    if problems := find_unsupported(config):
        raise InputError(
            f"the JAX engine has no code for this {component_class}: {'; '.join(problems)}. Use "
            'engine.kind="torch".'
        )
    return list_shapes(config)


def check_base(base: BaseModel, family: Family) -> None:
    """Compare all components of a base with their configs, and load its tokenizers.

    Raises:
        InputError: naming the folder and what differs.
    """
    # What it has no code for the engine refuses when it is opened.
    if not serves(family):
        return
    for name in list_components_with_weights(family):
        locate_arrays(base, name)
    for one in family.text.inputs:
        open_tokenizer(base, one.tokenizer)


def open_tokenizer(base: BaseModel, name: str) -> WordTokenizer:
    """Open a tokenizer of a base.

    Raises:
        InputError: when it cannot be read, or has tokens that its text encoder does not know.
    """
    folder = base.component_folder(name)
    with explain_faults(f"{folder}: its tokenizer cannot be loaded"):
        tokenizer = WordTokenizer(folder, base.configs[name])
    size = tokenizer.inner.get_vocab_size(with_added_tokens=True)
    encoder = complete(base.configs[name.replace("tokenizer", "text_encoder")], clip.DEFAULTS)
    known, positions = encoder["vocab_size"], encoder["max_position_embeddings"]
    if not 0 < size <= known:
        raise InputError(
            f"{folder}: its vocabulary has {size} tokens, the text encoder knows {known}. Fetch or "
            "copy the model again."
        )
    if not 2 < tokenizer.limit <= positions:
        raise InputError(
            f"{folder}: model_max_length is {tokenizer.limit}, the text encoder has {positions} "
            "positions. Fetch or copy the model again."
        )
    return tokenizer


def locate_arrays(base: BaseModel, component: str) -> dict[str, tuple[Path, str]]:
    """Return where each array of a component lies: its file, and its name there.

    Raises:
        InputError: listing arrays that are missing, unknown, or of another shape or type.
    """
    folder, class_name = base.component_folder(component), base.component_class(component)[1]
    config = base.configs[component]
    stored = read_stored(base.weight_files(component))
    check_counts(folder / "config.json", config, len(stored))
    with explain_faults(f"{folder / 'config.json'}: no {class_name} can be made of it"):
        shapes = trace_shapes(class_name, json.dumps(config, sort_keys=True))
    arrays = {
        name: replace(array, shape=squeeze_shape(array.shape, to_model_name(name, shapes)))
        for name, (_, array) in stored.items()
    }
    check_arrays(folder, class_name, arrays, ExpectedArrays(shapes))
    return {
        name: (path, stored_name)
        for stored_name, (path, _) in stored.items()
        if (name := to_model_name(stored_name, shapes)) in shapes
    }


@functools.lru_cache(maxsize=16)
def trace_shapes(component_class: str, config: str) -> Shapes:
    """Return ``expected_shapes`` of a config, as JSON: networks are compared, then read."""
    return expected_shapes(component_class, json.loads(config))


def read_component(base: BaseModel, component: str) -> dict[str, np.ndarray]:
    """Read a component's arrays as float32, whatever type they are stored in.

    Raises:
        InputError: listing arrays that are missing, unknown, or of another shape or type.
    """
    locations = locate_arrays(base, component)
    arrays: dict[str, np.ndarray] = {}
    for path in base.weight_files(component):
        names = {stored: name for name, (file, stored) in locations.items() if file == path}
        arrays |= read_weight_file(path, names)
    return arrays


def read_weight_file(path: Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read arrays of one file as float32.

    Args:
        names: of the arrays in the file -> in the result.
    """
    arrays = safetensors.read_float32(path, names)
    return {
        name: arrays[stored].reshape(squeeze_shape(arrays[stored].shape, name))
        for stored, name in names.items()
    }


def squeeze_shape(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return the shape of an attention weight of an old autoencoder, a 1 x 1 convolution, as that
    of a matrix; any other as it is."""
    is_convolution = len(shape) == 4 and shape[2:] == (1, 1)
    if is_convolution and name.rpartition(".attentions.0.")[2] in RENAMED_WEIGHTS:
        return shape[:2]
    return shape
