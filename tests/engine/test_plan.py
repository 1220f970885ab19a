"""From layers to stages, and what planning refuses."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import NUMPY, models

from npbn import functional as F
from npbn.engine.plan import plan
from npbn.errors import UnsupportedError
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
from npbn.models import LeNet


def test_the_stages_of_lenet():
    model = LeNet()
    stages = plan(model, (1, 28, 28))
    assert [(stage.shape, stage.maps, stage.output) for stage in stages] == [
        ((1, 28, 28), (6, 24, 24), (6, 12, 12)),
        ((6, 12, 12), (16, 8, 8), (16, 4, 4)),
        ((256, 1, 1), (120, 1, 1), (120, 1, 1)),
        ((120, 1, 1), (84, 1, 1), (84, 1, 1)),
        ((84, 1, 1), (10, 1, 1), (10, 1, 1)),
    ]
    assert [stage.linear for stage in stages] == [False, False, True, True, True]
    first, last = stages[0], stages[-1]
    assert (first.layer, first.norm, first.activation, first.pool) == model.layers[:4]
    assert (first.kernel, first.stride, first.padding, first.window) == (
        (5, 5),
        (1, 1),
        (0, 0),
        (2, 2),
    )
    assert (last.norm, last.activation, last.pool) == (None, None, None)
    assert (last.kernel, last.stride, last.padding, last.window) == ((1, 1), (1, 1), (0, 0), (1, 1))
    assert list(first.state()) == ["weight", "bias", "gamma", "beta", "moving_mean", "moving_var"]
    assert list(last.state()) == ["weight", "bias"]


@given(drawn=models(), dtype=st.sampled_from(["float32", "float64"]))
def test_stages_fit_together_and_planning_leaves_the_model_alone(drawn, dtype):
    model, shape = drawn
    model.to(NUMPY, dtype)
    before = {name: (array, array.data) for name, array in model.state().items()}
    caches = [layer._cache for layer in model.layers]
    stages = plan(model, shape)
    assert {name: (array, array.data) for name, array in model.state().items()} == before
    assert [layer._cache for layer in model.layers] == caches == [None] * len(caches)
    assert math.prod(stages[0].shape) == math.prod(shape)
    for one, other in itertools.pairwise(stages):
        assert math.prod(one.output) == math.prod(other.shape)
    assert stages[-1].output == (3, 1, 1)
    x = np.zeros((1, *shape), dtype)
    of_layers = [layer for layer in model.layers if isinstance(layer, Conv2d | Linear)]
    for layer in model.layers:
        x = layer.forward(x)
        if layer in of_layers:
            assert stages[of_layers.index(layer)].maps == (*x.shape[1:], 1, 1)[:3]


def test_a_batch_norm_in_prediction_mode_is_frozen():
    model = LeNet()
    stages = plan(model, (1, 28, 28))
    assert not any(stage.frozen for stage in stages)
    model.layers[5].eval()
    assert [stage.frozen for stage in stages] == [False, True, False, False, False]
    assert [stage.frozen for stage in plan(model, (1, 28, 28))][1]


def mixed() -> Sequential:
    model = Sequential(Flatten(), Linear(36, 4), Linear(4, 2))
    model.layers[2].to(NUMPY, "float64")
    return model


@pytest.mark.parametrize(
    "model",
    [
        Sequential(Linear(36, 2)),
        Sequential(Flatten(), Conv2d(1, 2, 3)),
        Sequential(Conv2d(3, 2, 3), Flatten(), Linear(32, 2)),
        Sequential(Conv2d(1, 2, 7), Flatten(), Linear(2, 2)),
        Sequential(Conv2d(1, 2, 3), Linear(32, 2)),
        Sequential(Conv2d(1, 2, 3), Flatten(), Linear(31, 2)),
        Sequential(Conv2d(1, 2, 3), BatchNorm(3, 4), Flatten(), Linear(32, 2)),
        Sequential(Conv2d(1, 2, 3), BatchNorm(2, 2), Flatten(), Linear(32, 2)),
        Sequential(Flatten(), Linear(36, 4), BatchNorm(5, 2), Linear(4, 2)),
        Sequential(Flatten(), Linear(36, 4), BatchNorm(4, 4), Linear(4, 2)),
        Sequential(Conv2d(1, 2, 3), AvgPool2d(5), Flatten(), Linear(2, 2)),
        Sequential(Conv2d(1, 2, 3), MaxPool2d((5, 1)), Flatten(), Linear(2, 2)),
        Sequential(Flatten(), Linear(36, 4), AvgPool2d(2)),
        Sequential(Conv2d(1, 2, 3)),
        Sequential(),
        mixed(),
    ],
    ids=lambda model: re.sub(r"\s*\n\s*", " ", repr(model)),
)
def test_what_the_layers_refuse_is_refused_in_their_words(model):
    x = np.zeros((1, 1, 6, 6), np.float32)
    with pytest.raises((ValueError, TypeError)) as expected:
        F.softmax_cross_entropy(model.forward(x), np.zeros(1, int))
    with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
        plan(model, (1, 6, 6))


class Residual(Sequential):
    """Not what a Sequential computes."""

    def forward(self, x):
        return x + super().forward(x)


class MyLinear(Linear):
    """May compute anything."""


POOLING = "the engine supports only non-overlapping pooling that divides the image exactly"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Conv2d(1, 1, 3), AvgPool2d(2, stride=1)), r"layer 1 \(AvgPool2d\(2, stride=1\)\) on "),
        ((Conv2d(1, 1, 2), ReLU(), AvgPool2d(2)), rf"layer 2 .* on maps of 5 x 5: {POOLING}"),
        ((Conv2d(1, 1, 3), MaxPool2d(2, padding=1)), POOLING),
        ((AvgPool2d(2),), r"layer 0 \(AvgPool2d\(2\)\): the engine has no stage that begins"),
        ((Sigmoid(),), r"layer 0 \(Sigmoid\(\)\): the engine has no stage that begins with it"),
        ((Conv2d(1, 1, 3), Sigmoid(), ReLU()), r"layer 2 \(ReLU\(\)\): the engine has no stage"),
        ((Conv2d(1, 1, 3), ReLU(), BatchNorm(1, 4)), r"layer 2 \(BatchNorm\(1, 4\)\)"),
        ((Sequential(Conv2d(1, 1, 3), Sequential(Sigmoid(), ReLU())),), r"layer 2 \(ReLU\(\)\)"),
        ((), "the model has no convolution and no linear layer"),
        ((Residual(ReLU()),), r"layer 0 \(Residual\(.*\): the engine has no stage with it"),
    ],
)
def test_what_is_not_supported_is_named(layers, message):
    before = Sequential(*layers, Flatten())
    features = before.forward(np.zeros((1, 1, 6, 6), np.float32)).shape[1]
    tail = [Linear(features, 2)] if layers else []
    with pytest.raises(UnsupportedError, match=re.compile(message, re.DOTALL)):
        plan(Sequential(*layers, Flatten(), *tail), (1, 6, 6))


def test_layers_of_other_classes_are_not_supported():
    with pytest.raises(UnsupportedError, match=r"layer 1 \(Linear\(36, 2\)\): the engine has no"):
        plan(Sequential(Flatten(), MyLinear(36, 2)), (1, 6, 6))


def test_planning_warns_of_nothing_whatever_the_parameters_are():
    model = Sequential(Flatten(), Linear(36, 2), BatchNorm(2, 2, eps=1e-37))
    for array in model.state().values():
        array.data[...] = np.nan
    assert len(plan(model, (1, 6, 6))) == 1
