"""Turn a plan into the arrays that the kernels work on.

Numbers of one kind lie in one array. A stage's record says where its part begins, so kernels are
compiled once, for every model. Activations are vectors (`npbn.engine.cpu.vector`): for each chunk
of examples, (maps, rows · columns) of them. A map's plane has an odd number of vectors: planes of a
multiple of 4,096 bytes would compete for the same lines of the cache.
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


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names.split()]


STAGE = np.dtype(
    [
        *_integers("x x_size x_plane x_row inside channels height width"),
        *_integers("linear taps padded_taps first_tap first_site maps rows columns"),
        *_integers("y z y_size y_plane packed transposed partials partials_size"),
        *_integers("weight bias gamma beta gradient velocity moving settings"),
        *_integers("norm activation maximum window_h window_w constants found"),
        *(("eps", np.float64), ("momentum", np.float64)),
        *_integers("dx dx_size masks table"),
    ]
)
"""The record of a stage that the kernels read.

Places of x, y, z, dx and masks are counted in vectors, all other places in numbers.

- Its input: ``x``, with ``x_size`` vectors a chunk, ``x_plane`` a channel and ``x_row`` a row,
  zeros of padding included; ``inside``: where the image begins in its plane; ``channels``,
  ``height`` and ``width`` of the image.
- Its layer: ``taps`` numbers that an output sees, by whole sixes ``padded_taps``, listed in the
  tables from ``first_tap`` on; the sites of its outputs, pairs of places in x and in y, from
  ``first_site`` on; ``maps``, ``rows`` and ``columns`` of the output.
- Its output: ``y``, with ``y_size`` vectors a chunk and ``y_plane`` a map; ``z`` of the same sizes
  holds a = σ(...) after the forward pass, then the gradient dz, then dy.
- Its weights as `npbn.engine.cpu.products` reads them, ``packed`` and ``transposed``; ``partials``:
  dW of each part of the batch, ``partials_size`` numbers each.
- Its parameters, ``bias`` -1 without one. ``gradient`` and ``velocity``: the distance from a
  parameter to these. ``moving``: the moving means of all maps, then the variances. ``settings``:
  learning rate, momentum, decay of weights, decay of other parameters.
- What follows the layer: ``norm``, ``activation``, ``maximum`` (or mean) pooling and its window,
  ``eps`` and ``momentum`` of batch norm; ``constants`` and ``found``: see
  `npbn.engine.cpu.normalization`.
- Equal in all stages: ``dx``, working memory of ``dx_size`` vectors a thread; ``masks``, two
  vectors that are 1 for each example of a whole chunk, and of the last chunk; ``table``: the number
  that each pixel's byte stands for.
"""


class Net(NamedTuple):
    """The arrays that every kernel gets.

    Attributes:
        stages: a record of STAGE each, and one more whose x are the logits.
        values: all numbers of the dtype.
        tables: taps and sites of all stages.
        tasks: stage and first map of every six maps.
        found: the sums of each chunk, in a column of float64.
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
    """Return the arrays for batches of up to ``batch`` examples and evaluations of ``test``."""
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
    """Return where a stage's parameters and moving averages lie, by their names."""
    moving = int(record["moving"])
    for name, array in stage.state().items():
        if isinstance(array, Parameter):
            yield name, int(record[name])
        else:
            yield name, moving + (stage.maps[0] if name == "moving_var" else 0)


def aligned(count: int, dtype: Any) -> Array:
    """Zeros that begin with a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + BYTES, np.uint8)
    start = -memory.ctypes.data % BYTES
    return memory[start : start + size].view(dtype)
