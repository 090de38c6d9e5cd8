"""The same function over many files by several processes, results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_TIMES_MORE_WAITING = 4  # items given out a process, so that none is idle


def map_in_order(function: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """`function` of each item, in their order; no more items are taken than are soon needed.

    Both are pickled where there are several processes. What one of them raises is raised here.
    """
    if processes <= 1:
        yield from map(function, items)
        return
    # Not forked: what runs here may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= processes * _TIMES_MORE_WAITING:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
