"""Which files of a component are its weights: those that the stock libraries read, and no other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import limner
from limner import engines
from limner.base_model.base import BaseModel
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES
from limner.training.result import copy_component

pytestmark = pytest.mark.frameworks
SD = FAMILIES["sd"]
ENCODER = "text_encoder/model.safetensors"


@pytest.fixture
def mine(sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd, tmp_path / "base"))


def open_checked(folder: Path, kind: str = "torch") -> BaseModel:
    base = open_base(ModelSettings(str(folder)), SD)
    engines.check_base(kind, base, SD)
    return base


def draw(folder: Path, kind: str = "torch") -> list[Path]:
    settings = {"engine": kind, "steps": 1, "device": "cpu"}
    return limner.generate(str(folder), ["a circle"], output=folder / "pictures", **settings)


def name_by_index(folder: Path, arrays: dict[str, np.ndarray], stem: str) -> None:
    """Put arrays into files of names of their own, which an index names."""
    (folder / f"{stem}.safetensors").unlink()
    names = sorted(arrays)
    halves = {"part-a.safetensors": names[::2], "part-b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: arrays[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {one: f for f, part in halves.items() for one in part}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["torch", pytest.param("jax", marks=pytest.mark.soak)])
def test_an_index_may_name_any_files(mine: Path, tmp_path: Path, kind: str) -> None:
    arrays = load_file(mine / ENCODER)
    name_by_index(mine / "text_encoder", arrays, "model")
    base = open_checked(mine, kind)
    assert [one.name for one in base.weight_files("text_encoder")] == [
        "part-a.safetensors",
        "part-b.safetensors",
    ]
    (tmp_path / "copy").mkdir()
    copy_component(base, "text_encoder", tmp_path / "copy")
    [path] = draw(mine, kind)
    picture = path.read_bytes()
    shutil.rmtree(mine / "text_encoder")
    shutil.move(tmp_path / "copy", mine / "text_encoder")
    assert draw(mine, kind)[0].read_bytes() == picture


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_nothing_is_drawn_with_arrays_that_no_file_has(mine: Path, component: str) -> None:
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    arrays = load_file(mine / component / f"{stem}.safetensors")
    arrays.pop(sorted(arrays)[0])
    name_by_index(mine / component, arrays, stem)
    for refused in (open_checked, draw):
        with pytest.raises(InputError, match="array is missing"):
            refused(mine)


@pytest.mark.parametrize("name", ["../x.safetensors", "x.bin", ""])
def test_an_index_names_safetensors_files_beside_it(mine: Path, name: str) -> None:
    (mine / ENCODER).unlink()
    index = mine / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name} if name else {}}))
    for refused in (open_checked, draw):
        with pytest.raises(InputError, match="it names"):
            refused(mine)


def test_a_quantization_that_is_null_is_none(mine: Path) -> None:
    arrays = load_file(mine / ENCODER)
    arrays.pop(sorted(arrays)[0])
    save_file(arrays, mine / ENCODER, {"format": "pt"})
    config = mine / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    with pytest.raises(InputError, match="array is missing"):
        draw(mine)


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_a_library_reads_files_of_its_own_names(mine: Path, kind: str) -> None:
    known, picture = open_checked(mine, kind).fingerprint(*SD.components), draw(mine, kind)[0]
    expected = picture.read_bytes()
    other = {name: array * 0.5 for name, array in load_file(mine / ENCODER).items()}
    save_file(other, mine / "text_encoder" / "diffusion_pytorch_model.safetensors")
    base = open_checked(mine, kind)
    assert [one.name for one in base.weight_files("text_encoder")] == ["model.safetensors"]
    assert base.fingerprint(*SD.components) == known
    assert draw(mine, kind)[0].read_bytes() == expected
    (mine / ENCODER).unlink()
    for refused in (open_checked, draw):
        with pytest.raises(InputError, match=r"transformers reads model\.safetensors"):
            refused(mine, kind)
