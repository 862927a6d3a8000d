"""A checkpoint is named arrays plus JSON, whole or absent, with a digest of every file; no pickle,
nothing that runs."""

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limner import durable
from limner.faults import InputFault, IntegrityFault

STATE = "state.json"
NAME = re.compile(r"checkpoint-(\d+)")
Arrays = dict[str, np.ndarray]
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}
DTYPES = {name: np.dtype(dtype) for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been verified, and what its ``state.json`` says."""

    folder: Path
    step: int
    state: dict[str, Any]

    def arrays(self, name: str) -> Arrays:
        """The arrays of one file, e.g. ``unet/diffusion_pytorch_model.safetensors``."""
        return read_arrays(self.folder / name)[0]


def save(
    root: Path,
    step: int,
    files: Iterable[tuple[str, Arrays, dict[str, str]]],
    state: Mapping[str, Any],
    *,
    keep: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``root/checkpoint-<step>``; once it has been read back and verified, remove all up to
    this step but the newest ``keep``.

    Checkpoints of later steps are left: this run will write them anew, and until then they may be
    all that is good, or damaged and no reason to part with an older one.

    Args:
        files: file name, arrays and header metadata, made one at a time so that only one needs to
            be in memory.
        state: plain values for ``state.json``.
        finish: may add further files (a ``config.json``) before the folder is sealed.
    """
    final = root / f"checkpoint-{step}"
    with durable.folder(final) as path:
        for name, arrays, metadata in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            with durable.disk_errors(path / name, sum(a.nbytes for a in arrays.values())):
                write_arrays(path / name, arrays, metadata)
        if finish is not None:
            finish(path)
        (path / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
    prune(root, step, keep)
    return final


def prune(root: Path, step: int, keep: int | None) -> None:
    """Remove all checkpoints up to this step but the newest ``keep``, if that of this step is
    good."""
    with durable.disk_errors(root):
        if keep is not None and (
            old := [path for path in listed(root) if step_of(path) <= step][keep:]
        ):
            durable.verify(root / f"checkpoint-{step}")
            for path in old:
                durable.remove(path)


def write_arrays(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> None:
    """One safetensors file, readable by diffusers and transformers (``format: pt``), written
    without a copy in memory."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": NAMES[arrays[name].dtype.name],
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.asarray(arrays[name], order="C").reshape(-1).view(np.uint8).data)


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
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


def listed(root: Path) -> list[Path]:
    """The checkpoints below ``root`` by name, newest first, not verified; other folders are none of
    ours."""
    return sorted(
        (p for p in root.glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir()),
        key=step_of,
        reverse=True,
    )


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removeprefix("checkpoint-"))


def read(path: Path) -> Checkpoint:
    """Verify one checkpoint and open it.

    Raises:
        IntegrityFault: when a file is missing, cut short or changed.
    """
    durable.verify(path)
    return trusted(path)


def trusted(path: Path) -> Checkpoint:
    """Open a checkpoint that another process of this run has verified."""
    state = json.loads((path / STATE).read_text())
    return Checkpoint(path, state["step"], state)


def latest(root: Path, tell: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest checkpoint below ``root`` that verifies; each newer one that does not is named
    through ``tell``."""
    for path in listed(root):
        try:
            return read(path)
        except IntegrityFault as fault:
            tell(f"{path.name} is not usable and is passed over: {fault}")
    return None


def find(root: Path, which: str, tell: Callable[[str], None] = print) -> Checkpoint | None:
    """Resolve what a user wrote: ``latest``, ``checkpoint-500`` (below ``root``), or the path of a
    checkpoint folder.

    Raises:
        InputFault: when a named checkpoint does not exist.
        IntegrityFault: when a named checkpoint is damaged.
    """
    if which == "latest":
        return latest(root, tell)
    path = root / which if NAME.fullmatch(which.rstrip("/")) else Path(which)
    if not path.is_dir():
        there = ", ".join(p.name for p in listed(root)) or "none"
        raise InputFault(
            f"{which}: no such checkpoint. In {root} there are: {there}. Pass one of these, the "
            "path of another, or 'latest'."
        )
    return read(path)
