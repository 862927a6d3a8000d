"""Metadata and caption files give the captions that were written, or one message."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from limner.config.schema import DataSettings
from limner.data import metadata
from limner.data.folder import Folder
from limner.data.metadata import read_metadata
from limner.data.source import LONGEST_CAPTION, BadRecord
from limner.errors import InputError


def rows(path: Path, caption: str | None = "text", most_rows: int = 10**4) -> list[tuple]:
    return [
        (row.file_name, row.captions) for row in read_metadata(path, path.name, caption, most_rows)
    ]


def refused(path: Path, content: bytes | str, caption: str | None = "text") -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        rows(path, caption)
    return str(caught.value).removeprefix(f"{path}")


def captions(tmp_path: Path, content: bytes) -> tuple[str, ...]:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    return Folder(DataSettings(folder=str(tmp_path)), lambda line: None)[0].captions


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"one\ntwo", ("one", "two")),
        (b"one\r\ntwo\r\n", ("one", "two")),
        (b"one\rtwo", ("one", "two")),
        ("one\u2028two".encode(), ("one\u2028two",)),
        ("one\u2029two\u0085three".encode(), ("one\u2029two\u0085three",)),
        (b"one\x0btwo\x0cthree\x1cfour", ("one\x0btwo\x0cthree\x1cfour",)),
        ("\ufeffé ü".encode(), ("é ü",)),
    ],
)
def test_a_line_ends_at_a_newline_only(
    tmp_path: Path, content: bytes, wanted: tuple[str, ...]
) -> None:
    assert captions(tmp_path, content) == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a red boat".encode("utf-16-le"), "a NUL character: it is damaged, or UTF-16"),
        ("a red boat".encode("utf-16-be"), "a NUL character"),
        ("a red boat".encode("utf-32-le"), "a NUL character"),
        (b"\0" * 40, "a NUL character"),
        (b"a red boat\0\0\0", "a NUL character"),
        ("a red boat".encode("utf-16"), "it is not UTF-8 text"),
        ("ein grüner Apfel".encode("cp1252"), "it is not UTF-8 text"),
        (b"x" * (LONGEST_CAPTION + 1), f"has {LONGEST_CAPTION + 1} characters; 65536 at most"),
        (b"x\n" * 2**20, "a.txt has more than 1048576 characters"),
    ],
)
def test_what_is_no_caption_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(BadRecord, match=r"a\.png: ") as caught:
        captions(tmp_path, content)
    assert words in str(caught.value)


CSV = "file_name,text\na.png,x\n"
JSONL = '{"file_name": "a.png", "text": "x"}\n'


@pytest.mark.parametrize("text", [CSV, JSONL])
@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", "it is not UTF-8 text; save it as UTF-8"),
        ("utf-16-le", "a NUL character: it is damaged, or UTF-16; save it as UTF-8"),
        ("utf-16-be", "a NUL character"),
        ("utf-32-le", "a NUL character"),
    ],
)
def test_metadata_in_other_encodings(tmp_path: Path, text: str, encoding: str, words: str) -> None:
    path = tmp_path / ("metadata.jsonl" if text == JSONL else "metadata.csv")
    assert words in refused(path, text.encode(encoding))
    latin = text.replace("a.png", "grün.png").encode("cp1252")
    assert refused(path, latin).startswith(":2: " if text == CSV else ":1: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "file_name;text\na.png;hello, world\n",
            "Separate columns with commas, not with semicolons",
        ),
        ("file_name\ttext\na.png\tx\n", "not with tabs"),
        ("\ufefffile_name;text\n", "its columns are file_name;text."),
        ("file_name,text,text\na.png,x,y\n", ": 2 columns are called 'text'; keep one"),
        ("file_name,file_name,text\na.png,b.png,y\n", ": 2 columns are called 'file_name'"),
        ("file_name,text\na.png,one, two\n", "more fields than the 2 columns"),
        ('file_name,text\na.png,"one\n', ":2: not a CSV file in UTF-8: unexpected end of data"),
        (f"file_name,text\na.png,{'x' * 200_000}\n", ":2: not a CSV file in UTF-8: field larger"),
        (f"file_name,text\na.png,{',' * 2**22}\n", "a line of more than 4194304 characters"),
    ],
)
def test_csv_that_is_not_what_it_seems(tmp_path: Path, content: str, words: str) -> None:
    assert words in refused(tmp_path / "metadata.csv", content)


def test_csv_that_is_unusual_and_right(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    lines = ["id,file_name,id,text", '1,a.png,2,"one, ""two""\nthree\u2028"', "", "1,b.png,2", ""]
    path.write_bytes("\r\n".join(lines).encode())
    assert rows(path) == [("a.png", 'one, "two"\nthree\u2028'), ("b.png", None)]
    assert rows(path, None) == [("a.png", ""), ("b.png", "")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"file_name": "a.png", "text": "x", "text": "y"}', ":1: 'text' is there twice; keep one"),
        ('\n{"file_name": "a.png", "file_name": "b.png"}', ":2: 'file_name' is there twice"),
        ("[" * 100_000, ":1: not JSON: "),
        ('{"file_name": ' + "[" * 100_000 + "]" * 100_000 + "}", ":1: not JSON: "),
        ('{"file_name": "a.png", "n": ' + "9" * 5000 + "}", ":1: not JSON: "),
        (JSONL + '{"file_name": "' + "x" * 2**22, ":2: not JSON: a line of more than 4194304"),
        (JSONL + '{"file_name": "a.png", "text": "x\0"}', ":2: not JSON: a NUL character"),
        ('["a.png", "x"]', ":1: ['a.png', 'x'] is not a row"),
    ],
)
def test_jsonl_that_is_not_what_it_seems(tmp_path: Path, content: str, words: str) -> None:
    assert words in refused(tmp_path / "metadata.jsonl", content)


def test_jsonl_that_is_unusual_and_right(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    lines = [
        '{"file_name": "a.png", "text": "one\u2028two", "box": {"text": 1, "text": 2}}',
        '{"id": 1, "id": 2, "file_name": "b.png", "text": ["x"]}',
    ]
    path.write_text("\r".join(lines), encoding="utf-8")
    assert rows(path) == [("a.png", "one\u2028two"), ("b.png", ["x"])]


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


def test_one_long_text_in_many_rows_of_parquet_is_there_once(tmp_path: Path) -> None:
    """811 bytes, which were 3 GB."""
    pyarrow = pytest.importorskip("pyarrow")
    names = pyarrow.DictionaryArray.from_arrays([0] * 3000, ["a.png"])
    texts = pyarrow.DictionaryArray.from_arrays([0] * 3000, ["x" * 10**6])
    path = tmp_path / "metadata.parquet"
    write_table(path, {"file_name": names, "text": texts}, store_schema=False, compression="zstd")
    assert path.stat().st_size < 10**4
    read = [text for _, text in rows(path)]
    assert len(read) == 3000 and len({id(text) for text in read}) == 1
    lists = pyarrow.ListArray.from_arrays(range(3001), texts)
    write_table(path, {"file_name": names, "text": lists}, store_schema=False, compression="zstd")
    read = [text for _, text in rows(path)]
    assert len(read) == 3000 and len({id(text[0]) for text in read}) == 1


def test_parquet_of_all_kinds_of_columns(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    for values in (
        ["x", None, "", "é"],
        [["x", "y"], None, [], [None]],
        [1, None, 3, 4],
        [b"x", b"", None, b"\xff"],
        [{"en": "x"}, None, {"en": None}, {"en": "y"}],
        [[[1]], [[]], [], None],
        [None] * 4,
    ):
        path = write_table(tmp_path / "metadata.parquet", {"file_name": names, "text": values})
        assert rows(path) == list(zip(names, values, strict=True))
        assert rows(path, None) == [(name, "") for name in names]
        path = write_table(path, {"file_name": names, "text": values}, row_group_size=1)
        assert rows(path) == list(zip(names, values, strict=True))


def test_parquet_with_more_than_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(
        tmp_path / "metadata.parquet", {"file_name": ["a"] * 99, "text": [["x"] * 50] * 99}
    )
    with pytest.raises(InputError, match="99 rows, for a folder that has too few pictures"):
        rows(path, most_rows=98)
    monkeypatch.setattr(metadata, "ROW_GROUP_VALUES", 4000)
    with pytest.raises(InputError, match="a row group of 0 MiB and 4950 values; write"):
        rows(path)
    monkeypatch.setattr(metadata, "ROW_GROUP_BYTES", 50)
    with pytest.raises(InputError, match="a row group of 0 MiB and 99 values; write"):
        rows(path, None)


def test_parquet_of_which_little_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings beside the captions count for nothing; lists of texts count whole."""
    names, texts = ["a", "b"], [["x", "y"], ["z"]]
    columns = {"file_name": names, "embedding": [[0.5] * 4000, [1.5] * 4000], "text": texts}
    path = write_table(tmp_path / "metadata.parquet", columns)
    monkeypatch.setattr(metadata, "ROW_GROUP_BYTES", 1000)
    assert rows(path) == list(zip(names, texts, strict=True))
    assert rows(path, None) == [("a", ""), ("b", "")]
    write_table(path, columns | {"text": ["x", "y"]})
    assert rows(path) == [("a", "x"), ("b", "y")]
    for long in (["x" * 500, "y" * 600], [["x" * 500], ["y" * 600]]):
        write_table(path, columns | {"text": long})
        with pytest.raises(InputError, match="a row group of 0 MiB and 2 values; write"):
            rows(path)
        assert rows(path, None) == [("a", ""), ("b", "")]


@pytest.mark.parametrize("twice", ["file_name", "text"])
def test_parquet_with_a_column_twice(tmp_path: Path, twice: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "metadata.parquet"
    names = ["file_name", "id", "text", twice, "id"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 5, names=names)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(InputError) as caught:
        rows(path)
    assert str(caught.value) == f"{path}: 2 columns are called {twice!r}; keep one"
    if twice == "text":
        assert rows(path, None) == [("x", "")]
    write_table(path, {"id": ["x"], "text": ["x"]})
    with pytest.raises(InputError, match="file_name"):
        rows(path)
    write_table(path, {})
    assert rows(path) == []


def test_a_value_that_is_no_name_is_a_bad_record_not_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    values: list[Any] = [None, 5, [], {}, "\ud800", "x" * 10**5, "\n", " ", "."]
    path.write_text("".join(json.dumps({"file_name": v, "text": "x"}) + "\n" for v in values))
    source = Folder(DataSettings(folder=str(tmp_path)), lambda line: None)
    for i in range(len(values)):
        with pytest.raises(BadRecord, match=rf"metadata\.jsonl line {i + 1}: "):
            source[i]
