"""The training loop: epochs, metrics, evaluation. It knows no terminal and no file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import functional as F
from npbn.backend import Backend
from npbn.data import Split
from npbn.functional._arrays import Array
from npbn.layers import Layer, self_and_descendants
from npbn.optim import SGD

EVALUATION_BATCH_SIZE = 256
"""Larger batches are no faster on a CPU: they fall out of its cache."""


@dataclass(frozen=True)
class Metrics:
    """What a pass over a split found.

    Attributes:
        loss: mean cross-entropy per example, in nats.
        accuracy: fraction of examples whose largest logit is the right one.
        examples: how many examples that is the mean of.
        seconds: wall time of the pass, until the device had finished.
    """

    loss: float
    accuracy: float
    examples: int
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """What one epoch found.

    Attributes:
        number: from 1.
        train: averaged over the epoch *while* the parameters changed.
        test: after it, in prediction mode.
        skipped: examples of a last batch of one, left out because batch norm over one example has
            no variance and teaches nothing.
    """

    number: int
    train: Metrics
    test: Metrics
    skipped: int


def left_out(examples: int, batch_size: int) -> int:
    """How many examples an epoch skips: one, if it would be a last batch of its own."""
    return 1 if batch_size > 1 and examples % batch_size == 1 else 0


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches an epoch has, what it skips left aside."""
    return math.ceil((examples - left_out(examples, batch_size)) / batch_size)


class _Totals:
    """Sums of loss and hits, kept on the device: reading them is what stops a GPU."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.loss = backend.xp.zeros((), dtype=backend.xp.float64)
        self.hits = backend.xp.zeros((), dtype=backend.xp.int64)
        self.examples = 0
        self.started = time.perf_counter()

    def add(self, loss: Array, logits: Array, labels: Array) -> None:
        xp, n = self.backend.xp, logits.shape[0]
        self.loss = self.loss + n * xp.astype(xp.asarray(loss), xp.float64)
        self.hits = self.hits + xp.count_nonzero(xp.argmax(logits, axis=1) == labels)
        self.examples += n

    def metrics(self) -> Metrics:
        """The means; waits for the device."""
        n = self.examples or math.nan
        loss, accuracy = float(self.loss) / n, int(self.hits) / n
        return Metrics(loss, accuracy, self.examples, time.perf_counter() - self.started)


def train_epoch(
    model: Layer,
    optimizer: SGD,
    split: Split,
    *,
    batch_size: int,
    generator: np.random.Generator,
    backend: Backend,
    dtype: Any = "float32",
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Metrics, int]:
    """One pass over ``split`` in random order, a step of the optimizer for each batch.

    Args:
        model, optimizer, split: all on ``backend``; every layer is switched to training mode.
        batch_size: a last batch of a single example is left out, unless every batch is one.
        generator: draws the order, on the host, so that every backend sees the same batches.
        dtype: of the model's arrays.
        on_batch: called after each batch with the number of its examples; must not wait for the
            device.

    Returns:
        The metrics, and how many examples were left out.
    """
    model.train()
    order = generator.permutation(len(split))
    skipped = left_out(len(order), batch_size)
    device_order = backend.asarray(order[: len(order) - skipped])
    totals = _Totals(backend)
    for x, labels in split.batches(batch_size, dtype, order=device_order):
        logits = model.forward(x)
        loss, cache = F.softmax_cross_entropy(logits, labels)
        model.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
        totals.add(loss, logits, labels)
        if on_batch is not None:
            on_batch(int(labels.shape[0]))
    return totals.metrics(), skipped


def evaluate(
    model: Layer,
    split: Split,
    *,
    backend: Backend,
    dtype: Any = "float32",
    batch_size: int = EVALUATION_BATCH_SIZE,
) -> Metrics:
    """Loss and accuracy on ``split`` in prediction mode; every layer's own mode is kept."""
    modes = [(layer, layer.training) for layer in self_and_descendants(model)]
    model.eval()
    totals = _Totals(backend)
    try:
        for x, labels in split.batches(batch_size, dtype):
            logits = model.forward(x)
            loss, _ = F.softmax_cross_entropy(logits, labels)
            totals.add(loss, logits, labels)
    finally:
        for layer, mode in modes:
            layer.training = mode
    return totals.metrics()


def fit(
    model: Layer,
    optimizer: SGD,
    train: Split,
    test: Split,
    *,
    epochs: int,
    batch_size: int,
    generator: np.random.Generator,
    backend: Backend,
    dtype: Any = "float32",
    on_batch: Callable[[int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train for some epochs, evaluating after each.

    Arguments are those of `train_epoch`; ``on_epoch`` is called with each epoch's record.
    """
    history = []
    for number in range(1, epochs + 1):
        metrics, skipped = train_epoch(
            model,
            optimizer,
            train,
            batch_size=batch_size,
            generator=generator,
            backend=backend,
            dtype=dtype,
            on_batch=on_batch,
        )
        found = evaluate(model, test, backend=backend, dtype=dtype)
        epoch = Epoch(number, metrics, found, skipped)
        history.append(epoch)
        if on_epoch is not None:
            on_epoch(epoch)
    return history
