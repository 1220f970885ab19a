"""Worker processes that each do a part of a batch, and meet where something needs all of it.

Processes, not threads: Python lets one thread at a time run its interpreter, and a step is a
hundred short calls of NumPy. Two threads stood in each other's way for longer than they computed
(``npbn/engine/README.md`` has the measurement).

The process that asks is the first worker. It tells each other one over a socket what to do. Arrays
lie in memory that all of them see, and so do the flags by which they meet (`Meeting`). Who waits
looks again and again for a while before going to sleep: being woken up takes longer than most of
these waits.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from npbn.errors import WorkerError

PATIENCE = 0.02
"""Seconds of looking for a message before sleeping until it comes."""

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Names of shared arrays → shape and dtype."""


class Channel:
    """Messages, of bytes, between two processes."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def send(self, message: bytes) -> None:
        self.socket.sendall(len(message).to_bytes(8, "little") + message)

    def receive(self) -> bytes:
        """The next message; EOFError if the other process has gone."""
        return bytes(self._read(int.from_bytes(self._read(8), "little")))

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        patient_until = time.perf_counter() + PATIENCE
        while rest:
            patient = time.perf_counter() < patient_until
            try:
                n = self.socket.recv_into(rest, 0, socket.MSG_DONTWAIT if patient else 0)
            except BlockingIOError:
                os.sched_yield()
                continue
            except ConnectionResetError:
                n = 0
            if n == 0:
                raise EOFError
            rest = rest[n:]
        return data


class Meeting:
    """Where workers show each other what they found.

    Each writes into a slot of its own and then raises its flag to the number of the meeting. There
    are two slots for each, in turns: who is late still reads one while another writes the next.

    Args:
        number: this worker's.
        flags: (workers, 8), so that each lies in a cache line of its own.
        slots: (workers, 2, size).
        check: raises an error if a worker has gone; called now and then while waiting.
    """

    def __init__(
        self, number: int, flags: np.ndarray, slots: np.ndarray, check: Callable[[], None]
    ) -> None:
        self.number, self.slots, self.check = number, slots, check
        self.flags = flags.reshape(-1).data
        self.count = 0
        self._lock = threading.Lock()
        self._lock.acquire()

    def exchange(self, found: np.ndarray, workers: int) -> Any:
        """What the first ``workers`` of them found, stacked in their order."""
        self.count += 1
        slots = self.slots[:workers, self.count % 2, : found.size]
        slots[self.number] = found.reshape(-1)
        self._fence()
        self.flags[8 * self.number] = self.count
        for other in range(workers):
            looks = 0
            while self.flags[8 * other] < self.count:
                looks += 1
                if looks > 100:
                    os.sched_yield()
                # Beside other busy programs, every look may cost their share of the time.
                if looks % 1000 == 0:
                    self.check()
        self._fence()
        return slots.reshape(workers, *found.shape).copy()

    def _fence(self) -> None:
        """Everything written or read before this is so before anything after it.

        Some processors would change that order; operations on a lock forbid them to.
        """
        self._lock.release()
        self._lock.acquire()


class Worker:
    """Another process, seen from the first."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        program = f"import sys; sys.path[:] = {sys.path!r}; from npbn.engine import team; "
        program += f"team.serve({theirs.fileno()})"
        # Ctrl-C is for the first, which then ends the others: they never see it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
            atexit.register(self.end)
        except OSError as error:
            ours.close()
            raise WorkerError(f"cannot start a worker process of the engine: {error}") from None
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def receive(self) -> Any:
        """What it sends next: an array or an object."""
        try:
            message = self.channel.receive()
        except EOFError:
            code = self.process.wait()
            raise WorkerError(
                f"a worker process of the engine has ended (exit code {code}); "
                + ("out of memory?" if code == -signal.SIGKILL else "what it printed is above")
            ) from None
        found = pickle.loads(message)
        if isinstance(found, _Failure):
            raise WorkerError(f"in a worker process of the engine:\n{found.text}")
        return found

    def send(self, *message: Any, files: Sequence[int] = ()) -> None:
        with contextlib.suppress(ConnectionError):  # it has gone: `receive` will say so
            self.channel.send(pickle.dumps(message, protocol=5))
            if files:
                socket.send_fds(self.channel.socket, [b"."], files)

    def check(self) -> None:
        """Raise an error if it has ended, as it does after a failure."""
        if self.process.poll() is not None:
            self.receive()

    def end(self) -> None:
        atexit.unregister(self.end)
        self.channel.socket.close()
        self.process.kill()
        self.process.wait()


class _Failure:
    """An exception in a worker, which has ended since."""

    def __init__(self, text: str) -> None:
        self.text = text


_idle: list[Worker] = []
"""Processes that have no team at present; starting one takes longer than many a training."""


def start_workers(count: int) -> None:
    """Have so many idle ones; they start while this process goes on."""
    if count and not hasattr(socket, "send_fds"):
        raise WorkerError("more than one worker needs Linux or macOS; ask for one")
    for worker in [worker for worker in _idle if worker.process.poll() is not None]:
        _idle.remove(worker)
        worker.end()
    while len(_idle) < count:
        _idle.append(Worker())


class Team:
    """A number of workers; the process that asks is the first.

    Args:
        size: how many.
        setup: sent to each of the others: a function of a module, and what it is called with before
            the worker's number, the arrays that it shares, and `Meeting.exchange`. It returns what
            does the work there: an object whose methods `ask` calls.
        common: layout of the arrays that all share.
        own: of those that each of the others shares with the first alone.
        exchanged: the most numbers of a `Meeting.exchange`, and their dtype.
    """

    def __init__(
        self,
        size: int,
        setup: tuple[Any, ...],
        common: Layout,
        own: Layout,
        exchanged: tuple[int, Any],
    ) -> None:
        start_workers(size - 1)
        whole = {
            "flags": ((size, 8), "int64"),
            "slots": ((size, 2, exchanged[0]), str(exchanged[1])),
            **{f"all {name}": value for name, value in common.items()},
            **{
                f"{number} {name}": value
                for number in range(1, size)
                for name, value in own.items()
            },
        }
        arrays, fd = _shared_arrays(whole)
        self.common = _of(arrays, "all")
        self.own = [_of(arrays, number) for number in range(1, size)]
        self._workers = [_idle.pop() for _ in range(size - 1)]
        self._asked: list[Worker] = []
        # `partial`: a method would refer to this team, which would then wait for the collector.
        check = functools.partial(_check, self._asked)
        self._meeting = Meeting(0, arrays["flags"], arrays["slots"], check)
        self.exchange = self._meeting.exchange
        self._end = weakref.finalize(self, _idle.extend, self._workers)
        try:
            for number, worker in enumerate(self._workers, 1):
                worker.send("set up", 0, setup, number, whole, files=[fd])
        except BaseException:  # Ctrl-C, too: the others may have half a message
            self.dissolve()
            raise
        finally:
            os.close(fd)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Have as many workers as there are tuples of arguments do something, each with its own."""
        self._asked[:] = self._workers[: len(arguments)]
        for worker, given in zip(self._asked, arguments, strict=True):
            worker.send(method, self._meeting.count, *given)

    def answers(self) -> list[Any]:
        """What those asked have returned."""
        return [worker.receive() for worker in self._asked]

    def dissolve(self) -> None:
        """End the processes, which may be in the middle of anything."""
        if self._end.detach():
            for worker in self._workers:
                worker.end()


def _check(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.check()


def _of(arrays: Mapping[str, np.ndarray], owner: object) -> dict[str, np.ndarray]:
    """Those that belong to all, or to a worker."""
    start = f"{owner} "
    return {name[len(start) :]: array for name, array in arrays.items() if name.startswith(start)}


def _shared_arrays(layout: Layout, fd: int | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Arrays in a piece of memory that processes share, and the file that stands for it."""
    sizes = {
        name: int(np.prod(shape)) * np.dtype(dtype).itemsize
        for name, (shape, dtype) in layout.items()
    }
    if fd is None:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("npbn")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, sum(-(-size // 64) * 64 for size in sizes.values()))
    memory = mmap.mmap(fd, 0)
    arrays, offset = {}, 0
    for name, (shape, dtype) in layout.items():
        arrays[name] = np.ndarray(shape, dtype, memory, offset)
        offset += -(-sizes[name] // 64) * 64
    return arrays, fd


# In the other processes.


def serve(fd: int) -> None:
    """Do what the first process asks for, until it has gone or something fails."""
    connection = socket.socket(fileno=fd)
    channel = Channel(connection)

    def check() -> None:
        with contextlib.suppress(BlockingIOError):
            if not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                sys.exit()

    does: Any = None
    meeting: Any = None
    answer: Any = None
    with threadpoolctl.threadpool_limits(1), contextlib.suppress(EOFError, ConnectionError):
        while not isinstance(answer, _Failure):
            message = channel.receive()
            try:
                method, count, *arguments = pickle.loads(message)
                if method == "set up":
                    (make, *given), number, layout = arguments
                    _, (theirs,), *_ = socket.recv_fds(connection, 1, 1)
                    arrays, _ = _shared_arrays(layout, theirs)
                    os.close(theirs)
                    meeting = Meeting(number, arrays["flags"], arrays["slots"], check)
                    shared = _of(arrays, "all") | _of(arrays, number)
                    does = make(*given, number, shared, meeting.exchange)
                    continue
                meeting.count = count
                answer = getattr(does, method)(*arguments)
            except Exception:  # whatever it is, the first process is to say it
                answer = _Failure(traceback.format_exc())
            channel.send(pickle.dumps(answer, protocol=5))
