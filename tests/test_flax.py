"""Models that only have Flax weights are read as what they are."""

from pathlib import Path

import numpy as np
import pytest
import tiny

import limner
from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.data import contact_sheet
from limner.errors import InputError
from limner.families import FAMILIES

pytestmark = pytest.mark.frameworks

pytest.importorskip("msgpack")


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_flax_model_has_the_arrays_of_its_twin(
    name: str, base: Path, sdxl: Path, tmp_path: Path
) -> None:
    """In both engines' eyes; large arrays in pieces; converted once."""
    from limner.engines.torch.weights import load_component

    family, base = FAMILIES[name], {"sd": base, "sdxl": sdxl}[name]
    components = ("unet", "vae", "text_encoder", *(["text_encoder_2"] if name == "sdxl" else []))
    plain = open_base(ModelSettings(base=str(base), family=name), family)
    found = open_base(
        ModelSettings(base=str(tiny.as_flax(base, tmp_path / "flax")), family=name), family
    )
    for key in ("_class_name", "force_zeros_for_empty_prompt", *components):
        assert found.configs.model_index.get(key) == plain.configs.model_index.get(key)
    for component in components:
        ours, theirs = (
            dict(load_component(one, component).named_parameters()) for one in (found, plain)
        )
        assert ours.keys() == theirs.keys()
        assert all(
            np.array_equal(p.detach().numpy(), theirs[name].detach().numpy())
            for name, p in ours.items()
        )
    jax_weights = pytest.importorskip("limner.engines.jax.weights")
    for component in components:
        a, b = (jax_weights.read_component(one, component) for one in (found, plain))
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    changed = found.weight_files("unet")[0].stat().st_mtime_ns
    again = open_base(ModelSettings(base=str(tmp_path / "flax"), family=name), family)
    assert (
        again.folder == found.folder and again.weight_files("unet")[0].stat().st_mtime_ns == changed
    )


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.soak)])
def test_pictures_of_a_flax_model(name: str, sdxl: Path, tmp_path: Path) -> None:
    """Through the stock pipeline, and in JAX; what belongs to a model besides its weights is
    noticed when it changes."""
    if name == "sd":  # in one level, it is compiled sooner
        base = tiny.stable_diffusion(tmp_path / "base", channels=(64,), attention=False)
    else:
        base = sdxl
    flax = tiny.as_flax(base, tmp_path / "flax")
    for engine in ("torch", "jax"):
        drawn = [
            limner.generate(
                str(m),
                ["a disc"],
                steps=2,
                size=32,
                device="cpu",
                engine=engine,
                output=tmp_path / m.name / engine,
            )[0]
            for m in (base, flax)
        ]
        np.testing.assert_array_equal(*map(contact_sheet.read_picture, drawn))
    before = open_base(ModelSettings(base=str(flax), family=name), FAMILIES[name])
    path = flax / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"v_prediction"'))
    after = open_base(ModelSettings(base=str(flax), family=name), FAMILIES[name])
    assert [one.configs["scheduler"]["prediction_type"] for one in (before, after)] == [
        "epsilon",
        "v_prediction",
    ]


def test_damaged_flax_weights_are_named(base: Path, tmp_path: Path) -> None:
    folder = tiny.as_flax(base, tmp_path / "flax")
    path = folder / "vae" / "diffusion_flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"diffusion_flax_model\.msgpack: not a whole file of Flax weights"
    ):
        open_base(ModelSettings(base=str(folder)), FAMILIES["sd"])
    path.unlink()
    with pytest.raises(
        InputError, match=r"diffusion_flax_model\.msgpack: it is not there; a Flax model has it"
    ):
        open_base(ModelSettings(base=str(folder)), FAMILIES["sd"])
