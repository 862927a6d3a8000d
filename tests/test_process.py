"""What the processes of a run do together, over texts that any engine can carry."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from limner.engines.process import Processes
from limner.errors import DiskError, LimnerError


class Threads(Processes):
    """Processes that are threads, and meet at a barrier."""

    def __init__(self, rank: int, texts: list[str], barrier: threading.Barrier):
        self.rank = rank
        self.world_size = len(texts)
        self.texts = texts
        self.meeting = barrier

    def exchange(self, text: str) -> list[str]:
        self.texts[self.rank] = text
        self.meeting.wait(10)
        texts = list(self.texts)
        self.meeting.wait(10)
        return texts

    def arithmetic_versions(self) -> list[str]:
        return []

    def leave_group(self) -> None:
        pass


def together(count: int, action: Callable[[Processes], Any]) -> list[Any]:
    """What the action gives, or raises, in each of so many processes."""
    texts, barrier = [""] * count, threading.Barrier(count)
    results: queue.Queue[tuple[int, Any]] = queue.Queue()

    def run(rank: int) -> None:
        try:
            results.put((rank, action(Threads(rank, texts, barrier))))
        except BaseException as error:
            results.put((rank, error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [result for _, result in sorted(results.queue, key=lambda item: item[0])]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_process_answers_for_all(count: int) -> None:
    """Through JSON, however many there are."""
    asked: list[int] = []

    def action(process: Processes) -> Any:
        return process.first(lambda: [asked.append(process.rank), (1, {"é": None})][1])

    assert together(count, action) == [[1, {"é": None}]] * count
    assert asked == [0]


@pytest.mark.parametrize("error", [DiskError("full"), KeyboardInterrupt(), ZeroDivisionError("no")])
def test_an_error_of_the_first_process_reaches_all(error: BaseException) -> None:
    def fail() -> None:
        raise error

    first, *others = together(3, lambda process: process.first(fail))
    assert first is error and not getattr(error, "reported", False)
    for other in others:
        assert isinstance(other, DiskError if isinstance(error, DiskError) else LimnerError)
        assert other.reported and str(error) in str(other)


def test_a_result_that_is_no_json_is_an_error_in_all() -> None:
    first, second = together(2, lambda process: process.first(lambda: {1, 2}))
    assert isinstance(first, TypeError) and isinstance(second, LimnerError)


@pytest.mark.parametrize("count", [1, 3])
def test_flags(count: int) -> None:
    def action(process: Processes) -> list[bool]:
        flags = [process.any(process.rank == rank) for rank in range(process.world_size)]
        process.barrier()
        return [*flags, process.any(False)]

    assert together(count, action) == [[True] * count + [False]] * count


def test_sums_are_made_in_the_order_of_ranks() -> None:
    """In float64; another order, or a compensated sum, would give other bits."""
    values = [1e16, 1.0, -1e16]
    assert (values[0] + values[1]) + values[2] == 0.0
    sums = together(3, lambda process: process.total([values[process.rank], 0.1, float("inf")]))
    assert sums == [[0.0, 0.1 + 0.1 + 0.1, float("inf")]] * 3
