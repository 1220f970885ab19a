"""The engine on a GPU: the programs of `npbn.engine.launch`, captured in CUDA graphs by CuPy.

Not yet tried on a GPU. Its kernels and launch sequences run on the CPU in ``tests/engine``; so does
this module, on a stand-in for the few functions of CuPy that it calls.

Data sets, parameters and all that a step works on stay in the GPU's memory. An epoch is a sequence
of graph launches, most of them of many steps, and one wait for the GPU at its end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from npbn.data import Split
from npbn.engine import launch
from npbn.engine.launch import Pointer, Program
from npbn.engine.plan import parameters_of, plan
from npbn.errors import BackendError, UnsupportedError
from npbn.layers import Sequential
from npbn.optim import SGD

STEPS_OF_A_GRAPH = 32

EVALUATED_AT_ONCE = 2048
"""Examples."""


class CupyEngine:
    """A model with its optimizer and its data on a GPU, planned for one batch size.

    Parameters, gradients, velocities and moving averages are those of the layers and the optimizer:
    these get views of the engine's arrays, when it first trains or evaluates.

    Args:
        model: on CuPy.
        optimizer: of its parameters.
        train, test: the data; of one image size.
        batch_size: a last batch may be smaller.

    Raises:
        UnsupportedError: there is no stage for a layer, or a stage or a batch is too large for the
            GPU.
        BackendError: the GPU has too little memory, or the kernels do not compile.
    """

    def __init__(
        self, model: Sequential, optimizer: SGD, train: Split, test: Split, *, batch_size: int
    ) -> None:
        import cupy

        self.cupy, self.optimizer = cupy, optimizer
        self.batch_size = min(batch_size, len(train))
        self.blocks = plan(model, tuple(train.images.shape[1:]))
        self.test_size = len(test)
        self.test_batch = min(EVALUATED_AT_ONCE, self.test_size)
        self.programs = self._write_programs(len(train))
        # Not the one that layers use: CUDA's default stream cannot be captured in a graph.
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self._computing():
            self.arrays = self._allocate()
            for name, split in (("train", train), ("test", test)):
                images = cupy.asarray(split.images).reshape(len(split), -1)
                self.arrays[f"{name}.images"][...] = images
                self.arrays[f"{name}.labels"][...] = cupy.asarray(split.labels).astype(np.int32)
            self._kernels = self._compile()
            self._graphs: dict[tuple[str, int], Any] = {}
            self._views = self._find_views()
        self.stream.synchronize()

    def train(self, order: np.ndarray) -> tuple[np.ndarray, int]:
        """A pass over these training examples, in this order, a step of the optimizer a batch.

        Returns:
            The mean loss of each step, and how many examples were right; waits for the GPU.
        """
        for _ in self.steps(order):
            pass
        with self._computing():
            return self._read("train", -(-len(order) // self.batch_size))

    def steps(self, order: np.ndarray) -> Iterator[tuple[int, Any, Any]]:
        """The same, up to STEPS_OF_A_GRAPH steps at a time, none of which is waited for.

        Yields:
            Of these steps: how many examples, their mean loss and how many were right; the last two
            on the GPU.
        """
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
        for start in range(0, batches, STEPS_OF_A_GRAPH):
            end = min(start + STEPS_OF_A_GRAPH, batches)
            yield self._launch(self.batch_size, start, end)
        if rest:
            yield self._launch(rest, batches, steps)

    def evaluate(self) -> tuple[float, int]:
        """Mean loss on the test data in prediction mode, and how many were right."""
        with self._computing():
            self._adopt()
            self._graph("test", 1).launch(self.stream)
            losses, hits = self._read("test", len(self.arrays["test.losses"]))
        first, size = range(0, self.test_size, self.test_batch), self.test_batch
        total = math.fsum(
            min(size, self.test_size - start) * float(loss)
            for start, loss in zip(first, losses, strict=True)
        )
        return total / self.test_size, hits

    # How it is set up.

    def _write_programs(self, examples: int) -> dict[str, Program]:
        """Of training, by name and batch size, and of an evaluation."""
        programs = {}
        for n in {self.batch_size, examples % self.batch_size} - {0}:
            programs[f"train{n}"] = launch.training(
                self.blocks,
                n,
                examples=examples,
                stride=self.batch_size,
                momentum=self.optimizer.momentum,
                weight_decay=self.optimizer.weight_decay,
                decay_all=self.optimizer.decay_all,
                fixed=True,
            )
        programs["test"] = launch.evaluation(
            self.blocks, self.test_batch, examples=self.test_size, fixed=True
        )
        return programs

    def _allocate(self) -> dict[str, Any]:
        specs = launch.largest(self.programs.values())
        try:
            arrays = {name: self.cupy.empty(s.shape, s.dtype) for name, s in specs.items()}
        except self.cupy.cuda.memory.OutOfMemoryError:
            needed = math.ceil(sum(spec.nbytes for spec in specs.values()) / 2**20)
            raise BackendError(
                f"the GPU has less free memory than the {needed:,} MiB that batches of "
                f"{self.batch_size} need: take smaller ones, or see in nvidia-smi who else uses it"
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
            code=launch.SOURCE.read_text(),
            options=launch.OPTIONS,
            name_expressions=tuple(sorted(names)),
        )
        try:
            kernels = {name: module.get_function(name) for name in names}
        except self.cupy.cuda.compiler.CompileException as error:
            raise BackendError(f"the GPU engine's kernels do not compile: {error}") from None
        for kernel in kernels.values():
            # So the kernel is loaded now, too: that would not do while a graph is captured.
            kernel.max_dynamic_shared_size_bytes = shared
        return kernels

    def _find_views(self) -> list[tuple[Any, str, str, Any]]:
        """Of the arrays, what layers and optimizer are to have: owner, attribute, name, view."""
        names = {id(parameter): name for name, parameter in self.optimizer.parameters.items()}
        views = []
        for offset, parameter in launch.parameter_offsets(self.blocks).values():
            for array, owner, attribute in (
                ("parameters", parameter, "data"),
                ("gradients", parameter, "gradient"),
                ("velocities", self.optimizer, "velocity"),
            ):
                view = self.arrays[array][offset : offset + parameter.data.size]
                name = names[id(parameter)]
                views.append((owner, attribute, name, view.reshape(parameter.data.shape)))
        for i, block in enumerate(self.blocks):
            for name, owner, attribute in parameters_of(block):
                if attribute != "data":
                    view = self.arrays[f"{i}.{name}"].reshape(getattr(owner, attribute).shape)
                    views.append((owner, attribute, name, view))
        return views

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """On the engine's stream, which waits for the one that layers use, and that one for it.

        CUDA does so by itself for no stream that is non-blocking, not even with the default one.
        """
        outside = self.cupy.cuda.get_current_stream()
        self.stream.wait_event(outside.record())
        with self.stream:
            yield
        outside.wait_event(self.stream.record())

    # What is done again and again; on the engine's stream.

    def _adopt(self) -> None:
        """Take over what others have put into the layers and the optimizer."""
        for owner, attribute, name, view in self._views:
            value = getattr(owner, attribute)
            if attribute == "velocity":
                velocities, value = value, value.get(name)
                if value is not view:
                    view[...] = 0 if value is None else value
                if self.optimizer.momentum:
                    velocities[name] = view
            elif value is not view:
                # What layers found for a gradient is not used: all are computed anew, but for those
                # of biases before a batch norm, which are 0 here and rounding errors there.
                view[...] = 0 if attribute == "gradient" else value
                setattr(owner, attribute, view)

    def _write(self, name: str, values: Any) -> None:
        array = self.arrays[name]
        array[: len(values)] = self.cupy.asarray(np.asarray(values, array.dtype))

    def _launch(self, size: int, start: int, end: int) -> tuple[int, Any, Any]:
        """These steps, on batches of this size."""
        with self._computing():
            many, single = divmod(end - start, STEPS_OF_A_GRAPH)
            for repeats, count in ((STEPS_OF_A_GRAPH, many), (1, single)):
                for _ in range(count):
                    self._graph(f"train{size}", repeats).launch(self.stream)
            loss = self.arrays["train.losses"][start:end].sum(dtype=np.float64) / (end - start)
            hits = self.arrays["train.hits"][start:end].sum()
        self.optimizer.steps += end - start
        return size * (end - start), loss, hits

    def _read(self, data: str, steps: int) -> tuple[np.ndarray, int]:
        """Losses and hits; waits for the GPU."""
        losses, hits = (
            self.cupy.asnumpy(self.arrays[f"{data}.{name}"][:steps]) for name in ("losses", "hits")
        )
        return losses.sum(1), int(hits.sum())

    def _graph(self, name: str, repeats: int) -> Any:
        """The program so many times; captured when it is first asked for."""
        if (name, repeats) not in self._graphs:
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
                            call.grid, (launch.THREADS,), arguments, shared_mem=call.shared
                        )
            finally:
                graph = self.stream.end_capture()
            self._graphs[name, repeats] = graph
        return self._graphs[name, repeats]

    def _address(self, pointer: Pointer) -> int:
        array = self.arrays[pointer.array]
        return _address(array) + pointer.offset * int(array.itemsize)


def _address(array: Any) -> int:
    return int(array.data.ptr)
