"""Without an engine, a base is compared with the arrays of published models, kept as data."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny

import limner
from limner import cli, engines
from limner.base_model.base import BaseModel
from limner.base_model.comparison import ExpectedArrays
from limner.base_model.published_shapes import TABLE, find_expected, read_table
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.published import load_published
from limner.protocols import BaseConfigs

SD = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def find_config(class_name: str) -> dict[str, Any]:
    """The settings of the table's first entry of a class."""
    entry = next(one for one in read_table() if one["class"] == class_name)
    return {name: value for name, (value, _) in entry["settings"].items()}


def write_header(folder: Path, shapes: dict[str, Any], name: str) -> None:
    """Write a weight file as long as it says, with nothing in it: it takes no room on disk."""
    end, header = 0, {}
    for array, shape in shapes.items():
        count = 2
        for side in shape:
            count *= side
        header[array] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_base(folder: Path) -> BaseModel:
    """Stable Diffusion 1.5 as far as headers go, under the names that it was published with."""
    configs = {name: find_config(class_name) for name, class_name in SD.items()}
    for name, class_name in SD.items():
        expected = find_expected(class_name, configs[name])
        assert expected is not None
        prefix = "text_model." if name == "text_encoder" else ""
        shapes = {f"{prefix}{array}": shape for array, shape in expected.shapes.items()}
        if prefix:
            shapes["text_model.embeddings.position_ids"] = (1, 77)
        stem = "model" if prefix else "diffusion_pytorch_model"
        write_header(folder / name, shapes, f"{stem}.safetensors")
    index = {name: ["", class_name] for name, class_name in SD.items()}
    return BaseModel(folder, {}, "unet", "sd", None, None, BaseConfigs(index, configs))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda kind: False)


def test_headers_of_a_published_model(tmp_path: Path, nothing_installed: None) -> None:
    base, told = write_base(tmp_path), []
    engines.check_base("torch", base, FAMILIES["sd"], told.append)
    assert told == [
        "not checked, as engine.kind='torch' is not installed: the tokenizers, and captions "
        "against their limits"
    ]
    shapes = dict(find_expected(SD["vae"], base.configs["vae"]).shapes)  # type: ignore[union-attr]
    name = "diffusion_pytorch_model.safetensors"
    del shapes["encoder.conv_in.bias"]
    write_header(tmp_path / "vae", shapes, name)
    with pytest.raises(InputError, match=r"vae: 1 array is missing: encoder\.conv_in\.bias"):
        engines.check_base("torch", base, FAMILIES["sd"], told.append)
    shapes["encoder.conv_in.bias"] = (127,)
    write_header(tmp_path / "vae", shapes, name)
    with pytest.raises(InputError, match=r"conv_in\.bias is \[127\], \[128\] is expected"):
        engines.check_base("torch", base, FAMILIES["sd"], told.append)
    write_header(tmp_path / "vae", {f"module.{one}": shapes[one] for one in shapes}, name)
    with pytest.raises(InputError, match=r"Every name begins with 'module\.'"):
        engines.check_base("torch", base, FAMILIES["sd"], told.append)


def test_what_is_built_otherwise_is_named(tmp_path: Path, nothing_installed: None) -> None:
    base, told = write_base(tmp_path), []
    base.configs["vae"]["layers_per_block"] = 3
    engines.check_base("jax", base, FAMILIES["sd"], told.append)
    assert "engine.kind='jax' is not installed: the weights of vae with their configs," in told[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_trained_network_is_in_the_table(family: str) -> None:
    configs = load_published(family)
    assert configs is not None
    network = FAMILIES[family].network.component
    expected = find_expected(configs[network]["_class_name"], configs[network])
    assert isinstance(expected, ExpectedArrays) and len(expected.shapes) > 200
    assert TABLE.stat().st_size < 10_000


def test_data_and_base_are_checked_without_an_engine(
    pictures_without_framework: Path,
    tmp_path: Path,
    nothing_installed: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(limner.__file__).parent / "bundled" / "model"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'run = "{tmp_path / "run"}"\nmodel.base = "{base}"\n[data]\nsize = 64\n'
        f'folder = "{pictures_without_framework}"\n[train]\nsteps = 1\nbatch_size = 2\n'
    )
    assert cli.main(["check", str(recipe)]) == 0
    out = "".join(capsys.readouterr())
    assert out.count("not checked, as engine.kind='torch' is not installed") == 1
    assert "4 listed, 4 good, 0 bad" in out and "tokens, median" not in out


@pytest.fixture
def pictures_without_framework(tmp_path: Path) -> Path:
    return tiny.pictures(tmp_path / "discs", 4)


@pytest.mark.frameworks
def test_the_table_is_what_the_classes_have() -> None:
    from published_shapes import make_table

    assert read_table() == make_table()
