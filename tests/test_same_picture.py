"""A preview, ``limner generate`` and the model card's own code draw the same picture, whatever the
settings; and no setting that a run's weights depend on is left out of these runs."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from haste import compiled_in_haste
from hub_server import Hub

import limner
from limner.commands.generate import DrawSettings, open_pipeline
from limner.config import toml
from limner.config.schema import SETTINGS, Config
from limner.data.contact_sheet import read_picture
from limner.errors import InputError
from limner.training import loop

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),
]

SEED, SIZE, GUIDANCE = 5, 32, 3.0
LORA = {"adapter.kind": "lora", "optim.learning_rate": 0.02}
# Of every run: what is not given here is given with the run. Names in braces are fixtures.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {
        **LORA,
        "model.vae": "{vae}",
        "objective.predict": "v_prediction",
        "objective.min_snr": 5.0,
        "objective.noise_offset": 0.1,
        "objective.input_perturbation": 0.1,
        "adapter.rank": 3,
        "adapter.alpha": 7.0,
        "adapter.dropout": 0.1,
        "adapter.targets": ["to_q", "to_v"],
        "optim.schedule": "cosine_with_restarts",
        "optim.warmup": 1,
        "optim.cycles": 2,
        "optim.betas": [0.8, 0.9],
        "optim.weight_decay": 0.1,
        "optim.eps": 1e-6,
        "optim.max_grad_norm": 0.5,
        "optim.ema": 0.5,
        "data.crop": "random",
        "data.crop_variants": 2,
        "data.flip": True,
        "data.resample": "bicubic",
        "data.background": "black",
        "data.drop_caption": 0.5,
        "data.empty_caption": "zeros",
        "data.max_records": 10,
        "data.cache_dtype": "float16",
        "validation.hold_out": 1,
        "engine.encode_batch": 2,
    },
    "lora that predicts the sample, in bfloat16, with text encoders": {
        **LORA,
        "model.base": "{sd_fp16}",
        "model.variant": "fp16",
        "model.vae": "{vae}",
        "objective.predict": "sample",
        "objective.timestep_bias.strategy": "range",
        "objective.timestep_bias.multiplier": 2.0,
        "objective.timestep_bias.begin": 10,
        "objective.timestep_bias.end": 500,
        "adapter.text_encoders": True,
        "engine.precision": "bf16",
        "engine.tf32": True,
        "data.sets": [{"folder": "{pictures}", "repeats": 2}],
    },
    "full, in bfloat16": {
        "optim.learning_rate": 0.002,
        "model.vae": "{vae}",
        "objective.predict": "v_prediction",
        "objective.timestep_bias.portion": 0.5,
        "engine.precision": "bf16",
        "data.sets": [{"folder": "{pictures}", "weight": 1.0}],
        "data.buckets.step": 8,
        "data.buckets.smallest": 16,
        "data.buckets.largest": 48,
        "data.buckets.upscale": False,
        "data.buckets.resolutions": [32, 40],
    },
    "lora in fp16": {**LORA, "objective.dream": 1.0, "engine.precision": "fp16"},
    "sdxl": {
        **LORA,
        "model.base": "{sdxl}",
        "model.family": "sdxl",
        "adapter.text_encoders": True,
        "data.caption_chunks": 2,
    },
    "sd3": {
        **LORA,
        "model.base": "{sd3}",
        "model.family": "sd3",
        "objective.flow.density": "mode",
        "objective.flow.mode_scale": 1.0,
        "objective.flow.shift": 2.0,
        "objective.flow.sigmas": "table",
    },
    "sd3 in bfloat16": {
        **LORA,
        "model.base": "{sd3}",
        "model.family": "sd3",
        "engine.precision": "bf16",
        "objective.flow.logit_mean": 0.5,
        "objective.flow.logit_std": 0.5,
    },
    "prior": {
        **LORA,
        "model.base": "{kandinsky}/prior",
        "model.family": "kandinsky22-prior",
        "model.other_stage": "{kandinsky}/decoder",
    },
    "jax": {
        **LORA,
        "engine.kind": "jax",
        "objective.predict": "v_prediction",
        "model.vae": "{vae}",
        "adapter.alpha": 7.0,
    },
}
# Of a repository; see below.
HUB = {**LORA, "model.revision": "old", "model.trained_revision": "ema", "model.cache_dir": "x"}
NOT_TRIED = {
    "optim.kind": "the other one needs a GPU",
    "model.other_stage": "of a decoder: tests/test_kandinsky.py",
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another autoencoder than that of the bases."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("other") / "sd", seed=7) / "vae"


def put_fixtures(value: Any, request: pytest.FixtureRequest) -> Any:
    """The value with the fixtures' paths in the place of their names in braces."""
    if isinstance(value, list):
        return [put_fixtures(one, request) for one in value]
    if isinstance(value, dict):
        return {name: put_fixtures(one, request) for name, one in value.items()}
    if not isinstance(value, str):
        return value
    return re.sub(r"{(\w+)}", lambda name: str(request.getfixturevalue(name[1])), value)


def train(settings: dict[str, Any], run: Path) -> list[str]:
    """A run of two steps whose only preview is of its end; returns what it said."""
    raw: dict[str, Any] = {}
    for name, value in settings.items():
        node = raw
        *sections, key = name.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    raw["run"] = str(run)
    raw.setdefault("data", {}).setdefault("size", SIZE)
    raw["train"] = {"steps": 2, "batch_size": 2, "seed": SEED}
    raw["preview"] = {"prompts": ["a red circle"], "steps": 3, "guidance_scale": GUIDANCE}
    raw["preview"] |= {"count": 2, "safety_checker": settings.get("preview.safety_checker", True)}
    raw.setdefault("engine", {})["device"] = "cpu"
    said: list[str] = []
    loop.run_training(toml.build(Config, raw), report=said.append)
    return said


def read_previews(run: Path) -> np.ndarray:
    folder = sorted((run / "previews").iterdir())[-1]
    return np.stack([read_picture(path) for path in sorted(folder.glob("*.png"))]).astype(int)


def generate(run: Path, folder: Path, **settings: Any) -> np.ndarray:
    paths = limner.generate(
        run,
        "a red circle",
        output=folder,
        seed=SEED,
        count=2,
        steps=3,
        guidance_scale=GUIDANCE,
        size=SIZE,
        device="cpu",
        **settings,
    )
    return np.stack([read_picture(path) for path in paths]).astype(int)


def draw_by_card(run: Path, places: dict[str, Path]) -> np.ndarray:
    """What the pipeline of the model card's code draws, its paths filled in."""
    import torch

    [code] = re.findall(r"```python\n(.*?)\n```\n", (run / "README.md").read_text(), re.DOTALL)
    for place, path in places.items():
        code = code.replace(f'"path/to/{place}"', json.dumps(str(path)))
    known: dict[str, Any] = {}
    # The last two lines draw without a seed, and save.
    exec("\n".join(code.splitlines()[:-2]), known)
    pipeline = known["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    pictures = [
        pipeline(
            "a red circle",
            num_inference_steps=3,
            guidance_scale=GUIDANCE,
            height=SIZE,
            width=SIZE,
            generator=torch.Generator().manual_seed(SEED + k),
            output_type="np",
        ).images[0]
        for k in range(2)
    ]
    return (np.stack(pictures) * 255).round().astype(int)


LONG = {"jax": pytest.mark.soak}


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in RUNS])
def test_preview_and_generate_draw_the_same(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model.base": "{base}", **RUNS[name]}
    if "data.sets" not in settings:
        settings["data.folder"] = "{pictures}"
    settings = put_fixtures(settings, request)
    run = tmp_path / "run"
    engine = settings.get("engine.kind", "torch")
    with compiled_in_haste() if engine == "jax" else contextlib.nullcontext():
        train(settings, run)
        shown = read_previews(run)
        assert np.abs(shown[0] - shown[1]).max() > 10  # a picture, not a grey square
        # The run is found from anywhere, and so are the parts that it was trained with.
        monkeypatch.chdir(tmp_path)
        drawn = generate(Path("run"), tmp_path / "drawn", engine=engine)
    assert np.abs(drawn - shown).max() <= 1
    precision = settings.get("engine.precision", "no")
    if engine == "torch" and precision == "no" and "prior" not in settings["model.base"]:
        base = Path(settings["model.base"])
        places = {"this/folder": run, "the/base/model": base}
        places["the/autoencoder"] = Path(settings.get("model.vae", "none"))
        assert np.abs(draw_by_card(run, places) - shown).max() <= 1


def test_jax_opens_what_a_run_was_trained_with(
    base: Path, vae: Path, pictures: Path, tmp_path: Path
) -> None:
    """The parts only; what it draws with them is compared by ``make soak``."""
    settings = {**LORA, "objective.predict": "v_prediction", "engine.precision": "bf16"}
    settings |= {"model.base": str(base), "model.vae": str(vae), "data.folder": str(pictures)}
    train(settings, tmp_path / "run")
    drawing = DrawSettings(engine="jax", device="cpu")
    pipeline = open_pipeline(str(tmp_path / "run"), None, None, drawing)
    assert pipeline.prediction_type == "v_prediction"
    assert pipeline.base.component_folder("vae") == vae
    assert (np.dtype(pipeline.half).name, pipeline.text_dtype) == ("bfloat16", np.float32)


def test_no_setting_of_the_weights_is_left_out() -> None:
    tried = {name for settings in (*RUNS.values(), HUB) for name in settings}
    tried |= {f"data.sets.{name}" for name in ("repeats", "weight")}
    wanted = {
        name
        for name, one in SETTINGS.items()
        if one.declaration.resume != "free" or name.startswith("model.")
    }
    tables = {"data.buckets", "objective.timestep_bias", "objective.flow"}
    given = {"model.base", "data.size"}
    assert wanted - tried - tables - given - NOT_TRIED.keys() == set()
    assert tried <= SETTINGS.keys() | {"data.sets"}


def test_revisions_of_a_repository(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's weights of one revision, the UNet's of another, from the run's own cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for seed, revision in enumerate(("main", "old", "ema"), start=11):
            folder = tiny.stable_diffusion(tmp_path / revision, seed=seed)
            hub.add("someone/tiny", folder, revision=revision)
        settings = {**HUB, "model.base": "someone/tiny", "data.folder": str(pictures)}
        settings["model.cache_dir"] = str(tmp_path / "cache")
        run = tmp_path / "run"
        train(settings, run)
        shown = read_previews(run)
        card = (run / "README.md").read_text()
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        assert np.abs(generate(run, tmp_path / "drawn") - shown).max() <= 1
    assert 'revision="old"' in card and 'subfolder="unet", revision="ema"' in card


def test_a_base_that_has_changed_is_compared_before_a_lora_is_drawn_on_it(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    """Arrays that the network has no place for are not left out in silence."""
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(base, tmp_path / "base"))
    train({**LORA, "model.base": str(folder), "data.folder": str(pictures)}, tmp_path / "run")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    surplus = load_file(weights) | {"more.weight": np.zeros(2, np.float32)}
    save_file(surplus, weights, {"format": "pt"})
    with pytest.raises(InputError, match="the weights or configuration have changed"):
        generate(tmp_path / "run", tmp_path / "drawn")
    with pytest.raises(InputError, match=r"unet: 1 array has no place in the model: more\.weight"):
        generate(tmp_path / "run", tmp_path / "drawn", base=str(folder))


def test_a_base_is_found_from_another_directory(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(base, tmp_path / "models" / "small")
    monkeypatch.chdir(tmp_path)
    settings = {**LORA, "model.base": "models/small", "data.folder": str(pictures)}
    train(settings, Path("run"))
    shown = read_previews(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.abs(generate(tmp_path / "run", tmp_path / "drawn") - shown).max() <= 1
    result = (tmp_path / "run" / "result.json").read_text()
    assert limner.export(tmp_path / "run") == tmp_path / "run"
    assert (tmp_path / "run" / "result.json").read_text() == result


@pytest.fixture(scope="module")
def checked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a safety checker that finds every picture unsafe."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("checked") / "sd"))
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "projection_dim": 32,
    }
    vision = small | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(projection_dim=32, text_config=small, vision_config=vision)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    checker.save_pretrained(folder / "safety_checker")
    (folder / "feature_extractor").mkdir()
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": 32}
    processor |= {"size": {"shortest_edge": 32}}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_safety_checker_blackens_is_told_and_stays_black(
    kind: str, checked: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**LORA, "adapter.kind": kind, "data.folder": str(pictures)}
    said = train(settings | {"model.base": str(checked)}, tmp_path / "run")
    told = (
        "2 of 2 pictures are black, because the base's safety checker found them unsafe: "
        "'a red circle' (seed 5), 'a red circle' (seed 6). Without it: --no-safety-checker"
    )
    assert sum(line.startswith(told) for line in said) == 2  # first and last
    assert not read_previews(tmp_path / "run").any()
    capsys.readouterr()
    assert not generate(tmp_path / "run", tmp_path / "black").any()
    assert told in capsys.readouterr().err
    plain = {**settings, "model.base": str(checked), "preview.safety_checker": False}
    said = train(plain, tmp_path / "plain")
    assert not [line for line in said if "safety checker" in line]
    shown = read_previews(tmp_path / "plain")
    assert shown.any()
    for run in ("run", "plain"):
        drawn = generate(tmp_path / run, tmp_path / f"{run}-drawn", safety_checker=False)
        assert np.abs(drawn - shown).max() <= 1
    assert "safety checker" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_safety_checker_that_is_a_pickle_is_left_out_and_told(
    kind: str, checked: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checked, tmp_path / "base"))
    weights = folder / "safety_checker" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    settings = {**LORA, "adapter.kind": kind, "data.folder": str(pictures)}
    said = train(settings | {"model.base": str(folder)}, tmp_path / "run")
    told = f"{folder / 'safety_checker'}: it has no weights in safetensors"
    assert sum(line.startswith(told) for line in said) == 1
    shown = read_previews(tmp_path / "run")
    assert shown.any()
    capsys.readouterr()
    assert np.abs(generate(tmp_path / "run", tmp_path / "drawn") - shown).max() <= 1
    # The result of a full run has no safety checker.
    assert (told in capsys.readouterr().err) is (kind == "lora")
    assert generate(folder, tmp_path / "plain").any()
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("entry", [["transformers", "CLIPFeatureExtractor"], [None, None], None])
def test_a_safety_checker_of_an_old_base_or_without_its_processor(
    entry: Any, checked: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old name of the processor is that of the new one; without one no picture is checked."""
    folder = Path(shutil.copytree(checked, tmp_path / "base"))
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = entry
    if entry is None:
        del index["feature_extractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    has_processor = entry is not None and entry[1] is not None
    settings = {**LORA, "model.base": str(folder), "data.folder": str(pictures)}
    said = train(settings, tmp_path / "run")
    told = f"{folder / 'safety_checker'}: pictures are drawn without it: the base has no feature_"
    assert any(line.startswith(told) for line in said) is not has_processor
    assert read_previews(tmp_path / "run").any() != has_processor
    capsys.readouterr()
    assert generate(tmp_path / "run", tmp_path / "drawn").any() != has_processor
    assert (told in capsys.readouterr().err) is not has_processor


def test_jax_says_that_it_has_no_safety_checker(
    checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checked, tmp_path / "base"))
    shutil.rmtree(folder / "unet")
    shallow = tiny.stable_diffusion(tmp_path / "shallow", channels=(64,), attention=False)
    shutil.copytree(shallow / "unet", folder / "unet")
    assert generate(folder, tmp_path / "drawn", engine="jax").any()
    told = f"{folder}: JAX has no safety checker; pictures are drawn without this base's"
    assert told in capsys.readouterr().err
