"""From the plan to a sequence of kernel launches, and the arrays they work on. Knows no device.

A `Program` is all that a training step, or a batch's evaluation, asks of a GPU: which arrays there
have to be, and which kernels of ``kernels.cu`` are launched on them, one after the other. Nothing
in it changes from step to step: where the batch begins, and the learning rate, are found by a
counter in the GPU's memory. So the same sequence can be run again and again, or captured in a
graph.

Programs for several batch sizes, and for evaluation, share arrays: those of the same name are the
same array, as large as the largest of them asks for.

What the host does: it writes images and labels once, parameters and moving averages at
first, ``order`` and ``rates`` once an epoch, and 0 to ``step``; after the epoch it reads ``losses``
and ``hits``, one of each a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npbn.engine.plan import Block, ConvBlock, LinearBlock, parameters_of
from npbn.errors import UnsupportedError
from npbn.layers import MaxPool2d, ReLU, Sigmoid

SOURCE = Path(__file__).with_name("kernels.cu")

# As in kernels.cu.
THREADS, SIDE, DEPTH = 256, 16, 32
ACTIVATIONS = {type(None): 0, Sigmoid: 1, ReLU: 2}
SHAPE_FIELDS = (
    *("channels", "height", "width", "maps", "rows", "columns"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
    *("window_h", "window_w", "maximum", "activation"),
)
SHAPE = np.dtype([(name, np.int32) for name in SHAPE_FIELDS])
TENSOR_FIELDS = ("offset", "size", "partial_offset", "partials", "decays")

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200: so many blocks at least should be under way."""

BLOCKS_OF_A_PROCESSOR = 4
"""How many blocks of threads that share out an array's numbers there are for each processor."""

MOST_BLOCKS = 65_535
"""In a grid's second and third axis, in CUDA."""

LONG = 256
"""How many terms of a sum are worth a block of their own."""


class Pointer(NamedTuple):
    """The address of a number in an array of a program."""

    array: str
    offset: int = 0


NULL = None
Argument = Pointer | np.generic | None


@dataclass(frozen=True)
class ArraySpec:
    """An array on the device.

    Attributes:
        value: what is in it at first; None: anything.
    """

    shape: tuple[int, ...]
    dtype: Any
    value: Any = None

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Launch:
    """A kernel, by its C++ name with its template arguments, in a grid of blocks of `THREADS`.

    Attributes:
        shared: bytes of shared memory of a block.
        arguments: in the kernel's order; NumPy scalars have the C++ type's size.
    """

    kernel: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """What a training step, or the evaluation of a batch, asks of a device.

    Attributes:
        arrays: by name.
        launches: in their order.
    """

    arrays: dict[str, ArraySpec]
    launches: tuple[Launch, ...]


def parameter_offsets(blocks: Sequence[Block]) -> dict[str, tuple[int, Any]]:
    """Each parameter, "0.weight" say: where it begins in the arrays that hold all; and itself."""
    found: dict[str, tuple[int, Any]] = {}
    end = 0
    for i, block in enumerate(blocks):
        for name, owner, attribute in parameters_of(block):
            if attribute == "data":
                found[f"{i}.{name}"] = end, owner
                end += owner.data.size
    return found


def training(
    blocks: Sequence[Block],
    n: int,
    *,
    examples: int,
    data: str = "train",
    stride: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay_all: bool = False,
    fixed: bool = False,
    processors: int = PROCESSORS,
) -> Program:
    """A step of the optimizer on n examples.

    Args:
        blocks: the plan.
        examples: of the data set, in the arrays ``{data}.images`` and ``{data}.labels``.
        data: a name for it.
        stride: from one step's examples in ``order`` to those of the next; n unless given.
        momentum, weight_decay, decay_all: as `npbn.optim.SGD` has them.
        fixed: whether kernels are compiled for the sizes of this model.
        processors: for how many the work is divided. The order of sums depends on it, so results
            do, in their last bits.
    """
    writer = _Writer(blocks, n, examples, data, fixed, processors)
    return writer.training(n if stride is None else stride, momentum, weight_decay, decay_all)


def evaluation(
    blocks: Sequence[Block],
    n: int,
    *,
    examples: int,
    data: str = "test",
    stride: int | None = None,
    fixed: bool = False,
    processors: int = PROCESSORS,
) -> Program:
    """Loss and hits in prediction mode on n examples of the data set, from step · stride on."""
    writer = _Writer(blocks, n, examples, data, fixed, processors)
    return writer.evaluation(n if stride is None else stride)


def largest(programs: Iterable[Program]) -> dict[str, ArraySpec]:
    """The arrays of all programs, each as large as any of them wants it."""
    found: dict[str, ArraySpec] = {}
    for program in programs:
        for name, spec in program.arrays.items():
            if name not in found or spec.nbytes > found[name].nbytes:
                found[name] = spec
    return found


def shape_of(block: Block) -> np.void:
    """The sizes of a block, as the kernels' ``Shape``; a linear layer's image has one pixel."""
    layer = block.layer
    if isinstance(block, ConvBlock):
        kernel = *layer.kernel_size, *layer.stride, *layer.padding
        sizes = *block.shape, *block.maps, *kernel, *block.window
    else:
        assert isinstance(block, LinearBlock)
        in_features, out_features = block.features
        sizes = in_features, 1, 1, out_features, 1, 1, *(1, 1), *(1, 1), *(0, 0), *(1, 1)
    maximum = isinstance(block, ConvBlock) and type(block.pool) is MaxPool2d
    shape: np.void = np.void((*sizes, maximum, ACTIVATIONS[type(block.activation)]), SHAPE)
    return shape


class _Block:
    """A block of the plan with the names of its arrays.

    Attributes:
        x, output: what goes in and comes out; y: what the affine map gives, the output itself
            where nothing follows.
        dx, doutput: the gradients by x and by the output; dy: that by y, and before batch norm's
            backward, the gradient by what batch norm gave. It takes doutput's place where nothing
            but the affine map is.
    """

    def __init__(self, block: Block, i: int, n: int) -> None:
        self.block, self.name, self.s = block, str(i), shape_of(block)
        s = {name: int(self.s[name]) for name in SHAPE_FIELDS}
        self.channels, self.maps = s["channels"], s["maps"]
        self.places = self.channels * s["kernel_h"] * s["kernel_w"]
        self.weights = self.maps * self.places
        self.pixels = n * s["height"] * s["width"]
        self.positions = n * s["rows"] * s["columns"]
        self.items = self.positions // (s["window_h"] * s["window_w"])
        self.plain = (
            block.norm is None and block.activation is None and self.items == self.positions
        )
        self.x, self.output = f"x{i}", f"x{i + 1}"
        self.dx, self.doutput = f"dx{i}", f"dx{i + 1}"
        self.y = self.output if self.plain else f"y{i}"
        self.dy = self.doutput if self.plain else f"dy{i}"


class _Writer:
    """Writes down one program."""

    def __init__(
        self,
        blocks: Sequence[Block],
        n: int,
        examples: int,
        data: str,
        fixed: bool,
        processors: int,
    ) -> None:
        self.n, self.examples, self.data = n, examples, data
        self.fixed, self.processors = fixed, processors
        self.blocks = [_Block(block, i, n) for i, block in enumerate(blocks)]
        self.dtype = np.dtype(blocks[0].layer.weight.data.dtype)
        self.real = {"float32": "float", "float64": "double"}[self.dtype.name]
        self.offsets = parameter_offsets(blocks)
        self.arrays: dict[str, ArraySpec] = {}
        self.launches: list[Launch] = []
        self.pixels = self.blocks[0].pixels // n * self.blocks[0].channels
        self.classes = self.blocks[-1].maps
        total = sum(owner.data.size for _, owner in self.offsets.values())
        self._array("parameters", (total,))
        self.partials = 0  # how many numbers of the partial sums' array are taken

    def training(
        self, stride: int, momentum: float, weight_decay: float, decay_all: bool
    ) -> Program:
        self._array("order", (self.examples,), np.int32)
        self._gather(stride, Pointer("order"))
        for b in self.blocks:
            self._forward(b, training=True)
        self._cross_entropy(Pointer(self.blocks[-1].doutput))
        tensors: list[tuple[int, ...]] = []
        for b in reversed(self.blocks):
            tensors += self._backward(b, decay_all)
        self._sgd(tensors, momentum, weight_decay)
        self._array("partials", (self.partials,))
        return self._program()

    def evaluation(self, stride: int) -> Program:
        self._gather(stride, NULL)
        for b in self.blocks:
            self._forward(b, training=False)
        self._cross_entropy(NULL)
        return self._program()

    # Each part of the program.

    def _gather(self, stride: int, order: Argument) -> None:
        self._array("step", (1,), np.int32, 0)
        images, labels = f"{self.data}.images", f"{self.data}.labels"
        self._array(images, (self.examples, self.pixels), np.uint8)
        self._array(labels, (self.examples,), np.int32)
        self._array(self.blocks[0].x, (self.n, self.pixels))
        self._array("batch_labels", (self.n,), np.int32)
        self._launch(
            f"gather<{self.real}>",
            (_over(self.n * self.pixels, THREADS), 1, 1),
            *map(np.int32, (self.n, self.pixels, stride)),
            *map(Pointer, ("step",)),
            order,
            *map(Pointer, (images, labels, self.blocks[0].x, "batch_labels")),
        )

    def _forward(self, b: _Block, training: bool) -> None:
        norm = b.block.norm
        tall, grid = self._tiles(b.positions, b.maps)
        statistics: Argument = NULL
        if training and norm is not None:
            self._array(f"statistics{b.name}", (2, grid[0], b.maps))
            statistics = Pointer(f"statistics{b.name}")
        self._array(b.y, (b.positions * b.maps,))
        self._launch(
            self._name("affine", b, tall),
            grid,
            self._shape(b),
            np.int32(self.n),
            Pointer(b.x),
            self._parameter(b, "weight"),
            self._parameter(b, "bias"),
            Pointer(b.y),
            statistics,
            shared=self._tile_bytes(tall),
        )
        if b.plain:
            return
        mean, var, moving_mean, moving_var = self._averages(b, training)
        self._array(b.output, (b.items * b.maps,))
        self._launch(
            self._name("activate", b),
            (self._sharing(b.items, b.maps), b.maps, 1),
            self._shape(b),
            np.int32(self.n),
            Pointer(b.y),
            *self._normalization(b),
            statistics,
            np.int32(grid[0]),
            np.int32(tall * SIDE),
            self._real(0.0 if norm is None else norm.momentum),
            mean,
            var,
            moving_mean,
            moving_var,
            Pointer(b.output),
        )

    def _cross_entropy(self, dlogits: Argument) -> None:
        last = self.blocks[-1]
        if dlogits is not None:
            self._array(last.doutput, (self.n * self.classes,))
        steps = self.examples  # never more, whatever the batch size
        self._array("losses", (steps,))
        self._array("hits", (steps,), np.int32)
        self._launch(
            f"cross_entropy<{self.real}>",
            (1, 1, 1),
            np.int32(self.n),
            np.int32(self.classes),
            Pointer(last.output),
            Pointer("batch_labels"),
            dlogits,
            *map(Pointer, ("step", "losses", "hits")),
        )

    def _backward(self, b: _Block, decay_all: bool) -> Iterator[tuple[int, ...]]:
        """The block's tensors, for `_sgd`."""
        norm = b.block.norm
        mean, var, _, _ = self._averages(b, training=True)
        sharing = self._sharing(b.items, b.maps)
        sums = self._partial_sums(2 * sharing * b.maps)
        self._array(b.dy, (b.positions * b.maps,))
        self._launch(
            self._name("activate_backward", b),
            (sharing, b.maps, 1),
            self._shape(b),
            np.int32(self.n),
            Pointer(b.y),
            Pointer(b.doutput),
            *self._normalization(b),
            mean,
            var,
            Pointer(b.dy),
            sums,
        )
        if norm is not None:
            self._launch(
                self._name("batch_norm_backward", b),
                (self._sharing(b.positions, b.maps), b.maps, 1),
                self._shape(b),
                np.int32(self.n),
                Pointer(b.y),
                self._parameter(b, "gamma"),
                self._real(norm.eps),
                mean,
                var,
                sums,
                np.int32(sharing),
                Pointer(b.dy),
                self._parameter(b, "gamma", "gradients"),
                self._parameter(b, "beta", "gradients"),
            )
        parts, partials = self._backward_weight(b)
        if b.name != "0":  # nobody asks for the gradient by the images
            self._backward_input(b)
        for name, owner, attribute in parameters_of(b.block):
            if attribute != "data":
                continue
            offset, _ = self.offsets[f"{b.name}.{name}"]
            place, count = 0, 0  # the gradient is there, from batch_norm_backward
            if name == "weight":
                place, count = partials.offset, parts
            elif name == "bias" and norm is None:  # batch norm takes a bias back: its gradient is 0
                place, count = sums.offset, sharing
            yield offset, owner.data.size, place, count, int(decay_all or name == "weight")

    def _backward_weight(self, b: _Block) -> tuple[int, Pointer]:
        """How many partial sums there are of the gradient, and where."""
        most = _over(b.positions, LONG)
        tall, (row_tiles, column_tiles, _) = self._tiles(b.places, b.maps, most)
        parts = min(_over(2 * self.processors, row_tiles * column_tiles), most)
        share = _over(_over(b.positions, parts), DEPTH) * DEPTH
        parts = _over(b.positions, share)
        partials = self._partial_sums(parts * b.weights)
        self._launch(
            self._name("affine_backward_weight", b, tall),
            (row_tiles, column_tiles, parts),
            self._shape(b),
            np.int32(self.n),
            np.int32(share),
            Pointer(b.x),
            Pointer(b.dy),
            partials,
            shared=self._tile_bytes(tall),
        )
        return parts, partials

    def _backward_input(self, b: _Block) -> None:
        tall, grid = self._tiles(b.pixels, b.channels)
        self._array(b.dx, (b.pixels * b.channels,))
        self._launch(
            self._name("affine_backward_input", b, tall),
            grid,
            self._shape(b),
            np.int32(self.n),
            Pointer(b.dy),
            self._parameter(b, "weight"),
            Pointer(b.dx),
            shared=self._tile_bytes(tall),
        )

    def _sgd(self, tensors: list[tuple[int, ...]], momentum: float, weight_decay: float) -> None:
        for name in ("gradients", "velocities"):
            self._array(name, self.arrays["parameters"].shape, value=0)
        table = np.array(tensors, np.int32)
        name = f"tensors{self.n}"  # the partial sums of other batch sizes are elsewhere
        self._array(name, table.shape, np.int32, table)
        self._array("rates", (self.examples,))
        largest = max(size for _, size, *_ in tensors)
        self._launch(
            f"sgd<{self.real}>",
            (self._sharing(largest, len(tensors)), len(tensors), 1),
            *map(Pointer, (name, "partials", "step", "rates")),
            self._real(momentum),
            self._real(weight_decay),
            *map(Pointer, ("parameters", "gradients", "velocities")),
        )

    # What they are made of.

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
        return Program(self.arrays, tuple(self.launches))

    def _array(
        self, name: str, shape: tuple[int, ...], dtype: Any = None, value: Any = None
    ) -> None:
        self.arrays[name] = ArraySpec(shape, self.dtype if dtype is None else dtype, value)

    def _launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        *arguments: Argument,
        shared: int | None = None,
    ) -> None:
        if shared is None:
            shared = THREADS * self.dtype.itemsize  # a number a thread, for block_sum
        self.launches.append(Launch(kernel, grid, shared, arguments))

    def _name(self, kernel: str, b: _Block, tall: int | None = None) -> str:
        """The C++ name of a kernel that works on a block."""
        sizes = ", ".join(str(b.s[name]) for name in SHAPE_FIELDS)
        arguments = [self.real] + ([] if tall is None else [str(tall)])
        return f"{kernel}<{', '.join([*arguments, f'Fixed<{sizes}>' if self.fixed else 'Shape'])}>"

    def _shape(self, b: _Block) -> np.generic:
        return np.uint8(0) if self.fixed else b.s  # an empty class takes one byte

    def _real(self, value: float) -> np.generic:
        number: np.generic = self.dtype.type(value)
        return number

    def _parameter(self, b: _Block, name: str, array: str = "parameters") -> Argument:
        found = self.offsets.get(f"{b.name}.{name}")
        return NULL if found is None else Pointer(array, found[0])

    def _normalization(self, b: _Block) -> tuple[Argument, Argument, np.generic]:
        """γ, β and ε; null, null and anything without batch norm."""
        eps = self._real(0.0 if b.block.norm is None else b.block.norm.eps)
        return self._parameter(b, "gamma"), self._parameter(b, "beta"), eps

    def _averages(self, b: _Block, training: bool) -> tuple[Argument, ...]:
        """Mean and variance to normalize with, and the moving averages to be moved."""
        if b.block.norm is None:
            return NULL, NULL, NULL, NULL
        names = [f"{b.name}.moving_mean", f"{b.name}.moving_var"]
        if training:
            names = [f"mean{b.name}", f"var{b.name}", *names]
        for name in names:
            self._array(name, (b.maps,))
        found = tuple(map(Pointer, names))
        return found if training else (*found, NULL, NULL)

    def _partial_sums(self, count: int) -> Pointer:
        """Room for so many."""
        self.partials += count
        return Pointer("partials", self.partials - count)

    def _sharing(self, numbers: int, channels: int) -> int:
        """How many blocks share the numbers of a channel: no more than have something to do."""
        most = _over(BLOCKS_OF_A_PROCESSOR * self.processors, channels)
        return min(_over(numbers, THREADS), most)

    def _tiles(self, rows: int, columns: int, parts: int = 1) -> tuple[int, tuple[int, int, int]]:
        """M of a product's tiles, M·SIDE rows high, and the grid of tiles.

        Higher tiles read their numbers less often, but leave processors idle if they are few.
        """
        across = _over(columns, SIDE)
        tall = 4 if _over(rows, 4 * SIDE) * across * parts >= self.processors else 1
        return tall, (_over(rows, tall * SIDE), across, 1)

    def _tile_bytes(self, tall: int) -> int:
        """Of the two strips that `tile_of_product` has in shared memory."""
        return int(DEPTH * ((tall * SIDE + 1) + (SIDE + 1)) * self.dtype.itemsize)


def _over(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)
