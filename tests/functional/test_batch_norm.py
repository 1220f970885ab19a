"""What batch norm must do beyond having the right gradient."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arrays import to_host, to_library
from cases import STRATEGIES, seeds
from npbn import functional as F

EPS32 = np.finfo(np.float32).eps


batches_of_several = st.tuples(st.integers(2, 8), st.integers(1, 4)) | st.tuples(
    st.integers(2, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)
)


def parameters(shape, dtype=np.float64, gamma=1.0, beta=0.0, mean=0.0, var=1.0):
    """gamma, beta, moving_mean, moving_var for an x of ``shape``."""
    form = (1, shape[1]) + (1,) * (len(shape) - 2)
    return [np.full(form, value, dtype) for value in (gamma, beta, mean, var)]


def axes(x):
    return (0,) if x.ndim == 2 else (0, 2, 3)


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5, 2)])
def test_normalizes_each_feature(shape, xp, dtype, rng):
    """Per channel over batch, height and width: not per pixel."""
    x = rng.normal(3, 2, shape)
    arguments = [to_library(a, xp, dtype) for a in (x, *parameters(shape))]
    y = to_host(F.batch_norm(*arguments, training=True, eps=1e-12)[0])
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(y.mean(axis=axes(x)), 0, atol=tolerance)
    np.testing.assert_allclose(y.std(axis=axes(x)), 1, atol=tolerance)


def test_by_hand():
    """Two examples of one feature, worked out on paper: μ = 2, v = 1, s = √(1 + 3) = 2."""
    x = np.array([[1.0], [3.0]])
    gamma, beta, mean, var = (
        np.array([[4.0]]),
        np.array([[10.0]]),
        np.array([[5.0]]),
        np.array([[7.0]]),
    )
    y, cache, (new_mean, new_var) = F.batch_norm(
        x, gamma, beta, mean, var, training=True, eps=3.0, momentum=0.9
    )
    np.testing.assert_allclose(y, [[8.0], [12.0]])
    np.testing.assert_allclose(new_mean, [[0.9 * 5 + 0.1 * 2]])
    np.testing.assert_allclose(new_var, [[0.9 * 7 + 0.1 * 1]])
    # x̂ = ∓1/2; dβ = 1 + 2, dγ = -1/2 + 2/2; dx = (4/2)(dy - 3/2 - x̂ · (1/2)/2)
    dx, dgamma, dbeta = F.batch_norm_backward(np.array([[1.0], [2.0]]), cache)
    np.testing.assert_allclose(dbeta, [[3.0]])
    np.testing.assert_allclose(dgamma, [[0.5]])
    np.testing.assert_allclose(dx, [[2 * (1 - 1.5 + 0.125)], [2 * (2 - 1.5 - 0.125)]])


def test_moving_variance_is_biased_and_free_of_eps(rng):
    x = rng.normal(1, 3, (6, 2))
    *_, (mean, var) = F.batch_norm(x, *parameters(x.shape), training=True, eps=0.5, momentum=0.25)
    np.testing.assert_allclose(mean, 0.75 * x.mean(axis=0, keepdims=True))
    np.testing.assert_allclose(var, 0.25 + 0.75 * x.var(axis=0, ddof=0, keepdims=True))


@given(
    momentum=st.floats(0, 1),
    batches=st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 3)), min_size=1, max_size=6),
)
def test_moving_statistics_follow_their_closed_recurrence(momentum, batches):
    """moving_t = m^t · moving_0 + (1 - m) Σ m^(t - k) · batch_k, for mean and variance."""
    moving = parameters((2, 1), mean=0.5, var=2.0)
    for mean, deviation in batches:
        x = np.array([[mean - deviation], [mean + deviation]])
        *_, moving[2:] = F.batch_norm(x, *moving, training=True, momentum=momentum)
    t = len(batches)
    means, variances = zip(*((mean, d**2) for mean, d in batches), strict=True)
    for found, start, values in ((moving[2], 0.5, means), (moving[3], 2.0, variances)):
        expected = momentum**t * start + (1 - momentum) * sum(
            momentum ** (t - k) * value for k, value in enumerate(values, start=1)
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(("momentum", "kept"), [(0, False), (1, True)])
def test_momentum_can_be_zero_or_one(momentum, kept, rng):
    x = rng.normal(1, 3, (6, 2))
    *_, moving = F.batch_norm(x, *parameters(x.shape), training=True, momentum=momentum)
    batch = x.mean(axis=0, keepdims=True), x.var(axis=0, keepdims=True)
    np.testing.assert_allclose(moving, parameters(x.shape)[2:] if kept else batch)


def test_prediction_uses_the_moving_statistics_and_leaves_them(rng):
    x = rng.normal(size=(3, 2))
    gamma, beta, mean, var = parameters(x.shape, gamma=2, beta=1, mean=0.5, var=4)
    y, _, moving = F.batch_norm(x, gamma, beta, mean, var, training=False, eps=1e-5)
    np.testing.assert_allclose(y, 2 * (x - 0.5) / np.sqrt(4 + 1e-5) + 1)
    for new, old in zip(moving, (mean, var), strict=True):
        np.testing.assert_array_equal(new, old)
        assert new is not old and not np.may_share_memory(new, old)


def test_prediction_gradient_is_a_scaling(rng):
    x, dy = rng.normal(size=(2, 3, 2, 2)), rng.normal(size=(2, 3, 2, 2))
    _, cache, _ = F.batch_norm(x, *parameters(x.shape, gamma=3, var=2), training=False)
    dx, _, _ = F.batch_norm_backward(dy, cache)
    np.testing.assert_allclose(dx, dy * 3 / np.sqrt(2 + 1e-5))


@given(case=STRATEGIES["batch_norm"])
def test_both_backwards_agree(case):
    y, cache, _ = case.forward(**case.inputs, **case.constants)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    closed = F.batch_norm_backward(dy, cache)
    staged = F.batch_norm_backward_staged(dy, cache)
    # dx is made of terms of the size of γ/s · (|dy| + |x̂| · mean |dy x̂|).
    x_hat = np.abs(cache.x_centred / cache.s)
    terms = np.abs(cache.gamma / cache.s) * (np.abs(dy) + 1 + x_hat * np.mean(np.abs(dy) * x_hat))
    for name, one, other in zip(("dx", "dgamma", "dbeta"), closed, staged, strict=True):
        scale = terms.max() if name == "dx" else y.size * max(1.0, x_hat.max())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * scale, err_msg=name)


@given(seed=seeds, shape=batches_of_several, eps=st.floats(0.1, 10), gamma=st.floats(-3, 3))
@example(seed=0, shape=(5, 3), eps=1.0, gamma=5e-324)
@example(seed=1, shape=(2, 3, 4, 5), eps=0.5, gamma=3e-320)
def test_identities_of_the_gradient(seed, shape, eps, gamma):
    """Σ dx = 0, and Σ dx·x̂ = (γ/s)·(eps/s²)·Σ dy·x̂, for any dy.

    Both sides may cancel, so they are measured against the terms of which dx is made. Where γ is so
    small that they are subnormal, each is off by a few of the smallest numbers that there are.
    """
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(2, 1, shape), rng.normal(size=shape)
    _, cache, _ = F.batch_norm(x, *parameters(shape, gamma=gamma), training=True, eps=eps)
    x_hat = cache.x_centred / cache.s
    terms = 1e-13 * abs(gamma) * np.abs(dy).sum(axes(x), keepdims=True) / cache.s
    smallest = np.finfo(np.float64).smallest_subnormal
    lost = 100 * smallest * (x.size + np.abs(dy).sum()) * (1 + np.abs(x_hat).max()) ** 2
    for backward in (F.batch_norm_backward, F.batch_norm_backward_staged):
        dx, _, _ = backward(dy, cache)
        assert np.all(np.abs(dx.sum(axes(x), keepdims=True)) <= terms + lost)
        left = (dx * x_hat).sum(axes(x), keepdims=True)
        right = (gamma / cache.s) * (eps / cache.s**2) * (dy * x_hat).sum(axes(x), keepdims=True)
        assert np.all(np.abs(left - right) <= terms * np.abs(x_hat).max() + lost)


@given(seed=seeds, shape=batches_of_several, eps=st.sampled_from([1e-5, 0.1, 1.0]))
def test_identity_when_gamma_and_beta_undo_it(seed, shape, eps):
    """γ = √(σ² + eps) and β = μ: y = x."""
    x = np.random.default_rng(seed).normal(3, 2, shape)
    v, mean = x.var(axis=axes(x), keepdims=True), x.mean(axis=axes(x), keepdims=True)
    y, *_ = F.batch_norm(x, np.sqrt(v + eps), mean, mean, v, training=True, eps=eps)
    np.testing.assert_allclose(y, x, atol=1e-13 * np.abs(x).max())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_batch_of_one_gives_beta_and_no_gradient(shape, dtype, rng):
    x = rng.normal(100, 5, shape).astype(dtype)
    y, cache, _ = F.batch_norm(x, *parameters(shape, dtype, beta=0.25), training=True)
    np.testing.assert_array_equal(y, np.full(shape, 0.25))
    dy = rng.normal(size=shape).astype(dtype)
    for backward in (F.batch_norm_backward, F.batch_norm_backward_staged):
        dx, dgamma, dbeta = backward(dy, cache)
        # (dy - dβ/m) with m = 1 is exactly 0; staged, dμ takes back exactly what x̄ got.
        np.testing.assert_array_equal(dx, 0)
        np.testing.assert_array_equal(dgamma, 0)
        np.testing.assert_array_equal(dbeta.ravel(), dy.ravel())


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e6])
@pytest.mark.parametrize("shape", [(100, 2), (7, 2, 9, 11)])
def test_constant_channel(value, shape, dtype, rng):
    """The output is β and the gradient at most γ/√eps times the upstream one, not NaN or huge."""
    x = np.full(shape, value, dtype)
    y, cache, _ = F.batch_norm(x, *parameters(shape, dtype, beta=0.5), training=True)
    np.testing.assert_allclose(y, 0.5, atol=1e-6)
    dy = rng.normal(size=shape).astype(dtype)
    for backward in (F.batch_norm_backward, F.batch_norm_backward_staged):
        dx, _, _ = backward(dy, cache)
        assert np.all(np.abs(dx) <= 2 * np.abs(dy).max() / np.sqrt(1e-5))


def test_float32_with_a_mean_far_from_zero(rng):
    """Mean 10⁴, deviation 10⁻²: E[x²] - E[x]² would be off by 10⁵ deviations.

    The float32 numbers near 10⁴ are 2⁻¹⁰ apart, but x - μ is exact for them, so that y is as
    accurate as anywhere: a handful of roundings of values below 5, and of sums of m terms added
    pairwise (at most log2(m) + 8 roundings deep).
    """
    x = rng.normal(1e4, 1e-2, (256, 3, 5, 5)).astype(np.float32)
    arguments = parameters(x.shape, np.float32)
    y, cache, _ = F.batch_norm(x, *arguments, training=True, eps=1e-10)
    exact, exact_cache, _ = F.batch_norm(
        x.astype(np.float64), *parameters(x.shape), training=True, eps=1e-10
    )
    bound = (np.log2(x.size / 3) + 16) * EPS32 * 5
    assert np.abs(y - exact).max() <= bound
    dy = rng.normal(size=x.shape).astype(np.float32)
    dx, _, _ = F.batch_norm_backward(dy, cache)
    right, _, _ = F.batch_norm_backward(dy.astype(np.float64), exact_cache)
    assert np.abs(dx - right).max() <= bound * np.abs(right).max()


@given(seed=seeds, shape=batches_of_several)
def test_permuting_the_batch_permutes_the_result(seed, shape):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=shape), rng.normal(size=shape)
    order = rng.permutation(shape[0])
    y, cache, moving = F.batch_norm(x, *parameters(shape), training=True, eps=0.1)
    permuted, permuted_cache, same = F.batch_norm(
        x[order], *parameters(shape), training=True, eps=0.1
    )
    np.testing.assert_allclose(permuted, y[order], atol=1e-13)
    np.testing.assert_allclose(same, moving, atol=1e-14)
    for backward in (F.batch_norm_backward, F.batch_norm_backward_staged):
        dx, dgamma, dbeta = backward(dy, cache)
        same_dx, same_dgamma, same_dbeta = backward(dy[order], permuted_cache)
        # s is at least √0.1, so that no term exceeds 10 |dy|.
        np.testing.assert_allclose(same_dx, dx[order], atol=1e-13 * np.abs(dy).sum())
        np.testing.assert_allclose(same_dgamma, dgamma, atol=1e-13 * np.abs(dy).sum())
        np.testing.assert_allclose(same_dbeta, dbeta, atol=1e-13 * np.abs(dy).sum())


@given(scale=st.floats(0.01, 100), shift=st.floats(-100, 100), eps=st.sampled_from([1e-3, 1.0]))
def test_scale_and_shift_of_the_input_cancel(scale, shift, eps):
    """BN(a·x + b; a²·eps) = BN(x; eps) for a > 0."""
    x = np.random.default_rng(0).normal(size=(6, 2))
    y, *_ = F.batch_norm(x, *parameters(x.shape), training=True, eps=eps)
    moved, *_ = F.batch_norm(
        scale * x + shift, *parameters(x.shape), training=True, eps=scale**2 * eps
    )
    # Adding the shift rounds x to |shift| · 1e-16, which a^-1 magnifies.
    np.testing.assert_allclose(moved, y, atol=1e-14 * (1 + abs(shift) / scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3, 4))}, r"expected x of shape \(N, D\) or \(N, C, H, W\)"),
        ({"x": np.zeros((0, 3))}, "not empty"),
        ({"beta": np.ones((3, 1))}, r"expected beta of shape \(1, 3\), got \(3, 1\)"),
        ({"moving_mean": np.ones((1, 1))}, r"expected moving_mean of shape \(1, 3\)"),
        ({"gamma": np.ones((3,))}, r"expected gamma of shape \(1, 3\), got \(3,\)"),
        ({"moving_var": np.ones((1, 4))}, r"expected moving_var of shape \(1, 3\), got \(1, 4\)"),
        ({"eps": -1e-5}, "expected eps >= 2.23e-308 for float64, got -1e-05"),
        ({"momentum": -0.1}, "expected momentum between 0 and 1, got -0.1"),
        ({"eps": 0.0}, "expected eps >= 2.23e-308 for float64, got 0.0"),
        ({"momentum": 1.5}, "expected momentum between 0 and 1, got 1.5"),
    ],
)
def test_errors(change, message):
    names = ("gamma", "beta", "moving_mean", "moving_var")
    arguments = {"x": np.zeros((2, 3)), **dict(zip(names, parameters((2, 3)), strict=True))}
    with pytest.raises(ValueError, match=message):
        F.batch_norm(**(arguments | change), training=True)


def test_a_numpy_scalar_does_not_impose_its_dtype(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    options = {"eps": np.float64(1e-5), "momentum": np.float64(0.9)}
    y, _, moving = F.batch_norm(x, *parameters(x.shape, np.float32), training=True, **options)
    assert {array.dtype for array in (y, *moving)} == {np.dtype("float32")}


@pytest.mark.parametrize("training", [True, False])
def test_an_eps_that_vanishes_in_the_dtype_is_refused(training):
    """Below the smallest normal number. A constant feature would be 0 / 0 there."""
    x = np.full((8, 3), 0.5, np.float32)
    arguments = [array.astype(np.float32) for array in parameters((8, 3))]
    for eps in (1e-39, 1e-46, 1e-300):
        with pytest.raises(ValueError, match=r"expected eps >= 1\.18e-38 for float32, got "):
            F.batch_norm(x, *arguments, training=training, eps=eps)
    y, *_ = F.batch_norm(x, *arguments, training=training, eps=2e-38)
    assert np.isfinite(y).all()


def test_squares_that_overflow_give_beta_and_an_infinite_variance():
    """As the docstring says; a deviation of 1e18 is still all right."""
    x = np.random.default_rng(0).standard_normal((64, 3))
    gamma, beta, mean, var = (array.astype(np.float32) for array in parameters((64, 3)))
    with np.errstate(over="ignore"):
        y, _, (_, moving_var) = F.batch_norm(
            (1e20 * x).astype(np.float32), gamma, beta, mean, var, training=True
        )
    assert np.isposinf(moving_var).all()
    np.testing.assert_array_equal(y, np.broadcast_to(beta, y.shape))
    y, _, (_, moving_var) = F.batch_norm(
        (1e18 * x).astype(np.float32), gamma, 0 * beta, mean, var, training=True
    )
    assert np.isfinite(moving_var).all()
    np.testing.assert_allclose((y / gamma).std(axis=0), 1, rtol=1e-5)
