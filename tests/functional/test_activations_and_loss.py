"""Sigmoid, ReLU and softmax cross-entropy where they are hard: far out, and on bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arrays import to_host
from npbn import functional as F

FAR = [-math.inf, -1e4, -1000.0, -100.0, 0.0, 100.0, 1000.0, 1e4, math.inf]


def test_sigmoid_far_out(xp, dtype):
    y, cache = F.sigmoid(xp.asarray(FAR, dtype=getattr(xp, dtype)))
    dx = to_host(F.sigmoid_backward(xp.ones_like(y), cache))
    y = to_host(y)
    smallest = np.finfo(dtype).smallest_normal
    np.testing.assert_allclose(y[:3], 0, atol=2 * smallest)
    assert y[4] == 0.5
    np.testing.assert_array_equal(y[5:], 1)
    assert np.all(np.diff(y) >= 0)
    assert np.all(np.isfinite(dx)) and dx[4] == 0.25


def test_sigmoid_is_accurate_in_both_tails():
    """Within 3 roundings (exp, sum, quotient) of the exact value wherever that is representable."""
    x = np.linspace(-87, 87, 20001, dtype=np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    y, _ = F.sigmoid(x)
    assert np.max(np.abs(y - exact) / exact) <= 3 * np.finfo(np.float32).eps


def test_sigmoid_far_out_in_complex_numbers():
    y, _ = F.sigmoid(np.array([-1e4 + 1e-30j, 1e4 + 1e-30j]))
    np.testing.assert_allclose(y, [0, 1], atol=1e-300)


def test_nan_passes_through():
    assert math.isnan(F.sigmoid(np.array([math.nan]))[0][0])
    assert math.isnan(F.relu(np.array([math.nan]))[0][0])


def test_relu_at_zero():
    y, cache = F.relu(np.array([-1.0, 0.0, 0.5]))
    np.testing.assert_array_equal(y, [0, 0, 0.5])
    np.testing.assert_array_equal(F.relu_backward(np.array([5.0, 6.0, 7.0]), cache), [0, 0, 7])


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_loss_far_out(xp, dtype, size):
    logits = xp.asarray([[size, -size], [size, -size]], dtype=getattr(xp, dtype))
    loss, cache = F.softmax_cross_entropy(logits, xp.asarray([0, 1]))
    assert float(loss) == size  # the first costs nothing, the second 2 · size
    dlogits = to_host(F.softmax_cross_entropy_backward(cache))
    np.testing.assert_allclose(dlogits, [[0, 0], [0.5, -0.5]], atol=1e-30)


def test_loss_of_examples_with_very_different_logits():
    """Each example is shifted by its own maximum: by another's, it would underflow."""
    logits = np.array([[1000.0, 1001.0], [-1000.0, -1001.0]])
    loss, cache = F.softmax_cross_entropy(logits, np.array([1, 0]))
    np.testing.assert_allclose(loss, math.log1p(math.exp(-1)))
    np.testing.assert_allclose(cache.probabilities.sum(axis=1), 1)


def test_loss_of_equal_logits_is_log_k():
    loss, _ = F.softmax_cross_entropy(np.zeros((3, 10)), np.array([0, 5, 9]))
    np.testing.assert_allclose(loss, math.log(10))
    assert np.shape(loss) == ()


@pytest.mark.parametrize("label", [-1, 3, 2**32])
def test_a_label_out_of_range_makes_the_loss_nan(xp, label):
    loss, _ = F.softmax_cross_entropy(xp.zeros((2, 3)), xp.asarray([0, label]))
    assert math.isnan(float(loss))


def test_unsigned_labels(xp):
    labels = xp.asarray([0, 2], dtype=xp.uint8)
    loss, _ = F.softmax_cross_entropy(xp.zeros((2, 3)), labels)
    assert float(loss) == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"expected labels of shape \(2,\)"),
        (np.zeros(3), np.zeros(3, int), ValueError, r"expected logits of shape \(N, K\)"),
        (np.zeros((2, 3, 1)), np.zeros(2, int), ValueError, r"expected logits of shape \(N, K\)"),
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, "not empty"),
        (np.zeros((2, 3)), np.zeros(2), TypeError, "expected labels of an integer dtype"),
        (np.zeros((2, 3)), [0, 1], TypeError, "expected labels to be an array, got list"),
    ],
)
def test_loss_errors(logits, labels, error, message):
    with pytest.raises(error, match=message):
        F.softmax_cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("dtype", "labels"), [("uint8", [0, 7]), ("int8", [0, 7]), ("int64", [0, 299])]
)
def test_more_classes_than_a_byte_can_count(xp, dtype, labels, rng):
    logits = rng.normal(size=(2, 300))
    given = xp.asarray(labels, dtype=getattr(xp, dtype))
    loss, _ = F.softmax_cross_entropy(xp.asarray(logits), given)
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[[0, 1], labels])
    assert float(loss) == pytest.approx(expected)
