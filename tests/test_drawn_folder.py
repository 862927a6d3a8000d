"""Folders that no run has made are drawn as they are, or refused, in both engines."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from limner.base_model.open import open_base
from limner.commands.generate import DrawSettings, run_generate
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES

pytestmark = pytest.mark.frameworks
ENGINES = ("torch", "jax")


@pytest.fixture
def copy(sd: Path, tmp_path: Path) -> Path:
    """A tiny Stable Diffusion that a test may change."""
    return shutil.copytree(sd, tmp_path / "copy")


def draw(
    folder: Path, engine: str, size: int | None = 32, prompt: str = "a red circle", **others: Any
) -> np.ndarray:
    """Draw one picture, uint8 [size, size, 3]."""
    settings = DrawSettings(
        steps=2, size=size, engine=engine, precision="no", device="cpu", **others
    )
    [path] = run_generate(str(folder), [prompt], settings, output=folder / engine)
    with Image.open(path) as picture:
        return np.array(picture)


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change what a JSON file holds."""
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_folder_is_drawn_as_by_the_stock_pipeline(copy: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(copy)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    [wanted] = (stock("a red circle", generator=generator, **call).images * 255).round()
    assert np.array_equal(draw(copy, "torch"), wanted)
    assert np.abs(draw(copy, "jax") - wanted).max() <= 1


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
    with pytest.raises(InputError, match="names other files as transformers_weights"):
        draw(copy, engine)
    edit(config, lambda config: config.pop("transformers_weights"))
    config = copy / "tokenizer" / "tokenizer_config.json"
    edit(config, lambda config: config.update(fast_tokenizer_files=["tokenizer.4.0.0.json"]))
    with pytest.raises(InputError, match="names other files as fast_tokenizer_files"):
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


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_that_are_cut_are_named(
    sd: Path, copy: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["circle"] * 100)
    short = draw(copy, engine)
    assert "cut" not in "".join(capsys.readouterr())
    picture = draw(copy, engine, prompt=long, negative_prompt=f"{long} blue")
    said = "".join(capsys.readouterr())
    limit = json.loads((sd / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    assert f"2 prompts are cut, with more than the {limit} tokens" in said
    assert "'circle circle" in said and not np.array_equal(picture, short)
    # What is cut is not drawn, as was said.
    other = draw(copy, engine, prompt=f"{long} yellow", negative_prompt=long)
    assert np.array_equal(other, picture)


@pytest.mark.parametrize(
    ("scale", "negative", "words"),
    [
        (1.0, "blue", "the negative prompt does nothing: with a guidance scale of 1 pictures"),
        (0.5, "blue", "the negative prompt does nothing: with a guidance scale of 0.5 pictures"),
        (0.5, None, "guidance scale: 0.5 draws as 1 does, without guidance"),
        (1.0, None, None),
        (1.5, "blue", None),
        (None, "blue", None),
    ],
)
def test_options_that_do_nothing_are_named(
    copy: Path,
    scale: float | None,
    negative: str | None,
    words: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw(copy, "torch", guidance_scale=scale, negative_prompt=negative)
    said = "".join(capsys.readouterr())
    assert words in said if words else "guidance" not in said


@pytest.mark.parametrize("given", ["/no/such", "some/base"])
def test_a_base_beside_a_whole_model_is_refused(sd: Path, given: str) -> None:
    with pytest.raises(InputError, match="is a whole model, not a LoRA, so that no base goes"):
        run_generate(str(sd), ["a red circle"], DrawSettings(), base=given)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "channels"), [("in_channels", 4), ("out_channels", 1)])
def test_pictures_of_other_channels_are_refused(
    copy: Path, pictures: Path, engine: str, name: str, channels: int
) -> None:
    import torch
    from diffusers import AutoencoderKL

    folder = copy / "vae"
    config = json.loads((folder / "config.json").read_text()) | {name: channels}
    with torch.random.fork_rng(devices=[]):
        AutoencoderKL.from_config(config).save_pretrained(folder)
    message = f"vae: {name} is {channels}; pictures have 3 channels"
    with pytest.raises(InputError, match=message):
        open_base(ModelSettings(str(copy)), FAMILIES["sd"])
    if name == "out_channels":
        with pytest.raises(InputError, match="pictures"):
            draw(copy, engine)
