"""Read old Flax models: convert their ``*.msgpack`` weights to a diffusers folder, once.

The format is that of flax's serialization: nested dictionaries, whose arrays are an extension of
msgpack, large ones in pieces. Kernels are turned into torch's layout, and names into those of
diffusers and transformers.
"""

import json
import mmap
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from limner.base_model.base import INDEX
from limner.base_model.json_files import read_json
from limner.errors import InputError
from limner.json_types import Plain
from limner.storage import atomic, safetensors

NETWORK_FILE = "diffusion_flax_model.msgpack"
TEXT_FILE = "flax_model.msgpack"
FLAX_FILES = {
    "unet": NETWORK_FILE,
    "vae": NETWORK_FILE,
    "text_encoder": TEXT_FILE,
    "text_encoder_2": TEXT_FILE,
}
COMPONENTS_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
SMALL_FILES = (INDEX, "*/*.json", "*/*.txt", "*/*.model")
# Flax's extension types of msgpack.
ARRAY, SCALAR = 1, 3


def is_flax(index: Plain) -> bool:
    """Return whether a model's index is of a Flax pipeline."""
    return str(index.get("_class_name", "")).startswith("Flax")


def convert(folder: Path) -> Path:
    """Return the diffusers folder of a Flax model; made in the user's cache at first.

    Raises:
        InputError: for a file that is missing, or is not what its name says.
    """
    index = read_json(folder / INDEX)
    # Only Stable Diffusion XL has second ones.
    components = [
        name
        for name in (*FLAX_FILES, *COMPONENTS_WITHOUT_WEIGHTS)
        if name in index or not name.endswith("_2")
    ]
    weights = {name: folder / name / FLAX_FILES[name] for name in components if name in FLAX_FILES}
    others = [name for name in components if name in COMPONENTS_WITHOUT_WEIGHTS]
    configs = [folder / name / f"{name.removesuffix('_2')}_config.json" for name in others]
    for path in (*weights.values(), *configs):
        if not path.is_file():
            raise InputError(
                f"{path}: it is not there; a Flax model has it. Is the model's folder complete?"
            )
    target = atomic.user_cache_folder() / f"flax-{digest_model(folder, weights)}"
    if (target / INDEX).is_file():
        return target
    with atomic.write_folder(target, manifest=False) as converted:
        for name, path in weights.items():
            write_component(path, converted / name)
        for name in others:
            shutil.copytree(folder / name, converted / name)
        scheduler = converted / "scheduler" / "scheduler_config.json"
        write_json(scheduler, rename_class(read_json(scheduler)))
        write_json(converted / INDEX, rename_index(index, components))
    return target


def digest_model(folder: Path, weights: dict[str, Path]) -> str:
    """Return a digest of all files that a conversion depends on."""
    files = dict(weights)
    for pattern in SMALL_FILES:
        for path in sorted(folder.glob(pattern)):
            files[path.relative_to(folder).as_posix()] = path
    return atomic.digest_json({name: atomic.digest_file(path) for name, path in files.items()})


def write_json(path: Path, value: Plain) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2))


def rename_class(config: Plain) -> Plain:
    """Return a config under the name of the class that is not Flax's."""
    return config | {"_class_name": str(config.get("_class_name", "")).removeprefix("Flax")}


def rename_index(index: Plain, components: list[str]) -> Plain:
    """Return a model's index with the classes that are not Flax's."""
    renamed: Plain = {"_class_name": rename_class(index)["_class_name"]}
    if "safety_checker" in index:
        renamed["safety_checker"] = [None, None]
    for name, value in index.items():
        if name in components:
            library, class_name = value[0], value[1]
            renamed[name] = [library, str(class_name).removeprefix("Flax")]
        elif name == "force_zeros_for_empty_prompt":
            renamed[name] = value
    return renamed


def write_component(path: Path, target: Path) -> None:
    """Write one component: its config, and its arrays as safetensors, float32."""
    target.mkdir()
    config = read_json(path.parent / "config.json")
    if "_class_name" in config:
        config["_class_name"] = config["_class_name"].removeprefix("Flax")
    if "architectures" in config:
        config["architectures"] = [
            str(name).removeprefix("Flax") for name in config["architectures"]
        ]
    write_json(target / "config.json", config)
    arrays = {}
    for names, array in walk_arrays(read_msgpack(path), ()):
        name, converted = to_torch_array(names, array)
        arrays[name] = converted
    is_text_encoder = path.name == TEXT_FILE
    file_name = "model.safetensors" if is_text_encoder else "diffusion_pytorch_model.safetensors"
    safetensors.write_arrays(target / file_name, arrays)


def read_msgpack(path: Path) -> Plain:
    """Read the nested dictionary of a file.

    Raises:
        InputError: when it is not one of flax's.
    """
    try:
        import msgpack
    except ImportError as error:
        raise InputError(
            f'{path}: reading Flax weights needs msgpack; install it: pip install "limner[jax]"'
        ) from error

    def read_array(code: int, data: bytes) -> np.ndarray:
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        if code not in (ARRAY, SCALAR):
            raise ValueError(f"extension {code}")
        if dtype == b"bfloat16":
            return safetensors.widen_bfloat16(np.frombuffer(buffer, np.uint16)).reshape(shape)
        return np.frombuffer(buffer, np.dtype(dtype.decode())).reshape(shape)

    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            tree = msgpack.unpackb(
                content,
                ext_hook=read_array,
                raw=False,
                strict_map_key=False,
                max_ext_len=1 << 40,
                max_bin_len=1 << 40,
            )
    # A damaged file can break its reader in any way.
    except Exception as error:
        raise InputError(
            f"{path}: not a whole file of Flax weights ({error}). Fetch or copy the model again."
        ) from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a file of Flax weights. Fetch or copy the model again.")
    return tree


def walk_arrays(node: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield every array with the names that lead to it; dictionaries are emptied on the way."""
    if isinstance(node, dict) and "__msgpack_chunked_array__" in node:
        yield names, join_pieces(node)
    elif isinstance(node, dict):
        # Emptied, so that an array's memory is free once it has been converted.
        for name in list(node):
            yield from walk_arrays(node.pop(name), (*names, str(name)))
    else:
        yield names, np.asarray(node)


def join_pieces(node: Plain) -> np.ndarray:
    """Return an array that is stored in pieces."""
    chunks, shape = node["chunks"], node["shape"]
    pieces = [chunks[key].reshape(-1) for key in sorted(chunks, key=int)]
    if isinstance(shape, dict):
        shape = [shape[key] for key in sorted(shape, key=int)]
    return np.concatenate(pieces).reshape(shape)


def to_torch_array(names: tuple[str, ...], array: np.ndarray) -> tuple[str, np.ndarray]:
    """Return an array under torch's name, in torch's layout, float32.

    Kernels [h, w, in, out] become [out, in, h, w], and [in, out] become [out, in].
    """
    *path, last = names
    if last == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
    # Flax writes the number in a list behind an underscore, torch behind a dot.
    numbered = r"^(.*(?:blocks|resnets|attentions|samplers|to_out|net))_(\d+)$"
    parts = [re.sub(numbered, r"\1.\2", name) for name in path]
    return ".".join((*parts, leaf)), np.ascontiguousarray(array, np.float32)
