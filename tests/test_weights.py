"""What a base's files hold is what its configs say, in both engines, or one message names it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limner import engines
from limner.base_model.comparison import check_counts
from limner.base_model.open import open_base
from limner.commands.generate import DrawSettings, run_generate
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES

pytestmark = pytest.mark.frameworks
NETWORK = "diffusion_pytorch_model"
TEXT, UNET, VAE = "text_encoder/model", f"unet/{NETWORK}", f"vae/{NETWORK}"
LAYER = "encoder.layers.1.mlp.fc2.weight"
Change = Callable[[dict[str, np.ndarray]], object]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(base: Path, file: str, change: Change) -> None:
    """Change the arrays of one file of a base."""
    path = base / f"{file}.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, {"format": "pt"})


def drop(name: str) -> Change:
    return lambda arrays: arrays.pop(name)


def rename(rule: Callable[[str], str]) -> Change:
    def change(arrays: dict[str, np.ndarray]) -> None:
        renamed = {rule(name): array for name, array in arrays.items()}
        arrays.clear()
        arrays.update(renamed)

    return change


def replace(name: str, of: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(of(arrays[name]))})


def compare(base: Path, kind: str, family: str = "sd", **settings: Any) -> None:
    """What every command does with a base before it reads a weight."""
    model = ModelSettings(str(base), family, **settings)
    opened = open_base(model, FAMILIES[family], for_generation=False)
    engines.check_base(kind, opened, FAMILIES[family])


def refusal(base: Path, kind: str = "torch", family: str = "sd", **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        compare(base, kind, family, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


OTHER_ARRAYS = {
    "one is missing": (TEXT, drop(LAYER), "1 array is missing", LAYER),
    "a layer is missing": (
        TEXT,
        lambda arrays: [arrays.pop(name) for name in list(arrays) if "layers.1." in name],
        "16 arrays are missing",
        "encoder.layers.1.layer_norm1.bias",
    ),
    "wrapped": (TEXT, rename("module.{}".format), "Every name begins with 'module.'", "missing"),
    "compiled": (UNET, rename("_orig_mod.{}".format), "begins with '_orig_mod.'", "208 arrays"),
    "one is renamed": (
        VAE,
        rename(lambda name: name.replace("encoder.conv_in.bias", "encoder.conv_in.offset")),
        "1 array is missing: encoder.conv_in.bias",
        "1 array has no place in the model: encoder.conv_in.offset",
    ),
    "one too many": (
        UNET,
        lambda arrays: arrays.update(more=np.zeros(3, np.float32)),
        "1 array has no place in the model: more",
        "unet",
    ),
    "transposed": (
        UNET,
        replace("time_embedding.linear_1.weight", np.transpose),
        "time_embedding.linear_1.weight is [32, 128], [128, 32] is expected",
        "1 array does not fit its config",
    ),
    "one axis more": (
        UNET,
        replace("conv_in.bias", lambda array: array[None]),
        "conv_in.bias is [1, 32], [32] is expected",
        "unet",
    ),
    "whole numbers": (
        TEXT,
        replace(LAYER, lambda array: array.astype(np.int32)),
        f"{LAYER} is I32",
        "no number of F64, F32, F16, BF16",
    ),
    "of the vision half": (TEXT, rename("vision_model.{}".format), "36 arrays", "no place"),
    "nothing": (VAE, dict.clear, "124 arrays are missing", "vae"),
}


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("name", OTHER_ARRAYS)
def test_other_arrays_are_refused(sd: Path, tmp_path: Path, name: str, kind: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    compare(base, kind)
    file, change, first, second = OTHER_ARRAYS[name]
    rewrite(base, file, change)
    message = refusal(base, kind)
    # The JAX engine's names have the prefix that published files have.
    message = message.replace("text_model.", "")
    assert first in message and second in message and f"{base / file}".rsplit("/", 1)[0] in message


def test_layers_of_a_part_of_a_config_are_counted() -> None:
    config = {"vision_config": {"num_hidden_layers": 10**7}, "text_config": {}}
    with pytest.raises(InputError, match="num_hidden_layers is 10000000, and the weights are 396"):
        check_counts(Path("config.json"), config, 396)


OTHER_CONFIGS = {
    "fewer layers": ("text_encoder", {"num_hidden_layers": 1}, "16 arrays have no place"),
    "more layers": ("text_encoder", {"num_hidden_layers": 3}, "16 arrays are missing"),
    "negative layers": ("text_encoder", {"num_hidden_layers": -1}, "32 arrays have no place|is -1"),
    "wider": ("text_encoder", {"intermediate_size": 65}, "fc1.weight is [64, 32], [65, 32]"),
    "a billion layers": ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000"),
    "many blocks": ("unet", {"layers_per_block": 100_000}, "layers_per_block is 100000"),
    "a text": ("unet", {"block_out_channels": "abc"}, "can be made of it|is 'abc'"),
    "no heads": ("text_encoder", {"num_attention_heads": 0}, "can be made of it|heads"),
    "no groups": ("vae", {"norm_num_groups": 0}, "can be made of it|norm_num_groups is 0"),
    "huge": ("unet", {"block_out_channels": [10**30, 64]}, "can be made of it|do not fit"),
    "a list": ("vae", {"layers_per_block": [1, [2]]}, "can be made of it"),
}


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_other_configs_are_refused(sd: Path, tmp_path: Path, name: str, kind: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    component, changes, words = OTHER_CONFIGS[name]
    edit(base / component / "config.json", **changes)
    assert re.search(words.replace("[", r"\["), refusal(base, kind))


@pytest.mark.parametrize(
    ("family", "component", "file"),
    [
        ("sdxl", "text_encoder_2", "model"),
        ("sd3", "text_encoder_3", "model"),
        ("sd3", "transformer", NETWORK),
        ("kandinsky22-prior", "image_encoder", "model"),
        ("kandinsky22-prior", "prior", NETWORK),
        ("kandinsky22-decoder", "movq", NETWORK),
    ],
)
def test_every_family_and_component(
    family: str, component: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, _, stage = family.partition("22-")
    source = request.getfixturevalue(name)
    base = Path(shutil.copytree(source, tmp_path / "base")) / stage
    settings = {"other_stage": str(base.parent / "prior")} if stage == "decoder" else {}
    compare(base, "torch", family, **settings)
    # Not the statistics of a prior, which are read first, nor T5's tied embedding.
    place = 0 if family == "sd3" else -1
    rewrite(base, f"{component}/{file}", lambda arrays: arrays.pop(sorted(arrays)[place]))
    message = refusal(base, "torch", family, **settings)
    assert "1 array is missing" in message and f"{base / component}" in message
    if family == "sdxl":
        assert "1 array is missing" in refusal(base, "jax", family)


def test_the_other_stage_is_compared(kandinsky: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(kandinsky, tmp_path / "both"))
    rewrite(both, "prior/image_encoder/model", rename("module.{}".format))
    message = refusal(
        both / "decoder", "torch", "kandinsky22-decoder", other_stage=str(both / "prior")
    )
    assert "prior/image_encoder" in message and "'module.'" in message


KNOWN_NAMES = {
    "with text_model.": (TEXT, rename("text_model.{}".format)),
    "positions": (
        TEXT,
        lambda arrays: arrays.update({"embeddings.position_ids": np.arange(77)[None]}),
    ),
    "old attention": (
        VAE,
        rename(
            lambda name: (
                name.replace("attentions.0.to_q", "attentions.0.query")
                .replace("attentions.0.to_k", "attentions.0.key")
                .replace("attentions.0.to_v", "attentions.0.value")
                .replace("attentions.0.to_out.0", "attentions.0.proj_attn")
            )
        ),
    ),
    "halves": (
        UNET,
        lambda arrays: arrays.update(
            {name: array.astype(np.float16) for name, array in arrays.items()}
        ),
    ),
}


@pytest.mark.parametrize("name", KNOWN_NAMES)
def test_published_names_are_those_of_the_stock_libraries(
    sd: Path, tmp_path: Path, name: str
) -> None:
    """What the comparison lets pass, the libraries load whole: nothing missing, same numbers."""
    import torch

    from limner.engines.jax.weights import read_component
    from limner.engines.torch.weights import load_component

    base = Path(shutil.copytree(sd, tmp_path / "base"))
    file, change = KNOWN_NAMES[name]
    component = file.partition("/")[0]
    before = open_base(ModelSettings(str(sd)), FAMILIES["sd"])
    rewrite(base, file, change)
    after = open_base(ModelSettings(str(base)), FAMILIES["sd"])
    for kind in ("torch", "jax"):
        engines.check_base(kind, after, FAMILIES["sd"])
    old, new = (load_component(one, component).state_dict() for one in (before, after))
    tolerance = 1e-3 if name == "halves" else 0
    assert old.keys() == new.keys()
    for key, array in old.items():
        assert torch.allclose(array, new[key], rtol=tolerance, atol=tolerance), key
    read = read_component(after, component)
    assert len(read) == len(old)


def test_a_tied_embedding_may_stand_under_either_name_or_both(sd3: Path, tmp_path: Path) -> None:
    from limner.engines.torch.weights import load_component

    file, shared, tied = "text_encoder_3/model", "shared.weight", "encoder.embed_tokens.weight"
    base = Path(shutil.copytree(sd3, tmp_path / "base"))
    numbers = load_file(base / f"{file}.safetensors")[shared]
    for change in (
        lambda arrays: arrays.update({tied: arrays[shared].copy()}),
        drop(shared),
        lambda arrays: arrays.update({"decoder.final_layer_norm.weight": np.ones(48, np.float32)}),
    ):
        rewrite(base, file, change)
        compare(base, "torch", "sd3")
        opened = open_base(ModelSettings(str(base), "sd3"), FAMILIES["sd3"])
        net = load_component(opened, "text_encoder_3")
        assert (net.encoder.embed_tokens.weight.detach().numpy() == numbers).all()
    rewrite(base, file, drop(tied))
    assert f"2 arrays are missing: {tied}, {shared}" in refusal(base, "torch", "sd3")


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_an_index_that_disagrees_with_its_shards(sd_fp16: Path, tmp_path: Path, kind: str) -> None:
    base = Path(shutil.copytree(sd_fp16, tmp_path / "base"))
    compare(base, kind, variant="fp16")
    [index] = (base / "unet").glob("*.index*.json")
    good = index.read_text()
    places = json.loads(good)["weight_map"]
    first, last = sorted(places)[0], sorted(places)[-1]
    for changed in (
        {**places, first: places[last]},
        {name: place for name, place in places.items() if name != first},
        {**places, f"{first}.more": places[first]},
    ):
        edit(index, weight_map=changed)
        assert first in refusal(base, kind, variant="fp16")
    index.write_text('{"weight_map": 3}')
    assert "names other arrays" in refusal(base, kind, variant="fp16")
    index.write_text("[" * 100_000)
    assert "nested too deep" in refusal(base, kind, variant="fp16")
    index.unlink()
    assert "there is no index" in refusal(base, kind, variant="fp16")
    index.write_text(good)
    whole = base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(sd_fp16 / "vae" / whole.name, whole)
    assert "Move away what is not meant" in refusal(base, kind, variant="fp16")


def test_a_part_without_the_variant_is_read_plain(sd: Path, sd_fp16: Path, tmp_path: Path) -> None:
    """Some parts in half precision, and an autoencoder that has plain weights only."""
    from limner.engines.torch.encoders import TorchEncoders

    base = Path(shutil.copytree(sd_fp16, tmp_path / "base"))
    shutil.rmtree(base / "vae")
    shutil.copytree(sd / "vae", base / "vae")
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    latents = []
    for folder, settings in (
        (sd, {}),
        (base, {"variant": "fp16"}),
        (sd_fp16, {"variant": "fp16", "vae": str(sd / "vae")}),
    ):
        opened = open_base(ModelSettings(str(folder), **settings), FAMILIES["sd"])
        engines.check_base("torch", opened, FAMILIES["sd"])
        encoders = TorchEncoders(opened, torch_device())
        latents.append(encoders.encode_vae("vae", pixels)[0])
        encoders.component("text_encoder")
    assert (latents[0] == latents[1]).all() and (latents[0] == latents[2]).all()


def torch_device() -> Any:
    import torch

    return torch.device("cpu")


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_pictures_are_not_drawn_with_other_arrays(sd: Path, tmp_path: Path, kind: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    rewrite(base, TEXT, drop(LAYER))
    with pytest.raises(InputError, match="1 array is missing"):
        run_generate(str(base), ["a"], DrawSettings(engine=kind), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


TOKENIZERS = {
    "vocab.json is empty": ({"vocab.json": "{}"}, True),
    "merges.txt is broken": ({"merges.txt": "a\nb c d e\n"}, True),
    "tokenizer.json has nothing": ({"tokenizer.json": '{"a": 1}'}, False),
    "tokenizer.json is deep": ({"tokenizer.json": "[" * 100_000}, False),
    "tokenizer.json is no text": ({"tokenizer.json": "\0\0\0"}, False),
    "ids are texts": ({"vocab.json": '{"a": "b"}'}, True),
}


@pytest.mark.parametrize("kind", ["torch", "jax"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_broken_tokenizer_is_one_message(sd: Path, tmp_path: Path, name: str, kind: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    files, is_old = TOKENIZERS[name]
    if is_old:
        (base / "tokenizer" / "tokenizer.json").unlink()
    for file, text in files.items():
        (base / "tokenizer" / file).write_text(text)
    assert f"{base / 'tokenizer'}" in refusal(base, kind)


@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_a_vocabulary_that_its_text_encoder_does_not_know(
    sd: Path, tmp_path: Path, kind: str
) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    size = json.loads((base / "text_encoder" / "config.json").read_text())["vocab_size"]
    edit(base / "text_encoder" / "config.json", vocab_size=size - 3)
    name = "embeddings.token_embedding.weight"
    rewrite(base, TEXT, replace(name, lambda array: array[:-3]))
    assert f"its vocabulary has {size} tokens, the text encoder knows {size - 3}" in refusal(
        base, kind
    )
    base = Path(shutil.copytree(sd, tmp_path / "long"))
    edit(base / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    assert "the text encoder has 77 positions" in refusal(base, kind)


def test_a_safety_checker_is_compared_where_it_is_used(sd: Path, tmp_path: Path) -> None:
    """Pictures are looked at with it; training does without."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil

    base = Path(shutil.copytree(sd, tmp_path / "base"))
    vision = {"image_size": 24, "patch_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = CLIPConfig(
        projection_dim=16,
        vision_config=vision | {"num_hidden_layers": 1, "num_attention_heads": 2},
    )
    StableDiffusionSafetyChecker(config).save_pretrained(base / "safety_checker")
    side = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessorPil(**side).save_pretrained(base / "feature_extractor")
    edit(
        base / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    call = DrawSettings(steps=1, size=32)
    assert run_generate(str(base), ["a"], call, output=tmp_path / "out")
    # As transformers wrote it until its fifth version, and as the published one is.
    twice = rename(
        lambda name: re.sub("^vision_model.(?!vision)", "vision_model.vision_model.", name)
    )
    rewrite(base, "safety_checker/model", twice)
    assert run_generate(str(base), ["a"], call, output=tmp_path / "out")
    rewrite(base, "safety_checker/model", rename("module.{}".format))
    with pytest.raises(InputError, match=r"safety_checker: .* begins with 'module\.'"):
        run_generate(str(base), ["a"], call, output=tmp_path / "out")
    compare(base, "torch")
