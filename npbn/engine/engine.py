"""The engine: a model planned once, then stepped."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from npbn.data import Split
from npbn.engine.numpy_stages import Array, ConvStage, LinearStage
from npbn.engine.plan import ConvBlock, plan
from npbn.engine.team import Team
from npbn.layers import Sequential
from npbn.optim import SGD

PIECE = 128
"""Examples that a worker predicts at once: their arrays fit its cache."""


class Engine:
    """A model with its optimizer, planned for images of one size.

    Parameters, gradients and moving averages are those of the layers, changed in place: step with
    the engine, look with the layers.

    Args:
        model: on NumPy.
        optimizer: of its parameters.
        input_shape: of an image, (C, H, W).
        workers: threads, each with its part of every batch. Sums are put together in their order,
            so the last bits of a result depend on their number, and on nothing else.

    Raises:
        UnsupportedError: the model has a layer for which there is no stage.
    """

    def __init__(
        self, model: Sequential, optimizer: SGD, input_shape: tuple[int, ...], *, workers: int
    ) -> None:
        self.blocks = plan(model, input_shape)
        self.optimizer = optimizer
        self.dtype = next(iter(model.parameters().values())).data.dtype
        self.team = Team(workers)
        self._parts: dict[tuple[int, tuple[int, ...]], Part] = {}

    def step(self, split: Split, indices: Array) -> tuple[float, int]:
        """A step of the optimizer on these examples: their mean loss, and how many were right."""
        n = len(indices)
        workers = min(self.team.size, n)
        sizes = tuple(n // workers + (k < n % workers) for k in range(workers))
        ends = np.cumsum((0, *sizes))

        def work(worker: int) -> tuple[float, int]:
            mine = indices[ends[worker] : ends[worker + 1]]
            return self._part(worker, sizes).train(split, mine)

        found = self.team.run(work, workers)
        parts = [self._part(worker, sizes).stages for worker in range(workers)]
        for stages in zip(*parts, strict=True):
            stages[0].set_gradients(stages)
        self.optimizer.step()
        return math.fsum(loss for loss, _ in found) / n, sum(hits for _, hits in found)

    def evaluate(self, split: Split) -> tuple[float, int]:
        """Mean loss in prediction mode, and how many were right."""
        starts = range(0, len(split), PIECE)
        workers = min(self.team.size, len(starts))

        def work(worker: int) -> list[tuple[float, int]]:
            found = []
            for start in starts[worker::workers]:
                mine = np.arange(start, min(start + PIECE, len(split)))
                sizes = (0,) * worker + (len(mine),)
                found.append(self._part(worker, sizes).predict(split, mine))
            return found

        found = [each for several in self.team.run(work, workers) for each in several]
        return math.fsum(loss for loss, _ in found) / len(split), sum(hits for _, hits in found)

    def _part(self, worker: int, sizes: tuple[int, ...]) -> Part:
        """What a worker does where the workers have so many examples each; kept."""
        key = (worker, sizes)
        if key not in self._parts:
            self._parts[key] = Part(self, worker, sizes)
        return self._parts[key]


class Part:
    """One worker's part of the batch: its stages, one writing into the next."""

    def __init__(self, engine: Engine, worker: int, sizes: tuple[int, ...]) -> None:
        n, self.total = sizes[worker], sum(sizes)
        share = np.array([size / self.total for size in sizes], engine.dtype)
        self.stages: list[Any] = []
        for i, block in enumerate(engine.blocks):
            kind: Any = ConvStage if isinstance(block, ConvBlock) else LinearStage
            self.stages.append(
                kind(
                    block,
                    n,
                    self.total,
                    engine.dtype,
                    first=i == 0,
                    share=share,
                    exchange=functools.partial(self._exchange, engine.team, i, worker),
                    leader=worker == 0,
                )
            )
        self.logits = np.empty(self.stages[-1].output, engine.dtype)
        targets = [stage.x for stage in self.stages[1:]] + [self.logits]
        self.outputs = [
            target.reshape(stage.output) for stage, target in zip(self.stages, targets, strict=True)
        ]
        self.x = self.stages[0].x
        self.pixels = np.empty((n, math.prod(self.x.shape[:-1])), np.uint8)

    @staticmethod
    def _exchange(team: Team, stage: int, worker: int, what: str, found: Array) -> Array:
        return team.exchange((stage, what), worker, found)

    def train(self, split: Split, indices: Array) -> tuple[float, int]:
        """Forward and backward: the sum of the losses, and hits; gradients stay in the stages."""
        self._load(split.images, indices)
        for stage, output in zip(self.stages, self.outputs, strict=True):
            stage.forward(output)
        loss, hits, dy = self._loss(split.labels[indices])
        for stage in reversed(self.stages):
            dy = stage.backward(dy.reshape(stage.output))
        return loss, hits

    def predict(self, split: Split, indices: Array) -> tuple[float, int]:
        self._load(split.images, indices)
        for stage, output in zip(self.stages, self.outputs, strict=True):
            stage.predict(output)
        loss, hits, _ = self._loss(split.labels[indices])
        return loss, hits

    def _load(self, images: Array, indices: Array) -> None:
        """The pixels of some images, from 0 to 1, batch last."""
        np.take(images.reshape(len(images), -1), indices, axis=0, out=self.pixels, mode="clip")
        np.divide(self.pixels.T.reshape(self.x.shape), 255, out=self.x, dtype=self.x.dtype)

    def _loss(self, labels: Array) -> tuple[float, int, Array]:
        """Softmax cross-entropy: the sum, hits, and the gradient of the batch's mean."""
        z = self.logits
        hits = int(np.count_nonzero(z.argmax(axis=0) == labels))
        one_hot = np.arange(len(z))[:, None] == labels
        z -= z.max(axis=0)
        p = np.exp(z)
        sums = p.sum(axis=0)
        # A label out of range has no logit: its loss is NaN, as in npbn.functional.
        target = np.where(one_hot.any(axis=0), (z * one_hot).sum(axis=0), np.nan)
        loss = float(np.sum(np.log(sums) - target, dtype=np.float64))
        p /= sums
        p -= one_hot
        p /= self.total
        return loss, hits, p
