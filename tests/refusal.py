"""An import that fails: for tests that must do without a library which is installed."""

import importlib.machinery
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import NoReturn

import pytest


class Refusal:
    """An entry of ``sys.meta_path`` that fails the test which imports one of these packages.

    Whether they are installed can still be asked, with ``importlib.util.find_spec``.
    """

    def __init__(self, packages: Collection[str], reason: str):
        self.packages, self.reason = packages, reason

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a refused package, with this object in place of its loader."""
        if name not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave the making of the module to Python; it is not filled."""

    def exec_module(self, module: ModuleType) -> NoReturn:
        """Fail, in a way that no ``except ImportError`` of the code under test can catch."""
        pytest.fail(f"{module.__name__} was imported: {self.reason}")
