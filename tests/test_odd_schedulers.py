"""A scheduler that draws nothing is refused in words, before a picture is drawn."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import limner
from limner import engines
from limner.config import toml
from limner.config.schema import Config
from limner.errors import InputError
from limner.training.setup import prepare
from limner.training.signals import Stop

pytestmark = pytest.mark.frameworks
ODD: dict[str, dict[str, Any]] = {
    "beta_end": {"beta_end": 1},
    "timestep_spacing": {"timestep_spacing": "trailling"},
    "prediction_type": {"prediction_type": None},
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_scheduler_draws_nothing(sd: Path, tmp_path: Path, name: str) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ODD[name]))
    with pytest.raises(InputError, match=f"the base's scheduler: .*{name} "):
        limner.generate(str(base), ["a"], steps=1, device="cpu", output=tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_previews_with_an_odd_scheduler_are_refused_by_check(
    sd: Path, pictures: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ODD["timestep_spacing"]))
    raw = {
        "run": str(tmp_path / "run"),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32},
        "train": {"steps": 1, "batch_size": 2},
        "preview": {"prompts": ["a"]},
    }
    config = toml.build(Config, raw)
    with (
        contextlib.closing(engines.join_processes(config.engine)) as process,
        pytest.raises(InputError, match="timestep_spacing is"),
    ):
        prepare(config, None, process, print, Stop(), read_only=True)
