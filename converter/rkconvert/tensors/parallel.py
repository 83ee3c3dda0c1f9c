"""Process blocks in several threads and return them in order, a bounded number at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads or processes at a time: more than four saturate the disk or memory.
WORKERS: Final = min(4, len(os.sched_getaffinity(0)))


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = WORKERS
) -> Generator[Result, None, None]:
    """Map with threads: yield results in the order of the items, with at most `threads` + 1 blocks in memory.

    It is for functions that release the interpreter lock, as numpy does on large arrays. Once the generator is closed,
    no thread is at work.
    """
    # The matrix library must not start its own threads beside these.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
