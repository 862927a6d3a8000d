"""Read a component's arrays by the names and in the layouts of its safetensors files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from limner.base_model.base import BaseModel
from limner.base_model.configs import list_components_with_weights
from limner.engines.jax import clip, unet, vae
from limner.errors import InputError
from limner.families.family import Family
from limner.storage import safetensors

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

MAX_LISTED = 8  # names in a message
# Of an autoencoder's attention, before diffusers 0.17 -> today.
RENAMED_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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


def read_component(base: BaseModel, component: str) -> dict[str, np.ndarray]:
    """Read a component's arrays as float32, whatever type they are stored in.

    Raises:
        InputError: listing arrays that are missing, unknown, or of another shape.
    """
    folder = base.component_folder(component)
    expected = expected_shapes(base.component_class(component)[1], base.configs[component])
    files = base.weight_files(component)
    locations: dict[str, tuple[Path, str]] = {}
    for path in files:
        for stored_name in sorted(safetensors.read_header(path).arrays):
            locations[to_model_name(stored_name, expected)] = (path, stored_name)
    check_names(f"{folder}", expected, locations)
    arrays: dict[str, np.ndarray] = {}
    for path in files:
        names = {
            stored_name: name
            for name, (file, stored_name) in locations.items()
            if file == path and name in expected
        }
        arrays |= read_weight_file(path, names)
    wrong_shapes = [
        f"{name} is {list(array.shape)}, {list(expected[name])} is expected"
        for name, array in arrays.items()
        if array.shape != expected[name]
    ]
    if wrong_shapes:
        raise InputError(
            f"{folder}: {len(wrong_shapes)} arrays do not fit its config: "
            f"{'; '.join(wrong_shapes[:MAX_LISTED])}. Fetch or copy the model again."
        )
    return arrays


def read_weight_file(path: Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read arrays of one file as float32.

    Args:
        names: of the arrays in the file -> in the result.
    """
    arrays = safetensors.read_float32(path, names)
    return {name: squeeze_attention(arrays[stored], name) for stored, name in names.items()}


def squeeze_attention(array: np.ndarray, name: str) -> np.ndarray:
    """Return an attention weight of an old autoencoder, a 1 x 1 convolution, as a matrix."""
    is_convolution = array.ndim == 4 and array.shape[2:] == (1, 1)
    if is_convolution and name.rpartition(".attentions.0.")[2] in RENAMED_WEIGHTS:
        return array[:, :, 0, 0]
    return array


def to_model_name(name: str, expected: Mapping[str, Any]) -> str:
    """Translate an array's name in a file to the one that the model asks for.

    Some text encoders lack ``text_model.``; old autoencoders name their attention differently.
    """
    if name in expected:
        return name
    if f"text_model.{name}" in expected:
        return f"text_model.{name}"
    stem, dot, tail = name.rpartition(".")
    parent, _, layer = stem.rpartition(".")
    return f"{parent}.{RENAMED_LAYERS[layer]}{dot}{tail}" if layer in RENAMED_LAYERS else name


def check_names(folder: str, expected: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Compare the names of a folder's arrays with those that a model asks for.

    Raises:
        InputError: listing the differences.
    """
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    # Old checkpoints of text encoders store position_ids, which are no weights.
    unknown = [name for name in extra if not name.endswith("position_ids")]
    problems = []
    if missing:
        problems.append(f"{len(missing)} arrays are missing: {list_some(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} arrays have no place in the model: {list_some(unknown)}")
    if problems:
        raise InputError(
            f"{folder}: {'; '.join(problems)}. Is it the model that its config says? Fetch or copy "
            "it again."
        )


def list_some(names: list[str]) -> str:
    """Join the first names for a message."""
    more = ", ..." if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
