"""From the plan to the arrays that the kernels work on.

All of a kind lie in one array, a stage's part from an offset on that the stage's record says; so
kernels are compiled once, for every model. Activations are rows of vectors (`npbn.engine.cpu.vector`):
(chunks, maps, rows · columns), and in a vector the examples of the chunk. A map's plane has an odd
number of vectors, because planes whose sizes are multiples of 4,096 bytes would all want the same
places of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from npbn.engine.cpu import launches, normalization
from npbn.engine.cpu.products import SIX
from npbn.engine.cpu.vector import BYTES
from npbn.engine.plan import StagePlan
from npbn.layers import MaxPool2d, Parameter, ReLU, Sigmoid

Array = Any
ACTIVATIONS = {
    type(None): normalization.NO_ACTIVATION,
    Sigmoid: normalization.SIGMOID,
    ReLU: normalization.RELU,
}
_INTEGERS = [
    "x",
    "x_size",
    "x_plane",
    "x_row",
    "inside",
    "channels",
    "height",
    "width",
    "linear",
    "taps",
    "first_tap",
    "padded_taps",
    "first_site",
    "maps",
    "rows",
    "columns",
    "y",
    "z",
    "y_size",
    "y_plane",
    "packed",
    "transposed",
    "partials",
    "partials_size",
    "weight",
    "bias",
    "gamma",
    "beta",
    "gradient",
    "velocity",
    "moving",
    "settings",
    "norm",
    "constants",
    "found",
    "activation",
    "maximum",
    "window_h",
    "window_w",
    "dx",
    "dx_size",
    "masks",
    "table",
]
STAGE = np.dtype(
    [*((n, np.int64) for n in _INTEGERS), ("eps", np.float64), ("momentum", np.float64)]
)
"""What the kernels know of a stage. Where something lies is counted in vectors for x, y, z, dx and
masks, in numbers for the rest.

- Its input: ``x``, of a chunk ``x_size`` vectors, of a channel ``x_plane``, of a row ``x_row``, with
  the zeros of padding; ``inside``: where in a plane the image begins. ``channels``, ``height``,
  ``width``: of the image.
- Its layer: ``taps`` numbers are seen by an output, the first at tables[``first_tap``] from the
  site; by whole sixes ``padded_taps``. ``down``, ``right``: from a site to the next row, the next
  column. ``maps``, ``rows``, ``columns``: of the output.
- Its output ``y``, of a chunk ``y_size`` vectors, of a map ``y_plane``; ``z`` likewise: a = σ(…) after
  forward, then its gradient dz, then dy.
- ``packed``, ``transposed``: its weights as `npbn.engine.cpu.products` reads them; ``partials``: dW of
  each part of the batch, ``partials_size`` numbers.
- Its parameters; ``bias`` is -1 without one. ``gradient``, ``velocity``: from a parameter to those.
  ``moving``: means of all maps, then variances. ``settings``: rate, momentum, decay of weights, of others.
- ``norm``, ``activation``, ``maximum``, ``window_h``, ``window_w``, ``eps``, ``momentum``: what follows
  the layer; ``constants`` and ``found`` as in `npbn.engine.cpu.normalization`.
- The same in all: ``dx``, memory of a thread; ``masks``, two vectors, 1 for each example of a whole
  chunk, and of the last; ``table``, what a pixel's byte is as a number.
"""


class Net(NamedTuple):
    """Everything that a kernel is given.

    Attributes:
        stages: a record of STAGE each, and one more whose x are the logits.
        values: all numbers of the dtype.
        tables: taps of all stages.
        tasks: stage and first map of every six maps.
        found: what chunks found, a column each, in float64.
    """

    stages: Array
    values: Array
    tables: Array
    tasks: Array
    found: Array


class _Sizes:
    """Hands out the places of ``values``, each at the beginning of a vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.end = lanes, 0

    def vectors(self, count: int) -> int:
        self.end += count
        return self.end - count

    def numbers(self, count: int) -> int:
        return self.vectors(-(-count // self.lanes)) * self.lanes


def build(plan: Sequence[StagePlan], dtype: Any, *, batch: int, test: int, threads: int) -> Net:
    """The arrays for batches of up to so many examples, and evaluations of ``test`` at a time."""
    dtype = np.dtype(dtype)
    lanes = BYTES // dtype.itemsize
    chunks = -(-batch // lanes)
    parts = -(-chunks // -(-chunks // launches.MOST_PARTS))
    slots = max(chunks, threads)
    sizes = _Sizes(lanes)

    stages = np.zeros(len(plan) + 1, STAGE)
    tables: list[int] = []
    tasks: list[int] = []
    shape, found = plan[0].shape, 0
    for i, (stage, record) in enumerate(zip(plan, stages, strict=False)):
        if not stage.linear:
            shape = stage.shape
        (channels, height, width), (pad_h, pad_w) = shape, stage.padding
        kernel = shape[1:] if stage.linear else stage.kernel
        row = width + 2 * pad_w
        plane = (height + 2 * pad_h) * row | 1
        record["channels"], record["height"], record["width"] = shape
        record["x_plane"], record["x_row"], record["inside"] = plane, row, pad_h * row + pad_w
        record["x_size"] = channels * plane | 1

        places = [
            c * plane + i * row + j
            for c in range(channels)
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]
        count = len(places)
        padded = -(-count // SIX) * SIX
        record["linear"], record["taps"] = stage.linear, count
        record["first_tap"], record["padded_taps"] = len(tables), padded
        # A last six that is not full repeats its first tap.
        tables += places + [places[(count - 1) // SIX * SIX]] * (padded - count)

        maps, rows, columns = record["maps"], record["rows"], record["columns"] = stage.maps
        sixes = -(-maps // SIX) * SIX
        record["y_plane"] = rows * columns | 1
        record["y_size"] = sixes * record["y_plane"] | 1
        record["first_site"] = len(tables)
        if stage.linear:  # one in a chunk: the chunks
            sites = [(m * record["x_size"], m * record["y_size"]) for m in range(chunks)]
        else:
            down, right = stage.stride[0] * row, stage.stride[1]
            sites = [(p * down + q * right, p * columns + q) for p, q in np.ndindex(rows, columns)]
        tables += [number for site in sites for number in site]
        record["packed"] = sizes.numbers(sixes * count)
        record["transposed"] = sizes.numbers(padded * maps)
        record["partials_size"] = sixes * padded
        record["partials"] = sizes.numbers((1 if stage.linear else parts) * sixes * padded)
        tasks += [number for first in range(0, maps, SIX) for number in (i, first)]

        record["norm"] = normalization.NO_NORM
        if stage.norm is not None:
            record["norm"] = normalization.FROZEN if stage.frozen else normalization.BATCH_NORM
            record["eps"], record["momentum"] = stage.norm.eps, stage.norm.momentum
        record["moving"] = sizes.numbers(2 * maps)
        record["constants"] = sizes.numbers(normalization.CONSTANTS * maps)
        record["found"] = found
        found += normalization.FOUND * maps
        record["activation"] = ACTIVATIONS[type(stage.activation)]
        record["maximum"] = type(stage.pool) is MaxPool2d
        record["window_h"], record["window_w"] = stage.window
        shape = stage.output
    logits, classes = stages[-1], math.prod(shape)
    logits["channels"], logits["height"], logits["width"] = classes, 1, 1
    logits["x_size"], logits["x_plane"], logits["x_row"] = classes | 1, 1, 1
    logits["found"] = found

    start = end = sizes.numbers(0)
    for stage, record in zip(plan, stages, strict=False):
        record["bias"] = -1
        for name, array in stage.state().items():
            if isinstance(array, Parameter):
                record[name] = end
                end += array.data.size
    sizes.numbers(end - start)
    stages["gradient"] = sizes.numbers(end - start) - start
    stages["velocity"] = sizes.numbers(end - start) - start
    stages["settings"] = sizes.numbers(4)
    stages["table"] = sizes.numbers(256)
    stages["masks"] = sizes.vectors(2)
    rows = stages["window_h"] * stages["columns"]
    stages["dx_size"] = max(stages["x_size"].max(), classes + 1) + rows.max() | 1
    stages["dx"] = sizes.vectors(threads * int(stages["dx_size"][0]))
    for record in stages:
        record["x"] = sizes.vectors(slots * record["x_size"])
        record["y"] = sizes.vectors(slots * record["y_size"])
        record["z"] = sizes.vectors(slots * record["y_size"])
    values = aligned(sizes.end * lanes, dtype)
    table = int(stages["table"][0])
    values[table : table + 256] = np.arange(256) / 255
    columns = max(chunks, -(-test // lanes))
    return Net(
        stages,
        values,
        np.array(tables, np.int64),
        np.array(tasks, np.int64),
        np.zeros((found + 2, columns)),
    )


def places(stage: StagePlan, record: Any) -> Iterator[tuple[str, int]]:
    """Where a stage's parameters and moving averages lie, by their names."""
    for name, array in stage.state().items():
        if isinstance(array, Parameter):
            yield name, int(record[name])
    maps = stage.maps[0]
    yield from (
        ("moving_mean", int(record["moving"])),
        ("moving_var", int(record["moving"]) + maps),
    )


def aligned(count: int, dtype: Any) -> Array:
    """Zeros that begin with a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + BYTES, np.uint8)
    start = -memory.ctypes.data % BYTES
    return memory[start : start + size].view(dtype)
