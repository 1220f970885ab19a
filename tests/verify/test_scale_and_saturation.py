"""Right gradients are called right far from 0 and where 1 - y cancels; mistakes are seen there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npbn import backend
from npbn import functional as F
from npbn.layers import BatchNorm, Linear, Sequential, Sigmoid
from npbn.optim import SGD
from npbn.verify import check_gradients, check_model
from npbn.verify.numeric import extrapolated, takes_complex, unit
from npbn.verify.rounding import coarse


def batch_norm(x, gamma, beta):
    """Batch norm as in homework. np.var conjugates, so the complex step is out."""
    s = np.sqrt(np.var(x, 0) + 1e-5)
    x_hat = (x - x.mean(0)) / s
    return gamma * x_hat + beta, (x_hat, s, gamma)


def batch_norm_backward(dy, cache):
    x_hat, s, gamma = cache
    dbeta, dgamma = dy.sum(0), (dy * x_hat).sum(0)
    return gamma / s * (dy - dbeta / len(dy) - x_hat * dgamma / len(dy)), dgamma, dbeta


def npbn_batch_norm(x, gamma, beta):
    zero = np.zeros_like(gamma).real
    return F.batch_norm(x, gamma, beta, zero, zero + 1, training=True)[:2]


def data(name, rng):
    normal = rng.standard_normal((8, 5))
    rates = 0.1 * rng.random((8, 3))
    return {
        "around 0": normal,
        "around 12": 5 * normal + 12,
        "around 100": normal + 100,
        "kelvin": 290 + 3 * normal,
        "years and rates": np.hstack([2000 + 10 * rng.random((8, 2)), rates]),
    }[name]


NAMES = ("around 0", "around 12", "around 100", "kelvin", "years and rates")


@given(
    exponent=st.floats(-3, 6),
    seed=st.integers(0, 2**32 - 1),
    case=st.sampled_from(["batch norm", "sigmoid", "linear", "softmax"]),
)
def test_npbn_is_right_at_every_offset(exponent, seed, case):
    """From 1e-3 to 1e6, for a deviation of 1; and a mistake of 1 % is seen."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((6, 3)) + rng.choice((-1, 1)) * 10**exponent
    labels = rng.integers(0, 3, 6)
    functions = {
        "batch norm": (npbn_batch_norm, F.batch_norm_backward, ("x", "gamma", "beta")),
        "sigmoid": (F.sigmoid, F.sigmoid_backward, ("x",)),
        "linear": (F.linear, F.linear_backward, ("x", "weight")),
        "softmax": (
            lambda x: F.softmax_cross_entropy(x, labels),
            lambda dy, cache: dy * F.softmax_cross_entropy_backward(cache),
            ("x",),
        ),
    }
    forward, backward, names = functions[case]
    others = {
        "x": x,
        "gamma": rng.standard_normal((1, 3)),
        "beta": rng.standard_normal((1, 3)),
        "weight": rng.standard_normal((4, 3)),
    }
    inputs = {name: others[name] for name in names}
    report = check_gradients(forward, backward, inputs)
    assert report.ok, str(report)

    def wrong(dy, cache):
        gradients = backward(dy, cache)
        first = gradients[0] if isinstance(gradients, tuple) else gradients
        rest = gradients[1:] if isinstance(gradients, tuple) else ()
        return (1.01 * first, *rest)

    if case != "sigmoid" or abs(x).min() < 20:  # else the whole gradient may be rounding
        assert not check_gradients(forward, wrong, inputs).ok


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_of_any_data(name, dtype):
    rng = np.random.default_rng(1)
    x = data(name, rng).astype(dtype)
    gamma, beta = (rng.standard_normal(5).astype(dtype) for _ in range(2))
    inputs = {"x": x, "gamma": gamma, "beta": beta}
    rows = {"x": x, "gamma": gamma[None], "beta": beta[None]}

    def scaled(factor):
        return lambda dy, c: (
            factor * batch_norm_backward(dy, c)[0],
            *batch_norm_backward(dy, c)[1:],
        )

    report = check_gradients(batch_norm, batch_norm_backward, inputs)
    assert report.ok, str(report)
    assert report.findings[0].method == "central difference"
    report = check_gradients(npbn_batch_norm, F.batch_norm_backward, rows)
    assert report.ok, str(report)
    # Central differences of float64 have about 11 digits, those of float32 about 3.
    mistake = 1 + 1e-6 if dtype == "float64" else 1.05
    (dx, *_) = check_gradients(batch_norm, scaled(mistake), inputs).findings
    assert not dx.within, str(dx)


FUNCTIONS = {
    "sin": (np.sin, np.cos),
    "exp": (np.exp, np.exp),
    "sin 50 x": (lambda x: np.sin(50 * x), lambda x: 50 * np.cos(50 * x)),
    "cube": (lambda x: x**3, lambda x: 3 * x**2),
    "relu": (lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0)),
    "with an offset": (lambda x: x * x + 1000, lambda x: 2 * x),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_central_difference_knows_its_error(name, dtype):
    """The estimate is an upper bound, and small: at most 1e-7 in float64 and 0.1 in float32.

    The size is that of the function's terms, max(|f|, |f'|), of which the digits are lost.
    """
    function, slope = FUNCTIONS[name]
    x = (2 * np.random.default_rng(0).standard_normal(40)).astype(dtype)
    for i in range(len(x)):
        value, error = extrapolated(function, x, unit(x, i))
        right = slope(x.astype(np.float64))[i]
        assert abs(value[i] - right) <= error[i]
        size = max(1.0, abs(right), abs(float(function(x)[i])))
        assert error[i] <= (1e-7 if dtype == "float64" else 0.1) * size


def test_steps_that_are_too_large_do_not_agree_by_chance():
    """The rates are tiny beside the median of x, so most steps are much too large for them."""
    rng = np.random.default_rng(0)
    x = np.hstack([2000 + 10 * rng.random((8, 4)), 0.1 * rng.random((8, 1))]).astype(np.float32)
    one = np.ones(5, np.float32)
    inputs = {"x": x, "gamma": one, "beta": one}
    (dx, *_) = check_gradients(batch_norm, batch_norm_backward, inputs).findings
    assert dx.within, str(dx)  # right, or can't tell


def test_a_conjugation_is_seen_although_its_effect_is_small():
    """The variance is 1e-3 of eps, so the conjugation in np.var changes dx by 1e-3 only."""
    rng = np.random.default_rng(0)
    x, signs = 1e-4 * rng.standard_normal((8, 5)), rng.choice((-1.0, 1.0), (8, 5))
    assert not takes_complex(lambda x: batch_norm(x, 1, 0)[0], x, 1e-4 * signs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_mistake_that_rounding_hides_is_not_called_right(dtype):
    """In float16, the rounding is 1e-3; in float32, 1e6 + x² keeps one digit of x²."""
    offset = 0 if dtype == "float16" else 1e6
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(dtype)
    for factor in (2, 2.1, 2.2):
        report = check_gradients(
            lambda x: (np.real(x) ** 2 + np.asarray(offset, dtype), x),
            lambda dy, x, factor=factor: np.asarray(factor, dtype) * x * dy,
            {"x": x},
        )
        assert not report.ok
        if factor == 2:
            assert report.findings[0].within
            assert "can't tell" in str(report) and "float64" in report.findings[0].verdict


def recomputed(x):
    return 1 / (1 + np.exp(-x)), x


def recomputed_backward(dy, x):
    y = 1 / (1 + np.exp(-x))
    return dy * y * (1 - y)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (F.sigmoid, F.sigmoid_backward),
        (recomputed, recomputed_backward),
        (lambda x: recomputed(np.real(x)), recomputed_backward),
    ],
    ids=["npbn", "without a cache of y", "for real numbers"],
)
@pytest.mark.parametrize("low", [2, 10, 20, 30, 33, 36, 40])
def test_saturated_sigmoid(low, forward, backward):
    x = low + np.random.default_rng(0).random((3, 4))
    report = check_gradients(forward, backward, {"x": x})
    assert report.ok, str(report)
    # dx is at most y · exp(-low). A mistake of the size of y must show.
    wrong = check_gradients(forward, lambda dy, c: dy * np.asarray(backward(dy, c) + 1), {"x": x})
    assert not wrong.findings[0].within


def test_a_mistake_is_seen_as_long_as_digits_are_left():
    """At x = 20, 1 - y is 2e-9 and has 7 digits."""
    x = 20 + np.random.default_rng(0).random((3, 4))
    backward = lambda dy, c: (1 + 1e-4) * F.sigmoid_backward(dy, c)  # noqa: E731
    assert not check_gradients(F.sigmoid, backward, {"x": x}).findings[0].within


@pytest.mark.parametrize("margin", [0, 10, 20, 30])
def test_saturated_softmax(margin):
    labels = np.array([0, 1, 2, 0])
    logits = np.random.default_rng(0).standard_normal((4, 3))
    logits[np.arange(4), labels] += margin
    for factor in (1, 1.1):
        (dlogits,) = check_gradients(
            lambda logits: F.softmax_cross_entropy(logits, labels),
            lambda dy, c, factor=factor: factor * dy * F.softmax_cross_entropy_backward(c),
            {"logits": logits},
        ).findings
        assert dlogits.ok == (factor == 1), str(dlogits)


def test_a_network_that_has_learned_by_heart():
    class Scaled(Sigmoid):
        factor = 1.0

        def backward(self, dy):
            return self.factor * super().backward(dy)

    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((24, 10)), rng.integers(0, 3, 24)
    sigmoid = Scaled()
    model = Sequential(
        Linear(10, 32, generator=rng), BatchNorm(32, 2), sigmoid, Linear(32, 3, generator=rng)
    )
    model.to(backend.get_backend("numpy"), "float64")
    optimizer = SGD(model.parameters(), 1.0, momentum=0.9)
    for _ in range(1000):
        loss, cache = F.softmax_cross_entropy(model.forward(x), labels)
        model.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
    assert float(loss) < 1e-3
    report = check_model(model, x, labels)
    assert report.ok, str(report)
    assert report.worst < 1e-10
    sigmoid.factor = 1.001
    verdicts = {f.name: f.within for f in check_model(model, x, labels).findings}
    assert not verdicts["0.weight"] and not verdicts["1.gamma"] and verdicts["3.weight"]


def test_coarse_arithmetic():
    """Each result is off by up to √u = 1.5e-8; what does not round is exact."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 4))
    c = coarse(x, rng)
    for exact in (np.maximum(c, 0), -c, c.max(0), c[1:], np.where(c > 0, c, 0.0)):
        assert np.isin(np.abs(np.asarray(exact)), np.abs(np.append(x, 0))).all()
    y = np.exp(c)
    error = np.abs(np.asarray(y) / np.exp(x) - 1)
    assert 1e-9 < error.max() <= 1.5e-8
    c -= 1  # in place
    assert 0 < np.abs(np.asarray(c) - (x - 1)).max() <= 1e-7
    assert (c > 0).dtype == bool and np.argmax(c) == np.argmax(x)
    assert type(c.sum(0) @ c.T) is type(c)


def test_a_comparison_for_equality_hides_no_mistake():
    """Coarse arithmetic changes which elements equal the maximum: a jump, not rounding."""

    def forward(x):
        return 1.0 * x.max(1), (x, 1.0 * x.max(1))

    for factor, right in ((1, True), (1.001, False)):
        report = check_gradients(
            forward,
            lambda dy, c, factor=factor: factor * dy[:, None] * (c[0] == c[1][:, None]),
            {"x": np.random.default_rng(0).standard_normal((5, 6))},
        )
        assert report.findings[0].within == right, str(report)
