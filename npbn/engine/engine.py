"""The engine: a model planned once, then stepped."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import threadpoolctl

from npbn.data import Split
from npbn.engine.numpy_stages import Array
from npbn.engine.plan import plan, without_caches
from npbn.engine.shard import BUFFER, Follower, Shard, layouts, parameters
from npbn.engine.team import Team, start_workers
from npbn.layers import Sequential
from npbn.optim import SGD

ROUND = 1024
"""Examples that a worker is given to predict at a time."""


class Engine:
    """A model with its optimizer, planned for images of one size.

    Parameters, gradients and moving averages are those of the layers, changed in place: step with
    the engine, look with the layers.

    Args:
        model: on NumPy.
        optimizer: of its parameters.
        input_shape: of an image, (C, H, W).
        workers: processes, this one counted, each with its part of every batch. Sums are put
            together in their order, so the last bits of a result depend on their number, and on
            nothing else.

    Raises:
        UnsupportedError: the model has a layer for which there is no stage.
    """

    def __init__(
        self, model: Sequential, optimizer: SGD, input_shape: tuple[int, ...], *, workers: int
    ) -> None:
        if workers < 1:
            raise ValueError(f"expected at least 1 worker, got {workers}")
        self.blocks = plan(model, input_shape)
        self.optimizer = optimizer
        self.workers = workers
        # `proxy`: a method would refer to this engine, which would then wait for the collector.
        exchange = functools.partial(Engine._exchange, weakref.proxy(self))
        self.shard = Shard(self.blocks, 0, exchange)
        self._blas = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
        self._parameters = list(parameters(self.blocks))
        self._team: Team | None = None
        self._capacity = 0
        start_workers(workers - 1)

    def step(self, split: Split, indices: Array) -> tuple[float, int]:
        """A step of the optimizer on these examples: their mean loss, and how many were right."""
        n = len(indices)
        workers = min(self.workers, n)
        sizes = tuple(n // workers + (k < n % workers) for k in range(workers))
        ends = list(itertools.accumulate(sizes))
        parts = [indices[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        with self._computing():
            self._ask("train", split, parts[1:], sizes)
            found = [self.shard.train(sizes, *_examples(split, parts[0]))]
            found += self._answers()
            self._set_gradients(workers)
        self.optimizer.step()
        return math.fsum(loss for loss, _ in found) / n, sum(hits for _, hits in found)

    def evaluate(self, split: Split) -> tuple[float, int]:
        """Mean loss in prediction mode, and how many were right."""
        found = []
        with self._computing():
            for start in range(0, len(split), ROUND * self.workers):
                some = np.arange(start, min(start + ROUND * self.workers, len(split)))
                parts = np.array_split(some, min(self.workers, len(some)))
                self._ask("predict", split, parts[1:])
                found.append(self.shard.predict(*_examples(split, parts[0])))
                found += self._answers()
        return math.fsum(loss for loss, _ in found) / len(split), sum(hits for _, hits in found)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """BLAS on one thread, and NumPy's buffer small; if anything fails, the team goes."""
        threads = [library.get_num_threads() for library in self._blas]
        size = np.setbufsize(BUFFER)
        try:
            for library in self._blas:
                library.set_num_threads(1)
            yield
        except BaseException:  # Ctrl-C, too, leaves the others in the middle of something
            if self._team is not None:
                self._team.dissolve()
                self._team = None
            raise
        finally:
            for library, number in zip(self._blas, threads, strict=True):
                library.set_num_threads(number)
            np.setbufsize(size)

    def _exchange(self, found: Array, workers: int) -> Any:
        if self._team is None or workers == 1:
            return found[None].copy()
        return self._team.exchange(found, workers)

    def _ask(self, method: str, split: Split, parts: list[Array], *arguments: Any) -> None:
        """Have the other workers train or predict, each with its part of the examples."""
        if self._team is None and not parts:
            return
        if self._team is None or self._capacity < max(map(len, parts), default=0):
            self._team = None  # its processes are the next team's
            self._capacity = max(ROUND, *map(len, parts))
            setup = (Follower, [without_caches(block) for block in self.blocks])
            most = 2 * max(len(block.bias) for block in self.blocks)
            self._team = Team(
                self.workers,
                setup,
                *layouts(self.blocks, self._capacity, split),
                (most, self.blocks[0].layer.weight.data.dtype),
            )
        for name, owner, attribute in self._parameters:
            value, shared = getattr(owner, attribute), self._team.common[name]
            if value is not shared:  # the first time, or somebody gave the layer another array
                np.copyto(shared, value)
                setattr(owner, attribute, shared)
        for part, own in zip(parts, self._team.own, strict=False):
            _, labels = _examples(split, part, own["images"])
            own["labels"][: len(part)] = labels
        self._team.ask(method, [(len(part), *arguments) for part in parts])

    def _answers(self) -> list[Any]:
        return [] if self._team is None else self._team.answers()

    def _set_gradients(self, workers: int) -> None:
        """The parameters' gradients: the sums over the workers, in their order."""
        for i, stage in enumerate(self.shard.stages):
            layer, norm = stage.block.layer, stage.block.norm
            dweight, dbias = stage.dweight, stage.dbias
            for own in [] if self._team is None else self._team.own[: workers - 1]:
                dweight = dweight + own[f"{i}.dweight"]
                dbias = dbias + own[f"{i}.dbias"]
            layer.weight.gradient = dweight
            if layer.bias is not None:
                layer.bias.gradient = dbias
            if norm is not None:
                norm.gamma.gradient = stage.dgamma.reshape(norm.gamma.data.shape)
                norm.beta.gradient = stage.dbeta.reshape(norm.beta.data.shape)
            stage.update_moving_averages()


def _examples(split: Split, indices: Array, out: Array | None = None) -> tuple[Array, Array]:
    """Pixels, (n, C·H·W), and labels; the pixels into the beginning of ``out``, if given."""
    labels = split.labels[indices]  # an IndexError, if one is out of range: `take` wraps those
    images = split.images.reshape(len(split), -1)
    if out is not None:
        out = out[: len(indices)]
    return images.take(indices, axis=0, out=out, mode="wrap"), labels
