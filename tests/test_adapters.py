"""Adapters as records: the names, shapes and first values of their arrays."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from limner import rng
from limner.base_model.open import open_base
from limner.config.schema import AdapterSettings, Config, ModelSettings
from limner.engines import adapters
from limner.engines.adapters import ArrayKind, Start, list_adapters
from limner.errors import InputError
from limner.families.sd import SD

SHAPES = {
    "unet": {
        "conv_in.weight": (8, 4, 3, 3),
        "down.attn.to_q.weight": (8, 6),
        "down.attn.to_q.bias": (8,),
        "down.attn.to_k.weight": (8, 5),
        "down.attn.to_v.weight": (8, 5),
        "down.attn.to_out.0.weight": (6, 8),
        "down.attn.into_q.weight": (6, 8),
    },
    "text_encoder": {
        f"text_model.layer.{name}.weight": (4, 4)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")
    },
}


def no_weight() -> np.ndarray:
    raise AssertionError("LoRA looks at no weight")


def test_names_and_shapes() -> None:
    listed = list_adapters(SHAPES, AdapterSettings("lora", 3), SD)
    assert {name: array.shape for name, array in listed.items()} == {
        f"{component}.{layer}.lora_{half}.weight": shape
        for component, layer, wide, narrow in [
            ("unet", "down.attn.to_q", 8, 6),
            ("unet", "down.attn.to_k", 8, 5),
            ("unet", "down.attn.to_v", 8, 5),
            ("unet", "down.attn.to_out.0", 6, 8),
            *(
                ("text_encoder", f"text_model.layer.{name}", 4, 4)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            ),
        ]
        for half, shape in (("A", (3, narrow)), ("B", (wide, 3)))
    }


def test_targets_of_a_recipe_are_the_trained_network_s() -> None:
    settings = AdapterSettings("lora", 2, targets=("conv_in", "attn.to_q"))
    listed = list_adapters(SHAPES, settings, SD)
    unet = {name: array.shape for name, array in listed.items() if array.component == "unet"}
    assert unet == {
        "unet.conv_in.lora_A.weight": (2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": (8, 2, 1, 1),
        "unet.down.attn.to_q.lora_A.weight": (2, 6),
        "unet.down.attn.to_q.lora_B.weight": (8, 2),
    }
    assert len(listed) == len(unet) + 8
    for target in ("o_q", "attn", "to_x"):
        with pytest.raises(InputError, match=f"the unet has no module named {target} with"):
            list_adapters(SHAPES, AdapterSettings("lora", 2, targets=(target,)), SD)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("to_out", "; did you mean to_out.0? this family's own are to_q"),
        ("attn", "; did you mean attn.into_q, attn.to_k, attn.to_out.0, ...? this"),
        ("to_qq", "; did you mean to_q? this"),
        ("conv-in", "; did you mean conv_in? this"),
        ("lora", "with a weight; this family's own are to_q, to_k, to_v, to_out.0"),
    ],
)
def test_a_target_that_is_not_there_is_refused_with_a_hint(target: str, hint: str) -> None:
    with pytest.raises(InputError) as refusal:
        list_adapters(SHAPES, AdapterSettings("lora", 2, targets=("to_q", target)), SD)
    assert f"the unet has no module named {target}" in str(refusal.value)
    assert hint in str(refusal.value)


@pytest.mark.parametrize("shape", [(8,), (8, 6, 3), (2, 8, 3, 3, 3)])
def test_a_layer_that_can_have_no_adapter_is_refused(shape: tuple[int, ...]) -> None:
    shapes = {"unet": {**SHAPES["unet"], "down.norm1.weight": shape}}
    with pytest.raises(InputError, match=r"down\.norm1 of the unet is a norm or another layer"):
        list_adapters(shapes, AdapterSettings("lora", 2, targets=("to_q", "norm1")), SD)


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_q", "norm1"), "norm1 of the unet is a norm"),
        (("to_out",), "did you mean to_out.0?"),
        (("0",), "adapter.targets: peft refuses them"),
    ],
)
def test_targets_are_refused_before_a_weight_is_loaded(
    base: Path, targets: tuple[str, ...], message: str
) -> None:
    from limner.engines.torch.initial_state import refuse_settings

    opened = open_base(ModelSettings(str(base), "sd"), SD)
    config = Config(
        model=ModelSettings(str(base), "sd"), adapter=AdapterSettings("lora", 2, targets=targets)
    )
    with pytest.raises(InputError) as refusal:
        refuse_settings(config, opened, SD)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_first_values() -> None:
    """Of the trained network by the name without it, of a text encoder by the whole name."""
    settings = AdapterSettings("lora", 3)
    for name, array in list_adapters(SHAPES, settings, SD).items():
        values = array.initial_values(settings, SD, 7, no_weight)
        assert values.shape == array.shape and values.dtype == np.float32
        if "lora_B" in name:
            assert not values.any()
            continue
        address = zlib.crc32(name.removeprefix("unet.").encode())
        normal = rng.at(7, "lora", address).standard_normal(values.size, np.float32)
        np.testing.assert_array_equal(values.ravel(), normal / np.float32(3))


def test_a_kind_whose_arrays_start_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's magnitudes (arXiv:2402.09353) start at the norms of the weight's rows."""

    def row_norms(start: Start) -> np.ndarray:
        return np.linalg.norm(start.read_weight(), axis=1).astype(np.float32)

    magnitude = ArrayKind(
        "lora_magnitude_vector.weight", lambda weight, settings: weight[:1], row_norms
    )
    monkeypatch.setitem(adapters.KINDS, "dora", (*adapters.KINDS["lora"], magnitude))
    settings = AdapterSettings("dora", 3)  # type: ignore[arg-type]
    listed = list_adapters({"unet": SHAPES["unet"]}, settings, SD)
    assert len(listed) == 4 * 3
    array = listed["unet.down.attn.to_q.lora_magnitude_vector.weight"]
    weight = np.arange(48, dtype=np.float32).reshape(8, 6)
    values = array.initial_values(settings, SD, 0, lambda: weight)
    assert values.shape == array.shape == (8,)
    np.testing.assert_allclose(values, np.sqrt(np.square(weight).sum(1)))
