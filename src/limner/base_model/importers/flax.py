"""Old Flax models, whose weights are in ``*.msgpack`` files: written once as the diffusers folder
that they are, and read as such ever after.

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

from limner.errors import InputError
from limner.storage import atomic, safetensors

NETWORK_FILE, TEXT_FILE = "diffusion_flax_model.msgpack", "flax_model.msgpack"
FLAX_FILES = {
    "unet": NETWORK_FILE,
    "vae": NETWORK_FILE,
    "text_encoder": TEXT_FILE,
    "text_encoder_2": TEXT_FILE,
}  # the second one is Stable Diffusion XL's
COMPONENTS_WITHOUT_WEIGHTS = ("tokenizer", "tokenizer_2", "scheduler")
ARRAY, SCALAR = 1, 3  # msgpack's extension types in flax


def is_flax(index: dict[str, Any]) -> bool:
    """Whether a model's index is of a Flax pipeline."""
    return str(index.get("_class_name", "")).startswith("Flax")


def convert(folder: Path) -> Path:
    """The diffusers folder of a Flax model, made in the user's cache where it is not there yet.

    Raises:
        InputError: for a file that is not what its name says.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    own = [
        name
        for name in (*FLAX_FILES, *COMPONENTS_WITHOUT_WEIGHTS)
        if name in index or not name.endswith("_2")
    ]
    sources = {name: folder / name / FLAX_FILES[name] for name in own if name in FLAX_FILES}
    beside = [name for name in own if name in COMPONENTS_WITHOUT_WEIGHTS]
    for path in (
        *sources.values(),
        *(folder / name / f"{name.removesuffix('_2')}_config.json" for name in beside),
    ):
        if not path.is_file():
            raise InputError(
                f"{path}: it is not there; a Flax model has it. Is the model's folder complete?"
            )
    small = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model")
    around = {
        p.relative_to(folder).as_posix(): p
        for pattern in small
        for p in sorted(folder.glob(pattern))
    }
    digests = {name: atomic.digest_file(path) for name, path in (sources | around).items()}
    target = atomic.user_cache_folder() / f"flax-{atomic.digest_json(digests)}"
    if not (target / "model_index.json").is_file():
        with atomic.write_folder(target, manifest=False) as made:
            for name, path in sources.items():
                write_component(path, made / name)
            for name in beside:
                shutil.copytree(folder / name, made / name)
            scheduler = made / "scheduler" / "scheduler_config.json"
            scheduler.write_text(
                json.dumps(
                    rename_class(json.loads(scheduler.read_text(encoding="utf-8"))), indent=2
                )
            )
            kept = {
                k: rename_pair(v) if k in own else v
                for k, v in index.items()
                if k in (*own, "force_zeros_for_empty_prompt")
            }
            unchecked = {"safety_checker": [None, None]} if "safety_checker" in index else {}
            (made / "model_index.json").write_text(
                json.dumps(
                    {"_class_name": rename_class(index)["_class_name"]} | unchecked | kept, indent=2
                )
            )
    return target


def rename_class(config: dict[str, Any]) -> dict[str, Any]:
    """A config under the name of the class that is not Flax's."""
    return config | {"_class_name": str(config.get("_class_name", "")).removeprefix("Flax")}


def rename_pair(value: Any) -> Any:
    """(library, class) without Flax."""
    return [value[0], str(value[1]).removeprefix("Flax")]


def write_component(path: Path, target: Path) -> None:
    """One component: its config, and its arrays as safetensors, float32."""
    target.mkdir()
    known = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    text = path.name == TEXT_FILE
    if "_class_name" in known:
        known["_class_name"] = known["_class_name"].removeprefix("Flax")
    if "architectures" in known:
        known["architectures"] = [str(name).removeprefix("Flax") for name in known["architectures"]]
    (target / "config.json").write_text(json.dumps(known, indent=2))
    arrays = dict(
        to_torch_array(name, array) for name, array in walk_arrays(read_msgpack(path), ())
    )
    safetensors.write_arrays(
        target / ("model.safetensors" if text else "diffusion_pytorch_model.safetensors"), arrays
    )


def read_msgpack(path: Path) -> dict[str, Any]:
    """The nested dictionary of a file.

    Raises:
        InputError: when it is not one of flax's.
    """
    try:
        import msgpack
    except ImportError as error:
        raise InputError(
            f'{path}: reading Flax weights needs msgpack; install it: pip install "limner[jax]"'
        ) from error

    def array(code: int, data: bytes) -> Any:
        shape, kind, buffer = msgpack.unpackb(data, raw=True)
        if code not in (ARRAY, SCALAR):
            raise ValueError(f"extension {code}")
        if kind == b"bfloat16":
            return (
                (np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16)
                .view(np.float32)
                .reshape(shape)
            )
        return np.frombuffer(buffer, np.dtype(kind.decode())).reshape(shape)

    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = msgpack.unpackb(
                content,
                ext_hook=array,
                raw=False,
                strict_map_key=False,
                max_ext_len=1 << 40,
                max_bin_len=1 << 40,
            )
    except Exception as error:
        raise InputError(
            f"{path}: not a whole file of Flax weights ({error}). Fetch or copy the model again."
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a file of Flax weights. Fetch or copy the model again.")
    return found


def walk_arrays(node: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Every array with the names that lead to it; a node that has been walked through is empty, so
    that no more than what is used is held."""
    if isinstance(node, dict) and "__msgpack_chunked_array__" in node:
        pieces = [node["chunks"][key] for key in sorted(node["chunks"], key=int)]
        shape = (
            [node["shape"][key] for key in sorted(node["shape"], key=int)]
            if isinstance(node["shape"], dict)
            else node["shape"]
        )
        yield names, np.concatenate([piece.reshape(-1) for piece in pieces]).reshape(shape)
    elif isinstance(node, dict):
        for name in list(node):
            yield from walk_arrays(node.pop(name), (*names, str(name)))
    else:
        yield names, np.asarray(node)


def to_torch_array(names: tuple[str, ...], array: np.ndarray) -> tuple[str, np.ndarray]:
    """An array under torch's name, in torch's layout, float32: kernels [h, w, in, out] as [out, in,
    h, w], [in, out] as [out, in]."""
    *path, last = names
    if last == "kernel":
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
    spelt = [
        re.sub(r"^(.*(?:blocks|resnets|attentions|samplers|to_out|net))_(\d+)$", r"\1.\2", name)
        for name in path
    ]
    return ".".join((*spelt, leaf)), np.ascontiguousarray(array, np.float32)
