"""Checkpoints of earlier builds stay readable: each goes on to the losses of its own build.

Each folder of ``data/checkpoints`` has a recipe on the bundled model and pictures, a checkpoint of
it, and the losses that the build which wrote it had afterwards. None is ever written anew: a change
of format adds a folder.
"""

import json
import shutil
from pathlib import Path

import pytest

from limner.config import toml
from limner.config.schema import Config
from limner.storage.checkpoint import list_checkpoints, open_verified
from limner.storage.run_state import RUN_STATE_VERSION
from limner.training import loop
from limner.training.resume import list_changed_settings

ROOT = Path(__file__).parents[1]
CORPUS = sorted((Path(__file__).parent / "data" / "checkpoints").iterdir())


def test_every_version_is_here() -> None:
    versions = {open_verified(list_checkpoints(one)[0]).state.version for one in CORPUS}
    assert versions == set(range(1, RUN_STATE_VERSION + 1))


@pytest.mark.frameworks
@pytest.mark.parametrize("folder", CORPUS, ids=lambda folder: folder.name)
def test_an_old_checkpoint_is_gone_on_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    [saved] = list_checkpoints(folder)
    shutil.copytree(saved, tmp_path / "run" / saved.name)
    recipe = toml.load_recipe(folder / "recipe.toml")
    config = toml.build(Config, {**toml.to_plain(recipe), "run": str(tmp_path / "run")})
    loop.run_training(config, report=lambda line: None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for name, wanted in json.loads((folder / "losses.json").read_text()).items():
        made = {str(row["step"]): row[name] for row in rows if name in row}
        assert made == pytest.approx(wanted, rel=1e-5, abs=0), name


def test_a_setting_that_came_later_had_its_default() -> None:
    """The checkpoint knows nothing of it; another value than the default is a change."""
    [folder] = [one for one in CORPUS if one.name == "v1-lora"]
    saved = open_verified(list_checkpoints(folder)[0]).state
    assert "flow" not in saved.config["objective"]
    plain = toml.to_plain(toml.load_recipe(folder / "recipe.toml"))
    now = type(saved)(**{**vars(saved), "config": plain})
    assert list_changed_settings(saved, now) == {}
    flow = {**plain["objective"], "flow": {"shift": 2.0}}
    now = type(saved)(**{**vars(saved), "config": {**plain, "objective": flow}})
    assert list(list_changed_settings(saved, now)) == ["objective.flow.shift"]
