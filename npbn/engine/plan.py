"""From layers to blocks: what a stage of the engine computes in one go. Knows no array library."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

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
class Block:
    """A layer with parameters and what follows it: batch norm and activation, each or none."""

    layer: Any
    norm: BatchNorm | None
    activation: Sigmoid | ReLU | None

    @property
    def halved(self) -> bool:
        """A sigmoid follows; it is made of the tanh of half its argument."""
        return type(self.activation) is Sigmoid

    @property
    def divisor(self) -> int:
        """How many values average pooling takes the mean of."""
        return 1

    @property
    def products(self) -> int:
        """How many the layer sums up for one example; those with padding's zeros count, too."""
        return int(self.layer.weight.data.size)

    @property
    def bias(self) -> Any:
        """The layer's bias; zeros without."""
        weight = self.layer.weight.data
        if self.layer.bias is None:
            return weight.reshape(len(weight), -1)[:, 0] * 0
        return self.layer.bias.data

    def folded(self) -> tuple[Any, Any]:
        """Weight and bias of the same map with batch norm's moving averages in it.

        With tanh's half, too, if a sigmoid follows.
        """
        weight, bias, norm = self.layer.weight.data, self.bias, self.norm
        half = 0.5 if self.halved else 1.0
        if norm is None:
            return half * weight, half * bias
        scale = half * norm.gamma.data.reshape(-1) / (norm.moving_var.reshape(-1) + norm.eps) ** 0.5
        bias = (bias - norm.moving_mean.reshape(-1)) * scale + half * norm.beta.data.reshape(-1)
        return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), bias


@dataclass(frozen=True)
class ConvBlock(Block):
    """Convolution, batch norm, activation and pooling.

    Attributes:
        shape: (C, H, W) of an input.
        maps: (O, H', W') of the convolution's output.
        window: (kH, kW) of the pooling, (1, 1) without.
    """

    pool: AvgPool2d | MaxPool2d | None
    shape: tuple[int, int, int]
    maps: tuple[int, int, int]
    window: tuple[int, int]

    @property
    def output(self) -> tuple[int, int, int]:
        """(O, H'', W'') after pooling."""
        channels, height, width = self.maps
        return channels, height // self.window[0], width // self.window[1]

    @property
    def products(self) -> int:
        return super().products * math.prod(self.maps[1:])

    @property
    def divisor(self) -> int:
        return math.prod(self.window) if type(self.pool) is AvgPool2d else 1


@dataclass(frozen=True)
class LinearBlock(Block):
    """A linear layer, batch norm and activation."""

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        out_features, in_features = self.layer.weight.data.shape
        return in_features, out_features


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


def parameters_of(block: Block) -> list[tuple[str, Any, str]]:
    """What a block computes with, moving averages included: names, owners, their attributes."""
    layer, norm = block.layer, block.norm
    found = [("weight", layer.weight, "data")]
    if layer.bias is not None:
        found.append(("bias", layer.bias, "data"))
    if norm is not None:
        found += [("gamma", norm.gamma, "data"), ("beta", norm.beta, "data")]
        found += [("moving_mean", norm, "moving_mean"), ("moving_var", norm, "moving_var")]
    return found


def without_caches(block: Block) -> Block:
    """The same block of copies of its layers that remember nothing of a forward pass."""

    def bare(value: Any) -> Any:
        if isinstance(value, Layer):
            value = copy.copy(value)
            value._cache = None
        return value

    values = {field.name: bare(getattr(block, field.name)) for field in fields(block)}
    return replace(block, **values)


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
    return ConvBlock(conv, norm, activation, pool, shape, maps, window)
