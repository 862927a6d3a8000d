"""Folders that no run has made are drawn as they are, or refused, in both engines."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from limner.commands.generate import DrawSettings, run_generate
from limner.errors import InputError

pytestmark = pytest.mark.frameworks
ENGINES = ("torch", "jax")


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    """A tiny Stable Diffusion that a test may change."""
    return shutil.copytree(sd, tmp_path / "copy")


def draw(folder: Path, engine: str, size: int | None = 32) -> np.ndarray:
    """Draw one picture, uint8 [size, size, 3]."""
    settings = DrawSettings(steps=2, size=size, engine=engine, precision="no", device="cpu")
    [path] = run_generate(str(folder), ["a red circle"], settings, output=folder / engine)
    with Image.open(path) as picture:
        return np.array(picture)


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change what a JSON file holds."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", [None, "missing", 1e30, 20.0, 2, 10**6])
def test_a_length_that_the_text_encoder_lacks(copy: Path, engine: str, length: object) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    if length == "missing":
        edit(path, lambda config: config.pop("model_max_length"))
    else:
        edit(path, lambda config: config.update(model_max_length=length))
    with pytest.raises(InputError, match=r"tokenizer: .*model_max_length is "):
        draw(copy, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_size_that_nobody_states(copy: Path, engine: str) -> None:
    edit(copy / "unet" / "config.json", lambda config: config.update(sample_size=None))
    with pytest.raises(InputError, match=r"sample_size is null\); give --size"):
        draw(copy, engine, size=None)
    assert draw(copy, engine).shape == (32, 32, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_a_variant_alone(
    copy: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = draw(copy, engine)
    for path in copy.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    capsys.readouterr()
    assert np.array_equal(draw(copy, engine), plain)
    assert "weights of variant 'fp16' only: it is drawn" in "".join(capsys.readouterr())


def test_a_component_without_its_folder(copy: Path) -> None:
    pair = ["transformers", "CLIPVisionModelWithProjection"]
    edit(copy / "model_index.json", lambda index: index.update(image_encoder=pair))
    with pytest.raises(InputError, match=r"image_encoder: it is named in model_index\.json"):
        draw(copy, "torch")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_component_that_transformers_reads_from_elsewhere(copy: Path, engine: str) -> None:
    adapter = copy / "text_encoder" / "adapter_config.json"
    adapter.write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    with pytest.raises(
        InputError, match=r"adapter_config\.json: transformers would put an adapter"
    ):
        draw(copy, engine)
    adapter.unlink()
    config = copy / "text_encoder" / "config.json"
    edit(config, lambda config: config.update(transformers_weights="other.safetensors"))
    with pytest.raises(InputError, match="names a file of weights as transformers_weights"):
        draw(copy, engine)


def test_what_a_stock_pipeline_cannot_draw_is_one_message(sd3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd3, tmp_path / "copy")
    edit(folder / "vae" / "config.json", lambda config: config.update(shift_factor=None))
    message = "StableDiffusion3Pipeline: it cannot draw with these components: TypeError: "
    with pytest.raises(InputError, match=re.escape(message)):
        draw(folder, "torch")


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_that_are_not_finite_are_named(
    copy: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(file)
    arrays["decoder.conv_out.bias"][0] = np.nan  # red
    save_file(arrays, file, {"format": "pt"})
    picture = draw(copy, engine)
    assert (picture[..., 0] == 0).all() and (picture[..., 1] > 0).any()
    said = "".join(capsys.readouterr())
    assert "1 of 1 pictures has black places" in said
    assert "not finite: 'a red circle' (seed 0)" in said
