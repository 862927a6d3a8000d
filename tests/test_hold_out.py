"""Held-out records are never trained on: not their pictures, nor pictures that look the same."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from limner import rng
from limner.config import toml
from limner.config.schema import Config, DataSettings
from limner.data.folder import Folder
from limner.data.index import Entry, Index, build_index
from limner.errors import InputError
from limner.storage.run_state import RunState
from limner.training.batch_plan import make_plan
from limner.training.hold_out import choose_groups, hold_out_records
from limner.training.records import plan_records
from limner.training.resume import make_run_state


def make_index(digests: list[int], hashes: dict[int, int] | None = None) -> Index:
    """Records with the content of these numbers; each content looks like no other unless its hash
    is given."""
    draws = np.random.default_rng(0).integers(1, 2**63, 10_000)
    looks = {digest: int(draws[digest]) for digest in digests} | (hashes or {})
    return Index(
        tuple(
            Entry(row, f"{row}.png", ("x",), str(digest), 8, 8, looks[digest])
            for row, digest in enumerate(digests)
        )
    )


def split(index: Index, count: int, seed: int = 0, apart: bool = True):
    told: list[str] = []
    training, held_out = hold_out_records(index, count, seed, apart, told.append)
    assert sorted((*training, *held_out), key=lambda entry: entry.row) == list(index.entries)
    return training, held_out, told


def draw(index: Index, count: int, seed: int) -> tuple[set[int], set[int]]:
    """What builds before this one did."""
    numbers = {int(i) for i in rng.at(seed, "hold out", 0).permutation(len(index.entries))[:count]}
    return set(range(len(index.entries))) - numbers, numbers


def rows_of(entries: tuple[Entry, ...]) -> set[int]:
    return {entry.row for entry in entries}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [0, 1, 7, 39])
def test_without_repeated_pictures_the_split_is_what_it_always_was(seed: int, count: int) -> None:
    index = make_index(list(range(40)))
    training, held_out, told = split(index, count, seed)
    assert (rows_of(training), rows_of(held_out)) == draw(index, count, seed)
    assert told == [] and list(held_out) == sorted(held_out, key=lambda entry: entry.row)


@pytest.mark.parametrize("seed", range(20))
def test_five_captions_for_each_picture(seed: int) -> None:
    """The layout of COCO: every held-out picture was trained on too."""
    index = make_index([i // 5 for i in range(40)])
    training, held_out, told = split(index, 10, seed)
    assert {e.digest for e in training}.isdisjoint(e.digest for e in held_out)
    assert len(held_out) == 10
    before = draw(index, 10, seed)
    exchanged = len(before[1] - rows_of(held_out))
    are = "is" if exchanged == 1 else "are"
    assert told == [
        f"{exchanged} of the 10 records drawn {are} exchanged, so that none is held out whose "
        "picture is trained on, or one that looks like it; 10 are held out"
    ]


@pytest.mark.parametrize(("asked", "held"), [(4, 5), (1, 5), (7, 5), (9, 5), (12, 10)])
def test_where_groups_do_not_make_the_number_it_is_told(asked: int, held: int) -> None:
    index = make_index([i // 5 for i in range(20)])
    _, held_out, told = split(index, asked)
    assert len(held_out) == held and len({entry.digest for entry in held_out}) == held // 5
    are = "is" if asked == 1 else "are"
    assert told[0].endswith(f"; {held} are held out, where {asked} {are} asked for")


@pytest.mark.parametrize("seed", range(10))
def test_pictures_that_look_alike_stay_together(seed: int) -> None:
    """Also by way of a third: 1 is like 2, and 2 like 3; and through copies of either."""
    look = 0x0F0F_1234_5678_9ABC
    index = make_index([*range(30), 1, 3, 3], {1: look, 2: look ^ 0b1111, 3: look ^ 0b11111111})
    training, held_out, _ = split(index, 8, seed)
    together = {1, 2, 3, 30, 31, 32}
    assert together <= rows_of(training) or together <= rows_of(held_out)
    assert len(held_out) == 8


def test_records_that_are_held_out_beside_those_drawn_are_told() -> None:
    index = make_index([i // 5 for i in range(20)])
    assert split(index, 1)[2] == [
        "4 others are held out too, so that none is held out whose picture is trained on, or one "
        "that looks like it; 5 are held out, where 1 is asked for"
    ]


@pytest.mark.parametrize("digests", [[0] * 5 + [1] * 5, [0] * 6 + [1] * 6])
def test_half_of_the_data_is_not_held_out_unasked(digests: list[int]) -> None:
    half = len(digests) // 2
    index = make_index(digests)
    with pytest.raises(InputError) as caught:
        split(index, 2)
    assert str(caught.value) == (
        f"validation.hold_out: 2 of {2 * half} records are asked for, and the smallest group of "
        f"pictures that are the same or look alike has {half}. Add others, hold out {half}, or "
        "hold out none"
    )
    assert len(split(index, half)[1]) == half
    assert len(split(index, 3)[1]) == half  # at most twice as many
    # A run that was begun before goes on, whatever its pictures are.
    assert len(split(index, 2, apart=False)[1]) == 2
    assert len(split(make_index([7] * 6), 2, apart=False)[1]) == 2


def look_at(folder: Path, known: Path | None = None, **settings: Any) -> tuple[Index, list[str]]:
    told: list[str] = []
    config = DataSettings(folder=str(folder), caption=None, size=16, **settings)
    source = Folder(config, told.append)
    return build_index(source, config, cache_file=known, report=told.append), told


def test_flat_pictures_are_held_out_together(tmp_path: Path) -> None:
    """Of 8 sheets with a line each, every one is there in two files of other bytes."""
    for number in range(8):
        sheet = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(sheet).line((20 + 50 * number, 100, 20 + 50 * number, 130), "black", 3)
        sheet.save(tmp_path / f"{number}.png")
        sheet.save(tmp_path / f"{number} again.png", compress_level=1)
    index, told = look_at(tmp_path)
    assert len(told) == 1 and told[0].startswith("8 of 16 records look like an earlier one")
    assert index.near_duplicates == [list(index.entries[i : i + 2]) for i in range(0, 16, 2)]
    for seed in range(5):
        training, held_out, _ = split(index, 4, seed)
        assert {e.key[0] for e in training}.isdisjoint(e.key[0] for e in held_out)


def test_faint_and_plain_pictures_are_held_out_with_their_twins(tmp_path: Path) -> None:
    """Eight light sketches and three plain colours, each twice: as PNG, and half as large as JPEG;
    a run that looks again knows their looks."""
    colors = {"red": (200, 30, 30), "white": (255, 255, 255), "grey": (120, 120, 120)}
    pictures = {name: Image.new("RGB", (512, 512), color) for name, color in colors.items()}
    for number in range(8):
        sketch = Image.new("RGB", (512, 512), "white")
        x = 60 + 50 * (number % 4)
        y = 60 + 150 * (number // 4)
        ImageDraw.Draw(sketch).ellipse((x, y, x + 120, y + 200), outline=(225, 225, 225), width=2)
        pictures[f"sketch {number}"] = sketch
    (tmp_path / "pictures").mkdir()
    for name, picture in pictures.items():
        picture.save(tmp_path / "pictures" / f"{name}.png")
        picture.resize((256, 256)).save(tmp_path / "pictures" / f"{name}.jpg", quality=90)
    for _ in range(2):
        index, told = look_at(tmp_path / "pictures", known=tmp_path / "known.json")
        assert [line[:45] for line in told] == ["11 of 22 records look like an earlier one: gr"]
        assert [[Path(e.key).stem for e in group] for group in index.near_duplicates] == [
            [name] * 2 for name in sorted(pictures)
        ]
    for seed in range(5):
        training, held_out, _ = split(index, 6, seed)
        assert {Path(e.key).stem for e in training}.isdisjoint(Path(e.key).stem for e in held_out)


@pytest.mark.parametrize("flip", [True, False])
def test_mirror_images_stay_together_where_pictures_are_mirrored(tmp_path: Path, flip: bool):
    for number in range(8):
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{number}.png")
        ImageOps.mirror(picture).save(tmp_path / f"{number} mirrored.png")
    index, told = look_at(tmp_path, flip=flip)
    assert [line[:37] for line in told] == ["8 of 16 records look like an earlier "] * flip
    both = [split(index, 4, seed)[:2] for seed in range(5)]
    shared = [{e.key[0] for e in one} & {e.key[0] for e in other} for one, other in both]
    assert any(shared) != flip


def test_what_was_seen_on_another_background_is_looked_at_again(tmp_path: Path) -> None:
    """Black drawings on nothing, each in two files: on black they are all the same."""
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        pixels = np.zeros((64, 64, 4), np.uint8)
        inked = np.random.default_rng(number).random((8, 8)) > 0.5
        pixels[..., 3] = np.kron(inked, np.full((8, 8), 255))
        for again in range(2):
            path = tmp_path / "pictures" / f"{number}-{again}.png"
            Image.fromarray(pixels).save(path, compress_level=1 + again)
    config = DataSettings(folder=str(tmp_path / "pictures"), caption=None, size=16)
    source = Folder(config, lambda line: None)

    def look(background: str, known: Path | None) -> Index:
        settings = replace(config, background=background)
        return build_index(source, settings, cache_file=known, report=lambda line: None)

    alone = {colour: look(colour, None) for colour in ("black", "white")}
    assert [len(index.near_duplicates) for index in alone.values()] == [1, 6]
    for colour in ("black", "white", "black"):
        assert look(colour, tmp_path / "known.json") == alone[colour]


def test_pictures_that_are_all_alike_are_refused() -> None:
    with pytest.raises(InputError, match="the pictures of all 6 records are the same or look"):
        split(make_index([7] * 6), 2)


def test_a_run_of_an_earlier_build_keeps_its_sides() -> None:
    index = make_index([i // 5 for i in range(20)])
    training, held_out, told = split(index, 4, apart=False)
    assert (rows_of(training), rows_of(held_out)) == draw(index, 4, 0)
    assert told == [
        "4 of 4 held-out records have a picture that is trained on too, or looks like one that is: "
        "this run was begun by an earlier build, and goes on as it was"
    ]
    assert split(make_index(list(range(20))), 4, apart=False)[2] == []


def test_the_split_is_the_same_from_the_index_of_another_process() -> None:
    index = make_index([i // 3 for i in range(60)])
    other = Index.from_plain(json.loads(json.dumps(index.to_plain())))
    assert split(index, 9, 5) == split(other, 9, 5)
    renamed = Index(tuple(replace(entry, key="x") for entry in index.entries))
    assert [e.row for e in split(renamed, 9, 5)[1]] == [e.row for e in split(index, 9, 5)[1]]


def test_every_group_has_its_chance() -> None:
    groups = [i // 2 for i in range(20)]
    counts = Counter(
        groups[number]
        for seed in range(300)
        for number in choose_groups(rng.at(seed, "hold out", 0).permutation(20), groups, 4)
    )
    assert (
        set(counts) == set(range(10)) and min(counts.values()) > 60 and sum(counts.values()) == 1200
    )


class OneProcess:
    world_size = device_count = 1

    def first(self, action):
        return action()


@pytest.mark.parametrize("begun_by", ["this build", "an earlier build", None])
def test_a_checkpoint_says_how_its_run_holds_out(tmp_path, begun_by):
    for number in range(8):
        pixels = np.random.default_rng(number // 2).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    config = toml.build(
        Config,
        {
            "data": {"folder": str(tmp_path), "caption": None, "size": 16, "cache": "off"},
            "train": {"steps": 1, "batch_size": 2, "seed": 0},
            "validation": {"hold_out": 3},
        },
    )
    state = None
    if begun_by is not None:
        plan = make_plan(config, 1, 5, None, 0)
        fields = json.loads(json.dumps(make_run_state(config, plan, "a", "b").to_plain()))
        assert fields["held_out_apart"] is True
        if begun_by == "an earlier build":
            del fields["held_out_apart"]
        state = SimpleNamespace(state=RunState.from_plain(fields, tmp_path))
    source = Folder(config.data, lambda line: None)
    settled = SimpleNamespace(config=config, source=source, checkpoint=state)
    records = plan_records(settled, OneProcess(), lambda line: None, read_only=True)
    shared = {e.digest for e in records.training} & {e.digest for e in records.validation}
    assert records.held_out_apart == (begun_by != "an earlier build")
    assert bool(shared) == (begun_by == "an earlier build")
    assert len(records.validation) == (3 if shared else 2)
