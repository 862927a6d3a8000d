"""The quick tests do without frameworks; what is computed in PyTorch is computed by one thread."""

import importlib
import importlib.util
from pathlib import Path

import conftest
import pytest
from refusal import Refusal


def test_a_refused_import_fails_whatever_the_code_catches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "framework.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.meta_path", [Refusal(("framework",), "do without")])
    assert importlib.util.find_spec("framework") is not None
    assert importlib.util.find_spec("another") is None
    with pytest.raises(pytest.fail.Exception, match="framework was imported: do without"):
        import_or_go_without("framework")


def import_or_go_without(name: str) -> None:
    """Import a library if it is there, as users' code does."""
    try:
        importlib.import_module(name)
    except Exception:
        return


@pytest.mark.frameworks
def test_pytorch_computes_with_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def test_files_that_begin_first_are_there() -> None:
    """One that was renamed would begin last, and a worker wait for it."""
    for name in conftest.LONG:
        assert (Path(__file__).parent / f"{name}.py").is_file(), name
