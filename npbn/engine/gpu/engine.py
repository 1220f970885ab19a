"""Train and evaluate a model on a GPU: run the programs of `npbn.engine.gpu.launch` with CuPy.

CuPy captures the launches of a program as a CUDA graph. This module has not run on a GPU yet. In
the tests, this module runs with the real CuPy on an emulated GPU (``tests/emulated_gpu``).

The data sets, the parameters and all arrays of a step stay in the GPU's memory. An epoch is a
sequence of launches of graphs. A graph contains either one step or STEPS_PER_GRAPH steps. The host
waits for the GPU only at the end of the epoch, when the host reads the losses.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npbn.data import Split
from npbn.engine import Result
from npbn.engine.gpu import launch
from npbn.engine.gpu.first_step import saying_if_slow
from npbn.engine.gpu.program import OPTIONS, SOURCE, THREADS, Pointer, Program, largest
from npbn.engine.plan import plan
from npbn.errors import BackendError, UnsupportedError
from npbn.layers import Buffer, Parameter, Sequential
from npbn.optim import SGD

STEPS_PER_GRAPH = 32

EVALUATED_AT_ONCE = 2048
"""The number of examples in a batch of an evaluation."""


class DeviceSum:
    """A weighted sum of numbers in the GPU's memory, which is computed on the host when needed.

    ``float(x)`` and ``int(x)`` wait for the GPU, copy the numbers and add them up. So a training
    step launches no kernels for these sums. The sum must be read before the engine's next pass,
    which overwrites the numbers.

    Args:
        read: a function that returns an array on the host that contains the numbers.
        rows: the rows of this array that are added up.
        weights: the weights of these rows: one number for all rows, or an array with one number
            for each row.
    """

    def __init__(self, read: Callable[[], np.ndarray], rows: slice, weights: Any = 1) -> None:
        self.read, self.rows, self.weights = read, rows, weights

    def __float__(self) -> float:
        sums = self.read()[self.rows].sum(axis=1, dtype=np.float64)
        return float(np.sum(sums * self.weights))

    def __int__(self) -> int:
        return int(float(self))


class GpuEngine:
    """An engine that trains and evaluates a model on a GPU with batches of one size.

    The engine keeps parameters, gradients, velocities and moving averages in arrays of its own.
    When it first trains or evaluates, the layers and the optimizer get views of these arrays in
    place of their own arrays.

    Args:
        model: the model, on CuPy.
        optimizer: the optimizer of the model's parameters.
        train, test: the training split and the test split, with images of the same size.
        batch_size: the number of examples in a batch. The last batch may be smaller.
        report: a function that is called with a line to show to the user if the kernels are being
            compiled. CuPy keeps compiled kernels in a cache on disk.

    Raises:
        UnsupportedError: a layer does not fit into any stage, a batch norm is frozen, a stage or a
            batch is too large for the GPU, or the kernels do not compile.
        ValueError, TypeError: the model's own forward pass would raise the same error.
        BackendError: the GPU has too little memory.
    """

    kind = "fused"
    description = "by the fused engine on the GPU"

    def __init__(
        self,
        model: Sequential,
        optimizer: SGD,
        train: Split,
        test: Split,
        *,
        batch_size: int,
        report: Callable[[str], None] | None = None,
    ) -> None:
        import cupy

        self.cupy, self.model, self.optimizer = cupy, model, optimizer
        self.batch_size = min(batch_size, len(train))
        self.stages = plan(model, tuple(train.images.shape[1:]))
        # A model in prediction mode is not checked, because training first switches every layer to
        # training mode.
        if model.training:
            self._refuse_frozen()
        self.test_size = len(test)
        self.test_batch = min(EVALUATED_AT_ONCE, self.test_size)
        self.programs = self._write_programs(len(train))
        # The engine needs a stream of its own, because CUDA's default stream cannot be captured.
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self._computing():
            self.arrays = self._allocate()
            for name, split in (("train", train), ("test", test)):
                images = cupy.asarray(split.images).reshape(len(split), -1)
                self.arrays[f"{name}.images"][...] = images
                self.arrays[f"{name}.labels"][...] = cupy.asarray(split.labels).astype(np.int32)
            with saying_if_slow(report, "compiling kernels, once"):
                self._kernels = self._compile()
            self._find_views()
            self._launches = 0
            self._copies: dict[str, tuple[int, np.ndarray]] = {}
            self._graphs: dict[tuple[str, int], Any] = {}
            for key in self._needed_graphs(len(train)):
                self._graphs[key] = self._captured(*key)
        self.stream.synchronize()

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Launch the training steps, without waiting for the GPU.

        `npbn.engine.Engine` describes the arguments. Each `Result` stands for up to
        STEPS_PER_GRAPH steps. Afterwards, `losses` returns the mean loss of each single step.

        Raises:
            UnsupportedError: a batch norm has been frozen.
        """
        self._refuse_frozen()
        batches, rest = divmod(len(order), self.batch_size)
        steps = batches + (rest > 0)
        if rest and f"train{rest}" not in self.programs:
            raise ValueError(
                f"expected batches of {self.batch_size}, and of as many as the data set leaves "
                f"over, got {len(order)} examples"
            )
        first = self.optimizer.steps
        rates = [float(self.optimizer.schedule(first + i)) for i in range(steps)]
        with self._computing():
            self._adopt()
            self._write("order", order)
            self._write("rates", rates)
            self._write("step", [0])
        for start in range(0, batches, STEPS_PER_GRAPH):
            end = min(start + STEPS_PER_GRAPH, batches)
            yield self._launch(self.batch_size, start, end)
        if rest:
            yield self._launch(rest, batches, steps)

    def losses(self, steps: int) -> np.ndarray:
        """Wait for the GPU, and return the mean loss of each step of the last training epoch.

        Args:
            steps: the number of steps, counted from the beginning of the epoch.
        """
        with self._computing():
            rows = self.arrays["train.losses"][:steps]
            found: np.ndarray = rows.get().sum(axis=1, dtype=np.float64)
        return found

    def evaluate(self) -> Iterator[Result]:
        """Run the whole test split in prediction mode, without waiting for the GPU."""
        with self._computing():
            self._adopt()
            self._graphs["test", 1].launch(self.stream)
            self._launches += 1
        yield self._result("test", self.test_size, slice(None), self._test_shares)

    # The constructor calls the following methods, to prepare the engine.

    def _write_programs(self, examples: int) -> dict[str, Program]:
        """Return the programs by name: one training step per batch size, and one evaluation."""
        device = self.cupy.cuda.Device()
        multiprocessors = int(device.attributes["MultiProcessorCount"])
        programs = {}
        for n in {self.batch_size, examples % self.batch_size} - {0}:
            programs[f"train{n}"] = launch.training(
                self.stages,
                n,
                examples=examples,
                stride=self.batch_size,
                momentum=self.optimizer.momentum,
                weight_decay=self.optimizer.weight_decay,
                fixed=True,
                multiprocessors=multiprocessors,
            )
        programs["test"] = launch.evaluation(
            self.stages,
            self.test_batch,
            examples=self.test_size,
            fixed=True,
            multiprocessors=multiprocessors,
        )
        return programs

    def _allocate(self) -> dict[str, Any]:
        specs = largest(self.programs.values())
        try:
            arrays = {name: self.cupy.empty(s.shape, s.dtype) for name, s in specs.items()}
        except self.cupy.cuda.memory.OutOfMemoryError:
            needed = math.ceil(sum(spec.nbytes for spec in specs.values()) / 2**20)
            raise BackendError(
                f"the GPU has less free memory than the {needed:,} MiB that batches of "
                f"{self.batch_size} need: take smaller ones, or see in nvidia-smi what else uses it"
            ) from None
        for name, spec in specs.items():
            if spec.value is not None:
                arrays[name][...] = self.cupy.asarray(spec.value)
        return arrays

    def _compile(self) -> dict[str, Any]:
        calls = [call for program in self.programs.values() for call in program.launches]
        names, shared = {call.kernel for call in calls}, max(call.shared for call in calls)
        most = self.cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        if shared > most:
            raise UnsupportedError(
                f"a stage of the model needs {shared:,} bytes of shared memory; this GPU has "
                f"{most:,} for a block"
            )
        module = self.cupy.RawModule(
            code=SOURCE.read_text(),
            options=OPTIONS,
            name_expressions=tuple(sorted(names)),
        )
        try:
            kernels = {name: module.get_function(name) for name in names}
        except self.cupy.cuda.compiler.CompileException as error:
            message = str(error).strip().split("\n")[0]
            raise UnsupportedError(f"the GPU engine's kernels do not compile: {message}") from None
        for kernel in kernels.values():
            # The assignment also loads the kernel. CUDA cannot load a kernel while a graph is being
            # captured.
            kernel.max_dynamic_shared_size_bytes = shared
        return kernels

    def _find_views(self) -> None:
        """Make the views of the engine's arrays that the layers and the optimizer will use."""
        names = {id(parameter): name for name, parameter in self.optimizer.parameters.items()}
        self._values: list[tuple[Buffer, Any]] = []
        self._gradients: list[tuple[Parameter, Any]] = []
        self._velocities: dict[str, Any] = {}
        for offset, parameter in launch.parameter_offsets(self.stages).values():
            value, gradient, velocity = (
                self.arrays[array][offset : offset + parameter.data.size].reshape(
                    parameter.data.shape
                )
                for array in ("parameters", "gradients", "velocities")
            )
            self._values.append((parameter, value))
            self._gradients.append((parameter, gradient))
            self._velocities[names[id(parameter)]] = velocity
        for i, stage in enumerate(self.stages):
            for name, array in stage.state().items():
                if not isinstance(array, Parameter):
                    view = self.arrays[f"{i}.{name}"].reshape(array.data.shape)
                    self._values.append((array, view))
        starts = range(0, self.test_size, self.test_batch)
        sizes = [min(self.test_batch, self.test_size - start) for start in starts]
        self._test_shares = np.array(sizes) / self.test_size

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Run the body of a ``with`` statement on the engine's stream.

        The engine's stream first waits for the current stream, and afterwards the current stream
        waits for the engine's stream. CUDA itself does not order a non-blocking stream relative to
        other streams, not even relative to the default stream.
        """
        outside = self.cupy.cuda.get_current_stream()
        self.stream.wait_event(outside.record())
        with self.stream:
            yield
        outside.wait_event(self.stream.record())

    # The following methods run and capture graphs on the engine's stream.

    def _adopt(self) -> None:
        """Make the layers and the optimizer use views of the engine's arrays.

        If a layer or the optimizer uses another array, the values are copied to the engine's array.
        """
        for array, view in self._values:
            if array.data is not view:
                view[...] = array.data
                array.data = view
        for parameter, view in self._gradients:
            if parameter.gradient is not view:
                # A step computes all gradients, so the old values are not copied. A step does not
                # compute the gradient of a bias before batch norm: this gradient stays 0.
                view[...] = 0
                parameter.gradient = view
        velocities = self.optimizer.velocity
        for name, view in self._velocities.items():
            value = velocities.get(name)
            if value is not view:
                view[...] = 0 if value is None else value
            if self.optimizer.momentum:
                velocities[name] = view

    def _refuse_frozen(self) -> None:
        for stage in self.stages:
            if stage.frozen:
                raise UnsupportedError(
                    f"{stage.norm!r} after {stage.layer!r} is in prediction mode: the GPU's fused "
                    "engine cannot train with a frozen batch norm"
                )

    def _write(self, name: str, values: Any) -> None:
        array = self.arrays[name]
        array[: len(values)] = self.cupy.asarray(np.asarray(values, array.dtype))

    def _launch(self, size: int, start: int, end: int) -> Result:
        """Launch the steps from ``start`` to ``end`` - 1 on batches of ``size`` examples."""
        with self._computing():
            many, single = divmod(end - start, STEPS_PER_GRAPH)
            for repeats, count in ((STEPS_PER_GRAPH, many), (1, single)):
                for _ in range(count):
                    self._graphs[f"train{size}", repeats].launch(self.stream)
        self.optimizer.steps += end - start
        self._launches += 1
        steps = slice(start, end)
        return self._result("train", size * (end - start), steps, 1 / (end - start))

    def _result(self, data: str, examples: int, rows: slice, weights: Any) -> Result:
        """Return a `Result` computed from rows of the losses and of the right predictions.

        Args:
            data: "train" or "test", the beginning of the names of the arrays.
            examples: the number of examples.
            rows: the rows that are added up.
            weights: the weights of the rows of losses.
        """

        def read(name: str) -> np.ndarray:
            """Return a copy of an array on the host. The copy is kept until the next launch."""
            if self._copies.get(name, (0, None))[0] != self._launches:
                self._copies[name] = self._launches, self.arrays[name].get()
            return self._copies[name][1]

        loss = DeviceSum(functools.partial(read, f"{data}.losses"), rows, weights)
        correct = DeviceSum(functools.partial(read, f"{data}.correct"), rows)
        return Result(examples, loss, correct)

    def _needed_graphs(self, examples: int) -> list[tuple[str, int]]:
        """Return the graphs that are needed, as pairs (name of a program, repetitions)."""
        batches, rest = divmod(examples, self.batch_size)
        needed = [("test", 1), (f"train{self.batch_size}", 1)]
        if batches >= STEPS_PER_GRAPH:
            needed.append((f"train{self.batch_size}", STEPS_PER_GRAPH))
        return [*needed, (f"train{rest}", 1)] if rest else needed

    def _captured(self, name: str, repeats: int) -> Any:
        """Return a CUDA graph that runs the launches of a program ``repeats`` times."""
        program = self.programs[name]
        calls = [
            (call, tuple(program.value(argument, self._address) for argument in call.arguments))
            for call in program.launches
        ]
        self.stream.begin_capture()
        try:
            for _ in range(repeats):
                for call, arguments in calls:
                    self._kernels[call.kernel](
                        call.grid, (THREADS,), arguments, shared_mem=call.shared
                    )
        finally:
            graph = self.stream.end_capture()
        graph.upload(self.stream)
        return graph

    def _address(self, pointer: Pointer) -> int:
        array = self.arrays[pointer.array]
        return int(array.data.ptr) + pointer.offset * int(array.itemsize)
