"""Loads ahead: a pure loader needs no state, so any thread may load any step, and results come out
in order."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    load: Callable[[int], T], first: int, last: int, *, threads: int = 4, ahead: int | None = None
) -> Generator[T, None, None]:
    """``load(first)`` to ``load(last - 1)`` in order, up to ``ahead`` (``threads + 1``) of them
    loaded ahead; an error is raised where its turn comes."""
    depth = threads + 1 if ahead is None else ahead
    pool = ThreadPoolExecutor(threads, thread_name_prefix="limner-load")
    try:
        window: deque[Future[T]] = deque(
            pool.submit(load, step) for step in range(first, min(first + depth, last))
        )
        for step in range(first, last):
            result = window.popleft().result()
            if step + depth < last:
                window.append(pool.submit(load, step + depth))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
