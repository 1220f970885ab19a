"""From the plan to a sequence of kernel launches, and the arrays they work on. Knows no device.

A `Program` is all that a training step, or an evaluation, asks of a GPU: which arrays there have to
be, and which kernels of ``kernels.cu`` are launched on them, one after the other. A training step's
launches are the same in every step: where the batch begins, and the learning rate, the kernels find
by a counter in the GPU's memory. So the same sequence can be run again and again, or captured in a
graph.

Programs for several batch sizes, and for evaluation, share arrays: those of the same name are the
same array, as large as the largest of them asks for.

What the host does: it writes images and labels once, parameters and moving averages at first,
``order`` and ``rates`` once an epoch, and 0 to ``step``; after the epoch it reads ``train.losses``
and ``train.hits``, a row of each a step, to be added up; after an evaluation, those of ``test``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npbn.engine.plan import Block, ConvBlock, LinearBlock, parameters_of
from npbn.errors import UnsupportedError
from npbn.layers import MaxPool2d, ReLU, Sigmoid

SOURCE = Path(__file__).with_name("kernels.cu")

OPTIONS = ("--std=c++17", "--prec-div=false", "--prec-sqrt=false")
"""Of the compiler: a quotient or root of floats may be two units of rounding off, for speed."""

# As in kernels.cu.
THREADS, SIDE, DEPTH, VECTOR = 256, 16, 128, 4
ROWS, MAPS, TAPS, BANKS, WIDTH = 4, 2, 5, 32, 32
ACTIVATIONS = {type(None): 0, Sigmoid: 1, ReLU: 2}
SHAPE_FIELDS = (
    *("channels", "height", "width", "maps", "rows", "columns"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
    *("window_h", "window_w", "maximum", "activation"),
)
_STATISTICS = ("means", "squares", "mean", "rest", "var", "moving_mean", "moving_var")
STRUCTURES = {
    "Shape": dict.fromkeys(SHAPE_FIELDS, "int"),
    "Batch": dict.fromkeys(("images", "labels", "order", "step"), "pointer") | {"stride": "int"},
    "Norm": dict.fromkeys(("gamma", "beta", *_STATISTICS), "pointer")
    | {"parts": "int", "share": "int", "eps": "real", "momentum": "real"},
    "Sums": {"sums": "pointer", "parts": "int", "dgamma": "pointer", "dbeta": "pointer"},
    "Tensor": dict.fromkeys(("offset", "size", "partial_offset", "partials", "decays"), "int"),
}

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200, among which the work is to be divided."""

BLOCKS_OF_A_PROCESSOR = 4
"""How many blocks of threads there are at most for each processor, where each goes through several
examples: every part of the batch makes the merging of the statistics longer."""

MOST_BLOCKS = 65_535
"""In a grid's second and third axis, in CUDA."""

MOST_SHARED = 227 * 1024
"""Bytes of shared memory that a block can have on an H100 or H200."""

WEIGHTS_AT_A_TIME = 12 * 1024
"""Bytes of a convolution's weights in shared memory, unless a single channel has more."""

EXAMPLES_OF_A_LOSS = 32
"""How many examples' losses a block computes, a thread each: many blocks load more at once."""

LOGITS_AT_A_TIME = 16 * 1024
"""Bytes of logits in shared memory, unless a single example has more."""

LONG = 256
"""How many terms of a sum are worth a block of their own."""


class Pointer(NamedTuple):
    """The address of a number in an array of a program."""

    array: str
    offset: int = 0


NULL = None


@dataclass(frozen=True)
class Structure:
    """A structure of kernels.cu, passed by value.

    Attributes:
        name: of `STRUCTURES`.
        values: by field; what is not there is 0, or null.
    """

    name: str
    values: Mapping[str, Any]


Argument = Pointer | Structure | np.generic | None


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
    """What a training step, or an evaluation, asks of a device.

    Attributes:
        arrays: by name.
        launches: in their order.
        dtype: of the numbers that the kernels call real.
    """

    arrays: dict[str, ArraySpec]
    launches: tuple[Launch, ...]
    dtype: Any

    def value(self, argument: Argument, address: Callable[[Pointer], int]) -> np.ndarray:
        """An argument's bytes as the kernel gets them, in an array without axes."""
        if isinstance(argument, Structure):
            types = {"int": np.int32, "real": self.dtype, "pointer": np.uint64}
            fields = STRUCTURES[argument.name]
            dtype = np.dtype([(name, types[kind]) for name, kind in fields.items()], align=True)
            found = np.zeros((), dtype)
            for name, value in argument.values.items():
                found[name] = self.value(value, address) if fields[name] == "pointer" else value
            return found
        if argument is None:
            return np.array(0, np.uint64)
        if isinstance(argument, Pointer):
            return np.array(address(argument), np.uint64)
        return np.asarray(argument)


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
        examples: of the data set, in the arrays ``train.images`` and ``train.labels``.
        stride: from one step's examples in ``order`` to those of the next; n unless given.
        momentum, weight_decay, decay_all: as `npbn.optim.SGD` has them.
        fixed: whether kernels are compiled for the sizes of this model.
        processors: for how many the work is divided. The order of sums depends on it, so results
            do, in their last bits.
    """
    writer = _Writer(blocks, "train", examples, n if stride is None else stride, fixed, processors)
    return writer.training(n, momentum, weight_decay, decay_all)


def evaluation(
    blocks: Sequence[Block],
    n: int,
    *,
    examples: int,
    fixed: bool = False,
    processors: int = PROCESSORS,
) -> Program:
    """Loss and hits of the data set ``test`` in prediction mode, n examples at a time.

    A batch's row of ``test.losses``, added up, is its mean loss. The last batch may be smaller.
    """
    return _Writer(blocks, "test", examples, n, fixed, processors).evaluation()


def largest(programs: Iterable[Program]) -> dict[str, ArraySpec]:
    """The arrays of all programs, each as large as any of them wants it."""
    found: dict[str, ArraySpec] = {}
    for program in programs:
        for name, spec in program.arrays.items():
            if name not in found or spec.nbytes > found[name].nbytes:
                found[name] = spec
    return found


class _Stage:
    """A block of the plan, or the images, with its sizes as numbers.

    Attributes:
        sizes: as the kernels' ``Shape`` has them.
        linear, norm: whether it is a linear layer; its batch norm.
        values: how many numbers an example's y has.
        inputs, outputs: how many come in, and how many come out after pooling.
        planes, summed: numbers of an example's padded x in shared memory, forward and backward.
        wide: the same of dy, with zeros around and between.
        gradients: of dy as it is.
    """

    def __init__(self, name: str, block: Block | None, sizes: Sequence[int]) -> None:
        self.name, self.block = name, block
        self.linear = isinstance(block, LinearBlock)
        self.norm = None if block is None else block.norm
        self.sizes = s = dict(zip(SHAPE_FIELDS, map(int, sizes), strict=True))
        self.channels, self.maps = s["channels"], s["maps"]
        self.inputs = self.channels * s["height"] * s["width"]
        self.values = self.maps * s["rows"] * s["columns"]
        self.outputs = self.values // (s["window_h"] * s["window_w"])
        self.weights = self.maps * self.channels * s["kernel_h"] * s["kernel_w"]
        down, across = (
            (s[axis], s[f"stride_{side}"], s[f"kernel_{side}"])
            for axis, side in (("rows", "h"), ("columns", "w"))
        )
        self.planes = self.channels * _plane_read(down, across)
        self.summed = self.channels * _plane_summed(down, across)
        self.wide = self.maps * _plane_read(
            (s["height"], 1, s["kernel_h"]), (s["width"], 1, s["kernel_w"])
        )
        self.gradients = _over(self.maps, MAPS) * MAPS * s["rows"] * (s["columns"] | 1)


_Axis = tuple[int, int, int]
"""Outputs, stride and kernel, down or across."""


def _plane_read(down: _Axis, across: _Axis) -> int:
    """The area of ``planes_read``."""
    rows, stride, kernel = down
    columns, stride_w, kernel_w = across
    height = (_over(rows, ROWS) * ROWS - 1) * stride + kernel
    width = (columns - 1) * stride_w + kernel_w
    return height * _raised(width, _over(columns, ROWS), BANKS // ROWS)


def _plane_summed(down: _Axis, across: _Axis) -> int:
    """The area of ``planes_summed``."""
    height, width = ((outputs - 1) * stride + kernel for outputs, stride, kernel in (down, across))
    return _raised(height * (width | 1), down[2] * (width | 1), BANKS)


def _raised(number: int, like: int, divisor: int) -> int:
    """The number, or the next above it that leaves what the other leaves."""
    return number + (like - number) % divisor


def _images(channels: int, height: int, width: int) -> _Stage:
    """A stage with nothing in it."""
    shape = channels, height, width
    return _Stage("images", None, (*shape, *shape, *(1, 1), *(1, 1), *(0, 0), *(1, 1), 0, 0))


def _stage(name: str, block: Block) -> _Stage:
    """A linear layer's images have one pixel."""
    layer, activation = block.layer, ACTIVATIONS[type(block.activation)]
    if isinstance(block, ConvBlock):
        kernel = *layer.kernel_size, *layer.stride, *layer.padding
        maximum = type(block.pool) is MaxPool2d
        return _Stage(
            name, block, (*block.shape, *block.maps, *kernel, *block.window, maximum, activation)
        )
    assert isinstance(block, LinearBlock)
    inputs, outputs = block.features
    kernel = *(1, 1), *(1, 1), *(0, 0)
    return _Stage(name, block, (inputs, 1, 1, outputs, 1, 1, *kernel, *(1, 1), 0, activation))


class _Writer:
    """Writes down one program.

    Attributes:
        n: examples of the batch that is written down.
        steps: batches of the data set.
        shares: of each stage's statistics, examples of a part and parts.
        sums: of each stage, what batch norm's backward asks for.
        partials: how many numbers of the partial sums' array are taken.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        data: str,
        examples: int,
        stride: int,
        fixed: bool,
        processors: int,
    ) -> None:
        self.data, self.examples, self.stride = data, examples, stride
        self.fixed, self.processors = fixed, processors
        self.train = data == "train"
        self.steps = _over(examples, stride)
        self.partials = 0
        self.shares: dict[str, tuple[int, int]] = {}
        self.sums: dict[str, Structure] = {}
        stages = [_stage(str(i), block) for i, block in enumerate(blocks)]
        first, self.last = stages[0], stages[-1]
        images = _images(*(first.sizes[side] for side in ("channels", "height", "width")))
        self.pairs = list(zip([images, *stages[:-1]], stages, strict=True))
        self.dtype = np.dtype(blocks[0].layer.weight.data.dtype)
        self.real = {"float32": "float", "float64": "double"}[self.dtype.name]
        self.offsets = parameter_offsets(blocks)
        self.arrays: dict[str, ArraySpec] = {}
        self.launches: list[Launch] = []
        self._array("parameters", (sum(owner.data.size for _, owner in self.offsets.values()),))
        self._array(f"{data}.images", (examples, first.inputs), np.uint8)
        self._array(f"{data}.labels", (examples,), np.int32)

    def training(self, n: int, momentum: float, weight_decay: float, decay_all: bool) -> Program:
        self.n = n
        order = self._array("order", (self.examples,), np.int32)
        batch = self._batch(order, self._array("step", (1,), np.int32, 0))
        for before, stage in self.pairs:
            self._forward(before, stage, batch)
        self._cross_entropy(batch)
        tensors: list[tuple[int, ...]] = []
        for before, stage in reversed(self.pairs):
            tensors += self._backward(before, stage, decay_all)
        self._array("partials", (self.partials,))
        self._sgd(tensors, momentum, weight_decay)
        return self._program()

    def evaluation(self) -> Program:
        counting = np.arange(self.steps, dtype=np.int32)
        numbers = self._array("steps", counting.shape, np.int32, counting)
        for step in range(self.steps):
            self.n = min(self.stride, self.examples - step * self.stride)
            batch = self._batch(NULL, Pointer(numbers.array, step))
            for before, stage in self.pairs:
                self._forward(before, stage, batch)
            self._cross_entropy(batch)
        return self._program()

    # Each part of the program.

    def _forward(self, before: _Stage, stage: _Stage, batch: Structure) -> None:
        name = stage.name
        across = _over(stage.maps, SIDE) if stage.linear else 1
        share, parts = self._shared_out(across, SIDE if stage.linear else 1)
        x = means = squares = NULL
        if self.train:
            x = self._array(f"x{name}", (self.n * stage.inputs,))
            if stage.norm is not None:
                means = self._array(f"means{name}", (stage.maps * parts,), np.float64)
                squares = self._array(f"squares{name}", (stage.maps * parts,))
                self.shares[name] = share, parts
        sizes, memory = [np.int32(self.n), np.int32(share)], [*_normalization(before)]
        if stage.linear:
            memory += _TILE
        else:
            strip, weights = self._strip(stage, stage.channels, stage.maps)
            sizes.append(np.int32(strip))
            memory += [stage.planes, stage.values, weights]
        self._launch(
            "linear_forward" if stage.linear else "conv_forward",
            (before, stage),
            (parts, across, 1),
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
        share = min(EXAMPLES_OF_A_LOSS, max(1, most))
        parts = _over(self.stride, share)  # whatever n: so long is a row of losses
        rows = self.steps, parts * THREADS // SIDE
        dz = self._array(f"dz{last.name}", (self.n * last.values,)) if self.train else NULL
        self._launch(
            "cross_entropy",
            (last,),
            (parts, 1, 1),
            [*_normalization(last), share * last.outputs],
            np.int32(self.n),
            np.int32(share),
            batch,
            self._norm(last, merging=True),
            self._sums_of(last, parts),
            self._output(last),
            dz,
            self._array(f"{self.data}.losses", rows),
            self._array(f"{self.data}.hits", rows, np.int32),
        )

    def _backward(
        self, before: _Stage, stage: _Stage, decay_all: bool
    ) -> Iterator[tuple[int, ...]]:
        """Writes the stage's backward down when iterated over; its tensors, for `_sgd`."""
        assert stage.block is not None
        name, first = stage.name, before.block is None  # nobody asks for the gradient by the images
        bias = stage.norm is None and self._parameter(stage, "bias") is not NULL
        across = _over(stage.inputs, SIDE) if stage.linear else 1
        share, parts = self._shared_out(across, SIDE if stage.linear else 1)
        sizes: list[np.generic] = []
        memory = [*_normalization(stage), stage.maps, stage.maps]
        if stage.linear:
            tiles = _over(stage.inputs + bias, SIDE) * _over(stage.maps, SIDE)
            weight_parts = min(_over(2 * self.processors, tiles), _over(self.n, LONG))
            memory += [*_normalization(before), *_TILE]
        else:
            tiles, weight_parts = 1, 2 * self.processors
            strip, weights = self._strip(stage, stage.maps, stage.channels)
            sizes.append(np.int32(strip))
            memory += max(
                [] if first else [*_normalization(before), stage.wide, stage.inputs, weights],
                [stage.summed + TAPS, stage.gradients, MAPS * TAPS * THREADS],
                key=self._bytes,
            )
        weight_share = _over(self.n, weight_parts)
        weight_parts = _over(self.n, weight_share)
        input_blocks = 0 if first else across * parts
        dw = self._partial_sums(weight_parts * stage.weights)
        db = self._partial_sums(weight_parts * stage.maps) if bias else NULL
        self._launch(
            "linear_backward" if stage.linear else "conv_backward",
            (before, stage),
            (input_blocks + tiles * weight_parts, 1, 1),
            memory,
            *map(np.int32, (self.n, input_blocks, share, weight_share)),
            *sizes,
            self._norm(stage),
            self.sums[name],
            self._norm(before),
            self._sums_of(before, parts * (before.outputs // before.maps if stage.linear else 1)),
            self._output(before),
            self._parameter(stage, "weight"),
            *(Pointer(f"{array}{name}") for array in ("x", "y", "dz")),
            NULL if first else self._array(f"dz{before.name}", (self.n * before.values,)),
            dw,
            db,
            Pointer("step") if first else NULL,
        )
        for parameter, owner, attribute in parameters_of(stage.block):
            if attribute != "data":
                continue
            offset, _ = self.offsets[f"{name}.{parameter}"]
            place, count = 0, 0  # the gradient is there; a bias's before batch norm stays 0
            if parameter == "weight":
                place, count = dw.offset, weight_parts
            elif parameter == "bias" and db is not NULL:
                place, count = db.offset, weight_parts
            yield offset, owner.data.size, place, count, int(decay_all or parameter == "weight")

    def _sgd(self, tensors: list[tuple[int, ...]], momentum: float, weight_decay: float) -> None:
        shape = self.arrays["parameters"].shape
        table = np.array(sorted(tensors), np.int32)
        self._launch(
            "sgd",
            (),
            (_over(shape[0], WIDTH), 1, 1),
            [],
            # The partial sums of other batch sizes are elsewhere.
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
        stages: Sequence[_Stage],
        grid: tuple[int, int, int],
        memory: Sequence[int],
        *arguments: Argument,
    ) -> None:
        """Of a kernel that is compiled for these stages, and takes their shapes first.

        ``memory``: how many numbers each piece has that it takes of the shared memory.
        """
        shapes = [", ".join(map(str, stage.sizes.values())) for stage in stages]
        types = [f"Fixed<{sizes}>" if self.fixed else "Shape" for sizes in shapes]
        # An empty class takes one byte.
        values = [np.uint8(0) if self.fixed else Structure("Shape", s.sizes) for s in stages]
        name = f"{kernel}<{', '.join([self.real, *types])}>"
        shared = 2 * THREADS * 8 + self._bytes(memory)
        self.launches.append(Launch(name, grid, shared, (*values, *arguments)))

    def _bytes(self, memory: Iterable[int]) -> int:
        """Of these pieces of shared memory, each of whole vectors."""
        return sum(_over(count, VECTOR) * VECTOR * self.dtype.itemsize for count in memory)

    def _real(self, value: float) -> np.generic:
        number: np.generic = self.dtype.type(value)
        return number

    def _parameter(self, stage: _Stage, name: str, array: str = "parameters") -> Pointer | None:
        found = self.offsets.get(f"{stage.name}.{name}")
        return NULL if found is None else Pointer(array, found[0])

    def _output(self, stage: _Stage) -> Pointer | None:
        """What its affine map gives; null for the images."""
        return NULL if stage.block is None else Pointer(f"y{stage.name}")

    def _batch(self, order: Pointer | None, step: Pointer) -> Structure:
        images, labels = Pointer(f"{self.data}.images"), Pointer(f"{self.data}.labels")
        values = {"images": images, "labels": labels, "order": order, "step": step}
        return Structure("Batch", values | {"stride": self.stride})

    def _norm(self, stage: _Stage, merging: bool = False) -> Structure:
        """Batch norm of a stage; whether the kernel is to merge its statistics, in training."""
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
            share, parts = self.shares[name]
            values |= {"share": share, "parts": parts}
            values |= {kind: Pointer(f"{kind}{name}") for kind in ("means", "squares")}
        return Structure("Norm", values)

    def _sums_of(self, stage: _Stage, parts: int) -> Structure:
        """Room for those of a stage's batch norm, which its backward will ask for."""
        found = Structure("Sums", {})
        if self.train and stage.norm is not None:
            values = {
                "sums": self._array(f"sums{stage.name}", (2 * stage.maps * parts,)),
                "parts": parts,
                "dgamma": self._parameter(stage, "gamma", "gradients"),
                "dbeta": self._parameter(stage, "beta", "gradients"),
            }
            found = Structure("Sums", values)
        self.sums[stage.name] = found
        return found

    def _partial_sums(self, count: int) -> Pointer:
        """Room for so many."""
        self.partials += count
        return Pointer("partials", self.partials - count)

    def _shared_out(self, across: int, unit: int) -> tuple[int, int]:
        """Examples of a part, in whole units, and how many parts: few enough for the GPU."""
        most = max(1, BLOCKS_OF_A_PROCESSOR * self.processors // across)
        share = _over(_over(self.n, unit), most) * unit
        return share, _over(self.n, share)

    def _strip(self, stage: _Stage, channels: int, maps: int) -> tuple[int, int]:
        """How many channels' weights are in shared memory together, and how many numbers."""
        taps = stage.sizes["kernel_h"] * stage.sizes["kernel_w"]
        one = taps * _over(maps, MAPS) * MAPS
        strip = min(channels, max(1, WEIGHTS_AT_A_TIME // (one * self.dtype.itemsize)))
        return strip, strip * one


_TILE = (2 * SIDE * (DEPTH + VECTOR),)
"""The two strips of ``tile_of_product``."""


def _normalization(stage: _Stage) -> tuple[int, ...]:
    """What ``normalization`` takes of the shared memory."""
    return (stage.maps,) * 4


def _over(number: int, by: int) -> int:
    """The quotient, rounded up."""
    return -(-number // by)
