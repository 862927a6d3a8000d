"""Read and write safetensors files as named numpy arrays."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

NamedArrays = dict[str, np.ndarray]
DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}
DTYPES = {name: np.dtype(dtype) for dtype, name in DTYPE_NAMES.items()}


def write_arrays(path: Path, arrays: NamedArrays, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, readable by diffusers and transformers (``format: pt``), written
    without a copy in memory."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
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


def read_arrays(path: Path) -> tuple[NamedArrays, dict[str, str]]:
    """Memory-mapped arrays and metadata of a file that ``write_arrays`` has written; read-only.

    Raises:
        ValueError: when it is not such a file, or is cut short.
    """
    whole = np.memmap(path, np.uint8, "r")
    length = struct.unpack("<Q", bytes(whole[:8]))[0] if len(whole) >= 8 else 1 << 62
    if length > len(whole) - 8:
        raise ValueError("it has no whole safetensors header")
    header = json.loads(bytes(whole[8 : 8 + length]))
    metadata, arrays = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > len(whole):
            raise ValueError("it is cut short")
        arrays[name] = whole[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata
