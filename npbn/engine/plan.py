"""From layers to blocks: what a stage of the engine computes in one go. Knows no array library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from npbn.errors import UnsupportedError
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)


@dataclass(frozen=True)
class ConvBlock:
    """Convolution, and what follows it: batch norm, activation, pooling, each or none.

    Attributes:
        shape: (C, H, W) of an input.
        maps: (O, H', W') of the convolution's output.
        window: (kH, kW) of the pooling, (1, 1) without.
        tile: (P, Q), how many outputs are computed together, see `tile_of`.
    """

    conv: Conv2d
    norm: BatchNorm | None
    activation: Sigmoid | ReLU | None
    pool: AvgPool2d | MaxPool2d | None
    shape: tuple[int, int, int]
    maps: tuple[int, int, int]
    window: tuple[int, int]
    tile: tuple[int, int]

    @property
    def output(self) -> tuple[int, int, int]:
        """(O, H'', W'') after pooling."""
        channels, height, width = self.maps
        return channels, height // self.window[0], width // self.window[1]


@dataclass(frozen=True)
class LinearBlock:
    """A linear layer, and what follows it: batch norm, activation, each or none."""

    linear: Linear
    norm: BatchNorm | None
    activation: Sigmoid | ReLU | None

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        out_features, in_features = self.linear.weight.data.shape
        return in_features, out_features


Block: TypeAlias = ConvBlock | LinearBlock


def plan(model: Sequential, input_shape: tuple[int, ...]) -> list[Block]:
    """The blocks of a model.

    Args:
        model: of npbn's layers.
        input_shape: of one example, without the batch axis.

    Raises:
        UnsupportedError: there is no stage for what a layer does there; the message names it.
    """
    layers = list(enumerate(_leaves(model)))
    shape = input_shape
    blocks: list[Block] = []

    def take(*kinds: type[Layer]) -> Any:
        """The next layer, if it is of one of these kinds."""
        return layers.pop(0)[1] if layers and type(layers[0][1]) in kinds else None

    while layers:
        i, layer = layers.pop(0)
        if type(layer) is Flatten:
            shape = (math.prod(shape),)
        elif type(layer) is Conv2d and len(shape) == 3:
            conv = _conv_block(layer, take, (shape[0], shape[1], shape[2]))
            if conv is None:
                raise UnsupportedError(
                    f"layer {i} ({layer!r}): the engine pools windows side by side alone, that "
                    "cover the whole image"
                )
            blocks.append(conv)
            shape = conv.output
        elif type(layer) is Linear and len(shape) == 1:
            norm, activation = take(BatchNorm), take(Sigmoid, ReLU)
            linear = LinearBlock(layer, norm, activation)
            blocks.append(linear)
            shape = (linear.features[1],)
        else:
            raise UnsupportedError(
                f"layer {i} ({layer!r}): the engine has no stage that begins with it"
            )
    if len(shape) != 1 or not blocks:
        raise UnsupportedError("the engine's models end with a linear layer")
    return blocks


def _leaves(layer: Layer) -> Iterator[Layer]:
    if isinstance(layer, Sequential):
        for child in layer.layers:
            yield from _leaves(child)
    else:
        yield layer


def _conv_block(
    conv: Conv2d, take: Callable[..., Any], shape: tuple[int, int, int]
) -> ConvBlock | None:
    """The block that begins with ``conv``; None if its pooling is not one that can be fused."""
    norm, activation = take(BatchNorm), take(Sigmoid, ReLU)
    pool = take(AvgPool2d, MaxPool2d)
    out_channels: int = conv.weight.data.shape[0]
    height, width = (
        (size + 2 * p - k) // s + 1
        for size, p, k, s in zip(
            shape[1:], conv.padding, conv.kernel_size, conv.stride, strict=True
        )
    )
    window = (1, 1) if pool is None else pool.kernel_size
    fits = height % window[0] == 0 and width % window[1] == 0
    if pool is not None and not (fits and pool.stride == window and pool.padding == (0, 0)):
        return None
    maps: tuple[int, int, int] = (out_channels, height, width)
    tile = tile_of(conv, shape, maps, window)
    return ConvBlock(conv, norm, activation, pool, shape, maps, window, tile)


def tile_of(
    conv: Conv2d,
    shape: tuple[int, int, int],
    maps: tuple[int, int, int],
    window: tuple[int, int],
) -> tuple[int, int]:
    """How many outputs, vertically and horizontally, are best computed at once.

    A tile of P x Q outputs of all O channels is one product of a matrix (O·P·Q, C·h·w) with the
    h x w inputs that it sees. The larger it is, the better the shape for BLAS, and the fewer bytes
    are copied for an output; but the more zeros are in the matrix. The costs are modelled in
    nanoseconds for an output: a core that computes 95 operations in one at best, half as many for
    every side of the matrix that is as short as 12.5, and copies a number in 0.2.
    """
    (out_channels, height, width), (kh, kw), (sh, sw) = maps, conv.kernel_size, conv.stride

    def cost(tile: tuple[int, int]) -> float:
        outputs = tile[0] * tile[1]
        rows = out_channels * outputs
        columns = shape[0] * ((tile[0] - 1) * sh + kh) * ((tile[1] - 1) * sw + kw)
        flops_per_ns = 95 * rows / (rows + 12.5) * columns / (columns + 12.5)
        return (3 * 2 * rows * columns / flops_per_ns + 2 * 0.2 * columns) / outputs

    tiles = [
        (p, q)
        for p in range(window[0], height + 1, window[0])
        for q in range(window[1], width + 1, window[1])
        if height % p == 0 and width % q == 0
    ]
    return min(tiles, key=cost)
