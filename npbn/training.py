"""The training loop: epochs, metrics, evaluation. It knows no terminal and no file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn import inspection
from npbn.backend import Backend, to_numpy
from npbn.data import Split
from npbn.engine import Engine
from npbn.engine.cupy_stages import CupyEngine
from npbn.errors import NonFiniteError
from npbn.functional._arrays import Array, common_library
from npbn.layers import Layer, Sequential, modes_kept
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
        step: how many steps of the optimizer there have been.
        lr: the learning rate of the last of them.
        train: averaged over the epoch *while* the parameters changed.
        test: after it, in prediction mode; None where that was not asked for.
        skipped: examples of a last batch of one, left out because batch norm over one example has
            no variance and teaches nothing.
    """

    number: int
    step: int
    lr: float
    train: Metrics
    test: Metrics | None
    skipped: int


def left_out(examples: int, batch_size: int) -> int:
    """How many examples an epoch skips: one, if it would be a last batch of its own."""
    return 1 if batch_size > 1 and examples % batch_size == 1 else 0


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """How many batches an epoch has, what it skips left aside."""
    return -(-(examples - left_out(examples, batch_size)) // batch_size)  # rounded up


class _Totals:
    """Sums of loss and hits, kept on the device: reading them is what stops a GPU."""

    def __init__(
        self,
        backend: Backend,
        loss: float = 0.0,
        hits: int = 0,
        examples: int = 0,
        seconds: float = 0.0,
    ) -> None:
        self.backend = backend
        self.loss = backend.xp.asarray(loss, dtype=backend.xp.float64)
        self.hits = backend.xp.asarray(hits, dtype=backend.xp.int64)
        self.examples = examples
        self.started = time.perf_counter() - seconds

    def add(self, n: int, loss: Any, hits: Any) -> None:
        """A batch of n examples: its mean loss, and how many were right."""
        xp = self.backend.xp
        self.loss = self.loss + n * xp.astype(xp.asarray(loss), xp.float64)
        self.hits = self.hits + hits
        self.examples += n

    def read(self) -> dict[str, Any]:
        """The sums, as arguments of a new one; waits for the device."""
        return {
            "loss": float(self.loss),
            "hits": int(self.hits),
            "examples": self.examples,
            "seconds": time.perf_counter() - self.started,
        }

    def metrics(self) -> Metrics:
        """The means; waits for the device."""
        sums = self.read()
        n = sums["examples"] or math.nan
        return Metrics(sums["loss"] / n, sums["hits"] / n, sums["examples"], sums["seconds"])


def evaluate(
    model: Layer,
    split: Split,
    *,
    backend: Backend,
    dtype: Any = "float32",
    batch_size: int = EVALUATION_BATCH_SIZE,
) -> Metrics:
    """Loss and accuracy on ``split`` in prediction mode; every layer's own mode is kept."""
    totals = _Totals(backend)
    with modes_kept(model):
        model.eval()
        for x, labels in split.batches(batch_size, dtype):
            logits = model.forward(x)
            loss, _ = F.softmax_cross_entropy(logits, labels)
            totals.add(labels.shape[0], loss, hits(logits, labels))
    return totals.metrics()


def hits(logits: Array, labels: Array) -> Array:
    """How many of the largest logits are at the labels; stays on the device."""
    xp = array_api_compat.array_namespace(logits)
    return xp.count_nonzero(xp.argmax(logits, axis=1) == labels)


class Training:
    """A training run: what is trained, on what, and how far it has come.

    After every batch it can be stopped (by an exception in ``on_batch``), its `state` saved and
    loaded into another one: that goes on as if nothing had happened, to the last bit.

    Args:
        model, optimizer, train, test: all on ``backend``.
        batch_size: a last batch of a single example is left out, unless every batch is one.
        generator: draws the order of each epoch, on the host, so that every backend sees the same
            batches. Nobody else may draw from it as long as training goes on.
        dtype: of the model's arrays.
        engine: what trains and evaluates in place of the layers, planned for ``model`` and
            ``optimizer``; one for the GPU, for the data and ``batch_size``, too.
        precise_bn: before each evaluation, replace batch norm's moving averages by the statistics
            of the training split (`npbn.inspection.precise_statistics`).

    Raises:
        ValueError: no batch size, or nothing to train on or to test on.
        TypeError: data that is not on ``backend``.

    Attributes:
        epoch: how many are done.
        batch: how many batches of the epoch that is under way are done.
        best: the best test accuracy so far; -1 before the first.
    """

    def __init__(
        self,
        model: Sequential,
        optimizer: SGD,
        train: Split,
        test: Split,
        *,
        batch_size: int,
        generator: np.random.Generator,
        backend: Backend,
        dtype: Any = "float32",
        engine: Engine | CupyEngine | None = None,
        precise_bn: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        if len(train) == left_out(len(train), batch_size):
            raise ValueError(f"expected at least 2 training examples, got {len(train)}")
        if len(test) == 0:
            raise ValueError("expected at least 1 test example, got 0")
        common_library(train=train.images, test=test.images, backend=backend.xp.asarray(0))
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self.batch_size = batch_size
        self.generator = generator
        self.backend = backend
        self.dtype = dtype
        self.engine = engine
        self.precise_bn = precise_bn
        self.epoch = 0
        self.batch = 0
        self.best = -1.0
        self._totals: _Totals | None = None  # of the epoch that is under way
        # Before the order of the epoch was drawn, so that it can be drawn once more.
        self._generator_state = generator.bit_generator.state

    def run(
        self,
        epochs: int,
        *,
        max_steps: float = math.inf,
        eval_every: int = 1,
        target_accuracy: float = math.inf,
        on_batch: Callable[[int], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> None:
        """Train on, until any of three things is reached.

        Args:
            epochs: how many there are to be, those done already included.
            max_steps: of the optimizer, likewise; it may cut the last epoch short.
            eval_every: how many epochs to an evaluation; the last epoch is evaluated, too.
            target_accuracy: test accuracy that is enough.
            on_batch: called with the number of its examples after each batch, or after as many as
                a GPU's engine launches at a time; must not wait for the device.
            on_epoch: called after each epoch with what it found.

        Raises:
            NonFiniteError: loss, or a test loss, is NaN or infinite. The state is spoilt then.
            BackendError: the GPU failed. There is no state any more.
        """
        with self.backend.explaining_failures():
            while (
                self.epoch < epochs
                and self.optimizer.steps < max_steps
                and self.best < target_accuracy
            ):
                for examples in self._steps(max_steps):
                    if on_batch is not None:
                        on_batch(examples)
                assert self._totals is not None
                train = self._totals.metrics()
                self.epoch, self.batch, self._totals = self.epoch + 1, 0, None
                self._generator_state = self.generator.bit_generator.state
                steps = self.optimizer.steps
                test = None
                if self.epoch % eval_every == 0 or self.epoch == epochs or steps >= max_steps:
                    test = self._evaluate()
                if not math.isfinite(train.loss + (0.0 if test is None else test.loss)):
                    raise NonFiniteError(f"in epoch {self.epoch}, the loss became NaN or infinite")
                if test is not None:
                    self.best = max(self.best, test.accuracy)
                lr = self.optimizer.schedule(steps - 1)
                skipped = left_out(len(self.train), self.batch_size)
                if on_epoch is not None:
                    on_epoch(Epoch(self.epoch, steps, lr, train, test, skipped))

    def step(self, indices: Array) -> tuple[Any, Any]:
        """One step of the optimizer on these training examples: mean loss, and how many hits.

        By the layers, where the engine is one that takes many steps at a time.
        """
        if isinstance(self.engine, Engine):
            return self.engine.step(self.train, indices)
        x, labels = self._batch(indices)
        logits = self.model.forward(x)
        loss, cache = F.softmax_cross_entropy(logits, labels)
        self.model.backward(F.softmax_cross_entropy_backward(cache))
        self.optimizer.step()
        return loss, hits(logits, labels)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything that is needed to go on: arrays by name, and what JSON can hold.

        Raises:
            NonFiniteError: something in it is NaN or infinite: there is nothing to go on from.
        """
        arrays = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        arrays |= {f"velocity.{n}": to_numpy(v) for n, v in self.optimizer.velocity.items()}
        totals = None if self._totals is None else self._totals.read()
        loss = 0.0 if totals is None else totals["loss"]
        if not all(np.all(np.isfinite(value)) for value in (loss, *arrays.values())):
            raise NonFiniteError(
                f"after step {self.optimizer.steps}, the loss or the state is NaN or infinite"
            )
        record = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.optimizer.steps,
            "best": self.best,
            "totals": totals,
            "generator": self._generator_state,
        }
        return arrays, record

    def load_state(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Go on from a `state`, of the same model and settings, on whatever backend it was.

        Raises:
            ValueError: it is of another model, or incomplete.
        """
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "velocity": {}}
        for name, value in arrays.items():
            kind, _, rest = name.partition(".")
            if kind not in parts or (kind == "velocity" and rest not in self.optimizer.parameters):
                raise ValueError(f"expected arrays of model and velocity, got {name}")
            parts[kind][rest] = value
        self.model.load_state_dict(parts["model"])
        self.optimizer.velocity = {
            name: self.backend.asarray(np.array(value), self.dtype)
            for name, value in parts["velocity"].items()
        }
        self.optimizer.steps = record["step"]
        self.epoch, self.batch, self.best = record["epoch"], record["batch"], record["best"]
        self._generator_state = record["generator"]
        totals = record["totals"]
        self._totals = None if totals is None else _Totals(self.backend, **totals)

    def locate_non_finite(self) -> str:
        """Do the epoch that is under way over, through the layers, up to the first NaN or infinity.

        Returns:
            At which step and where it appears, and what the losses before were. If it does not
            appear, the model is at the end of the epoch.
        """
        losses: list[float] = []
        for indices in self._batches():
            where, loss = inspection.first_non_finite(self.model, *self._batch(indices))
            if where:
                before = ", ".join(f"{value:.3g}" for value in losses[-3:])
                return f"step {self.optimizer.steps + 1}: {where}" + (
                    f" (losses before: {before})" if before else ""
                )
            losses.append(loss)
            self.optimizer.step()
        return "no step of the epoch: the parameters after it, or batch norm's moving averages"

    def _order(self) -> np.ndarray:
        """The examples of those batches of the epoch under way that are not done yet."""
        self.generator.bit_generator.state = self._generator_state
        order = self.generator.permutation(len(self.train))
        end = len(order) - left_out(len(order), self.batch_size)
        return order[self.batch * self.batch_size : end]

    def _batches(self) -> Iterator[Array]:
        """The same, a batch at a time, on the device."""
        order = self.backend.asarray(self._order())
        count = order.shape[0]
        for start in range(0, count, self.batch_size):
            yield order[start : min(start + self.batch_size, count)]

    def _batch(self, indices: Array) -> tuple[Array, Array]:
        return next(self.train.batches(indices.shape[0], self.dtype, order=indices))

    def _steps(self, max_steps: float) -> Iterator[int]:
        """Train to the end of the epoch; how many examples at a time."""
        self.model.train()
        if self._totals is None:
            self._totals = _Totals(self.backend)
        for n, loss, hits in self._results(max_steps):
            self._totals.add(n, loss, hits)
            self.batch += -(-n // self.batch_size)  # several, perhaps, and the last one smaller
            yield n

    def _results(self, max_steps: float) -> Iterator[tuple[int, Any, Any]]:
        """The same; examples, mean loss and hits of each batch, or of each launch on a GPU."""
        if isinstance(self.engine, CupyEngine):
            order = self._order()
            most = (max_steps - self.optimizer.steps) * self.engine.batch_size
            yield from self.engine.steps(order[: min(most, len(order))])
            return
        for indices in self._batches():
            if self.optimizer.steps >= max_steps:
                break
            yield int(indices.shape[0]), *self.step(indices)

    def _evaluate(self) -> Metrics:
        if self.precise_bn:
            inspection.precise_statistics(
                self.model, self.train, dtype=self.dtype, batch_size=self.batch_size
            )
        if self.engine is None:
            return evaluate(self.model, self.test, backend=self.backend, dtype=self.dtype)
        totals = _Totals(self.backend)
        if isinstance(self.engine, CupyEngine):
            found = self.engine.evaluate()
        else:
            found = self.engine.evaluate(self.test)
        totals.add(len(self.test), *found)
        return totals.metrics()
