"""SGD and the schedules, with torch as an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arrays import to_host
from npbn.layers import Linear, Parameter, Sequential
from npbn.models import LeNet
from npbn.optim import SGD, Constant, Cosine, StepDecay


@given(
    lr=st.floats(1e-3, 1),
    momentum=st.floats(0, 0.99),
    weight_decay=st.floats(0, 0.1),
)
def test_equal_to_pytorch(lr, momentum, weight_decay, xp):
    rng = np.random.default_rng(0)
    value = rng.normal(size=(3, 2))
    ours = Parameter("weight", xp.asarray(value, copy=True))
    theirs = torch.nn.Parameter(torch.tensor(value))
    optimizer = SGD({"w": ours}, lr, momentum=momentum, weight_decay=weight_decay)
    oracle = torch.optim.SGD([theirs], lr=lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(4):
        gradient = rng.normal(size=value.shape)
        ours.gradient = xp.asarray(gradient)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        oracle.step()
    np.testing.assert_allclose(to_host(ours.data), theirs.detach().numpy(), rtol=1e-13, atol=1e-13)


def test_weight_decay_is_for_weights(device):
    model = LeNet()
    model.to(device)
    for parameter in model.parameters().values():
        parameter.data[...] = 1
        parameter.gradient = device.xp.zeros_like(parameter.data)
    SGD(model.parameters(), 0.5, weight_decay=0.5).step()
    for parameter in model.parameters().values():
        decayed = parameter.name == "weight"
        np.testing.assert_array_equal(to_host(parameter.data), 0.75 if decayed else 1.0)


def test_moves_in_place_and_keeps_the_dtype(device, dtype):
    layer = Linear(2, 2)
    layer.to(device, dtype)
    data = layer.weight.data
    layer.forward(device.asarray(np.ones((1, 2)), dtype))
    layer.backward(device.asarray(np.ones((1, 2)), dtype))
    SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1).step()
    assert layer.weight.data is data and to_host(data).dtype == dtype


def test_step_leaves_the_gradients_alone(xp):
    parameter = Parameter("weight", xp.ones(2))
    parameter.gradient = xp.ones(2)
    optimizer = SGD({"w": parameter}, 0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        optimizer.step()
        np.testing.assert_array_equal(to_host(parameter.gradient), 1)


def test_velocity_is_the_optimizers_own(xp):
    """A layer may write its next gradient into the same array."""
    parameter = Parameter("weight", xp.zeros(1))
    parameter.gradient = xp.zeros(1)
    optimizer = SGD({"w": parameter}, 1.0, momentum=0.5)
    for gradient in (1.0, 2.0, 4.0):
        parameter.gradient[...] = gradient
        optimizer.step()
    np.testing.assert_array_equal(to_host(parameter.data), [-(1 + 2.5 + 5.25)])


def test_step_needs_gradients_and_changes_nothing_without():
    model = Sequential(Linear(2, 2), Linear(2, 2))
    before = model.state_dict()
    model.layers[0].weight.gradient = np.ones((2, 2), np.float32)
    with pytest.raises(RuntimeError, match=r"0\.bias has no gradient"):
        SGD(model.parameters(), 1.0).step()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_schedules():
    assert [Constant(0.5)(t) for t in (0, 99)] == [0.5, 0.5]
    assert [StepDecay(1.0, 3, 0.5)(t) for t in (0, 2, 3, 5, 6)] == [1, 1, 0.5, 0.5, 0.25]
    cosine = Cosine(2.0, 4)
    np.testing.assert_allclose(
        [cosine(t) for t in range(6)], [2, 1 + np.sqrt(0.5), 1, 1 - np.sqrt(0.5), 0, 0], atol=1e-15
    )


def test_the_schedule_is_followed():
    parameter = Parameter("weight", np.zeros(1))
    parameter.gradient = np.ones(1)
    optimizer = SGD({"w": parameter}, StepDecay(1.0, 1, 0.5))
    assert optimizer.lr == 1.0
    for _ in range(3):
        optimizer.step()
    np.testing.assert_array_equal(parameter.data, [-1.75])
    assert optimizer.steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "expected lr as a finite number >= 0, got -1.0"),
        ({"lr": float("nan")}, "expected lr as a finite number >= 0, got nan"),
        ({"lr": "0.1"}, "expected lr as a finite number >= 0, got '0.1'"),
        ({"lr": 0.1j}, "expected lr as a finite number >= 0, got 0.1j"),
        ({"momentum": -0.1}, "expected momentum as a finite number >= 0, got -0.1"),
        ({"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "expected weight_decay as a finite number >= 0, got -1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SGD({"w": Parameter("weight", np.zeros(1))}, **({"lr": 0.1} | options))


@pytest.mark.parametrize(
    "make",
    [
        lambda rate: Constant(rate),
        lambda rate: StepDecay(rate, 2),
        lambda rate: StepDecay(0.1, 2, rate),
        lambda rate: Cosine(rate, 2),
    ],
)
@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_schedules_refuse_what_sgd_refuses(make, rate):
    with pytest.raises(ValueError, match="as a finite number >= 0, got "):
        make(rate)
    assert make(np.float32(0.5))(0) > 0


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="expected at least one parameter, got none"):
        SGD({}, 0.1)


def test_more_errors():
    with pytest.raises(TypeError, match=r"as model.parameters\(\) gives them, got Linear"):
        SGD(Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="expected total >= 1, got 0"):
        Cosine(0.1, 0)
    with pytest.raises(ValueError, match="expected every >= 1, got 0"):
        StepDecay(0.1, 0)
