"""What ``limner check`` tells of good data and of bad, in numbers, and that it loads no weight and
changes nothing."""

import io
import json
import os
import shutil
import struct
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from limner.cli import main
from limner.commands.check import run_check
from limner.config import toml
from limner.config.schema import Config
from limner.engines.torch.encoders import TorchEncoders
from limner.errors import InputError
from limner.training import loop

pytestmark = pytest.mark.frameworks


def found(cfg: Config, **settings) -> dict:
    """What the JSON file has."""
    return asdict(run_check(cfg, **settings))


def settings(base: Path, pictures: Path, **data) -> Config:
    raw = {
        "model": {"base": str(base), "family": "sdxl"},
        "data": {"folder": str(pictures), "size": 32, **data},
    }
    return toml.build(
        Config,
        raw | {"train": {"epochs": 3.0, "batch_size": 4, "seed": 1}, "validation": {"hold_out": 1}},
    )


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven of one shape, three of another, one content twice, one look twice."""
    folder = tiny.pictures(tmp_path / "pictures", 7, size=(40, 36))
    wide = tiny.pictures(
        tmp_path / "wide",
        3,
        size=(40, 90),
        seed=4,
        captions=["a word " * 60, "", "a red circle, number 0"],
    )
    lines = (folder / "metadata.jsonl").read_text()
    for i in range(3):
        shutil.copy(wide / f"{i:03}.png", folder / f"wide{i}.png")
    lines += (
        (wide / "metadata.jsonl")
        .read_text()
        .replace('"00', '"wide')
        .replace("wide0.png", "wide0.png")
    )
    shutil.copy(folder / "001.png", folder / "same.png")
    Image.open(folder / "002.png").resize((72, 80), Image.Resampling.BICUBIC).save(
        folder / "alike.png"
    )
    lines += "".join(
        json.dumps({"file_name": f"{name}.png", "text": name}) + "\n" for name in ("same", "alike")
    )
    (folder / "metadata.jsonl").write_text(lines)
    return folder


def test_everything_is_counted(sdxl, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(TorchEncoders, "encode_vae", None)
    monkeypatch.setattr(TorchEncoders, "encode_text", None)
    before = sorted(tmp_path.rglob("*"))
    said: list[str] = []
    cfg = settings(sdxl, mixed, buckets={"step": 8}, flip=True)
    r = found(cfg, json_file=tmp_path / "r.json", sheet=tmp_path / "s.png", report=said.append)
    assert json.loads((tmp_path / "r.json").read_text()) == r
    assert (r["pictures"]["listed"], r["pictures"]["good"], r["pictures"]["bad"]) == (12, 12, [])
    assert r["pictures"]["sizes"] == {"smallest": "36x40", "median": "36x40", "largest": "72x80"}
    assert (
        r["pictures"]["same_content"] == [["001.png", "same.png"]]
        and ["002.png", "alike.png"] in r["pictures"]["look_alike"]
    )
    buckets = {
        row["size"]: (row["pictures"], row["batches"], row["empty_rows"]) for row in r["buckets"]
    }
    assert sum(row[0] for row in buckets.values()) == 11 and set(buckets) == {"32x32", "48x24"}
    assert all(-(-n // 4) == batches and -n % 4 == empty for n, batches, empty in buckets.values())
    assert (r["captions"]["all"], r["captions"]["distinct"], r["captions"]["empty"]) == (
        12,
        11,
        ["wide1.png"],
    )
    assert r["captions"]["repeated"] == [{"caption": "a red circle, number 0", "times": 2}]
    for tokenizer in ("tokenizer", "tokenizer_2"):
        told = r["captions"]["tokens"][tokenizer]
        assert (
            told["limit"] == 77
            and told["shortest"] == 2
            and [one["key"] for one in told["cut"]] == ["wide0.png"]
        )
    steps = sum(row[1] for row in buckets.values())
    assert (
        r["epoch"]["steps"] == steps
        and r["epoch"]["run_steps"] == 3 * steps
        and r["epoch"]["variants"] == 22
        and r["epoch"]["records"] == 11
    )
    latents = {"32x32": 16 * 16, "48x24": 24 * 12}
    assert r["cache"]["picture_bytes"] == sum(
        2 * n * 2 * 4 * 4 * latents[name] for name, (n, *_) in buckets.items()
    )
    assert r["cache"]["caption_bytes"] == r["cache"]["captions"] * 4 * (77 * 80 + 40)
    table = said[-1]
    assert (
        "12 listed, 12 good, 0 bad" in table
        and "001.png = same.png" in table
        and max(map(len, table.splitlines())) < 160
    )
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[2] == 3 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    new = {p.name for p in set(tmp_path.rglob("*")) - set(before)}
    assert new == {"r.json", "s.png"}


def test_the_size_of_the_cache_is_what_training_keeps(sdxl, mixed, tmp_path):
    cfg = settings(
        sdxl, mixed, buckets={"step": 8}, cache=str(tmp_path / "cache"), cache_dtype="float16"
    )
    promised = found(cfg, report=lambda text: None)["cache"]
    kept = loop.run_training(
        toml.build(Config, {**toml.to_plain(cfg), "run": str(tmp_path / "run")}),
        report=lambda text: None,
        only_encode=True,
    )
    arrays = {"picture": 0, "caption": 0}
    for shard in kept.glob("*/*.safetensors"):
        with open(shard, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        arrays[shard.parent.name.split("-")[0]] += max(
            e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"
        )
    held_out = (
        2 * 2 * 4 * 16 * 16
    )  # the record that is watched is kept too: at most a square of float16 mean and deviation
    assert 0 <= arrays["picture"] - promised["picture_bytes"] <= 2 * held_out and 0 <= arrays[
        "caption"
    ] - promised["caption_bytes"] <= 2 * (77 * 80 + 40)


def broken(folder: Path) -> Path:
    """Everything that can be wrong with a record, and some that look wrong and are not."""
    tiny.pictures(folder, 4)
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 50).convert("RGB").save(stream, "JPEG")

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x")
    )
    for name, content in (
        ("empty.png", b""),
        ("cut.jpg", stream.getvalue()[:3000]),
        ("text.png", b"hello"),
        ("bomb.png", bomb),
    ):
        (folder / name).write_bytes(content)
    Image.new("RGB", (5000, 1), "red").save(folder / "thin.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8), "CMYK").save(
        folder / "cmyk.jpg"
    )
    Image.fromarray(np.random.default_rng(1).integers(0, 65535, (64, 64)).astype(np.uint16)).save(
        folder / "deep.png"
    )
    frames = [Image.new("P", (50, 50), i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    names = (
        "empty.png",
        "cut.jpg",
        "text.png",
        "bomb.png",
        "thin.png",
        "cmyk.jpg",
        "deep.png",
        "moving.gif",
        "gone.png",
        "../outside.png",
    )
    rows = [{"file_name": name, "text": "a thing"} for name in names] + [
        {"file_name": "000.png", "text": None},
        {"file_name": "001.png", "text": 7},
    ]
    with open(folder / "metadata.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_a_broken_folder_is_looked_at_to_the_end(sdxl, tmp_path, capsys):
    folder = broken(tmp_path / "broken")
    recipe = tmp_path / "r.toml"
    data = f'[data]\nsize = 32\nfolder = "{folder}"\nbuckets = {{ step = 8, upscale = false }}\n'
    recipe.write_text(
        f'[model]\nbase = "{sdxl}"\nfamily = "sdxl"\n{data}[train]\nsteps = 1\nbatch_size = 8\n'
    )
    assert main(["check", str(recipe), "--json", str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr()
    r = json.loads((tmp_path / "r.json").read_text())
    reasons = {one["key"]: one["reason"] for one in r["pictures"]["bad"]}
    expected = {
        "empty.png": "the file is empty",
        "cut.jpg": "truncated",
        "text.png": "not a picture in a known format",
        "bomb.png": "a decompression bomb?",
        "thin.png": "5000x1 pixels are too small for its bucket of 64x16",
        "gone.png": "no such file",
        "../outside.png": "",
        "000.png": "missing (null)",
        "001.png": "the caption is 7 (int)",
    }
    assert set(reasons) == set(expected) and all(
        words in reasons[key] for key, words in expected.items()
    ), reasons
    assert (
        r["pictures"]["good"] == 7
        and all(row["below_a_batch"] for row in r["buckets"])
        and [row["empty_rows"] for row in r["buckets"]] == [1]
    )
    assert (
        "9 of 16 records cannot be used:" in said.err
        and "  gone.png: metadata.jsonl line" in said.err
        and "are left out" not in said.out
        and 'set data.on_bad_record="skip" to go on without them' in said.err
        and "fewer than a batch" in said.out
        and "and 4 more" in said.out
    )
    assert main(["check", str(recipe), "data.on_bad_record=skip"]) == 0
    with pytest.raises(InputError, match="9 of 16 records cannot be used"):
        loop.run_training(
            toml.load_recipe(recipe, [f"run={tmp_path / 'run'}"]), report=lambda line: None
        )


def test_encode_is_a_verb(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        loop, "run_training", lambda cfg, **settings: seen.append((cfg.train.steps, settings))
    )
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nsteps = 5\n")
    assert main(["encode", str(recipe), "train.steps=7"]) == 0 and seen == [
        (7, {"only_encode": True})
    ]
    assert (
        main(
            [
                "check",
                str(recipe),
                "model.family=sd3",
                "train.batch_size=1",
                "data.folder=x",
                "model.base=y",
            ]
        )
        == 2
    )


def test_check_says_of_the_data_what_training_says(sdxl, mixed, tmp_path):
    (mixed / "notes.md").write_text("x")
    (mixed / "linked").symlink_to(tmp_path)
    shutil.copy(mixed / "001.png", mixed / "extra.png")
    said: dict[str, list[str]] = {"check": [], "train": []}
    cfg = settings(sdxl, mixed, buckets={"step": 8})
    run_check(cfg, report=said["check"].append)
    run = toml.build(Config, {**toml.to_plain(cfg), "run": str(tmp_path / "run")})
    loop.run_training(run, report=said["train"].append, only_encode=True)
    *lines, table = said["check"]
    assert lines == said["train"][: len(lines)] and table.startswith("pictures    12 listed")
    assert [line for line in lines if "link to a folder is not followed: linked" in line]
    assert [line for line in lines if "file that is no picture is left out: notes.md" in line]
    assert [line for line in lines if "it has no row in metadata.jsonl: extra.png" in line]
    assert [
        line
        for line in lines
        if "cut, with more than the 77 tokens that the tokenizer gives on: " in line
    ]
    for line in said["train"][len(lines) :]:
        assert "are encoded" in line or "cache" in line


def test_names_that_are_not_utf8_are_in_the_table_and_in_the_file(sdxl, tmp_path, monkeypatch):
    folder = tiny.pictures(tmp_path / "pictures", 3)
    for name, content in ((b"caf\xe9.png", b"nope"), ("grün ☃.png".encode(), b"nope")):
        (tmp_path / "x").write_bytes(content)
        os.rename(tmp_path / "x", os.fsencode(folder) + b"/" + name)
    (folder / "metadata.jsonl").unlink()
    for name in os.listdir(os.fsencode(folder)):
        with open(os.fsencode(folder) + b"/" + name[:-4] + b".txt", "w", encoding="utf-8") as file:
            file.write("a ☃")
    (tmp_path / "r.toml").write_text(
        f'[model]\nbase = "{sdxl}"\nfamily = "sdxl"\n[data]\nsize = 32\n'
        "[train]\nsteps = 1\nbatch_size = 1\n"
    )
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    words = ["check", str(tmp_path / "r.toml"), f"data.folder={folder}"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 2
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")
    assert "caf\\xe9.png: not a picture" in shown and "gr\\xfcn \\u2603.png" in shown
    assert "3 times: a \\u2603" in shown
    keys = [one["key"] for one in json.loads((tmp_path / "r.json").read_text())["pictures"]["bad"]]
    assert keys == ["caf\\xe9.png", "grün ☃.png"]
