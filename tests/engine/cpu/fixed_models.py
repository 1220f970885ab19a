"""A few tiny models that leave no line of the kernels out, with data and options of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from models import a_split

from npbn.data import Split
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)


class Fixed(NamedTuple):
    """A model, the data that it is trained on and tested with, and the options of the training."""

    model: Sequential
    splits: tuple[Split, Split]
    options: dict[str, Any]


def convolutions() -> Fixed:
    """Seven maps, which are six and one; windows, strides and borders of two different sizes."""
    generator = np.random.default_rng(0)
    model = Sequential(
        Conv2d(2, 7, (3, 2), stride=(2, 1), padding=(1, 2), generator=generator),
        *(BatchNorm(7, 4, eps=0.1, momentum=0.7), Sigmoid(), AvgPool2d((1, 3))),
        Conv2d(7, 3, (2, 1), padding=(0, 1), bias=False, generator=generator),
        *(BatchNorm(3, 4), ReLU(), MaxPool2d((2, 5)), Flatten()),
        Linear(3, 3, generator=generator),
    )
    disturb(model)
    # In float64 three chunks; the last is not whole.
    sizes = {"batch_size": 19, "weight_decay": 0.05, "threads": 3}
    return Fixed(model, (a_split((2, 5, 6), 40, 1), a_split((2, 5, 6), 11, 3)), sizes)


def without_norm() -> Fixed:
    """Biases, no batch norm; two rows of windows; three parts of two chunks or one."""
    generator = np.random.default_rng(1)
    model = Sequential(
        *(Conv2d(1, 3, 2, generator=generator), MaxPool2d(2)),
        *(Conv2d(3, 2, 2, stride=2, padding=1, generator=generator), Sigmoid(), MaxPool2d((1, 2))),
        *(Flatten(), Linear(4, 7, generator=generator), ReLU()),
        Linear(7, 3, generator=generator),
    )
    disturb(model)
    sizes = {"batch_size": 34, "weight_decay": 0.1}
    return Fixed(model, (a_split((1, 5, 5), 40, 4), a_split((1, 5, 5), 9, 5)), sizes)


def linear_layers() -> Fixed:
    """Every kind of linear layer; whole chunks only, no momentum."""
    generator = np.random.default_rng(2)
    model = Sequential(
        *(Flatten(), Linear(10, 8, generator=generator), BatchNorm(8, 2, momentum=0.5), Sigmoid()),
        *(Linear(8, 13, bias=False, generator=generator), ReLU()),
        *(Linear(13, 2, bias=False, generator=generator), BatchNorm(2, 2, eps=1e-3)),
        Linear(2, 7, generator=generator),
    )
    disturb(model)
    sizes = {"batch_size": 16, "momentum": 0.0, "threads": 1}
    splits = a_split((1, 2, 5), 32, 6, 7), a_split((1, 2, 5), 5, 7, 7)
    return Fixed(model, splits, sizes)


def frozen() -> Fixed:
    """Batch norms in prediction mode, with a bias before them and without."""
    generator = np.random.default_rng(3)
    model = Sequential(
        *(Conv2d(1, 2, 2, generator=generator), BatchNorm(2, 4), Sigmoid()),
        *(Conv2d(2, 2, 2, bias=False, generator=generator), BatchNorm(2, 4), AvgPool2d(2)),
        *(Flatten(), Linear(4, 3, generator=generator)),
    )
    disturb(model)
    for i in (1, 4):
        model.layers[i].eval()
    splits = a_split((1, 4, 6), 10, 8), a_split((1, 4, 6), 9, 9)
    return Fixed(model, splits, {"batch_size": 5, "momentum": 0.5})


def ties() -> Fixed:
    """A map of zeros: all of a window is as large. Two logits that are equal at first."""
    generator = np.random.default_rng(4)
    model = Sequential(
        *(Conv2d(1, 2, 2, generator=generator), MaxPool2d((2, 3))),
        *(Conv2d(2, 2, 1, generator=generator), Flatten(), Linear(4, 3, generator=generator)),
    )
    first, last = model.layers[0], model.layers[-1]
    first.weight.data[0] = 0
    last.weight.data[1:] = 0
    last.bias.data[...] = -9, 0, 0
    split = Split(a_split((1, 5, 4), 9, 5).images, np.array([0, 1, 2, 1, 1, 2, 2, 1, 0]))
    return Fixed(model, (split, split), {"batch_size": 9, "steps": 1})


def overflow() -> Fixed:
    """An infinite weight: NaN where a pixel is 0, else 1 after the sigmoid, both in each window."""
    generator = np.random.default_rng(6)
    model = Sequential(
        *(Conv2d(1, 1, 1, bias=False, generator=generator), Sigmoid(), MaxPool2d((1, 2))),
        *(Flatten(), Linear(1, 3, generator=generator)),
    )
    model.layers[0].weight.data[...] = np.inf
    split = Split(np.array([[[[9, 0]]], [[[9, 0]]]], np.uint8), np.array([0, 1]))
    return Fixed(model, (split, split), {"batch_size": 2, "steps": 0})


def labels_out_of_range() -> Fixed:
    generator = np.random.default_rng(8)
    model = Sequential(Flatten(), Linear(2, 3, generator=generator))
    images = a_split((1, 1, 2), 4, 1).images
    train, test = (Split(images, np.array(labels)) for labels in ((0, -1, 2, 1), (0, 2, 3, 1)))
    return Fixed(model, (train, test), {"batch_size": 4, "steps": 1, "threads": 1})


ALL: tuple[Callable[[], Fixed], ...] = (
    convolutions,
    without_norm,
    linear_layers,
    frozen,
    ties,
    overflow,
    labels_out_of_range,
)


def disturb(model: Sequential) -> None:
    """Let no parameter, velocity or moving average be where it is at first."""
    rng = np.random.default_rng(7)
    for name, parameter in model.parameters().items():
        if name.endswith(("gamma", "beta", "bias")):
            parameter.data[...] += rng.uniform(0.2, 0.7, parameter.data.shape)
    for layer in model.layers:
        if isinstance(layer, BatchNorm):
            layer.moving_mean.data[...] = rng.normal(size=layer.moving_mean.data.shape)
            layer.moving_var.data[...] = rng.uniform(0.3, 3, layer.moving_var.data.shape)
