"""Turn a plan into the arrays that the kernels work on.

All numbers of one kind lie in one array. The record of a stage says where the stage's part of the
array begins. So the kernels are compiled once, and work for every model.

Activations are vectors (`npbn.engine.cpu.vector`): each chunk of examples has an array of vectors
of shape (maps, rows · columns). The plane of a map has an odd number of vectors, because planes
whose size is a multiple of 4,096 bytes would compete for the same lines of the cache.
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
        *_integers("rank ranks first_task last_task"),
    ]
)
"""The dtype of a stage's record, which the kernels read.

A place is an index in ``Net.values``. The places ``x``, ``y``, ``z``, ``dx`` and ``masks`` count in
vectors; all other places in ``Net.values`` count in numbers.

The input of the stage:

- ``x``: the place of the input of all chunks.
- ``x_size``, ``x_plane``, ``x_row``: the number of vectors in a chunk, in the plane of a channel
  and in a row of a plane, with the zeros of the padding.
- ``inside``: the distance from the beginning of a plane to the first pixel of the image, in
  vectors.
- ``channels``, ``height``, ``width``: the shape of the input image, without padding.

The convolution or linear layer:

- ``linear``: 1 for a linear layer, 0 for a convolution.
- ``taps``: the number of input numbers that an output depends on.
- ``padded_taps``: ``taps``, rounded up to a multiple of six.
- ``first_tap``: the index in ``Net.tables`` at which the list of the padded taps begins.
- ``first_site``: the index in ``Net.tables`` at which the list of the sites begins. A site is a
  pair of numbers: the distance to the site's first input in x, and the distance to its output in y.
- ``maps``, ``rows``, ``columns``: the shape of the output, before pooling.

The output of the layer:

- ``y``: the place of the output of all chunks.
- ``y_size``, ``y_plane``: the number of vectors in a chunk and in the plane of a map.
- ``z``: the place of an array of the same shape as y. The array holds a = σ(...) after the forward
  pass, then the gradient dz, then the gradient dy.

The weights, and the gradients of the weights:

- ``packed``, ``transposed``: the places of two copies of the weights, in the two orders in which
  `npbn.engine.cpu.products` reads the weights.
- ``partials``: the place of dW of each part of the batch.
- ``partials_size``: the number of numbers in dW of one part of the batch.

The parameters, and the numbers that the optimizer uses:

- ``weight``, ``bias``, ``gamma``, ``beta``: the places of the parameters. ``bias`` is -1 for a
  layer without a bias.
- ``gradient``, ``velocity``: the distances from a parameter to its gradient and to its velocity.
- ``moving``: the place of the moving means of all maps, which the moving variances follow.
- ``settings``: the place of three numbers: the learning rate, the momentum and the weight decay.

The layers that follow in the stage; see `npbn.engine.cpu.normalization`:

- ``norm``, ``activation``: the kind of batch norm and the kind of activation.
- ``maximum``: 1 for maximum pooling, 0 for mean pooling.
- ``window_h``, ``window_w``: the size of the pooling window.
- ``constants``: the place of the constants with which y is normalized.
- ``found``: the first row of the stage in ``Net.found``.
- ``eps``, ``momentum``: the settings of batch norm.

Equal in all stages:

- ``dx``: the place of the working memory of all threads.
- ``dx_size``: the number of vectors in the working memory of a thread.
- ``masks``: the place of two vectors. The first vector is 1 for every example, as in a full chunk.
  The second vector is 1 for each example that the last chunk has, if the last chunk is not full.
- ``table``: the place of 256 numbers: for each value of a pixel's byte, the number from 0 to 1.
- ``rank``, ``ranks``: the number of this process, and the number of processes that train together.
- ``first_task``, ``last_task``: the range in ``Net.tasks`` of which this rank computes dW.
"""


class Net(NamedTuple):
    """The arrays that every kernel gets.

    Attributes:
        stages: an array with a record of dtype STAGE for each stage, and one more record, whose x
            is the logits.
        values: all numbers of the model's dtype, in one flat array.
        tables: the taps and sites of all stages.
        tasks: for each group of six maps, the index of the stage and the first map of the group.
        found: the sums that the kernels compute for each chunk, in float64, with a column for each
            chunk.
    """

    stages: Array
    values: Array
    tables: Array
    tasks: Array
    found: Array


class _Sizes:
    """An allocator of places in ``values``; each place is at the beginning of a vector."""

    def __init__(self, lanes: int) -> None:
        self.lanes, self.end = lanes, 0

    def vectors(self, count: int) -> int:
        self.end += count
        return self.end - count

    def numbers(self, count: int) -> int:
        return self.vectors(-(-count // self.lanes)) * self.lanes


def build(
    plan: Sequence[StagePlan],
    dtype: Any,
    *,
    batch: int,
    test: int,
    threads: int,
    rank: int = 0,
    ranks: int = 1,
) -> Net:
    """Return the arrays that the kernels work on.

    Args:
        plan: the stages of the model.
        dtype: the dtype of the model.
        batch: the largest number of examples in a training batch.
        test: the largest number of examples in a call that evaluates.
        threads: the largest number of threads.
        rank, ranks: the number of this process, and the number of processes.
    """
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
        # If the last group of six taps is not full, the first tap of the group is repeated.
        tables += places + [places[(count - 1) // SIX * SIX]] * (padded - count)

        maps, rows, columns = record["maps"], record["rows"], record["columns"] = stage.maps
        sixes = -(-maps // SIX) * SIX
        record["y_plane"] = rows * columns | 1
        record["y_size"] = sixes * record["y_plane"] | 1
        record["first_site"] = len(tables)
        if stage.linear:  # A chunk has only one site, so the sites are the chunks.
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
    stages["settings"] = sizes.numbers(3)
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
    stages["rank"], stages["ranks"] = rank, ranks
    stages["first_task"], stages["last_task"] = divided(stages, tasks, ranks)[rank : rank + 2]
    return Net(
        stages,
        values,
        np.array(tables, np.int64),
        np.array(tasks, np.int64),
        np.zeros((found + 2, columns)),
    )


def divided(stages: Array, tasks: Sequence[int], ranks: int) -> list[int]:
    """Return where the tasks of each rank begin, and at last where they end.

    The ranks get about the same number of weights.
    """
    weights = np.cumsum([0, *stages["taps"][tasks[::2]]])
    return [int(np.searchsorted(weights, weights[-1] * r / ranks)) for r in range(ranks + 1)]


def places(stage: StagePlan, record: Any) -> Iterator[tuple[str, int]]:
    """Yield (name, place) for each parameter and moving average of a stage; see ``values``."""
    moving = int(record["moving"])
    for name, array in stage.state().items():
        if isinstance(array, Parameter):
            yield name, int(record[name])
        else:
            yield name, moving + (stage.maps[0] if name == "moving_var" else 0)


def aligned(count: int, dtype: Any) -> Array:
    """Return an array of ``count`` zeros that begins at the beginning of a cache line."""
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + BYTES, np.uint8)
    start = -memory.ctypes.data % BYTES
    return memory[start : start + size].view(dtype)
