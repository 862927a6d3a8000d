"""Every exit code from the command line, by what makes it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import limner
from limner import cli
from limner.errors import InputError, Stopped
from limner.guard import run_guarded
from limner.storage import atomic
from limner.storage.run_folder import RunFolder, read_status
from limner.training.status import keep_status

pytestmark = pytest.mark.frameworks


@pytest.fixture
def recipe(base: Path, pictures: Path, tmp_path: Path) -> Path:
    text = {
        "run": str(tmp_path / "run"),
        "model.base": str(base),
        "data.folder": str(pictures),
        "data.size": 32,
        "train.steps": 2,
        "train.batch_size": 2,
        "adapter.kind": "lora",
        "engine.device": "cpu",
    }
    file = tmp_path / "recipe.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in text.items()))
    return file


def end(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The exit code of a command, and its messages."""
    capsys.readouterr()
    code = cli.main(list(words))
    said = [line for line in capsys.readouterr().err.split("\n") if line.startswith("limner: ")]
    assert len(said) == (code != 0), said
    return code, "".join(said)


def test_0_and_2_and_4(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(capsys, "show", str(recipe)) == (0, "")
    code, said = end(capsys, "train", str(recipe), "train.stepz=3")
    assert code == 2 and "train.stepz: no such setting; did you mean train.steps?" in said
    overrides = ("optim.learning_rate=1e30", "train.steps=9", "optim.max_grad_norm=1e30")
    code, said = end(capsys, "train", str(recipe), *overrides)
    assert code == 4 and "is not a finite number" in said


def test_5(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    code, said = end(capsys, "train", str(recipe), f"run={tmp_path / 'file' / 'run'}")
    assert code == 5 and f"{tmp_path / 'file' / 'run'}: Not a directory" in said


def test_6(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{probe.getsockname()[1]}"
        os.environ["HF_TOKEN"] = "hf_" + "a" * 34
        code, said = end(capsys, "train", str(recipe), "export.hub=me/model")
    assert code == 6 and "me/model: the Hub cannot be reached" in said
    assert os.environ["HF_TOKEN"] not in said


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a digest": lambda one: (one / "MANIFEST.json").write_text('{"files": {}, "digest": "0"}'),
    "no file": lambda one: (one / "state.json").unlink(),
    "a flip": lambda one: (one / "state.json").write_bytes(b"x"),
    "nested": lambda one: (one / "MANIFEST.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_7(damage: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All checkpoints are damaged: nothing is begun afresh in their place."""
    for step in (1, 2):
        with atomic.write_folder(tmp_path / "run" / f"checkpoint-{step}") as folder:
            (folder / "state.json").write_text(f'{{"step": {step}}}')
        DAMAGES[damage](tmp_path / "run" / f"checkpoint-{step}")
    code, said = end(capsys, "train", str(recipe))
    assert code == 7 and "every checkpoint is damaged, from checkpoint-2 to checkpoint-1" in said
    code, said = end(capsys, "train", str(recipe), "checkpoint.resume=checkpoint-1")
    assert code == 7 and "checkpoint-1" in said
    assert sorted(p.name for p in (tmp_path / "run").glob("c*")) == ["checkpoint-1", "checkpoint-2"]


def test_8(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with atomic.lock(tmp_path / "run"):
        code, said = end(capsys, "train", str(recipe))
    assert code == 8 and f"another run is writing here (process {os.getpid()} on " in said


@pytest.mark.parametrize("after", [0.0, pytest.param(0.6, marks=pytest.mark.soak)])
def test_3(after: float, recipe: Path, tmp_path: Path) -> None:
    """SIGTERM while the frameworks are imported, and a moment later."""
    process = subprocess.Popen(
        [sys.executable, "-m", "limner", "train", str(recipe), "train.steps=100000"],
        env={**os.environ, "PYTHONPATH": str(Path(limner.__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not imports(process, "libtorch"):
        # Not a spinning core: that one is for what is imported.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(after)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    said = ""
    while "limner: stopped" not in said and (line := process.stderr.readline()):
        said += line
    # Python takes a second to end: nothing more is to be stopped.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    said += process.communicate(timeout=20)[1]
    assert process.returncode == 3, said
    assert "limner: stopped" in said and "Traceback" not in said


@pytest.mark.parametrize("kind", [RuntimeError, ModuleNotFoundError, InputError])
def test_a_stop_that_a_library_makes_an_error_of_its_own_of(
    kind: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As diffusers and transformers do with whatever ends one of their imports."""
    folder = RunFolder(tmp_path)

    def import_something() -> None:
        with keep_status(folder, 0, 9, writes=True):
            try:
                raise Stopped("stopped before training began")
            except Stopped as error:
                raise kind("Failed to import diffusers.loaders.peft") from error

    assert run_guarded(import_something) == 3
    assert capsys.readouterr().err == "limner: stopped before training began\n"
    status = read_status(folder)
    assert status is not None and status.state == "stopped"


def test_a_message_is_printed_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse() -> None:
        raise InputError("\x1b[2Ja/\u202egnp.\rb: not a file\nsecond line, é")

    assert run_guarded(refuse) == 2
    assert capsys.readouterr().err == (
        "limner: \\x1b[2Ja/\\u202egnp.\\rb: not a file\nsecond line, é\n"
    )


def imports(process: subprocess.Popen[str], library: str) -> bool:
    """Whether a process has mapped a library."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False
