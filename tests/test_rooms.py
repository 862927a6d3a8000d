"""Imports go down from room to room, files import each other in no circle, and frameworks stay in
the engines, so that the command answers at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import limner

ROOT = Path(limner.__file__).parent
HOME = Path(__file__).parent.parent
# From the ground up. A file imports its own room and the rooms above it in this list; a name is a
# folder or a file of the package.
ROOMS = (
    "errors",
    "redaction",
    "guard",
    "progress",
    "json_types",
    "rng",
    "bundled",
    "config",
    "diffusion",
    "protocols",
    "families",
    "storage",
    "base_model",
    "data",
    "features",
    "engines",
    "training",
    "commands",
    "options",
    "cli",
    "compat",
    "__main__",
)
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
    "comet_ml",
    "pandas",
    "pyarrow",
    "bitsandbytes",
)
# Frameworks outside the engines, each imported in the function that needs it: what stands for
# JAX's pipelines and counts its devices, two kinds of data source, and trackers.
ELSEWHERE = {
    "compat/flag.py": {"jax"},
    "compat/flax.py": {"jax"},
    "data/hub_dataset.py": {"datasets"},
    "data/metadata.py": {"pyarrow"},
    "training/sinks.py": {"torch", "tensorboard", "wandb", "comet_ml"},
}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """``data.image`` of a file, the folder's name of an ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def room_of(module: str) -> int:
    """The number of a module's room."""
    return ROOMS.index(module.split(".")[0])


def is_ours(node: ast.AST) -> bool:
    """Whether a node imports from the package."""
    return isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "limner"


def find_import(node: ast.ImportFrom, name: str) -> tuple[str, str]:
    """The module of the package in which an imported name lies, and the name; "" for a module."""
    source = str(node.module).removeprefix("limner").lstrip(".")
    module = f"{source}.{name}".lstrip(".")
    return (module, "") if module in MODULES else (source, name)


def names_in(module: str) -> set[str]:
    """What a module defines or imports at its top level."""
    [path] = [path for path in FILES if name_of(path) == module]
    found = {"__file__"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def imports_of(path: Path, *, lazy: bool) -> set[str]:
    """The modules of the package that a file imports at its top, or with ``lazy`` anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            inside = [a.name for a in node.names if a.name.startswith("limner.")]
            assert not inside, f"{path}: write from limner... import ..."
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide what a file depends on"
            if is_ours(node):
                found |= {find_import(node, alias.name)[0] for alias in node.names}
    return found - {""}


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    """The front of the package itself looks at all rooms, lazily."""
    here = room_of(name_of(path))
    assert not {m for m in imports_of(path, lazy=True) if room_of(m) > here}


@pytest.mark.parametrize("lazy", [False, True])
def test_files_import_each_other_in_no_circle(lazy: bool) -> None:
    edges = {name_of(path): imports_of(path, lazy=lazy) for path in FILES[1:]}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for target in edges.get(module, ()):
            if target != module:
                visit(target, (*trail, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def names_used(tree: ast.AST) -> set[tuple[str, str]]:
    """The names of the package, by module, that a program imports or looks up in a module."""
    found, modules = set(), {}
    for node in filter(is_ours, ast.walk(tree)):
        for alias in node.names:
            module, name = find_import(node, alias.name)
            if name:
                found.add((module, name))
            else:
                modules[alias.asname or alias.name] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            found.add((modules[ast.unparse(node.value)], node.attr))
    return found


OUTSIDE = sorted(p for d in ("benchmarks", "model", "scripts") for p in (HOME / d).rglob("*.py"))


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(HOME)))
def test_programs_beside_the_package_name_what_is_in_it(path: Path) -> None:
    """A renamed module would be missed when they run: on a GPU, once in a long while."""
    for module, name in names_used(ast.parse(path.read_text(encoding="utf-8"))):
        assert module in MODULES, f"limner.{module} is not there"
        assert name in names_in(module), f"limner.{module} has no {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_frameworks_are_imported_in_the_engines_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, bool] = {}  # framework -> whether it is imported at the top of the file
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in {str(n).split(".")[0] for n in names} & set(FRAMEWORKS):
                found[name] = found.get(name, False) or node in tree.body
    here = path.relative_to(ROOT).as_posix()
    if here.startswith("engines/jax/"):
        assert set(found) <= {"jax", "optax"}
    elif not here.startswith("engines/torch/"):
        assert set(found) <= ELSEWHERE.get(here, set())
        assert not any(found.values())


# What runs code that a file holds, by itself or by a library's call.
UNPICKLING_MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNPICKLING_NAMES = {"serialize_executable", "allow_pickle", "weights_only", "Unpickler"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path: Path) -> None:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [str(node.module)]
            found |= {module.split(".")[0] for module in modules} & UNPICKLING_MODULES
            found |= set(names) & UNPICKLING_NAMES
        elif isinstance(node, ast.keyword | ast.Attribute):
            name = node.arg if isinstance(node, ast.keyword) else node.attr
            found |= {str(name)} & UNPICKLING_NAMES
            if ast.unparse(node) in ("torch.load", "np.load", "numpy.load", "pd.read_pickle"):
                found.add(ast.unparse(node))
    assert not found


@pytest.mark.parametrize(
    "module",
    [
        "limner",
        "limner.cli",
        "limner.config.toml",
        "limner.training.loop",
        "limner.commands.generate",
        "limner.commands.export",
        "limner.compat.diffusers",
    ],
)
def test_importing_loads_no_framework(module: str) -> None:
    """Looked at in a process of its own, not timed."""
    code = (
        f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}} "
        f"& {set(FRAMEWORKS)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
