"""Whole networks side by side with PyTorch's: same weights, same batches, same losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from npbn import backend
from npbn import functional as F
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD


def torch_network(padding: int, features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=padding),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Conv2d(6, 16, 5),
        nn.BatchNorm2d(16),
        nn.Sigmoid(),
        nn.AvgPool2d(2, 2),
        nn.Flatten(),
        nn.Linear(features, 120),
        nn.BatchNorm1d(120),
        nn.Sigmoid(),
        nn.Linear(120, 84),
        nn.BatchNorm1d(84),
        nn.Sigmoid(),
        nn.Linear(84, 10),
    )


def losses_side_by_side(fashion_mnist, network: str, dtype: str, steps: int):
    """Training losses of npbn and PyTorch, lr 1.0, batches of 256 of Fashion-MNIST."""
    generator = np.random.default_rng(0)
    if network == "A":
        ours, theirs = LeNet(generator=generator), torch_network(0, 256)
    else:
        ours, theirs = BLeNet(generator=generator), torch_network(2, 400)
    ours.to(backend.get_backend("numpy"), dtype)
    theirs.to(getattr(torch, dtype))
    theirs.load_state_dict(
        {
            torch_name(name): torch.tensor(flat(name, value))
            for name, value in ours.state_dict().items()
        },
        strict=False,  # all but num_batches_tracked
    )
    optimizer = SGD(ours.parameters(), 1.0)
    oracle = torch.optim.SGD(theirs.parameters(), lr=1.0)
    pairs = []
    order = generator.permutation(60_000)
    batches = fashion_mnist.train.batches(256, dtype, order=order[: 256 * steps])
    for x, labels in batches:
        loss, cache = F.softmax_cross_entropy(ours.forward(x), labels)
        ours.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
        oracle.zero_grad()
        expected = nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(labels))
        expected.backward()
        oracle.step()
        pairs.append((float(loss), expected.item()))
    assert len(pairs) == steps
    return np.array(pairs).T, ours, theirs


def torch_name(name: str) -> str:
    index, role = name.split(".")
    renamed = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_var": "running_var",
    }
    return f"{index}.{renamed.get(role, role)}"


def flat(name: str, value: np.ndarray) -> np.ndarray:
    """γ, β and the statistics are (C,) in PyTorch."""
    return value if name.endswith(("weight", "bias")) else value.ravel()


@pytest.mark.parametrize("network", ["A", "B"])
def test_thirty_steps_in_float64(fashion_mnist, network):
    """Rounding starts at 1e-16 and training at lr 1.0 magnifies it; 30 steps leave 1e-9."""
    (ours, theirs), model, oracle = losses_side_by_side(fashion_mnist, network, "float64", 30)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert ours[-1] < ours[0] / 1.2  # it did train
    moved = model.layers[1].moving_mean.data.ravel()
    np.testing.assert_allclose(moved, oracle[1].running_mean.numpy(), rtol=1e-8)


def test_a_hundred_steps_in_float32(fashion_mnist):
    (ours, theirs), *_ = losses_side_by_side(fashion_mnist, "A", "float32", 100)
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_predictions_agree_with_the_same_statistics(fashion_mnist):
    """Prediction mode divides by the same √(v + eps): outputs agree to rounding."""
    _, ours, theirs = losses_side_by_side(fashion_mnist, "A", "float64", 3)
    for name, value in ours.state_dict().items():
        theirs.state_dict()[torch_name(name)].copy_(torch.tensor(flat(name, value)))
    ours.eval()
    theirs.eval()
    ((x, _),) = fashion_mnist.test.batches(64, "float64", order=np.arange(64))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours.forward(x), expected, rtol=1e-11, atol=1e-11)
