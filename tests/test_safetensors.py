"""Headers of safetensors files: what stock readers take is taken, what is damaged or hostile is
refused in words."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limner.storage import safetensors
from limner.storage.safetensors import SafetensorsError, StoredArray

FLOATS = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HALVES = {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]}


def write_file(path: Path, header: Any, data: bytes = bytes(28)) -> Path:
    """A file with this header, a JSON value or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(SafetensorsError) as caught:
        safetensors.read_header(path)
    return str(caught.value)


def test_a_header_is_read(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "x.safetensors",
        {"__metadata__": {"format": "pt"}, "halves": HALVES, "floats": FLOATS},
    )
    header = safetensors.read_header(path)
    start = path.stat().st_size - 28
    assert header.data_begin == start and header.metadata == {"format": "pt"}
    assert header.arrays == {
        "halves": StoredArray("BF16", (2,), start + 24, start + 28),
        "floats": StoredArray("F32", (2, 3), start, start + 24),
    }


def test_written_arrays_come_back(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(7.0, np.float32),
        "empty": np.zeros((0, 3), np.float64),
        "halves": np.arange(4, dtype=np.float16).reshape(2, 2).T,
        "flags": np.array([True, False, True]),
        "ids": np.arange(3, dtype=np.int64),
        "words": np.arange(3, dtype=np.uint16),
    }
    path = tmp_path / "x.safetensors"
    safetensors.write_arrays(path, arrays, {"step": "3"})
    read, metadata = safetensors.read_arrays(path)
    assert metadata == {"format": "pt", "step": "3"} and read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes() and not read[name].flags.writeable
    floats = safetensors.read_float32(path, ["ids", "scalar", "halves"])
    assert list(floats) == ["ids", "scalar", "halves"]
    for name, array in floats.items():
        assert array.dtype == np.float32 and array.flags.writeable
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))
    assert list(safetensors.read_float32(path)) == sorted(arrays)
    safetensors.write_arrays(path, {})
    assert safetensors.read_arrays(path) == ({}, {"format": "pt"})


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    numbers = np.array([1.0, -3.140625], np.float32)
    data = bytes(24) + (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    path = write_file(tmp_path / "x.safetensors", {"floats": FLOATS, "halves": HALVES}, data)
    np.testing.assert_array_equal(safetensors.read_float32(path, ["halves"])["halves"], numbers)
    with pytest.raises(SafetensorsError, match="dtype BF16 are not supported"):
        safetensors.read_arrays(path)


def test_every_dtype_of_the_format_has_a_header(tmp_path: Path) -> None:
    for dtype, bits in safetensors.DTYPE_BITS.items():
        entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
        path = write_file(tmp_path / "x.safetensors", {"a": entry}, bytes(bits))
        assert safetensors.read_header(path).arrays["a"].dtype == dtype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F33"}, "unknown dtype, 'F33'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": None}, "unknown dtype"),
        ({"shape": [2, 4]}, "F32 of shape [2, 4], does not fill bytes 0 to 24"),
        ({"shape": [-2, -3]}, "no whole numbers from 0"),
        ({"shape": [2.0, 3]}, "no whole numbers from 0"),
        ({"shape": [True, 6]}, "no whole numbers from 0"),
        ({"shape": [1 << 64, 0]}, "no whole numbers from 0"),
        ({"shape": "23"}, "no list of at most 64"),
        ({"shape": [1] * 65}, "no list of at most 64"),
        ({"data_offsets": [0, 25]}, "does not fill bytes 0 to 25"),
        ({"data_offsets": [24, 0]}, "does not fill bytes 24 to 0"),
        ({"data_offsets": [-24, 0]}, "no whole numbers from 0"),
        ({"data_offsets": ["0", "24"]}, "no whole numbers from 0"),
        ({"data_offsets": [0, 12, 24]}, "no dtype, shape and two offsets"),
        ({"data_offsets": 24}, "no dtype, shape and two offsets"),
        ({"data_offsets": [4, 28]}, "overlap or have gaps"),
        ({"data_offsets": [8, 32]}, "overlap or have gaps"),
    ],
)
def test_entries_that_contradict_themselves(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    header = {"floats": FLOATS | change, "halves": HALVES}
    message = refusal(write_file(tmp_path / "x.safetensors", header))
    assert words in message and len(message) < 300


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[" * 1_000_000, "not JSON"),
        (b'{"a": ' * 100_000, "not JSON"),
        ([], "not a JSON object"),
        ({"a": 5}, "no dtype, shape and two offsets"),
        ({"a": {"dtype": "F32"}}, "no dtype, shape and two offsets"),
        ({"a" * 1000: None}, "no dtype, shape and two offsets"),
        ({"__metadata__": {"step": 3}}, "__metadata__ are not texts"),
        ({"__metadata__": ["step"]}, "__metadata__ are not texts"),
        ({"a": FLOATS, "b": FLOATS, "halves": HALVES}, "overlap or have gaps"),
        ({"halves": HALVES}, "overlap or have gaps"),
        ({"floats": FLOATS}, "cut short or damaged"),
        ({}, "cut short or damaged"),
    ],
)
def test_headers_of_another_kind(tmp_path: Path, header: Any, words: str) -> None:
    message = refusal(write_file(tmp_path / "x.safetensors", header))
    assert words in message and len(message) < 300


def test_lengths_that_are_not_true(tmp_path: Path) -> None:
    """Every cut of a file, a longer one, and header lengths up to the largest number."""
    path = write_file(tmp_path / "x.safetensors", {"floats": FLOATS, "halves": HALVES})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert refusal(path)
    path.write_bytes(whole + b"\0")
    assert f"describes {len(whole)} bytes and {len(whole) + 1} are there" in refusal(path)
    for length in (len(whole) - 7, 1 << 31, 1 << 63, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        assert refusal(path) == "its header is missing or cut short"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert refusal(path) == "it is a Git LFS pointer, run git lfs pull"


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    """The file is sparse: its header would be of one byte more than the format allows."""
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", safetensors.MAX_HEADER_BYTES + 1))
        file.truncate(safetensors.MAX_HEADER_BYTES + 100)
    assert refusal(path) == "its header is missing or cut short"


def test_stock_readers_agree(tmp_path: Path) -> None:
    """What the reference implementation takes or refuses, this one does too."""
    from safetensors import SafetensorError, safe_open

    path = tmp_path / "x.safetensors"
    draws = np.random.default_rng(0)
    agreed = {True: 0, False: 0}
    for _ in range(400):
        numbers = draws.integers(0, 4, 6).tolist()
        shape, offsets = numbers[:2], [numbers[2], numbers[2] + math.prod(numbers[:2])]
        second = [offsets[1], offsets[1] + numbers[3]] if numbers[4] else [0, numbers[3]]
        header = {
            "a": {"dtype": "U8", "shape": shape, "data_offsets": offsets},
            "b": {"dtype": "I8", "shape": [numbers[3]], "data_offsets": second},
        }
        size = max(offsets[1], second[1]) + (numbers[5] == 3)
        write_file(path, header, bytes(size))
        try:
            with safe_open(path, "np"):
                expected = True
        except SafetensorError:
            expected = False
        try:
            safetensors.read_header(path)
            accepted = True
        except SafetensorsError:
            accepted = False
        assert accepted == expected, header
        agreed[expected] += 1
    assert min(agreed.values()) > 30
