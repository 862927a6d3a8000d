"""Loading ahead in threads, with results in order."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    load: Callable[[int], T], first: int, last: int, *, threads: int = 4, ahead: int | None = None
) -> Generator[T, None, None]:
    """Yield ``load(first)`` to ``load(last - 1)`` in order; an error is raised in its turn.

    Args:
        load: a pure function of its number, so that any thread may call it.
        ahead: the most results that are loaded ahead; None: ``threads + 1``.
    """
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
