"""Every backward pass against the complex step, and mutants that this check must catch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from cases import (
    EXAMPLES,
    STRATEGIES,
    activation_case,
    batch_norm_case,
    conv2d_case,
    linear_case,
    pool_case,
    softmax_cross_entropy_case,
)
from gradients import check_gradients
from npbn import functional as F


@pytest.mark.parametrize("case", EXAMPLES, ids=repr)
def test_examples(case):
    check_gradients(case)


@given(case=STRATEGIES["batch_norm"])
def test_batch_norm(case):
    check_gradients(case)


@given(case=STRATEGIES["conv2d"])
def test_conv2d(case):
    check_gradients(case)


@given(case=STRATEGIES["pool"])
def test_pooling(case):
    check_gradients(case)


@given(case=STRATEGIES["linear"])
def test_linear(case):
    check_gradients(case)


@given(case=STRATEGIES["activation"])
def test_activations(case):
    check_gradients(case)


@given(case=STRATEGIES["softmax_cross_entropy"])
def test_softmax_cross_entropy(case):
    check_gradients(case)


# Mutants: backward passes with a mistake that people make. Each must fail the check above.


def replaced(index, wrong):
    """A mutant that gets the gradient at ``index`` wrong: ``wrong`` maps (dy, cache, right)."""

    def mutate(backward):
        def mutant(dy, cache):
            gradients = backward(dy, cache)
            if not isinstance(gradients, tuple):
                return wrong(dy, cache, gradients)
            changed = list(gradients)
            changed[index] = wrong(dy, cache, gradients[index])
            return tuple(changed)

        return mutant

    return mutate


def without_mean_path(dy, cache, dx):
    return dx + (cache.gamma / cache.s) * dy.mean(axis=(0, 2, 3), keepdims=True)


def without_variance_path(dy, cache, dx):
    x_hat = cache.x_centred / cache.s
    along = (dy * x_hat).mean(axis=(0, 2, 3), keepdims=True)
    return dx + (cache.gamma / cache.s) * x_hat * along


def without_eps(dy, cache, dx):
    v = (cache.x_centred**2).mean(axis=(0, 2, 3), keepdims=True)
    return F.batch_norm_backward(dy, cache._replace(s=np.sqrt(v)))[0]


def transposed_kernel(dy, cache, dx):
    return F.conv2d_backward(dy, cache._replace(weight=cache.weight[:, :, ::-1, ::-1]))[0]


def overwritten_overlaps(dy, cache, dx):
    """Pooling's backward by assignment, where windows that overlap should add."""
    windows, chosen, _ = cache
    wrong = np.zeros_like(dx)
    kw = windows.kernel_size[1]
    for i, j, (_, rows, columns, _) in windows.places():
        at = chosen == i * kw + j
        view = wrong[:, :, rows, columns]
        view[at] = dy[at]
    return wrong


BN = batch_norm_case(seed=1, shape=(3, 2, 3, 2), training=True, eps=0.1)
PREDICTING = batch_norm_case(seed=2, shape=(3, 2, 3, 2), training=False, eps=0.1)
CONV = conv2d_case(seed=3, n=2, c=2, out=3, image=(5, 5), kernel=(3, 3), stride=2, padding=1)
AVERAGE = pool_case(kind="avg_pool2d", seed=4, n=2, c=2, image=(4, 4), kernel=(2, 2), padding=1)
MAXIMUM = pool_case(kind="max_pool2d", seed=5, n=2, c=2, image=(5, 5), kernel=(3, 3), stride=1)
LINEAR = linear_case(seed=6, n=3, features=3, out=3)
SIGMOID = activation_case(kind="sigmoid", seed=7, shape=(3, 4))
RELU = activation_case(kind="relu", seed=8, shape=(3, 4))
LOSS = softmax_cross_entropy_case(seed=9, n=3, classes=4)

MUTANTS = {
    "bn: dx without the path through the mean": (BN, replaced(0, without_mean_path)),
    "bn: dx without the path through the variance": (BN, replaced(0, without_variance_path)),
    "bn: dx without eps": (BN, replaced(0, without_eps)),
    "bn: dx without gamma": (BN, replaced(0, lambda dy, c, dx: dx / c.gamma)),
    "bn: dgamma from the centred, not the normalized x": (
        BN,
        replaced(1, lambda dy, c, dgamma: dgamma * c.s),
    ),
    "bn: dbeta a mean": (BN, replaced(2, lambda dy, c, dbeta: dbeta / 18)),
    "bn: the gradient of prediction in training": (
        BN,
        lambda b: lambda dy, c: b(dy, c._replace(training=False)),
    ),
    "bn: the gradient of training in prediction": (
        PREDICTING,
        lambda b: lambda dy, c: b(dy, c._replace(training=True)),
    ),
    "bn: dgamma in prediction forgets s": (
        PREDICTING,
        replaced(1, lambda dy, c, dgamma: dgamma * c.s),
    ),
    "bn: dbeta in prediction is zero": (PREDICTING, replaced(2, lambda dy, c, d: 0 * d)),
    "conv: dx with the kernel turned": (CONV, replaced(0, transposed_kernel)),
    "conv: dweight turned": (CONV, replaced(1, lambda dy, c, d: d[:, :, ::-1, ::-1])),
    "conv: dbias over one axis too few": (CONV, replaced(2, lambda dy, c, d: d / dy.shape[0])),
    "average: the count without padding": (
        AVERAGE,
        replaced(0, lambda dy, c, dx: dx * np.where(np.pad(np.ones((2, 2)), 1), 1, 2)),
    ),
    "average: a sum": (AVERAGE, replaced(0, lambda dy, c, dx: 4 * dx)),
    "max: overlapping windows overwrite": (MAXIMUM, replaced(0, overwritten_overlaps)),
    "linear: dx with the weight transposed": (
        LINEAR,
        replaced(0, lambda dy, c, dx: dy @ c.weight.T),
    ),
    "linear: dweight transposed": (LINEAR, replaced(1, lambda dy, c, d: d.T)),
    "linear: dbias a mean": (LINEAR, replaced(2, lambda dy, c, d: d / 3)),
    "sigmoid: the derivative of the derivative's input": (
        SIGMOID,
        replaced(0, lambda dy, c, dx: dy * F.sigmoid(c.y)[0] * (1 - F.sigmoid(c.y)[0])),
    ),
    "relu: passes everything": (RELU, replaced(0, lambda dy, c, dx: dy)),
    "loss: a sum": (LOSS, replaced(0, lambda dy, c, d: 3 * d)),
    "loss: forgets the label": (LOSS, replaced(0, lambda dy, c, d: dy * c.probabilities / 3)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    case, mutate = MUTANTS[name]
    check_gradients(case)
    with pytest.raises(AssertionError, match="is off by"):
        check_gradients(case, mutate(case.backward))


def test_a_staged_mutant_is_caught():
    case = batch_norm_case(seed=1, shape=(3, 2, 3, 2), training=True, eps=0.1, staged=True)
    with pytest.raises(AssertionError, match="is off by"):
        check_gradients(case, replaced(0, without_variance_path)(case.backward))


def test_an_upstream_of_ones_would_not_do():
    """Σy of a normalized x does not depend on x: with ones, even half of dx missing passes."""
    y, cache = BN.forward(**BN.inputs, **BN.constants)[:2]
    dx = F.batch_norm_backward(np.ones_like(y), cache)[0]
    wrong = without_variance_path(np.ones_like(y), cache, dx)
    np.testing.assert_allclose(dx, 0, atol=1e-14)
    np.testing.assert_allclose(wrong, 0, atol=1e-14)
