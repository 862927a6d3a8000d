"""Everything that lies in a folder of pictures is taken, or told with the reason."""

import json
import os
import socket
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from limner.config.schema import DataSettings
from limner.data.folder import Folder
from limner.data.index import build_index
from limner.data.source import BadRecord, Record
from limner.errors import InputError, join_first, say_count
from limner.storage.run_folder import RunFolder


def paint(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path, "PNG")
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def write_rows(path: Path, *rows: tuple[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows]
    path.write_text("".join(lines), encoding="utf-8")


def read(root: Path, **settings: Any) -> tuple[dict[str, str], list[str]]:
    """Captions by key, and what is told, without the folder's name."""
    told: list[str] = []
    source = Folder(DataSettings(folder=str(root), **settings), told.append)
    records = [source[i] for i in range(len(source))]
    assert all(line.startswith(f"{root}: ") for line in told)
    captions = {record.key: record.captions[0] for record in records}
    return captions, [line.removeprefix(f"{root}: ") for line in told]


def test_a_kind_of_picture_that_is_called_train(tmp_path: Path) -> None:
    for name in ("bus/0", "car/0", "train/0", "train/deep/1"):
        paint(tmp_path / f"{name}.png", name)
    captions, told = read(tmp_path)
    assert sorted(captions.values()) == ["bus/0", "car/0", "train/0", "train/deep/1"]
    assert told == [
        "train is read as any other subfolder, since these lie beside it: bus, car. To read it "
        "alone, set data.folder to it."
    ]


def test_pictures_beside_a_folder_called_train(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "a"), paint(tmp_path / "train/b.png", "b")
    captions, told = read(tmp_path)
    assert captions == {"a.png": "a", "train/b.png": "b"}
    assert len(told) == 1 and "beside it: a.png" in told[0]


@pytest.mark.parametrize("other", ["test", "Validation", "val", "dev"])
def test_splits_beside_train_are_left_out_and_told(tmp_path: Path, other: str) -> None:
    paint(tmp_path / "train/a.png", "a"), paint(tmp_path / other / "b.png", "b")
    captions, told = read(tmp_path)
    assert captions == {"train/a.png": "a"}
    assert told == [
        "2 files are left out, since they are not in train/, which is data.split: "
        f"{other}/b.png, {other}/b.txt"
    ]
    captions, told = read(tmp_path, split=other)
    assert captions == {f"{other}/b.png": "b"} and "not in" in told[0]


@pytest.mark.parametrize(
    ("split", "folder", "other"),
    [
        ("train", "Train", "Test"),
        ("train", "TRAIN", "val"),
        ("train", "training", "testing"),
        ("train", "Training", "validation"),
        ("test", "Test", "Train"),
        ("test", "testing", "training"),
        ("validation", "val", "train"),
        ("Validation", "validation", "train"),
        ("dev", "Valid", "test"),
    ],
)
def test_a_split_is_found_as_it_is_usually_called(
    tmp_path: Path, split: str, folder: str, other: str
) -> None:
    paint(tmp_path / folder / "a.png", "a"), paint(tmp_path / other / "b.png", "b")
    captions, told = read(tmp_path, split=split)
    assert captions == {f"{folder}/a.png": "a"}
    assert told == [
        f"{folder} is read, for data.split = {split!r}",
        f"2 files are left out, since they are not in {folder}/, which is data.split: "
        f"{other}/b.png, {other}/b.txt",
    ]


def test_a_split_that_could_be_several_folders_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "valid/a.png", "a"), paint(tmp_path / "val/b.png", "b")
    with pytest.raises(InputError) as caught:
        read(tmp_path, split="validation")
    assert str(caught.value) == (
        f"data.split: {tmp_path} has val and valid, and 'validation' could be any of them; give "
        "the name of one"
    )
    assert read(tmp_path, split="valid")[0] == {"valid/a.png": "a"}
    with pytest.raises(InputError, match="has no folder 'test'"):
        read(tmp_path, split="test")


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("test", "validation"), "test, validation"),
        (("Testing",), "Testing"),
        (("val2017", "train2017"), "val2017"),
        (("train_images", "test_images"), "test_images"),
        (("images/train", "images/test", "images/val"), "images/test, images/val"),
        (("train", "bus", "test"), "test"),
    ],
)
def test_what_is_called_like_a_test_split_and_trained_on_is_told(
    tmp_path: Path, folders: tuple[str, ...], named: str
) -> None:
    for folder in folders:
        paint(tmp_path / folder / "a.png", folder)
    captions, told = read(tmp_path)
    assert sorted(captions.values()) == sorted(folders)
    assert told[-1] == (
        f"trained on too, though called like what is kept from training: {named}. To read one "
        "part alone, set data.folder or data.split."
    )
    assert read(tmp_path, split=".") == (captions, [])


def test_what_is_called_like_a_test_split_and_not_trained_on_is_not_told(tmp_path: Path) -> None:
    for name in ("contest/0", "invalid/0", "devices/0", "a/b/test/0", "test0"):
        paint(tmp_path / f"{name}.png", name)
    assert read(tmp_path)[1] == []
    paint(tmp_path / "test/0.png")
    write_rows(tmp_path / "metadata.jsonl", ("contest/0.png", "x"))
    assert not [line for line in read(tmp_path)[1] if "trained on" in line]


def test_train_alone_is_a_split_and_nothing_is_told(tmp_path: Path) -> None:
    paint(tmp_path / "train/a.png", "a")
    assert read(tmp_path) == ({"train/a.png": "a"}, [])


def test_rows_of_another_split_are_left_out(tmp_path: Path) -> None:
    paint(tmp_path / "train/a.png"), paint(tmp_path / "test/b.png")
    write_rows(tmp_path / "metadata.jsonl", ("train/a.png", "a"), ("test/b.png", "b"))
    captions, told = read(tmp_path)
    assert captions == {"train/a.png": "a"} and "not in train/" in told[0]
    assert read(tmp_path, split="test")[0] == {"test/b.png": "b"}


@pytest.mark.parametrize("first", ["train", "one"])
def test_metadata_in_several_subfolders(tmp_path: Path, first: str) -> None:
    for folder in (first, "more", "more/deep"):
        paint(tmp_path / folder / "0.png")
        write_rows(tmp_path / folder / "metadata.jsonl", ("0.png", folder))
    paint(tmp_path / "more/alone.png")
    captions, told = read(tmp_path)
    assert captions == {
        f"{first}/0.png": first,
        "more/0.png": "more",
        "more/deep/0.png": "more/deep",
    }
    assert told[-1] == (
        "1 of 4 pictures is left out, because it has no row in a metadata file: more/alone.png"
    )


def test_metadata_of_several_kinds_name_their_lines(tmp_path: Path) -> None:
    paint(tmp_path / "one/0.png"), paint(tmp_path / "two/0.png")
    write_rows(tmp_path / "one/metadata.jsonl", ("0.png", "x"), ("gone.png", "y"))
    (tmp_path / "two/metadata.csv").write_text("file_name,text\n0.png,z\n")
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    assert [source[0].captions, source[2].captions] == [("x",), ("z",)]
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert str(caught.value) == (
        f"one/gone.png: one/metadata.jsonl line 2: there is no such file in {tmp_path / 'one'}"
    )


def test_two_metadata_files_for_one_picture_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "sub/a.png")
    write_rows(tmp_path / "metadata.jsonl", ("sub/a.png", "x"))
    write_rows(tmp_path / "sub/metadata.jsonl", ("a.png", "y"))
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: sub/a.png has rows in metadata.jsonl and in sub/metadata.jsonl; keep those "
        "that hold"
    )


def test_links_to_folders_are_told(tmp_path: Path) -> None:
    inner = tmp_path / "data"
    paint(inner / "real/a.png", "a"), paint(tmp_path / "out/b.png", "b")
    (inner / "linked").symlink_to(tmp_path / "out")
    (inner / "again").symlink_to(inner / "real")
    captions, told = read(inner)
    assert captions == {"real/a.png": "a"}
    assert told == ["2 links to folders are not followed: again, linked"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "sub/metadata.jsonl"])
def test_a_metadata_file_outside_the_folder_is_not_read(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "data"
    paint(inner / "sub/a.png")
    (tmp_path / "private").write_text('"what is private"\n')
    (inner / name).symlink_to(tmp_path / "private")
    with pytest.raises(InputError) as caught:
        read(inner)
    assert "is a link to a place outside" in str(caught.value)
    assert "private" not in str(caught.value)


def test_pipes_and_sockets_are_told_and_never_opened(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "a"), paint(tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "c.png")
    os.mkfifo(tmp_path / "metadata.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s"))
        captions, told = read(tmp_path)
    assert captions == {"a.png": "a"}
    assert told == [
        "4 pipes, sockets and devices are left out: b.txt, c.png, metadata.jsonl, s",
        "1 of 2 pictures is left out, because it has no .txt with its caption: b.png",
    ]


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "a.png", "a"), paint(tmp_path / "closed/b.png", "b")
    scan = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == refused:
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("limner.data.listing.os.scandir", refuse)
    refused = "closed"
    captions, told = read(tmp_path)
    assert captions == {"a.png": "a"}
    assert told == ["1 folder cannot be listed (Permission denied): closed"]
    refused = tmp_path.name
    with pytest.raises(InputError, match=rf"data\.folder: {tmp_path}: Permission denied"):
        read(tmp_path)


def test_what_may_not_be_read_is_named_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user who may list a folder and not enter it, and may not read some files."""
    for name in ("a", "b", "names/c"):
        paint(tmp_path / f"{name}.png", name)
    paint(tmp_path / "d.png"), (tmp_path / "d.txt").write_text("d")
    real, closed = os.stat, {str(tmp_path / "names" / "c.png"), str(tmp_path / "closed" / "x.png")}
    (tmp_path / "l.png").symlink_to("closed/x.png"), (tmp_path / "l.txt").write_text("l")

    def look(path: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and os.path.realpath(path) in closed:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, **options)

    def read_file(path: Any, *given: Any, **options: Any) -> Any:
        if Path(path).name in ("b.png", "d.txt"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return open(path, *given, **options)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr("limner.data.folder.open", read_file, raising=False)
    monkeypatch.setattr("limner.storage.atomic.open", read_file, raising=False)
    settings = DataSettings(folder=str(tmp_path), size=4)
    source = Folder(settings, lambda line: None)
    index = build_index(source, settings, report=lambda line: None, only_look=True)
    assert [entry.key for entry in index.entries] == ["a.png"]
    assert list(index.skipped) == [
        ("b.png", "cannot be read: Permission denied"),
        ("d.png", "d.txt cannot be read: Permission denied"),
        ("l.png", "l.png cannot be read: Permission denied"),
        ("names/c.png", "c.png cannot be read: Permission denied"),
    ]
    paths = [Record("p", path, ("x",)) for path in sorted(map(Path, closed))]
    with pytest.raises(InputError) as caught:
        build_index(paths, settings, report=lambda line: None)
    assert str(caught.value).count("p: cannot be read: Permission denied") == 2
    closed.add(str(tmp_path / "root"))
    with pytest.raises(InputError) as refused:
        Folder(DataSettings(folder=str(tmp_path / "root")), print)
    assert str(refused.value) == (
        f"data.folder: {tmp_path / 'root'} cannot be read (Permission denied); give a folder with "
        "pictures and captions"
    )


def test_texts_and_other_files_are_told_in_a_line_each(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        paint(tmp_path / name, name)
    for i in range(7):
        (tmp_path / f"note{i}.txt").write_text("x")
    for name in ("clip.mp4", "b.caption", "sub/c.psd", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    texts = "note0.txt, note1.txt, note2.txt, note3.txt, note4.txt, ..."
    others = "4 files that are no pictures are left out: README, b.caption, clip.mp4, sub/c.psd"
    captions, told = read(tmp_path)
    assert captions == {"a.png": "a.png", "b.jpg": "b.jpg"}
    wanting = "are left out, because no picture has the same name"
    assert told == [f"7 texts {wanting}: {texts}", others]
    assert read(tmp_path, caption=None)[1] == [
        "9 texts are not read, since data.caption is none: a.txt, b.txt, note0.txt, note1.txt, "
        "note2.txt, ...",
        others,
    ]
    write_rows(tmp_path / "metadata.jsonl", ("a.png", "x"), ("b.jpg", "y"), ("sub/c.psd", "z"))
    assert read(tmp_path)[1] == [
        "9 texts are not read, since metadata.jsonl has the captions: a.txt, b.txt, note0.txt, "
        "note1.txt, note2.txt, ...",
        "3 files that are no pictures are left out: README, b.caption, clip.mp4",
    ]


def test_what_keeps_all_pictures_away_is_told_before_the_refusal(tmp_path: Path) -> None:
    paint(tmp_path / "out/a.png", "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "out")
    told: list[str] = []
    with pytest.raises(InputError, match="no pictures here"):
        Folder(DataSettings(folder=str(tmp_path / "data")), told.append)
    assert told == [f"{tmp_path / 'data'}: 1 link to a folder is not followed: linked"]


def test_a_second_text_of_a_picture_is_told(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "a")
    (tmp_path / "a.TXT").write_text("b")
    if len(os.listdir(tmp_path)) == 2:
        pytest.skip("this disk does not tell large letters from small")
    captions, told = read(tmp_path)
    assert captions == {"a.png": "a"} and "1 text is left out" in told[0] and "a.TXT" in told[0]
    assert told == ["1 text is left out, because its picture has another: a.TXT"]
    (tmp_path / "b.txt").write_text("b"), (tmp_path / "a.Txt").write_text("b")
    assert read(tmp_path)[1] == [
        "2 texts are left out, because their pictures have others: a.TXT, a.Txt",
        "1 text is left out, because no picture has the same name: b.txt",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: a.png could have its caption from any of 'a.TXT', 'a.Txt'; keep one"
    )


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def paint_both(folder: Path) -> None:
    """Two pictures whose names differ in how their accent is written."""
    paint(folder / f"{NFC}.png"), paint(folder / f"{NFD}.png")
    if len(os.listdir(folder)) == 1:
        pytest.skip("this disk knows one spelling")


@pytest.mark.parametrize("ending", [".txt", ".TXT"])
def test_pictures_that_differ_in_accents_have_their_own_texts(tmp_path: Path, ending: str) -> None:
    paint_both(tmp_path)
    (tmp_path / f"{NFC}{ending}").write_text("composed")
    (tmp_path / f"{NFD}{ending}").write_text("decomposed")
    both = {f"{NFC}.png": "composed", f"{NFD}.png": "decomposed"}
    assert read(tmp_path) == (both, [])
    (tmp_path / f"{NFC}{ending}").unlink()
    captions, told = read(tmp_path)
    assert captions == {f"{NFD}.png": "decomposed"}, "the other's text is not taken"
    assert told == [
        f"1 of 2 pictures is left out, because it has no .txt with its caption: {NFC}.png"
    ]


@pytest.mark.parametrize(("picture", "text"), [(NFC, NFD), (NFD, NFC)])
def test_a_text_of_another_spelling_serves_where_there_is_none(
    tmp_path: Path, picture: str, text: str
) -> None:
    paint(tmp_path / f"{picture}.png"), (tmp_path / f"{text}.txt").write_text("x")
    assert read(tmp_path) == ({f"{picture}.png": "x"}, [])
    (tmp_path / f"{picture}.txt").write_text("y")
    assert read(tmp_path) == (
        {f"{picture}.png": "y"},
        [f"1 text is left out, because its picture has another: {text}.txt"],
    )


def test_a_text_that_could_be_one_of_two_spellings_is_refused(tmp_path: Path) -> None:
    """Of two accents there is a third way to write them."""
    forms = ["\u1ead", "a\u0323\u0302", "\u1ea1\u0302"]
    paint(tmp_path / f"{forms[0]}.png")
    for text in forms[1:]:
        (tmp_path / f"{text}.txt").write_text(text)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: {forms[0]}.png could have its caption from any of 'a\\u0323\\u0302.txt', "
        "'\\u1ea1\\u0302.txt'; keep one"
    )
    for text in forms[1:]:
        (tmp_path / f"{text}.txt").unlink(), paint(tmp_path / f"{text}.png")
    (tmp_path / f"{forms[0]}.png").unlink()
    write_rows(tmp_path / "metadata.jsonl", (f"{forms[0]}.png", "x"), (f"{forms[1]}.png", "y"))
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    assert source[1].captions == ("y",)
    with pytest.raises(BadRecord) as bad:
        source[0]
    assert bad.value.reason == (
        "metadata.jsonl line 1: file_name could be 'a\\u0323\\u0302.png' or '\\u1ea1\\u0302.png', "
        "whose accents are written differently; rename one"
    )


def test_pictures_that_share_a_text_are_told(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "x"), paint(tmp_path / "a.jpg"), paint(tmp_path / "b.png", "y")
    captions, told = read(tmp_path)
    assert captions == {"a.jpg": "x", "a.png": "x", "b.png": "y"}
    assert told == ["2 pictures share their .txt with another: a.jpg, a.png"]


def test_links_to_nothing_are_named_and_no_text_is_blamed(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "a")
    for name, target in (("b", "gone.png"), ("c", "d.png"), ("d", "c.png"), ("e", "b.png")):
        (tmp_path / f"{name}.png").symlink_to(target), (tmp_path / f"{name}.txt").write_text(name)
    paint(tmp_path / "f.png"), (tmp_path / "f.txt").symlink_to("gone.txt")
    nothing = f"is a link to {tmp_path / 'gone.png'}, and there is no such file"
    circle = "is a link that leads back to itself, so there is no such file"
    wanted = {
        "b.png": f"b.png {nothing}",
        "c.png": f"c.png {circle}",
        "d.png": f"d.png {circle}",
        "e.png": f"e.png {nothing}",
        "f.png": f"f.txt is a link to {tmp_path / 'gone.txt'}, and there is no such file",
    }
    names = sorted(wanted)
    for caption in ("text", None):
        source = Folder(DataSettings(folder=str(tmp_path), caption=caption), lambda line: None)
        for i, name in enumerate(names[: 5 if caption else 4], 1):
            with pytest.raises(BadRecord) as caught:
                source[i]
            assert str(caught.value) == f"{name}: {wanted[name]}"
    write_rows(tmp_path / "metadata.jsonl", ("b.png", "x"), ("gone.png", "x"))
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    for i, words in enumerate((f"b.png {nothing}", f"there is no such file in {tmp_path}")):
        with pytest.raises(BadRecord) as caught:
            source[i]
        assert caught.value.reason == f"metadata.jsonl line {i + 1}: {words}"
    (tmp_path / "metadata.jsonl").unlink(), (tmp_path / "metadata.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}: metadata.jsonl is a link to {tmp_path / 'gone.jsonl'}, and there is no such "
        "file"
    )


@pytest.mark.parametrize("name", ["Q: what.png", "a:b.png", "\\a.png", "C:/x.png", "sub/D:.png"])
def test_a_name_that_is_listed_is_taken_whatever_it_would_mean_elsewhere(
    tmp_path: Path, name: str
) -> None:
    paint(tmp_path / name)
    write_rows(tmp_path / "metadata.jsonl", (name, "x"))
    assert read(tmp_path) == ({name: "x"}, [])


def test_a_name_that_is_not_listed_is_refused_for_what_it_means(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    names = {"C:\\a.png": "absolute", "/a.png": "absolute", "../a.png": "leads out"}
    write_rows(tmp_path / "metadata.jsonl", *((name, "x") for name in names))
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    for i, words in enumerate(names.values()):
        with pytest.raises(BadRecord, match=rf"line {i + 1}: file_name .*{words}"):
            source[i]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_that_are_a_link_to_themselves(tmp_path: Path, name: str) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / name).symlink_to(name)
    with pytest.raises(InputError, match="symbolic links"):
        read(tmp_path)


def test_pictures_and_texts_that_are_links_to_themselves(tmp_path: Path) -> None:
    paint(tmp_path / "a.png"), paint(tmp_path / "c.png", "c")
    (tmp_path / "a.txt").symlink_to("a.txt")
    (tmp_path / "b.png").symlink_to("b.png")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "d.png").symlink_to("e.png"), (tmp_path / "e.png").symlink_to("d.png")
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    assert source[2].key == "c.png"
    for i, words in ((0, r"a\.png: a\.txt cannot be read: .*symbolic links"), (1, r"b\.png: ")):
        with pytest.raises(BadRecord, match=words):
            source[i]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop is not there"):
        Folder(DataSettings(folder=str(tmp_path / "loop")), print)


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    paint(tmp_path / "x.png", "x")
    for end in (b".png", b".txt"):
        os.rename(os.fsencode(tmp_path) + b"/x" + end, os.fsencode(tmp_path) + b"/caf\xe9" + end)
    captions, _ = read(tmp_path)
    assert captions == {"caf\\xe9.png": "x"}


def test_one_is_and_several_are() -> None:
    said = [say_count(count, "text is", "texts are") for count in (0, 1, 2)]
    assert said == ["0 texts are", "1 text is", "2 texts are"]
    names = list("abcdef")
    assert [join_first(names), join_first(names[:5]), join_first([])] == [
        "a, b, c, d, e, ...",
        "a, b, c, d, e",
        "",
    ]
    assert join_first(names, 2, "; ") == "a; b; ..."


def test_folders_of_runs_are_no_data(tmp_path: Path) -> None:
    """A run below its pictures would be trained on its own previews when it goes on."""
    paint(tmp_path / "a.png")
    folder = RunFolder(tmp_path / "runs/one")
    paint(folder.previews_of_step(2) / "0.png")
    paint(tmp_path / "runs/two/b.png")
    folder.config.write_text("{}")
    (tmp_path / "runs/two/config.json").write_text("{}")
    assert set(read(tmp_path, caption=None)[0]) == {
        "a.png",
        "runs/one/previews/step-000002/0.png",
        "runs/two/b.png",
    }
    folder.status.write_text("{}")
    captions, told = read(tmp_path, caption=None)
    assert set(captions) == {"a.png", "runs/two/b.png"}
    assert told[0] == "1 folder of a run is left out: runs/one"


def test_what_metadata_names_is_used_and_told(tmp_path: Path) -> None:
    paint(tmp_path / ".x/a.png"), paint(tmp_path / ".y/b.png"), paint(tmp_path / "real/c.png")
    (tmp_path / "link").symlink_to("real")
    write_rows(tmp_path / "metadata.jsonl", (".x/a.png", "a"), ("link/c.png", "c"))
    captions, told = read(tmp_path)
    assert captions == {".x/a.png": "a", "link/c.png": "c"}
    assert told[:3] == [
        "2 hidden files and folders are left out: .x, .y",
        "1 link to a folder is not followed: link",
        "2 files in what is left out are used all the same, since metadata names them: .x/a.png, "
        "link/c.png",
    ]
    write_rows(tmp_path / "metadata.jsonl", ("real/c.png", "c"))
    assert not [line for line in read(tmp_path)[1] if "all the same" in line]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Metadata.JSONL", "metadata.jsonl"),
        ("metadata.jsonl.txt", "metadata.jsonl"),
        ("METADATA.csv", "metadata.csv"),
        ("metadata.parquet (1)", "metadata.parquet"),
    ],
)
def test_metadata_by_another_name_is_told(tmp_path: Path, name: str, meant: str) -> None:
    paint(tmp_path / "a.png")
    write_rows(tmp_path / name, ("a.png", "a"))
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: 1 picture, but no captions; {name} is not read by that name: if it holds "
        f"the captions, call it {meant}"
    )


FORGED = "a\nlimner: all good\x1b[2J\u2028\u202e.png"
ESCAPED = r"a\nlimner: all good\x1b[2J\u2028\u202e.png"


def test_names_forge_no_message(tmp_path: Path) -> None:
    paint(tmp_path / FORGED), paint(tmp_path / "b.png", "b")
    paint(tmp_path / f"x{FORGED}", "x"), paint(tmp_path / "\N{GRINNING FACE}.png", "face")
    captions, told = read(tmp_path)
    assert set(captions) == {"b.png", f"x{ESCAPED}", "\N{GRINNING FACE}.png"}
    assert told == [
        f"1 of 4 pictures is left out, because it has no .txt with its caption: {ESCAPED}"
    ]
    (tmp_path / f"x{FORGED}").unlink(), (tmp_path / f"x{FORGED}").symlink_to("nowhere")
    with pytest.raises(BadRecord) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"x{ESCAPED}: x{ESCAPED} is a link to {tmp_path / 'nowhere'}, and there is no such file"
    )


def test_names_forge_no_error(tmp_path: Path) -> None:
    paint(tmp_path / FORGED)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and "\u202e" not in str(caught.value)
    write_rows(tmp_path / "metadata.jsonl", (FORGED, "a"))
    (tmp_path / "c\nd").mkdir()
    write_rows(tmp_path / "c\nd" / "metadata.jsonl", (f"no{FORGED}", "a"))
    with pytest.raises(BadRecord) as missing:
        read(tmp_path)
    assert "\n" not in str(missing.value) and r"c\nd/metadata.jsonl" in str(missing.value)
    assert join_first([FORGED, "b"], 1) == f"{ESCAPED}, ..."
