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
from npbn.layers import Sequential, dtype_of
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
        self.threads = usable_cpus() if threads is None else threads
        if self.threads < 1:
            raise ValueError(f"expected at least 1 thread, got {threads}")
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
        self._training = launches.training_program(len(self.stages))
        self._prediction = launches.prediction_program()
        self._splits = {id(split): _arrays(split) for split in (train, test)}
        nothing = _read_only(np.zeros(0, np.int64))
        arguments = self._arguments(launches.prediction_program()[:1], train, nothing)
        compile_kernels(arguments, report)
        with _computing(self.threads):
            launches.execute(*arguments)  # starts the threads
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
            batch = _read_only(order[start : start + self.batch_size])
            loss, correct = self._execute(self._training, self.train, batch)
            self.optimizer.steps += 1
            yield Result(len(batch), loss / len(batch), correct)

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode."""
        for start in range(0, len(self.test), EVALUATED_AT_ONCE):
            part = np.arange(start, min(start + EVALUATED_AT_ONCE, len(self.test)))
            loss, correct = self._execute(self._prediction, self.test, _read_only(part))
            yield Result(len(part), loss / len(part), correct)

    def _execute(self, program: Any, split: Split, order: Any) -> tuple[float, int]:
        self._adopt()
        with _computing(self.threads):
            loss, correct = launches.execute(*self._arguments(program, split, order))
        return loss, correct

    def _arguments(self, program: Any, split: Split, order: Any) -> tuple[Any, ...]:
        return program, self.net, *self._splits[id(split)], order, self.threads

    def _find_views(self) -> list[tuple[Any, Any, Any, Any]]:
        """Of each parameter: itself, and views of its value, its gradient and its velocity.

        Of a moving average: itself, and a view of its value.
        """
        found = []
        for stage, record in zip(self.stages, self.net.stages, strict=False):
            places = dict(network.places(stage, record))
            for name, array in stage.state().items():
                offsets = 0, record["gradient"], record["velocity"]
                views = [
                    self.net.values[places[name] + offset :][: array.data.size].reshape(
                        array.data.shape
                    )
                    for offset in (offsets if hasattr(array, "gradient") else offsets[:1])
                ]
                found.append((array, *views, *[None] * (3 - len(views))))
        return found

    def _adopt(self) -> None:
        """Take over what others have put into the layers and the optimizer."""
        optimizer = self.optimizer
        velocities = optimizer.velocity
        names = {id(parameter): name for name, parameter in optimizer.parameters.items()}
        for array, value, gradient, velocity in self._views:
            if array.data is not value:
                value[...] = array.data
                array.data = value
            if gradient is None:
                continue
            array.gradient = gradient
            if optimizer.momentum:
                name = names[id(array)]
                before = velocities.get(name)
                if before is not velocity:
                    velocity[...] = 0 if before is None else before
                    velocities[name] = velocity
        for stage, record in zip(self.stages, self.net.stages, strict=False):
            if stage.norm is not None:
                record["norm"] = FROZEN if stage.frozen else BATCH_NORM
                record["eps"], record["momentum"] = stage.norm.eps, stage.norm.momentum
        settings = int(self.net.stages[0]["settings"])
        decay = optimizer.weight_decay
        self.net.values[settings : settings + 4] = (
            optimizer.lr,
            optimizer.momentum,
            decay,
            decay if optimizer.decay_all else 0,
        )


def _arrays(split: Split) -> tuple[Any, Any]:
    """A split's pixels, one after the other, and labels, as the kernels take them."""
    images = np.ascontiguousarray(split.images).reshape(-1)
    return _read_only(images), _read_only(np.ascontiguousarray(split.labels, np.int64))


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written to: Numba would compile kernels for each of the two."""
    view = array.view()
    view.flags.writeable = False
    return view


_threads_started_in: int | None = None
"""The process whose OpenMP threads these are. A process that is forked from it has none."""


@contextlib.contextmanager
def _computing(threads: int) -> Iterator[None]:
    """Numba with as many threads as asked for, or as there are."""
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
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
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
