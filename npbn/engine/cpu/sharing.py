"""Find the arrays that ranks exchange after each launch, if several processes train together.

A rank runs the launches (`npbn.engine.cpu.launches`) on its own chunks of the batch. Before a
launch, the ranks exchange what it needs of all chunks:

- ``merge`` needs the mean and the sum of squares of every chunk, after each forward launch;
- ``merge_backward`` needs the sums for dβ and dγ of every chunk, after each backward launch;
- dW of a convolution is a sum over the parts of the batch. Each rank has the terms of its parts;
- dW of a linear layer is a sum over all examples, which one thread computes. So the ranks exchange
  x and dy. To exchange a sum for each rank would take fewer bytes, but then the order of the
  additions, and with it the last bits, would depend on the number of ranks;
- the optimizer needs dW of all maps. Each rank computes dW of some maps.

A single process would have computed the same numbers, and stored them in the same places. So all
ranks continue with the bits of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from npbn.engine.cpu import launches, network
from npbn.engine.cpu.normalization import DBETA, MEANS, NO_NORM
from npbn.engine.cpu.vector import BYTES

Shared = tuple[np.ndarray, list[int]]
"""The arguments of `npbn.distributed.Group.share`: rows, and the limits of each rank's rows."""


def sections(net: network.Net, program: Any, batch: int) -> list[tuple[Any, list[Shared]]]:
    """Divide a program into sections, after which the ranks exchange arrays.

    Args:
        net: the arrays of the model.
        program: the launches.
        batch: the number of examples.

    Returns:
        For each section, its launches, and the arrays to exchange after it. After the last section,
        which may have no launches, there are none.
    """
    found, start = [], 0
    for launch, (kernel, k) in enumerate(program, 1):
        shared = list(_shared(net, kernel, k, batch)) if net.stages[0]["ranks"] > 1 else []
        if shared:
            found.append((program[start:launch], shared))
            start = launch
    return [*found, (program[start:], [])]


def _shared(net: network.Net, kernel: int, k: int, batch: int) -> Iterator[Shared]:
    stages, lanes = net.stages, BYTES // net.values.itemsize
    ranks, last = int(stages[0]["ranks"]), len(stages) - 2
    chunks = -(-batch // lanes)
    size = -(-chunks // launches.MOST_PARTS)
    parts = -(-chunks // size)
    of_parts = [parts * r // ranks for r in range(ranks + 1)]
    of_chunks = [min(chunks, size * part) for part in of_parts]

    def rows(place: int, count: int, length: int) -> Any:
        return net.values[place : place + count * length].reshape(count, length)

    def results(k: int, first: int, count: int) -> Any:
        """Return a view of net.found with a row for each chunk."""
        begin = stages[k]["found"] + first * stages[k]["maps"]
        return net.found[begin : begin + count, :chunks].T

    if kernel == launches.FORWARD and stages[k]["norm"] != NO_NORM:
        yield results(k, MEANS, 2 * stages[k]["maps"]), of_chunks
    elif kernel == launches.LOSS:
        # The losses follow the sums of the last stage.
        yield results(last, DBETA, 2 * stages[last]["maps"] + 2), of_chunks
    elif kernel == launches.BACKWARD and k > 0:
        yield results(k - 1, DBETA, 2 * stages[k - 1]["maps"]), of_chunks
    elif kernel == launches.BACKWARD:
        for stage in stages[: last + 1]:
            if stage["linear"]:
                for place, length in ((stage["x"], stage["x_size"]), (stage["z"], stage["y_size"])):
                    yield rows(place * lanes, chunks, length * lanes), of_chunks
            else:
                yield rows(stage["partials"], parts, stage["partials_size"]), of_parts
    elif kernel == launches.WEIGHTS:
        # The gradients of all parameters are stored one after another. Between those of the weights
        # are gradients that are equal on all ranks already. They are exchanged with the others.
        weights, gradient = stages["weight"], stages[0]["gradient"]
        begin, length = weights[0] + gradient, stages[0]["velocity"] - gradient
        places = [
            weights[stage] + first * stages[stage]["taps"] - weights[0]
            for stage, first in net.tasks.reshape(-1, 2)
        ]
        firsts = network.divided(stages, net.tasks, ranks)
        ends = [int([*places, length][task]) for task in firsts]
        yield net.values[begin : begin + length], ends
    elif kernel == launches.PREDICT:
        yield results(last + 1, 0, 2), [chunks * r // ranks for r in range(ranks + 1)]
