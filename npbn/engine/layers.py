"""Train and evaluate by the layers' own methods, in the textbook loop over batches.

The other engines must compute what this engine computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import Backend, blas_threads
from npbn.data import Split
from npbn.distributed import ALONE, Group
from npbn.engine import Result
from npbn.functional.arrays import Array
from npbn.layers import BatchNorm, Layer, Sequential, dtype_of, modes_kept, self_and_descendants
from npbn.optim import SGD

EVALUATION_BATCH_SIZE = 256
"""The number of examples in a batch of an evaluation.

On a CPU, larger batches are no faster, because larger batches do not fit into the CPU's cache.
"""


class LayersEngine:
    """An engine that calls the layers' own forward and backward passes, batch by batch.

    For each batch, the engine runs the forward pass, the loss, the backward pass and a step of the
    optimizer. If several ranks train together, each has a shard of the batch. Batch norm uses the
    statistics of the whole batch, and the gradients are summed over the ranks.

    Args:
        model, optimizer, train, test: the model, its optimizer, the training split and the test
            split, all on ``backend``.
        batch_size: the number of examples in a training batch.
        backend: any backend.
        group: the processes that train together. By default, this process is alone.
    """

    kind = "layers"

    def __init__(
        self,
        model: Sequential,
        optimizer: SGD,
        train: Split,
        test: Split,
        *,
        batch_size: int,
        backend: Backend,
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.model, self.optimizer = model, optimizer
        self.train, self.test = train, test
        self.batch_size, self.backend = batch_size, backend
        self.description = "by layers"
        if backend.name == "numpy" and (threads := blas_threads()):
            self.description += f" on {threads} thread{'s' * (threads > 1)}"

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on the given examples, batch by batch, as `npbn.engine.Engine` describes."""
        indices = self.backend.asarray(order)
        for start in range(0, len(order), self.batch_size):
            batch = indices[start : min(start + self.batch_size, len(order))]
            yield Result(batch.shape[0], *self._step(batch))

    def _step(self, batch: Array) -> Any:
        """Train on one batch; return its mean loss and the number of correct predictions."""
        group: Any = self.group
        n = batch.shape[0]
        begin, end = n * group.rank // group.size, n * (group.rank + 1) // group.size
        share = (end - begin) / n
        if begin == end:
            end, group = begin + 1, Absent(group)
        x, labels = next(self.train.batches(n, dtype_of(self.model), order=batch[begin:end]))
        with synchronized(self.model, group):
            logits = self.model.forward(x)
            loss, cache = F.softmax_cross_entropy(logits, labels)
            self.model.backward(share * F.softmax_cross_entropy_backward(cache))
        parameters = self.optimizer.parameters.values()
        gradients = group.add([parameter.gradient for parameter in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.gradient = gradient
        self.optimizer.step()
        return group.add([share * loss, count_correct(logits, labels)])

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode, batch by batch.

        The batches are divided among the ranks. If there are fewer batches left than ranks, some
        ranks compute the last batch again.
        """
        ranks, count = self.group.size, len(self.test)
        starts = range(0, count, EVALUATION_BATCH_SIZE)
        ends = [min(start + EVALUATION_BATCH_SIZE, count) for start in starts]
        for first in range(0, len(starts), ranks):
            turn = range(first, min(first + ranks, len(starts)))
            own = turn[min(self.group.rank, len(turn) - 1)]
            part = slice(starts[own], ends[own])
            split = Split(self.test.images[part, ...], self.test.labels[part])
            [(_, loss, correct)] = predict(self.model, split, dtype=dtype_of(self.model))
            losses, corrects = self.group.gather(loss), self.group.gather(correct)
            for rank, batch in enumerate(turn):
                yield Result(ends[batch] - starts[batch], losses[rank, ...], corrects[rank, ...])


class Absent:
    """The group of a rank whose shard of a batch is empty.

    The rank computes with any example, and sends zeros in place of its results. So neither the
    other ranks nor the operations need a rule for empty shards.
    """

    threads, description = 1, ""

    def __init__(self, group: Group) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size

    def gather(self, own: Array) -> Array:
        return self._group.gather(0 * own)

    def add(self, arrays: Sequence[Array]) -> Sequence[Array]:
        return self._group.add([0 * array for array in arrays])


@contextlib.contextmanager
def synchronized(model: Layer, group: Any) -> Iterator[None]:
    """Run the code inside with batch norms that normalize over the shards of all ranks."""
    norms = [layer for layer in self_and_descendants(model) if isinstance(layer, BatchNorm)]
    before = [norm.group for norm in norms]
    for norm in norms:
        norm.group = group
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.group = value


def predict(
    model: Layer, split: Split, *, dtype: Any, batch_size: int = EVALUATION_BATCH_SIZE
) -> Iterator[Result]:
    """Run a split in prediction mode, batch by batch. Every layer gets its old mode back."""
    for x, labels in split.batches(batch_size, dtype):
        with modes_kept(model):
            model.eval()
            logits = model.forward(x)
        loss, _ = F.softmax_cross_entropy(logits, labels)
        yield Result(int(labels.shape[0]), loss, count_correct(logits, labels))


def count_correct(logits: Array, labels: Array) -> Array:
    """Return the number of examples whose largest logit is at the label.

    The result stays on the device.
    """
    xp = array_api_compat.array_namespace(logits)
    return xp.count_nonzero(xp.argmax(logits, axis=1) == labels)
