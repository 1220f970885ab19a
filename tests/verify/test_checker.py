"""The checker itself: right code passes, wrong code does not, and kinks are no noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrays import to_library
from cases import EXAMPLES
from npbn import backend
from npbn import functional as F
from npbn.layers import BatchNorm, Linear, ReLU, Sequential
from npbn.models import LeNet
from npbn.verify import central_difference, check_gradients, check_model, complex_step
from npbn.verify.numeric import takes_complex


def test_complex_step_is_exact_to_rounding(xp, dtype):
    """d/dx x³ = 3x², along a direction and as a Jacobian."""
    x = xp.asarray([1.5, -2.0, 0.25], dtype=getattr(xp, dtype))
    v = xp.asarray([1.0, 2.0, -1.0], dtype=getattr(xp, dtype))
    u = np.finfo(dtype).eps
    along = complex_step(lambda x: x * x * x, x, v)
    expected = 3 * x * x * v
    assert float(xp.max(xp.abs(along - expected))) <= 8 * u * 24
    whole = complex_step(lambda x: x * x * x, x)
    assert tuple(whole.shape) == (3, 3)
    for i in range(3):
        for j in range(3):
            right = float(3 * x[i] * x[i]) if i == j else 0.0
            assert abs(float(whole[i, j]) - right) <= 8 * u * 12


def test_central_difference_is_good_to_two_thirds_of_the_digits(xp):
    x = xp.asarray([0.3, 2.0])
    found = central_difference(xp.sin, x)
    for i in range(2):
        assert abs(float(found[i, i]) - math.cos(float(x[i]))) < 1e-9
        assert float(found[i, 1 - i]) == 0


@pytest.mark.parametrize(
    ("function", "fit"),
    [
        (lambda x: x * x, True),
        (np.exp, True),
        (lambda x: np.mean((x - x.mean()) ** 2), True),
        (np.var, False),  # conjugates
        (np.abs, False),
        (lambda x: np.maximum(x, 0.0) * np.real(x), False),
        (lambda x: x.astype(np.float64) ** 2, False),  # drops the imaginary part
        (lambda x: math.exp(x[0, 0]) * np.ones(2), False),  # raises
    ],
)
def test_what_the_complex_step_is_fit_for(function, fit):
    x = np.random.default_rng(0).standard_normal((2, 3))
    assert takes_complex(function, x, np.ones((2, 3))) == fit


@pytest.mark.parametrize("case", EXAMPLES, ids=repr)
def test_npbn_is_right_on_every_library(case, xp):
    inputs = {name: to_library(value, xp) for name, value in case.inputs.items()}
    constants = {name: to_library(value, xp) for name, value in case.constants.items()}
    report = check_gradients(case.forward, case.backward, inputs, constants=constants)
    assert report.ok, str(report)
    assert report.worst <= 1e-12
    assert {finding.method for finding in report.findings} == {"complex step"}


def test_wrong_in_a_single_element_of_many():
    """An element that is not looked at alone shows in the sum of all."""

    def backward(dy, cache):
        dx, dweight, dbias = F.linear_backward(dy, cache)
        dweight = dweight.copy()
        dweight[17, 33] *= 1 + 1e-6
        return dx, dweight, dbias

    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(4, 50)), "weight": rng.normal(size=(40, 50))}
    for seed in range(5):
        report = check_gradients(F.linear, backward, inputs, generator=np.random.default_rng(seed))
        assert [finding.ok for finding in report.findings] == [True, False]


def test_the_report_names_the_worst_element_and_both_values():
    def backward(dy, x):
        dx = 2 * dy * x
        dx[1, 0] += 0.5
        return dx

    report = check_gradients(lambda x: (x * x, x), backward, {"x": np.ones((2, 2))})
    (finding,) = report.findings
    assert not report.ok and finding.index == (1, 0)
    assert finding.analytic == pytest.approx(finding.numeric + 0.5)
    assert "WRONG" in str(report) and "[1, 0]" in str(report) and "complex step" in str(report)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda dx: dx.T, r"expected the shape (2, 3), got (3, 2)"),
        (lambda dx: dx * np.nan, "has NaN or infinite elements"),
        (lambda dx: dx.tolist(), "expected an array, got list"),
        (lambda dx: (dx, dx), "expected 1 gradients (x), got 2"),
    ],
)
def test_what_is_no_gradient_at_all_is_said(wrong, problem):
    report = check_gradients(
        lambda x: (x * x, x), lambda dy, x: wrong(2 * dy * x), {"x": np.ones((2, 3))}
    )
    assert not report.ok
    assert problem in str(report)


def test_code_for_real_numbers_only():
    """numpy.var conjugates, so the complex step would be wrong; it is not used."""

    def forward(x):
        return np.var(x, axis=0), x

    x = np.random.default_rng(0).normal(size=(5, 3))
    right = check_gradients(forward, lambda dy, x: 2 * dy * (x - x.mean(0)) / 5, {"x": x})
    assert right.ok and right.findings[0].method == "central difference"
    wrong = check_gradients(forward, lambda dy, x: 2 * dy * x / 5, {"x": x})
    assert not wrong.ok


@given(seed=st.integers(0, 2**32 - 1))
def test_kinks_are_stepped_around(seed):
    """ReLU at exactly 0 and ties in a maximum, in code for real numbers and in npbn's."""
    rng = np.random.default_rng(seed)
    relu = check_gradients(
        lambda x: (np.maximum(x, 0), x),
        lambda dy, x: dy * (x > 0),
        {"x": np.round(rng.standard_normal((3, 4)))},
        generator=rng,
    )
    assert relu.ok, str(relu)
    pool = check_gradients(
        F.max_pool2d,
        F.max_pool2d_backward,
        {"x": np.floor(2 * rng.standard_normal((1, 1, 4, 4)))},
        constants={"kernel_size": 2, "stride": 1},
        generator=rng,
    )
    assert pool.ok, str(pool)


def test_a_function_of_kinks_alone_is_an_error():
    """The period is 2e-12, much shorter than the steps by which kinks are found, about 1e-8."""
    with pytest.raises(ValueError, match="expected a function with a derivative"):
        check_gradients(lambda x: np.abs(1e12 * x % 2 - 1), lambda dy, _: dy, {"x": np.ones(3)})


def test_batch_of_one_and_constant_features_are_checked():
    parameters = {"moving_mean": np.zeros((1, 2)), "moving_var": np.ones((1, 2))}
    for x in (np.ones((1, 2)), np.full((4, 2), 7.0)):
        report = check_gradients(
            F.batch_norm,
            F.batch_norm_backward,
            {"x": x, "gamma": np.ones((1, 2)), "beta": np.ones((1, 2))},
            constants={**parameters, "training": True},
        )
        assert report.ok, str(report)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_and_its_loss(training):
    model = Sequential(
        Linear(5, 4, generator=np.random.default_rng(0)),
        BatchNorm(4, 2),
        Sequential(ReLU(), Linear(4, 3, generator=np.random.default_rng(1))),
    )
    model.to(backend.get_backend("numpy"), "float64")
    if not training:
        model.eval()
    before = model.state_dict()
    rng = np.random.default_rng(2)
    report = check_model(model, rng.normal(size=(6, 5)), rng.integers(0, 3, 6))
    assert report.ok and report.worst <= 1e-12, str(report)
    names = [finding.name for finding in report.findings]
    assert names == [*model.parameters(), "x"]
    bias = report.findings[names.index("0.bias")]
    assert bias.cancels == training  # batch norm subtracts it
    assert ("its terms cancel" in str(bias)) == training
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_wrong_layer_in_a_model_is_found_and_named():
    class Wrong(BatchNorm):
        def backward(self, dy):
            return super().backward(dy) * 1.001

    model = Sequential(Linear(5, 4), Wrong(4, 2), Linear(4, 3))
    model.to(backend.get_backend("numpy"), "float64")
    rng = np.random.default_rng(0)
    report = check_model(model, rng.normal(size=(6, 5)), rng.integers(0, 3, 6))
    verdicts = {finding.name: finding.ok for finding in report.findings}
    assert not verdicts["0.weight"] and not verdicts["x"]
    assert verdicts["1.gamma"] and verdicts["2.weight"]


def test_lenet():
    model = LeNet(generator=np.random.default_rng(0))
    model.to(backend.get_backend("numpy"), "float64")
    rng = np.random.default_rng(1)
    report = check_model(model, rng.random((4, 1, 28, 28)), rng.integers(0, 10, 4))
    assert report.ok and report.worst <= 1e-12, str(report)
    assert sum(finding.cancels for finding in report.findings) == 4


def test_errors():
    with pytest.raises(ValueError, match="expected method auto, complex step or central"):
        check_gradients(np.exp, np.exp, {"x": np.ones(2)}, method="guess")
    with pytest.raises(ValueError, match="at least one input"):
        check_gradients(np.exp, np.exp, {})


def square(x):
    return x * x, x


def square_backward(dy, x):
    return 2 * x * dy


def test_gradients_in_a_list():
    rng = np.random.default_rng(0)
    report = check_gradients(
        lambda x, w: (x @ w, (x, w)),
        lambda dy, c: [dy @ c[1].T, c[0].T @ dy],
        {"x": rng.standard_normal((3, 4)), "w": rng.standard_normal((4, 2))},
    )
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (np.arange(4), TypeError, "expected x of a floating-point dtype .*, got int64"),
        (np.ones(2) * 1j, TypeError, "expected x of a floating-point dtype .*, got complex128"),
        ([1.0, 2.0], TypeError, "expected x to be an array, got list"),
        (2.0, TypeError, "expected x to be an array, got float"),
        (np.zeros((0, 3)), ValueError, r"expected x with elements, got the shape \(0, 3\)"),
        (np.array([1.0, np.nan]), ValueError, "expected x without NaN"),
    ],
)
def test_inputs_that_cannot_be_checked_are_named(value, error, message):
    with pytest.raises(error, match=message):
        check_gradients(square, square_backward, {"x": value})


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (lambda x: float((x.real**2).sum()), TypeError, "expected .* array y.*, got float for y"),
        (lambda x: ((x**2, x**3), x), TypeError, "expected .* one array y, got tuple for y"),
        (lambda x: x > 0, TypeError, "expected y of a floating-point dtype, got bool"),
        (lambda x: x[:0], ValueError, "expected y with elements"),
        (lambda x: x / np.zeros(()), ValueError, "expected finite outputs, got NaN or infinite"),
    ],
)
def test_outputs_that_have_no_gradient_are_described(forward, error, message):
    with np.errstate(all="ignore"), pytest.raises(error, match=message):
        check_gradients(forward, square_backward, {"x": np.ones(3)})


def test_random_code_is_called_random():
    noise = np.random.default_rng(5)

    def dropout(x):
        mask = 2.0 * (noise.random(x.shape) < 0.5)
        return x * mask, mask

    x = np.ones((3, 4))
    with pytest.raises(ValueError, match="expected a forward pass that returns the same y"):
        check_gradients(dropout, lambda dy, mask: dy * mask, {"x": x})
    with pytest.raises(ValueError, match="expected a backward pass that returns the same"):
        check_gradients(square, lambda dy, x: dropout(2 * x * dy)[0], {"x": x})


def test_code_that_works_in_place_is_judged_by_its_numbers():
    def in_place(dy, x):
        dy *= 2 * x
        return dy

    def clears(dy, x):
        dx = 2 * x * dy
        dy[...] = 0
        return dx

    def relu(x):
        x[x.real < 0] = 0
        return x, x > 0

    x = np.random.default_rng(0).standard_normal((3, 4))
    before = x.copy()
    for backward in (in_place, clears):
        report = check_gradients(square, backward, {"x": x})
        assert report.ok, str(report)
        assert "Note: the backward pass changes dy in place" in str(report)
    report = check_gradients(relu, lambda dy, mask: dy * mask, {"x": x})
    assert report.ok, str(report)
    assert "Note: the forward pass changes x in place" in str(report)
    np.testing.assert_array_equal(x, before)
    assert not check_gradients(square, square_backward, {"x": x}).notes
