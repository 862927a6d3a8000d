"""The size of files and functions, and the share of ``Any``, stay within what a reader can hold;
complexity and arguments are ruff's to count."""

import ast
from collections.abc import Iterator
from pathlib import Path

import limner

ROOT = Path(limner.__file__).parent
FILE_LINES = 400
FUNCTION_LINES = 50
ANYS = 12.0  # in a thousand lines of the package

# What may be longer, and by how much: a file, or a function as file:name. Each has its reason.
EXCEPTIONS: dict[str, tuple[int, str]] = {
    "__init__.py:generate": (72, "what each option means, and no logic"),
    "config/schema.py": (708, "a table: every setting, declared once and in the file's order"),
}


def functions_of(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function; one inside another counts in both."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, (child.end_lineno or child.lineno) - child.lineno + 1
            yield from functions_of(child, f"{name}.")
        else:
            yield from functions_of(child, prefix)


def read_sources() -> dict[str, str]:
    """The package's files by their paths."""
    files = sorted(ROOT.rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in files}


def find_longer(lines: dict[str, int], limit: int) -> list[str]:
    """What is longer than the limit, or than its own exception allows."""
    return [
        f"{name}: {count} lines"
        for name, count in lines.items()
        if count > EXCEPTIONS.get(name, (limit, ""))[0]
    ]


def count_lines() -> tuple[dict[str, int], dict[str, int]]:
    """Lines of all files, and of all functions."""
    sources = read_sources()
    files = {path: text.count("\n") for path, text in sources.items()}
    functions = {
        f"{path}:{name}": count
        for path, text in sources.items()
        for name, count in functions_of(ast.parse(text))
    }
    return files, functions


def test_files_and_functions_are_short() -> None:
    files, functions = count_lines()
    assert find_longer(files, FILE_LINES) == []
    assert find_longer(functions, FUNCTION_LINES) == []


def test_every_exception_is_needed() -> None:
    files, functions = count_lines()
    needless = []
    for name, (allowed, reason) in EXCEPTIONS.items():
        assert reason, f"{name}: why?"
        lines, limit = (functions, FUNCTION_LINES) if ":" in name else (files, FILE_LINES)
        if lines.get(name, 0) <= limit or lines[name] < allowed:
            needless.append(f"{name}: {lines.get(name, 0)} lines, {allowed} are allowed")
    assert needless == []


def test_a_public_name_means_one_thing() -> None:
    """No function or class of one name in more than two rooms."""
    rooms: dict[str, set[str]] = {}
    for path, text in read_sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                rooms.setdefault(node.name, set()).add(path.split("/")[0])
    assert {name: found for name, found in rooms.items() if len(found) > 2} == {}


def test_any_is_rare() -> None:
    sources = read_sources().values()
    anys = sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for text in sources
        for node in ast.walk(ast.parse(text))
    )
    lines = sum(text.count("\n") for text in sources)
    assert anys * 1000 / lines <= ANYS, f"{anys} in {lines} lines"
