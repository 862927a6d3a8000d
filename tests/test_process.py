"""What the processes of a run do together, over texts that any engine can carry."""

import json
import queue
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from limner.engines import watch
from limner.engines.process import Processes
from limner.errors import DiskError, LimnerError
from limner.training.monitor import Monitor


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


def test_one_that_leaves_with_an_error_keeps_no_thread_that_holds_it() -> None:
    """With the error it would hold the tensors of the run while Python ends."""
    process = Threads(0, [""], threading.Barrier(1))
    Processes.__init__(process)
    left: list[Any] = []
    process.watch = SimpleNamespace(leave=left.append)  # type: ignore[assignment]
    before = set(threading.enumerate())
    process.close(DiskError("full"))
    assert set(threading.enumerate()) <= before
    assert left == [{"error": "DiskError", "text": "full"}]


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


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_ends_a_validation_at_the_same_batch_in_all(told: int) -> None:
    """The losses of a batch may be one program of all processes: none may wait for the others."""
    stops = [SimpleNamespace(asked=False) for _ in range(2)]

    def validate(process: Processes) -> Any:
        seen: list[int] = []

        def give_losses(state: object, batch: int, *, average: bool) -> np.ndarray:
            process.barrier()
            seen.append(batch)
            # One hears of it before the next batch, the other not before the end.
            if process.rank == told and batch == 1:
                stops[told].asked = True
            return np.ones(2)

        def give_batches(*_: object) -> Iterator[tuple[int, int]]:
            yield from ((2, number) for number in range(4))

        setup = SimpleNamespace(
            process=process,
            stop=stops[process.rank],
            stream=SimpleNamespace(validation_batches=give_batches),
            engine=SimpleNamespace(losses=give_losses),
            config=SimpleNamespace(validation=SimpleNamespace(timesteps=1)),
            validation_entries=(),
            checkpoint=None,
        )
        return Monitor(setup, 0, None).validate(None, 1), seen  # type: ignore[arg-type]

    assert together(2, validate) == [(False, [0, 1])] * 2


@pytest.mark.parametrize(
    ("turn", "verdict"), [(1_000.0, None), (0.5, "process 1 has not answered")]
)
def test_only_a_process_that_was_not_stopped_itself_may_judge(
    turn: float, verdict: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are suspended and go on together: none has heard of the others, and none is lost."""
    now, turns = [100.0], [0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watch, "keep_alive", lambda connection: None)
    here, there = socket.socketpair()
    link = watch.Link(1, "process 1", here)

    class Selector(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> Any:
            if timeout:
                turns[0] += 1
                now[0] += turn if turns[0] == 1 or turn < 1 else 0.5
                if turns[0] == 30:
                    there.sendall(b'{"left": null}\n')
                    there.close()
            return super().select(0)

    lost: list[str] = []
    one = watch.Watch.__new__(watch.Watch)
    one.links, one.patience, one.departure = [link], 12.0 if turn < 1 else 30.0, 6.0
    one.verdict, one.left, one.decided = None, False, threading.Event()
    one.on_stop, one.on_loss = lambda: None, lambda error: lost.append(str(error))
    one.selector = Selector()
    one.selector.register(here, selectors.EVENT_READ, link)
    one.run()
    assert [text[: len(verdict or "")] for text in lost] == ([] if verdict is None else [verdict])
    for end in (here, there):
        end.close()


@pytest.mark.parametrize(
    "sent",
    [None, b"", b"\n", b"[1, 2]\n", b"\xff\n", b"[" * 999 + b"\n", b'["t\xc3\xa9", 1, ""]\n'],
)
def test_a_stranger_costs_a_run_no_watch(sent: bytes | None) -> None:
    """Not one whose connection is reset, either."""
    with watch.open_server("127.0.0.1") as server:
        stranger = socket.create_connection(server.getsockname())
        if sent is None:
            reset = struct.pack("ii", 1, 0)
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        else:
            stranger.sendall(sent)
        stranger.close()
        with socket.create_connection(server.getsockname()) as friend:
            friend.sendall(json.dumps(["token", 1, "(here)"]).encode() + b"\n")
            [link] = watch.accept_all(server, "token", 1)
            assert link.name == "process 1 (here)"
            link.connection.close()
