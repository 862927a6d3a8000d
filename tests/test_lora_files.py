"""LoRA files: what is loaded is used whole, and means the same to every reader."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from limner import engines
from limner.base_model.open import open_base
from limner.config.schema import AdapterSettings, ModelSettings
from limner.engines.adapters import list_adapters
from limner.errors import InputError
from limner.families import FAMILIES
from limner.protocols import ModelSource
from limner.storage import layout, safetensors
from limner.storage.layout import LORA_FILE
from limner.training import result

pytestmark = pytest.mark.frameworks
Arrays = dict[str, np.ndarray]


def make_arrays(base: Path, family: str, settings: AdapterSettings) -> Arrays:
    """A trained LoRA's arrays, of the text encoders too where the settings say so: random."""
    opened = open_base(ModelSettings(str(base), family), FAMILIES[family])
    shapes = {
        component: {
            name
            if component == "unet" or name.startswith("text_model.")
            else f"text_model.{name}": array.shape
            for path in opened.weight_files(component)
            for name, array in safetensors.read_header(path).arrays.items()
        }
        for component in FAMILIES[family].trained_components(settings.text_encoders)
    }
    draws = np.random.default_rng(0)
    return {
        name: draws.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in list_adapters(shapes, settings, FAMILIES[family]).items()
    }


def open_pipeline(base: Path, lora: Path, engine: str) -> Any:
    return engines.open_pipeline(
        ModelSource(str(base), lora), None, engine, scheduler=None, precision="no", device=None
    )


def read_additions(networks: dict[str, Any]) -> Arrays:
    """What peft adds to each weight of networks, by component and layer."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": module.get_delta_weight(adapter)
        .detach()
        .numpy()
        for component, network in networks.items()
        for name, module in network.named_modules()
        for adapter in getattr(module, "scaling", {})
    }


@pytest.mark.parametrize(("rank", "alpha"), [(4, 16.0), (3, 1.0), (2, None), (2, 2.0)])
def test_a_result_means_the_same_to_every_reader(
    base: Path, tmp_path: Path, rank: int, alpha: float | None
) -> None:
    """With its header, without it, in the layout of kohya and ComfyUI, and in the JAX engine."""
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_kohya

    settings = AdapterSettings("lora", rank, alpha, text_encoders=True)
    trained, family = make_arrays(base, "sd", settings), FAMILIES["sd"]
    opened = open_base(ModelSettings(str(base), "sd"), family)
    result.write_lora(opened, family, tmp_path, trained, settings, 1)
    file = tmp_path / LORA_FILE
    written = {name: torch.from_numpy(array) for name, array in load_file(file).items()}
    kohya = convert_state_dict_to_kohya(dict(written))
    scale = 1.0 if alpha is None else alpha / rank
    expected = {
        name.removesuffix(".lora_A.weight").replace("text_model.", ""): scale
        * (trained[name.replace("lora_A", "lora_B")].astype(np.float64) @ array)
        for name, array in trained.items()
        if "lora_A" in name
    }
    assert len(expected) > 8 and any(name.startswith("text_encoder.") for name in expected)
    for source in (tmp_path, written, kohya):
        pipeline = StableDiffusionPipeline.from_pretrained(base, use_safetensors=True)
        pipeline.load_lora_weights(source)
        networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        additions = read_additions(networks)
        assert additions.keys() == expected.keys()
        for name, addition in additions.items():
            np.testing.assert_allclose(addition, expected[name], rtol=1e-5, atol=1e-6)
    nets = open_pipeline(base, tmp_path, "jax").nets
    assert {net.scale for net in nets.values()} == {1.0}
    if scale == 1:
        assert all(np.array_equal(array, trained[name]) for name, array in load_file(file).items())


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_alpha_in_the_header_is_read_still(base: Path, tmp_path: Path, engine: str) -> None:
    """As checkpoints have it, and results of earlier builds."""
    settings = AdapterSettings("lora", 4, 10.0, text_encoders=True)
    arrays = make_arrays(base, "sd", settings)
    header = layout.lora_header(settings, FAMILIES["sd"])
    safetensors.write_arrays(tmp_path / LORA_FILE, arrays, header)
    pipeline = open_pipeline(base, tmp_path, engine)
    if engine == "jax":
        assert {net.scale for net in pipeline.nets.values()} == {2.5}
        return
    additions = read_additions({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    assert len(additions) == len(arrays) / 2
    for name, addition in additions.items():
        layer = name.replace("text_encoder.", "text_encoder.text_model.")
        down, up = (arrays[f"{layer}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(addition, 2.5 * up @ down, rtol=1e-5, atol=1e-6)


def rename(rule: Callable[[str], str]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {rule(name): array for name, array in arrays.items()}


TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
OTHERS = {
    "peft's prefix": (
        rename(lambda name: f"base_model.model.{name}"),
        "Every name begins with 'base_model.model.'; write the file without it",
    ),
    "a wrapper's prefix": (
        rename(lambda name: f"module.{name}"),
        "Every name begins with 'module.'",
    ),
    "no component": (
        rename(lambda name: name.removeprefix("unet.")),
        "Names are expected to begin with",
    ),
    "a transformer's": (
        rename(lambda name: name.replace("unet.", "transformer.")),
        "(transformer.",
    ),
    "one layer that is not there": (
        rename(lambda name: name.replace(TO_Q, f"{TO_Q}2")),
        f"2 arrays ({TO_Q}2.lora_A.weight, {TO_Q}2.lora_B.weight) have no place",
    ),
    "a level that is not there": (
        rename(lambda name: name.replace("down_blocks.1", "down_blocks.7")),
        "have no place in",
    ),
    "a width that does not fit": (
        lambda arrays: arrays | {f"{TO_Q}.lora_A.weight": np.ones((2, 65), np.float32)},
        f"1 array ({TO_Q}.lora_A.weight) has no place",
    ),
    "another rank in one half": (
        lambda arrays: arrays | {f"{TO_Q}.lora_B.weight": np.ones((64, 3), np.float32)},
        f"1 array ({TO_Q}.lora_B.weight) has no place",
    ),
    "half of a layer": (
        lambda arrays: {k: v for k, v in arrays.items() if k != f"{TO_Q}.lora_B.weight"},
        TO_Q,
    ),
    "an array of its own beside them": (
        lambda arrays: arrays | {f"{TO_Q}.dora_scale": np.ones(64, np.float32)},
        f"1 array ({TO_Q}.dora_scale) has no place",
    ),
    "a textual inversion beside them": (
        lambda arrays: arrays | {"bundle_emb.cat.string_to_param.*": np.ones(64, np.float32)},
        "1 array (bundle_emb.cat.string_to_param.*) has no place",
    ),
    "the second encoder of another family": (
        lambda arrays: (
            arrays
            | {
                f"text_encoder_2.{Q_PROJ}.lora_{half}.weight": np.ones(shape, np.float32)
                for half, shape in (("A", (2, 32)), ("B", (32, 2)))
            }
        ),
        "2 arrays (text_encoder_2.",
    ),
    "nothing": (lambda arrays: {}, "it holds no arrays"),
    "not a number": (
        lambda arrays: arrays | {f"{TO_Q}.lora_A.weight": np.full((2, 64), np.nan, np.float32)},
        f"1 array ({TO_Q}.lora_A.weight) holds numbers that are not finite",
    ),
}


@pytest.mark.parametrize("engine", ["torch", "jax"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_lora_of_which_an_array_has_no_place_is_refused(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, engine: str
) -> None:
    change, message = OTHERS[kind]
    arrays = change(make_arrays(base, "sd", AdapterSettings("lora", 2)))
    save_file(arrays, tmp_path / LORA_FILE, metadata={"format": "pt"})
    with pytest.raises(InputError) as refusal:
        open_pipeline(base, tmp_path, engine)
    text = str(refusal.value)
    assert str(tmp_path / LORA_FILE) in text and message in text
    assert len(text) < 700 and "\n" not in text
    assert "lora" not in capfd.readouterr().err.lower()


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_names_without_text_model_are_used(base: Path, tmp_path: Path, engine: str) -> None:
    arrays = make_arrays(base, "sd", AdapterSettings("lora", 2, text_encoders=True))
    short = {name.replace(".text_model.", "."): array for name, array in arrays.items()}
    assert short.keys() != arrays.keys()
    save_file(short, tmp_path / LORA_FILE, metadata={"format": "pt"})
    open_pipeline(base, tmp_path, engine)


KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
ONE = np.ones((2, 2), np.float32)
TARGETS = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
# Arrays beside a LoRA's, the settings in the header, and what is said in both engines.
UNREAD: dict[str, tuple[Arrays, dict[str, Any], str]] = {
    "alpha 0": ({f"{KOHYA}.alpha": np.float32(0)}, {}, f"{KOHYA}.alpha is 0, one number above 0"),
    "alpha below": ({f"{KOHYA}.alpha": np.float32(-4)}, {}, f"{KOHYA}.alpha is -4, one number"),
    "two alphas": ({f"{KOHYA}.alpha": ONE[0]}, {}, f"{KOHYA}.alpha is 2 numbers, one number"),
    "alpha of a pattern": (
        {},
        TARGETS | {"unet.alpha_pattern": {"to_q": 0}},
        "unet.alpha_pattern of 'to_q' is 0, a number above 0",
    ),
    "rank of a pattern": (
        {},
        TARGETS | {"unet.rank_pattern": {"to_q": -1}},
        "unet.rank_pattern of 'to_q' is -1, a whole number above 0",
    ),
    "int8": ({f"{TO_Q}.lora_A.weight": ONE.astype(np.int8)}, {}, "is of dtype I8; F64, F32"),
    "no component": ({}, {"r": 4, "lora_alpha": 8}, "says nothing of unet, it has lora_alpha, r."),
    "another component": ({}, {"transformer.r": 4}, "says nothing of unet, it has transformer.r."),
    "no targets": ({}, {"unet.r": 2, "unet.lora_alpha": 2}, "says no target_modules of unet"),
    "a setting of no LoRA": ({}, TARGETS | {"unet.nosuch": 8}, "has unet.nosuch, which is no"),
    "an activated LoRA": (
        {},
        TARGETS | {"unet.alora_invocation_tokens": [1, 2]},
        "header: unet.alora_invocation_tokens is [1, 2], null or [] is expected",
    ),
    "arrays of an excluded layer": (
        {},
        TARGETS | {"unet.exclude_modules": ["attn2.to_v", "to_q"]},
        "unet.exclude_modules leaves out unet.",
    ),
    "an excluding expression": (
        {},
        TARGETS | {"unet.exclude_modules": "(a+)+b"},
        'unet.exclude_modules is "(a+)+b", a list of texts is expected',
    ),
    "of a changed base": (
        {},
        TARGETS | {"unet.init_lora_weights": "pissa_niter_4"},
        'unet.init_lora_weights is "pissa_niter_4", null or true or false or "gaussian"',
    ),
    "a rank with a point": ({}, TARGETS | {"unet.r": 2.0}, "unet.r is 2.0, a whole number above"),
    "a pattern of nothing": ({}, TARGETS | {"unet.rank_pattern": None}, "is null, a table of num"),
    "an alpha past all numbers": ({}, TARGETS | {"unet.lora_alpha": 10**400}, "a number above 0"),
    "a switch as text": ({}, TARGETS | {"unet.use_rslora": "no"}, 'is "no", null or false or true'),
    "targets of no text": ({}, TARGETS | {"unet.target_modules": 1}, "is 1, a text or a list of"),
    "DoRA of no arrays": (
        {},
        TARGETS | {"unet.use_dora": True},
        "use_dora is true, and no array of un",
    ),
    "biases of no arrays": (
        {},
        TARGETS | {"unet.lora_bias": True},
        "lora_bias is true, and no arr",
    ),
    "arrays of DoRA": (
        {f"{TO_Q}.lora_magnitude_vector": np.ones(64, np.float32)},
        TARGETS,
        "unet.use_dora is null, and an array of unet has .lora_magnitude_vector",
    ),
    "kohya's names": (
        {f"{KOHYA}.lora_down.weight": ONE},
        TARGETS | {"unet.arrow_config": {"top_k": 3}},
        'unet.arrow_config is {"top_k": 3}, null is expected',
    ),
    "no dimensions": (
        {f"{TO_Q}.lora_A.weight": np.float32(1)},
        {},
        f"the shape of {TO_Q}.lora_A.weight is [], two numbers above 0 are expected",
    ),
    "one dimension": ({f"{TO_Q}.lora_B.weight": ONE[0]}, {}, "lora_B.weight is [2], two numbers"),
    "three dimensions": ({f"{TO_Q}.lora_A.weight": ONE[None]}, {}, "weight is [1, 2, 2], two num"),
    "rank 0": ({f"{TO_Q}.lora_A.weight": np.ones((0, 64), np.float32)}, {}, "is [0, 64], two num"),
    "rank 0 of kohya's": (
        {
            f"{KOHYA}.lora_down.weight": np.ones((0, 64), np.float32),
            f"{KOHYA}.lora_up.weight": np.ones((64, 0), np.float32),
            f"{KOHYA}.alpha": np.float32(2),
        },
        {},
        "is [0, 64], two numbers",
    ),
    "no dimensions in old names": (
        {f"{TO_Q}_lora.up.weight": np.float32(1)},
        {},
        "to_q_lora.up.weight is [], two numbers",
    ),
    "a bias of nothing": ({f"{TO_Q}.lora_B.bias": ONE[:0, 0]}, {}, "is [0], numbers above 0 are"),
    "one layer by two names": (
        {f"{TO_Q}.lora.down.weight": np.ones((2, 64), np.float32)},
        {},
        f"{TO_Q}.lora.down.weight and {TO_Q}.lora_A.weight are two names of one array",
    ),
    "an encoder's layer by two names": (
        {
            f"text_encoder.{Q_PROJ}.lora_A.weight": ONE,
            f"text_encoder.{Q_PROJ.removeprefix('text_model.')}.lora_A.weight": ONE,
        },
        {},
        "are two names of one array",
    ),
    "LoHa": ({f"{KOHYA}.hada_w1_a": ONE}, {}, "of another kind of adapter: LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": ONE}, {}, "of another kind of adapter: LoKr in kohya's"),
    "differences": ({"lora_unet_conv_in.diff": ONE}, {}, "full differences of weights"),
    "Tucker": ({f"{KOHYA}.lora_mid.weight": ONE}, {}, "LoCon with a third factor"),
    "alphas of peft's": ({f"{TO_Q}.alpha": np.float32(1)}, {}, "alphas beside names of peft's"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_neither_engine_reads_is_named(base: Path, tmp_path: Path, kind: str) -> None:
    """In the same words, without a guess at another model."""
    more, settings, message = UNREAD[kind]
    arrays = make_arrays(base, "sd", AdapterSettings("lora", 2)) | more
    header = {"lora_adapter_metadata": json.dumps(settings)} if settings else {}
    save_file(
        {name: np.asarray(array) for name, array in arrays.items()},
        tmp_path / LORA_FILE,
        metadata={"format": "pt", **header},
    )
    texts = set()
    for engine in ("torch", "jax"):
        with pytest.raises(InputError) as refusal:
            open_pipeline(base, tmp_path, engine)
        texts.add(str(refusal.value))
    (text,) = texts
    assert message in text and "another model" not in text and len(text) < 700


def test_numbers_of_8_bits_are_named(base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        arrays = make_arrays(base, "sd", AdapterSettings("lora", 2))
        tensors = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
        save_tensors(tensors, tmp_path / LORA_FILE, metadata={"format": "pt"})
        for engine in ("torch", "jax"):
            with pytest.raises(InputError, match=r"of dtype F8_E.*Save it as float16"):
                open_pipeline(base, tmp_path, engine)


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_a_lora_of_zeros_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    arrays = make_arrays(base, "sd", AdapterSettings("lora", 2))
    zeros = {name: array * ("lora_A" in name) for name, array in arrays.items()}
    for written, told in ((arrays, 0), (zeros, 1)):
        save_file(written, tmp_path / LORA_FILE, metadata={"format": "pt"})
        open_pipeline(base, tmp_path, engine)
        assert capsys.readouterr().err.count("it changes nothing") == told


def test_settings_of_a_header_are_those_of_peft() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    from limner.engines.lora_settings import SETTINGS

    assert {field.name for field in fields(LoraConfig)} <= SETTINGS.keys()


# Of peft's versions, what a header may have where nothing was chosen, besides what this one has.
DEFAULTS: dict[str, list[Any]] = {
    "layers_pattern": [None, []],
    "loftq_config": [None, {}],
    "megatron_core": [None, "megatron.core"],
    "task_type": [None, "FEATURE_EXTRACTION"],
    "inference_mode": [True, False],
    "init_lora_weights": [True, False, "gaussian"],
    "lora_dropout": [0, 0.0, 0.1, 1.0],
    "exclude_modules": [["attn2.to_k"], ["a.to_q", "q"]],
    "lora_alpha": [8, 2.5],
    "target_modules": [["to_q"], "all-linear"],
}
# Settings that any value is taken of.
FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}


def test_every_setting_of_a_header_is_taken_where_it_does_nothing() -> None:
    from peft import LoraConfig

    from limner.engines.lora_settings import SETTINGS, check_settings

    fresh = LoraConfig(r=4, target_modules=["to_q"]).to_dict() | {"target_modules": ["to_q"]}
    described = {f"unet.{name}": value for name, value in json.loads(json.dumps(fresh)).items()}
    names = [f"{TO_Q}.lora_A.weight"]
    check_settings(Path("file"), described, names)
    assert fresh.keys() == SETTINGS.keys() - {"runtime_config"}
    for name in SETTINGS:
        for value in DEFAULTS.get(name, []):
            check_settings(Path("file"), described | {f"unet.{name}": value}, names)
        for value in (2, 1.5, True, "some", ["some"], {"some": "thing"}):
            try:
                check_settings(Path("file"), described | {f"unet.{name}": value}, names)
            except InputError as error:
                assert f"unet.{name}" in str(error) and name not in FREE
                break
        else:
            assert name in FREE


def test_the_dropout_of_a_header_is_of_training(base: Path, tmp_path: Path) -> None:
    import torch

    arrays = make_arrays(base, "sd", AdapterSettings("lora", 2))
    settings = TARGETS | {"unet.target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    drawn = []
    for dropout in (0.0, 0.9):
        header = json.dumps(settings | {"unet.lora_dropout": dropout})
        save_file(
            arrays,
            tmp_path / LORA_FILE,
            metadata={"format": "pt", "lora_adapter_metadata": header},
        )
        unet = open_pipeline(base, tmp_path, "torch").unet
        with torch.no_grad():
            drawn.append(unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 4, 32)).sample)
    assert torch.equal(*drawn)


def add_adapters(network: Any, component: str, targets: list[str], **settings: Any) -> Arrays:
    """The arrays of a network's adapters as peft writes them, none of them zeros."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    network.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False, **settings)
    )
    stored = get_peft_model_state_dict(network)
    return {f"{component}.{name}": value.numpy() for name, value in stored.items()}


def test_what_other_trainers_write_is_used(base: Path, tmp_path: Path) -> None:
    """Convolutions, DoRA, biases, several ranks, and kohya's names with alphas of their own."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_kohya

    def write(arrays: Arrays) -> None:
        save_file(arrays, tmp_path / LORA_FILE, metadata={"format": "pt"})

    def open_unet() -> Any:
        return UNet2DConditionModel.from_pretrained(base / "unet", use_safetensors=True)

    targets = ["to_q", "conv1", "proj_in"]
    for settings in ({}, {"use_dora": True}, {"rank_pattern": {"conv1": 3}}):
        arrays = add_adapters(open_unet(), "unet", targets, **settings)
        write(arrays)
        open_pipeline(base, tmp_path, "torch")
        reason = "it is DoRA" if settings.get("use_dora") else "linear layers of it are expected"
        with pytest.raises(InputError, match=reason):
            open_pipeline(base, tmp_path, "jax")
    plain = add_adapters(open_unet(), "unet", ["to_q", "to_k", "to_out.0"])
    kohya = {
        name: np.array(1.0, np.float32) if name.endswith(".alpha") else np.asarray(array)
        for name, array in convert_state_dict_to_kohya(dict(plain)).items()
    }
    write(kohya)
    pipeline = open_pipeline(base, tmp_path, "torch")
    additions = read_additions({"unet": pipeline.unet})
    assert len(additions) == len(plain) / 2
    for name, addition in additions.items():
        down, up = (plain[f"{name}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(addition, up @ down / 2, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"arrays \(lora_unet_.* have no place"):
        open_pipeline(base, tmp_path, "jax")
    stray = {"lora_unet_nowhere.lora_down.weight": np.ones((2, 4), np.float32)}
    for more in (stray, {f"{name[:-4]}dora_scale": array for name, array in plain.items()}):
        write(kohya | more)
        with pytest.raises(InputError, match=str(tmp_path)):
            open_pipeline(base, tmp_path, "torch")


# peft takes biases for halves that were cut.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 1.5}},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True, "init_lora_weights": False, "target_modules": ["to_out.0", "conv1"]},
    ],
)
def test_what_diffusers_writes_is_used(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """With its header, which holds every setting of peft's."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(base / "unet", use_safetensors=True)
    targets = {"target_modules": ["to_q", "to_k"]}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, **(targets | settings)))
    draws = np.random.default_rng(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            values = draws.normal(0, 0.1, parameter.shape).astype(np.float32)
            parameter.data = parameter.new_tensor(values)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    pipeline = open_pipeline(base, tmp_path, "torch")
    expected, additions = (read_additions({"unet": one}) for one in (unet, pipeline.unet))
    assert additions.keys() == expected.keys() and len(additions) > 5
    for name, addition in additions.items():
        np.testing.assert_allclose(addition, expected[name], rtol=1e-5, atol=1e-6)
    scales = {scale for module in pipeline.unet.modules() for scale in get_scales(module)}
    wanted = {scale for module in unet.modules() for scale in get_scales(module)}
    assert scales == wanted and max(scales) > 1


def get_scales(module: Any) -> list[float]:
    """What peft multiplies the product of a layer's halves by."""
    return [*getattr(module, "scaling", {}).values()]


ALPHAS: dict[str, Callable[[int], tuple[int, float | None]]] = {
    "alphas": lambda place: (4, place % 4 + 1),
    "ranks and alphas": lambda place: (place % 3 + 1, (place % 3 + 1) / 2),
    "ranks without alphas": lambda place: (place % 3 + 1, None),
    "some without": lambda place: (4, None if place % 2 else 1),
}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ALPHAS)
def test_every_layer_has_its_own_alpha(
    base: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    """In kohya's layout, where layers may differ in rank and alpha; without one it is the rank."""
    draws, arrays, expected = np.random.default_rng(0), {}, {}
    trained = make_arrays(base, "sd", AdapterSettings("lora", 4, text_encoders=True))
    downs = sorted(name for name in trained if "lora_A" in name)
    for place, name in enumerate(downs):
        rank, alpha = ALPHAS[kind](place)
        layer = name.removesuffix(".lora_A.weight")
        component, _, rest = layer.partition(".")
        stem = f"lora_{ {'unet': 'unet', 'text_encoder': 'te'}[component] }_"
        stem += rest.replace(".", "_")
        for half, shape in (
            ("down", (rank, trained[name].shape[1])),
            ("up", (len(trained[f"{layer}.lora_B.weight"]), rank)),
        ):
            arrays[f"{stem}.lora_{half}.weight"] = draws.normal(0, 1, shape).astype(np.float32)
        if alpha is not None:
            arrays[f"{stem}.alpha"] = np.array(alpha, np.float32)
        expected[layer.replace(".text_model.", ".")] = 1 if alpha is None else alpha / rank
    save_file(arrays, tmp_path / LORA_FILE, metadata={"format": "pt"})
    pipeline = engines.open_pipeline(
        ModelSource(str(base), tmp_path), None, scheduler=None, precision=precision, device=None
    )
    scales = {
        f"{component}.{name}": scale
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipeline, component).named_modules()
        if hasattr(module, "lora_A")
        for scale in module.scaling.values()
    }
    assert len(expected) > 20 and scales == expected


FAMILIES_OF_LORAS = {
    "sd3": ("transformer", ["attn.to_q", "attn.add_q_proj"]),
    "prior": ("prior", ["to_q", "to_k"]),
    "decoder": ("unet", ["to_q", "add_k_proj"]),
}


@pytest.mark.parametrize("kind", FAMILIES_OF_LORAS)
def test_other_families(kind: str, sd3: Path, kandinsky: Path, tmp_path: Path) -> None:
    import diffusers

    component, targets = FAMILIES_OF_LORAS[kind]
    folder = sd3 if kind == "sd3" else kandinsky / kind
    other = {"prior": "decoder", "decoder": "prior"}.get(kind)
    index = json.loads((folder / "model_index.json").read_text())
    network = getattr(diffusers, index[component][1]).from_pretrained(folder / component)
    arrays = add_adapters(network, component, targets)

    def draw_with(written: Arrays) -> None:
        save_file(written, tmp_path / LORA_FILE, metadata={"format": "pt"})
        engines.open_pipeline(
            ModelSource(str(folder), tmp_path),
            None if other is None else ModelSource(str(kandinsky / other)),
            scheduler=None,
            precision="no",
            device=None,
        )

    draw_with(arrays)
    prefix = f"{component}."
    with pytest.raises(InputError, match=f"Names are expected to begin with .*'{prefix}'"):
        draw_with({name.removeprefix(prefix): array for name, array in arrays.items()})
    first = targets[0]
    with pytest.raises(InputError, match=f"{len(arrays) // 2} arrays .* have no place in a "):
        draw_with({name.replace(f".{first}.", ".to_x."): a for name, a in arrays.items()})


def test_a_file_of_two_layouts_is_named_as_such(base: Path, tmp_path: Path) -> None:
    """As diffusers' conversion leaves it of a LoRA on convolutions."""
    arrays = make_arrays(base, "sd", AdapterSettings("lora", 2))
    old = {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): array
        for name, array in arrays.items()
        if ".attn2." in name
    }
    new = {name: array for name, array in arrays.items() if ".attn2." not in name}
    save_file(old | new, tmp_path / LORA_FILE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"Its names are of two layouts, such as \S+lora\.down"):
        open_pipeline(base, tmp_path, "torch")
