"""The checker at any scale and offset of the inputs, in saturation, and in low precision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npbn import functional as F
from npbn.backend import get_backend
from npbn.layers import BatchNorm, Linear, Sequential, Sigmoid
from npbn.optim import SGD
from npbn.verify import check_gradients, check_model
from npbn.verify.checker import COARSE


def homework(x, gamma, beta):
    """As it is handed in. `numpy.var` conjugates, so there is no complex step."""
    s = np.sqrt(np.var(x, 0) + 1e-5)
    x_hat = (x - x.mean(0)) / s
    return gamma * x_hat + beta, (x_hat, s, gamma)


def homework_backward(dy, cache):
    x_hat, s, gamma = cache
    dbeta, dgamma = dy.sum(0), (dy * x_hat).sum(0)
    return gamma / s * (dy - dbeta / len(dy) - x_hat * dgamma / len(dy)), dgamma, dbeta


def npbn_batch_norm(x, gamma, beta):
    zero = np.zeros_like(gamma).real
    y, cache, _ = F.batch_norm(x, gamma, beta, zero, zero + 1, training=True)
    return y, cache


NORMAL = np.random.default_rng(1).standard_normal((8, 5))
PLACES = {
    "around 0": NORMAL,
    "around 12": 5 * NORMAL + 12,
    "around 100": NORMAL + 100,
    "kelvin": 290 + 3 * NORMAL,
    "years and rates": np.c_[2000 + 10 * NORMAL[:, :2], 0.1 * NORMAL[:, 2:]],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
def test_right_and_wrong_at_any_place(place, dtype):
    """A mistake of 1 % is seen in float64; in float32, one of 5 %, or it cannot be told."""
    rng = np.random.default_rng(2)
    x = PLACES[place].astype(dtype)
    gamma, beta = (rng.standard_normal(5).astype(dtype) for _ in range(2))
    inputs = {"x": x, "gamma": gamma, "beta": beta}
    theirs = check_gradients(homework, homework_backward, inputs)
    assert theirs.ok, str(theirs)
    assert theirs.findings[0].method == "central difference"
    parameters = {"x": x, "gamma": gamma[None], "beta": beta[None]}
    ours = check_gradients(npbn_batch_norm, F.batch_norm_backward, parameters)
    assert ours.ok, str(ours)
    mistake = {"float64": 1.01, "float32": 1.05}[dtype]
    for k in range(3):

        def wrong(dy, cache, k=k):
            gradients = list(homework_backward(dy, cache))
            gradients[k] = gradients[k] * mistake
            return tuple(gradients)

        report = check_gradients(homework, wrong, inputs)
        assert [finding.ok for finding in report.findings] == [j != k for j in range(3)]


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


@pytest.mark.parametrize("low", [10, 20, 30, 40])
def test_a_sigmoid_that_is_saturated(low):
    """1 - y has few digits, or none; what is left of them is right, and no mistake is hidden."""
    x = low + np.random.default_rng(0).random((3, 4))
    assert check_gradients(F.sigmoid, F.sigmoid_backward, {"x": x}).ok
    assert not check_gradients(F.sigmoid, lambda dy, cache: dy * cache.y, {"x": x}).ok
    double = check_gradients(
        F.sigmoid, lambda dy, cache: 2 * F.sigmoid_backward(dy, cache), {"x": x}
    )
    assert double.ok == (low == 40)  # where it is 0


@pytest.mark.parametrize("margin", [10, 20, 30])
def test_a_loss_that_is_almost_0(margin):
    labels = np.array([0, 1, 2, 0])
    logits = np.random.default_rng(0).standard_normal((4, 3))
    logits[np.arange(4), labels] += margin

    def forward(logits):
        return F.softmax_cross_entropy(logits, labels)

    def backward(dy, cache):
        return dy * F.softmax_cross_entropy_backward(cache)

    assert check_gradients(forward, backward, {"logits": logits}).ok
    double = check_gradients(forward, lambda dy, c: 2 * backward(dy, c), {"logits": logits})
    assert not double.ok


def test_a_network_that_knows_its_data_by_heart():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((24, 10)), rng.integers(0, 3, 24)
    model = Sequential(
        *(Linear(10, 32, generator=rng), BatchNorm(32, 2), Sigmoid(), Linear(32, 3, generator=rng))
    )
    model.to(get_backend("numpy"), "float64")
    optimizer = SGD(model.parameters(), 1.0, momentum=0.9)
    for _ in range(1000):
        loss, cache = F.softmax_cross_entropy(model.forward(x), labels)
        model.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
    assert loss < 1e-3
    report = check_model(model, x, labels)
    assert report.ok, str(report)


def test_low_precision_hides_nothing():
    """In float16 rounding is 1e-3, so the bound is above `COARSE`: "can't tell", never "right"."""
    x = NORMAL[:3, :4].astype(np.float16)
    for mistake, expected in ((1.0, "can't tell"), (1.1, "can't tell"), (2.0, "WRONG")):
        report = check_gradients(
            lambda x: (x * x, x), lambda dy, x, m=mistake: np.float16(2 * m) * x * dy, {"x": x}
        )
        assert not report.ok
        assert expected in str(report)
        assert report.findings[0].bound > COARSE


def test_code_that_computes_in_float32_whatever_it_gets():
    """The numeric derivative is float32's then, and so is its error."""

    def forward(x):
        x = np.asarray(x, np.float32)
        return x * x, x

    x = NORMAL.astype(np.float32)
    report = check_gradients(forward, lambda dy, x: 2 * x * dy, {"x": x})
    assert report.ok or "can't tell" in str(report)
    assert not check_gradients(forward, lambda dy, x: np.float32(2.2) * x * dy, {"x": x}).ok


# Code that writes into what it is given, and what is no gradient check.


def test_backward_may_write_into_dy_and_is_told():
    def forward(x):
        y = 1 / (1 + np.exp(-x))
        return y, y

    def backward(dy, y):
        dy *= y * (1 - y)
        return dy

    report = check_gradients(forward, backward, {"x": NORMAL})
    assert report.ok
    assert str(report).endswith("note: the backward pass changes dy, which belongs to its caller")
    report = check_gradients(lambda x: (x * x, x), lambda dy, x: 2 * dy * x, {"x": NORMAL})
    assert report.notes == ()


def test_backward_may_spoil_its_cache():
    def backward(dy, x):
        x *= 2 * dy
        return x

    assert check_gradients(lambda x: (x * x, x.copy()), backward, {"x": NORMAL}).ok


def test_forward_may_write_into_its_input():
    def forward(x):
        x[np.real(x) < 0] = 0
        return x, np.real(x) > 0

    x = NORMAL.copy()
    report = check_gradients(forward, lambda dy, mask: dy * mask, {"x": x})
    assert report.ok
    np.testing.assert_array_equal(x, NORMAL)


def test_a_list_of_gradients_is_a_tuple():
    weight = NORMAL.T[:, :2]
    report = check_gradients(
        lambda x, w: (x @ w, (x, w)),
        lambda dy, cache: [dy @ cache[1].T, cache[0].T @ dy],
        {"x": NORMAL, "w": weight},
    )
    assert report.ok


NOISE = np.random.default_rng(5)


def dropout(x):
    mask = (NOISE.random(x.shape) < 0.5) / 0.5
    return x * mask, mask


@pytest.mark.parametrize(
    ("forward", "x", "error", "message"),
    [
        (dropout, NORMAL, ValueError, "expected the same output for the same inputs; the forward"),
        (lambda x: (np.log(x), x), -np.abs(NORMAL), ValueError, "expected a finite output"),
        (lambda x: x * x, np.arange(4), TypeError, "input x as a floating-point array, got int64"),
        (lambda x: x * x, [1.0], TypeError, "input x as a floating-point array, got list"),
        (lambda x: x * x, 2.0, TypeError, "input x as a floating-point array, got float"),
        (lambda x: x * x, np.zeros((0, 3)), ValueError, "input x to have elements, got shape"),
        (lambda x: (float(np.sum(x.real)), x), NORMAL, TypeError, "output y as a .* got float"),
        (lambda x: ((x, x), x), NORMAL, TypeError, "output y as a floating-point .* got tuple"),
        (lambda x: x > 0, NORMAL, TypeError, "output y as a floating-point array, got bool"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_cannot_be_checked_is_said(forward, x, error, message):
    with pytest.raises(error, match=message):
        check_gradients(forward, lambda dy, cache: dy, {"x": x})
