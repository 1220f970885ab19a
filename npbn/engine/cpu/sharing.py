"""Say what the ranks share after a launch, if several processes train together.

A rank runs the launches (`npbn.engine.cpu.launches`) on its own chunks of the batch. What a launch
needs from other chunks than the rank's own must be shared before the launch:

- ``merge`` needs the mean and the sum of squares of every chunk, after each forward launch;
- ``merge_backward`` needs the sums for dβ and dγ of every chunk, after each backward launch;
- dW of a convolution is the sum over the parts of the batch, which each rank has for its own parts;
- dW of a linear layer is a sum over all examples that one thread computes at one go, so x and dy of
  all chunks are shared. A sum for each rank would travel in fewer bytes, but then the order of the
  additions, and with it the last bits, would depend on the number of ranks;
- the optimizer needs dW of all maps, of which each rank computes some.

All of these are numbers that a process by itself would have computed, and they are put where it
would have put them. So all ranks go on with the same bits as a process by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from npbn.engine.cpu import launches, network
from npbn.engine.cpu.normalization import DBETA, MEANS, NO_NORM
from npbn.engine.cpu.vector import BYTES

Shared = tuple[np.ndarray, list[int]]
"""The arguments of `npbn.distributed.Group.share`: rows, and where each rank's rows begin."""


def sections(net: network.Net, program: Any, batch: int) -> list[tuple[Any, list[Shared]]]:
    """Cut a program where something must be shared.

    Args:
        net: the arrays of the model.
        program: the launches.
        batch: the number of examples.

    Returns:
        Parts of the program, and what must be shared after each part. Nothing is shared after the
        last part, which may have no launches.
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
        # The gradients of all parameters lie one after another. Those of other parameters than
        # weights are equal on all ranks already, and travel because they lie between.
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
