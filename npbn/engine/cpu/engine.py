"""Define `CpuEngine`, the fused engine on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from npbn.data import Split
from npbn.distributed import ALONE, Group
from npbn.engine import Result
from npbn.engine.cpu import launches, network, sharing
from npbn.engine.cpu.compilation import LOCK, compile_kernels
from npbn.engine.cpu.normalization import BATCH_NORM, FROZEN
from npbn.engine.plan import plan
from npbn.errors import BackendError
from npbn.layers import Parameter, Sequential, dtype_of
from npbn.optim import SGD

EVALUATED_AT_ONCE = 16_384
"""The largest number of examples that one call of the kernels evaluates."""


class CpuEngine:
    """A model with its optimizer and its data on the CPU.

    The layers and the optimizer always hold the current parameters, gradients, velocities and
    moving averages: when the engine first trains or evaluates, their arrays are replaced by views
    of the engine's memory. For a bias before a batch norm, the engine computes a gradient of
    exactly 0, where the layers compute rounding errors.

    Args:
        model: a model whose arrays are NumPy's.
        optimizer: the optimizer of the model's parameters.
        train, test: the training split and the test split, with images of the same size.
        batch_size: the number of examples in a training batch. The last batch may be smaller.
        threads: the number of threads that compute. By default, `Group.threads`. No bit of a result
            depends on the number of threads.
        group: the processes that train together. No bit of a result depends on their number. Every
            rank needs the same model, optimizer, splits and orders.
        report: a function that is called with lines to show to the user while the kernels are
            compiled. The compilation happens once, because the compiled kernels are cached.

    Raises:
        ValueError, TypeError: the model's own forward pass would raise the error, or ``threads`` is
            less than 1.
        UnsupportedError: there is no stage for a layer, or the kernels cannot be compiled.
    """

    kind = "fused"

    def __init__(
        self,
        model: Sequential,
        optimizer: SGD,
        train: Split,
        test: Split,
        *,
        batch_size: int,
        threads: int | None = None,
        group: Group = ALONE,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.group = group
        threads = self.group.threads if threads is None else threads
        if threads < 1:
            raise ValueError(f"expected at least 1 thread, got {threads}")
        # Numba cannot start more threads. A batch of 256 examples has 16 chunks in float32.
        self.threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self.stages = plan(model, tuple(train.images.shape[1:]))
        self.optimizer, self.train, self.test = optimizer, train, test
        self.batch_size = min(batch_size, len(train))
        self.net = network.build(
            self.stages,
            dtype_of(model),
            batch=self.batch_size,
            test=min(EVALUATED_AT_ONCE, len(test)),
            threads=self.threads,
            rank=self.group.rank,
            ranks=self.group.size,
        )
        self._sections: dict[tuple[int, int], Any] = {}
        self._views = self._find_views()
        settings = int(self.net.stages[0]["settings"])
        self._settings = self.net.values[settings : settings + 3]
        self.training_program = launches.training_program(len(self.stages))
        self.prediction_program = launches.prediction_program()
        self._splits = {id(split): _arrays(split) for split in (train, test)}
        compile_kernels(self._arguments(self.prediction_program, test, np.arange(0)), report)
        with _computing(self.threads):  # This starts the threads.
            pass
        self.description = f"by the fused engine on {self.threads} thread{'s' * (self.threads > 1)}"
        if self.threads > 1 and numba.threading_layer() == "workqueue":
            self.description += " (without OpenMP, which would start them faster)"

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on the given examples, batch by batch; see `npbn.engine.Engine`."""
        order = np.ascontiguousarray(order, np.int64)
        if len(order) and not 0 <= order.min() <= order.max() < len(self.train):
            raise IndexError(
                f"example {order.max() if order.min() >= 0 else order.min()} is out of bounds: "
                f"there are {len(self.train)}"
            )
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            loss, correct = self.execute(self.training_program, self.train, batch)
            self.optimizer.steps += 1
            yield Result(len(batch), loss / len(batch), correct)

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode."""
        for start in range(0, len(self.test), EVALUATED_AT_ONCE):
            part = np.arange(start, min(start + EVALUATED_AT_ONCE, len(self.test)))
            loss, correct = self.execute(self.prediction_program, self.test, part)
            yield Result(len(part), loss / len(part), correct)

    def execute(self, program: Any, split: Split, order: np.ndarray) -> tuple[float, int]:
        """Run a program of launches (`npbn.engine.cpu.launches`) on examples of a split.

        Args:
            program: the launches.
            split: the training split or the test split of this engine.
            order: the indices of the examples in the split.

        Returns:
            The sum of the examples' losses, and the number of examples that are classified
            correctly.
        """
        self._adopt()
        key = id(program), len(order)
        if key not in self._sections:
            self._sections[key] = program, sharing.sections(self.net, program, len(order))
        for section, shared in self._sections[key][1]:
            with _computing(self.threads):
                loss, correct = launches.execute(*self._arguments(section, split, order))
            for rows, ends in shared:
                self.group.share(rows, ends)
        return loss, correct

    def _arguments(self, program: Any, split: Split, order: Any) -> tuple[Any, ...]:
        return program, self.net, *self._splits[id(split)], _read_only(order), self.threads

    def _find_views(self) -> list[tuple[Any, ...]]:
        """Return the parameters and moving averages, with views of the engine's memory for each.

        Returns:
            A tuple for each array: (name, array, value, gradient, velocity). For a parameter,
            ``name`` is the name in the optimizer, and ``value``, ``gradient`` and ``velocity`` are
            views of the engine's memory. For a moving average, ``value`` is such a view, and
            ``gradient`` and ``velocity`` are None.
        """
        names = {id(parameter): name for name, parameter in self.optimizer.parameters.items()}
        found = []
        for stage, record in zip(self.stages, self.net.stages, strict=False):
            for name, place in network.places(stage, record):
                array = stage.state()[name]
                distances = 0, record["gradient"], record["velocity"]
                views = [
                    self.net.values[place + distance :][: array.data.size].reshape(array.data.shape)
                    for distance in (distances if isinstance(array, Parameter) else distances[:1])
                ]
                found.append((names.get(id(array)), array, *views, *[None] * (3 - len(views))))
        return found

    def _adopt(self) -> None:
        """Copy arrays and settings that a caller has changed into the engine's memory.

        A parameter, moving average or velocity that a caller has put into a layer or the optimizer
        is copied into the engine's memory, and replaced by the view of that memory. A gradient is
        replaced without a copy.
        """
        optimizer, velocities = self.optimizer, self.optimizer.velocity
        for name, array, value, gradient, velocity in self._views:
            if array.data is not value:
                value[...] = array.data
                array.data = value
            if gradient is None:
                continue
            array.gradient = gradient
            if optimizer.momentum and velocities.get(name) is not velocity:
                velocity[...] = velocities.get(name, 0)
                velocities[name] = velocity
        for stage, record in zip(self.stages, self.net.stages, strict=False):
            if stage.norm is not None:
                record["norm"] = FROZEN if stage.frozen else BATCH_NORM
                record["eps"], record["momentum"] = stage.norm.eps, stage.norm.momentum
        self._settings[:] = (
            optimizer.lr,
            optimizer.momentum,
            optimizer.weight_decay,
        )


def _arrays(split: Split) -> tuple[Any, Any]:
    """Return the pixels of a split as a flat array, and its labels, for the kernels."""
    images = np.ascontiguousarray(split.images).reshape(-1)
    return _read_only(images), _read_only(np.ascontiguousarray(split.labels, np.int64))


def _read_only(array: np.ndarray) -> Any:
    """Return a view of an array that cannot be written to.

    All arrays of the data are made read-only, because Numba would compile the kernels once for
    writable arrays and once more for read-only arrays.
    """
    view = array.view()
    view.flags.writeable = False
    return view


_threads_started_in: int | None = None
"""The id of the process that started Numba's threads; None before the threads are started.

A process that is forked from that process has no OpenMP threads.
"""


@contextlib.contextmanager
def _computing(threads: int) -> Iterator[None]:
    """Hold `LOCK`, and let Numba use the given number of threads, until exit.

    Raises:
        BackendError: the process was forked from a process that had started OpenMP threads.
    """
    global _threads_started_in
    with LOCK:
        if _threads_started_in is None:
            _choose_threading_layer()
            _threads_started_in = os.getpid()
        if _threads_started_in != os.getpid() and numba.threading_layer() != "workqueue":
            raise BackendError(
                "this process was forked from one that had trained with the fused engine, whose "
                'threads it does not have: start it by multiprocessing\'s "spawn" or '
                '"forkserver", or train by layers'
            )
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def _choose_threading_layer() -> None:
    """Choose OpenMP, if OpenMP is available and the user has not asked for a threading layer.

    OpenMP starts a launch fastest.
    """
    if numba.config.THREADING_LAYER == "default":
        with contextlib.suppress(ImportError):
            importlib.import_module("numba.np.ufunc.omppool")
            numba.config.THREADING_LAYER = "omp"
