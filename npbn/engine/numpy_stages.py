r"""The engine's stages on NumPy: the work arrays of one worker, and the passes over them.

A worker has its part of the batch in pieces, so that a large batch does not fall out of the cache
between one pass and the next. `Stage` is one block of the plan for all of them: it
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

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npbn.engine.plan import Block, ConvBlock, LinearBlock
from npbn.layers import MaxPool2d

Array = np.ndarray
Exchange = Callable[[Array, int], Array]
"""What this worker found, and how many there are → what all found, stacked in their order."""

LINE, PAGE = 64, 4096
"""Bytes of a line of the cache, and of a page of memory."""

SMALL_PRODUCT = 10**6
"""Multiplications up to which OpenBLAS multiplies matrices as they lie, without packing them."""


_arrays = itertools.count()


def work_array(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array that begins with a cache line, one line further in its page than the one before.

    Lines at the same place of several pages push one another out of the first-level cache, and
    what is read there waits for what is being written; large arrays usually begin like that.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 2 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE + next(_arrays) * LINE % PAGE
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


class Piece(ABC):
    """Some examples of a block: arrays, and what is done with them.

    Attributes:
        x: the input, which the piece before writes.
        dx: the gradient by it; None for a first block, of whose dx nobody asks.
        output: where the output goes, and dy: the gradient by it; both are the next piece's.
        y: (rows, features, values), what convolution or product give, less its mean.
        slope: of that shape: how the block's output changes with batch norm's.
        found: (2, features): in the forward pass the means of y and the sums of its squares about
            them; in the backward pass the sums of the gradient and of its product with y.
    """

    x: Array
    dx: Array | None
    output: Array
    dy: Array

    def __init__(self, block: Block, rows: int, values: int, dtype: Any) -> None:
        self.block = block
        features = len(block.layer.weight.data)
        self.y = work_array((rows, features, values), dtype)
        self.slope = work_array(self.y.shape, dtype)
        self.found = np.empty((2, features), dtype)
        self.of_rows = np.empty((rows, features), dtype)
        self.ones = np.ones(values, dtype)

    # What convolution and linear layers do each in its own way.

    @abstractmethod
    def multiply(self, weight: Array) -> None:
        """y, without a bias."""

    @abstractmethod
    def pool(self, training: bool) -> None:
        """From what came out of the activation, in ``slope``, to the output; then to the slope."""

    @abstractmethod
    def spread(self) -> None:
        """slope · dy, in place: the gradient by what entered the activation."""

    @abstractmethod
    def differentiate(self, factor: Array | None) -> Array:
        """From the gradient by y, ``slope`` times ``factor``, to dx; and dweight."""

    # What they share.

    def forward(self, weight: Array, centre: bool) -> None:
        self.multiply(weight)
        if centre:
            y, (mean, squares) = self.y, self.found
            self._sum(y, out=mean)
            mean /= y.size // mean.size
            y -= mean[:, None]
            self._dot(y, y, out=squares)

    def _sum(self, array: Array, out: Array) -> None:
        """Of each feature."""
        np.matmul(array, self.ones, out=self.of_rows)
        np.add.reduce(self.of_rows, axis=0, out=out)

    def _dot(self, one: Array, other: Array, out: Array) -> None:
        """The sum of the products, of each feature."""
        np.vecdot(one, other, out=self.of_rows)
        np.add.reduce(self.of_rows, axis=0, out=out)

    def activate(self, factor: Array | None, summand: Array) -> None:
        """The output in training, activation(factor·y + summand) pooled; and ``slope``."""
        z, y = self.slope, self.y
        if factor is not None:
            y = np.multiply(y, factor[:, None], out=z)
        np.add(y, summand[:, None], out=z)
        self._apply_activation()
        self.pool(training=True)

    def predict(self, weight: Array, bias: Array) -> None:
        """The output in prediction."""
        self.multiply(weight)
        np.add(self.y, bias[:, None], out=self.slope)
        self._apply_activation()
        self.pool(training=False)

    def _apply_activation(self) -> None:
        if self.block.halved:
            np.tanh(self.slope, out=self.slope)
        elif self.block.activation is not None:
            np.maximum(self.slope, 0, out=self.slope)

    def differentiate_activation(self) -> None:
        """From what came out of the activation to its derivative, in place."""
        t = self.slope
        if self.block.halved:
            np.multiply(t, t, out=t)
            np.subtract(1, t, out=t)
        elif self.block.activation is not None:
            np.greater(t, 0, out=t)
        else:
            t.fill(1)

    def sum_up(self, scale: float) -> None:
        """The gradient by what entered the activation, its sums, and its products with y."""
        if scale != 1:
            self.dy *= scale
        self.spread()
        self._sum(self.slope, out=self.found[0])
        if self.block.norm is not None:
            self._dot(self.slope, self.y, out=self.found[1])

    def normalize_backward(self, k: Array, c: Array) -> None:
        """From the gradient g by batch norm's output to that by y, less a factor: g - k·y - c."""
        y = self.y
        y *= k[:, None]
        y += c[:, None]
        self.slope -= y


class LinearPiece(Piece):
    """x is (D, n), y has a single row."""

    def __init__(self, block: LinearBlock, n: int, dtype: Any, first: bool) -> None:
        super().__init__(block, 1, n, dtype)
        in_features, out_features = block.features
        self.x = work_array((in_features, n), dtype)
        self.dx = None if first else work_array(self.x.shape, dtype)
        v = _columns_of_a_product(n, in_features * out_features)
        self.x_parts, self.y_parts = _parts(self.x, v), _parts(self.y[0], v)

    def multiply(self, weight: Array) -> None:
        self.weight = weight
        np.matmul(weight, self.x_parts, out=self.y_parts)

    def pool(self, training: bool) -> None:
        if self.block.halved:
            np.multiply(self.slope[0], 0.5, out=self.output)
            self.output += 0.5
        else:
            np.copyto(self.output, self.slope[0])
        if training:
            self.differentiate_activation()

    def spread(self) -> None:
        self.slope *= self.dy

    def differentiate(self, factor: Array | None) -> Array:
        g = self.slope[0]
        if factor is not None:
            g *= factor[:, None]
        if self.dx is not None:
            np.matmul(self.weight.T, g, out=self.dx)
        dweight: Array = g @ self.x.T
        return dweight


class ConvPiece(Piece):
    """x is (H, C, W, n), y is (H', O, W'·n).

    The input is unfolded along its width alone: row h holds what each of the kW columns of the
    kernel sees of it. What a row of the output sees are then kH such rows, which lie one after the
    other: a matrix of kH·C·kW rows and W'·n columns, without copying them once more. What a row of
    the input is seen by are rows of the output, one after the other, too.
    """

    block: ConvBlock

    def __init__(self, block: ConvBlock, n: int, dtype: Any, first: bool) -> None:
        conv = block.layer
        (channels, height, width), (o, rows, columns) = block.shape, block.maps
        (kh, kw), (sh, sw), (ph, pw) = conv.kernel_size, conv.stride, conv.padding
        a, b = block.window
        values = columns * n
        super().__init__(block, rows, values, dtype)
        self.windows = self.slope.reshape(rows // a, a, o, columns // b, b, n)
        self.columns = work_array((rows // a, o, columns // b, b, n), dtype)  # of the windows

        self.padded = work_array((height + 2 * ph, channels, width + 2 * pw, n), dtype)
        self.padded.fill(0)
        inside = (slice(ph, ph + height), slice(None), slice(pw, pw + width))
        self.x = self.padded[inside]
        self.unfolded = work_array(((rows - 1) * sh + kh, channels, kw, values), dtype)
        seen = (*self.unfolded.shape[:3], columns, n)

        def seen_by_columns(padded: Array) -> Array:
            dh, dc, dw, dn = padded.strides
            return as_strided(padded, seen, (dh, dc, dw, sw * dw, dn))

        self.seen_by_columns = seen_by_columns(self.padded)

        # The matrices of the products, in stacks: by rows of the output, and parts of the columns.
        # For dweight, by rows of the kernel, too, where that makes the results small enough: those
        # of OpenBLAS's small products with a transposed matrix have up to 1,200 numbers.
        inputs = kh * channels * kw
        bands = kh if inputs // kh * o <= 1200 < inputs * o else 1

        def seen_by_rows(bands: int) -> Array:
            shape = (rows, bands, inputs // bands, values)
            row, _, value, size = self.unfolded.strides
            strides = (sh * row, kh // bands * row, value, size)
            return as_strided(self.unfolded, shape, strides)

        v = _columns_of_a_product(values, o * inputs)
        self.x_parts, self.y_parts = _parts(seen_by_rows(1)[:, 0], v), _parts(self.y, v)
        v = _columns_of_a_product(values, o * inputs // bands)
        self.x_bands = _parts(seen_by_rows(bands), v)
        self.g_bands = np.swapaxes(_parts(self.slope[:, None], v), -1, -2)
        self.dx = None
        if not first:
            self.dpadded = work_array(self.padded.shape, dtype)
            self.dx = self.dpadded[inside]
            self.dunfolded = work_array(self.unfolded.shape, dtype)
            self.dseen_by_columns = seen_by_columns(self.dpadded)
            self._plan_dx(rows, values)

    def _plan_dx(self, rows: int, values: int) -> None:
        """For each row of the input: rows of the kernel; views of those of g, and of its result.

        Row r of the output sees row h by row i = h - r·sH of the kernel. So of the kernel's rows
        from h mod sH on, every sH-th, backwards, it is some that follow one another.
        """
        o, kh, sh = self.y.shape[1], self.block.layer.kernel_size[0], self.block.layer.stride[0]
        self.products = []
        for h, dx in enumerate(self.dunfolded.reshape(len(self.dunfolded), -1, values)):
            of_output = [r for r in range(rows) if 0 <= h - r * sh < kh]
            of_kernel = list(reversed(range(h % sh, kh, sh)))
            first = of_kernel.index(h - of_output[0] * sh) if of_output else 0
            g = self.slope[of_output[0] :] if of_output else self.slope
            v = _columns_of_a_product(values, max(1, len(dx) * len(of_output) * o))
            self.products.append(
                (
                    h % sh,
                    slice(first, first + len(of_output)),
                    _parts(g[: len(of_output)].reshape(-1, values), v),
                    _parts(dx, v),
                )
            )

    def multiply(self, weight: Array) -> None:
        np.copyto(self.unfolded.reshape(self.seen_by_columns.shape), self.seen_by_columns)
        self.weight = np.swapaxes(weight, 1, 2)  # (O, kH, C, kW)
        np.matmul(self.weight.reshape(len(weight), -1), self.x_parts, out=self.y_parts)

    def pool(self, training: bool) -> None:
        windows, out, block = self.windows, self.output, self.block
        (a, b), maximum = block.window, type(block.pool) is MaxPool2d
        combine = np.maximum if maximum else np.add
        # Down first: those are long runs of memory, and leave less to do across.
        column = windows[:, 0]
        for i in range(1, a):
            column = combine(column, windows[:, i], out=self.columns)
        across = column[:, :, :, 0]
        for j in range(1, b):
            across = combine(across, column[:, :, :, j], out=out)
        if b == 1:
            np.copyto(out, across)
        if training:
            chosen = _first_equal(windows, out) if maximum else None
            self.differentiate_activation()
            if chosen is not None:
                windows *= chosen
        if block.halved:
            out *= 0.5 / block.divisor
            out += 0.5
        elif block.divisor != 1:
            out /= block.divisor

    def spread(self) -> None:
        np.copyto(self.columns, self.dy[:, :, :, None])
        self.windows *= self.columns[:, None]

    def differentiate(self, factor: Array | None) -> Array:
        kh, kw = self.block.layer.kernel_size
        o = self.y.shape[1]
        dweight = np.matmul(self.x_bands, self.g_bands).sum(axis=(0, 2))
        dweight, weight = dweight.reshape(kh, -1, kw, o), self.weight
        if factor is not None:
            weight, dweight = weight * factor[:, None, None, None], dweight * factor
        if self.dx is not None:
            weight = np.transpose(weight, (2, 3, 1, 0))  # (C, kW, kH, O)
            inputs, step = len(weight) * kw, self.block.layer.stride[0]
            weights = [weight[:, :, i::step][:, :, ::-1].copy() for i in range(step)]
            for i, of_kernel, g, dx in self.products:
                np.matmul(weights[i][:, :, of_kernel].reshape(inputs, -1), g, out=dx)
            self.dpadded.fill(0)
            dunfolded = self.dunfolded.reshape(self.seen_by_columns.shape)
            for j in range(kw):
                self.dseen_by_columns[:, :, j] += dunfolded[:, :, j]
        return np.transpose(dweight, (3, 1, 0, 2))


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
        values = self.pieces[0].y.size // (len(block.bias) * pieces[0])  # of an example
        self.total, self.workers = sum(sizes) * values, len(sizes)
        self.counts = np.array([n * values for n in pieces], dtype)
        self.all_counts = np.array([n * values for n in sizes], dtype)

    def forward(self) -> None:
        """In training; with batch norm, by the statistics of the batch."""
        block, norm = self.block, self.block.norm
        for piece in self.pieces:
            piece.forward(block.layer.weight.data, norm is not None)
        half = 0.5 if block.halved else 1.0
        if norm is None:
            summand = half * block.bias
            factor = None if half == 1 else np.full_like(summand, half)
            summands = [summand] * len(self.pieces)
        else:
            self._statistics()
            self.s = np.sqrt(self.var + norm.eps)
            self.factor = norm.gamma.data.reshape(-1) / self.s
            factor, beta = half * self.factor, half * norm.beta.data.reshape(-1)
            summands = [factor * offset + beta for offset in self.offsets]
        for piece, summand in zip(self.pieces, summands, strict=True):
            piece.activate(factor, summand)

    def _statistics(self) -> None:
        """Mean and variance of the whole batch, of all pieces and workers."""
        found = merge(self.counts, [piece.found for piece in self.pieces])
        self.mean, squares = merge(self.all_counts, self.exchange(found, self.workers))
        self.var = squares / self.total
        # y is less the mean of its piece, which is not quite that of the batch.
        self.offsets = [piece.found[0] - self.mean for piece in self.pieces]

    def predict(self, weight: Array, bias: Array) -> None:
        """In prediction, with batch norm folded into weight and bias."""
        for piece in self.pieces:
            piece.predict(weight, bias)

    def backward(self) -> None:
        """The gradients of the parameters, summed over this worker's examples, and dx.

        Those of γ and β are of the whole batch.
        """
        scale = (0.25 if self.block.halved else 1.0) / self.block.divisor
        for piece in self.pieces:
            piece.sum_up(scale)
        factor = None
        if self.block.norm is None:
            self.dbias = _total(piece.found[0] for piece in self.pieces)
        else:
            self._normalize_backward()
            self.dbias, factor = np.zeros_like(self.dbeta), self.factor
        self.dweight = _total(piece.differentiate(factor) for piece in self.pieces)

    def _normalize_backward(self) -> None:
        for piece, offset in zip(self.pieces, self.offsets, strict=True):
            piece.found[1] += offset * piece.found[0]
        found = _total(piece.found for piece in self.pieces)
        self.dbeta, dot = self.exchange(found, self.workers).sum(axis=0)
        self.dgamma = dot / self.s
        k = self.dgamma / (self.s * self.total)
        mean = self.dbeta / self.total
        for piece, offset in zip(self.pieces, self.offsets, strict=True):
            piece.normalize_backward(k, mean + k * offset)

    def update_moving_averages(self) -> None:
        norm = self.block.norm
        if norm is not None:
            mean = self.mean if self.block.layer.bias is None else self.mean + self.block.bias
            for moving, new in ((norm.moving_mean, mean), (norm.moving_var, self.var)):
                moving *= norm.momentum
                moving += ((1 - norm.momentum) * new).reshape(moving.shape)


def merge(counts: Array, parts: Sequence[Array] | Array) -> Array:
    """Means, and squares about them, (2, features), of all, from those of parts.

    Source: T. Chan, G. Golub and R. LeVeque, "Updating formulae and a pairwise algorithm for
    computing sample variances", Stanford 1979, (2.1b) for several parts.
    """
    if len(parts) == 1:
        return parts[0]
    found = np.asarray(parts)
    means, squares = found[:, 0], found[:, 1]
    mean = counts @ means / counts.sum()
    return np.stack((mean, squares.sum(axis=0) + counts @ (means - mean) ** 2))


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


def _first_equal(windows: Array, largest: Array) -> Array:
    """Where in each window the maximum is; of equal ones, the first in reading order."""
    chosen: Array = windows == largest[:, None, :, :, None]
    taken = np.zeros(largest.shape, bool)
    for i in range(chosen.shape[1]):
        for j in range(chosen.shape[4]):
            chosen[:, i, :, :, j] &= ~taken
            taken |= chosen[:, i, :, :, j]
    return chosen


def _total(arrays: Iterable[Array]) -> Any:
    return functools.reduce(np.add, arrays)
