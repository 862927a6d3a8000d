"""Read and write safetensors files as named numpy arrays.

The format: eight bytes for the header's length, the header as a JSON object, and the arrays' bytes.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner.json_types import Plain
from limner.storage import atomic

NamedArrays = dict[str, np.ndarray]
DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = {name: np.dtype(dtype) for dtype, name in DTYPE_NAMES.items()}
# The format's other dtypes, which numpy lacks, and complex numbers, which no model here has.
OTHER_DTYPE_BITS = {
    "C64": 64,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
DTYPE_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_DTYPE_BITS
METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation
MAX_DIMENSIONS = 64  # numpy's


class SafetensorsError(ValueError):
    """A file that is not a whole safetensors file; the message is the reason, without the path."""


@dataclass(frozen=True)
class StoredArray:
    """An array as a header describes it."""

    dtype: str  # the format's name, e.g. F32
    shape: tuple[int, ...]
    begin: int  # offsets in the file, in bytes
    end: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """The numpy dtype of the array.

        Raises:
            SafetensorsError: when there is none.
        """
        if self.dtype not in DTYPES:
            raise SafetensorsError(f"arrays of dtype {self.dtype} are not supported")
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its content, checked against the file's length."""

    arrays: dict[str, StoredArray]  # by name, in the header's order
    metadata: dict[str, str]
    data_begin: int  # offset of the first array's first byte


def write_arrays(path: Path, arrays: NamedArrays, metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, without a copy of the arrays in memory.

    Its metadata say ``format: pt``, without which diffusers and transformers refuse a file.
    """
    # Wide dtypes come first, so that every array is aligned.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: Plain = {METADATA: {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        begin = end
        end += arrays[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[arrays[name].dtype.name],
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.asarray(arrays[name], order="C").reshape(-1).view(np.uint8).data)


def read_header(path: Path) -> Header:
    """Read and check the header of a file; no array is read.

    Raises:
        SafetensorsError: when there is none, when it is damaged, or when the arrays that it
            describes do not fill the rest of the file exactly.
        OSError: when the file cannot be read.
    """
    # A pipe or a device could be read for ever.
    if atomic.is_device(path):
        raise SafetensorsError("it is no regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise SafetensorsError("it is a Git LFS pointer, run git lfs pull")
        length = int.from_bytes(start, "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise SafetensorsError("its header is missing or cut short")
        text = file.read(length)
    data_begin = 8 + length
    entries = parse_json_object(text)
    metadata = parse_metadata(entries.pop(METADATA, {}))
    arrays = {name: parse_array(name, entry, data_begin) for name, entry in entries.items()}
    check_offsets(arrays, data_begin, size)
    return Header(arrays, metadata, data_begin)


def parse_json_object(text: bytes) -> Plain:
    """Parse the text of a header."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SafetensorsError("its header is not JSON") from error
    if not isinstance(value, dict):
        raise SafetensorsError("its header is not a JSON object")
    return value


def parse_metadata(value: object) -> dict[str, str]:
    """Check that metadata are texts by name."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SafetensorsError(f"its {METADATA} are not texts by name")
    return value


def parse_array(name: str, entry: Any, data_begin: int) -> StoredArray:
    """Check a header's entry for one array: its dtype, shape and offsets must agree."""
    label = f"array {name!r:.80}"
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise SafetensorsError(f"{label} has no dtype, shape and two offsets") from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SafetensorsError(f"{label} is of an unknown dtype, {dtype!r:.80}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise SafetensorsError(f"{label} has a shape that is no list of at most {MAX_DIMENSIONS}")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise SafetensorsError(f"{label} has a shape or offsets that are no whole numbers from 0")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise SafetensorsError(
            f"{label}, {dtype} of shape {shape}, does not fill bytes {begin} to {end}"
        )
    return StoredArray(dtype, tuple(shape), data_begin + begin, data_begin + end)


def check_offsets(arrays: dict[str, StoredArray], data_begin: int, size: int) -> None:
    """Refuse arrays that overlap, have gaps between them, or end elsewhere than the file does."""
    end = data_begin
    for name, array in sorted(arrays.items(), key=lambda item: (item[1].begin, item[1].end)):
        if array.begin != end:
            raise SafetensorsError(
                f"array {name!r:.80} begins at byte {array.begin}, {end} is expected: arrays "
                "overlap or have gaps between them"
            )
        end = array.end
    if end != size:
        raise SafetensorsError(
            f"its header describes {end} bytes and {size} are there, so it is cut short or damaged"
        )


def read_arrays(path: Path) -> tuple[NamedArrays, dict[str, str]]:
    """Map the arrays of a file into memory, read-only, and read its metadata.

    Raises:
        SafetensorsError: for what ``read_header`` refuses, and for a dtype that numpy lacks.
    """
    header = read_header(path)
    content = map_file(path)
    arrays = {
        name: content[array.begin : array.end].view(array.numpy_dtype).reshape(array.shape)
        for name, array in header.arrays.items()
    }
    return arrays, header.metadata


def read_float32(path: Path, names: Iterable[str] | None = None) -> NamedArrays:
    """Copy arrays of a file into memory as float32, whatever number type they are stored in.

    Args:
        names: the arrays wanted, in this order; None: all, in the order of their names.

    Raises:
        SafetensorsError: for what ``read_header`` refuses, and for a dtype that neither numpy has
            nor bfloat16 is.
    """
    header = read_header(path)
    content = map_file(path)
    arrays: NamedArrays = {}
    for name in sorted(header.arrays) if names is None else names:
        array = header.arrays[name]
        data = content[array.begin : array.end]
        if array.dtype == "BF16":
            numbers = widen_bfloat16(data.view(np.uint16))
        else:
            numbers = data.view(array.numpy_dtype).astype(np.float32)
        arrays[name] = numbers.reshape(array.shape)
    return arrays


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16, given as uint16, to float32; exact, as it is the upper half of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def map_file(path: Path) -> np.ndarray:
    """Map a file's bytes into memory, read-only, uint8 [size]."""
    return np.asarray(np.memmap(path, np.uint8, "r"))
