"""Train and evaluate by the layers' own methods, in the textbook loop over batches.

The other engines must compute what this engine computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import Backend
from npbn.data import Split
from npbn.engine import Result
from npbn.functional.arrays import Array
from npbn.layers import Layer, Sequential, dtype_of, modes_kept
from npbn.optim import SGD

EVALUATION_BATCH_SIZE = 256
"""The number of examples in a batch of an evaluation.

On a CPU, larger batches are no faster, because larger batches do not fit into the CPU's cache.
"""


class LayersEngine:
    """An engine that calls the layers' own forward and backward passes, batch by batch.

    For each batch, the engine runs the forward pass, the loss, the backward pass and a step of the
    optimizer.

    Args:
        model, optimizer, train, test: the model, its optimizer, the training split and the test
            split, all on ``backend``.
        batch_size: the number of examples in a training batch.
        backend: any backend.
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
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.train, self.test = train, test
        self.batch_size, self.backend = batch_size, backend
        self.description = "by layers"

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on the given examples, batch by batch, as `npbn.engine.Engine` describes."""
        dtype, indices = dtype_of(self.model), self.backend.asarray(order)
        for x, labels in self.train.batches(self.batch_size, dtype, order=indices):
            logits = self.model.forward(x)
            loss, cache = F.softmax_cross_entropy(logits, labels)
            self.model.backward(F.softmax_cross_entropy_backward(cache))
            self.optimizer.step()
            yield Result(int(labels.shape[0]), loss, count_correct(logits, labels))

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode, batch by batch."""
        return predict(self.model, self.test, dtype=dtype_of(self.model))


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
