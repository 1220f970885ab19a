"""Run a training step or an evaluation as a sequence of launches.

A launch is a loop over threads that run in parallel: of n threads, each takes every n-th part of
the batch. Between two launches, only one thread works. A part is one chunk or several chunks. If
several processes (ranks) train together, each has a range of the parts, and after a launch the
ranks share what they have found (`npbn.engine.cpu.sharing`).

No bit of a result depends on the number of threads or ranks: the division of a batch into parts
depends only on the size of the batch, and sums over parts are computed in the order of the parts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from npbn.engine.cpu.normalization import (
    BATCH_NORM,
    NO_NORM,
    activate,
    activate_backward,
    exponential,
    merge,
    merge_backward,
    normalize_backward,
    statistics,
)
from npbn.engine.cpu.products import (
    OPTIONS,
    SIX,
    affine,
    affine_backward_weight,
    affine_backward_x,
    pack,
)
from npbn.engine.cpu.vector import BYTES, at, full, load, put, store, where_greater

MOST_PARTS = 32

KERNELS = "PACK", "FORWARD", "LOSS", "BACKWARD", "WEIGHTS", "UPDATE", "PREDICT"
PACK, FORWARD, LOSS, BACKWARD, WEIGHTS, UPDATE, PREDICT = range(7)

# Numba's option `parallel` turns on several passes, but only prange is needed here. The other
# passes would search every function for loops to fuse.
_OFF = ["comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"]
PARALLEL: dict[str, Any] = {
    "parallel": dict.fromkeys(_OFF, False) | {"prange": True},
    "error_model": "numpy",
    "nogil": True,
}


def training_program(stages: int) -> np.ndarray:
    """Return the launches of a training step: an array with a row (kernel, stage) for each."""
    forward = [(FORWARD, k) for k in range(stages)]
    backward = [(BACKWARD, k) for k in reversed(range(stages))]
    return np.array([(PACK, 0), *forward, (LOSS, stages), *backward, (WEIGHTS, 0), (UPDATE, 0)])


def prediction_program() -> np.ndarray:
    """Return the launches of an evaluation: an array with a row (kernel, stage) for each."""
    return np.array([(PACK, 0), (PREDICT, 0)])


@njit(**PARALLEL)
def execute(program: Any, net: Any, images: Any, labels: Any, order: Any, threads: int) -> Any:
    """Run the launches of a program on the examples ``order``; each launch uses all threads.

    Returns:
        The sum of the losses, and the number of examples that are classified correctly.
    """
    for launch in range(len(program)):
        kernel, k = program[launch, 0], program[launch, 1]
        prepare(net, kernel, k, len(order))
        for thread in prange(threads):
            run(net, kernel, k, images, labels, order, np.int64(thread), threads)
    return summed_up(net, len(order))


@njit(**OPTIONS)
def prepare(net: Any, kernel: int, k: int, batch: int) -> None:
    """Do the part of a launch that one thread does before all threads start."""
    # Numba compiles a function again for each literal, so the last argument of merge is a variable.
    if kernel == PACK:
        set_masks(net, batch)
    elif kernel in (FORWARD, LOSS) and k > 0:
        merge(net, k - 1, batch, kernel != PREDICT)
    elif kernel == BACKWARD:
        merge_backward(net, k, batch)
    elif kernel == PREDICT:
        for stage in range(len(net.stages) - 1):
            merge(net, stage, batch, kernel != PREDICT)


@njit(**OPTIONS)
def run(
    net: Any,
    kernel: int,
    k: int,
    images: Any,
    labels: Any,
    order: Any,
    thread: int,
    threads: int,
) -> None:
    """Do the work of one thread in a launch.

    For the kernels PACK and UPDATE, a thread takes every n-th group of six maps, where n is the
    number of threads; for WEIGHTS, every n-th of the rank's groups; for PREDICT, every n-th of the
    rank's chunks; for all other kernels, every n-th of the rank's parts of the batch.
    """
    stages, batch, last = net.stages, len(order), len(net.stages) - 2
    lanes = BYTES // net.values.itemsize
    chunks = (batch + lanes - 1) // lanes
    if kernel in (PACK, WEIGHTS, UPDATE):
        begin, end = 0, net.tasks.size // 2
        if kernel == WEIGHTS:
            begin, end = stages[0].first_task, stages[0].last_task
        for task in range(begin + thread, end, threads):
            k, first = net.tasks[2 * task], net.tasks[2 * task + 1]
            if kernel == PACK:
                pack(net, k, first)
            elif kernel == WEIGHTS:
                sum_up(net, k, first, chunks)
            else:
                update(net, k, first)
        return
    scratch = stages[0].dx + thread * stages[0].dx_size
    whole = load(net.values, stages[0].masks)
    if kernel == PREDICT:
        begin, end = own(net, chunks)
        for m in range(begin + thread, end, threads):
            examples = min(lanes, batch - m * lanes)
            gather(net, thread, images, order, m * lanes, examples)
            for stage in range(last + 1):
                affine(net, stage, thread)
                activate(net, stage, thread)
            cross_entropy(net, thread, m, labels, order, m * lanes, examples, whole, scratch)
        return
    size, parts = cut(chunks)
    begin, end = own(net, parts)
    count = (end - begin - thread + threads - 1) // threads
    for i in range(count):
        # Go through the parts forwards in one stage and backwards in the next stage, because the
        # chunks that were written last are still in the cache.
        part = begin + thread + threads * (count - 1 - i if k % 2 else i)
        if kernel == BACKWARD and not stages[k].linear:
            clear_part(net, k, part)
        for m in range(part * size, min(chunks, part * size + size)):
            examples = min(lanes, batch - m * lanes)
            mask = load(net.values, stages[0].masks + np.int64(examples < lanes))
            if kernel == FORWARD:
                if k == 0:
                    gather(net, m, images, order, m * lanes, examples)
                else:
                    activate(net, k - 1, m)
                affine(net, k, m)
                if stages[k].norm == BATCH_NORM:
                    statistics(net, k, m, mask, examples)
            elif kernel == LOSS:
                activate(net, last, m)
                cross_entropy(net, m, m, labels, order, m * lanes, examples, mask, scratch)
                activate_backward(net, last, m, scratch)
            else:
                if stages[k].norm != NO_NORM:
                    normalize_backward(net, k, m, mask)
                if not stages[k].linear:
                    out = stages[k].partials + part * stages[k].partials_size
                    affine_backward_weight(net, k, np.int64(0), stages[k].maps, m, out)
                if k > 0:
                    affine_backward_x(net, k, m, scratch)
                    activate_backward(net, k - 1, m, scratch)


@njit(**OPTIONS)
def cut(chunks: int) -> tuple[int, int]:
    """Return the number of chunks in a part of the batch, and the number of parts."""
    size = (chunks + MOST_PARTS - 1) // MOST_PARTS
    return size, (chunks + size - 1) // size


@njit(**OPTIONS)
def own(net: Any, count: int) -> tuple[int, int]:
    """Return where this rank's share of the parts or chunks begins, and where it ends."""
    rank, ranks = net.stages[0].rank, net.stages[0].ranks
    return count * rank // ranks, count * (rank + 1) // ranks


@njit(**OPTIONS)
def gather(net: Any, slot: int, images: Any, order: Any, first: int, examples: int) -> None:
    """Write the pixels of a chunk, as numbers from 0 to 1, to x of the first stage.

    If the chunk has fewer examples than a vector has lanes, the other lanes are set to 0.
    """
    stage, values = net.stages[0], net.values
    lanes, width, table = BYTES // values.itemsize, stage.width, stage.table
    for row in range(stage.channels * stage.height):
        channel, h = divmod(row, stage.height)
        x = stage.x + slot * stage.x_size + channel * stage.x_plane + stage.inside
        x = (x + h * stage.x_row) * lanes
        for lane in range(examples):
            example = at(order, first + lane) * stage.channels * stage.height
            pixel, to = (example + row) * width, x + lane
            for w in range(width):
                byte = np.int64(at(images, pixel + w))
                put(values, to + w * lanes, at(values, table + byte))
        for lane in range(examples, lanes):
            for w in range(width):
                put(values, x + w * lanes + lane, 0)


@njit(**OPTIONS)
def cross_entropy(
    net: Any,
    slot: int,
    chunk: int,
    labels: Any,
    order: Any,
    first: int,
    examples: int,
    mask: Any,
    scratch: int,
) -> None:
    """Compute softmax and cross-entropy of a chunk; see `npbn.functional.softmax_cross_entropy`.

    The results are stored. The sum of the chunk's losses and the number of the chunk's examples
    that are classified correctly go to ``net.found``. The gradient of the batch's mean loss with
    respect to the logits goes to the vectors from ``scratch`` on.
    """
    stage, values = net.stages[len(net.stages) - 1], net.values
    lanes = BYTES // values.itemsize
    classes, batch = stage.channels, values.dtype.type(len(order))
    logits, ends = stage.x + slot * stage.x_size, scratch + classes
    largest = load(values, logits)
    for o in range(1, classes):
        z = load(values, logits + o)
        largest = where_greater(z, largest, z, largest)
    exponentials = full(values, 0.0)
    for o in range(classes):
        e = exponential(load(values, logits + o) - largest)
        exponentials = exponentials + e
        store(values, scratch + o, e)
    store(values, ends, exponentials)
    share = mask / (exponentials * batch)
    for o in range(classes):
        store(values, scratch + o, load(values, scratch + o) * share)
    loss, correct = 0.0, 0
    for lane in range(examples):
        z = logits * lanes + lane
        label, best = labels[order[first + lane]], 0
        for o in range(1, classes):
            if values[z + o * lanes] > values[z + best * lanes]:
                best = o
        if 0 <= label < classes:
            values[(scratch + label) * lanes + lane] -= 1 / batch
            shifted = values[z + label * lanes] - values[z + best * lanes]
            loss += math.log(np.float64(values[ends * lanes + lane])) - np.float64(shifted)
        else:
            loss = math.nan  # If the label is out of range, the loss is NaN, as in npbn.functional.
        correct += best == label
    net.found[stage.found, chunk] = loss
    net.found[stage.found + 1, chunk] = correct


@njit(**OPTIONS)
def clear_part(net: Any, k: int, part: int) -> None:
    """Set dW of a part of the batch to 0."""
    stage = net.stages[k]
    out = stage.partials + part * stage.partials_size
    for i in range(out, out + stage.partials_size):
        put(net.values, i, 0)


@njit(**OPTIONS)
def sum_up(net: Any, k: int, first: int, chunks: int) -> None:
    """Sum dW over the batch, for six maps from ``first`` on."""
    stage, values = net.stages[k], net.values
    last, row = min(first + SIX, stage.maps), stage.padded_taps
    _, parts = cut(chunks)
    if stage.linear:
        parts = 1
        begin = stage.partials + first * row
        for i in range(begin, begin + SIX * row):
            put(values, i, 0)
        affine_backward_weight(net, k, first, last, chunks, stage.partials)
    for o in range(first, last):
        place, to = stage.partials + o * row, stage.weight + o * stage.taps
        for part in range(1, parts):
            other = place + part * stage.partials_size
            for r in range(stage.taps):
                put(values, place + r, at(values, place + r) + at(values, other + r))
        for r in range(stage.taps):
            put(values, to + stage.gradient + r, at(values, place + r))


@njit(**OPTIONS)
def update(net: Any, k: int, first: int) -> None:
    """Take a step of the optimizer, for six maps from ``first`` on."""
    stage = net.stages[k]
    last = min(first + SIX, stage.maps)
    move(net, stage.weight + first * stage.taps, (last - first) * stage.taps, True)
    if stage.bias >= 0:
        move(net, stage.bias + first, last - first, False)
    if stage.norm != NO_NORM:
        move(net, stage.gamma + first, last - first, False)
        move(net, stage.beta + first, last - first, False)


@njit(**OPTIONS)
def move(net: Any, first: int, count: int, decays: bool) -> None:
    """Take a step of `npbn.optim.SGD` for ``count`` numbers: v ← m v + (g + λ w), w ← w - η v."""
    stage, values = net.stages[0], net.values
    rate, momentum = values[stage.settings], values[stage.settings + 1]
    gradient, velocity = stage.gradient, stage.velocity
    for w in range(first, first + count):
        v = at(values, w + gradient)
        if decays:
            v += values[stage.settings + 2] * at(values, w)
        if momentum > 0:
            v += momentum * at(values, w + velocity)
            put(values, w + velocity, v)
        put(values, w, at(values, w) - rate * v)


@njit(**OPTIONS)
def set_masks(net: Any, batch: int) -> None:
    """Set the two masks, which are 1 where a chunk has an example and 0 elsewhere.

    The first mask is that of a full chunk, the second that of a last chunk that is not full.
    """
    lanes = BYTES // net.values.itemsize
    first = net.stages[0].masks * lanes
    for lane in range(lanes):
        net.values[first + lane] = 1
        net.values[first + lanes + lane] = 1 if lane < batch % lanes else 0


@njit(**OPTIONS)
def summed_up(net: Any, batch: int) -> tuple[float, int]:
    """Return the sum of the losses and the number of correct predictions over all chunks.

    The sums are computed in the order of the chunks.
    """
    lanes = BYTES // net.values.itemsize
    last = net.stages[len(net.stages) - 1]
    loss, correct = 0.0, 0
    for m in range((batch + lanes - 1) // lanes):
        loss += net.found[last.found, m]
        correct += int(net.found[last.found + 1, m])
    return loss, correct
