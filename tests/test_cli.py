"""The command line: words and options in any order, the user's home, what is not installed, and
what an installed package brings along."""

import re
import shlex
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import limner
from limner import cli
from limner.commands import bench, export, generate
from limner.config import toml
from limner.errors import InputError
from limner.training import signals

ROOT = Path(__file__).parents[1]
GOOD = 'run = "r"\n[model]\nbase = "b"\n[data]\nfolder = "f"\n[train]\nsteps = 1\nbatch_size = 1\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a recipe, and an empty folder for its base and its pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    (tmp_path / "r.toml").write_text(GOOD.replace('"b"', '"f"'))
    return tmp_path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the verbs hand on."""
    calls: list[Any] = []
    monkeypatch.setattr(generate, "run_generate", lambda **settings: calls.append(settings) or [])
    monkeypatch.setattr(bench, "run_bench", lambda cfg, **settings: calls.append((cfg, settings)))
    monkeypatch.setattr(export, "export_run", lambda run, **settings: calls.append((run, settings)))
    return calls


@pytest.mark.parametrize(
    "line",
    [
        ["RUN", "a", "b", "--seed", "3"],
        ["RUN", "--seed", "3", "a", "b"],
        ["--seed", "3", "RUN", "a", "b"],
        ["RUN", "a", "--seed", "3", "b"],
        ["--seed=3", "RUN", "--count", "1", "a", "--steps", "25", "b"],
    ],
)
def test_prompts_and_options_mix(called: list[Any], line: list[str]) -> None:
    assert cli.main(["generate", *line]) == 0
    [settings] = called
    assert (settings["model"], settings["prompts"], settings["settings"].seed) == (
        "RUN",
        ["a", "b"],
        3,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "RUN", "red"], "stopped; the pictures of whole batches are written. Run"),
        (["export", "RUN"], "stopped; run the same command again"),
        (["check", "r.toml"], "stopped; run the same command again"),
        (["bench", "r.toml"], "stopped; run the same command again"),
        (["train", "r.toml"], "stopped before training began; what was encoded is kept"),
    ],
)
@pytest.mark.parametrize("number", signals.NUMBERS)
def test_a_signal_ends_a_command_with_its_words(
    words: list[str],
    said: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {one: signal.getsignal(one) for one in signals.NUMBERS}
    # nohup lets a closed terminal be ignored.
    signal.signal(number, signal.SIG_DFL)
    command = replace(cli.COMMANDS[words[0]], run=lambda arguments: signal.raise_signal(number))
    monkeypatch.setitem(cli.COMMANDS, words[0], command)
    try:
        assert cli.main(words) == 3
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert capsys.readouterr().err.startswith(f"limner: {said}")


def test_settings_of_an_adapter_ask_for_its_kind(recipe: Path) -> None:
    for words in (["adapter.rank=4"], ["adapter.rank=4", "adapter.alpha=none"]):
        with pytest.raises(InputError, match=r"adapter: rank.* is given without adapter\.kind"):
            toml.load_recipe(recipe, words)
    assert toml.load_recipe(recipe, ["adapter.rank=4", "adapter.kind=lora"]).adapter.rank == 4
    assert toml.load_recipe(recipe).adapter.kind == "full"


@pytest.mark.parametrize("order", ["r --steps 5 o", "--steps 5 r o", "r o --steps 5"])
def test_overrides_and_options_mix(called: list[Any], recipe: Path, order: str) -> None:
    words = {"r": str(recipe), "o": "train.batch_size=2"}
    assert cli.main(["bench", *(words.get(word, word) for word in order.split())]) == 0
    [(cfg, settings)] = called
    assert cfg.train.batch_size == 2 and settings["steps"] == 5


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "RUN", "--sed", "3", "a"],
        ["export", "RUN", "more"],
        ["train", "r.toml", "--steps", "5"],
        ["demo", "x"],
    ],
)
def test_an_unknown_option_or_word_is_still_refused(
    called: list[Any], capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line)
    assert "unrecognized arguments: " in capsys.readouterr().err and not called


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "RUN", "a cat", "--partner", "OTHER"],
        ["generate", "--partner=OTHER", "RUN", "a cat"],
        ["export", "RUN", "--combined", "BOTH", "--partner", "OTHER"],
        ["export", "--partner"],
    ],
)
def test_an_old_option_is_refused_with_its_new_name(
    called: list[Any], capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line)
    assert capsys.readouterr().err.endswith("error: --partner: renamed to --other-stage\n")
    assert not called
    with pytest.raises(SystemExit, match="0"):
        cli.main([line[0], "--help"])
    assert "--partner" not in capsys.readouterr().out


def test_private_needs_push(called: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "RUN", "--private"]) == 2 and not called
    assert (
        capsys.readouterr().err
        == "limner: --private: nothing is pushed without --push REPOSITORY; give both, or neither\n"
    )
    assert cli.main(["export", "RUN", "--private", "--push", "me/it"]) == 0
    assert called == [(Path("RUN"), {"push_to": "me/it", "private": True})]


def test_the_users_home_is_meant_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: list[Any]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text(GOOD.replace('"f"', '"~/pictures"'))
    paths = [
        "run",
        "model.base",
        "model.cache_dir",
        "data.cache",
        "data.cache_dir",
        "data.hub_files",
        "checkpoint.resume",
    ]
    cfg = toml.load_recipe(
        Path("~/mine.toml"), [*(f"{name}=~/{name}" for name in paths), "data.caption=~/text"]
    )
    assert [cfg[name] for name in paths] == [str(tmp_path / name) for name in paths]
    assert cfg.data.folder == str(tmp_path / "pictures") and cfg.data.caption == "~/text"
    assert toml.load_recipe(Path("~/mine.toml"), ["data.cache=~"]).data.cache == str(tmp_path)
    assert (
        cli.main(["bench", "~/mine.toml", "--json=~/figures.json"]) == 0
        and called[0][1]["json_file"] == tmp_path / "figures.json"
    )


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("torch", "torch"),
        ("peft", "torch"),
        ("jax", "jax"),
        ("optax", "jax"),
        ("datasets", "hub"),
        ("bitsandbytes", "bits"),
        ("comet_ml", "comet"),
        ("numpy", ""),
        ("pyvips", ""),
        ("imagehash", ""),
        ("PIL", ""),
        ("yaml", ""),
        ("torchx", None),
    ],
)
def test_a_missing_package_is_one_message(missing: str, extra: str | None) -> None:
    """In a process of its own: here they are all imported already."""
    script = (
        f"import sys; from limner.guard import run_guarded; sys.modules[{missing!r}] = None; "
        f"sys.exit(run_guarded(lambda: __import__({missing!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    if extra is None:
        assert done.returncode == 1 and "Traceback" in done.stderr
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    whose = f"limner[{extra}]" if extra else "limner"
    assert done.returncode == 2, done.stderr
    message, _, command = done.stderr.partition("pip install ")
    assert message == f"limner: {missing} is missing. Install what {whose} needs: "
    versions = [set(re.split("(?=[<>])|,", one)) for one in shlex.split(command)]
    assert versions == [set(re.split("(?=[<>])|,", one)) for one in needed]


BROKEN = """
import sys
from limner.guard import run_guarded
sys.path.insert(0, {folder!r})
source = '''{source}'''
sys.exit(run_guarded(lambda: exec(compile(source, "here", "exec"), {{"__name__": {module!r}}})))
"""


def run_broken(source: str, module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a module's source ends in, beside packages that lie in a folder."""
    script = BROKEN.format(source=source, module=module, folder=str(folder))
    environment = {"PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", script]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("package", "install", "error", "source"),
    [
        ("torch", "torch", "OSError('libx.so: cannot open')", "import torch"),
        ("peft", "peft", "ImportError('libx.so: cannot open\\nfile')", "import peft"),
        ("yaml", "pyyaml", "AttributeError('libx.so: cannot open')", "import yaml"),
        # As transformers and diffusers do, which import their parts when they are asked for them.
        (
            *("tqdm", "tqdm", "ImportError('libx.so: cannot open')"),
            "try:\n  import tqdm\nexcept ImportError as e:\n  raise RuntimeError('tqdm?') from e",
        ),
    ],
)
def test_a_package_that_cannot_be_imported_is_one_message(
    package: str, install: str, error: str, source: str, tmp_path: Path
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {error}")
    done = run_broken(source, "limner.engines.torch.engine", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"limner: {package} is installed, but cannot be imported: libx.so: cannot open. Install it "
        f"again: pip install --force-reinstall {install}\n",
    )


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("raise ImportError('mine')", "limner.engines.torch.engine"),
        ("from xxhash import none_of_its_names", "limner.storage.atomic"),
        ("import xxhash; xxhash.xxh3_128('mine', 'x')", "limner.storage.atomic"),
        ("import json; json.loads('mine')", "limner.config.toml"),
    ],
)
def test_a_defect_of_the_program_keeps_its_traceback(
    source: str, module: str, tmp_path: Path
) -> None:
    done = run_broken(source, module, tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")


def test_a_current_folder_that_is_gone_is_told_before_a_framework_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(GOOD)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["train", recipe], ["check", recipe], ["generate", tmp_path, "red"], ["demo"]):
        assert cli.main([str(word) for word in words]) == 2
        assert capsys.readouterr().err == (
            "limner: the current folder cannot be found (No such file or directory): it was "
            "removed, or may not be entered. Change to another folder, e.g. with `cd`, and run the "
            "command again.\n"
        )


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["generate", "", "red"], "model"),
        (["generate", "run", "red", "--output", ""], "--output"),
        (["generate", "run", "red", "--grid="], "--grid"),
        (["generate", "run", "red", "--base="], "--base"),
        (["export", "run", "--other-stage="], "--other-stage"),
        (["export", "run", "--combined", ""], "--combined"),
        (["check", "r.toml", "--json="], "--json"),
        (["demo", "--folder", ""], "--folder"),
        (["train", ""], "recipe"),
    ],
)
def test_an_option_s_empty_text_is_no_path(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert f"argument {option}: '' is no path; give one" in capsys.readouterr().err


LINK = "is a link to nowhere, which is not there. Make that folder, remove the link, or choose"


@pytest.mark.parametrize("command", ["train", "check", "encode"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.cache=r.toml", "r.toml: Not a directory"),
        ("data.cache=r.toml/cache", "r.toml/cache: Not a directory"),
        ("data.cache=link", f"link: it {LINK}"),
        ("run=link", f"link: it {LINK}"),
        ("run=link/run", f"link/run: link {LINK}"),
        ("run=r.toml", "r.toml: Not a directory"),
    ],
)
def test_a_folder_that_cannot_be_made_is_told_before_a_framework_is_imported(
    command: str,
    override: str,
    message: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / "link").symlink_to("nowhere")
    assert cli.main([command, "r.toml", override]) == 5
    said = capsys.readouterr().err
    assert said.startswith(f"limner: {message}") and said.count("\n") == 1


def test_pictures_are_not_drawn_for_a_link_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    for option in ("--output=link", "--output=link/pictures", "--grid=link/grid.png"):
        assert cli.main(["generate", "model", "red", option]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"limner: {option.partition('=')[0]}: link") and LINK in said


@pytest.mark.parametrize("command", ["train", "check", "encode"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.folder=nowhere", "data.folder: nowhere is not there; give a folder"),
        ('data.sets=[{folder="f"},{folder="r.toml"}]', "data.folder: r.toml is not a folder"),
        ("model.base=f/none", "model.base: f/none: no such folder, though there is"),
        ("model.base=nothing", "model.base: nothing: no such folder, and not a name on the Hub"),
    ],
)
def test_a_place_that_is_not_there_is_told_before_a_framework_is_imported(
    command: str,
    override: str,
    message: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """None can be imported among the quick tests."""
    words = ["data.folder=none", override] if "sets" in override else [override]
    assert cli.main([command, "r.toml", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"limner: {message}") and said.count("\n") == 1


@pytest.mark.parametrize("name", ["model_index.json", "unet", "pytorch_lora_weights.safetensors"])
def test_a_folder_with_somebody_s_model_is_no_run_s(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result would replace it: bad input never loses data."""
    (place / name).write_text("mine")
    assert cli.main(["train", "r.toml", "run=."]) == 2
    assert capsys.readouterr().err == (
        f"limner: run: . holds {name}, which no run has written there, and a result would replace "
        "it. Choose another folder.\n"
    )
    assert (place / name).read_text() == "mine"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"limner {limner.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train"], "limner train: error: the following arguments are required: recipe\n"),
        (["generate"], "limner generate: error: the following arguments are required: model\n"),
        (
            ["train", "r.toml", "--data.folder=x"],
            "limner: error: unrecognized arguments: --data.folder=x. A setting is written without "
            "dashes: data.folder=x\n",
        ),
        (
            ["check", "r.toml", "--data.folder", "x"],
            "limner: error: unrecognized arguments: --data.folder. A setting is written without "
            "dashes: data.folder=VALUE\n",
        ),
        (["show", "r.toml", "--fast"], "limner: error: unrecognized arguments: --fast\n"),
        (["export", "RUN", "more"], "limner: error: unrecognized arguments: more\n"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str], called: list[Any]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(line)
    assert capsys.readouterr().err.endswith(message) and not called


def test_the_bare_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert all(f"\n    {name} " in said for name in cli.COMMANDS)


def test_own_recipes_are_found_from_anywhere_and_never_instead_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert toml.load_recipe(Path("recipes/sd15-lora.toml")).run == "runs/sd15-lora"
    for other in ("sd15-lora.toml", "my/recipes/sd15-lora.toml", "recipes/none.toml"):
        with pytest.raises(limner.errors.InputError, match="No such file"):
            toml.load_recipe(Path(other))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sd15-lora.toml").write_text(GOOD)
    assert toml.load_recipe(Path("recipes/sd15-lora.toml")).run == "r"
    monkeypatch.setattr(
        toml, "__file__", str(tmp_path / "site" / "limner" / "config" / "toml.py")
    )  # an installed package has them inside
    (tmp_path / "site" / "limner" / "recipes").mkdir(parents=True)
    (tmp_path / "site" / "limner" / "recipes" / "other.toml").write_text(GOOD)
    assert toml.load_recipe(Path("recipes/other.toml")).run == "r"


def test_the_package_brings_all_its_parts_along() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    source, packages = ROOT / "src", known["packages"]
    parts = {".".join(p.parent.relative_to(source).parts) for p in source.rglob("__init__.py")}
    assert (
        set(packages) == parts | {"limner.recipes"}
        and known["package-dir"]["limner.recipes"] == "recipes"
    )
    assert known["package-data"].pop("limner") == ["py.typed"]  # type checkers read the annotations
    assert (source / "limner" / "py.typed").is_file()
    folders = {"limner.bundled": source / "limner" / "bundled", "limner.recipes": ROOT / "recipes"}
    for package, folder in folders.items():
        wanted = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        taken = {
            p
            for pattern in known["package-data"][package]
            for p in folder.glob(f"{pattern}/*" if pattern.endswith("**") else pattern)
            if p.is_file()
        }
        assert taken == wanted and wanted


@pytest.mark.parametrize(
    ("redirection", "code"),
    [("| true", 0), (">&-", 0), ("2>&-", 0), ("> /dev/full", 5)],
)
def test_output_that_cannot_be_written(redirection: str, code: int, recipe: Path) -> None:
    """A reader that has gone is nobody's fault; a disk that is full is told."""
    bundled = ROOT / "src/limner/bundled"
    words = [sys.executable, "-m", "limner", "show", recipe, f"model.base={bundled}/model"]
    limner = shlex.join(map(str, [*words, f"data.folder={bundled}/pictures"]))
    command = ["bash", "-o", "pipefail", "-c", f"{limner} {redirection}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent)
    assert done.returncode == code and "Traceback" not in done.stderr
    wanted = "limner: the output could not be written: No space left on device"
    assert done.stderr.strip() == (wanted if code else "")
