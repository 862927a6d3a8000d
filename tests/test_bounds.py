"""Numbers, names and nesting from outside are bounded: one message, at once, whatever is given."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limner import cli
from limner.config import toml
from limner.config.rules import check_config
from limner.config.schema import SETTINGS, Config
from limner.data.known_pictures import read_decoded_pictures
from limner.data.order import Order
from limner.errors import InputError, IntegrityError
from limner.json_types import parse_json
from limner.storage import atomic, checkpoint
from limner.storage.run_folder import RunFolder, read_status
from limner.storage.run_state import RunState
from limner.training import push, result, sinks

DEEP = 100_000
RECIPE = 'model.base = "base"\ndata.folder = "pictures"\ntrain.steps = 2\ntrain.batch_size = 2\n'


def refuse(tmp_path: Path, *overrides: str) -> str:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        check_config(toml.load_recipe(recipe, overrides))
    assert time.process_time() - began < 5
    message = str(caught.value)
    assert len(message) < 2000
    return message


WHOLE = [
    name
    for name, one in SETTINGS.items()
    if "int" in str(one.type) and "tuple" not in str(one.type) and not name.startswith("data.sets")
]


@pytest.mark.parametrize("number", [10**12, 2**63, 10**40, -(10**12)])
@pytest.mark.parametrize("name", WHOLE)
def test_no_whole_number_is_without_end(name: str, number: int, tmp_path: Path) -> None:
    if name == "train.seed":
        number *= 10**9
    sections = {"data.buckets": "{}", "objective.timestep_bias": "{}", "objective.flow": "{}"}
    more = [f"{section}={{}}" for section in sections if name.startswith(f"{section}.")]
    message = refuse(tmp_path, *more, f"{name}={number}")
    assert name.rpartition(".")[0] in message


@pytest.mark.parametrize(
    "override",
    [
        'data.sets=[{folder="a", repeats=1000000000000}]',
        "data.buckets={resolutions=[512, 1000000000000]}",
        "train.epochs=1e300",
        "adapter.rank=1000000000",
        "data.caption_chunks=1000000000",
        "data.crop_variants=1000000000",
        "preview.every_epochs=1e18",
    ],
)
def test_absurd_counts_are_refused(override: str, tmp_path: Path) -> None:
    name = override.partition("=")[0]
    beside = {"data.sets": ["data.folder=none"], "adapter.rank": ["adapter.kind=lora"]}
    more = beside.get(name, [])
    assert name in refuse(tmp_path, *more, override)


def test_an_epoch_has_an_end() -> None:
    with pytest.raises(InputError, match="would have 200,000,000 examples, 100,000,000 are"):
        Order(0, 1, [(8, 8)] * 20_000, [0] * 20_000, [10_000], [], with_buckets=False)


TEXTS = [name for name, one in SETTINGS.items() if one.declaration.path and "sets" not in name]


@pytest.mark.parametrize("name", [*TEXTS, "preview.prompts[0]", "log.folder", "model.variant"])
def test_no_name_holds_a_nul(name: str, tmp_path: Path) -> None:
    plain, _, index = name.partition("[")
    value = ["a\0b"] if index else "a\0b"
    message = refuse(tmp_path, f"{plain}={json.dumps(value)}")
    assert name in message and "NUL" in message


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", ["x" * 300, "é" * 200, "a/" * 3000, "b/" + "x" * 256 + "/c"])
def test_no_name_is_longer_than_a_file_s(name: str, text: str, tmp_path: Path) -> None:
    message = refuse(tmp_path, f"{name}={text}")
    assert name in message and "no place for a file" in message


@pytest.mark.parametrize(
    "override",
    [
        f"data.size={'[' * DEEP}",
        f"data.size={'[' * DEEP}{']' * DEEP}",
        f"run={'{a=' * DEEP}1{'}' * DEEP}",
        f"train.steps={'1' * 5000}",
        f"{'a.' * DEEP}b=1",
        f"{'x' * 10**6}=1",
        f"run.{'x' * 10**6}=1",
        f"data.flip={'x' * 10**6}",
        "x" * 10**6,
    ],
)
def test_what_an_override_may_be(override: str, tmp_path: Path) -> None:
    refuse(tmp_path, override)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


RECIPES: dict[str, Callable[[Path], Any]] = {
    "not a TOML file: nested too deep": lambda path: path.write_text(f"x = {'[' * DEEP}"),
    "not a TOML file: nested": lambda path: path.write_text(f"x = {'{a=' * DEEP}"),
    "not a regular file": make_pipe,
    "Is a directory": Path.mkdir,
    "more than 1,000,000 characters": lambda path: path.write_text("# " + "x" * 2_000_000),
    "not a TOML file: it is not UTF-8": lambda path: path.write_text("x=1", encoding="utf-16"),
    "as UTF-16 does; save it as UTF-8": lambda path: path.write_text("x=1", encoding="utf-16-le"),
    "No such file": lambda path: None,
}


@pytest.mark.parametrize("wanted", RECIPES)
def test_what_a_recipe_may_be(
    wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RECIPES[wanted](tmp_path / "recipe.toml")
    assert cli.main(["show", str(tmp_path / "recipe.toml")]) == 2
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("train.steps = 2", encoding="utf-8-sig")
    assert toml.load_recipe(recipe).train.steps == 2


@pytest.mark.parametrize("word", ["nan", "inf", "-1.0", "1e308"])
def test_guidance_has_an_end(word: str, tmp_path: Path) -> None:
    said = refuse(tmp_path, f"preview.guidance_scale={word}")
    assert "preview.guidance_scale" in said


@pytest.mark.parametrize(
    "words", [["check", "--json"], ["check", "--sheet"], ["bench", "--json"], ["demo", "--output"]]
)
def test_files_that_cannot_be_written_are_refused_at_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the recipe's base is looked for."""
    command, option = words
    folder, recipe = tmp_path / "a.png", tmp_path / "recipe.toml"
    folder.mkdir()
    recipe.touch()
    given = [] if command == "demo" else [str(recipe)]
    assert cli.main([command, *given, option, str(folder)]) == 2
    assert f"{option}: {folder} is a folder; give" in capsys.readouterr().err
    if option != "--json":
        assert cli.main([command, *given, option, str(tmp_path / "b.psd")]) == 2
        assert "call it b.png" in capsys.readouterr().err
    recipe.write_text("")
    assert cli.main([command, *given, option, str(recipe / "x.png")]) == 2
    assert f"{option}: {recipe} is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\0b.toml", "x" * 300 + ".toml", "x/" * 3000 + "y.toml"])
def test_what_a_recipe_may_be_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith("limner: ") and said.count("\n") == 1


NESTED = ["[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP]


@pytest.mark.parametrize("text", NESTED)
def test_files_that_are_nested_too_deep_are_damaged(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nested too deep|Expecting"):
        parse_json(text)
    folder = RunFolder(tmp_path)
    for file in (folder.result, folder.pushed, folder.status, tmp_path / "MANIFEST.json"):
        file.write_text(text)
    with pytest.raises(IntegrityError, match=r"result\.json is missing or damaged"):
        result.read_result(tmp_path)
    assert not result.is_result_whole(tmp_path)
    assert not push.is_pushed(tmp_path, "me/model")
    assert read_status(folder) is None
    with pytest.raises(IntegrityError, match="cannot be trusted"):
        atomic.verify(tmp_path)
    folder.metrics.write_text(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n')
    assert [row["step"] for row in sinks.read_metrics(folder.metrics)] == [1, 2]
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"state\.json: missing or not what was written"):
        checkpoint.open_verified(tmp_path)
    lines: list[str] = []
    (tmp_path / "known-pictures.json").write_text(text)
    assert read_decoded_pictures(tmp_path / "known-pictures.json", lines.append) == {}
    assert len(lines) == 1 and "is damaged and is ignored" in lines[0]


@pytest.mark.parametrize("content", ["{}", '{"pictures": 3, "digest": 1}', "[]", "\udcff", '"x"'])
def test_a_shared_cache_file_that_is_broken_is_ignored_and_said(
    content: str, tmp_path: Path
) -> None:
    file = tmp_path / "known-pictures.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    lines: list[str] = []
    assert read_decoded_pictures(file, lines.append) == {}
    assert len(lines) == ("digest" not in content)


ENTRY = {"size": 2, "xxh3_128": "0" * 32}


@pytest.mark.parametrize(
    "files",
    [
        {},
        [],
        ["a"],
        "a",
        {"a": 3},
        {"a": {}},
        {"a": {"size": "2", "xxh3_128": "x"}},
        {"a": {"size": 2, "xxh3_128": 3}},
        {"a\0b": ENTRY},
        {"/etc/hostname": ENTRY},
        {"../a": ENTRY},
        {"a/../../b": ENTRY},
        {"a\\b": ENTRY},
        {"": ENTRY},
        {"x" * 5000: ENTRY},
        {"state.json": {**ENTRY, "size": True}},
    ],
)
def test_a_manifest_of_right_digest_and_wrong_content_is_damaged(
    files: Any, tmp_path: Path
) -> None:
    manifest = {"files": files, "digest": atomic.digest_json(files)}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"MANIFEST\.json: missing or unreadable"):
        atomic.verify(tmp_path)
    record = {"step": 1, "kind": "lora", "files": files}
    record["digest"] = atomic.digest_json(list(record.values()))
    (tmp_path / "result.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="there is no whole result"):
        result.read_result(tmp_path)


STATE = {
    **dict.fromkeys(("seed", "batch_size", "world_size", "records"), 1),
    **dict.fromkeys(("data_digest", "base_digest", "random_digest", "numpy_version"), "x"),
    "config": {"data": {}, "model": {}, "checkpoint": {}},
    "mixture": [[1, None]],
    "version": 1,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", 3),
        ("config", {"data": {}}),
        ("config", {"data": 1, "model": {}, "checkpoint": {}}),
        ("seed", "1"),
        ("seed", True),
        ("batch_size", None),
        ("mixture", {}),
        ("numpy_version", 2),
        ("unlogged_losses", 3),
        ("unlogged_losses", ["x"]),
    ],
)
def test_a_state_of_other_types_is_damaged(name: str, value: Any) -> None:
    RunState.from_plain(STATE, Path("checkpoint-1"))
    with pytest.raises(IntegrityError, match=rf"state\.json: .*{name}.* is of another type"):
        RunState.from_plain({**STATE, name: value}, Path("checkpoint-1"))


@pytest.mark.parametrize("step", ['"1"', "-1", "1.5", "true", "null", "[]"])
def test_a_step_is_a_whole_number(step: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(f'{{"step": {step}}}')
    with pytest.raises(IntegrityError, match=r"state\.json"):
        checkpoint.open_verified(tmp_path)


def test_config() -> None:
    """What is asked for here is allowed."""
    raw = {
        "model": {"base": "b"},
        "data": {"folder": "p"},
        "train": {"steps": 10**9, "batch_size": 9},
    }
    check_config(toml.build(Config, raw))
