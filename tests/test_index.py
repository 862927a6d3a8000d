"""The look at the data: what is good, what is not and why, and what it is called by content."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_color import LINEAR as LINEAR_GREY
from test_image import chunk, cmyk_profile, encode, linear_profile, png, tabled_srgb_profile

from limner.config.schema import DataSettings
from limner.data import image, known_pictures, similarity
from limner.data.index import Entry, Index, build_index, check_resized_size, write_skipped
from limner.data.picture_file import Undecodable
from limner.data.source import BadRecord, Record
from limner.errors import InputError
from limner.features.caption_lengths import find_truncated_captions
from limner.storage import atomic

AS_USUAL: Any = {"background": "white", "max_pixels": 10_000}


class Mine:
    """A user's own source."""

    def __init__(self, *records: Any):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        if isinstance(self.records[i], Exception):
            raise self.records[i]
        return self.records[i]


def seen(
    source: Any, *, known: Path | None = None, damaged: bool = False, **settings: Any
) -> Index:
    told: list[str] = []
    index = build_index(
        source, DataSettings(size=4, **settings), cache_file=known, report=told.append
    )
    flaws = [index.skipped, index.without_caption, index.exact_duplicates]
    assert len(told) == sum(map(bool, [*flaws, index.with_several_captions, damaged]))
    return index


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (9, 5), **options: Any) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def mixed(folder: Path) -> Mine:
    """Six records: good, cut short, without a file, a bomb, a bad row, good."""
    good = picture(folder / "good.png")
    (folder / "cut.jpg").write_bytes(
        picture(folder / "whole.jpg", size=(64, 64)).read_bytes()[:-300]
    )
    big = picture(folder / "big.png", size=(200, 200))
    others = [
        Record("cut.jpg", folder / "cut.jpg", ("b",)),
        Record("gone.png", folder / "gone.png", ("c",)),
        Record("big.png", big, ("d",)),
    ]
    return Mine(
        Record("good.png", good, ("a", "aa")),
        *others,
        BadRecord("row.png", "metadata.jsonl line 5: null"),
        Record("more.png", picture(folder / "more.png", 1), ("e",)),
    )


def test_good_records_keep_their_order_rows_and_upright_sizes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture(tmp_path / "turned.jpg", size=(30, 20), exif=exif)
    array = np.zeros((7, 8, 4), np.uint8)
    source = Mine(
        Record("t", turned, ("x",)),
        Record("b", (tmp_path / "turned.jpg").read_bytes(), ("y",)),
        Record("n", array, ("z",)),
        Record("p", Image.new("L", (5, 6)), ("",)),
    )
    index = seen(source, threads=3)
    assert [(e.row, e.key, e.captions, e.height, e.width) for e in index.entries] == [
        (0, "t", ("x",), 30, 20),
        (1, "b", ("y",), 30, 20),
        (2, "n", ("z",), 7, 8),
        (3, "p", ("",), 6, 5),
    ]
    assert (
        index.entries[0].digest == index.entries[1].digest
        and len({e.digest for e in index.entries}) == 3
    )
    assert [e.key for e in index.exact_duplicates] == ["b"] and [
        e.key for e in index.without_caption
    ] == ["p"]
    assert list(index.captions()) == [("t", "x"), ("b", "y"), ("n", "z"), ("p", "")]


def test_empty_captions_and_repeated_pictures_are_told_in_a_line_each(tmp_path: Path) -> None:
    told: list[str] = []
    one = picture(tmp_path / "one.png")
    other = Record("two", picture(tmp_path / "two.png", 1), ("b",))
    source = Mine(
        Record("one", one, ("a", " ")),
        *(Record(f"again-{i}", one, ("a", "")) for i in range(4)),
        other,
    )
    build_index(source, DataSettings(size=4), report=told.append)
    assert told == [
        "5 of 6 records have several captions, one of which is drawn each time: one; again-0; "
        "again-1; ...",
        "5 of 6 records have an empty caption: one; again-0; again-1; ...",
        "4 of 6 records repeat the picture of an earlier one: again-0; again-1; again-2; ...",
    ]
    told.clear()
    build_index(Mine(source[0], source[5]), DataSettings(size=4), report=told.append)
    assert told == [
        "1 of 2 records has several captions, one of which is drawn each time: one",
        "1 of 2 records has an empty caption: one",
    ]


def test_refuse_names_each_bad_record_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        seen(mixed(tmp_path), max_pixels=10_000)
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == "4 of 6 records cannot be used:"
        and lines[-1]
        == 'Mend or remove them, or set data.on_bad_record="skip" to go on without them.'
    )
    assert lines[1].startswith("  cut.jpg: cannot be read: image file is truncated")
    assert lines[2:5] == [
        "  gone.png: no such file",
        "  big.png: 200x200 pixels are more than data.max_pixels = 10000: a decompression bomb?",
        "  row.png: metadata.jsonl line 5: null",
    ]


def test_skip_goes_on_without_them_and_writes_them_down(tmp_path: Path) -> None:
    before = None
    for threads in (1, 4):
        index = seen(mixed(tmp_path), max_pixels=10_000, on_bad_record="skip", threads=threads)
        assert [(e.row, e.key) for e in index.entries] == [(0, "good.png"), (5, "more.png")]
        assert [key for key, _ in index.skipped] == ["cut.jpg", "gone.png", "big.png", "row.png"]
        assert before in (None, index)
        before = index
    run = tmp_path / "run"
    write_skipped(run, index.skipped)
    rows = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert rows == [{"path": key, "reason": reason} for key, reason in index.skipped] and list(
        run.iterdir()
    ) == [run / "skipped.jsonl"]
    write_skipped(run, ())
    assert list(run.iterdir()) == []


def test_a_long_list_is_cut_after_ten() -> None:
    source = Mine(
        *(BadRecord(f"{i}.png", "why") for i in range(14)),
        Record("g", np.zeros((4, 4), np.uint8), ("x",)),
    )
    with pytest.raises(InputError) as caught:
        seen(source)
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == "14 of 15 records cannot be used:"
        and lines[10] == "  9.png: why"
        and lines[11] == "  and 4 more"
        and len(lines) == 13
    )


def test_nothing_left_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"None is left to train on\."):
        seen(Mine(BadRecord("a", "b")), on_bad_record="skip")
    with pytest.raises(InputError, match="no records"):
        seen(Mine())


def test_a_thread_of_a_picture_is_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"2000x1 pixels are too long and thin: 8000x4 once the shorter side is "
        r"data\.size = 4",
    ):
        seen(Mine(Record("thin", np.zeros((1, 2000), np.uint8), ("x",))), max_pixels=10_000)


def test_a_picture_that_memory_does_not_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(picture: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(image, "decode", fail)
    source = Mine(Record("large.png", np.zeros((4, 4), np.uint8), ("x",)))
    for choice in ("refuse", "skip"):  # it may well be good
        with pytest.raises(InputError, match=r"^large\.png: not enough memory to unpack"):
            seen(source, on_bad_record=choice)


@pytest.mark.parametrize(
    ("size", "settings", "limit"),
    [
        ((20, 4000), {"size": 600}, True),  # enlarged to 600 x 120,000
        ((20, 1000), {"size": 600}, False),
        ((800, 80_000), {"size": 750, "resample": "box"}, True),
        ((800, 80_000), {"size": 750}, False),  # libvips works in strips
        ((800, 70_000), {"size": 800, "resample": "box"}, False),  # nothing is resized
        ((8_000, 9_000), {"size": 4_200, "resample": "box"}, True),
    ],
)
def test_what_pil_resizes_is_bounded(size: tuple[int, int], settings: dict, limit: bool) -> None:
    if not limit:
        check_resized_size(*size, DataSettings(**settings))
        return
    with pytest.raises(Undecodable, match="too long and thin"):
        check_resized_size(*size, DataSettings(**settings))


def test_a_stranger_in_the_source_is_named() -> None:
    with pytest.raises(InputError, match=r"record 0 of the source is dict; limner\.Record"):
        seen(Mine({"image": 1}))


def test_an_unknown_background_is_refused_before_any_picture_is_read() -> None:
    with pytest.raises(InputError, match=r"data\.background"):
        seen(Mine(ValueError("was read")), background="whit")


def test_the_digest_is_of_content_not_of_names(tmp_path: Path) -> None:
    def digest(*parts: tuple[str, int, tuple[str, ...]]) -> str:
        return seen(
            Mine(
                *(
                    Record(name, picture(tmp_path / name, seed), captions)
                    for name, seed, captions in parts
                )
            )
        ).digest

    first = digest(("a.png", 0, ("x",)), ("b.png", 1, ("y", "z")))
    assert first == digest(("c.png", 0, ("x",)), ("d.png", 1, ("y", "z")))
    others = [
        digest(("b.png", 1, ("y", "z")), ("a.png", 0, ("x",))),
        digest(("a.png", 2, ("x",)), ("b.png", 1, ("y", "z"))),
        digest(("a.png", 0, ("x",)), ("b.png", 1, ("z", "y"))),
        digest(("a.png", 0, ("x",)), ("b.png", 1, ("y",))),
        digest(("a.png", 0, ("x", "y")), ("b.png", 1, ("z",))),
        digest(("a.png", 0, ("x",))),
    ]
    assert len({first, *others}) == 7


def test_an_edited_picture_of_the_same_size_and_time_has_another_digest(tmp_path: Path) -> None:
    import os

    path, known = picture(tmp_path / "a.bmp", 0), tmp_path / "known.json"
    before, times = seen(Mine(Record("a", path, ("x",))), known=known), path.stat()
    picture(path, 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert seen(Mine(Record("a", path, ("x",))), known=known).digest != before.digest


def test_a_second_look_only_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tmp_path / "deep" / "known.json"
    source = mixed(tmp_path)
    first = seen(source, known=known, on_bad_record="skip", max_pixels=10_000)
    calls: list[Any] = []
    real = image.decode
    monkeypatch.setattr(
        image,
        "decode",
        lambda picture, **options: calls.append(picture) or real(picture, **options),
    )
    assert seen(source, known=known, on_bad_record="skip", max_pixels=10_000) == first
    assert sorted(path.name for path in calls) == [
        "big.png",
        "cut.jpg",
    ]  # bad ones are looked at again
    calls.clear()
    with pytest.raises(InputError, match=r"data\.max_pixels = 10"):
        seen(source, known=known, max_pixels=10)
    assert "good.png" in {path.name for path in calls}
    (tmp_path / "more.png").write_bytes((tmp_path / "more.png").read_bytes()[:-40])
    assert "more.png" in dict(
        seen(source, known=known, on_bad_record="skip", max_pixels=10_000).skipped
    )


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"pictures": []}', b'{"digest": "0", "pictures": {}}', b"\xff", b"null"],
)
def test_a_damaged_memory_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    known = tmp_path / "known.json"
    source = Mine(Record("a", picture(tmp_path / "a.png"), ("x",)))
    first = seen(source)
    known.write_bytes(damage)
    assert seen(source, known=known, damaged=b"digest" not in damage) == first
    assert json.loads(known.read_text())["pictures"] == {
        f"{first.entries[0].digest} white": [
            *(5, 9),
            *similarity.perceptual_hashes(image.decode(tmp_path / "a.png", **AS_USUAL)),
            False,
            False,
        ]
    }
    known.write_text(known.read_text().replace("[5, 9,", "[5, 8,"))
    assert seen(source, known=known) == first


def write_known(path: Path, pictures: dict[str, Any]) -> None:
    """Write the list of decoded pictures with its right digest, whatever the entries hold."""
    digest = atomic.digest_json([known_pictures._DECODER, pictures])
    path.write_text(json.dumps({"digest": digest, "pictures": pictures}))


@pytest.mark.parametrize(
    "change",
    [
        *({0: height} for height in ("9", 64.5, 2**70, -1, 0, None, True, float("nan"), [5])),
        *({2: look} for look in ("x", 2**64, -1, None, 1.5, False)),
        *({3: look} for look in (None, 2**70, "1")),
        *({4: further} for further in (0, None, "no")),
        *({5: profile} for profile in (1, None, "no")),
    ],
)
def test_an_entry_that_no_picture_has_is_decoded_again(
    tmp_path: Path, change: dict[int, Any]
) -> None:
    known, told = tmp_path / "known.json", []
    source = Mine(*(Record(f"{i}", picture(tmp_path / f"{i}.png", i), ("x",)) for i in range(3)))
    first = seen(source, known=known)
    right = json.loads(known.read_text())["pictures"]
    bad = next(iter(right))
    facts = [change.get(place, fact) for place, fact in enumerate(right[bad])]
    write_known(known, right | {bad: facts})
    config = DataSettings(size=4)
    assert build_index(source, config, cache_file=known, report=told.append) == first
    assert told == [f"{known}: 1 entry is of no picture: its picture is decoded again"]
    assert json.loads(known.read_text())["pictures"] == right


@pytest.mark.parametrize(
    "facts", [[], [5, 9, 1, 1, False], [5, 9, 1, 1, False, False, 0], {}, "abcdef", None, 7]
)
def test_an_entry_of_another_form_is_decoded_again(tmp_path: Path, facts: Any) -> None:
    known, told = tmp_path / "known.json", []
    write_known(known, {"0 white": facts, "1 white": facts})
    assert known_pictures.read_decoded_pictures(known, told.append) == {}
    assert told == [f"{known}: 2 entries are of no picture: their pictures are decoded again"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_a_memory_that_is_no_file_is_ignored_and_left(tmp_path: Path, kind: str) -> None:
    known, told = tmp_path / "known.json", []
    if kind == "pipe":
        os.mkfifo(known)
    elif kind == "folder":
        known.mkdir()
    else:
        known.symlink_to("/dev/null")
    before = os.lstat(known)
    source = Mine(Record("a", picture(tmp_path / "a.png"), ("x",)))
    for _ in range(2):
        told.clear()
        build_index(source, DataSettings(size=4), cache_file=known, report=told.append)
        assert told == [
            f"{known} is no regular file and is ignored, so pictures are decoded again each time; "
            "remove it"
        ]
    assert os.lstat(known).st_mode == before.st_mode


def test_a_memory_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, told = tmp_path / "known.json", []
    source = Mine(Record("a", picture(tmp_path / "a.png"), ("x",)))
    first, real = seen(source, known=known), Path.read_text

    def refuse(path: Path, **options: Any) -> str:
        if path == known:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert build_index(source, DataSettings(size=4), cache_file=known, report=told.append) == first
    assert told == [f"{known} cannot be read and is ignored (Permission denied)"]


def test_the_memory_of_another_decoder_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, source = tmp_path / "known.json", Mine(Record("a", picture(tmp_path / "a.png"), ("x",)))
    seen(source, known=known)
    calls: list[Any] = []
    real = image.decode
    monkeypatch.setattr(
        image,
        "decode",
        lambda picture, **options: calls.append(picture) or real(picture, **options),
    )
    seen(source, known=known)
    assert calls == []
    monkeypatch.setattr("limner.data.known_pictures._DECODER", "1, Pillow 0.0")
    seen(source, known=known)
    assert calls == [tmp_path / "a.png"]


def test_further_frames_and_pages_are_told(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    frames = [Image.fromarray(draws.integers(0, 256, (9, 9, 3), np.uint8)) for _ in range(3)]
    for name in ("a.gif", "b.tif", "c.webp", "d.png", "e.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    # A second picture in a JPEG is a preview, a map of light or the other eye's view.
    frames[0].save(tmp_path / "f.jpg", "MPO", save_all=True, append_images=frames[1:])
    for name in ("g.gif", "h.tif", "i.webp", "j.png", "k.avif"):
        frames[0].save(tmp_path / name)
    source = Mine(*(Record(path.name, path, ("x",)) for path in sorted(tmp_path.iterdir())))
    config = DataSettings(size=4)
    for _ in range(2):  # decoded, and then known
        told: list[str] = []
        build_index(source, config, cache_file=tmp_path / "known", report=told.append)
        assert [line for line in told if "frames" in line] == [
            "5 of 11 records have further frames or pages, of which none but the first is used: "
            "a.gif; b.tif; c.webp; ..."
        ]


def test_profiles_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    grey = Image.fromarray(draws.integers(0, 256, (9, 9), np.uint8))
    color = Image.fromarray(draws.integers(0, 256, (9, 9, 3), np.uint8))
    faint = Image.merge("LA", (grey, Image.new("L", (9, 9), 9)))
    linear, srgb, press = linear_profile(), tabled_srgb_profile(), cmyk_profile()
    for name, one, profile in (
        ("bad a.png", color, linear[:150]),
        ("bad b.jpg", color, b"no profile"),
        ("bad c.webp", color, press),
        ("bad d.tif", color.convert("CMYK"), linear),
        ("bad e.png", grey, linear),
        ("bad f.png", color.convert("P"), LINEAR_GREY),
        ("bad g.png", faint, press),
        ("bad h.gif.png", color.convert("RGBA"), LINEAR_GREY),
        ("good a.png", color, srgb),
        ("good b.jpg", color, linear),
        ("good c.png", grey, srgb),
        ("good d.png", grey, LINEAR_GREY),
        ("good e.tif", color.convert("CMYK"), press),
        ("good f.png", color.convert("P"), linear),
        ("good g.png", faint, linear),
        ("good h.png", faint, LINEAR_GREY),
        ("good i.webp", color, None),
    ):
        one.save(tmp_path / name, icc_profile=profile)
    # A profile whose packing is damaged, and one too long to be unpacked.
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(color))
    packed = zlib.compress(b"\0" * (2**24 + 1))
    for name, data in (("bad i.png", b"rgb\0\0broken"), ("bad j.png", b"rgb\0\0" + packed)):
        (tmp_path / name).write_bytes(png(9, 9, 8, 2, rows, chunk(b"iCCP", data)))
    # One of which a piece is missing.
    content = encode(color, "JPEG", icc_profile=draws.bytes(70_000))
    content = content.replace(b"ICC_PROFILE\0\2\2", b"ICC_PROFILX\0\2\2")
    (tmp_path / "bad k.jpg").write_bytes(content)
    opened = color.copy()
    opened.info["icc_profile"] = press
    source = Mine(
        *(Record(path.name, path, ("x",)) for path in sorted(tmp_path.iterdir())),
        Record("bad opened", opened, ("x",)),
    )
    for _ in range(2):  # decoded, and then known
        told: list[str] = []
        index = build_index(
            source, DataSettings(size=4), cache_file=tmp_path / "known", report=told.append
        )
        bad = [entry.key for entry in index.with_unusable_profile]
        assert bad == [record.key for record in source.records if record.key.startswith("bad")]
        assert [line for line in told if "profile" in line] == [
            "12 of 21 records have a colour profile that cannot be used, and sRGB is assumed "
            "instead: bad a.png; bad b.jpg; bad c.webp; ..."
        ]


def test_a_memory_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    index = build_index(
        Mine(Record("a", picture(tmp_path / "a.png"), ("x",))),
        DataSettings(size=4),
        cache_file=tmp_path / "file" / "known.json",
        report=told.append,
    )
    assert len(index.entries) == 1 and len(told) == 1 and "cannot be written" in told[0]


def test_limited_is_a_fixed_choice_in_order() -> None:
    index = Index(
        tuple(Entry(i, str(i), ("x",), str(i), 4, 4) for i in range(50)), (("bad", "why"),)
    )
    chosen = [entry.row for entry in index.sample(12, 5).entries]
    assert (
        len(set(chosen)) == 12
        and chosen == sorted(chosen)
        and index.sample(12, 5).skipped == index.skipped
    )
    assert (
        [entry.row for entry in index.sample(12, 5).entries]
        == chosen
        != [entry.row for entry in index.sample(12, 6).entries]
    )
    assert index.sample(50, 5) is index and index.sample(99, 5) is index
    counts = np.bincount(
        [entry.row for seed in range(400) for entry in index.sample(5, seed).entries], minlength=50
    )
    assert counts.min() >= 15 and counts.max() <= 75


def test_an_index_survives_json(tmp_path: Path) -> None:
    index = seen(mixed(tmp_path), on_bad_record="skip", max_pixels=10_000)
    copy = Index.from_plain(json.loads(json.dumps(index.to_plain())))
    assert copy == index and copy.digest == index.digest


def test_captions_that_are_too_long_are_counted_and_named() -> None:
    asked: list[str] = []

    def lengths(texts: list[str]) -> list[int]:
        asked.extend(texts)
        return [len(text.split()) + 2 for text in texts]

    pairs = [
        ("a", "one two"),
        ("b", "one two three"),
        ("c", "one"),
        ("d", "one two three"),
        *((f"e{i}", f"w{i}") for i in range(2500)),
    ]
    found = find_truncated_captions(iter(pairs), lengths, 4)
    assert [(o.key, o.caption, o.tokens) for o in found] == [
        ("b", "one two three", 5),
        ("d", "one two three", 5),
    ]
    assert len(asked) == len(set(asked)) == 2503
    assert find_truncated_captions([], lengths, 4) == []
