"""Worker threads that each do a part of a batch, and meet where something needs all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import threadpoolctl


class Team:
    """A fixed number of workers; the caller's thread is the first of them.

    BLAS computes with a single thread inside each, so that they do not compete for the cores.
    What they exchange is always put together in the order of the workers: results depend on their
    number, and not on which is faster.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"expected at least 1 worker, got {size}")
        self.size = size
        self._threads = ThreadPoolExecutor(max(1, size - 1), "npbn-engine")
        self._blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
        self._found: dict[Hashable, list[Any]] = {}

    def run(self, work: Callable[[int], Any], size: int | None = None) -> list[Any]:
        """``work(k)`` for each of the first ``size`` workers at once; what they returned."""
        size = self.size if size is None else size
        self._barrier = threading.Barrier(size)
        with self._blas.limit(limits=1):
            others = [self._threads.submit(self._guarded, work, k) for k in range(1, size)]
            try:
                first = self._guarded(work, 0)
            finally:
                wait(others)
                for other in others:  # what failed first, not who waited for it in vain
                    error = other.exception()
                    if error is not None and not isinstance(error, threading.BrokenBarrierError):
                        raise error
        return [first, *(other.result() for other in others)]

    def _guarded(self, work: Callable[[int], Any], worker: int) -> Any:
        try:
            return work(worker)
        except BaseException:
            self._barrier.abort()  # or the others would wait for ever
            raise

    def exchange(self, what: Hashable, worker: int, found: np.ndarray) -> np.ndarray:
        """What every worker has found, stacked; waits until all have. Once a `run` for each what.

        ``found`` must not change before the `run` ends.
        """
        size = self._barrier.parties
        places = self._found.setdefault((size, what), [None] * size)
        places[worker] = found
        self._barrier.wait()
        return np.stack(places)
