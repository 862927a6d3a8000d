"""How far a run is, without a terminal too; and what it says at its beginning."""

import sys
from collections.abc import Iterator

import pytest

from limner.progress import SECONDS, ProgressLines, open_progress
from limner.training.monitor import describe_held_out


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_half_minute_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressLines(100, "training", "step", 20, clock) as progress:
        for _ in range(40):
            clock.now += 5.0
            progress.update()
            progress.set_postfix({"loss": "0.1234"})
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 40 * 5 / SECONDS - 2 / 3
        assert lines[0] == "training: 26/100 [00:30<06:10,  5.00s/step, loss=0.1234]"
        assert lines[-1].startswith("training: 56/100 [03:00<")
    assert capsys.readouterr().err.startswith("training: 60/100 [03:20<")


def test_what_is_quick_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with ProgressLines(3, "pictures", "picture", clock=clock) as progress:
        for _ in range(3):
            clock.now += SECONDS / 4
            progress.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_and_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert isinstance(open_progress(5, "pictures"), ProgressLines) is not terminal
    capsys.readouterr()
    with open_progress(5, "pictures", silent=True) as progress:
        progress.update(5)
    assert capsys.readouterr().err == ""


@pytest.fixture
def falling() -> Iterator[list[tuple[int, float]]]:
    yield [(0, 0.5), (10, 0.3), (20, 0.2)]


def test_held_out_loss_stands_beside_the_best_one(falling: list[tuple[int, float]]) -> None:
    assert describe_held_out(falling[:1]) == "step 0: held-out loss 0.5000"
    assert describe_held_out(falling) == "step 20: held-out loss 0.2000 (0.3000 at step 10)"


def test_held_out_loss_that_rises_is_a_warning_once(falling: list[tuple[int, float]]) -> None:
    warning = "learned by heart"
    told = []
    for step, loss in enumerate([0.21, 0.25, 0.22, 0.3, 0.19, 0.2, 0.2, 0.2], start=30):
        falling.append((step, loss))
        told.append(warning in describe_held_out(falling))
    assert told == [False, False, True, False, False, False, False, True]
