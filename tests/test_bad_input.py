"""Whatever is wrong with what a user gives is told in one message that names it, before any weight
is loaded, and nothing is lost."""

import errno
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from limner import cli
from limner.compat import diffusers
from limner.storage import atomic
from limner.training import records, setup

SETTINGS = [
    "data.size=32",
    "data.cache=off",
    "train.steps=2",
    "train.batch_size=2",
    "train.seed=5",
    "checkpoint.every=1",
    "engine.device=cpu",
]
FLAGS = [
    "--resolution=32",
    "--center_crop",
    "--max_train_steps=2",
    "--train_batch_size=2",
    "--seed=5",
    "--checkpointing_steps=1",
    "--report_to=none",
]
SCRIPT = "train_text_to_image"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nfamily = "sd"\n')
    return path


@pytest.fixture
def by_limner(recipe: Path, base: Path) -> Callable[..., int]:
    """``limner train`` of the tiny model in this process; returns the exit code."""
    return lambda run, data, *more: cli.main(
        [
            "train",
            str(recipe),
            f"run={run}",
            f"model.base={base}",
            f"data.folder={data}",
            *SETTINGS,
            *more,
        ]
    )


@pytest.fixture
def by_script(base: Path) -> Callable[..., int]:
    """The script of diffusers' name in this process; returns the exit code."""
    return lambda run, data, *more: diffusers.main(
        SCRIPT,
        [
            f"--output_dir={run}",
            f"--pretrained_model_name_or_path={base}",
            f"--train_data_dir={data}",
            *FLAGS,
            *more,
        ],
    )


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test fails as soon as an engine is opened: it is what reads weights."""

    def opened(*_: Any) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr(setup.engines, "open_engine", opened)
    yield


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str, given: int) -> str:
    """Check the exit code and the one message, and return it."""
    said = "".join(capsys.readouterr())
    assert given == code, said
    assert "Traceback" not in said
    assert said.count("limner: ") == 1, said
    for word in words:
        assert word in said, said
    return said


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): atomic.digest_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def rewrite(folder: Path, row: int, **changes: Any) -> None:
    """Change one row of the metadata; a value of Ellipsis takes the column away."""
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[row] = {k: v for k, v in {**rows[row], **changes}.items() if v is not ...}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 40000 x 40000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def linked_out(folder: Path) -> None:
    outside = folder.parent / "secret.png"
    shutil.copy(folder / "001.png", outside)
    (folder / "001.png").unlink()
    (folder / "001.png").symlink_to(outside)


BAD_RECORDS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "a row without a file": (
        lambda f: (f / "001.png").unlink(),
        ("001.png", "metadata.jsonl line 2", "no such file"),
    ),
    "cut short": (lambda f: os.truncate(f / "001.png", 300), ("001.png",)),
    "no picture": (
        lambda f: (f / "001.png").write_text("hello"),
        ("001.png", "not a picture in a known format"),
    ),
    "empty file": (lambda f: (f / "001.png").write_bytes(b""), ("001.png",)),
    "a folder": (lambda f: ((f / "001.png").unlink(), (f / "001.png").mkdir()), ("001.png",)),
    "decompression bomb": (
        lambda f: bomb(f / "001.png"),
        ("001.png", "40000x40000", "data.max_pixels", "decompression bomb"),
    ),
    "null caption": (
        lambda f: rewrite(f, 1, text=None),
        ("001.png", "metadata.jsonl line 2", "caption is missing"),
    ),
    "missing caption": (
        lambda f: rewrite(f, 1, text=...),
        ("001.png", "metadata.jsonl line 2", "caption is missing"),
    ),
    "caption is a number": (lambda f: rewrite(f, 1, text=7), ("001.png", "caption is 7")),
    "no captions": (lambda f: rewrite(f, 1, text=[]), ("001.png", "list of captions is empty")),
    "above the folder": (
        lambda f: rewrite(f, 1, file_name="../secret.png"),
        ("../secret.png", "leads out of the metadata file's folder"),
    ),
    "absolute": (lambda f: rewrite(f, 1, file_name="/etc/hostname"), ("/etc/hostname", "absolute")),
    "no file name": (
        lambda f: rewrite(f, 1, file_name=...),
        ("metadata.jsonl line 2", "file_name is missing"),
    ),
    "linked out": (linked_out, ("001.png", "link to a place outside")),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_a_bad_record_is_named(
    what: str, by_limner: Any, by_script: Any, nothing_loaded: None, tmp_path: Path, capsys: Any
) -> None:
    folder = tiny.pictures(tmp_path / "mine", 4)
    spoil, words = BAD_RECORDS[what]
    spoil(folder)
    before = contents(folder)
    for door in (by_limner, by_script):
        said = refused(
            capsys,
            2,
            *words,
            "1 of 4 records cannot be used",
            'data.on_bad_record="skip"',
            given=door(tmp_path / "run", folder),
        )
        assert len(said.splitlines()) <= 4
    assert contents(folder) == before
    assert list(contents(tmp_path / "run")) == []


def test_skipping_goes_on_writes_down_which_and_why_and_leaves_the_files(
    by_limner: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = tiny.pictures(tmp_path / "mine", 5)
    (folder / "000.png").write_text("hello")
    (folder / "002.png").unlink()
    rewrite(folder, 3, text=None)
    before = contents(folder)
    assert by_limner(tmp_path / "run", folder, "data.on_bad_record=skip") == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [row["path"] for row in rows] == ["000.png", "002.png", "003.png"]
    assert all(
        word in row["reason"]
        for word, row in zip(
            ["not a picture", "no such file", "caption is missing"], rows, strict=True
        )
    )
    assert contents(folder) == before
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    assert state["records"] == 2
    said = capsys.readouterr().err
    assert (
        "3 of 5 records are left out: 000.png: not a picture" in said
        and "skipped.jsonl names each of them" in said
    )


BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "empty folder": (
        lambda f: (shutil.rmtree(f), f.mkdir()),
        ("mine", "no pictures here", "metadata.jsonl"),
    ),
    "no folder": (lambda f: shutil.rmtree(f), ("data.folder", "mine is not there")),
    "no captions": (
        lambda f: (f / "metadata.jsonl").unlink(),
        ("mine", "4 pictures, but no captions", "write metadata.jsonl"),
    ),
    "not JSON": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": \n'),
        ("metadata.jsonl:1",),
    ),
    "no rows": (lambda f: (f / "metadata.jsonl").write_text(""), ("metadata.jsonl", "no rows")),
}


@pytest.mark.parametrize("what", BAD_SOURCES)
def test_a_bad_folder_is_named(
    what: str, by_limner: Any, by_script: Any, nothing_loaded: None, tmp_path: Path, capsys: Any
) -> None:
    folder = tiny.pictures(tmp_path / "mine", 4)
    spoil, words = BAD_SOURCES[what]
    spoil(folder)
    for door in (by_limner, by_script):
        refused(capsys, 2, *words, given=door(tmp_path / "run", folder))
    assert list(contents(tmp_path / "run")) == []


def test_a_wrong_column_is_named_with_the_setting_and_the_flag(
    by_limner: Any,
    by_script: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
) -> None:
    refused(
        capsys,
        2,
        "no column 'txet' (data.caption)",
        "Did you mean data.caption=text?",
        given=by_limner(tmp_path / "run", pictures, "data.caption=txet"),
    )
    refused(
        capsys,
        2,
        "no column 'txet'",
        "--caption_column",
        given=by_script(tmp_path / "run", pictures, "--caption_column=txet"),
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "optim.learning_rat=1e-4",
            ("optim.learning_rat: no such setting", "did you mean optim.learning_rate?"),
        ),
        (
            "optim.learning_rate=fast",
            ("optim.learning_rate: 'fast' was given, a number is expected",),
        ),
        ("optmi.learning_rate=1e-4", ("optmi: no such setting", "did you mean optim?")),
        ("validation.hold_out=12", ("validation.hold_out", "none is left to train on")),
        (
            "validation.hold_out=0.96",
            ("12 records are held out of 12", "none is left to train on", "hold_out=0.1"),
        ),
        ("validation.hold_out=1.5", ("validation.hold_out: 1.5 is neither",)),
        ("data.background=see-through", ("data.background", "'see-through' is no opaque colour")),
        ("checkpoint.resume=checkpoint-9", ("checkpoint-9: no such checkpoint",)),
        ("model.base=nowhere", ("model.base: nowhere", "owner/name")),
    ],
)
def test_a_wrong_setting_is_named(
    override: str,
    words: tuple[str, ...],
    by_limner: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
) -> None:
    refused(capsys, 2, *words, given=by_limner(tmp_path / "run", pictures, override))


def test_a_misspelt_key_in_the_recipe_itself(
    recipe: Path, nothing_loaded: None, tmp_path: Path, capsys: Any
) -> None:
    recipe.write_text('run = "x"\n[data]\nfolder = "y"\n[train]\nstep = 3\n')
    refused(
        capsys,
        2,
        "train.step: no such setting; did you mean train.steps?",
        given=cli.main(["train", str(recipe)]),
    )
    refused(
        capsys,
        2,
        "missing.toml",
        "No such file",
        given=cli.main(["train", str(tmp_path / "missing.toml")]),
    )


def test_a_misspelt_flag(
    by_script: Any, pictures: Path, nothing_loaded: None, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        by_script(tmp_path / "run", pictures, "--learning_rat_e=1")
    assert stop.value.code == 2
    assert "--learning_rat_e=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        "below a file",
        pytest.param(
            "system", marks=pytest.mark.skipif(sys.platform != "linux", reason="there is no /sys")
        ),
    ],
)
def test_an_output_folder_that_cannot_be_written(
    place: str,
    by_limner: Any,
    by_script: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
) -> None:
    (tmp_path / "file").write_text("mine")
    run = tmp_path / "file" / "run" if place == "below a file" else Path("/sys/run")
    for door in (by_limner, by_script):
        refused(capsys, 5, str(run), "choose another folder", given=door(run, pictures))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_output_folder(
    by_limner: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = os.open

    def read_only(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path / "run")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    refused(
        capsys,
        5,
        str(tmp_path / "run"),
        "Read-only file system",
        given=by_limner(tmp_path / "run", pictures),
    )


def test_two_runs_in_one_folder(
    by_limner: Any,
    by_script: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
) -> None:
    with atomic.lock(tmp_path / "run"):
        for door in (by_limner, by_script):
            said = refused(
                capsys,
                8,
                str(tmp_path / "run"),
                "another run is writing here",
                f"process {os.getpid()}",
                given=door(tmp_path / "run", pictures),
            )
            assert "choose another folder" in said


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, base: Path, pictures: Path) -> Path:
    """A run of two steps, by the script; copy it before changing anything in it."""
    run = tmp_path_factory.mktemp("begun") / "run"
    given = [
        f"--output_dir={run}",
        f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={pictures}",
        *FLAGS,
    ]
    assert diffusers.main(SCRIPT, given) == 0
    return run


RESUMED: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "seed": (
        ["--seed=6"],
        ("train.seed (--seed)", "begun with seed 5, 6 is asked for", "another folder"),
    ),
    "batch": (
        ["--train_batch_size=3"],
        ("train.batch_size", "begun with a global batch of 2, 3 is asked for", "another folder"),
    ),
    "size": (["--resolution=48"], ("data.size (--resolution)", "was 32, now 48", "another folder")),
    "ema": (["--use_ema"], ("optim.ema (--use_ema)", "was None, now 0.9999")),
    "two things": (
        ["--random_flip", "--snr_gamma=5.0"],
        ("data.flip (--random_flip)", "objective.min_snr (--snr_gamma)"),
    ),
    "no resume": (
        ["--resume_from_checkpoint="],
        ("holds checkpoint-2", "--resume_from_checkpoint latest"),
    ),
    "another checkpoint": (
        ["--resume_from_checkpoint=checkpoint-7"],
        ("checkpoint-7: no such checkpoint", "checkpoint-2, checkpoint-1"),
    ),
}


@pytest.mark.parametrize("what", RESUMED)
def test_what_may_not_change_on_resume(
    what: str,
    begun: Path,
    by_script: Any,
    pictures: Path,
    nothing_loaded: None,
    tmp_path: Path,
    capsys: Any,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    flags, words = RESUMED[what]
    refused(
        capsys,
        2,
        *words,
        given=by_script(
            run, pictures, "--max_train_steps=4", "--resume_from_checkpoint=latest", *flags
        ),
    )
    assert contents(run) == contents(begun)


@pytest.mark.parametrize("change", ["another picture", "another caption", "one more"])
def test_another_data_set_on_resume(
    change: str, begun: Path, by_script: Any, nothing_loaded: None, tmp_path: Path, capsys: Any
) -> None:
    run, folder = (
        tmp_path / "run",
        tiny.pictures(
            tmp_path / "mine",
            13 if change == "one more" else 12,
            seed=1 if change == "another picture" else 0,
        ),
    )
    if change == "another caption":
        rewrite(folder, 3, text="something else")
    shutil.copytree(begun, run)
    said = refused(
        capsys,
        2,
        "the data set",
        str(folder),
        given=by_script(run, folder, "--max_train_steps=4", "--resume_from_checkpoint=latest"),
    )
    assert "not the same" in said
    assert contents(run) == contents(begun)


def test_the_same_pictures_in_another_folder_are_the_same_data_set(
    begun: Path, by_script: Any, pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    shutil.copytree(pictures, tmp_path / "moved")
    assert (
        by_script(run, tmp_path / "moved", "--max_train_steps=3", "--resume_from_checkpoint=latest")
        == 0
    )
    assert (run / "checkpoint-3").is_dir()


def test_a_picture_that_vanishes_while_training_is_named(
    by_limner: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.pictures(tmp_path / "mine", 2)
    look = records.index_records

    def look_then_lose(*arguments: Any, **settings: Any) -> Any:
        seen = look(*arguments, **settings)
        (folder / "001.png").unlink()
        return seen

    monkeypatch.setattr(records, "index_records", look_then_lose)
    said = refused(
        capsys,
        2,
        "001.png: ",
        "no such file",
        "run the same command again",
        given=by_limner(tmp_path / "run", folder),
    )
    assert said.count("001.png") == 1


def test_a_setting_that_has_its_flag_beside_it_gets_no_other() -> None:
    assert (
        diffusers.name_flags(SCRIPT, "leave it out of log.to (--report_to), see data.size")
        == "leave it out of log.to (--report_to), see data.size (--resolution)"
    )
