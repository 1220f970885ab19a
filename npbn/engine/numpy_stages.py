r"""The engine's stages on NumPy: one worker's part of a batch, both ways, in work arrays.

Arrays are batch-last: (C, H, W, N) and (D, N), contiguous. The formulas are those of
`npbn.functional`, put together so that fewer passes over the arrays do the same:

- $\sigma(z) = \frac{1}{2} + \frac{1}{2} \tanh \frac{z}{2}$, and its derivative is
  $\frac{1}{4} (1 - \tanh^2 \frac{z}{2})$. tanh costs half of what exp and a division do.
- Batch norm is $a \bar{x} + b$ with $a = \gamma / s$: one factor and one summand a channel.
- The average of sigmoids is $\frac{1}{2}$ and half the average of the tanhs, which is taken first.
- A convolution computes P x Q outputs at once (`npbn.engine.plan.tile_of`), so that its products
  have shapes that BLAS likes. The outputs lie in P·Q planes, and pooling adds whole planes.
- A bias before a batch norm changes nothing that follows, and is not added; its gradient is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npbn.engine.plan import ConvBlock, LinearBlock
from npbn.layers import Conv2d, Linear, MaxPool2d, Sigmoid

Array = np.ndarray
Exchange = Callable[[str, Array], Array]
"""(what, what this worker found) → what all found, stacked in the order of the workers."""

CACHE = 2**18
"""Bytes of an array that are worked on at a time: a few such pieces fit a core's cache."""


class Affine(ABC):
    """What convolution and linear stages share: all that follows the product.

    y is (features, values): the values of a feature are contiguous. So is t, what comes out of the
    activation; of a sigmoid it is tanh(z/2).
    """

    def __init__(
        self,
        block: ConvBlock | LinearBlock,
        layer: Conv2d | Linear,
        y: Array,
        total: int,
        first: bool,
        share: Array,
        exchange: Exchange,
        leader: bool,
    ) -> None:
        self.first = first  # nobody needs its dx
        self.layer: Any = layer
        self.norm, self.activation = block.norm, block.activation
        self.y = y
        self.t = y if self.norm is None and self.activation is None else np.empty_like(y)
        self.total = total  # values of a feature in the whole batch
        self.share = share
        self.exchange = exchange
        self.leader = leader
        features, values = y.shape
        self.ones = np.ones(values, y.dtype)
        step = max(1, CACHE // (values * y.itemsize))
        self.pieces = [slice(i, i + step) for i in range(0, features, step)]

    @abstractmethod
    def multiply(self, weight: Array) -> None:
        """y = weight · x, or their convolution, without a bias."""

    @abstractmethod
    def finish(self, out: Array) -> None:
        """What is left to do after the activation, into ``out``."""

    def forward(self, out: Array) -> None:
        """In training; into the next stage's input."""
        self.multiply(self.layer.weight.data)
        self.normalize()
        self.activate()
        self.finish(out)

    def predict(self, out: Array) -> None:
        """In prediction, with batch norm folded into weight and bias."""
        weight, bias = self.folded()
        self.multiply(weight)
        for piece in self.pieces:
            y = np.add(self.y[piece], bias[piece, None], out=self.t[piece])
            if self.halved:
                np.tanh(y, out=y)
            elif self.activation is not None:
                np.maximum(y, 0, out=y)
        self.finish(out)

    @property
    def bias(self) -> Array | None:
        bias: Array | None = None if self.layer.bias is None else self.layer.bias.data
        return bias

    def folded(self) -> tuple[Array, Array]:
        """Weight and bias of the same map with batch norm's moving averages in it.

        With tanh's half, too, if a sigmoid follows.
        """
        weight, norm = self.layer.weight.data, self.norm
        bias = np.zeros(len(weight), weight.dtype) if self.bias is None else self.bias
        scale = np.ones_like(bias)
        if norm is not None:
            scale = norm.gamma.data.ravel() / np.sqrt(norm.moving_var.ravel() + norm.eps)
            bias = (bias - norm.moving_mean.ravel()) * scale + norm.beta.data.ravel()
        half = 0.5 if self.halved else 1.0
        return half * weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), half * bias

    @property
    def halved(self) -> bool:
        return isinstance(self.activation, Sigmoid)

    def set_gradients(self, stages: Sequence[Any]) -> None:
        """The parameters' gradients: the sums over the workers' stages, in their order."""
        self.layer.weight.gradient = _total(stage.dweight for stage in stages)
        if self.layer.bias is not None:
            dbias = np.zeros_like(self.layer.bias.data)
            if self.norm is None:
                dbias = _total(stage.dbias for stage in stages)
            self.layer.bias.gradient = dbias
        if self.norm is not None:
            self.norm.gamma.gradient = self.dgamma.reshape(self.norm.gamma.data.shape)
            self.norm.beta.gradient = self.dbeta.reshape(self.norm.beta.data.shape)

    def normalize(self) -> None:
        """In training: statistics of the batch; factor and summand for `activate`."""
        norm, features = self.norm, self.y.shape[0]
        if norm is None:
            self.factor, self.summand = None, self.bias
            return
        found = np.empty((2, features), self.y.dtype)
        for piece in self.pieces:
            y = self.y[piece]
            np.matmul(y, self.ones, out=found[0, piece])
            found[0, piece] /= y.shape[1]
            y -= found[0, piece, None]
            np.vecdot(y, y, out=found[1, piece])
        everyone = self.exchange("statistics", found)
        means, squares = everyone[:, 0], everyone[:, 1]
        mean = self.share @ means
        # Squares about one mean from those about several (Chan, Golub and LeVeque 1979).
        var = (squares.sum(axis=0) / self.total) + self.share @ (means - mean) ** 2
        self.s = np.sqrt(var + norm.eps)
        self.offset = found[0] - mean  # y is centred by the mean of this part alone
        self.factor = norm.gamma.data.ravel() / self.s
        self.summand = self.factor * self.offset + norm.beta.data.ravel()
        if self.leader:
            if self.bias is not None:
                mean = mean + self.bias
            for moving, new in ((norm.moving_mean, mean), (norm.moving_var, var)):
                moving *= norm.momentum
                moving += ((1 - norm.momentum) * new).reshape(moving.shape)

    def activate(self) -> None:
        """t = activation(factor·y + summand); of the sigmoid, its tanh."""
        half = 0.5 if self.halved else 1.0
        factor, summand = self.factor, self.summand
        if factor is not None:
            factor = half * factor[:, None]
        elif half != 1:
            factor = np.full((self.y.shape[0], 1), half, self.y.dtype)
        if summand is not None:
            summand = half * summand[:, None]
        for piece in self.pieces:
            y, t = self.y[piece], self.t[piece]
            if factor is not None:
                y = np.multiply(y, factor[piece], out=t)
            if summand is not None:
                y = np.add(y, summand[piece], out=t)
            if half != 1:
                np.tanh(y, out=t)
            elif self.activation is not None:
                np.maximum(y, 0, out=t)

    def back(self, g: Array) -> tuple[Array | None, Array | None]:
        """From the gradient by z, in place, to that by y, but for the factor that is returned.

        Sets the gradients of γ and β; returns the factor and the sums of g (dbias).
        """
        sums = np.empty((2, g.shape[0]), g.dtype)
        if self.norm is None:
            np.matmul(g, self.ones, out=sums[0])
            return None, sums[0]
        for piece in self.pieces:
            np.matmul(g[piece], self.ones, out=sums[0, piece])
            np.vecdot(g[piece], self.y[piece], out=sums[1, piece])
        sums[1] += self.offset * sums[0]
        dbeta, dot = self.exchange("gradients", sums).sum(axis=0)
        if self.leader:
            self.dgamma, self.dbeta = dot / self.s, dbeta
        k = dot / (self.s * self.s * self.total)
        c = dbeta / self.total + k * self.offset
        for piece in self.pieces:
            y = self.y[piece]
            y *= k[piece, None]
            y += c[piece, None]
            g[piece] -= y
        return self.factor, None


class LinearStage(Affine):
    """Linear layer, batch norm, activation; x and the output are (D, N)."""

    def __init__(self, block: LinearBlock, n: int, total: int, dtype: Any, **options: Any) -> None:
        in_features, out_features = block.features
        super().__init__(
            block, block.linear, np.empty((out_features, n), dtype), total=total, **options
        )
        self.x = np.empty((in_features, n), dtype)
        self.g = np.empty_like(self.y)
        self.dx = np.empty_like(self.x)

    def multiply(self, weight: Array) -> None:
        np.matmul(weight, self.x, out=self.y)

    @property
    def output(self) -> tuple[int, ...]:
        return self.y.shape

    def finish(self, out: Array) -> None:
        if self.halved:
            np.multiply(self.t, 0.5, out=out)
            out += 0.5
        else:
            np.copyto(out, self.t)

    def backward(self, dy: Array) -> Array | None:
        g = self.g
        if self.activation is None:
            np.copyto(g, dy)
        elif self.halved:
            np.multiply(self.t, self.t, out=g)
            np.subtract(1, g, out=g)
            g *= 0.25
            g *= dy
        else:
            np.multiply(dy, self.t > 0, out=g)
        factor, self.dbias = self.back(g)
        if factor is not None:
            g *= factor[:, None]
        self.dweight = g @ self.x.T
        if self.first:
            return None
        return np.matmul(self.layer.weight.data.T, g, out=self.dx)


class ConvStage(Affine):
    """Convolution, batch norm, activation, pooling; x and the output are (C, H, W, N)."""

    def __init__(self, block: ConvBlock, n: int, total: int, dtype: Any, **options: Any) -> None:
        conv = block.conv
        (channels, height, width), (out_channels, rows, columns) = block.shape, block.maps
        (kh, kw), (sh, sw), (ph, pw) = conv.kernel_size, conv.stride, conv.padding
        p, q = block.tile
        self.block, self.tile = block, block.tile
        self.averages = type(block.pool) is not MaxPool2d or block.window == (1, 1)
        self.divisor = block.window[0] * block.window[1] if self.averages else 1
        self.tiles = (rows // p, columns // q)
        self.sight = ((p - 1) * sh + kh, (q - 1) * sw + kw)  # of a tile, in the padded input
        y = np.empty((out_channels, p * q * self.tiles[0] * self.tiles[1] * n), dtype)
        super().__init__(block, conv, y, total=total * rows * columns, **options)

        self.padded = np.zeros((channels, height + 2 * ph, width + 2 * pw, n), dtype)
        self.x = self.padded[:, ph : ph + height, pw : pw + width]
        self.dpadded = np.empty_like(self.padded)
        self.dx = self.dpadded[:, ph : ph + height, pw : pw + width]
        dc, dh, dw, dn = self.padded.strides
        self.windows = as_strided(
            self.padded,
            (channels, *self.sight, *self.tiles, n),
            (dc, dh, dw, p * sh * dh, q * sw * dw, dn),
            writeable=False,
        )
        inputs, values = channels * self.sight[0] * self.sight[1], self.tiles[0] * self.tiles[1] * n
        self.columns = np.empty((inputs, values), dtype)
        self.dcolumns = np.empty_like(self.columns)
        self.banded = np.zeros((out_channels, p, q, channels, *self.sight), dtype)
        self.flat_banded = self.banded.reshape(out_channels * p * q, inputs)
        self.g = np.empty_like(self.y)
        self.products = (out_channels * p * q, values)  # the shape of y as a product
        self.planes = (out_channels, p, q, *self.tiles, n)

    @property
    def output(self) -> tuple[int, ...]:
        return (*self.block.output, self.padded.shape[-1])

    def _blocks(self, i: int, j: int, size: tuple[int, int]) -> Array:
        """In dpadded, what every tile sees from (i, j) on: (C, *size, tiles down, across, N)."""
        dc, dh, dw, dn = self.dpadded.strides
        (sh, sw), (p, q) = self.layer.stride, self.tile
        return as_strided(
            self.dpadded[:, i:, j:],
            (len(self.dpadded), *size, *self.tiles, self.dpadded.shape[-1]),
            (dc, dh, dw, p * sh * dh, q * sw * dw, dn),
        )

    def _places(self, banded: Array) -> list[Array]:
        """The kernel's place in the band of each output of a tile: views (O, C, kH, kW)."""
        (kh, kw), (sh, sw) = self.layer.kernel_size, self.layer.stride
        return [
            banded[:, i, j, :, i * sh : i * sh + kh, j * sw : j * sw + kw]
            for i in range(self.tile[0])
            for j in range(self.tile[1])
        ]

    def multiply(self, weight: Array) -> None:
        np.copyto(self.columns.reshape(self.windows.shape), self.windows)
        for place in self._places(self.banded):
            np.copyto(place, weight)
        np.matmul(self.flat_banded, self.columns, out=self.y.reshape(self.products))

    def _pooled_planes(self, array: Array) -> list[Array]:
        """The planes of ``array`` that one pooling window sees, in reading order.

        Each has the shape (O, P/kH, Q/kW, tiles down, tiles across, N).
        """
        planes = array.reshape(self.planes)
        kh, kw = self.block.window
        return [planes[:, i::kh, j::kw] for i in range(kh) for j in range(kw)]

    def _tiled(self, array: Array) -> Array:
        """A view of (O, H'', W'', N) in the shape of `_pooled_planes`."""
        (kh, kw), (p, q) = self.block.window, self.tile
        p, q = p // kh, q // kw
        (o, h, w, n), (so, sh, sw, sn) = array.shape, array.strides
        split = as_strided(array, (o, h // p, p, w // q, q, n), (so, p * sh, sh, q * sw, sw, sn))
        return np.transpose(split, (0, 2, 4, 1, 3, 5))

    def finish(self, out: Array) -> None:
        """Pool, and what tanh still lacks to be a sigmoid."""
        first, *others = self._pooled_planes(self.t)
        view = self._tiled(out)
        np.copyto(view, first)
        combine = np.add if self.averages else np.maximum
        for plane in others:
            combine(view, plane, out=view)
        if not self.averages:
            self.largest = view.copy() if self.halved else view
        if self.halved:
            out *= 0.5 / self.divisor
            out += 0.5
        elif self.divisor != 1:
            out /= self.divisor

    def backward(self, dy: Array) -> Array | None:
        g = self.g
        if self.halved:
            for piece in self.pieces:
                np.multiply(self.t[piece], self.t[piece], out=g[piece])
                np.subtract(1, g[piece], out=g[piece])
        share = self._tiled(dy) * ((0.25 if self.halved else 1.0) / self.divisor)
        left: Any = True  # where no plane has been the maximum yet: of equal ones, the first is it
        for t, plane in zip(self._pooled_planes(self.t), self._pooled_planes(g), strict=True):
            passed = share
            if not self.averages:
                chosen = (t == self.largest) & left
                left = left & ~chosen
                passed = share * chosen
            if self.halved:
                plane *= passed
            elif self.activation is not None:
                np.multiply(passed, t > 0, out=plane)
            else:
                np.copyto(plane, passed)
        channel_factor, self.dbias = self.back(g)
        product = g.reshape(self.products) @ self.columns.T
        dweight = sum(self._places(product.reshape(self.banded.shape)))
        if channel_factor is not None:
            dweight = dweight * channel_factor[:, None, None, None]
        self.dweight = dweight
        if self.first:
            return None
        if channel_factor is not None:
            self.banded *= channel_factor[:, None, None, None, None, None]
        np.matmul(self.flat_banded.T, g.reshape(self.products), out=self.dcolumns)
        self.dpadded[...] = 0
        dcolumns = self.dcolumns.reshape(self.windows.shape)
        (sh, sw), (p, q) = self.layer.stride, self.tile
        # A tile sees several tiles' widths of the input: each of those is added at once.
        for i in range(0, self.sight[0], p * sh):
            for j in range(0, self.sight[1], q * sw):
                block = dcolumns[:, i : i + p * sh, j : j + q * sw]
                self._blocks(i, j, block.shape[1:3])[...] += block
        return self.dx


def _total(arrays: Iterable[Array]) -> Array:
    first, *others = arrays
    for array in others:
        first = first + array
    return first
