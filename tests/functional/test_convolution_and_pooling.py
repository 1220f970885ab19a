"""Convolution and pooling against their definitions, as transposes, and at their edges."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given

from arrays import to_host
from cases import STRATEGIES, Case
from npbn import functional as F
from npbn.functional.windows import windows_of

conv_module = sys.modules["npbn.functional.conv2d"]  # the function hides the module of its name


def convolution_by_definition(x, weight, stride, padding):
    """The sum in conv2d's docstring, written as loops."""
    (sh, sw), (ph, pw) = stride, padding
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    n, _, h, w = x.shape
    out, _, kh, kw = weight.shape
    y = np.empty((n, out, (h - kh) // sh + 1, (w - kw) // sw + 1))
    for p in range(y.shape[2]):
        for q in range(y.shape[3]):
            window = x[:, np.newaxis, :, p * sh : p * sh + kh, q * sw : q * sw + kw]
            y[:, :, p, q] = (window * weight).sum(axis=(2, 3, 4))
    return y


def test_convolution_is_what_its_formula_says(rng):
    x, weight = rng.normal(size=(2, 3, 7, 6)), rng.normal(size=(4, 3, 3, 2))
    y, _ = F.conv2d(x, weight, stride=(2, 3), padding=(2, 1))
    expected = convolution_by_definition(x, weight, (2, 3), (2, 1))
    np.testing.assert_allclose(y, expected, atol=1e-13)


@pytest.mark.parametrize("elements", [1, 80, 150, 700, 1500, 10**9])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_rows_in_groups_of_any_size_give_the_same(elements, stride, rng, device, monkeypatch):
    """One row at a time, a few (5 or 11 of 12 at stride 1), or all of them in one product."""
    x, weight = rng.normal(size=(2, 3, 14, 5)), rng.normal(size=(4, 3, 3, 2))
    arguments = [device.asarray(array) for array in (x, weight, np.ones(4))]
    monkeypatch.setattr(conv_module, "elements_at_once", lambda array: elements)
    y, cache = F.conv2d(*arguments, stride=stride)
    expected = convolution_by_definition(x, weight, (stride, stride), (0, 0)) + 1
    np.testing.assert_allclose(to_host(y), expected, atol=1e-13)
    dy = rng.normal(size=y.shape)
    found = F.conv2d_backward(device.asarray(dy), cache)
    monkeypatch.setattr(conv_module, "elements_at_once", lambda array: 1)
    right = F.conv2d_backward(dy, F.conv2d(x, weight, np.ones(4), stride=stride)[1])
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(to_host(one), other, atol=1e-12)


def adjoint(case: Case, inputs: str) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, for a map that is linear in x, without any step size."""
    y, cache = case.forward(**case.inputs)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    gradients = case.backward(dy, cache)
    dx = gradients[0] if isinstance(gradients, tuple) else gradients
    left, right = np.vdot(y, dy), np.vdot(case.inputs[inputs], dx)
    assert abs(left - right) <= 1e-13 * max(1.0, np.abs(y * dy).sum())


@given(case=STRATEGIES["conv2d"])
def test_convolution_backward_is_its_transpose(case):
    case.inputs.pop("bias", None)
    adjoint(case, "x")


@given(case=STRATEGIES["pool"].filter(lambda case: "avg" in repr(case)))
def test_average_pooling_backward_is_its_transpose(case):
    adjoint(case, "x")


@given(case=STRATEGIES["conv2d"])
def test_fold_is_the_transpose_of_unfold(case):
    x, options = case.inputs["x"], case.forward.keywords
    kernel = case.inputs["weight"].shape[2:]
    windows = windows_of(x, kernel, options["stride"], options["padding"])
    strips = conv_module.unfold(x, windows)
    other = np.random.default_rng(0).standard_normal(strips.shape)
    left = np.vdot(strips, other)
    right = np.vdot(x, conv_module.fold(other, windows))
    assert abs(left - right) <= 1e-13 * max(1.0, np.abs(strips * other).sum())


def test_no_bias_no_gradient_of_it(rng):
    y, cache = F.conv2d(rng.normal(size=(1, 1, 3, 3)), rng.normal(size=(1, 1, 2, 2)))
    assert F.conv2d_backward(np.ones_like(y), cache)[2] is None
    y, cache = F.linear(rng.normal(size=(2, 3)), rng.normal(size=(2, 3)))
    assert F.linear_backward(np.ones_like(y), cache)[2] is None


def test_results_are_batch_last_in_memory(rng):
    """What makes it fast; the shape must not show it."""
    y, cache = F.conv2d(rng.normal(size=(4, 2, 6, 6)), rng.normal(size=(3, 2, 3, 3)))
    dx, _, _ = F.conv2d_backward(rng.normal(size=y.shape), cache)
    pooled, _ = F.avg_pool2d(y, 2)
    for array in (y, dx, pooled):
        assert array.transpose(1, 2, 3, 0).flags.c_contiguous


def test_default_options(rng):
    x, weight = rng.normal(size=(1, 2, 5, 7)), rng.normal(size=(3, 2, 2, 3))
    explicit, _ = F.conv2d(x, weight, None, stride=1, padding=0)
    np.testing.assert_array_equal(F.conv2d(x, weight)[0], explicit)
    for pool in (F.avg_pool2d, F.max_pool2d):
        explicit, _ = pool(x, (2, 3), stride=(2, 3), padding=0)
        np.testing.assert_array_equal(pool(x, (2, 3))[0], explicit)


def test_sizes_can_be_numpy_integers(rng):
    """Of a dtype too narrow for the size of the images, too."""
    x = rng.normal(size=(1, 1, 300, 300))
    for pool in (F.avg_pool2d, F.max_pool2d):
        narrow, _ = pool(x, np.uint8(3), stride=(np.int8(2), np.int8(3)), padding=np.int8(1))
        y, _ = pool(x, 3, stride=(2, 3), padding=1)
        np.testing.assert_array_equal(narrow, y)


def test_average_counts_padding_and_divides_by_the_whole_window():
    y, _ = F.avg_pool2d(np.ones((1, 1, 2, 2)), 2, padding=1)
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), 0.25))


def test_windows_that_reach_over_the_edge_are_left_out():
    x = np.arange(25.0).reshape(1, 1, 5, 5)
    y, cache = F.max_pool2d(x, 2)
    np.testing.assert_array_equal(y[0, 0], [[6, 8], [16, 18]])
    dx = F.max_pool2d_backward(np.ones_like(y), cache)
    assert not dx[0, 0, 4].any() and not dx[0, 0, :, 4].any()


def test_maximum_ties_go_to_the_first_in_reading_order(xp):
    x = xp.zeros((1, 1, 2, 4))
    _, cache = F.max_pool2d(x, 2)
    dx = F.max_pool2d_backward(xp.asarray([[[[3.0, 5.0]]]]), cache)
    for column, value in enumerate([3.0, 0.0, 5.0, 0.0]):
        assert float(dx[0, 0, 0, column]) == value
        assert float(dx[0, 0, 1, column]) == 0


def test_maximum_of_negative_numbers_is_not_the_padding():
    y, cache = F.max_pool2d(np.full((1, 1, 2, 2), -7.0), 2, padding=1)
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -7.0))
    np.testing.assert_array_equal(F.max_pool2d_backward(np.ones_like(y), cache), 1)


def test_maximum_of_the_most_negative_numbers():
    lowest = np.finfo(np.float64).min
    y, _ = F.max_pool2d(np.full((1, 1, 2, 2), lowest), 2)
    assert y[0, 0, 0, 0] == lowest


def test_maximum_at_the_last_of_many_places():
    x = np.zeros((1, 1, 20, 20))
    x[..., -1, -1] = 1
    _, cache = F.max_pool2d(x, 20)
    np.testing.assert_array_equal(F.max_pool2d_backward(np.ones((1, 1, 1, 1)), cache), x)


def test_maximum_passes_nan_on():
    """From whichever place of the window."""
    x = np.zeros((1, 1, 2, 10))
    for window, (i, j) in enumerate(np.ndindex(2, 2)):
        x[0, 0, i, 2 * window + j] = math.nan
    y, _ = F.max_pool2d(x, 2)
    np.testing.assert_array_equal(y, [[[[math.nan] * 4 + [0]]]])


X = np.zeros((2, 3, 5, 5))
W = np.zeros((4, 3, 3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.conv2d(X, W[:, :2]), r"expected x of shape \(N, 2, H, W\), got \(2, 3, 5, 5\)"),
        (lambda: F.conv2d(X[:, :2], W), r"expected x of shape \(N, 3, H, W\), got \(2, 2, 5, 5\)"),
        (lambda: F.conv2d(X[0], W), r"expected x of shape \(N, C, H, W\), .* got \(3, 5, 5\)"),
        (lambda: F.conv2d(X[None], W), r"expected x of shape \(N, C, H, W\)"),
        (lambda: F.conv2d(X[:0], W), r"not empty, got \(0, 3, 5, 5\)"),
        (lambda: F.conv2d(X, W[0]), r"expected weight of shape \(out, in, kH, kW\)"),
        (lambda: F.conv2d(X, W[None]), r"expected weight of shape \(out, in, kH, kW\)"),
        (lambda: F.conv2d(X, W, np.zeros(3)), r"expected bias of shape \(4,\), got \(3,\)"),
        (lambda: F.conv2d(X[:, :, :2], W), r"expected images of at least \(3, 3\)"),
        (lambda: F.conv2d(X, W, stride=0), "expected stride as an int >= 1 or a pair.*got 0"),
        (lambda: F.conv2d(X, W, padding=(1, -1)), r"expected padding as an int >= 0.*\(1, -1\)"),
        (lambda: F.conv2d(X, W, stride=(1, 1, 1)), "expected stride"),
        (lambda: F.conv2d(X, W, stride=(1,)), "expected stride"),
        (lambda: F.conv2d(X, W, stride=1.5), "expected stride"),
        (lambda: F.avg_pool2d(X, 0), "expected kernel_size"),
        (lambda: F.avg_pool2d(X, 2, padding=2), r"at most half the kernel \(2, 2\), got \(2, 2\)"),
        (lambda: F.max_pool2d(X, 2, padding=(1, 2)), r"at most half the kernel .* got \(1, 2\)"),
        (lambda: F.max_pool2d(X, 6), r"expected images of at least \(6, 6\)"),
        (lambda: F.linear(X, W), r"expected weight of shape \(out, in\)"),
        (lambda: F.linear(np.ones((2, 5)), np.ones(5)), r"expected weight of shape \(out, in\)"),
        (lambda: F.linear(np.ones(5), np.ones((4, 5))), r"expected x of shape \(N, 5\)"),
        (lambda: F.linear(np.ones((2, 5, 1)), np.ones((4, 5))), r"expected x of shape \(N, 5\)"),
        (lambda: F.linear(np.ones((2, 6)), np.ones((4, 5))), r"expected x of shape \(N, 5\)"),
        (lambda: F.linear(np.ones((2, 3)), np.ones((4, 5))), r"expected x of shape \(N, 5\)"),
        (lambda: F.linear(np.ones((2, 5)), np.ones((4, 5)), np.ones(5)), "expected bias"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_maximum_of_nothing_but_minus_infinity_is_not_in_the_padding():
    """As in PyTorch: the first element of the image in each window."""
    y, cache = F.max_pool2d(np.full((1, 1, 2, 2), -math.inf), 2, stride=1, padding=1)
    dx = F.max_pool2d_backward(np.ones_like(y), cache)
    np.testing.assert_array_equal(dx, [[[[4, 2], [2, 1]]]])
