"""Ranks that are threads of this process, in place of processes that MPI connects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat
import numpy as np


class Rank:
    """One of several ranks; see `npbn.distributed.Group`."""

    threads = 1

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.slots = rank, size, barrier, slots
        self.description = f", {size} threads in place of processes"

    def exchange(self, own: Any, take: Callable[[list[Any]], Any]) -> Any:
        """Give ``own`` to the others; return what ``take`` makes of all ranks'."""
        self.slots[self.rank] = own
        self.barrier.wait()
        found = take(list(self.slots))
        self.barrier.wait()
        return found

    def gather(self, own: Any) -> Any:
        xp = array_api_compat.array_namespace(own)
        return self.exchange(own, lambda all_: xp.stack(all_))

    def share(self, rows: np.ndarray, ends: Sequence[int]) -> None:
        assert len(ends) == self.size + 1 and ends[0] == 0 and ends[-1] == len(rows)

        def copied(all_: list[np.ndarray]) -> list[np.ndarray]:
            parts = zip(all_, ends, ends[1:], strict=False)
            return [other[begin:end].copy() for other, begin, end in parts]

        parts = self.exchange(rows, copied)
        for rank, part in enumerate(parts):
            if rank != self.rank:
                rows[ends[rank] : ends[rank + 1]] = part

    def add(self, arrays: Sequence[Any]) -> Sequence[Any]:
        return self.exchange(arrays, lambda all_: [sum(each) for each in zip(*all_, strict=True)])

    def rest(self) -> None:
        pass

    def broadcast(self, do: Callable[[], Any]) -> Any:
        return self.exchange(do() if self.rank == 0 else None, lambda all_: all_[0])


def each(size: int, work: Callable[[Any], Any], *, seconds: float = 120) -> list[Any]:
    """Return ``work(rank)`` of several ranks, which run at the same time.

    Raises:
        Exception: the first error of a rank. The others are stopped where they wait for it. If a
            rank waits for ``seconds``, because another one does not take part, this is a
            threading.BrokenBarrierError.
    """
    barrier, slots = threading.Barrier(size, timeout=seconds), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, size, barrier, slots))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results
