"""Networks of classes that no family has are compared with their configs too, before pictures are
drawn with them."""

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

from limner.commands.generate import DrawSettings, run_generate
from limner.errors import InputError
from limner.json_types import Plain

pytestmark = pytest.mark.frameworks
SIZE = 32  # pixels a side


@pytest.fixture(scope="module")
def pipelines(sd: Path, sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A FLUX.1 and a PixArt, on text encoders and an autoencoder of the tiny bases."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
        PixArtAlphaPipeline,
        PixArtTransformer2DModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

    folder = tmp_path_factory.mktemp("pipelines")
    vae = AutoencoderKL.from_pretrained(sd3 / "vae")
    t5 = T5EncoderModel.from_pretrained(sd3 / "text_encoder_3")
    letters = T5Tokenizer.from_pretrained(sd3 / "tokenizer_3")
    clip = CLIPTextModel.from_pretrained(sd / "text_encoder")
    channels, width = vae.config.latent_channels, clip.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flux = FluxTransformer2DModel(
            in_channels=4 * channels,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=t5.config.d_model,
            pooled_projection_dim=width,
            axes_dims_rope=(4, 4, 8),
        )
        pixart = PixArtTransformer2DModel(
            in_channels=channels,
            out_channels=2 * channels,
            num_layers=2,
            sample_size=32,  # of its latents; the pipeline knows 32, 64 and 128
            attention_head_dim=8,
            num_attention_heads=4,
            cross_attention_dim=32,
            caption_channels=t5.config.d_model,
        )
    FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        clip,
        CLIPTokenizer.from_pretrained(sd / "tokenizer"),
        t5,
        letters,
        flux,
    ).save_pretrained(folder / "flux")
    PixArtAlphaPipeline(letters, t5, vae, pixart, DPMSolverMultistepScheduler()).save_pretrained(
        folder / "pixart"
    )
    return {name: folder / name for name in ("flux", "pixart")}


def draw(folder: Path, output: Path) -> list[Path]:
    settings = DrawSettings(steps=2, size=SIZE, precision="no", device="cpu")
    return run_generate(str(folder), ["a red circle"], settings, output=output)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = load_file(file)
    change(arrays)
    save_file(arrays, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_pictures_are_drawn(
    pipelines: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = draw(pipelines[name], tmp_path)
    with Image.open(path) as picture:
        assert picture.size == (SIZE, SIZE)
    assert "compared" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux", {"num_single_layers": 1}, "14 arrays have no place in the model: single_tr"),
        ("flux", {"num_layers": 2}, "arrays are missing: transformer_blocks.1"),
        ("flux", {"in_channels": 16}, "x_embedder.weight is [32, 32], [32, 16] is expected"),
        ("flux", {"num_layers": 10**9}, "num_layers is 1000000000, and the weights are"),
        ("flux", {"num_layers": "two"}, "num_layers is 'two', something like 19 is expected"),
        ("pixart", {"num_layers": 1}, "arrays have no place in the model: transformer_blocks.1"),
        ("pixart", {"caption_channels": 4}, "caption_projection.linear_1.weight is [32, 48]"),
    ],
)
def test_another_config_is_refused(
    pipelines: dict[str, Path], tmp_path: Path, name: str, changes: Plain, message: str
) -> None:
    folder = Path(shutil.copytree(pipelines[name], tmp_path / "model"))
    edit(folder / "transformer" / "config.json", **changes)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        draw(folder, tmp_path / "out")
    assert f"{folder / 'transformer'}" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_an_array_that_is_missing_is_named(
    pipelines: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """diffusers would fill it with random numbers, and draw."""
    folder = Path(shutil.copytree(pipelines[name], tmp_path / "model"))
    [file] = (folder / "transformer").glob("*.safetensors")
    rewrite(file, lambda arrays: arrays.update(proj_ex=arrays.pop("proj_out.bias")))
    with pytest.raises(InputError, match=r"1 array is missing: proj_out\.bias; 1 array has no"):
        draw(folder, tmp_path / "out")


def test_what_is_quantized_is_not_compared_and_that_is_said(
    pipelines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(pipelines["flux"], tmp_path / "model"))
    edit(folder / "transformer" / "config.json", quantization_config={"quant_method": "none"})
    with pytest.raises(InputError, match="quant"):
        draw(folder, tmp_path / "out")
    said = capsys.readouterr()
    assert f"{folder / 'transformer'}: it is quantized: its arrays are not compared" in "".join(
        said
    )


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
}
ROPE = {"mrope_section": [1, 1, 0], "rope_theta": 1e4, "rope_type": "default"}
VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 40}
# Text encoders of pipelines; the third is saved under other names than it has, the fourth has
# arrays of which several become one.
TEXT_ENCODERS: dict[str, Plain] = {
    "Gemma2Model": TEXT,
    "Qwen3ForCausalLM": {**TEXT, "tie_word_embeddings": True},
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {**VISION, "out_hidden_size": 16},
    },
    "MixtralForCausalLM": {**TEXT, "num_local_experts": 2},
    "UMT5EncoderModel": T5,
    "BertModel": {name: TEXT[name] for name in list(TEXT)[:4]} | {"vocab_size": 40},
}


def save_text_encoder(class_name: str, folder: Path) -> Path:
    """Save one with random weights; return its file of weights."""
    import transformers

    cls: Any = getattr(transformers, class_name)
    cls(cls.config_class(**TEXT_ENCODERS[class_name])).save_pretrained(folder)
    return folder / "model.safetensors"


def compare(folder: Path, class_name: str) -> None:
    from limner.engines.torch.weights import check_component

    check_component(folder, "transformers", class_name, None)


@pytest.mark.parametrize("class_name", TEXT_ENCODERS)
def test_text_encoders_are_compared_as_transformers_reads_them(
    class_name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = save_text_encoder(class_name, tmp_path)
    capfd.readouterr()
    compare(tmp_path, class_name)
    good = file.read_bytes()
    [*_, name] = (
        one
        for one in load_file(file)
        if re.search(r"(down_proj|wi_0|dense)\.w", one)
        or (re.search(r"w2\.w", one) and "Mixtral" in class_name)
    )
    rewrite(file, lambda arrays: arrays.update({f"{name}.s": arrays.pop(name)}))
    with pytest.raises(InputError, match=r"missing|expected|conversion"):
        compare(tmp_path, class_name)
    file.write_bytes(good)
    rewrite(file, lambda arrays: arrays.update({name: arrays[name][:, :-1].copy()}))
    with pytest.raises(InputError, match=r"1 array does not fit its config: .* is \[|conversion"):
        compare(tmp_path, class_name)
    file.write_bytes(good)
    rewrite(file, lambda arrays: arrays.update({f"head_of_its_own.{name}": arrays[name]}))
    compare(tmp_path, class_name)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "11 arrays have no place in the model: layers.1."),
        ({"num_hidden_layers": 3}, "11 arrays are missing: layers.2."),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, and the weights are"),
        ({"vocab_size": 41}, "embed_tokens.weight is [40, 16], [41, 16] is expected"),
        ({"hidden_size": "wide"}, "no Gemma2Model can be made of it"),
    ],
)
def test_text_encoders_of_another_config_are_refused(
    changes: Plain, message: str, tmp_path: Path
) -> None:
    save_text_encoder("Gemma2Model", tmp_path)
    edit(tmp_path / "config.json", layer_types=None, **changes)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        compare(tmp_path, "Gemma2Model")
    assert "\n" not in str(caught.value)


def test_other_types_and_prefixes_are_said(tmp_path: Path) -> None:
    file, name = save_text_encoder("Gemma2Model", tmp_path), "layers.0.mlp.up_proj.weight"
    good = file.read_bytes()
    rewrite(file, lambda arrays: arrays.update({name: arrays[name].astype(np.int8)}))
    with pytest.raises(InputError, match=rf"no number of F64, F32, F16, BF16: {name} is I8"):
        compare(tmp_path, "Gemma2Model")
    file.write_bytes(good)
    arrays = {f"wrapped.{name}": array for name, array in load_file(file).items()}
    save_file(arrays, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"Every name begins with 'wrapped\.'"):
        compare(tmp_path, "Gemma2Model")


def test_a_class_that_a_pipeline_alone_has(tmp_path: Path) -> None:
    from diffusers.pipelines.deepfloyd_if.watermark import IFWatermarker

    from limner.engines.torch.weights import check_component

    IFWatermarker().save_pretrained(tmp_path)
    check_component(tmp_path, "deepfloyd_if", "IFWatermarker", None)
    for library, class_name in (
        ("deepfloyd_if", "Nothing"),
        ("nowhere", "IFWatermarker"),
        ("DiffusionPipeline", "download"),
    ):
        with pytest.raises(InputError, match=f"{library}.{class_name}: there is no such class"):
            check_component(tmp_path, library, class_name, None)


def test_whole_numbers_of_a_network_may_be_whole(tmp_path: Path) -> None:
    """The count of batches of FLUX.2's autoencoder."""
    from diffusers import AutoencoderKLFlux2

    from limner.engines.torch.weights import check_component

    small: Any = {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
    }
    AutoencoderKLFlux2(**small).save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    assert load_file(file)["bn.num_batches_tracked"].dtype == np.int64
    check_component(tmp_path, "diffusers", "AutoencoderKLFlux2", None)
    edit(tmp_path / "config.json", layers_per_block=2)
    with pytest.raises(InputError, match="arrays are missing"):
        check_component(tmp_path, "diffusers", "AutoencoderKLFlux2", None)
