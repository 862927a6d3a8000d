"""Fourteen tiny runs have the losses that they always had, on any machine.

The numbers lie in ``golden/losses.json``. They change only on purpose:
``GOLDEN_WRITE=1 pytest tests/test_golden.py`` writes them anew.
"""

import contextlib
import json
import os
from pathlib import Path

import pytest
from golden import runs
from haste import compiled_in_haste

import limner

RECORDED = Path(__file__).parent / "golden" / "losses.json"
FIRST, CURVE = 1e-6, 1e-5  # relative
HASTY = ("jax-sdxl-full", "jax-sdxl-lora")  # those without loops, which it makes slow
# The stock pipeline hands Kandinsky's decoder an argument that diffusers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pictures of all runs; only read them."""
    return runs.make_inputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.frameworks
@pytest.mark.parametrize("name", runs.RUNS)
def test_losses_are_the_recorded_ones(name: str, inputs: Path, tmp_path: Path) -> None:
    """The first loss to 1e-6, all losses, held-out ones too, to 1e-5."""
    settings = runs.settings_of(name, inputs, str(tmp_path / "run"))
    if name.startswith("jax"):  # previews move no loss, and take long to compile
        settings["preview.prompts"] = []
    with compiled_in_haste() if name in HASTY else contextlib.nullcontext():
        folder = limner.train(runs.write_recipe(settings, tmp_path / "recipe.toml"))
    losses = read_losses(folder / "metrics.jsonl")
    assert len(losses["loss"]) == len(set(losses["loss"])) == settings["train.steps"]
    if os.environ.get("GOLDEN_WRITE"):
        record(name, losses)
    want = json.loads(RECORDED.read_text())[name]
    assert losses["loss"][0] == pytest.approx(want["loss"][0], rel=FIRST, abs=0)
    assert losses.keys() == want.keys()
    for kind, curve in losses.items():
        assert curve == pytest.approx(want[kind], rel=CURVE, abs=0), kind


def test_every_run_is_recorded() -> None:
    """No recorded run is left out, and none is missing."""
    assert list(json.loads(RECORDED.read_text())) == list(runs.RUNS)


def read_losses(metrics: Path) -> dict[str, list[float]]:
    """The losses of ``metrics.jsonl`` in order: training's, and held-out ones where there are."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {kind: [row[kind] for row in rows if kind in row] for kind in ("loss", "held_out_loss")}
    return {kind: curve for kind, curve in found.items() if curve}


def record(name: str, losses: dict[str, list[float]]) -> None:
    """Put the losses of one run into the file."""
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    known |= {name: losses}
    ordered = {one: known[one] for one in runs.RUNS if one in known}
    RECORDED.write_text(json.dumps(ordered, indent=1) + "\n")
