"""A component's arrays from its folder, by the names and in the layouts of its safetensors files;
what is missing, strange or of another shape is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from limner.base_model.base import BaseModel
from limner.engines.jax import clip, unet, vae
from limner.errors import InputError

SHOWN = 8  # names that a message lists
OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # of an autoencoder's attention before diffusers 0.17


def expected_shapes(kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array of a component.

    Raises:
        InputError: for a config that there is no code for.
    """
    surveys: dict[str, Any] = {
        "UNet2DConditionModel": (unet.unsupported, unet.unet_shapes),
        "AutoencoderKL": (vae.unsupported, vae.vae_shapes),
        "CLIPTextModel": (clip.unsupported, lambda c: clip.text_shapes(c, False)),
        "CLIPTextModelWithProjection": (clip.unsupported, lambda c: clip.text_shapes(c, True)),
    }
    if kind not in surveys:
        raise InputError(
            f'engine.kind="jax" knows no {kind}; it has {", ".join(surveys)}. Use '
            'engine.kind="torch".'
        )
    strange, survey = surveys[kind]
    if problems := strange(config):
        raise InputError(
            f"the JAX engine has no code for this {kind}: {'; '.join(problems)}. Use "
            'engine.kind="torch".'
        )
    return survey(config)  # type: ignore[no-any-return]


def read_component(base: BaseModel, component: str) -> dict[str, np.ndarray]:
    """The arrays of a component, float32 whatever they are stored in.

    Raises:
        InputError: listing names that are missing, that there is no place for, or that have another
            shape.
    """
    wanted, found = expected_shapes(base.component_class(component)[1], base.configs[component]), {}
    for path in base.weight_files(component):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                found[to_model_name(name, wanted)] = (path, name)
    check_names(f"{base.component_folder(component)}", wanted, found)
    arrays: dict[str, np.ndarray] = {}
    for path in base.weight_files(component):
        arrays |= read_weight_file(
            path,
            {
                stored: name
                for name, (where, stored) in found.items()
                if where == path and name in wanted
            },
        )
    if wrong := [
        f"{name} is {list(a.shape)}, {list(wanted[name])} is expected"
        for name, a in arrays.items()
        if a.shape != wanted[name]
    ]:
        raise InputError(
            f"{base.component_folder(component)}: {len(wrong)} arrays do not fit its config: "
            f"{'; '.join(wrong[:SHOWN])}. Fetch or copy the model again."
        )
    return arrays


def read_weight_file(path: Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Arrays of one file under new names, float32, in the order of the file."""
    import ml_dtypes  # noqa: F401 - numpy learns bfloat16 from it

    out = {}
    with safe_open(path, "np") as file:
        for stored, name in names.items():
            out[name] = squeeze_attention(file.get_tensor(stored).astype(np.float32), name)
    return out


def squeeze_attention(array: np.ndarray, name: str) -> np.ndarray:
    """Attention weights of old autoencoders were convolutions of one pixel."""
    return (
        array[:, :, 0, 0]
        if array.ndim == 4
        and array.shape[2:] == (1, 1)
        and name.rpartition(".attentions.0.")[2] in OLD_VAE
        else array
    )


OLD_VAE = {f"{name}.weight" for name in OLD_NAMES.values()}


def to_model_name(name: str, wanted: Mapping[str, Any]) -> str:
    """The name that the models here use: ``text_model.`` before all of a text encoder, today's
    names in an autoencoder's attention."""
    if name in wanted:
        return name
    if f"text_model.{name}" in wanted:
        return f"text_model.{name}"
    head, dot, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{OLD_NAMES[last]}{dot}{tail}" if last in OLD_NAMES else name


def check_names(where: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a set of names that is not the one a model asks for."""
    missing = sorted(wanted.keys() - found.keys())
    strange = sorted(
        name for name in found.keys() - wanted.keys() if not name.endswith("position_ids")
    )
    problems = [
        f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        for what, names in (
            ("arrays are missing", missing),
            ("arrays have no place in the model", strange),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{where}: {'; '.join(problems)}. Is it the model that its config says? Fetch or copy "
            "it again."
        )
