"""Let several processes train one model together, on one machine or on many, by MPI.

    mpiexec -n 4 python scripts/train.py

A process is called a *rank*. Every rank runs the same program and has the whole model. A rank
computes its share of each batch, and exchanges results with the other ranks by the methods of a
`Group`. Batch norm also exchanges results (`npbn.functional.batch_norm`). A process that was not
started by a launcher is `Alone`, in a group of one rank.

The results have the same bits on all ranks, with any MPI library. MPI only moves numbers. They are
added here, in the order of the ranks.
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
"""Environment variables with the number of started processes.

For each, the launcher that sets it, and the variable with the rank of this process.
"""

GRACE = 1.0
"""After a rank has failed, how many seconds the other ranks have to end by themselves."""


class Group(Protocol):
    """The processes that train one model together.

    Every rank must call the same methods in the same order; each call waits for the other ranks.

    Attributes:
        rank: the number of this process, from 0 to size - 1.
        size: the number of processes.
        threads: the number of CPUs that this process may use, divided by the number of ranks that
            may use them.
        description: a text that follows the description of a training, with the PIDs: ", 2
            processes on 1 machine (rank 0 is 812, rank 1 is 813 on first)". It is empty for one
            process.
    """

    rank: int
    size: int
    description: str

    @property
    def threads(self) -> int: ...

    def gather(self, own: Array) -> Array:
        """Return the arrays of all ranks, of one shape and dtype, stacked in the ranks' order."""

    def share(self, rows: np.ndarray, ends: Sequence[int]) -> None:
        """Copy the rows that each rank has computed to all other ranks, in place.

        Args:
            rows: a NumPy array. Rank r has computed ``rows[ends[r]:ends[r + 1]]``.
            ends: the size + 1 limits of the ranks' rows, from 0 to the number of rows.
        """

    def add(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """Return the sum of each array over all ranks, added in the order of the ranks."""

    def broadcast(self, do: Callable[[], T]) -> T:
        """Call ``do`` on rank 0 only. Return its result, or raise its error, on every rank."""

    def rest(self) -> None:
        """Stop the time limit for answers of this rank until it calls another method."""

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Run the code inside. If it raises an error on this rank, all other ranks end."""


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
    """The group of all processes that a launcher has started, connected by MPI.

    A rank that has waited too long for another one prints where it waits and ends the whole group.
    MPI does not notice a process that was stopped, or a network cable that was cut.

    Args:
        seconds: how long a rank waits for the others. While rank 0 works alone (`broadcast`), the
            others wait ten times as long.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        from mpi4py import MPI

        self._mpi, self._seconds, self._watched = MPI, seconds, -math.inf
        self._comm, self._exit = MPI.COMM_WORLD, MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        found = self._comm.allgather((platform.node(), cpus, os.getpid()))
        places = [(machine, cpus) for machine, cpus, _ in found]
        self.threads = max(1, usable_cpus() // places.count(places[self.rank]))
        # If a process is killed, mpiexec names it only by its PID.
        machines: dict[str, list[str]] = {}
        for rank, (machine, _, pid) in enumerate(found):
            machines.setdefault(machine, []).append(f"rank {rank} is {pid}")
        several = "s" * (len(machines) > 1)
        pids = "; ".join(f"{', '.join(texts)} on {name}" for name, texts in machines.items())
        self.description = f", {self.size} processes on {len(machines)} machine{several} ({pids})"
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
        # Rank r gets part r of all ranks' numbers, adds them, and sends the sums to all ranks.
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
        """Wait until the other ranks also end; return whether they all do so in time."""
        self.rest()
        end = time.monotonic() + (GRACE if self._failed else self._seconds)
        request = self._exit.Ibarrier()
        while not self._left and time.monotonic() < end:
            self._left = request.Test()
            time.sleep(0 if self._left else 0.005)
        return self._left

    def _leave(self) -> None:
        """End this process together with the other ranks, or else abort them."""
        if not (self._left or (not self._failed and self._all_leave())):
            time.sleep(GRACE)  # mpiexec loses output that it has not read before it aborts.
            self._comm.Abort(1)


def _like(array: np.ndarray, other: Array, shape: tuple[int, ...]) -> Array:
    """Return a NumPy array in another shape, in the library and on the device of another array."""
    xp, device = array_api_compat.array_namespace(other), array_api_compat.device(other)
    return xp.asarray(array.reshape(shape), device=device)


def join(*, seconds: float | None = None) -> Group:
    """Return the group of this process: `Mpi` if a launcher has started several, else `Alone`.

    Args:
        seconds: see `Mpi`. By default, the number in the variable NPBN_WATCHDOG, or 60.

    Raises:
        DistributedError: the launcher has started several processes that cannot work together. Only
            rank 0 raises the error. The other ranks exit silently.
    """
    for variable, (launcher, rank) in LAUNCHERS.items():
        count = os.environ.get(variable, "")
        if not count.isdecimal() or int(count) == 1:
            continue
        reason = _why_not(variable, int(count))
        if not reason:
            return _mpi(_watchdog() if seconds is None else seconds)
        if os.environ.get(rank, "0") != "0":
            sys.exit(2)
        raise DistributedError(
            f"{launcher} has started {count} copies of this program ({variable}={count}), {reason}"
        )
    return ALONE


def _why_not(variable: str, count: int) -> str:
    """Return why the processes cannot work together, or an empty text if they can.

    Args:
        variable: the environment variable that the launcher has set, one of `LAUNCHERS`.
        count: the number of processes.
    """
    try:
        with warnings.catch_warnings():
            # mpi4py warns of an mpiexec of another MPI, for which there is a reason below.
            warnings.simplefilter("ignore", RuntimeWarning)
            import mpi4py

            # Under Open MPI's mpiexec, MPICH ends the process when it is initialized. So the
            # library is asked for its name first.
            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return (
            f"which train together by mpi4py, and it cannot be used ({error}): install mpi4py and "
            "mpich, or start one copy"
        )
    library = " ".join(MPI.Get_library_version().split()[:3])
    other = variable.startswith("OMPI_") and not library.startswith("Open MPI")
    if not other and not MPI.Is_initialized():
        MPI.Init_thread()
    found = 1 if other else MPI.COMM_WORLD.size
    if found == count:
        return ""
    return (
        f"of which mpi4py's MPI sees {found}: start them by the mpiexec that belongs to it, "
        f"{library}; or, under SLURM, by srun --mpi=pmi2"
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
        DistributedError: the facts of two ranks differ. Every rank raises the error.
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
