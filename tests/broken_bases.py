"""Bases with one thing wrong, made by number: number k is the same base wherever it is made."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 0.5, -0.5, 1e308, 10**9, 10**30, -(10**18),
    float("nan"), float("inf"), "", "abc", "\0", "x" * 300, "../..", "os", "\ud800", [], [1], [-1],
    ["a"], [[1, 2], 3], [10**9] * 3, [8] * 1000, {}, {"a": 1}, {"content": 3},
]  # fmt: skip
TEXTS = [
    "", "{}", "[]", "null", "3", '"a"', "{", "[" * 100_000, '{"a":' * 100_000, "\0", "\ufeff{}",
    "NaN", '{"a": 1, "a": 2}', "---\ndate: 2024-13-45\n---\n", '{"_class_name": "os"}',
    "#version: 0.2\na b c\n", "1" * 5000, "\n" * 100,
]  # fmt: skip
CARDS = [
    "date: 2024-13-45", "a: !!float abc", "a: !!timestamp abc", "a: " + "[" * 20_000, "a: [", "- 1",
    "a: &a [*a]", "? [1]\n: 2", "a: 'x", "license: {a: 1}", "license: mit", "\t", "a: !!python/x 1",
    "a: 0x", "a: 1:99:99", "<<: 3", "a: !!binary x", "a: 1e400", '"\\ud800": 1', "a: " + "9" * 6000,
]  # fmt: skip
DTYPES = ["F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "F99", "", 3, None]
Draws = np.random.Generator


def pick(draws: Draws, things: list[Any]) -> Any:
    return things[int(draws.integers(len(things)))]


def pick_file(draws: Draws, base: Path, wanted: Callable[[Path], bool]) -> Path:
    """Choose a file; what an earlier change has made a pipe or a device is never opened."""
    return Path(pick(draws, sorted(p for p in base.rglob("*") if p.is_file() and wanted(p))))


def is_small(path: Path) -> bool:
    """Whether a file is no weights."""
    return path.suffix != ".safetensors"


def write(path: Path, data: bytes) -> None:
    """Replace a file, which may be a link to one that all bases share."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def change_value(draws: Draws, base: Path) -> None:
    """Set, drop or add one entry somewhere in a JSON file."""
    path = pick_file(
        draws, base, lambda path: path.suffix == ".json" and path.stat().st_size < 10**5
    )
    content = json.loads(path.read_text(encoding="utf-8"))
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = pick(draws, keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and draws.random() < 0.5:
            place = inner
            continue
        if draws.random() < 0.15:
            del place[key]
        else:
            place[key] = pick(draws, VALUES)
        break
    write(path, json.dumps(content).encode())


def change_text(draws: Draws, base: Path) -> None:
    """Put another text in the place of a small file."""
    write(pick_file(draws, base, is_small), pick(draws, TEXTS).encode())


def change_bytes(draws: Draws, base: Path) -> None:
    """Flip, cut, repeat or insert bytes of a small file."""
    path = pick_file(draws, base, is_small)
    data = bytearray(path.read_bytes())
    at = int(draws.integers(len(data) + 1))
    match int(draws.integers(4)):
        case 0:
            data = data[:at]
        case 1:
            data[at:at] = pick(draws, [b"\0", b"\xff\xfe", b"[[[[", b'"', b",", b"}"])
        case 2:
            data[at : at + 40] = draws.bytes(40)
        case _:
            data += data[at : at + 1000]
    write(path, bytes(data))


def change_header(draws: Draws, base: Path) -> None:
    """Change what a weight file says of its arrays."""
    path = pick_file(draws, base, lambda path: path.suffix == ".safetensors")
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = pick(draws, names)
    entry = header[name]
    match int(draws.integers(9)):
        case 0:
            del header[name]
        case 1:
            header[f"{name}.{pick(draws, ['x', 'weight', '', chr(0)])}"] = header.pop(name)
        case 2:
            prefix = pick(draws, ["module.", "_orig_mod.", "text_model.", "model.", "\u00e9."])
            header = {f"{prefix}{one}": header[one] for one in names}
        case 3:
            entry["dtype"] = pick(draws, DTYPES)
        case 4:
            entry["shape"] = pick(draws, [[], entry["shape"][::-1], [1, *entry["shape"]], [-1], 3])
        case 5:
            entry["data_offsets"] = pick(draws, [[0, 0], [-4, 4], [10**30, 2], "ab", None])
        case 6:
            header[name] = pick(draws, VALUES)
        case 7:
            # A chain of whole arrays, whose last ones are swapped in name only.
            other = pick(draws, names)
            header[name], header[other] = header[other], header[name]
        case _:
            header[f"{name}.more"] = {**entry, "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    write(path, struct.pack("<Q", len(text)) + text + data[8 + length :])


def change_weights(draws: Draws, base: Path) -> None:
    """Cut a weight file, or put something else in its place."""
    path = pick_file(draws, base, lambda path: path.suffix == ".safetensors")
    data = path.read_bytes()
    cut = data[: int(draws.integers(len(data)))]
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    write(path, pick(draws, [b"", cut, data + b"\0", pointer, draws.bytes(64), cut[:8], b"[" * 99]))


def change_card(draws: Draws, base: Path) -> None:
    """Write a model card whose front matter is odd."""
    write(base / "README.md", f"---\n{pick(draws, CARDS)}\n---\n# A model\n".encode())


def change_file(draws: Draws, base: Path) -> None:
    """Take a file away, or put a folder, a pipe or a link in its place."""
    path = pick_file(draws, base, lambda path: True)
    path.unlink()
    match int(draws.integers(5)):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case _:
            pass


CHANGES: list[Callable[[Draws, Path], None]] = [
    *[change_value] * 4,
    *[change_header] * 3,
    *[change_bytes] * 2,
    change_text,
    change_weights,
    change_card,
    change_file,
]


def break_base(source: Path, target: Path, number: int) -> Path:
    """Write base ``number``: that of ``source``, with one or two things wrong."""
    draws = np.random.default_rng([20261127, number])
    shutil.copytree(source, target, copy_function=os.link)
    for _ in range(int(draws.integers(1, 3))):
        try:
            pick(draws, CHANGES)(draws, target)
        # Of a file that an earlier change has broken, nothing more is changed.
        except (ValueError, LookupError, TypeError, OSError, struct.error, AttributeError):
            continue
    return target
