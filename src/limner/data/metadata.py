"""Metadata files: which picture has which captions, a row for each."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from limner.data.source import explain_missing_column, is_unicode
from limner.errors import InputError
from limner.json_types import Plain

LINE = 2**22  # characters of a line
ROW_GROUP_BYTES = 2**29  # unpacked
ROW_GROUP_VALUES = 2**24
BATCH_VALUES = 2**16  # that are read of a parquet file at once
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class Row(NamedTuple):
    """A record as it is written down."""

    where: str  # the line, for messages
    file_name: Any  # a text, if the metadata are right
    captions: Any  # a text or a list of texts, or the path of a caption file
    folder: str = ""  # that file_name is relative to, with a slash behind it


class Table(NamedTuple):
    """The columns of a metadata file, and its rows: (the line, the values by column)."""

    columns: list[str]
    rows: Iterable[tuple[str, Plain]]


class RepeatedNames(dict[str, Any]):
    """A JSON object that has a name several times."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def read_metadata(path: Path, shown: str, caption: str | None, most_rows: int) -> list[Row]:
    """Read the rows of a metadata file with its columns of file names and captions.

    Args:
        shown: what messages about a row call the file.
        caption: the column of captions; None: each row has an empty one.
        most_rows: of a parquet file, in which any number of equal rows takes no room.

    Raises:
        InputError: for a file that cannot be read as a whole.
    """
    wanted = ["file_name"] if caption is None else ["file_name", caption]
    readers: dict[str, Callable[[], Table]] = {
        ".jsonl": lambda: read_jsonl(path, wanted),
        ".csv": lambda: read_csv(path),
        ".parquet": lambda: read_parquet(path, wanted, most_rows),
    }
    try:
        columns, rows = readers[path.suffix]()
        check_columns(path, columns, wanted)
        return [
            Row(
                f"{shown} {place}",
                row.get("file_name"),
                "" if caption is None else row.get(caption),
            )
            for place, row in rows
        ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_columns(path: Path, columns: list[str], wanted: list[str]) -> None:
    """Refuse a table that lacks one of the columns of file names and captions, or has it twice; an
    empty one has no rows, and is refused for that."""
    if not columns:
        return
    for setting, name in zip(("file_name", "data.caption"), wanted, strict=False):
        if columns.count(name) > 1:
            raise InputError(f"{path}: {columns.count(name)} columns are called {name!r}; keep one")
        if name not in columns:
            error = explain_missing_column(setting, name, columns, str(path))
            used = [words for mark, words in SEPARATORS.items() if mark in columns[0]]
            if len(columns) == 1 and used and path.suffix == ".csv":
                error = InputError(f"{error} Separate columns with commas, not with {used[0]}.")
            raise error


def read_lines(path: Path, kind: str) -> Iterator[str]:
    """Yield the lines of a text file in UTF-8, with their ends.

    Raises:
        InputError: for a line that is too long, or not text.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        number = 0
        while line := file.readline(LINE + 1):
            number += 1
            problem = None
            if len(line) > LINE:
                problem = f"a line of more than {LINE} characters"
            elif not is_unicode(line):
                problem = "it is not UTF-8 text; save it as UTF-8"
            elif "\0" in line:
                problem = "a NUL character: it is damaged, or UTF-16; save it as UTF-8"
            if problem is not None:
                raise InputError(f"{path}:{number}: not {kind}: {problem}")
            yield line


def read_jsonl(path: Path, wanted: list[str]) -> Table:
    """Read a file of one JSON object a line; its columns are all names in any line."""
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(read_lines(path, "JSON"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=keep_repeated_names)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(
                f'{path}:{number}: {row!r:.60} is not a row; {{"file_name": ..., ...}} is expected'
            )
        if isinstance(row, RepeatedNames):
            for name in wanted:
                if row.names.count(name) > 1:
                    raise InputError(f"{path}:{number}: {name!r} is there twice; keep one")
        columns.update(dict.fromkeys(row))
        rows.append((f"line {number}", {name: row.get(name) for name in wanted}))
    return Table(list(columns), rows)


def keep_repeated_names(pairs: list[tuple[str, Any]]) -> Plain:
    """Return a JSON object as a dictionary that knows whether a name was there twice."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else RepeatedNames(pairs)


def read_csv(path: Path) -> Table:
    """Read a CSV file in UTF-8 whose first line names its columns."""
    reader = csv.reader(read_lines(path, "a CSV file in UTF-8"), strict=True)

    def read_rows() -> Iterator[tuple[int, list[str]]]:
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except csv.Error as error:
            raise InputError(
                f"{path}:{reader.line_num}: not a CSV file in UTF-8: {error}"
            ) from error

    lines = read_rows()
    _, columns = next(lines, (0, []))

    def name_fields() -> Iterator[tuple[str, Plain]]:
        for number, fields in lines:
            if len(fields) > len(columns):
                raise InputError(
                    f"{path.name} line {number} of {path.parent}: more fields than the "
                    f"{len(columns)} columns; put a caption that holds commas in double quotes"
                )
            if any(field[:1].isspace() and field.lstrip()[:1] == '"' for field in fields):
                raise InputError(
                    f"{path.name} line {number} of {path.parent}: a space before a double quote, "
                    "which would make the quotes a part of the text; take the space away"
                )
            yield f"line {number}", dict(zip(columns, fields, strict=False))

    return Table(columns, name_fields())


def read_parquet(path: Path, wanted: list[str], most_rows: int) -> Table:
    """Read the wanted columns of a parquet file, in batches.

    Raises:
        InputError: when a wanted column is not there once, when there are more rows than
            ``most_rows``, or when those columns of a row group unpack to more than
            ``ROW_GROUP_BYTES``.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; install it (pip install pyarrow), or write "
            "metadata.jsonl"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        if not columns:
            return Table([], [])
        check_columns(path, columns, wanted)
        batch_rows = check_parquet(path, file, wanted, most_rows)
        # Texts stay in their dictionary: a long one that many rows have is there once.
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)
        rows = [
            dict(zip(wanted, values, strict=True))
            # Lists of texts in a dictionary are read from one row group at a time only.
            for number in range(file.num_row_groups)
            for batch in file.iter_batches(batch_rows, row_groups=[number], columns=wanted)
            for values in zip(*list_columns(batch), strict=True)
        ]
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from error
    return Table(columns, [(f"row {number}", row) for number, row in enumerate(rows, 1)])


def check_parquet(path: Path, file: Any, read: list[str], most_rows: int) -> int:
    """Return how many rows are to be read at once.

    Raises:
        InputError: for too many rows, or a row group that would take too much memory.
    """
    if file.metadata.num_rows > most_rows:
        raise InputError(
            f"{path}: {file.metadata.num_rows} rows, for a folder that has too few pictures for "
            f"more than {most_rows}"
        )
    most_in_row = 1
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        values, size = measure_columns(file, number, read)
        if size > ROW_GROUP_BYTES or values > ROW_GROUP_VALUES:
            raise InputError(
                f"{path}: a row group of {size >> 20} MiB and {values} values; write row groups of "
                f"at most {ROW_GROUP_BYTES >> 20} MiB and {ROW_GROUP_VALUES} values"
            )
        most_in_row = max(most_in_row, values // max(1, group.num_rows))
    return max(1, BATCH_VALUES // most_in_row)


def measure_columns(file: Any, number: int, read: list[str]) -> tuple[int, int]:
    """Return the most values that a column of a row group has, of lists those in all of them, and
    the bytes that the columns unpack to, which are at most those of the whole group."""
    group = file.metadata.row_group(number)
    nested = any(file.schema_arrow.field(name).type.num_fields for name in read)
    if not nested and group.total_byte_size <= ROW_GROUP_BYTES:
        return group.num_rows, group.total_byte_size
    # Of damaged lengths pyarrow's metadata end the process; reading a row tells them as an error.
    next(file.iter_batches(1, row_groups=[number], columns=read), None)
    paths = [file.schema.column(i).path for i in range(group.num_columns)]
    chunks = [
        group.column(i)
        for i, path in enumerate(paths)
        if path in read or path.startswith(tuple(f"{name}." for name in read))
    ]
    values = max([group.num_rows, *(chunk.num_values for chunk in chunks)])
    return values, sum(chunk.total_uncompressed_size for chunk in chunks)


def list_columns(batch: Any) -> list[list[Any]]:
    """Return the values of each column of an Arrow batch; one of a damaged file is refused."""
    batch.validate(full=True)
    return [list_values(column) for column in batch.columns]


def list_values(column: Any) -> list[Any]:
    """Return the values of an Arrow array; equal texts of a dictionary are one object."""
    import pyarrow

    if isinstance(column, pyarrow.DictionaryArray):
        words = column.dictionary.to_pylist()
        return [None if i is None else words[i] for i in column.indices.to_pylist()]
    if isinstance(column, pyarrow.ListArray | pyarrow.LargeListArray):
        values, ends = list_values(column.values), column.offsets.to_pylist()
        present = column.is_valid().to_pylist()
        return [
            values[start:end] if there else None
            for start, end, there in zip(ends, ends[1:], present, strict=False)
        ]
    return column.to_pylist()
