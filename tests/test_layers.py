"""A file imports only lower floors and its own; frameworks stay at the edge, so that the command
answers at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import limner

ROOT = Path(limner.__file__).parent
# a name stands for a file or a folder; within a floor a file may import the ones before it in the
# same row
FLOORS = [
    {
        "",
        "faults",
        "rng",
        "schedule",
        "config",
        "objective",
        "sampler",
        "family",
        "engine",
        "durable",
        "tree",
    },
    {
        "families",
        "hub",
        "weights",
        "flax",
        "base",
        "checkpoint",
        "cache",
        "features",
        "data",
        "snapshot",
        "plan",
        "log",
        "bundled",
    },
    {"engines"},
    {
        "signals",
        "watcher",
        "generate",
        "export",
        "encoding",
        "training",
        "bench",
        "check",
        "show",
        "demo",
    },
    {"cli", "__main__", "compat"},
]
FRAMEWORKS = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "accelerate",
    "peft",
    "datasets",
    "jax",
    "optax",
    "flax",
    "tensorboard",
    "wandb",
    "pandas",
    "pyarrow",
    "bitsandbytes",
)
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    """The floor of ``data.image``, by its first word."""
    first = module.split(".")[0]
    (level,) = [i for i, names in enumerate(FLOORS) if first in names] or [-1]
    assert level >= 0, f"{module}: has no floor; add it to the table here and in the contract"
    return level


def imported(path: Path) -> set[str]:
    """Everything of limner that a file imports, lazily or not, by module."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names if alias.name.split(".")[0] == "limner"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide what a file depends on"
            if (node.module or "").split(".")[0] == "limner":
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                out |= {
                    m
                    if (ROOT.parent / m.replace(".", "/")).with_suffix(".py").exists()
                    or (ROOT.parent / m.replace(".", "/")).is_dir()
                    else str(node.module)
                    for m in modules
                }
    return {module.removeprefix("limner").lstrip(".") for module in out}


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """Lower floors, or the same floor; the front of the package itself looks at all of them,
    lazily."""
    above = {module for module in imported(path) if floor(module) > floor(name_of(path))}
    assert not above


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_frameworks_are_imported_at_the_edge_only(path: Path) -> None:
    """At the top of a file only below ``engines/``; in a function there, or where a package is
    asked for by what the user chose."""
    if (ROOT / "engines" / "torch") in path.parents:
        return
    if (ROOT / "engines" / "jax") in path.parents:
        text = path.read_text(encoding="utf-8")
        assert not [
            name for name in FRAMEWORKS if name not in ("jax", "optax") and f"import {name}" in text
        ]
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {
        (n, alias.name if isinstance(n, ast.Import) else str(n.module))
        for n in nodes
        for alias in n.names
    }
    found = {(name, n in tree.body) for n, name in names if name.split(".")[0] in FRAMEWORKS}
    assert not [name for name, at_the_top in found if at_the_top]
    lower = floor(name_of(path)) < 3 and name_of(path).split(".")[0] != "engines"
    assert not lower or {name.split(".")[0] for name, _ in found} <= {
        "datasets",
        "pyarrow",
        "torch",
        "tensorboard",
        "wandb",
    } - ({"torch"} if name_of(path) != "log" else set())


def test_imports_have_no_cycle() -> None:
    """At import time, i.e. by the imports at the top of the files."""
    edges = {name_of(p): set() for p in FILES}
    for path in FILES:
        top = ast.Module(
            [
                n
                for n in ast.parse(path.read_text(encoding="utf-8")).body
                if isinstance(n, ast.Import | ast.ImportFrom)
            ],
            [],
        )
        for node in top.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("limner"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}".removeprefix("limner").lstrip(".")
                    edges[name_of(path)].add(
                        full
                        if full in edges
                        else str(node.module).removeprefix("limner").lstrip(".")
                    )
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in edges[name] - {""}:
                visit(target, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "module",
    [
        "limner",
        "limner.cli",
        "limner.config",
        "limner.training",
        "limner.generate",
        "limner.export",
        "limner.compat.diffusers",
    ],
)
def test_importing_loads_no_framework(module: str) -> None:
    """In a process of its own, and within a second or so: what is loaded is looked at, not
    timed."""
    code = (
        f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in "
        f"sys.modules}} & {set(FRAMEWORKS)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
