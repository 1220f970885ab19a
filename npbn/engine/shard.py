"""One worker's part of the training: its stages, and its part of each batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from npbn.data import Split
from npbn.engine.numpy_stages import Array, Exchange, Stage
from npbn.engine.plan import Block, ConvBlock, parameters_of
from npbn.engine.team import Layout

PIECE = 256
"""Examples of a piece: more fall out of the cache, fewer are more calls of NumPy."""


BUFFER = 512
"""NumPy's buffer, in numbers, while the engine computes.

Rows of which several fit it are copied into it and back by every operation that cannot take all of
an array in one go: 3 times as slow as computing on them where they lie.
"""


KEPT = 6
"""Sizes of batches for which the work arrays are kept: most runs have two, and two to predict."""


class Shard:
    """What a worker does.

    Args:
        blocks: the plan.
        worker: its number, from 0.
        exchange: what it finds → what all workers found, stacked in their order.
    """

    def __init__(self, blocks: Sequence[Block], worker: int, exchange: Exchange) -> None:
        self.blocks, self.worker, self.exchange = blocks, worker, exchange
        self._stages: dict[tuple[int, ...], list[Stage]] = {}

    def train(self, sizes: tuple[int, ...], images: Array, labels: Array) -> tuple[float, int]:
        """Forward and backward: the sum of the losses of its examples, and how many were right.

        Args:
            sizes: how many examples each worker has.
            images: this worker's pixels, (n, C·H·W) of uint8.
            labels: (n,).
        """
        self.stages = stages = self._planned(sizes)
        self._load(images)
        for stage in stages:
            stage.forward()
        loss, hits = self._loss(labels, sum(sizes))
        for stage in reversed(stages):
            stage.backward()
        return loss, hits

    def predict(self, images: Array, labels: Array) -> tuple[float, int]:
        """The sum of the losses in prediction mode, and how many were right."""
        loss, hits = 0.0, 0
        folded = [block.folded() for block in self.blocks]
        for start in range(0, len(images), PIECE):
            part = slice(start, start + PIECE)
            n = len(images[part])
            self.stages = self._planned((0,) * self.worker + (n,))
            self._load(images[part])
            for stage, (weight, bias) in zip(self.stages, folded, strict=True):
                stage.predict(weight, bias)
            found = self._loss(labels[part], n)
            loss, hits = loss + found[0], hits + found[1]
        return loss, hits

    def _planned(self, sizes: tuple[int, ...]) -> list[Stage]:
        """The stages where the workers have so many examples each."""
        if sizes not in self._stages:
            if len(self._stages) == KEPT:
                self._stages.pop(next(iter(self._stages)))
            n = sizes[self.worker]
            count = -(-n // PIECE)
            pieces = [n // count + (i < n % count) for i in range(count)]
            dtype = self.blocks[0].layer.weight.data.dtype
            stages = [
                Stage(block, pieces, sizes, dtype, i == 0, self.exchange)
                for i, block in enumerate(self.blocks)
            ]
            for stage, following in itertools.pairwise(stages):
                for piece, next_piece in zip(stage.pieces, following.pieces, strict=True):
                    piece.output = _as_left(next_piece.x, stage.block)
                    piece.dy = _as_left(next_piece.dx, stage.block)
            for piece in stages[-1].pieces:
                piece.output, piece.dy = np.empty_like(piece.y[0]), np.empty_like(piece.y[0])
            self._stages[sizes] = stages
        return self._stages[sizes]

    def _load(self, images: Array) -> None:
        """The pixels, from 0 to 1, batch last."""
        start = 0
        for piece in self.stages[0].pieces:
            pixels = images[start : start + piece.x.shape[-1]]
            x = np.swapaxes(piece.x, 0, 1) if piece.x.ndim == 4 else piece.x
            # First the order, then the numbers: fewer bytes to move about.
            np.divide(pixels.T.copy().reshape(x.shape), 255, out=x, dtype=x.dtype)
            start += len(pixels)

    def _loss(self, labels: Array, total: int) -> tuple[float, int]:
        """Softmax cross-entropy: the sum, and hits; the pieces get the gradient of the mean."""
        pieces = self.stages[-1].pieces
        z = np.concatenate([piece.output for piece in pieces], axis=1)
        z -= z.max(axis=0)
        right = np.arange(len(z))[:, None] == labels
        # The largest is 0 now. Of equal ones, the first counts, as with argmax.
        hits = int(np.count_nonzero(z.argmax(axis=0) == labels))
        p = np.exp(z)
        sums = p.sum(axis=0)
        of_labels = z[right]
        loss = float(np.log(sums).sum(dtype=np.float64) - of_labels.sum(dtype=np.float64))
        if len(of_labels) != len(labels):
            loss = math.nan  # as in npbn.functional: a label out of range has no logit
        p /= sums
        p -= right
        p /= total
        start = 0
        for piece in pieces:
            end = start + piece.dy.shape[1]
            np.copyto(piece.dy, p[:, start:end])
            start = end
        return loss, hits


class Follower:
    """The work of a worker that is not the first, on arrays that it shares with that one."""

    def __init__(
        self,
        blocks: Sequence[Block],
        worker: int,
        shared: dict[str, Array],
        exchange: Exchange,
    ) -> None:
        self.shared = shared
        np.setbufsize(BUFFER)
        for name, owner, attribute in parameters(blocks):
            setattr(owner, attribute, shared[name])
        self.shard = Shard(blocks, worker, exchange)

    def train(self, n: int, sizes: tuple[int, ...]) -> tuple[float, int]:
        found = self.shard.train(sizes, self.shared["images"][:n], self.shared["labels"][:n])
        for i, stage in enumerate(self.shard.stages):
            np.copyto(self.shared[f"{i}.dweight"], stage.dweight)
            np.copyto(self.shared[f"{i}.dbias"], stage.dbias)
        return found

    def predict(self, n: int) -> tuple[float, int]:
        return self.shard.predict(self.shared["images"][:n], self.shared["labels"][:n])


def parameters(blocks: Sequence[Block]) -> Iterator[tuple[str, Any, str]]:
    """What a plan computes with, moving averages included: names, owners, their attributes."""
    for i, block in enumerate(blocks):
        for name, owner, attribute in parameters_of(block):
            yield f"{i}.{name}", owner, attribute


def layouts(blocks: Sequence[Block], capacity: int, split: Split) -> tuple[Layout, Layout]:
    """The arrays that all workers share, and those of a `Follower` with up to so many examples."""
    common = {
        name: (getattr(owner, attribute).shape, str(getattr(owner, attribute).dtype))
        for name, owner, attribute in parameters(blocks)
    }
    own: dict[str, tuple[tuple[int, ...], str]] = {
        "images": ((capacity, split.images[0].size), "uint8"),
        "labels": ((capacity,), "int64"),
    }
    for i, block in enumerate(blocks):
        own[f"{i}.dweight"] = common[f"{i}.weight"]
        own[f"{i}.dbias"] = (block.bias.shape, str(block.bias.dtype))
    return common, own


def _as_left(array: Array, block: Block) -> Array:
    """A piece's input, of (C, H, W) in one axis, as the block before it writes it."""
    if isinstance(block, ConvBlock) and array.ndim == 2:
        return np.swapaxes(array.reshape(*block.output, array.shape[-1]), 0, 1)
    return array
