"""What other libraries do not promise is used only where ``docs/private-apis.md`` says so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import limner

ROOT = Path(limner.__file__).parents[2]
PAGE = ROOT / "docs" / "private-apis.md"
UNPROMISED = ("jax.experimental.", "jax.interpreters.")  # public by name, yet free to change


def find_private(tree: ast.AST) -> Iterator[str]:
    """Modules, and attributes of objects other than one's own, that are private or unpromised."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from filter(is_private, (f"{module}.{one.name}" for one in names))
            case ast.Import(names=names):
                yield from filter(is_private, (one.name for one in names))
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case (
                ast.Attribute(attr=name)
                | ast.Call(
                    func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                    args=[_, ast.Constant(value=str(name)), *_],
                )
            ) if re.match("_(?!_)", name) and name != "_exit":  # of os, and documented
                yield name


def is_private(module: str) -> bool:
    """Whether a module, or a name in it, is private or unpromised."""
    hidden = any(part.startswith("_") and not part.startswith("__") for part in module.split("."))
    return hidden or module.startswith(UNPROMISED)


def read_rows(columns: int) -> list[list[str]]:
    """The cells of the page's table of so many columns, without its head."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and row[0] != "---"][1:]


def test_the_list_is_complete() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in ("src", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for name in find_private(ast.parse(path.read_text(encoding="utf-8")))
    }
    listed = {(file, name) for file, name, *_ in read_rows(5)}
    assert len(found) > 10 and found - listed == set()
    for file, name in listed - found:  # used in a way that is not looked for
        last = name.rsplit(".", 1)[-1]
        assert last in (ROOT / file).read_text(encoding="utf-8"), f"{file} does without {name}"


def test_versions_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    versions = dict(read_rows(2))
    assert {row[2] for row in read_rows(5)} == set(versions)
    assert versions == {name: pinned[name] for name in versions}


def test_what_is_private_is_recognized() -> None:
    code = """
import jax._src.core
from torch import _dynamo
from jax.experimental import topologies
from .own import _helper
self._own, other._theirs, other.__dict__, other.public
getattr(other, "_asked", None)
"""
    assert sorted(find_private(ast.parse(code))) == sorted(
        ["jax._src.core", "torch._dynamo", "jax.experimental.topologies", "_theirs", "_asked"]
    )
