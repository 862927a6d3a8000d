"""The Python API: a few names, imported when they are used, that do what the commands do."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import limner
from limner import cli
from limner.commands import generate
from limner.config import toml
from limner.config.schema import Config
from limner.data.source import Record, Source
from limner.errors import InputError, LimnerError


def test_a_record_is_at_hand() -> None:
    assert limner.Record is Record
    assert limner.Record("a", "a.png", "a cat").captions == ("a cat",)
    with pytest.raises(AttributeError, match="module 'limner' has no attribute 'Recrod'"):
        limner.Recrod  # noqa: B018


def test_the_public_names_are_those_of_their_modules() -> None:
    assert (limner.Config, limner.Source, limner.LimnerError) == (Config, Source, LimnerError)
    assert all(callable(getattr(limner, name)) for name in limner.__all__)
    assert set(limner.__all__) <= set(dir(limner))


def test_functions_and_command_draw_with_the_same_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = []
    monkeypatch.setattr(
        generate, "run_generate", lambda **given: settings.append(given["settings"]) or []
    )
    assert cli.main(["generate", "RUN", "a cat"]) == 0
    assert settings == [generate.DrawSettings()]
    parameters = inspect.signature(limner.generate).parameters
    for field in fields(generate.DrawSettings):
        assert parameters[field.name].default == field.default, field.name


@pytest.fixture(scope="module")
def run(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    raw = {
        "run": str(tmp_path_factory.mktemp("api") / "run"),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": tiny.SIZE},
        "adapter": {"kind": "lora", "rank": 2},
        "train": {"steps": 1, "batch_size": 2, "seed": 5},
    }
    return limner.train(toml.build(Config, raw), ["train.steps=2"])


def test_pictures_are_those_of_the_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    paths = limner.generate(
        run,
        "a red circle",
        output=tmp_path / "ours",
        grid=tmp_path / "grid.png",
        seed=3,
        count=2,
        steps=2,
        size=tiny.SIZE,
        negative_prompt="blue",
        device="cpu",
    )
    assert capsys.readouterr().out == ""
    assert [path.name for path in paths] == ["000-a-red-circle-3.png", "001-a-red-circle-4.png"]
    assert (tmp_path / "grid.png").is_file()
    line = ["generate", str(run), "a red circle", "--output", str(tmp_path / "theirs")]
    line += ["--seed=3", "--count=2", "--steps=2", f"--size={tiny.SIZE}", "--device=cpu"]
    assert cli.main([*line, "--negative-prompt=blue"]) == 0
    for path in paths:
        theirs = Image.open(tmp_path / "theirs" / path.name)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(theirs))


def test_prompts_are_one_or_several(run: Path, tmp_path: Path) -> None:
    paths = limner.generate(run, ["red", "blue"], output=tmp_path, steps=1, device="cpu")
    assert [path.name for path in paths] == ["000-red-0.png", "001-blue-0.png"]
    with pytest.raises(InputError, match="no prompt"):
        limner.generate(run, [])


def test_export_writes_the_result_again(run: Path, tmp_path: Path) -> None:
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    assert limner.export(str(run)) == run
    assert json.loads((run / "result.json").read_text()) == before


def test_export_refuses_options_that_do_not_go_together(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--private: nothing is pushed"):
        limner.export(run, private=True)
    with pytest.raises(InputError, match="--other-stage: nothing is put together"):
        limner.export(run, other_stage="other")
    with pytest.raises(InputError, match="makes pictures alone"):
        limner.export(run, combined=tmp_path / "both", other_stage="other")
    with pytest.raises(LimnerError, match="no checkpoint here"):
        limner.export(tmp_path)


def test_a_folder_of_both_stages_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--combined: the folder of both stages is not pushed"):
        limner.export(tmp_path, combined=tmp_path / "both", push="me/mine")
