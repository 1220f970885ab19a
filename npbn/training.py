"""Train a model for some epochs, evaluate it, and return the metrics of each epoch.

Nothing here prints or writes files: `npbn.commands.train` does.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import distributed, inspection
from npbn.backend import Backend, to_numpy
from npbn.data import Split
from npbn.engine import Engine, Result
from npbn.engine.layers import EVALUATION_BATCH_SIZE, predict
from npbn.errors import DataError, NonFiniteError
from npbn.functional.arrays import common_library
from npbn.layers import Layer, Sequential, dtype_of, modes_kept
from npbn.optim import SGD


@dataclass(frozen=True)
class Metrics:
    """The metrics of a pass over a split.

    Attributes:
        loss: the mean cross-entropy of an example, in nats.
        accuracy: the fraction of examples whose largest logit is the logit of the label.
        examples: the number of examples in the pass.
        seconds: the wall time of the pass, until the device had finished.
    """

    loss: float
    accuracy: float
    examples: int
    seconds: float


@dataclass(frozen=True)
class Epoch:
    """The metrics of one epoch.

    Attributes:
        number: the number of the epoch; the first epoch is 1.
        step: the number of steps of the optimizer so far.
        lr: the learning rate of the last step.
        train: the metrics on the training split, averaged over the epoch *while* the parameters
            changed.
        test: the metrics on the test split after the epoch, in prediction mode. This is None if
            the epoch was not evaluated.
        skipped: the number of training examples that were left out, 0 or 1. If the last batch had
            only one example, it is left out, because batch norm has no variance there.
    """

    number: int
    step: int
    lr: float
    train: Metrics
    test: Metrics | None
    skipped: int


def left_out(examples: int, batch_size: int) -> int:
    """Return the number of examples that an epoch skips, which is 0 or 1.

    It is 1 if the last batch would have only one example.
    """
    return 1 if batch_size > 1 and examples % batch_size == 1 else 0


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of batches in an epoch, not counting a skipped example."""
    return _batches(examples - left_out(examples, batch_size), batch_size)


def _batches(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)  # This rounds up.


@functools.lru_cache(maxsize=2)  # The cache has the orders of the current and the next epoch.
def _permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Return the order of the examples in an epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    order.flags.writeable = False
    return order


class _Totals:
    """The sums of loss and correct predictions over a pass.

    `add` only keeps what an engine returns, whose numbers may still be on the device. `read` waits
    for the device and adds these numbers to the sums, in the order of the batches.
    """

    def __init__(
        self, loss: float = 0.0, correct: int = 0, examples: int = 0, seconds: float = 0.0
    ) -> None:
        self.loss = loss
        self.correct = correct
        self.examples = examples
        self.started = time.perf_counter() - seconds
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Add the result of one batch or of several batches, without waiting for the device."""
        self.results.append(result)

    def read(self) -> dict[str, Any]:
        """Return the sums so far, for JSON. This waits for the device."""
        for result in self.results:
            self.loss += result.examples * float(result.loss)
            self.correct += int(result.correct)
            self.examples += result.examples
        self.results.clear()
        return {
            "loss": self.loss,
            "correct": self.correct,
            "examples": self.examples,
            "seconds": time.perf_counter() - self.started,
        }

    def metrics(self) -> Metrics:
        """Return the mean loss and accuracy so far. This waits for the device."""
        sums = self.read()
        n = sums["examples"] or math.nan
        return Metrics(sums["loss"] / n, sums["correct"] / n, sums["examples"], sums["seconds"])


def _metrics(results: Iterable[Result]) -> Metrics:
    totals = _Totals()
    for result in results:
        totals.add(result)
    return totals.metrics()


def evaluate(
    model: Layer,
    split: Split,
    *,
    dtype: Any = "float32",
    batch_size: int = EVALUATION_BATCH_SIZE,
) -> Metrics:
    """Return the metrics of a model on a split, in prediction mode, computed by layers.

    Afterwards, every layer is in the same mode as before.
    """
    return _metrics(predict(model, split, dtype=dtype, batch_size=batch_size))


def _count_outputs(model: Layer, split: Split) -> int:
    """Return the number of classes that a model tells apart."""
    with modes_kept(model):
        model.eval()
        x, _ = next(split.batches(1, dtype_of(model)))
        return int(model.forward(x).shape[1])


def _check_labels(name: str, split: Split, classes: int) -> None:
    """Raise an error if a label is not from 0 to ``classes`` - 1.

    Raises:
        DataError: the message names the first such label and its place.
    """
    labels = to_numpy(split.labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"expected labels from 0 to {classes - 1}, got {labels[wrong[0]]} for {name} image "
            f"{wrong[0]}"
        )


class Training:
    """The state of a training run: model, optimizer, data, engine, and the progress so far.

    The order of the examples in an epoch depends only on ``seed`` and the number of the epoch. So
    every engine on every backend sees the same batches.

    A run can be stopped after every batch, by an exception in ``on_batch``. If its `state` is saved
    and loaded into another training, this training goes on as if the run had not been stopped, to
    the last bit.

    If the model is in training mode and one of its batch norms is in prediction mode, this batch
    norm stays in prediction mode and is not trained.

    Args:
        model, optimizer, train, test: the model, its optimizer, the training split and the test
            split, all on ``backend``.
        engine: the engine that trains and evaluates the model, from `npbn.engine.build` with the
            same ``batch_size``.
        batch_size: the number of examples in a batch. A last batch of one example is left out,
            unless the batch size is 1.
        seed: the seed of the order of the examples, at least 0.
        backend: the backend, from `npbn.backend.get_backend`.
        precise_bn: whether the moving averages of batch norm are replaced by the statistics of the
            training split before each evaluation (`npbn.inspection.precise_statistics`).
        group: the processes that train together, which is that of the engine. By default, this
            process is alone.

    Raises:
        ValueError: the batch size is less than 1, or a split has too few examples.
        DataError: a label is not that of an output of the model.
        TypeError: the data is not on ``backend``.

    Attributes:
        epoch: the number of finished epochs.
        batch: the number of finished batches in the current epoch.
        best: the best test accuracy so far; -1 before the first evaluation.
    """

    def __init__(
        self,
        model: Sequential,
        optimizer: SGD,
        train: Split,
        test: Split,
        *,
        engine: Engine,
        batch_size: int,
        seed: int,
        backend: Backend,
        precise_bn: bool = False,
        group: distributed.Group = distributed.ALONE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        if len(train) == left_out(len(train), batch_size):
            raise ValueError(f"expected at least 2 training examples, got {len(train)}")
        if len(test) == 0:
            raise ValueError("expected at least 1 test example, got 0")
        common_library(train=train.images, test=test.images, backend=backend.xp.asarray(0))
        classes = _count_outputs(model, train)
        _check_labels("training", train, classes)
        _check_labels("test", test, classes)
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self.engine = engine
        self.batch_size = batch_size
        self.seed = seed
        self.backend = backend
        self.precise_bn = precise_bn
        self.group = group
        self.epoch = 0
        self.batch = 0
        self.best = -1.0
        self._totals: _Totals | None = None  # the sums of the current epoch

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
        """Train until one of three limits is reached: epochs, steps or test accuracy.

        Args:
            epochs: the limit for the number of epochs, counted from the start of the run.
            max_steps: the limit for the number of steps of the optimizer, counted from the start of
                the run. It may end an epoch early.
            eval_every: the number of epochs from one evaluation to the next. The last epoch is
                always evaluated.
            target_accuracy: the test accuracy that ends the training.
            on_batch: a function that is called after each batch with the number of its examples. If
                the engine runs several batches together, it is called after these. The function
                must not wait for the device.
            on_epoch: a function that is called after each epoch with its metrics.

        Raises:
            NonFiniteError: the training loss or the test loss is NaN or infinite. The state of the
                training cannot be used any more.
            BackendError: the device failed. The state of the training is lost.
            DistributedError: the ranks of the group have different states.
        """
        with self.backend.explaining_failures():
            while (
                self.epoch < epochs
                and self.optimizer.steps < max_steps
                and self.best < target_accuracy
            ):
                distributed.agree(self.group, self._digest)
                train = self._train(max_steps, on_batch)
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
                self.group.rest()
                if on_epoch is not None:
                    on_epoch(Epoch(self.epoch, steps, lr, train, test, skipped))

    def _train(self, max_steps: float, on_batch: Callable[[int], None] | None) -> Metrics:
        """Train to the end of the current epoch, or until ``max_steps`` steps are done in all."""
        if not self.model.training:
            self.model.train()
        if self._totals is None:
            self._totals = _Totals()
        order = self._order()
        steps = min(max_steps - self.optimizer.steps, _batches(len(order), self.batch_size))
        for result in self.engine.steps(order[: int(steps) * self.batch_size]):
            self._totals.add(result)
            self.batch += _batches(result.examples, self.batch_size)
            if on_batch is not None:
                on_batch(result.examples)
        # While a GPU computes: the metrics wait for it.
        _permutation(self.seed, self.epoch + 1, len(self.train))
        metrics = self._totals.metrics()
        self.epoch, self.batch, self._totals = self.epoch + 1, 0, None
        return metrics

    def _evaluate(self) -> Metrics:
        if self.precise_bn:
            self.model.load_state_dict(self.group.broadcast(self._precise_state))
        return _metrics(self.engine.evaluate())

    def _precise_state(self) -> dict[str, np.ndarray]:
        inspection.precise_statistics(
            self.model, self.train, dtype=dtype_of(self.model), batch_size=self.batch_size
        )
        return self.model.state_dict()

    def _digest(self) -> dict[str, str]:
        """Return a digest of the state, which must be equal on all ranks."""
        digest = hashlib.sha256(repr((self.epoch, self.batch, self.optimizer.steps)).encode())
        for _, value in sorted(self.model.state_dict().items()):
            digest.update(value.tobytes())
        for _, velocity in sorted(self.optimizer.velocity.items()):
            digest.update(to_numpy(velocity).tobytes())
        return {"state": digest.hexdigest()}

    def _order(self) -> np.ndarray:
        """Return the examples of the current epoch's remaining batches, in their order."""
        order = _permutation(self.seed, self.epoch, len(self.train))
        end = len(order) - left_out(len(order), self.batch_size)
        return order[self.batch * self.batch_size : end]

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the state from which the run can go on: arrays by name, and a record for JSON.

        Raises:
            NonFiniteError: an array or the loss contains NaN or infinity.
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
        }
        return arrays, record

    def load_state(self, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Take over the `state` of a run with the same model and settings, from any backend.

        Raises:
            ValueError: the state belongs to another model, is incomplete, or was written by an
                older npbn.
        """
        if "generator" in record:
            raise ValueError(
                "it was written by an older npbn, which drew the order of the examples otherwise; "
                "its training cannot go on"
            )
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "velocity": {}}
        for name, value in arrays.items():
            kind, _, rest = name.partition(".")
            if kind not in parts or (kind == "velocity" and rest not in self.optimizer.parameters):
                raise ValueError(f"expected arrays of model and velocity, got {name}")
            parts[kind][rest] = value
        self.model.load_state_dict(parts["model"])
        dtype = dtype_of(self.model)
        self.optimizer.velocity = {
            name: self.backend.asarray(np.array(value), dtype)
            for name, value in parts["velocity"].items()
        }
        self.optimizer.steps = record["step"]
        self.epoch, self.batch, self.best = record["epoch"], record["batch"], record["best"]
        totals = record["totals"]
        self._totals = None if totals is None else _Totals(**totals)

    def locate_non_finite(self) -> str:
        """Repeat the current epoch with the layers engine until the first NaN or infinity.

        Returns:
            A text that says in which step and in which array NaN or infinity appears first, and
            which losses came before. If none appears, the text says so.
        """
        losses: list[float] = []
        dtype, order = dtype_of(self.model), self.backend.asarray(self._order())
        for x, labels in self.train.batches(self.batch_size, dtype, order=order):
            where, loss = inspection.first_non_finite(self.model, x, labels)
            if where:
                before = ", ".join(f"{value:.3g}" for value in losses[-3:])
                return f"step {self.optimizer.steps + 1}: {where}" + (
                    f" (losses before: {before})" if before else ""
                )
            losses.append(loss)
            self.optimizer.step()
        return "no step of the epoch: the parameters after it, or batch norm's moving averages"
