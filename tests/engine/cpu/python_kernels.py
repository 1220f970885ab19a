"""The source of the fused engine's kernels, run by plain Python: without Numba, and watched.

`load` executes the modules of `npbn.engine.cpu` again, in the order in which they import each
other, with stand-ins for Numba and for `npbn.engine.cpu.vector`. A vector is a row of NumPy's. What
compiled code does silently is an error here:

- An index that is negative, or outside every region that `network.build` hands out. Between two
  regions lie vectors that belong to none.
- Two threads of a launch that write to one place, or one that reads what the other writes.
- A vector of another dtype than the array that it is written to.

What the engine has not written, nor `network.build` promised to be zero, is NaN at first, so a
result that depends on it is NaN. Promised are the zeros around an image, and nothing else.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import NUMPY

import npbn.engine
from npbn.engine.layers import LayersEngine
from npbn.optim import SGD

FOLDER = Path(npbn.engine.__file__).parent / "cpu"
MODULES = ("products", "normalization", "launches", "network", "sharing", "engine")
BYTES = 64
GAP = 3
"""Vectors between two regions."""

Edit = tuple[str, str, str]
"""A module, a text that occurs once in its source, and what takes its place."""

# Few parts and few taps at a time: so a part of a tiny model, too, is more than one chunk, and a
# layer has more than one block of taps.
SMALL_CONSTANTS: tuple[Edit, ...] = (
    ("launches", "MOST_PARTS = 32", "MOST_PARTS = 3"),
    ("products", "TAPS_AT_A_TIME = 30", "TAPS_AT_A_TIME = 12"),
)


class Checked:
    """A flat array that refuses indices outside its regions; in a launch, keeps who used what."""

    def __init__(self, array: np.ndarray, regions: Sequence[tuple[int, int]] | None = None) -> None:
        self.array, self.dtype, self.itemsize = array, array.dtype, array.dtype.itemsize
        self.size, self.lanes = array.size, BYTES // self.itemsize
        is_open = np.zeros(array.size, bool)
        for start, count in [(0, array.size)] if regions is None else regions:
            is_open[start : start + count] = True
        self.is_open = is_open.tolist()
        if regions is not None:
            self.rows = array.reshape(-1, self.lanes)
            self.is_open_row = is_open.reshape(-1, self.lanes).all(1).tolist()
        self.launch: dict[int, tuple[set, ...]] = {}
        self.between_launches()

    def between_launches(self) -> None:
        """Keep no account: there is one thread."""
        self.reads, self.writes, self.row_reads, self.row_writes = set(), set(), set(), set()

    def run_by(self, thread: int) -> None:
        self.between_launches()
        self.launch[thread] = self.reads, self.writes, self.row_reads, self.row_writes

    def end_launch(self) -> None:
        """Raise an error if the threads' order could matter."""
        written, read = (np.zeros(self.size, np.int64) for _ in range(2))
        uses = []
        for reads, writes, row_reads, row_writes in self.launch.values():
            own = []
            for numbers, rows in ((writes, row_writes), (reads, row_reads)):
                used = np.zeros(self.size, bool)
                used[list(numbers)] = True
                used.reshape(-1, self.lanes)[list(rows)] = True
                own.append(used)
            uses.append(own)
            written += own[0]
            read += own[1]
        for own_written, own_read in uses:
            if (own_written & (written > 1)).any() or (own_written & (read - own_read > 0)).any():
                raise RuntimeError("two threads use one place, and one of them writes to it")
        self.launch.clear()
        self.between_launches()

    def check(self, index: int) -> None:
        if index < 0 or not self.is_open[index]:
            raise IndexError(f"{index} is in no region")

    def check_row(self, index: int) -> None:
        if index < 0 or not self.is_open_row[index]:
            raise IndexError(f"vector {index} is in no region")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.check(index)
        self.reads.add(index)
        return self.array[index]

    def __setitem__(self, index: int | slice, value: Any) -> None:
        if isinstance(index, slice):
            for i in range(index.start, index.stop):
                self[i] = value
            return
        self.check(index)
        self.writes.add(index)
        self.array[index] = value


class Table:
    """An array of two dimensions with the same checks."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, tuple):
            return Checked(self.array[self.check((index, 0))[0]])
        return self.array[self.check(index)]

    def __setitem__(self, index: tuple[int, int], value: float) -> None:
        self.array[self.check(index)] = value

    def check(self, index: tuple[int, int]) -> tuple[int, int]:
        if min(index) < 0:
            raise IndexError(f"{index} is negative")
        return index


# In place of npbn.engine.cpu.vector.


def load_vector(values: Checked, index: int) -> np.ndarray:
    values.check_row(index)
    values.row_reads.add(index)
    return values.rows[index].copy()


def store(values: Checked, index: int, vector: np.ndarray) -> None:
    values.check_row(index)
    values.row_writes.add(index)
    if vector.dtype != values.dtype or vector.shape != (values.lanes,):
        raise TypeError(f"expected a vector of {values.dtype}, got {vector.dtype}, {vector.shape}")
    values.rows[index] = vector


def put(array: Checked, index: int, value: Any) -> None:
    array[index] = value


def total(vector: np.ndarray) -> Any:
    while len(vector) > 1:
        vector = vector[: len(vector) // 2] + vector[len(vector) // 2 :]
    return vector[0]


def power_of_two(shifted: np.ndarray) -> np.ndarray:
    bits, mantissa = {4: (32, 23), 8: (64, 52)}[shifted.itemsize]
    integers = shifted.view(f"i{bits // 8}")
    one = ((1 << (bits - mantissa - 2)) - 1) << mantissa
    return ((integers << mantissa) + integers.dtype.type(one)).view(shifted.dtype)


VECTOR = types.SimpleNamespace(
    BYTES=BYTES,
    load=load_vector,
    store=store,
    at=lambda array, index: array[index],
    put=put,
    full=lambda values, value: np.full(values.lanes, value, values.dtype),
    total=total,
    fma=lambda a, b, c: a * b + c,
    where_greater=lambda a, b, x, y: np.where(a > b, x, y),
    where_equal=lambda a, b, x, y: np.where(a == b, x, y),
    power_of_two=power_of_two,
)


# In place of Numba.


def njit(function: Any = None, **_: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


def overload(target: Callable[..., Any], **_: Any) -> Any:
    def decorate(choose: Callable[..., Any]) -> Callable[..., Any]:
        target.__globals__[target.__name__] = lambda x: choose(x)(x)
        return choose

    return decorate


class Kernels:
    """The engine's modules in plain Python, and `CpuEngine`, the engine that runs by them."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.memories: dict[int, Checked] = {}
        self.memory: Checked | None = None
        self.regions: list[tuple[int, int]] = []
        self.modules: dict[str, types.ModuleType] = {}
        self.imports = {
            "numba": types.SimpleNamespace(
                njit=njit,
                prange=self.prange,
                types=types.SimpleNamespace(
                    float32=np.dtype("float32"), float64=np.dtype("float64")
                ),
                config=types.SimpleNamespace(NUMBA_NUM_THREADS=4, THREADING_LAYER="omp"),
                threading_layer=lambda: "omp",
                get_num_threads=lambda: 4,
                set_num_threads=lambda threads: None,
            ),
            "numba.extending": types.SimpleNamespace(overload=overload),
            "npbn.engine.cpu": types.SimpleNamespace(vector=VECTOR),
            "npbn.engine.cpu.vector": VECTOR,
            "npbn.engine.cpu.compilation": types.SimpleNamespace(
                LOCK=contextlib.nullcontext(), compile_kernels=lambda arguments, report: None
            ),
        }
        for name in MODULES:
            self.add(name, edited(name, edits))
        launches, network = self.modules["launches"], self.modules["network"]
        self.execute, launches.execute = launches.execute, self.watched_execute
        self.build, network.build = network.build, self.poisoned_build
        network._Sizes = self.sizes(network._Sizes)
        self.CpuEngine = self.modules["engine"].CpuEngine

    def add(self, name: str, source: str) -> None:
        module = types.ModuleType(f"npbn.engine.cpu.{name}")
        module.__builtins__ = vars(builtins) | {"__import__": self.import_}
        exec(compiled(name, source), vars(module))
        self.modules[name] = self.imports[f"npbn.engine.cpu.{name}"] = module
        setattr(self.imports["npbn.engine.cpu"], name, module)

    def import_(self, name: str, *arguments: Any) -> Any:
        return self.imports[name] if name in self.imports else __import__(name, *arguments)

    def prange(self, threads: int) -> Iterator[int]:
        """The last thread first: none may need what another one does."""
        for thread in reversed(range(threads)):
            self.memory.run_by(thread)
            yield thread
        self.memory.end_launch()

    def sizes(self, base: type) -> type:
        """Hands out regions that do not touch each other, and notes them."""

        kernels = self

        class Sizes(base):
            def __init__(self, lanes: int) -> None:
                super().__init__(lanes)
                kernels.regions = []

            def vectors(self, count: int) -> int:
                first = super().vectors(count)
                if count:
                    kernels.regions.append((first * self.lanes, count * self.lanes))
                    self.end += GAP
                return first

            def numbers(self, count: int) -> int:
                first = super().numbers(count)
                if count:
                    kernels.regions[-1] = first, count
                return first

        return Sizes

    def poisoned_build(self, *arguments: Any, **options: Any) -> Any:
        net = self.build(*arguments, **options)
        before = net.values.copy()
        net.values[...] = np.nan
        net.found[...] = np.nan
        lanes = BYTES // net.values.itemsize
        table = net.stages["table"][0]
        net.values[table : table + 256] = before[table : table + 256]
        regions = dict(self.regions)
        for stage in net.stages:
            start = int(stage["x"]) * lanes
            x = net.values[start : start + regions[start]].reshape(-1, stage["x_size"], lanes)
            row, (top, left) = stage["x_row"], divmod(stage["inside"], stage["x_row"])
            height, width = stage["height"], stage["width"]
            for c in range(stage["channels"]):
                first = c * stage["x_plane"]
                plane = x[:, first : first + (height + 2 * top) * row]
                image = plane.reshape(len(x), height + 2 * top, row, lanes)
                image[...] = 0
                image[:, top : top + height, left : left + width] = np.nan
        self.memories[id(net.values)] = Checked(net.values, self.regions)
        return net

    def watched_execute(self, program, net, images, labels, order, threads) -> tuple[float, int]:
        stages = [
            types.SimpleNamespace(**{name: stage[name].item() for name in net.stages.dtype.names})
            for stage in net.stages
        ]
        self.memory = self.memories[id(net.values)]
        watched = net._replace(
            stages=stages,
            values=self.memory,
            tables=Checked(net.tables),
            tasks=Checked(net.tasks),
            found=Table(net.found),
        )
        data = (Checked(array) for array in (images, labels, order))
        return self.execute(program, watched, *data, threads)


@functools.cache
def compiled(name: str, source: str) -> types.CodeType:
    return compile(source, str(FOLDER / f"{name}.py"), "exec")


def edited(name: str, edits: Sequence[Edit] = ()) -> str:
    """Return a module's source after these edits, those of other modules left out.

    Raises:
        LookupError: a text does not occur exactly once.
    """
    source = (FOLDER / f"{name}.py").read_text()
    for module, text, replacement in edits:
        if module == name:
            if source.count(text) != 1:
                raise LookupError(f"{name}.py has {source.count(text)} times: {text}")
            source = source.replace(text, replacement)
    return source


def load(edits: Sequence[Edit] = SMALL_CONSTANTS) -> Kernels:
    """Return the engine in plain Python, from sources with these edits."""
    return Kernels(edits)


@np.errstate(all="ignore")
def difference(
    engine_class: Any,
    model: Any,
    splits: tuple[Any, Any],
    *,
    batch_size: int,
    threads: int = 2,
    dtype: str = "float64",
    steps: int = 2,
    **options: Any,
) -> float:
    """Return how far training by what is a CpuEngine, and evaluating, is from the layers.

    Compared are losses, numbers of right predictions, gradients (relative to the largest one: what
    batch norm takes back is only rounding), parameters, moving averages and velocities. NaN on one
    side only is an infinite difference.
    """
    options = {"lr": 0.1, "momentum": 0.9} | options
    model = copy.deepcopy(model)
    model.to(NUMPY, dtype)
    expected = copy.deepcopy(model)
    found, right = [], []
    for of, one in ((found, model), (right, expected)):
        optimizer = SGD(one.parameters(), **options)
        if of is found:
            engine = engine_class(one, optimizer, *splits, batch_size=batch_size, threads=threads)
        else:
            engine = LayersEngine(one, optimizer, *splits, batch_size=batch_size, backend=NUMPY)
        order = np.random.default_rng(2).permutation(len(splits[0]))[: steps * batch_size]
        for result in engine.steps(order):
            of.append((float(result.loss), int(result.correct)))
            gradients = [parameter.gradient.ravel() for parameter in one.parameters().values()]
            of.append(np.concatenate([gradient / 1 for gradient in gradients]))
            of += one.state_dict().values()
            of += [optimizer.velocity[name].copy() for name in sorted(optimizer.velocity)]
        results = list(engine.evaluate())
        examples = sum(result.examples for result in results)
        of.append(sum(result.examples * float(result.loss) for result in results) / examples)
        of.append(sum(int(result.correct) for result in results))
    return max(_relative(one, other) for one, other in zip(found, right, strict=True))


def _relative(found: Any, right: Any) -> float:
    found, right = (np.asarray(array, np.float64) for array in (found, right))
    if (np.isfinite(found) != np.isfinite(right)).any():
        return np.inf
    error, size = (np.nan_to_num(np.abs(x), nan=0, posinf=0) for x in (found - right, right))
    return float(error.max(initial=0) / max(1, size.max(initial=0)))
