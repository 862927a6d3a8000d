"""Folders and Hub data sets give the records that were meant, and name what was not."""

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from limner.config.schema import DataSettings
from limner.data.folder import Folder
from limner.data.hub_dataset import HubDataset, find_cache
from limner.data.image import decode
from limner.data.mixture import open_source
from limner.data.source import BadRecord, Record
from limner.errors import DiskError, HubError, InputError


def paint(path: Path, colour: tuple[int, int, int] = (200, 10, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, "PNG")
    return path


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    import csv

    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


def folder(path: Path, **settings: Any) -> tuple[Folder, list[str]]:
    told: list[str] = []
    source = open_source(DataSettings(folder=str(path), **settings), told.append)
    assert isinstance(source, Folder)
    return source, told


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        folder(path, **settings)
    return str(caught.value)


def bad(source: Any, i: int) -> tuple[str, str]:
    with pytest.raises(BadRecord) as caught:
        source[i]
    assert str(caught.value) == f"{caught.value.key}: {caught.value.reason}"
    return caught.value.key, caught.value.reason


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "metadata.jsonl": write_jsonl,
    "metadata.csv": write_csv,
    "metadata.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("place", ["", "train"])
def test_metadata_of_each_kind_in_each_place(tmp_path: Path, name: str, place: str) -> None:
    base = tmp_path / place
    paint(base / "b.png"), paint(base / "deep" / "er" / "a.png")
    WRITERS[name](
        base / name,
        [
            {"file_name": "deep/er/a.png", "words": "ein Apfel, grün"},
            {"file_name": "./b.png", "words": ""},
        ],
    )
    source, told = folder(tmp_path, caption="words")
    prefix = f"{place}/" if place else ""
    assert [(r.key, r.image, r.captions) for r in (source[i] for i in range(len(source)))] == [
        (f"{prefix}deep/er/a.png", base / "deep/er/a.png", ("ein Apfel, grün",)),
        (f"{prefix}b.png", base / "b.png", ("",)),
    ]
    assert told == []


def test_metadata_in_the_folder_names_files_in_a_subfolder(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "train/a.png", "text": "x"}])
    assert folder(tmp_path)[0][0] == Record("train/a.png", tmp_path / "train/a.png", ("x",))


def test_a_split_is_a_subfolder(tmp_path: Path) -> None:
    for split in ("train", "test"):
        paint(tmp_path / split / "a.png")
        write_jsonl(tmp_path / split / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
    assert folder(tmp_path)[0][0].captions == ("train",)
    assert folder(tmp_path, split="test")[0][0].captions == ("test",)
    assert "no folder 'validation'" in refused(tmp_path, split="validation")


def test_several_captions(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": ["one", "two"]}
    write_jsonl(tmp_path / "metadata.jsonl", [row])
    assert folder(tmp_path)[0][0].captions == ("one", "two")
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "metadata.parquet", [row])
    assert folder(tmp_path)[0][0].captions == ("one", "two")


def test_a_text_beside_each_picture(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "alone.png"):
        paint(tmp_path / name)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two  \n")
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    (tmp_path / "sub/c.txt").write_text("drei Äpfel", encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a caption", encoding="utf-8")
    source, told = folder(tmp_path)
    assert [(source[i].key, source[i].captions) for i in range(len(source))] == [
        ("a.JPG", ("",)),
        ("b.png", ("one", "two")),
        ("sub/c.webp", ("drei Äpfel",)),
    ]
    assert told == [
        f"{tmp_path}: 1 of 4 pictures is left out, because it has no .txt with its caption: "
        "alone.png",
        f"{tmp_path}: 1 text is left out, because no picture has the same name: README.txt",
    ]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert bad(source, 1) == ("b.png", "b.txt cannot be read: it is not UTF-8 text")


def test_what_systems_leave_behind_is_no_picture(tmp_path: Path) -> None:
    for name in (
        "a.png",
        ".hidden.png",
        "._a.png",
        ".thumbnails/a.png",
        "__MACOSX/a.png",
        "sub/Thumbs.db",
        "notes.pdf",
    ):
        paint(tmp_path / name)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    source, told = folder(tmp_path)
    assert len(source) == 1 and told == [
        f"{tmp_path}: 5 hidden files and folders are left out: ._a.png, .hidden.png, .thumbnails, "
        "__MACOSX, sub/Thumbs.db",
        f"{tmp_path}: 1 file that is no picture is left out: notes.pdf",
    ]


def test_pictures_without_a_row_are_told_in_one_line(tmp_path: Path) -> None:
    for i in range(9):
        paint(tmp_path / f"{i}.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "4.png", "text": "x"}])
    source, told = folder(tmp_path)
    assert told == [
        f"{tmp_path}: 8 of 9 pictures are left out, because they have no row in metadata.jsonl: "
        "0.png, 1.png, 2.png, 3.png, 5.png, ..."
    ]
    assert len(source) == 1


def test_a_row_without_a_file_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "dir.png").mkdir()
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "a.png", "text": "x"},
            {"file_name": "b.png", "text": "y"},
            {"file_name": "dir.png", "text": "z"},
        ],
    )
    source, _ = folder(tmp_path)
    assert source[0].captions == ("x",)
    assert bad(source, 1) == (
        "b.png",
        f"metadata.jsonl line 2: there is no such file in {tmp_path}",
    )
    assert bad(source, 2)[0] == "dir.png"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../out.png", "'..'"),
        ("sub/../../out.png", "'..'"),
        ("..\\out.png", "'..'"),
        ("sub\\..\\..\\out.png", "'..'"),
        ("sub\\b/../../out.png", "'..'"),
        ("sub/..\\../out.png", "'..'"),
        ("../data/a.png", "'..'"),
        ("/sub/../a.png", "absolute"),
        ("/etc/hostname", "absolute"),
        ("C:\\out.png", "absolute"),
        ("c:/out.png", "absolute"),
        ("\\\\server\\out.png", "absolute"),
        ("a\0.png", "NUL"),
        ("", "missing"),
        ("x" * 5000, "no such file"),
        ("\ud800.png", "no such file"),
    ],
)
@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_names_that_lead_out_of_the_folder(
    tmp_path: Path, name: str, words: str, kind: str
) -> None:
    if kind != "metadata.jsonl" and ("\0" in name or "\ud800" in name):
        pytest.skip("this kind of file cannot hold such a name")
    inner = tmp_path / "data"
    paint(inner / "a.png"), paint(tmp_path / "out.png"), paint(inner / "sub" / "b.png")
    WRITERS[kind](
        inner / kind, [{"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "y"}]
    )
    source, _ = folder(inner)
    assert source[0].key == "a.png"
    key, reason = bad(source, 1)
    assert words in reason and reason.startswith(kind) and "\0" not in key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sub/../a.png", "a.png"),
        ("./sub/.././a.png", "a.png"),
        ("sub\\..\\a.png", "a.png"),
        ("sub/../sub/b.png", "sub/b.png"),
        ("sub/../.hidden/c.png", ".hidden/c.png"),
        ("a/b/../../a.png", "a.png"),
    ],
)
def test_names_that_stay_inside_the_folder(tmp_path: Path, name: str, key: str) -> None:
    paint(tmp_path / "a.png"), paint(tmp_path / "sub/b.png"), paint(tmp_path / ".hidden/c.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "x"}])
    source, _ = folder(tmp_path)
    assert (source[0].key, source[0].captions) == (key, ("x",))
    assert source[0].image == tmp_path / key


def test_a_row_of_a_subfolder_stays_in_it(tmp_path: Path) -> None:
    paint(tmp_path / "a.png"), paint(tmp_path / "sub" / "b.png")
    names = "../a.png", "x/../b.png"
    rows = [{"file_name": name, "text": "x"} for name in names]
    write_jsonl(tmp_path / "sub" / "metadata.jsonl", rows)
    source, _ = folder(tmp_path)
    assert "file_name leads out of the metadata file's folder with '..'" in bad(source, 0)[1]
    assert source[1].key == "sub/b.png"


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [{"file_name": name, "text": "x"} for name in ("a.png", None, 5, ["a.png"])]
        + [{"text": "x"}],
    )
    source, _ = folder(tmp_path)
    assert [bad(source, i)[1] for i in (1, 2, 3, 4)] == [
        f"metadata.jsonl line {i}: file_name is missing or not a text" for i in (2, 3, 4, 5)
    ]


def test_links_may_lead_about_the_folder_but_not_out_of_it(tmp_path: Path) -> None:
    inner, secret = tmp_path / "data", tmp_path / "secret"
    paint(inner / "a.png"), paint(secret / "s.png")
    (secret / "s.txt").write_text("a secret", encoding="utf-8")
    (inner / "out.png").symlink_to(secret / "s.png")
    (inner / "outer").symlink_to(secret)
    (inner / "in.png").symlink_to(inner / "a.png")
    (inner / "loop.png").symlink_to(inner / "loop.png")
    rows = [
        {"file_name": name, "text": "x"}
        for name in ("in.png", "out.png", "outer/s.png", "loop.png")
    ]
    write_jsonl(inner / "metadata.jsonl", rows)
    source, _ = folder(inner)
    assert decode(source[0].image, background="white", max_pixels=100).shape == (4, 4, 3)
    assert bad(source, 1) == (
        "out.png",
        f"metadata.jsonl line 2: out.png is a link to a place outside {inner}",
    )
    assert "outside" in bad(source, 2)[1] and "no such file" in bad(source, 3)[1]
    (inner / "metadata.jsonl").unlink()
    (inner / "a.txt").symlink_to(secret / "s.txt")
    texts, _ = folder(inner)
    assert bad(texts, 0) == ("a.png", f"a.txt: a.txt is a link to a place outside {inner}")
    (tmp_path / "alias").symlink_to(inner)
    write_jsonl(inner / "metadata.jsonl", rows)
    assert folder(tmp_path / "alias")[0][0].key == "in.png"


@pytest.mark.parametrize(
    ("disk", "row"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC"), ("NFD", "NFD")]
)
def test_accents_match_however_they_are_spelled(tmp_path: Path, disk: str, row: str) -> None:
    name = "Äpfel/übergrößen é.png"
    on_disk, in_row = unicodedata.normalize(disk, name), unicodedata.normalize(row, name)  # type: ignore[arg-type]
    paint(tmp_path / on_disk)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": in_row, "text": "x"}])
    source, told = folder(tmp_path)
    assert isinstance(source[0].image, Path) and source[0].image.is_file() and told == []
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / in_row).with_suffix(".txt").parent.mkdir(exist_ok=True)
    (tmp_path / in_row).with_suffix(".txt").write_text("y", encoding="utf-8")
    assert folder(tmp_path)[0][0].captions == ("y",)


def test_two_spellings_on_one_disk_are_two_files(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]  # type: ignore[arg-type]
    for name in names:
        paint(tmp_path / name)
    if len(os.listdir(tmp_path)) == 1:
        pytest.skip("this disk knows one spelling")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": name, "text": "x"} for name in names])
    source, _ = folder(tmp_path)
    assert [source[i].image for i in range(2)] == [tmp_path / name for name in names]


def test_backslashes_of_another_system(tmp_path: Path) -> None:
    paint(tmp_path / "sub" / "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "sub\\a.png", "text": "x"}])
    source, told = folder(tmp_path)
    assert (source[0].key, told) == ("sub/a.png", [])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "the caption is missing (null)"),
        (5, "the caption is 5 (int); a text or a list of texts is expected"),
        ({"en": "x"}, "(dict)"),
        ([], "the list of captions is empty"),
        (["x", None], "the caption is missing (null)"),
        (["x", 1.5], "1.5 (float)"),
        ("\ud83d", "not valid Unicode"),
    ],
)
def test_captions_that_are_none(tmp_path: Path, value: Any, words: str) -> None:
    paint(tmp_path / "a.png")
    write_jsonl(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "a.png", "text": "x"},
            {"file_name": "a.png", "text": value},
            {"file_name": "a.png"},
        ],
    )
    source, _ = folder(tmp_path)
    key, reason = bad(source, 1)
    assert key == "a.png" and reason.startswith("metadata.jsonl line 2: ") and words in reason
    assert bad(source, 2)[1] == "metadata.jsonl line 3: the caption is missing (null)"


def test_a_short_csv_line_has_no_caption(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\na.png,"two\nlines"\na.png\na.png,\n', encoding="utf-8"
    )
    source, _ = folder(tmp_path)
    assert source[0].captions == ("two\nlines",) and source[2].captions == ("",)
    assert bad(source, 1)[1] == "metadata.csv line 4: the caption is missing (null)"


def test_structural_faults_say_what_to_do(tmp_path: Path) -> None:
    assert "is not there" in refused(tmp_path / "none")
    assert "is not a folder" in refused(paint(tmp_path / "file.png"))
    (tmp_path / "empty").mkdir()
    assert "no pictures here" in refused(tmp_path / "empty")
    paint(tmp_path / "bare" / "a.png")
    assert "1 picture, but no captions" in refused(
        tmp_path / "bare"
    ) and '{"file_name": "a.png", "text": "what it shows"}' in refused(tmp_path / "bare")
    write_jsonl(tmp_path / "bare" / "metadata.jsonl", [])
    assert "no rows" in refused(tmp_path / "bare")
    write_csv(tmp_path / "bare" / "metadata.csv", [{"file_name": "a.png", "text": "x"}])
    assert "2 metadata files (metadata.jsonl, metadata.csv)" in refused(tmp_path / "bare")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_wrong_column_is_named_with_those_there_are(tmp_path: Path, kind: str) -> None:
    paint(tmp_path / "a.png")
    WRITERS[kind](tmp_path / kind, [{"file_name": "a.png", "caption": "x", "id": "7"}])
    text = refused(tmp_path, caption="captoin")
    assert (
        text == f"{tmp_path / kind}: no column 'captoin' (data.caption); its columns are "
        "file_name, caption, id. Did you mean data.caption=caption?"
    )
    assert "Did you mean" not in refused(tmp_path, caption="zzz")
    (tmp_path / kind).unlink()
    WRITERS[kind](tmp_path / kind, [{"image": "a.png", "text": "x"}])
    assert "no column 'file_name'; its columns are image, text." in refused(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [("{oops}", "not JSON"), ("[1]", "is not a row"), ('{"a": "\udcff"}', "not JSON")],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    paint(tmp_path / "a.png")
    good = b'{"file_name": "a.png", "text": "x"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(
        good + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n" + good
    )
    text = refused(tmp_path)
    assert text.startswith(f"{tmp_path / 'metadata.jsonl'}:3: ") and words in text


@pytest.mark.parametrize(
    "text", ['{"file_name": "a.png", "text": "x"}\r\n', "file_name,text\r\na.png,x\r\n"]
)
def test_metadata_written_by_windows_editors(tmp_path: Path, text: str) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / ("metadata.jsonl" if text[0] == "{" else "metadata.csv")).write_bytes(
        b"\xef\xbb\xbf" + text.encode()
    )
    source, _ = folder(tmp_path)
    assert (len(source), source[0].captions) == (1, ("x",))


def test_damaged_csv_and_parquet(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,red, round\n", encoding="utf-8")
    assert "metadata.csv line 2" in refused(
        tmp_path
    ) and "more fields than the 2 columns" in refused(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    assert "not a CSV file in UTF-8" in refused(tmp_path)
    (tmp_path / "metadata.csv").rename(tmp_path / "metadata.parquet")
    pytest.importorskip("pyarrow")
    assert "not a parquet file" in refused(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(tmp_path)


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="install"):
        open_source(DataSettings(hub="someone/pictures"), print)


def test_records_take_what_users_have(tmp_path: Path) -> None:
    assert Record("a", tmp_path / "a.png", "one caption").captions == ("one caption",)  # type: ignore[arg-type]
    assert Record("a", str(tmp_path / "a.png"), ["x", "y"]) == Record(
        "a", tmp_path / "a.png", ("x", "y")
    )  # type: ignore[arg-type]
    assert Record("a", b"", np.array(["x", "y"])).captions == ("x", "y")  # type: ignore[arg-type]
    for wrong in (None, 3, [], [None], ()):
        with pytest.raises(BadRecord, match=r"^k: the"):
            Record("k", b"", wrong)  # type: ignore[arg-type]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return datasets


def hub(tmp_path: Path, name: str, **settings: Any) -> HubDataset:
    source = open_source(
        DataSettings(hub=name, cache_dir=str(tmp_path / "cache"), **settings), print
    )
    assert isinstance(source, HubDataset)
    return source


def test_hub_reads_a_local_folder_with_the_files_own_bytes(tmp_path: Path, offline: Any) -> None:
    data = tmp_path / "set" / "train"
    exif = Image.Exif()
    exif[0x0112] = 6
    data.mkdir(parents=True)
    Image.new("RGBA", (6, 4), (1, 2, 3, 0)).save(data / "a.png", exif=exif)
    paint(data / "b.png")
    write_jsonl(
        data / "metadata.jsonl",
        [{"file_name": "a.png", "words": "x"}, {"file_name": "b.png", "words": "y"}],
    )
    source = hub(tmp_path, str(tmp_path / "set"), caption="words")
    first = source[0]
    assert (len(source), first.captions, first.key) == (2, ("x",), "row 0 (a.png)")
    upright = decode(first.image, background="#0a0b0c", max_pixels=100)
    assert upright.shape == (6, 4, 3) and upright[0, 0].tolist() == [
        10,
        11,
        12,
    ]  # neither turned nor flattened by datasets
    assert source[1].image == data / "b.png"


def test_hub_reads_parquet_with_embedded_pictures_and_several_captions(
    tmp_path: Path, offline: Any
) -> None:
    paint(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    rows = {
        "pic": [{"bytes": data, "path": "a.png"}, {"bytes": data, "path": None}, None],
        "text": [["one", "two"], [], ["three"]],
        "n": [1, 2, 3],
    }
    features = offline.Features(
        {
            "pic": offline.Image(),
            "text": offline.List(offline.Value("string")),
            "n": offline.Value("int64"),
        }
    )
    (tmp_path / "set" / "data").mkdir(parents=True)
    offline.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    )
    source = hub(tmp_path, str(tmp_path / "set"), image="pic")
    assert (source[0].image, source[0].captions) == (data, ("one", "two"))
    assert bad(source, 1) == ("row 1", "the list of captions is empty")
    assert bad(source, 2) == ("row 2", "the picture is missing (pic is null)")
    with pytest.raises(
        InputError, match=r"no column 'image' \(data\.image\); its columns are pic, text, n\."
    ):
        hub(tmp_path, str(tmp_path / "set"))
    with pytest.raises(InputError, match=r"Did you mean data\.caption=text\?"):
        hub(tmp_path, str(tmp_path / "set"), image="pic", caption="txt")
    with pytest.raises(InputError, match=r"data\.split=test"):
        hub(tmp_path, str(tmp_path / "set"), image="pic", split="test")


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("path", "string"),
        ("bytes", "binary"),
        ("struct", "struct"),
        ("pixels", "pixels"),
        ("address", "string"),
    ],
)
def test_hub_columns_of_other_forms(tmp_path: Path, offline: Any, form: str, kind: str) -> None:
    data = paint(tmp_path / "a.png").read_bytes()
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    value = {
        "path": str(tmp_path / "a.png"),
        "bytes": data,
        "struct": {"bytes": data, "path": "a.png"},
        "pixels": pixels,
        "address": "https://example.com/a.png",
    }[form]
    features = {
        "string": offline.Value("string"),
        "binary": offline.Value("binary"),
        "struct": {"bytes": offline.Value("binary"), "path": offline.Value("string")},
        "pixels": offline.Array3D((4, 4, 3), "uint8"),
    }[kind]
    table = offline.Dataset.from_dict(
        {"image": [value], "text": ["x"]},
        features=offline.Features({"image": features, "text": offline.Value("string")}),
    )
    offline.load_dataset, before = lambda *_, **__: table, offline.load_dataset
    try:
        source = hub(tmp_path, "someone/pictures")
    finally:
        offline.load_dataset = before
    if form == "address":
        assert "is an address, not a picture" in bad(source, 0)[1]
    else:
        assert np.array_equal(
            np.asarray(decode(source[0].image, background="white", max_pixels=100)), pixels
        )


def test_hub_offline_and_missing(tmp_path: Path, offline: Any) -> None:
    with pytest.raises(
        HubError, match=r"data\.hub: someone/pictures: cannot be downloaded: .*HF_HUB_OFFLINE"
    ):
        hub(tmp_path, "someone/pictures")
    with pytest.raises(InputError, match=r"data\.hub: .*nothing"):
        hub(tmp_path, str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("error", "fault", "words"),
    [
        (
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.",
            HubError,
            "hf auth login",
        ),
        (
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.",
            InputError,
            "Check the name",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)"),
            HubError,
            "Check the connection",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['en']"),
            InputError,
            "data.hub_config=x",
        ),
        (
            ValueError("Config name is missing. Please pick one among ['en']"),
            InputError,
            "data.hub_config=x",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            InputError,
            "scripts are no longer supported",
        ),
        (OSError(28, "No space left on device"), DiskError, "No space left"),
        (InterruptedError(), InputError, "InterruptedError"),
    ],
)
def test_what_keeps_a_data_set_from_loading(
    tmp_path: Path,
    offline: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
    fault: type,
    words: str,
) -> None:
    cause = offline.exceptions.DatasetNotFoundError(error) if isinstance(error, str) else error

    def fail(*given: Any, **named: Any) -> None:
        assert given == ("a/b", "x") and named == {
            "split": "train",
            "revision": "r",
            "data_dir": "d",
            "cache_dir": str(tmp_path / "cache"),
        }
        raise cause

    monkeypatch.setattr(offline, "load_dataset", fail)
    with pytest.raises(fault) as caught:
        hub(tmp_path, "a/b", hub_config="x", hub_revision="r", hub_files="d")
    assert (
        str(caught.value).startswith("data.hub: a/b: ")
        and words in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1 / 255, "float32"), (1, "int32"), (257, "int32"), (1, "float64")]
)
def test_hub_numbers_of_other_types_are_the_same_picture(
    tmp_path: Path, offline: Any, scale: float, dtype: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    features = {"image": offline.Array3D((4, 5, 3), dtype), "text": offline.Value("string")}
    table = {"image": [(pixels.astype(float) * scale).astype(dtype)], "text": ["x"]}
    (tmp_path / "set").mkdir()
    offline.Dataset.from_dict(table, features=offline.Features(features)).to_parquet(
        tmp_path / "set" / "train.parquet"
    )
    picture = hub(tmp_path, str(tmp_path / "set"))[0].image
    np.testing.assert_array_equal(decode(picture, background="white", max_pixels=100), pixels)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1, 2], [3]], "its rows of pixels are not equally long"),
        ([["a", "b"]], "its pixels are no numbers (<U1)"),
        ([[None]], "its pixels are no numbers (object)"),
        ([[10**30]], "its pixels are no numbers (object)"),
    ],
)
def test_hub_lists_that_are_no_picture_are_named(value: Any, words: str) -> None:
    source = HubDataset.__new__(HubDataset)
    source.image, source.caption, source.table = "image", None, [{"image": value}]
    key, reason = bad(source, 0)
    assert key == "row 0" and words in reason


def test_a_folder_as_a_hub_data_set_is_known_by_its_content(tmp_path: Path, offline: Any) -> None:
    """An edit that keeps size and time, as of a restored archive, is seen."""
    data = tmp_path / "set"
    paint(data / "a.png")
    for text in ("old", "new"):
        write_jsonl(data / "metadata.jsonl", [{"file_name": "a.png", "text": text}])
        os.utime(data / "metadata.jsonl", ns=(10**18, 10**18))
        assert hub(tmp_path, str(data))[0].captions == (text,)
    (data / "a.png").rename(data / "b.png")
    write_jsonl(data / "metadata.jsonl", [{"file_name": "b.png", "text": "new"}])
    assert hub(tmp_path, str(data))[0].key == "row 0 (b.png)"


READER_FILES = {
    "imagefolder": "metadata.jsonl",
    "json": "rows.jsonl",
    "csv": "rows.csv",
    "parquet": "rows.parquet",
}


def write_rows(path: Path, kind: str, picture: Path, text: str) -> None:
    """One row, as a reader of files expects it; always of the same time."""
    if kind in ("imagefolder", "json"):
        column = {"file_name": picture.name} if kind == "imagefolder" else {"image": str(picture)}
        write_jsonl(path, [column | {"text": text}])
    elif kind == "csv":
        path.write_text(f"image,text\n{picture},{text}\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"image": [str(picture)], "text": [text]}), path)
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("kind", READER_FILES)
def test_files_of_a_reader_are_known_by_their_content(
    tmp_path: Path, offline: Any, kind: str
) -> None:
    """The same size and time, and another caption."""
    data, picture = tmp_path / "set", tmp_path / "a.png"
    data.mkdir()
    # The others read every file in the folder as one of theirs.
    picture = data / "a.png" if kind == "imagefolder" else picture
    paint(picture)
    for text in ("old", "new"):
        write_rows(data / READER_FILES[kind], kind, picture, text)
        assert hub(tmp_path, kind, hub_files=str(data))[0].captions == (text,)


@pytest.mark.parametrize(
    ("kind", "names", "missing"),
    [
        ("parquet", ["train-00000-of-00002.parquet"], ["train-00001-of-00002.parquet"]),
        ("parquet", ["00002-of-00002.parquet"], ["00001-of-00002.parquet"]),
        (
            "json",
            ["t-00001-of-00003-ab12.jsonl", "t-00001-of-00002.jsonl", "t-00000-of-00002.jsonl"],
            ["t-00000-of-00003.jsonl", "t-00002-of-00003.jsonl"],
        ),
        # Of parts in another folder, or of another ending, none is one of these.
        (
            "folder",
            ["data/train-00000-of-00002.csv", "train-00001-of-00002.csv", "x-00001-of-00002.txt"],
            ["data/train-00001-of-00002.csv"],
        ),
        ("folder", ["train-00000-of-00001.csv", "test-00000-of-00002.csv"], []),
        ("csv", ["a-00001-of-00002.csv", "a-00002-of-00002.csv"], []),
        ("imagefolder", ["seed-00001-of-00004.png"], []),
    ],
)
def test_missing_parts_of_a_table_are_named(
    tmp_path: Path, offline: Any, kind: str, names: list[str], missing: list[str]
) -> None:
    data = tmp_path / "set"
    for name in names:
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "imagefolder":
            paint(path)
            write_rows(data / "metadata.jsonl", kind, path, "x")
        else:
            write_rows(path, {"folder": "csv"}.get(kind, kind), data / "a.png", "x")
    name, files = (str(data), None) if kind == "folder" else (kind, str(data))
    if not missing:
        assert hub(tmp_path, name, hub_files=files)[0].captions == ("x",)
        return
    with pytest.raises(InputError) as caught:
        hub(tmp_path, name, hub_files=files)
    said = "1 part is" if len(missing) == 1 else f"{len(missing)} parts are"
    assert str(caught.value) == (
        f"data.hub: {name}: {said} missing of those that the names of the others count: "
        f"{', '.join(str(data / one) for one in missing)}. Put all parts there, or rename what is "
        "to be read alone."
    )


def test_files_beside_a_folder_are_known_by_their_content(tmp_path: Path, offline: Any) -> None:
    (tmp_path / "set").mkdir()
    paint(tmp_path / "beside" / "a.png")
    for text in ("old", "new"):
        write_rows(tmp_path / "beside/metadata.jsonl", "imagefolder", Path("a.png"), text)
        source = hub(tmp_path, str(tmp_path / "set"), hub_files="../beside")
        assert source[0].captions == (text,)


@pytest.mark.parametrize("kind", READER_FILES)
def test_a_reader_without_its_files_is_refused(tmp_path: Path, offline: Any, kind: str) -> None:
    with pytest.raises(InputError) as caught:
        hub(tmp_path, kind)
    assert str(caught.value) == (
        f"data.hub: {kind} is a kind of files, which lie in a folder; give it as data.hub_files"
    )


def test_a_folder_of_the_hub_is_not_taken_for_one_on_disk(
    tmp_path: Path, offline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    settings = DataSettings(hub="a/b", hub_files="pictures", cache_dir="cache")
    assert find_cache(settings) == "cache"


@pytest.mark.parametrize("closed", ["folder", "file"])
def test_what_datasets_cannot_read_is_named(
    tmp_path: Path, offline: Any, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """``datasets`` would leave the folder out, and say nothing."""
    data = tmp_path / "set"
    paint(data / "a.png"), paint(data / "closed" / "b.png")
    write_jsonl(data / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
    refused = str(data / "closed" if closed == "folder" else data / "metadata.jsonl")

    def guard(function: Any) -> Any:
        def open_or_list(path: Any, *given: Any, **named: Any) -> Any:
            if os.fspath(path) == refused:
                raise PermissionError(13, "Permission denied", refused)
            return function(path, *given, **named)

        return open_or_list

    monkeypatch.setattr(os, "scandir", guard(os.scandir))
    monkeypatch.setattr("limner.storage.atomic.open", guard(open), raising=False)
    with pytest.raises(InputError) as caught:
        hub(tmp_path, str(data))
    assert str(caught.value) == f"data.hub: {data}: {refused} cannot be read: Permission denied"
