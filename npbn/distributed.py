"""Let several processes train one model together, on one machine or on many, by MPI.

    mpiexec -n 4 python scripts/train.py

A process is called a *rank*. Every rank runs the same program and has the whole model. A rank
computes its share of each batch, and the ranks tell each other what they have found by the methods
of a `Group`. Batch norm needs that, too (`npbn.functional.batch_norm`). A process that no launcher
has started is `Alone`: its group has one rank, and there is nobody to tell anything.

Every method but `Group.broadcast` gives all ranks the same bits, whatever MPI does, because numbers
are only moved by MPI; they are added here, in the order of the ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import array_api_compat
import numpy as np

from npbn.backend import to_numpy, usable_cpus
from npbn.errors import DistributedError

Array = Any
T = TypeVar("T")

LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("mpiexec", "OMPI_COMM_WORLD_RANK"),
    "PMI_SIZE": ("mpiexec", "PMI_RANK"),
    "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID"),
    "WORLD_SIZE": ("torchrun", "RANK"),
}
"""The variables in which launchers say how many processes they have started, and which this is."""

GRACE = 1.0
"""The time in seconds in which the other ranks may leave as well when a rank fails."""


class Group(Protocol):
    """The processes that train one model together.

    Every rank must call the same methods in the same order; each call waits for the other ranks.

    Attributes:
        rank: the number of this process, from 0 to size - 1.
        size: the number of processes.
        threads: the number of CPUs that this process may use, divided by the number of ranks that
            may use them.
        description: the group in words that follow other words, such as ", 4 processes on 1
            machine". For one process, this is empty.
    """

    rank: int
    size: int
    description: str

    @property
    def threads(self) -> int: ...

    def gather(self, own: Array) -> Array:
        """Return the arrays of all ranks, of one shape and dtype, stacked in the ranks' order."""

    def share(self, rows: np.ndarray, ends: Sequence[int]) -> None:
        """Fill ``rows``, of which each rank has computed a part, with the other ranks' parts.

        Args:
            rows: an array of the host. The part of rank r is ``rows[ends[r]:ends[r + 1]]``.
            ends: where the parts begin, and at last where they end: size + 1 numbers.
        """

    def add(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """Return the sum of each array over all ranks, added in the order of the ranks."""

    def broadcast(self, do: Callable[[], T]) -> T:
        """Call ``do`` on rank 0 only. Return its result, or raise its error, on every rank."""

    def rest(self) -> None:
        """Say that this rank need not answer the others until it calls another method."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Run the code inside; if an error ends this rank, no other rank goes on."""


class Alone:
    """The group of a process that trains by itself."""

    rank, size, description = 0, 1, ""

    @property
    def threads(self) -> int:
        return usable_cpus()

    def gather(self, own: Array) -> Array:
        return own[None, ...]

    def share(self, rows: np.ndarray, ends: Sequence[int]) -> None:
        pass

    def add(self, arrays: Sequence[Array]) -> Sequence[Array]:
        return arrays

    def broadcast(self, do: Callable[[], T]) -> T:
        return do()

    def rest(self) -> None:
        pass

    def together(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


ALONE = Alone()


class Mpi:
    """The group of all processes that a launcher has started, which talk by MPI.

    A rank that waits in vain for the others prints where it waits, and ends, and with it the whole
    group: a stopped process and a cut cable give no other sign.

    Args:
        seconds: how long a rank waits for the others. For what rank 0 does by itself (`broadcast`),
            the others wait ten times as long.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        from mpi4py import MPI

        self._mpi, self._seconds, self._watched = MPI, seconds, -math.inf
        self._comm, self._exit = MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        places = self._comm.allgather((platform.node(), cpus))
        self.threads = max(1, usable_cpus() // places.count(places[self.rank]))
        machines = len({machine for machine, _ in places})
        self.description = f", {self.size} processes on {machines} machine{'s' * (machines > 1)}"
        self._failed = self._left = False
        self._hook, sys.excepthook = sys.excepthook, self._excepthook
        atexit.register(self._leave)

    def gather(self, own: Array) -> Array:
        self._watch()
        sent = np.asarray(to_numpy(own), order="C")
        found = np.empty((self.size, *sent.shape), sent.dtype)
        self._comm.Allgather(sent, found)
        return _like(found, own, found.shape)

    def share(self, rows: np.ndarray, ends: Sequence[int]) -> None:
        self._watch()
        whole = rows if rows.flags.c_contiguous else np.ascontiguousarray(rows)
        width = whole[:1].size
        starts = np.multiply(ends, width)
        self._comm.Allgatherv(self._mpi.IN_PLACE, [whole, (np.diff(starts), starts[:-1])])
        if whole is not rows:
            rows[...] = whole

    def add(self, arrays: Sequence[Array]) -> Sequence[Array]:
        self._watch()
        numbers = np.concatenate([to_numpy(array).reshape(-1) for array in arrays])
        # Each rank gets the same part of every rank's numbers and adds them; the sums are shared.
        ends = [len(numbers) * r // self.size for r in range(self.size + 1)]
        own = slice(ends[self.rank], ends[self.rank + 1])
        found = np.empty((self.size, own.stop - own.start), numbers.dtype)
        counts = np.diff(ends), [row.size for row in found]
        places = ends[:-1], [row.size * r for r, row in enumerate(found)]
        self._comm.Alltoallv([numbers, (counts[0], places[0])], [found, (counts[1], places[1])])
        numbers[own] = functools.reduce(np.add, found)
        self.share(numbers, ends)
        sums = np.split(numbers, np.cumsum([array.size for array in arrays])[:-1])
        return [_like(sum_, array, array.shape) for sum_, array in zip(sums, arrays, strict=True)]

    def broadcast(self, do: Callable[[], T]) -> T:
        self.rest()
        if self.rank > 0:
            faulthandler.dump_traceback_later(10 * self._seconds, exit=True)
        result: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            try:
                result = do()
            except BaseException as caught:
                error = caught
        result, error = self._comm.bcast((result, error))
        self.rest()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def rest(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._watched = -math.inf

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._failed = True
            if self._all_leave() and self.rank > 0:
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - Rank 0 says the same.
            elif not self._left:
                print(f"rank {self.rank} on {platform.node()} ends all ranks:", file=sys.stderr)
            raise

    def _watch(self) -> None:
        """End this process unless this function or `rest` is called again in time."""
        now = time.monotonic()
        if now > self._watched + self._seconds / 10:
            faulthandler.dump_traceback_later(self._seconds, exit=True)
            self._watched = now

    def _excepthook(self, *error: Any) -> None:
        self._failed = True
        self._hook(*error)

    def _all_leave(self) -> bool:
        """Wait for the other ranks to leave, too; return whether they all do in time."""
        self.rest()
        end = time.monotonic() + (GRACE if self._failed else self._seconds)
        request = self._exit.Ibarrier()
        while not self._left and time.monotonic() < end:
            self._left = request.Test()
            time.sleep(0 if self._left else 0.005)
        return self._left

    def _leave(self) -> None:
        """Leave with the other ranks, or end them all."""
        if not (self._left or (not self._failed and self._all_leave())):
            self._comm.Abort(1)


def _like(array: np.ndarray, other: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of the host, in another shape, where the other array lies."""
    xp, device = array_api_compat.array_namespace(other), array_api_compat.device(other)
    return xp.asarray(array.reshape(shape), device=device)


def join(*, seconds: float | None = None) -> Group:
    """Return the group of this process: `Mpi` if a launcher has started several, else `Alone`.

    Args:
        seconds: see `Mpi`. By default, the number in the variable NPBN_WATCHDOG, or 60.

    Raises:
        DistributedError: the launcher has started several processes that cannot work together. Only
            the first of them raises the error; the others exit without a word.
    """
    for variable, (launcher, rank) in LAUNCHERS.items():
        count = os.environ.get(variable, "")
        if not count.isdecimal() or int(count) == 1:
            continue
        reason = _why_not(int(count))
        if not reason:
            return _mpi(_watchdog() if seconds is None else seconds)
        if os.environ.get(rank, "0") != "0":
            sys.exit(2)
        raise DistributedError(
            f"{launcher} has started {count} copies of this program ({variable}={count}), {reason}"
        )
    return ALONE


def _why_not(count: int) -> str:
    """Return why so many processes cannot work together, or an empty text."""
    try:
        with warnings.catch_warnings():
            # mpi4py warns of an mpiexec of another MPI, for which there is a reason below.
            warnings.simplefilter("ignore", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return (
            f"which train together by mpi4py, and it cannot be used ({error}): install mpi4py and "
            "mpich, or start one copy"
        )
    if MPI.COMM_WORLD.size == count:
        return ""
    library = " ".join(MPI.Get_library_version().split()[:3])
    return (
        f"of which mpi4py's MPI sees {MPI.COMM_WORLD.size}: start them by the mpiexec that belongs "
        f"to it, {library}"
    )


def _watchdog() -> float:
    text = os.environ.get("NPBN_WATCHDOG", "60")
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise DistributedError(f"NPBN_WATCHDOG: expected a number of seconds > 0, got {text!r}")


@functools.cache
def _mpi(seconds: float) -> Mpi:
    return Mpi(seconds)


def agree(group: Group, facts: Callable[[], Mapping[str, str]]) -> None:
    """Check that all ranks have the same facts, such as versions and digests.

    Args:
        group: the ranks.
        facts: a function that returns texts by name. It is not called if there is only one rank.

    Raises:
        DistributedError: some ranks have other facts. Every rank raises the error.
    """
    if group.size == 1:
        return
    for name, fact in facts().items():
        own = np.frombuffer(fact.encode()[:64].ljust(64), np.uint8)
        texts = [bytes(row).decode(errors="replace").strip() for row in group.gather(own)]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise DistributedError(
                    f"rank {rank} has another {name} than rank 0: {text}, not {texts[0]}"
                )
    group.rest()
