"""Divide a model into stages. A fused engine computes all layers of a stage together.

Nothing here runs on a device. To find out whether the layers fit together, the forward passes of
the layers run on one example of zeros, on the host. The parameters for these forward passes have
the right shapes and dtypes, but take no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npbn import functional as F
from npbn.errors import UnsupportedError
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Buffer,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    dtype_of,
)

_FOLLOWS: dict[type[Layer], str] = {
    BatchNorm: "norm",
    Sigmoid: "activation",
    ReLU: "activation",
    AvgPool2d: "pool",
    MaxPool2d: "pool",
}
"""The types of layer that may follow a convolution or linear layer, and their roles in a stage."""

_ORDER = ("norm", "activation", "pool")


@dataclass(frozen=True)
class StagePlan:
    """A stage: a convolution or linear layer, with the norm, activation and pooling after it.

    A linear layer is described as a convolution of images of one pixel, with the features as
    channels.

    Attributes:
        layer: the convolution or linear layer, which holds the parameters.
        norm, activation, pool: the layers that follow ``layer``, in this order. Each may be None.
        shape: the shape (C, H, W) of the input; (features, 1, 1) for a linear layer.
        maps: the shape (O, H', W') of the output of ``layer``, before pooling; (out features, 1, 1)
            for a linear layer.
        kernel, stride, padding: the parameters of the convolution, each as (vertical, horizontal);
            (1, 1), (1, 1) and (0, 0) for a linear layer.
        window: the window (kH, kW) of the pooling, which is also the stride of the pooling; (1, 1)
            without pooling.
    """

    layer: Conv2d | Linear
    norm: BatchNorm | None
    activation: Sigmoid | ReLU | None
    pool: AvgPool2d | MaxPool2d | None
    shape: tuple[int, int, int]
    maps: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    window: tuple[int, int]

    @property
    def linear(self) -> bool:
        """Return whether ``layer`` is a linear layer."""
        return isinstance(self.layer, Linear)

    @property
    def output(self) -> tuple[int, int, int]:
        """Return the shape (O, H'', W'') of the stage's output, after pooling."""
        channels, height, width = self.maps
        return channels, height // self.window[0], width // self.window[1]

    @property
    def frozen(self) -> bool:
        """Return whether the stage has a batch norm that is in prediction mode now.

        Training does not change the moving averages of such a batch norm.
        """
        return self.norm is not None and not self.norm.training

    def state(self) -> dict[str, Buffer]:
        """Return the arrays of the stage by name: weight, bias, gamma, beta, ..., moving_var."""
        return self.layer.state() | ({} if self.norm is None else self.norm.state())


def plan(model: Sequential, input_shape: tuple[int, ...]) -> list[StagePlan]:
    """Return the stages of a model.

    Args:
        model: a model of npbn's layers.
        input_shape: the shape of one example, without the batch axis.

    Raises:
        UnsupportedError: a layer cannot be put into any stage; the message names the layer.
        ValueError, TypeError: the layers do not fit together, or do not fit the input. The forward
            pass of a layer on one example raises the error.
    """
    layers = list(enumerate(_leaves(model)))
    for i, layer in layers:
        if type(layer) not in {Conv2d, Linear, Flatten, *_FOLLOWS}:
            raise UnsupportedError(f"layer {i} ({layer!r}): the engine has no stage with it")
    shapes = _shapes(model, [layer for _, layer in layers], input_shape)
    stages: list[StagePlan] = []
    while layers:
        i, layer = layers.pop(0)
        if isinstance(layer, Flatten):
            continue
        if not isinstance(layer, Conv2d | Linear):
            raise UnsupportedError(
                f"layer {i} ({layer!r}): the engine has no stage that begins with it"
            )
        following: dict[str, Layer] = {}
        for role in _ORDER:
            if layers and _FOLLOWS.get(type(layers[0][1])) == role:
                following[role] = layers.pop(0)[1]
        stages.append(_stage(layer, following, shapes[i], shapes[i + 1]))
        pool, window = stages[-1].pool, stages[-1].window
        _, height, width = stages[-1].maps
        fits = height % window[0] == 0 == width % window[1]
        if pool is not None and not (fits and pool.stride == window and pool.padding == (0, 0)):
            raise UnsupportedError(
                f"layer {i + len(following)} ({pool!r}) on maps of {height} x {width}: the engine "
                "supports only non-overlapping pooling that divides the image exactly"
            )
    if not stages:
        raise UnsupportedError("the model has no convolution and no linear layer")
    return stages


def _stage(
    layer: Conv2d | Linear,
    following: dict[str, Layer],
    shape: tuple[int, ...],
    maps: tuple[int, ...],
) -> StagePlan:
    """Return the stage of a layer, for inputs of shape ``shape`` and outputs of shape ``maps``."""
    norm, activation, pool = (following.get(role) for role in _ORDER)
    assert norm is None or isinstance(norm, BatchNorm)
    assert activation is None or isinstance(activation, Sigmoid | ReLU)
    assert pool is None or isinstance(pool, AvgPool2d)
    kernel, stride, padding = (1, 1), (1, 1), (0, 0)
    if isinstance(layer, Conv2d):
        _, _, *size = layer.weight.data.shape
        kernel, stride, padding = (int(size[0]), int(size[1])), layer.stride, layer.padding
    window = (1, 1) if pool is None else pool.kernel_size
    (c, h, w), (o, rows, columns) = ((*each, 1, 1)[:3] for each in (shape, maps))
    return StagePlan(
        layer,
        norm,
        activation,
        pool,
        (c, h, w),
        (o, rows, columns),
        kernel,
        stride,
        padding,
        window,
    )


def _leaves(layer: Layer) -> Iterator[Layer]:
    """Yield the layers that a model runs one after another.

    The layers inside a `Sequential` are yielded in its place, unless the `Sequential` is of a
    subclass with its own forward or backward pass.
    """
    plain = isinstance(layer, Sequential) and all(
        getattr(type(layer), name) is getattr(Sequential, name) for name in ("forward", "backward")
    )
    if isinstance(layer, Sequential) and plain:
        for child in layer.layers:
            yield from _leaves(child)
    else:
        yield layer


def _shapes(
    model: Sequential, layers: list[Layer], input_shape: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Return the shape of one example before each layer, and after the last layer.

    Raises:
        ValueError, TypeError: the layers do not fit together, or the last layer's output does not
            fit the loss. The forward pass of a layer or of the loss raises the error.
    """
    x = np.zeros((1, *input_shape), dtype_of(model))
    shapes = [input_shape]
    with np.errstate(all="ignore"):
        for layer in layers:
            x = _without_values(layer).forward(x)
            shapes.append(tuple(map(int, x.shape[1:])))
        F.softmax_cross_entropy(x, np.zeros(1, np.int64))
    return shapes


def _without_values(layer: Layer) -> Layer:
    """Return a copy of a layer in prediction mode, with zeros on the host in place of its arrays.

    The zeros have the shapes and dtypes of the arrays, but take no memory.
    """
    found = copy.copy(layer)
    found.training = False
    for name, array in layer.state().items():
        zeros = np.broadcast_to(np.zeros((), array.data.dtype), tuple(array.data.shape))
        setattr(found, name, type(array)(array.name, zeros))
    return found
