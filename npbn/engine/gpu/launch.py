"""Turn a plan into a program: the arrays and the kernel launches of a training step.

This module needs no GPU. The launches are the same in every step. A counter in the GPU's memory,
``step``, tells the kernels where the batch begins and which learning rate applies. So the launches
can be captured in a CUDA graph, and the graph can be launched again and again.

A model has several programs: one for each batch size, and one for evaluation. The programs share
arrays: arrays of the same name are a single array, with the largest size that a program needs.

Before the first step, the host writes the images, the labels, the parameters and the moving
averages. Before each epoch, the host writes ``order``, ``rates``, and 0 to ``step``. Each step
writes one row of ``train.losses``, whose sum is the mean loss, and one row of ``train.correct``,
whose sum is the number of right predictions. The host reads these arrays after the epoch. After an
evaluation, the host reads ``test.losses`` and ``test.correct``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from npbn.engine.gpu.program import (
    NULL,
    THREADS,
    Argument,
    ArraySpec,
    Launch,
    Pointer,
    Program,
    Structure,
)
from npbn.engine.gpu.shapes import (
    MAPS_PER_THREAD,
    PARAMETERS_PER_BLOCK,
    TAPS_PER_THREAD,
    TILE,
    TILES,
    VECTOR,
    KernelStage,
    images_of,
    normalization,
    over,
    stage_of,
)
from npbn.engine.plan import StagePlan
from npbn.errors import UnsupportedError
from npbn.layers import Parameter

MULTIPROCESSORS = 132
"""The number of streaming multiprocessors of an H100 or H200. They share the work."""

BLOCKS_PER_MULTIPROCESSOR = 4
"""The largest number of blocks of a launch, per multiprocessor. In a larger batch, each block
processes several examples, because more blocks would mean more partial statistics to merge."""

MOST_OF_A_CLASSIFIER = 96 * 1024
"""The largest number of bytes of shared memory for a launch that computes the last linear layer
and the loss. A layer that needs more memory is computed in tiles, in a launch without the loss."""

MOST_BLOCKS = 65_535
"""CUDA's limit for the number of blocks along the second and along the third axis of a grid."""

MOST_SHARED = 227 * 1024
"""The number of bytes of shared memory that a block can have on an H100 or H200."""

WEIGHTS_AT_A_TIME = 12 * 1024
"""The largest number of bytes of a convolution's weights in shared memory at a time. Only the
weights of a single channel may need more."""

EXAMPLES_OF_A_LOSS = 32
"""The largest number of examples for which one block computes the loss. This number is small,
because many blocks can load more data at the same time than few blocks."""

LOGITS_AT_A_TIME = 16 * 1024
"""The largest number of bytes of logits in the shared memory of a block. Only the logits of a
single example may need more."""

LONG = 256
"""The number of terms that make another block worthwhile when a sum is divided among blocks."""


def parameter_offsets(stages: Sequence[StagePlan]) -> dict[str, tuple[int, Parameter]]:
    """Return a pair (offset, parameter) for the name of each parameter, such as "0.weight".

    The offset is the index of the parameter's first number in the array of all parameters.
    """
    found: dict[str, tuple[int, Parameter]] = {}
    end = 0
    for i, stage in enumerate(stages):
        for name, array in stage.state().items():
            if isinstance(array, Parameter):
                found[f"{i}.{name}"] = end, array
                end += array.data.size
    return found


def training(
    stages: Sequence[StagePlan],
    n: int,
    *,
    examples: int,
    stride: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    fixed: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Program:
    """Return the program of a training step on n examples.

    Args:
        stages: the plan of the model.
        n: the number of examples in the batch.
        examples: the number of examples in the data set, in ``train.images`` and ``train.labels``.
        stride: the distance in ``order`` between the first examples of two neighbouring batches. By
            default, this is n.
        momentum, weight_decay: as in `npbn.optim.SGD`.
        fixed: whether the kernels are compiled for the sizes of this model. If not, the kernels
            read the sizes at run time, so that tests can use the same kernels for many models.
        multiprocessors: the number of multiprocessors among which the work is divided. The order in
            which numbers are added, and so the last bits of the results, depend on this number.
    """
    stride = n if stride is None else stride
    writer = _Writer(stages, "train", examples, stride, fixed, multiprocessors)
    return writer.training(n, momentum, weight_decay)


def evaluation(
    stages: Sequence[StagePlan],
    n: int,
    *,
    examples: int,
    fixed: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Program:
    """Return the program that evaluates the test split in prediction mode, n examples at a time.

    Each batch writes one row of ``test.losses``, whose sum is the mean loss of the batch. The last
    batch may be smaller. The arguments are those of `training`.
    """
    return _Writer(stages, "test", examples, n, fixed, multiprocessors).evaluation()


class _Writer:
    """A program that is being written.

    Attributes:
        n: the number of examples in a batch.
        steps: the number of batches in the data set.
        partition: for each stage, how the batch is divided into parts for the statistics: the
            number of examples in a part, and the number of parts.
        sums: for each stage, the argument of the type ``Sums`` of kernels.cu.
        partials: the number of elements that have been reserved in the array of partial sums.
    """

    def __init__(
        self,
        stages: Sequence[StagePlan],
        data: str,
        examples: int,
        stride: int,
        fixed: bool,
        multiprocessors: int,
    ) -> None:
        self.data, self.examples, self.stride = data, examples, stride
        self.fixed, self.multiprocessors = fixed, multiprocessors
        self.train = data == "train"
        self.steps = over(examples, stride)
        self.partials = 0
        self.partition: dict[str, tuple[int, int]] = {}
        self.sums: dict[str, Structure] = {}
        sized = [stage_of(str(i), stage) for i, stage in enumerate(stages)]
        first, self.last = sized[0], sized[-1]
        self.pairs = list(zip([images_of(*stages[0].shape), *sized[:-1]], sized, strict=True))
        self.dtype = np.dtype(stages[0].layer.weight.data.dtype)
        self.real = {"float32": "float", "float64": "double"}[self.dtype.name]
        self.offsets = parameter_offsets(stages)
        self.arrays: dict[str, ArraySpec] = {}
        self.launches: list[Launch] = []
        self._array("parameters", (sum(owner.data.size for _, owner in self.offsets.values()),))
        self._array(f"{data}.images", (examples, first.inputs), np.uint8)
        self._array(f"{data}.labels", (examples,), np.int32)

    def training(self, n: int, momentum: float, weight_decay: float) -> Program:
        self.n = n
        order = self._array("order", (self.examples,), np.int32)
        batch = self._batch(order, self._array("step", (1,), np.int32, 0))
        backward = list(reversed(self.pairs))
        tensors = self._forward_and_loss(batch)
        if tensors:  # The launches already include the backward pass of the last stage.
            del backward[0]
        for before, stage in backward:
            tensors += self._backward(before, stage)
        self._array("partials", (self.partials,))
        self._sgd(tensors, momentum, weight_decay)
        return self._program()

    def evaluation(self) -> Program:
        counting = np.arange(self.steps, dtype=np.int32)
        numbers = self._array("steps", counting.shape, np.int32, counting)
        for step in range(self.steps):
            self.n = min(self.stride, self.examples - step * self.stride)
            self._forward_and_loss(self._batch(NULL, Pointer(numbers.array, step)))
        return self._program()

    # The following methods append launches.

    def _forward_and_loss(self, batch: Structure) -> list[tuple[int, ...]]:
        """Append the launches of the forward pass and of the loss.

        If the last of several stages is only a linear layer, and small enough, one launch computes
        this layer, the loss and the backward passes of both. In this case, in training, return the
        parameter tensors of the layer for `_sgd`. Otherwise, return an empty list.
        """
        before, last = self.pairs[-1]
        memory = [*normalization(before), *last.classifier]
        fused = (
            *(last.linear, before.plan is not None, last.norm is None, last.outputs == last.values),
            *(last.sizes["activation"] == 0, self._bytes(memory) <= MOST_OF_A_CLASSIFIER),
        )
        whole = all(fused)
        for pair in self.pairs[: -1 if whole else None]:
            self._forward(*pair, batch)
        if whole:
            return self._linear_cross_entropy(batch, memory)
        self._cross_entropy(batch)
        return []

    def _linear_cross_entropy(
        self, batch: Structure, memory: Sequence[int]
    ) -> list[tuple[int, ...]]:
        before, last = self.pairs[-1]
        most = max(1, BLOCKS_PER_MULTIPROCESSOR * self.multiprocessors)
        examples_per_block = over(over(self.stride, TILE), most) * TILE
        # All batch sizes share the array of losses, so the length of a row must not depend on n.
        rows = self.steps, over(self.stride, examples_per_block) * THREADS // TILE
        parts = over(self.n, examples_per_block)
        bias = self._parameter(last, "bias")
        dz = NULL
        if self.train:
            dz = self._array(f"dz{before.name}", (self.n * before.values,))
        dw = self._partial_sums(parts * last.weights)
        db = NULL if bias is NULL else self._partial_sums(parts * last.maps)
        self._launch(
            "linear_cross_entropy",
            (before, last),
            (over(self.stride, examples_per_block), 1, 1),
            memory,
            np.int32(self.n),
            np.int32(examples_per_block),
            batch,
            self._norm(before, merging=True),
            self._sums_of(before, parts * (before.outputs // before.maps)),
            self._output(before),
            self._parameter(last, "weight"),
            bias,
            dz,
            dw if self.train else NULL,
            db if self.train else NULL,
            self._array(f"{self.data}.losses", rows),
            self._array(f"{self.data}.correct", rows, np.int32),
        )
        return self._tensors(last, dw, db, parts) if self.train else []

    def _forward(self, before: KernelStage, stage: KernelStage, batch: Structure) -> None:
        name = stage.name
        across = over(stage.maps, TILE) if stage.linear else 1
        examples_per_block, num_blocks = self._divided(across, TILE if stage.linear else 1)
        x = means = squares = NULL
        if self.train:
            x = self._array(f"x{name}", (self.n * stage.inputs,))
            if stage.norm is not None:
                means = self._array(f"means{name}", (stage.maps * num_blocks, 2))
                squares = self._array(f"squares{name}", (stage.maps * num_blocks,))
                self.partition[name] = examples_per_block, num_blocks
        sizes = [np.int32(self.n), np.int32(examples_per_block)]
        memory = [*normalization(before)]
        if stage.linear:
            memory += TILES
        else:
            channels_per_pass, weights = self._weight_passes(stage, stage.channels, stage.maps)
            sizes.append(np.int32(channels_per_pass))
            memory += [stage.planes, stage.values, weights]
        self._launch(
            "linear_forward" if stage.linear else "conv_forward",
            (before, stage),
            (num_blocks, across, 1),
            memory,
            *sizes,
            batch,
            self._norm(before, merging=True),
            self._output(before),
            self._parameter(stage, "weight"),
            self._parameter(stage, "bias"),
            x,
            self._array(f"y{name}", (self.n * stage.values,)),
            means,
            squares,
        )

    def _cross_entropy(self, batch: Structure) -> None:
        last = self.last
        most = LOGITS_AT_A_TIME // (last.outputs * self.dtype.itemsize)
        examples_per_block = min(EXAMPLES_OF_A_LOSS, max(1, most))
        # All batch sizes share the array of losses, so the length of a row must not depend on n.
        num_blocks = over(self.stride, examples_per_block)
        rows = self.steps, num_blocks * THREADS // TILE
        dz = self._array(f"dz{last.name}", (self.n * last.values,)) if self.train else NULL
        self._launch(
            "cross_entropy",
            (last,),
            (num_blocks, 1, 1),
            [*normalization(last), examples_per_block * last.outputs],
            np.int32(self.n),
            np.int32(examples_per_block),
            batch,
            self._norm(last, merging=True),
            self._sums_of(last, num_blocks),
            self._output(last),
            dz,
            self._array(f"{self.data}.losses", rows),
            self._array(f"{self.data}.correct", rows, np.int32),
        )

    def _backward(self, before: KernelStage, stage: KernelStage) -> list[tuple[int, ...]]:
        """Append a stage's backward pass. Return the stage's parameter tensors for `_sgd`."""
        assert stage.plan is not None
        name = stage.name
        first = before.plan is None  # The gradient with respect to the images is not needed.
        bias = stage.norm is None and self._parameter(stage, "bias") is not NULL
        across = over(stage.inputs, TILE) if stage.linear else 1
        examples_per_block, num_blocks = self._divided(across, TILE if stage.linear else 1)
        sizes: list[np.generic] = []
        memory = [*normalization(stage), stage.maps, stage.maps]
        if stage.linear:
            tiles = over(stage.inputs + bias, TILE) * over(stage.maps, TILE)
            weight_blocks = min(over(2 * self.multiprocessors, tiles), over(self.n, LONG))
            memory += [*normalization(before), *TILES]
        else:
            tiles, weight_blocks = 1, 2 * self.multiprocessors
            channels_per_pass, weights = self._weight_passes(stage, stage.maps, stage.channels)
            sizes.append(np.int32(channels_per_pass))
            memory += max(
                [] if first else [*normalization(before), stage.wide, stage.inputs, weights],
                [
                    stage.summed + TAPS_PER_THREAD,
                    stage.gradients,
                    MAPS_PER_THREAD * TAPS_PER_THREAD * THREADS,
                ],
                key=self._bytes,
            )
        examples_per_weight_block = over(self.n, weight_blocks)
        weight_blocks = over(self.n, examples_per_weight_block)
        input_blocks = 0 if first else across * num_blocks
        dw = self._partial_sums(weight_blocks * stage.weights)
        db = self._partial_sums(weight_blocks * stage.maps) if bias else NULL
        self._launch(
            "linear_backward" if stage.linear else "conv_backward",
            (before, stage),
            (input_blocks + tiles * weight_blocks, 1, 1),
            memory,
            *map(np.int32, (self.n, input_blocks, examples_per_block, examples_per_weight_block)),
            *sizes,
            self._norm(stage),
            self.sums[name],
            self._norm(before),
            self._sums_of(
                before, num_blocks * (before.outputs // before.maps if stage.linear else 1)
            ),
            self._output(before),
            self._parameter(stage, "weight"),
            *(Pointer(f"{array}{name}") for array in ("x", "y", "dz")),
            NULL if first else self._array(f"dz{before.name}", (self.n * before.values,)),
            dw,
            db,
            Pointer("step") if first else NULL,
        )
        return self._tensors(stage, dw, db, weight_blocks)

    def _tensors(
        self, stage: KernelStage, dw: Pointer, db: Pointer | None, parts: int
    ) -> list[tuple[int, ...]]:
        """Return the parameter tensors of a stage, as rows of the fields of ``Tensor``.

        Args:
            stage: the stage.
            dw, db: the partial sums of the gradients of weight and bias. ``db`` is null if the
                stage has no bias, or if the gradient of the bias is 0 because batch norm follows.
            parts: the number of partial sums of each gradient.
        """
        assert stage.plan is not None
        tensors: list[tuple[int, ...]] = []
        for parameter, array in stage.plan.state().items():
            if isinstance(array, Parameter):
                offset, _ = self.offsets[f"{stage.name}.{parameter}"]
                partial = {"weight": dw, "bias": db}.get(parameter)
                place, count = (0, 0) if partial is None else (partial.offset, parts)
                decays = int(parameter == "weight")
                tensors.append((offset, array.data.size, place, count, decays))
        return tensors

    def _sgd(self, tensors: list[tuple[int, ...]], momentum: float, weight_decay: float) -> None:
        shape = self.arrays["parameters"].shape
        table = np.array(sorted(tensors), np.int32)
        self._launch(
            "sgd",
            (),
            (over(shape[0], PARAMETERS_PER_BLOCK), 1, 1),
            [THREADS],
            # Each batch size has its own table, because the table lists places of partial sums.
            self._array(f"tensors{self.n}", table.shape, np.int32, table),
            np.int32(shape[0]),
            *map(Pointer, ("partials", "step")),
            self._array("rates", (self.steps,)),
            self._real(momentum),
            self._real(weight_decay),
            Pointer("parameters"),
            self._array("gradients", shape, value=0),
            self._array("velocities", shape, value=0),
        )

    # The following methods return arguments of launches.

    def _program(self) -> Program:
        for name, array in self.arrays.items():
            if math.prod(array.shape) >= 2**31 and not name.endswith(".images"):
                raise UnsupportedError(
                    f"{name} would have {math.prod(array.shape):,} numbers; the GPU engine counts "
                    f"up to {2**31 - 1:,}: take smaller batches than {self.n}"
                )
        for launch in self.launches:
            if max(launch.grid[1:]) > MOST_BLOCKS:
                raise UnsupportedError(
                    f"{launch.kernel} would need a grid of {launch.grid} blocks; a GPU has at most "
                    f"{MOST_BLOCKS:,} in the second and third"
                )
            if launch.shared > MOST_SHARED:
                raise UnsupportedError(
                    f"{launch.kernel} would need {launch.shared:,} bytes of shared memory; a GPU "
                    f"has at most {MOST_SHARED:,} for a block"
                )
        return Program(self.arrays, tuple(self.launches), self.dtype)

    def _array(
        self, name: str, shape: tuple[int, ...], dtype: Any = None, value: Any = None
    ) -> Pointer:
        spec = ArraySpec(shape, self.dtype if dtype is None else dtype, value)
        self.arrays.setdefault(name, spec)
        return Pointer(name)

    def _launch(
        self,
        kernel: str,
        stages: Sequence[KernelStage],
        grid: tuple[int, int, int],
        memory: Sequence[int],
        *arguments: Argument,
    ) -> None:
        """Append the launch of a kernel.

        Args:
            kernel: the name of the kernel.
            stages: the stages whose sizes the kernel uses.
            grid: the number of blocks along each axis.
            memory: the length of each array that the kernel allocates in shared memory.
            arguments: the arguments that follow the sizes of the stages.
        """
        shapes = [", ".join(map(str, stage.sizes.values())) for stage in stages]
        types = [f"Fixed<{sizes}>" if self.fixed else "Shape" for sizes in shapes]
        # Fixed sizes are part of the type, so the argument is an empty class, which has one byte.
        values = [np.uint8(0) if self.fixed else Structure("Shape", s.sizes) for s in stages]
        name = f"{kernel}<{', '.join([self.real, *types])}>"
        shared = self._bytes(memory)
        self.launches.append(Launch(name, grid, shared, (*values, *arguments)))

    def _bytes(self, memory: Iterable[int]) -> int:
        """Return the number of bytes of arrays with these lengths, rounded up to whole vectors."""
        return sum(over(count, VECTOR) * VECTOR * self.dtype.itemsize for count in memory)

    def _real(self, value: float) -> np.generic:
        number: np.generic = self.dtype.type(value)
        return number

    def _parameter(
        self, stage: KernelStage, name: str, array: str = "parameters"
    ) -> Pointer | None:
        found = self.offsets.get(f"{stage.name}.{name}")
        return NULL if found is None else Pointer(array, found[0])

    def _output(self, stage: KernelStage) -> Pointer | None:
        """Return the array of the affine map of a stage, or null if the stage is the images."""
        return NULL if stage.plan is None else Pointer(f"y{stage.name}")

    def _batch(self, order: Pointer | None, step: Pointer) -> Structure:
        images, labels = Pointer(f"{self.data}.images"), Pointer(f"{self.data}.labels")
        values = {"images": images, "labels": labels, "order": order, "step": step}
        return Structure("Batch", values | {"stride": self.stride})

    def _norm(self, stage: KernelStage, merging: bool = False) -> Structure:
        """Return the argument of the type ``Norm`` of kernels.cu for the batch norm of a stage.

        In training, if ``merging`` is true, the kernel merges the statistics of the batch's parts.
        """
        name, norm = stage.name, stage.norm
        if norm is None:
            return Structure("Norm", {})
        values: dict[str, Any] = {"eps": norm.eps, "momentum": norm.momentum}
        values |= {kind: self._parameter(stage, kind) for kind in ("gamma", "beta")}
        for moving in ("moving_mean", "moving_var"):
            values[moving] = self._array(f"{name}.{moving}", (stage.maps,))
        if not self.train:
            values |= {"mean": values["moving_mean"], "var": values["moving_var"]}
            return Structure("Norm", values)
        for kind in ("mean", "rest", "var"):
            values[kind] = self._array(f"{kind}{name}", (stage.maps,))
        if merging:
            examples_per_block, num_blocks = self.partition[name]
            values |= {"examples_per_part": examples_per_block, "parts": num_blocks}
            values |= {kind: Pointer(f"{kind}{name}") for kind in ("means", "squares")}
        return Structure("Norm", values)

    def _sums_of(self, stage: KernelStage, num_blocks: int) -> Structure:
        """Return the argument of the type ``Sums`` of kernels.cu, and reserve an array for it.

        The array holds the sums that the backward pass of the stage's batch norm needs.
        """
        found = Structure("Sums", {})
        if self.train and stage.norm is not None:
            values = {
                "sums": self._array(f"sums{stage.name}", (2 * stage.maps * num_blocks,)),
                "parts": num_blocks,
                "dgamma": self._parameter(stage, "gamma", "gradients"),
                "dbeta": self._parameter(stage, "beta", "gradients"),
            }
            found = Structure("Sums", values)
        self.sums[stage.name] = found
        return found

    def _partial_sums(self, count: int) -> Pointer:
        """Reserve ``count`` elements of the array of partial sums. Return a pointer to them."""
        self.partials += count
        return Pointer("partials", self.partials - count)

    def _divided(self, across: int, unit: int) -> tuple[int, int]:
        """Return the number of examples in a block, and the number of blocks for the batch.

        Args:
            across: the number of blocks that process the same examples.
            unit: the number of examples in a block is a multiple of this number.
        """
        most = max(1, BLOCKS_PER_MULTIPROCESSOR * self.multiprocessors // across)
        examples_per_block = over(over(self.n, unit), most) * unit
        return examples_per_block, over(self.n, examples_per_block)

    def _weight_passes(self, stage: KernelStage, channels: int, maps: int) -> tuple[int, int]:
        """Return the number of channels whose weights are in shared memory at the same time.

        The second result is the number of elements that these weights take in shared memory.
        """
        taps = stage.sizes["kernel_h"] * stage.sizes["kernel_w"]
        one = taps * over(maps, MAPS_PER_THREAD) * MAPS_PER_THREAD
        channels_per_pass = min(channels, max(1, WEIGHTS_AT_A_TIME // (one * self.dtype.itemsize)))
        return channels_per_pass, channels_per_pass * one
