"""The engine by layers: the textbook loop, and the specification of the other engines."""

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
"""Larger batches are no faster on a CPU: they fall out of its cache."""


class LayersEngine:
    """Forward pass, loss, backward pass and step of the optimizer, batch by batch, by the layers.

    Args:
        model, optimizer, train, test: all on ``backend``.
        batch_size: of training.
        backend: any.
        reason: why it is by layers, where another engine had been wanted.
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
        reason: str = "",
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.train, self.test = train, test
        self.batch_size, self.backend = batch_size, backend
        self.description = f"by layers ({reason})" if reason else "by layers"

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on these examples, batch by batch; see `npbn.engine.Engine`."""
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
    """Run a split in prediction mode, batch by batch; the mode of every layer is kept."""
    for x, labels in split.batches(batch_size, dtype):
        with modes_kept(model):
            model.eval()
            logits = model.forward(x)
        loss, _ = F.softmax_cross_entropy(logits, labels)
        yield Result(int(labels.shape[0]), loss, count_correct(logits, labels))


def count_correct(logits: Array, labels: Array) -> Array:
    """Return how many of the largest logits are at the labels; stays on the device."""
    xp = array_api_compat.array_namespace(logits)
    return xp.count_nonzero(xp.argmax(logits, axis=1) == labels)
