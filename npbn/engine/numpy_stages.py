r"""The engine's stages on NumPy: the work arrays of one worker, and the passes over them.

A worker has its part of the batch in pieces of a few examples, so that what a pass needs is still
in the core's cache when the next one begins. `Stage` is one block of the plan for all of them: it
knows the few numbers a feature that batch norm needs of the whole batch. `ConvPiece` and
`LinearPiece` are its arrays.

Arrays are batch-last: (H, C, W, N) and (D, N). The formulas are those of `npbn.functional`, put
together so that fewer passes over the arrays do the same:

- $\sigma(z) = \frac{1}{2} + \frac{1}{2} \tanh \frac{z}{2}$, and its derivative is
  $\frac{1}{4} (1 - \tanh^2 \frac{z}{2})$. tanh costs half of what exp and a division do.
- Batch norm is $a \bar{x} + b$ with $a = \gamma / s$: one factor and one summand a feature.
- Activation and pooling leave one array behind: how much the output changes with each input. So
  all that the backward pass does about them is one multiplication.
- The average of sigmoids is $\frac{1}{2}$ and half the average of the tanhs, which is taken first.
- A bias before a batch norm changes nothing that follows, and is not added; its gradient is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npbn.engine.plan import Block, ConvBlock, LinearBlock
from npbn.layers import MaxPool2d, Sigmoid

Array = np.ndarray
Exchange = Callable[[Array, int], Array]
"""What this worker found, and how many there are → what all found, stacked in their order."""

CHUNK = 2**18
"""Bytes of an array that are worked on at a time: a few such chunks fit a core's cache."""

SMALL_PRODUCT = 10**6
"""Multiplications up to which OpenBLAS multiplies matrices as they lie, without packing them."""


class Piece(ABC):
    """Some examples of a block: arrays, and what is done with them.

    Attributes:
        x: the input, which the piece before writes.
        output: where the output goes, and dy: the gradient by it; both are the next piece's.
        dx: the gradient by it; None for a first block, of whose dx nobody asks.
        y: (features, values), what convolution or product give, less the mean of its chunk.
        slope: of that shape: how the block's output changes with batch norm's.
        chunks: of the values.
        means: (features, chunks), of y before it was taken off.
        squares: (features, chunks), sums of squares of y.
    """

    x: Array
    dx: Array | None
    output: Array
    dy: Array

    def __init__(self, block: Block, values: int, chunks: Sequence[slice], dtype: Any) -> None:
        features = len(block.layer.weight.data)
        self.block = block
        self.y = np.empty((features, values), dtype)
        self.slope = np.empty_like(self.y)
        self.chunks = chunks
        self.counts = np.array([chunk.stop - chunk.start for chunk in chunks], dtype)
        self.means, self.squares, self.sums, self.dots = (
            np.empty((features, len(chunks)), dtype) for _ in range(4)
        )
        self.ones = np.ones(int(self.counts.max()), dtype)

    # What convolution and linear layers do each in its own way, chunk by chunk.

    @abstractmethod
    def load(self, weight: Array) -> None:
        """What comes before the first product of a pass."""

    @abstractmethod
    def multiply(self, k: int) -> None:
        """Chunk k of y, without a bias."""

    @abstractmethod
    def pool(self, k: int, training: bool) -> None:
        """From what came out of the activation, in ``slope``, to the output."""

    @abstractmethod
    def spread(self, k: int, scale: float) -> None:
        """slope · scale · dy, in place: the gradient by what entered the activation."""

    @abstractmethod
    def differentiate(self, k: int) -> None:
        """From the gradient by y, in ``slope``, to those by the weights and x."""

    @abstractmethod
    def finish(self, factor: Array) -> Array:
        """After the last `differentiate`: dweight."""

    # What they share.

    def forward(self, weight: Array, centre: bool) -> None:
        self.load(weight)
        for k, chunk in enumerate(self.chunks):
            self.multiply(k)
            if centre:
                y = self.y[:, chunk]
                np.matmul(y, self.ones[: y.shape[1]], out=self.means[:, k])
                self.means[:, k] /= y.shape[1]
                y -= self.means[:, k, None]
                np.vecdot(y, y, out=self.squares[:, k])

    def activate(self, factor: Array | None, summand: Array) -> None:
        """The output in training, activation(factor·y + summand) pooled; and ``slope``.

        ``summand`` is (features, chunks), or (features, 1) if it is the same for all.
        """
        for k, chunk in enumerate(self.chunks):
            z, y = self.slope[:, chunk], self.y[:, chunk]
            if factor is not None:
                y = np.multiply(y, factor[:, None], out=z)
            np.add(y, summand[:, k % summand.shape[1], None], out=z)
            self._apply_activation(z)
            self.pool(k, training=True)

    def predict(self, weight: Array, bias: Array) -> None:
        """The output in prediction."""
        self.load(weight)
        for k, chunk in enumerate(self.chunks):
            self.multiply(k)
            z = np.add(self.y[:, chunk], bias[:, None], out=self.slope[:, chunk])
            self._apply_activation(z)
            self.pool(k, training=False)

    def _apply_activation(self, z: Array) -> None:
        if self.block.halved:
            np.tanh(z, out=z)
        elif self.block.activation is not None:
            np.maximum(z, 0, out=z)

    def differentiate_activation(self, t: Array) -> None:
        """From what came out of the activation to its derivative, in place."""
        if self.block.halved:
            np.multiply(t, t, out=t)
            np.subtract(1, t, out=t)
        elif self.block.activation is not None:
            np.greater(t, 0, out=t)
        else:
            t.fill(1)

    def sum_up(self, scale: float) -> None:
        """The gradient by what entered the activation, its sums, and its products with y."""
        for k, chunk in enumerate(self.chunks):
            self.spread(k, scale)
            g = self.slope[:, chunk]
            np.matmul(g, self.ones[: g.shape[1]], out=self.sums[:, k])
            np.vecdot(g, self.y[:, chunk], out=self.dots[:, k])

    def backward(self, factor: Array | None, k: Array | None, c: Array | None) -> Array:
        """dweight; with batch norm, of the gradient factor·(g - k·y - c)."""
        for i, chunk in enumerate(self.chunks):
            if k is not None and c is not None:
                y, g = self.y[:, chunk], self.slope[:, chunk]
                y *= k[:, None]
                y += c[:, i, None]
                g -= y
            self.differentiate(i)
        return self.finish(np.ones(len(self.y), self.y.dtype) if factor is None else factor)


class LinearPiece(Piece):
    """x is (D, n); y is what the layer gives, all in one chunk."""

    def __init__(self, block: LinearBlock, n: int, dtype: Any, first: bool) -> None:
        super().__init__(block, n, [slice(0, n)], dtype)
        in_features, out_features = block.features
        self.x = np.empty((in_features, n), dtype)
        self.dx = None if first else np.empty_like(self.x)
        v = _columns_of_a_product(n, in_features * out_features)
        self.x_parts, self.y_parts = _parts(self.x, v), _parts(self.y, v)

    def load(self, weight: Array) -> None:
        self.weight = weight

    def multiply(self, k: int) -> None:
        np.matmul(self.weight, self.x_parts, out=self.y_parts)

    def pool(self, k: int, training: bool) -> None:
        if self.block.halved:
            np.multiply(self.slope, 0.5, out=self.output)
            self.output += 0.5
        else:
            np.copyto(self.output, self.slope)
        if training:
            self.differentiate_activation(self.slope)

    def spread(self, k: int, scale: float) -> None:
        self.slope *= self.dy
        if scale != 1:
            self.slope *= scale

    def differentiate(self, k: int) -> None:
        pass

    def finish(self, factor: Array) -> Array:
        g = self.slope
        g *= factor[:, None]
        if self.dx is not None:
            np.matmul(self.weight.T, g, out=self.dx)
        dweight: Array = g @ self.x.T
        return dweight


class ConvPiece(Piece):
    """x is (H, C, W, n); y is (O, H', W', n), where the order of W' is that of the pooling windows.

    The input is unfolded along its width alone: row h holds what each of the kW columns of the
    kernel sees of it. What a row of the output sees are then kH such rows, which lie one after the
    other: a matrix of kH·C·kW rows, without copying them once more. Columns of the output that are
    at the same place in their pooling window lie together, so that pooling adds long runs.
    """

    def __init__(self, block: ConvBlock, n: int, dtype: Any, first: bool) -> None:
        conv = block.layer
        (channels, height, width), (o, rows, columns) = block.shape, block.maps
        (kh, kw), (sh, sw), (ph, pw) = conv.kernel_size, conv.stride, conv.padding
        self.window = a, b = block.window
        values = columns * n  # of a row of the output
        itemsize = np.dtype(dtype).itemsize
        step = a * max(1, round(CHUNK / (a * o * values * itemsize)))
        self.rows = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        chunks = [slice(part.start * values, part.stop * values) for part in self.rows]
        super().__init__(block, rows * values, chunks, dtype)

        self.padded = np.zeros((height + 2 * ph, channels, width + 2 * pw, n), dtype)
        inside = (slice(ph, ph + height), slice(None), slice(pw, pw + width))
        self.x = self.padded[inside]
        seen = (rows - 1) * sh + kh
        self.unfolded = np.empty((seen, channels, kw, b, columns // b, n), dtype)

        def windows_of_columns(padded: Array) -> Array:
            dh, dc, dw, dn = padded.strides
            strides = (dh, dc, dw, sw * dw, b * sw * dw, dn)
            return as_strided(padded, self.unfolded.shape, strides)

        self.windows_of_columns = windows_of_columns(self.padded)
        self.planes = (o, rows // a, a, b, columns // b, n)

        # Matrices of a product, in a stack by rows of the output and parts of their columns.
        inputs = kh * channels * kw
        row, value = self.unfolded.strides[0], self.unfolded.strides[2] // 1
        value = values * itemsize
        windows = as_strided(self.unfolded, (rows, inputs, values), (sh * row, value, itemsize))
        v = _columns_of_a_product(values, o * inputs)
        self.x_parts = _parts(windows, v)
        self.y_parts = _parts(np.swapaxes(self.y.reshape(o, rows, values), 0, 1), v)
        g = np.swapaxes(self.slope.reshape(o, rows, values), 0, 1)
        self.g_parts = _parts(g, v)
        # OpenBLAS's small products of a matrix and a transposed one have up to 1,200 results.
        bands = kh if inputs * o > 1200 and channels * kw * o <= 1200 else 1
        band = inputs // bands
        v = _columns_of_a_product(values, band * o)
        windows = as_strided(
            self.unfolded,
            (rows, bands, band, values),
            (sh * row, row * kh // bands, value, itemsize),
        )
        self.x_bands = _parts(windows, v)
        self.g_bands = np.swapaxes(_parts(g[:, None], v), -1, -2)
        self.dbands = np.empty((step, *self.x_bands.shape[1:3], band, o), dtype)
        self.dx = None
        if not first:
            self.dpadded = np.empty_like(self.padded)
            self.dx = self.dpadded[inside]
            self.dunfolded = np.empty_like(self.unfolded)
            self.dwindows_of_columns = windows_of_columns(self.dpadded)
            self.dwindow = np.empty((kh, *self.unfolded.shape[1:]), dtype)
            self.dwindow_parts = _parts(self.dwindow.reshape(inputs, values), self.x_parts.shape[-1])

    def load(self, weight: Array) -> None:
        np.copyto(self.unfolded, self.windows_of_columns)
        self.weight = np.ascontiguousarray(np.swapaxes(weight, 1, 2)).reshape(len(weight), -1)

    def multiply(self, k: int) -> None:
        rows = self.rows[k]
        np.matmul(self.weight, self.x_parts[rows], out=self.y_parts[rows])

    def _planes(self, k: int) -> tuple[Array, slice]:
        """Chunk k of ``slope`` as (O, windows down, kH, kW, windows across, n); its output rows."""
        rows, a = self.rows[k], self.window[0]
        pooled = slice(rows.start // a, rows.stop // a)
        return self.slope.reshape(self.planes)[:, pooled], pooled

    def pool(self, k: int, training: bool) -> None:
        planes, pooled = self._planes(k)
        out = np.swapaxes(self.output[pooled], 0, 1)
        (a, b), maximum = self.window, type(self.block.pool) is MaxPool2d
        first, *others = (planes[:, :, i, j] for i in range(a) for j in range(b))
        if not others:
            np.copyto(out, first)
        combine = np.maximum if maximum else np.add
        for plane in others:
            first = combine(first, plane, out=out)
        if training:
            chosen = _first_equal(planes, out) if maximum else None
            self.differentiate_activation(self.slope[:, self.chunks[k]])
            if chosen is not None:
                planes *= chosen
        if self.block.halved:
            out *= 0.5 / self.block.divisor
            out += 0.5
        elif self.block.divisor != 1:
            out /= self.block.divisor

    def spread(self, k: int, scale: float) -> None:
        planes, pooled = self._planes(k)
        share = np.swapaxes(self.dy[pooled], 0, 1)
        if scale != 1:
            share = share * scale
        planes *= share[:, :, None, None]

    def differentiate(self, k: int) -> None:
        rows = self.rows[k]
        dbands = self.dbands[: rows.stop - rows.start]
        np.matmul(self.x_bands[rows], self.g_bands[rows], out=dbands)
        dweight = dbands.sum(axis=(0, 2))
        self.dweight = dweight if k == 0 else self.dweight + dweight

    def finish(self, factor: Array) -> Array:
        (kh, kw), (sh, _) = self.block.layer.kernel_size, self.block.layer.stride
        if self.dx is not None:
            self.dunfolded.fill(0)
            weight = (self.weight * factor[:, None]).T
            for i, g in enumerate(self.g_parts):
                np.matmul(weight, g, out=self.dwindow_parts)
                self.dunfolded[i * sh : i * sh + kh] += self.dwindow
            self.dpadded.fill(0)
            for j in range(kw):
                self.dwindows_of_columns[:, :, j] += self.dunfolded[:, :, j]
        dweight = self.dweight.reshape(kh, -1, kw, len(factor)).transpose(3, 1, 0, 2)
        return dweight * factor[:, None, None, None]


class Stage:
    """One block for one worker: all its pieces, and what batch norm needs to know of the batch."""

    def __init__(
        self,
        block: Block,
        pieces: Sequence[int],
        sizes: Sequence[int],
        dtype: Any,
        first: bool,
        exchange: Exchange,
    ) -> None:
        kind: Any = ConvPiece if isinstance(block, ConvBlock) else LinearPiece
        self.block, self.exchange = block, exchange
        self.pieces: list[Any] = [kind(block, n, dtype, first) for n in pieces]
        values = self.pieces[0].y.shape[1] // pieces[0]  # of an example
        self.total = sum(sizes) * values
        self.counts = np.concatenate([piece.counts for piece in self.pieces])
        self.workers = len(sizes)
        self.all_counts = np.array([size * values for size in sizes], dtype)

    def forward(self) -> None:
        """In training; with batch norm, by the statistics of the batch."""
        layer, norm = self.block.layer, self.block.norm
        for piece in self.pieces:
            piece.forward(layer.weight.data, norm is not None)
        half = 0.5 if self.block.halved else 1.0
        if norm is None:
            summand = half * self.block.bias[:, None]
            factor = None if half == 1 else np.full(len(summand), half, summand.dtype)
            summands = [summand] * len(self.pieces)
        else:
            means, squares = (
                np.concatenate([getattr(piece, name) for piece in self.pieces], axis=1)
                for name in ("means", "squares")
            )
            everyone = self.exchange(
                np.stack(merge(self.counts, means, squares)), self.workers
            )
            self.mean, squares = merge(self.all_counts, everyone[:, 0].T, everyone[:, 1].T)
            self.var = squares / self.total
            self.s = np.sqrt(self.var + norm.eps)
            self.factor = norm.gamma.data.ravel() / self.s
            factor = half * self.factor
            beta = half * norm.beta.data.reshape(-1, 1)
            self.offsets = [piece.means - self.mean[:, None] for piece in self.pieces]
            summands = [factor[:, None] * offset + beta for offset in self.offsets]
        for piece, summand in zip(self.pieces, summands, strict=True):
            piece.activate(factor, summand)

    def predict(self) -> None:
        """In prediction, with batch norm folded into weight and bias."""
        weight, bias = self.block.folded()
        for piece in self.pieces:
            piece.predict(weight, bias)

    def backward(self) -> None:
        """The gradients of the parameters, summed over this worker's examples, and dx.

        Those of γ and β are of the whole batch.
        """
        scale = (0.25 if self.block.halved else 1.0) / self.block.divisor
        for piece in self.pieces:
            piece.sum_up(scale)
        factor, k = None, None
        cs: list[Array | None] = [None] * len(self.pieces)
        sums = _total(piece.sums.sum(axis=1) for piece in self.pieces)
        if self.block.norm is None:
            self.dbias = sums
        else:
            dots = _total(
                (piece.dots + offset * piece.sums).sum(axis=1)
                for piece, offset in zip(self.pieces, self.offsets, strict=True)
            )
            self.dbias = np.zeros_like(sums)
            self.dbeta, dot = self.exchange(np.stack((sums, dots)), self.workers).sum(axis=0)
            self.dgamma = dot / self.s
            factor, k = self.factor, dot / (self.s * self.s * self.total)
            cs = [self.dbeta[:, None] / self.total + k[:, None] * each for each in self.offsets]
        self.dweight = _total(
            piece.backward(factor, k, c) for piece, c in zip(self.pieces, cs, strict=True)
        )

    def update_moving_averages(self) -> None:
        norm = self.block.norm
        if norm is not None:
            mean = self.mean if self.block.layer.bias is None else self.mean + self.block.bias
            for moving, new in ((norm.moving_mean, mean), (norm.moving_var, self.var)):
                moving *= norm.momentum
                moving += ((1 - norm.momentum) * new).reshape(moving.shape)


def merge(counts: Array, means: Array, squares: Array) -> tuple[Array, Array]:
    """Mean, and squares about it, from those of parts: counts (P,), the others (features, P).

    Source: T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", Stanford 1979, (2.1b) for several parts.
    """
    mean = means @ (counts / counts.sum())
    return mean, squares.sum(axis=1) + (means - mean[:, None]) ** 2 @ counts


def _columns_of_a_product(columns: int, size: int) -> int:
    """How many of the columns are best multiplied at once by a matrix of this size.

    As many as make a small product; all of them, if those are too few to be worth it.
    """
    most = SMALL_PRODUCT // size
    fitting = max(v for v in range(1, columns + 1) if columns % v == 0 and v <= max(most, 1))
    return fitting if fitting >= 32 else columns


def _parts(matrices: Array, v: int) -> Array:
    """Views of v columns each: (..., rows, columns) as (..., parts, rows, v)."""
    *lead, rows, columns = matrices.shape
    return np.swapaxes(matrices.reshape(*lead, rows, columns // v, v), -2, -3)


def _first_equal(planes: Array, largest: Array) -> Array:
    """Where in each window the maximum is; of equal ones, the first in reading order."""
    chosen = planes == largest[:, :, None, None]
    taken = np.zeros(largest.shape, bool)
    for i in range(chosen.shape[2]):
        for j in range(chosen.shape[3]):
            chosen[:, :, i, j] &= ~taken
            taken |= chosen[:, :, i, j]
    return chosen


def _total(arrays: Iterable[Array]) -> Array:
    first, *others = arrays
    for array in others:
        first = first + array
    return first
