"""Latents are scaled as the stock pipeline unscales them, or the autoencoder is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from haste import compiled_in_haste

from limner.base_model.open import open_base
from limner.config.schema import ModelSettings
from limner.errors import InputError
from limner.families import FAMILIES
from limner.families.sdxl import decode_latents
from limner.protocols import BaseConfigs

STATISTICS = {"latents_mean": [-1.6, 1.1, 0.3, -0.2], "latents_std": [8.4, 5.9, 4.2, 5.7]}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("vae", [{"scaling_factor": 0.5}, {"scaling_factor": 0.5, **STATISTICS}])
def test_what_is_trained_on_is_what_is_decoded(vae: dict[str, Any]) -> None:
    """The stock pipeline of XL decodes x0 * std / scaling_factor + mean."""
    draws = np.random.default_rng(0)
    z, zeros = draws.normal(size=(2, 4, 3, 5)).astype(np.float32), np.zeros((2, 4, 3, 5), "f4")
    configs = BaseConfigs({}, {"vae": vae})
    x0 = FAMILIES["sdxl"].images.clean_latents({"mean": z, "std": zeros}, configs, zeros)
    mean, std = (
        np.array(vae.get(name, [usual] * 4))[:, None, None]
        for name, usual in (("latents_mean", 0), ("latents_std", 1))
    )
    np.testing.assert_allclose(x0, (z - mean) * 0.5 / std, atol=1e-6)
    np.testing.assert_allclose(x0 * std / 0.5 + mean, z, atol=1e-5)
    np.testing.assert_allclose(decode_latents(x0, configs), z, atol=1e-5)
    assert x0.dtype == np.float32
    noisy = FAMILIES["sdxl"].images.clean_latents({"mean": z, "std": zeros + 1}, configs, z)
    np.testing.assert_allclose(noisy - x0, z * 0.5 / std, atol=1e-5)


@pytest.mark.frameworks
def test_both_engines_draw_what_the_stock_pipeline_draws(tmp_path: Path) -> None:
    """Pictures with statistics equal between the engines, and are others than without them."""
    from limner import engines
    from limner.commands.generate import DrawSettings, open_pipeline

    base = tiny.stable_diffusion_xl(tmp_path / "base", shallow=True)
    pictures = {}
    for name, changes in (("with", STATISTICS), ("without", dict.fromkeys(STATISTICS))):
        edit(base / "vae" / "config.json", **changes)
        for kind in ("torch", "jax"):
            pipeline = open_pipeline(str(base), None, None, DrawSettings(engine=kind))
            call = {"steps": 1, "guidance_scale": 1.0, "size": 32}
            with compiled_in_haste():
                [picture] = engines.draw_pictures(pipeline, ["a"], [0], **call)
            pictures[name, kind] = picture.astype(int)
    for name in ("with", "without"):
        assert np.abs(pictures[name, "torch"] - pictures[name, "jax"]).max() <= 1, name
    assert np.abs(pictures["with", "jax"] - pictures["without", "jax"]).max() > 3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mean in sd": ("sd", STATISTICS, "latents_mean is [-1.6"),
    "shift in sd": ("sd", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    "shift in sdxl": ("sdxl", {"shift_factor": 0.1}, "shift_factor is 0.1"),
    "mean in sd3": ("sd3", {"latents_mean": [0.5] * 8}, "latents_mean is [0.5"),
    "no shift in sd3": ("sd3", {"shift_factor": None}, "shift_factor is None"),
    "mean alone": ("sdxl", {"latents_mean": [0.1] * 4}, "latents_mean is given alone"),
    "too few": ("sdxl", {**STATISTICS, "latents_std": [1.0]}, "4 finite numbers are expected"),
    "a text": ("sdxl", {**STATISTICS, "latents_std": "abcd"}, "4 finite numbers are expected"),
    "zero": ("sdxl", {**STATISTICS, "latents_std": [1, 1, 0, 1]}, "not above 0 everywhere"),
    "no scale": ("sdxl", {"scaling_factor": 0}, "scaling_factor is 0"),
    "scale as text": ("sd", {"scaling_factor": "0.18"}, "a number above 0 is expected"),
    "null": ("sd3", {"scaling_factor": None}, "a number above 0 is expected"),
}


@pytest.mark.frameworks
@pytest.mark.parametrize("name", REFUSED)
def test_an_autoencoder_that_is_not_heeded_is_refused(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family, changes, words = REFUSED[name]
    base = Path(shutil.copytree(request.getfixturevalue(family), tmp_path / "base"))
    edit(base / "vae" / "config.json", **changes)
    with pytest.raises(InputError) as caught:
        open_base(ModelSettings(str(base), family), FAMILIES[family])
    assert words in str(caught.value)


@pytest.mark.frameworks
def test_statistics_that_change_nothing_are_taken(sd: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    edit(base / "vae" / "config.json", latents_mean=[0] * 4, latents_std=[1.0] * 4, shift_factor=0)
    assert open_base(ModelSettings(str(base)), FAMILIES["sd"]).configs["vae"]["shift_factor"] == 0
