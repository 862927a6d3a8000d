"""Models that only have Flax weights are read as what they are."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from limner import config
from limner.base import open_base
from limner.families import FAMILIES
from limner.faults import InputFault

msgpack = pytest.importorskip("msgpack")
PIECE = 10_000  # numbers, so that some arrays come in several


def packed(array: np.ndarray) -> Any:
    """An array as flax's serialization has it."""

    def one(part: np.ndarray) -> Any:
        return msgpack.ExtType(1, msgpack.packb((part.shape, part.dtype.name, part.tobytes()), use_bin_type=True))

    if array.size <= PIECE:
        return one(array)
    flat = array.reshape(-1)
    chunks = {str(i): one(flat[start : start + PIECE]) for i, start in enumerate(range(0, flat.size, PIECE))}
    return {"__msgpack_chunked_array__": True, "shape": {str(i): n for i, n in enumerate(array.shape)}, "chunks": chunks}


def flax_name(name: str, array: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Where Flax's classes keep a torch array, and how it lies there."""
    *path, last = re.sub(r"\.(\d+)(?=\.)", r"_\1", name).split(".")
    if "layers_" in name.replace(".layers.", ".layers_"):
        path = [part for piece in path for part in (piece.split("_") if re.fullmatch(r"layers_\d+", piece) else [piece])]
    if last == "weight" and array.ndim == 1:
        last = "scale"
    elif "embedding" in path[-1] and path[-1].endswith("_embedding") and "time" not in path[-1]:
        last = "embedding"
    elif last == "weight":
        last, array = "kernel", array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return [*path, last], array


def as_flax(base: Path, target: Path) -> Path:
    """The tiny model as a Flax repository would hold it."""
    shutil.copytree(base, target)
    for component, file in (("unet", "diffusion_flax_model"), ("vae", "diffusion_flax_model"), ("text_encoder", "flax_model")):
        [weights] = (target / component).glob("*.safetensors")
        tree: dict[str, Any] = {}
        for name, array in load_file(weights).items():
            prefix = "text_model." if component == "text_encoder" and not name.startswith("text_model.") else ""
            path, array = flax_name(prefix + name, array)
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = packed(np.ascontiguousarray(array))
        weights.unlink()
        (target / component / f"{file}.msgpack").write_bytes(msgpack.packb(tree))
        known = json.loads((target / component / "config.json").read_text())
        known = {k: f"Flax{v}" if k == "_class_name" else v for k, v in known.items()}
        (target / component / "config.json").write_text(json.dumps(known))
    index = json.loads((target / "model_index.json").read_text())
    classes = {"unet": "FlaxUNet2DConditionModel", "vae": "FlaxAutoencoderKL", "text_encoder": "FlaxCLIPTextModel", "scheduler": "FlaxPNDMScheduler"}
    index |= {"_class_name": "FlaxStableDiffusionPipeline"} | {name: [index[name][0], kind] for name, kind in classes.items()}
    index["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_a_flax_model_has_the_arrays_of_its_twin(base: Path, tmp_path: Path) -> None:
    """In both engines' eyes; large arrays in pieces; converted once."""
    from limner.engines.torch.parts import load

    family = FAMILIES["sd"]
    plain = open_base(config.Model(base=str(base)), family)
    found = open_base(config.Model(base=str(as_flax(base, tmp_path / "flax"))), family)
    assert found.configs["model_index"]["_class_name"] == "StableDiffusionPipeline"
    for component in ("unet", "vae", "text_encoder"):
        ours, theirs = (dict(load(one, component).named_parameters()) for one in (found, plain))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(p.detach().numpy(), theirs[name].detach().numpy()) for name, p in ours.items())
    jax_weights = pytest.importorskip("limner.engines.jax.weights")
    for component in ("unet", "vae", "text_encoder"):
        a, b = (jax_weights.read(one, component) for one in (found, plain))
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    changed = found.weight_files("unet")[0].stat().st_mtime_ns
    again = open_base(config.Model(base=str(tmp_path / "flax")), family)
    assert again.folder == found.folder and again.weight_files("unet")[0].stat().st_mtime_ns == changed


def test_damaged_flax_weights_are_named(base: Path, tmp_path: Path) -> None:
    folder = as_flax(base, tmp_path / "flax")
    path = folder / "vae" / "diffusion_flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputFault, match=r"diffusion_flax_model\.msgpack: not a whole file of Flax weights"):
        open_base(config.Model(base=str(folder)), FAMILIES["sd"])
    path.unlink()
    with pytest.raises(InputFault, match=r"diffusion_flax_model\.msgpack: it is not there; a Flax model has it"):
        open_base(config.Model(base=str(folder)), FAMILIES["sd"])
