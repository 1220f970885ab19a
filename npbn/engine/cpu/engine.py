"""The fused engine on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np

from npbn.backend import usable_cpus
from npbn.data import Split
from npbn.engine import Result
from npbn.engine.cpu import launches, network
from npbn.engine.cpu.compilation import LOCK, compile_kernels
from npbn.engine.cpu.normalization import BATCH_NORM, FROZEN
from npbn.engine.plan import plan
from npbn.errors import BackendError
from npbn.layers import Parameter, Sequential, dtype_of
from npbn.optim import SGD

EVALUATED_AT_ONCE = 16_384
"""Examples."""


class CpuEngine:
    """A model with its optimizer and its data on the CPU.

    Parameters, gradients, velocities and moving averages are those of the layers and the optimizer:
    these get views of the engine's memory, when it first trains or evaluates. A bias before a batch
    norm has a gradient of exactly 0 here, where layers find rounding errors.

    Args:
        model: on NumPy.
        optimizer: of its parameters.
        train, test: the data; of one image size.
        batch_size: a last batch may be smaller.
        threads: how many compute; every CPU that this process may use unless given. No bit of a
            result depends on it.
        report: called with lines to show while kernels are compiled, which happens once.

    Raises:
        ValueError, TypeError: what the model's own forward pass would raise.
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
        report: Callable[[str], None] | None = None,
    ) -> None:
        threads = usable_cpus() if threads is None else threads
        if threads < 1:
            raise ValueError(f"expected at least 1 thread, got {threads}")
        # Numba cannot start more, and a batch of 256 has 16 chunks.
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
        )
        self._views = self._find_views()
        settings = int(self.net.stages[0]["settings"])
        self._settings = self.net.values[settings : settings + 4]
        self.training_program = launches.training_program(len(self.stages))
        self.prediction_program = launches.prediction_program()
        self._splits = {id(split): _arrays(split) for split in (train, test)}
        compile_kernels(self._arguments(self.prediction_program, test, np.arange(0)), report)
        with _computing(self.threads):  # starts the threads
            pass
        self.description = f"by the fused engine on {self.threads} thread{'s' * (self.threads > 1)}"
        if self.threads > 1 and numba.threading_layer() == "workqueue":
            self.description += " (without OpenMP, which would start them faster)"

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on these examples, batch by batch; see `npbn.engine.Engine`."""
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
        """Run launches (`npbn.engine.cpu.launches`) on these examples of one of the two splits.

        Returns:
            The sum of their losses, and how many are classified right.
        """
        self._adopt()
        with _computing(self.threads):
            loss, correct = launches.execute(*self._arguments(program, split, order))
        return loss, correct

    def _arguments(self, program: Any, split: Split, order: Any) -> tuple[Any, ...]:
        return program, self.net, *self._splits[id(split)], _read_only(order), self.threads

    def _find_views(self) -> list[tuple[Any, ...]]:
        """Return each parameter and moving average, and views of the engine's memory for it.

        A parameter has its name in the optimizer and three views: of its value, gradient and
        velocity. A moving average has one, of its value.
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
        """Take over what others have put into the layers and the optimizer."""
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
            optimizer.weight_decay if optimizer.decay_all else 0,
        )


def _arrays(split: Split) -> tuple[Any, Any]:
    """A split's pixels, one after the other, and labels, as the kernels take them."""
    images = np.ascontiguousarray(split.images).reshape(-1)
    return _read_only(images), _read_only(np.ascontiguousarray(split.labels, np.int64))


def _read_only(array: np.ndarray) -> Any:
    """A view that cannot be written to: Numba would compile kernels for each of the two."""
    view = array.view()
    view.flags.writeable = False
    return view


_threads_started_in: int | None = None
"""The process whose OpenMP threads these are. A process that is forked from it has none."""


@contextlib.contextmanager
def _computing(threads: int) -> Iterator[None]:
    """Numba with this many threads."""
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
    """OpenMP, if it is there and nothing else was asked for: it starts a launch fastest."""
    if numba.config.THREADING_LAYER == "default":
        with contextlib.suppress(ImportError):
            importlib.import_module("numba.np.ufunc.omppool")
            numba.config.THREADING_LAYER = "omp"
