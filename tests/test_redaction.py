"""No token or password is in what is written: files of a run, messages of a command."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from limner import cli
from limner.compat import diffusers
from limner.config import toml
from limner.config.schema import Config
from limner.data.contact_sheet import draw_contact_sheet
from limner.errors import InputError
from limner.guard import run_guarded
from limner.progress import print_line
from limner.redaction import redact_text
from limner.storage.run_folder import RunFolder, RunStatus, write_status
from limner.training import loop

TOKEN = "hf_" + "canaryToken0" * 3
PASSWORD = "s3cret-of-the-mirror"
KEY = "0123456789abcdef" * 2
SECRETS = (TOKEN, PASSWORD, KEY)


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{PASSWORD}@127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"a {TOKEN}.", "a [redacted]."),
        (f"{TOKEN}{TOKEN[3:]}", "[redacted]"),
        ("hf_short and hf_hub", "hf_short and hf_hub"),
        (f"no {PASSWORD} here", "no [redacted] here"),
        ("https://a:b@c/d https://a@c/d", "https://a:[redacted]@c/d https://a@c/d"),
        ("http://host:80/a@b c://d", "http://host:80/a@b c://d"),
        (f"{KEY}\n{KEY}", "[redacted]\n[redacted]"),
        ("wandb_v1_" + "x" * 30, "[redacted]"),
        ("https://a:b@c@d/e@f", "https://a:[redacted]@d/e@f"),
        ("hf_oauth_" + "eyJ.x-Y_" * 4, "[redacted]"),
        ("api_org_" + "x" * 34, "[redacted]"),
        ("https://a/b?x=1&token=c0ffee&y", "https://a/b?x=1&token=[redacted]&y"),
        ("Bearer " + "x" * 30, "Bearer [redacted]"),
        ("a Bearer standing with a flag", "a Bearer standing with a flag"),
        (f"https://{TOKEN}@c/d", "https://[redacted]@c/d"),
        ("https://c0ffee0123456789abcdef@c/d", "https://[redacted]@c/d"),
        ("https://c0ffee0123456789abcdef:@c/d", "https://[redacted]:@c/d"),
        (
            "https://c0ffee0123456789abcdef:x-oauth-basic@c/d",
            "https://[redacted]:[redacted]@c/d",
        ),
        (f"git+https://ghp_{'x1' * 18}@c/d@v1", "git+https://[redacted]@c/d@v1"),
        ("https://the-name-of-a-painter@c/d", "https://the-name-of-a-painter@c/d"),
        ("https://c0ffee0123456789abcdef.org/d@e", "https://c0ffee0123456789abcdef.org/d@e"),
        (f"a github_pat_{'x1_' * 8}, glpat-{'x' * 20}", "a [redacted], [redacted]"),
        (f"AIza{'x' * 35} sk-{'x' * 40}", "[redacted] [redacted]"),
        ("a task-of-the-day, sk-i, ghp_x", "a task-of-the-day, sk-i, ghp_x"),
        (
            "https://a/b?access_token=x#access_token=y",
            "https://a/b?access_token=[redacted]#access_token=[redacted]",
        ),
        ("a?sv=1&sig=c0%2Bf=&se=2", "a?sv=1&sig=[redacted]&se=2"),
        ("a?X-Amz-Signature=c0f&x=1", "a?X-Amz-Signature=[redacted]&x=1"),
        ("a?Signature=c0f&amp;api_key=1", "a?Signature=[redacted]&amp;api_key=[redacted]"),
        (
            "a?apikey=1&api-key=2&apiKey=3",
            "a?apikey=[redacted]&api-key=[redacted]&apiKey=[redacted]",
        ),
        ("a?client_secret=1&accessToken=2", "a?client_secret=[redacted]&accessToken=[redacted]"),
        (f"a?key={'x1' * 16}&key=height", "a?key=[redacted]&key=height"),
        ("a?design=1&monkey=2&tokens=3&size=4", "a?design=1&monkey=2&tokens=3&size=4"),
        ("https://a:pa/ss@c/d", "https://a:[redacted]@c/d"),
        ("https://a:p/a/s@s@c", "https://a:[redacted]@c"),
        ("https://a:p ss@c, https://a:1a/2@c", "https://a:[redacted]@c, https://a:[redacted]@c"),
        ("http://h:80/a@b http://[::1]:80/a@b", "http://h:80/a@b http://[::1]:80/a@b"),
        ("at http://h:80, ask a@b", "at http://h:80, ask a@b"),
        ("at http://h:80/x, http://h: a@b", "at http://h:80/x, http://h: a@b"),
        ("https://a:p ss@c or a@b", "https://a:[redacted]@c or a@b"),
        ("http://h:8080?x=a/b@c", "http://h:8080?x=a/b@c"),
        ("a word", "a word"),
    ],
)
def test_texts(text: str, wanted: str) -> None:
    assert redact_text(text) == wanted


def test_variables_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_TOKEN", "AWS_SECRET_ACCESS_KEY", "SERVICE_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert redact_text(f"x value-of-{name} y") == "x [redacted] y"
    harmless = ("TOKENIZER_NAME", "MAX_TOKENS", "SECRETARY", "PASSWORDLESS_LOGIN", "MY_API_KEYS")
    places = ("HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "PASSWORD_STORE_DIR")
    for name in (*harmless, *places):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert redact_text(f"value-of-{name}") == f"value-of-{name}"


@pytest.mark.parametrize("variable", ["DB_PASSWORD", "HF_TOKEN", "MY_SECRET"])
@pytest.mark.parametrize(
    "raw",
    [
        {"model": {"base": "postgres/model"}},
        {"data": {"folder": "/data/postgres"}},
        {"run": "postgres"},
        {"export": {"hub": "me/postgres"}},
        {"model": {"revision": "postgres"}},
        {"adapter": {"kind": "lora", "targets": ["to_q", "postgres"]}},
    ],
)
def test_what_is_read_back_is_the_same_whatever_the_environment_holds(
    raw: dict[str, Any], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is no secret because a variable has the same value: a run would not be found again, or
    not go on."""
    config = toml.build(Config, raw)
    without = toml.to_saved(config)
    monkeypatch.setenv(variable, "postgres")
    assert toml.to_saved(config) == without == toml.to_plain(config)


def test_names_that_are_secrets_by_their_form_are_not_kept() -> None:
    raw = {
        "model": {"base": f"https://me:{PASSWORD}@hub/model", "cache_dir": f"/{TOKEN}/cache"},
        "preview": {"prompts": [f"a {KEY}", f"a {TOKEN}"]},
    }
    saved = toml.to_saved(toml.build(Config, raw))
    assert saved["model"]["base"] == "https://me:[redacted]@hub/model"
    assert saved["model"]["cache_dir"] == "/[redacted]/cache"
    assert saved["preview"]["prompts"] == ["a [redacted]"] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["show", TOKEN],
        ["show", "recipes/sd15-lora.toml", f"data.size={TOKEN}"],
        ["show", "recipes/sd15-lora.toml", f"{TOKEN}=1"],
        ["show", "recipes/sd15-lora.toml", f"data.size=https://me:{PASSWORD}@host"],
        ["show", "recipes/sd15-lora.toml", f"--hub-token={TOKEN}"],
        ["show", "recipes/sd15-lora.toml", f"data.folder={KEY}"],
        pytest.param(["generate", f"folder/{TOKEN}", "a cat"], marks=pytest.mark.frameworks),
        ["export", TOKEN],
        ["train", "recipes/sd15-lora.toml", f"model.base=/{TOKEN}/{KEY}", "data.folder=/nowhere"],
    ],
)
def test_messages_of_commands(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    try:
        cli.main(words)
    except SystemExit as end:
        assert end.code == 2
    said = "".join(capfd.readouterr())
    assert "[redacted]" in said and not any(secret in said for secret in SECRETS)


def test_messages_of_scripts(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        diffusers.main("train_text_to_image", [f"--hub_token={TOKEN}", f"--resolution={TOKEN}"])
    said = "".join(capfd.readouterr())
    assert "[redacted]" in said and TOKEN not in said


def test_lines_errors_and_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        print_line(f"line {TOKEN}")
        print("printed", TOKEN)
        sys.stderr.writelines([f"lines {TOKEN}\n"])
        raise InputError(f"error {PASSWORD}")

    before = sys.stdout, sys.stderr
    assert run_guarded(fail) == 2 and (sys.stdout, sys.stderr) == before
    print_line(f"from Python {TOKEN}")
    out, err = capsys.readouterr()
    assert out == "printed [redacted]\n"
    lines = ["line [redacted]", "lines [redacted]", "limner: error [redacted]"]
    assert err.splitlines() == [*lines, "from Python [redacted]"]


def test_a_traceback_of_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    """It is printed before the streams that know of secrets are gone."""

    def fail() -> None:
        raise RuntimeError(f"no {KEY} for https://me:{PASSWORD}@mirror, {TOKEN}")

    def lack() -> None:
        raise ModuleNotFoundError(f"no {TOKEN}", name="nobody_knows_it")

    for action, kind in ((fail, "RuntimeError"), (lack, "ModuleNotFoundError")):
        assert run_guarded(action) == 1
        said = capsys.readouterr().err
        assert said.startswith("Traceback") and f"{kind}: no [redacted]" in said
        assert not any(secret in said for secret in SECRETS)


def test_the_status(tmp_path: Path) -> None:
    write_status(RunFolder(tmp_path), RunStatus("failed", 1, 2, error=f"no {TOKEN}"))
    assert json.loads((tmp_path / "status.json").read_text())["error"] == "no [redacted]"


@pytest.mark.frameworks
def test_names_of_pictures(
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the labels on the sheet of all of them."""
    from limner.commands import generate

    drawn: list[Sequence[str]] = []

    def draw(rows: Any, captions: Sequence[str]) -> Any:
        drawn.append(captions)
        return draw_contact_sheet(rows, captions)

    monkeypatch.setattr(generate, "draw_contact_sheet", draw)
    prompts = [f"a {TOKEN} b", KEY, f"http://me:{PASSWORD}@x"]
    out, grid = tmp_path / "pictures", tmp_path / "grid.png"
    words = ["--output", str(out), "--grid", str(grid), "--steps", "1", "--device", "cpu"]
    assert cli.main(["generate", str(base), *prompts, *words]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000-a-redacted-b-0.png",
        "001-redacted-0.png",
        "002-http-me-redacted-x-0.png",
    ]
    labels = [line for call in drawn for line in call]
    assert labels == ["a [redacted] b", "[redacted]", "http://me:[redacted]@x"]
    assert not any(secret in "".join(capfd.readouterr()) for secret in SECRETS)


@pytest.mark.frameworks
def test_no_file_of_a_run(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Neither in its settings, nor in checkpoints, nor on the card that is pushed; and the run is
    resumed."""
    run = tmp_path / "run"
    raw: dict[str, Any] = {
        "run": str(run),
        "model": {"base": str(base)},
        "data": {"folder": str(pictures), "size": 32, "cache": str(tmp_path / "cache")},
        "adapter": {"kind": "lora"},
        "train": {"steps": 1, "batch_size": 2, "seed": 1},
        "checkpoint": {"every": 1},
        "preview": {"prompts": [f"a {TOKEN}", KEY, f"http://me:{PASSWORD}@x"], "steps": 1},
        "log": {"folder": "logs", "to": ["tensorboard"]},
    }
    for steps in (1, 2):
        raw["train"]["steps"] = steps
        loop.run_training(toml.build(Config, raw), report=lambda line: None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"state.json", "README.md", "config.json", "status.json"} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), path
    state = json.loads((run / "checkpoint-2" / "state.json").read_text())
    assert state["config"]["preview"]["prompts"][0] == "a [redacted]"
    assert "a [redacted]" in (run / "README.md").read_text().replace("\\", "")
    assert os.environ["WANDB_API_KEY"] == KEY
