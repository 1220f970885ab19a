"""What must hold for every operation, on every array library, in both precisions."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from arrays import arrays_in, to_host, to_library
from cases import EXAMPLES, STRATEGIES, Case

BITS = {"float32": np.finfo(np.float32).eps, "float64": np.finfo(np.float64).eps}
every_example = pytest.mark.parametrize("case", EXAMPLES, ids=repr)


def run(case: Case, xp, dtype, transform=lambda array: array):
    """Forward and backward on ``xp`` in ``dtype``: (arguments, forward results, gradients)."""
    arguments = {
        name: transform(to_library(value, xp, dtype))
        for name, value in (case.inputs | case.constants).items()
    }
    results = case.forward(**arguments)
    dy = transform(to_library(upstream(results[0]), xp, dtype))
    gradients = case.backward(dy, results[1])
    return arguments | {"dy": dy}, results, gradients


def upstream(y) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(tuple(y.shape))


def as_tuple(gradients) -> tuple:
    given = gradients if isinstance(gradients, tuple) else (gradients,)
    return tuple(gradient for gradient in given if gradient is not None)


def assert_close(actual, expected, dtype: str) -> None:
    """Equal to rounding: sums of up to 100 terms, times 10 for γ/s and the products.

    (The examples' statistics are ordinary: s is about 1.)
    """
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1000 * BITS[dtype] * scale)


@every_example
def test_same_on_every_library(case, xp, dtype):
    _, expected, expected_gradients = run(case, np, "float64")
    _, results, gradients = run(case, xp, dtype)
    assert_close(to_host(results[0]), expected[0], dtype)
    pairs = zip(as_tuple(gradients), as_tuple(expected_gradients), strict=True)
    for gradient, right in pairs:
        assert_close(to_host(gradient), right, dtype)


@every_example
def test_all_happens_on_the_device_of_the_arguments(case, dtype):
    """array-api-strict has devices that are none, and refuses to mix them."""
    import array_api_strict

    device = array_api_strict.Device("device1")
    _, expected, expected_gradients = run(case, array_api_strict, dtype)
    _, *found = run(case, array_api_strict, dtype, lambda array: array.to_device(device))
    for array, right in zip(
        arrays_in(tuple(found)), arrays_in((expected, expected_gradients)), strict=True
    ):
        assert array.device == device
        np.testing.assert_array_equal(to_host(array), to_host(right))


@every_example
def test_dtype_is_that_of_the_arguments(case, xp, dtype):
    _, results, gradients = run(case, xp, dtype)
    floating = [
        array
        for array in arrays_in((*results, *as_tuple(gradients)))
        if "float" in str(array.dtype) or "complex" in str(array.dtype)
    ]
    assert len(floating) > 1
    assert {str(array.dtype).rsplit(".")[-1] for array in floating} == {dtype}


@every_example
def test_mixed_precision_is_a_type_error(case, xp):
    arguments = {
        name: to_library(value, xp, "float32")
        for name, value in (case.inputs | case.constants).items()
    }
    floating = [
        name for name, value in (case.inputs | case.constants).items() if value.dtype.kind == "f"
    ]
    for name in floating:
        mixed = arguments | {name: xp.astype(arguments[name], xp.float64)}
        if len(floating) > 1:
            with pytest.raises(TypeError, match=rf"one precision, got (.*\d, )?{name}: .*64"):
                case.forward(**mixed)
        integers = arguments | {name: xp.astype(arguments[name], xp.int64)}
        with pytest.raises(TypeError, match=f"expected {name} of dtype float32 or float64"):
            case.forward(**integers)
    assert floating


@every_example
def test_numbers_and_lists_are_a_type_error(case):
    arguments = case.inputs | case.constants
    for name in case.inputs:
        with pytest.raises(TypeError, match=f"expected {name} to be an array, got list"):
            case.forward(**(arguments | {name: arguments[name].tolist()}))


@every_example
def test_libraries_do_not_mix(case):
    arguments = case.inputs | case.constants
    first, *others = arguments
    for name in others:
        mixed = arguments | {name: array_api_strict.asarray(arguments[name])}
        found = rf"one library, got {first}: numpy, .*\b{name}: array_api_strict"
        with pytest.raises(TypeError, match=found):
            case.forward(**mixed)


@every_example
def test_results_are_on_the_device_of_the_arguments(case):
    """array-api-strict pretends to have several, and refuses to combine arrays of two."""
    device = array_api_strict.Device("device1")
    _, (y, _, *moving), gradients = run(
        case, array_api_strict, "float64", lambda array: array.to_device(device)
    )
    for array in arrays_in((y, *moving, *as_tuple(gradients))):
        assert array.device == device


@every_example
def test_wrong_upstream_shape(case):
    y, cache = case.forward(**case.inputs, **case.constants)[:2]
    if y.ndim > 0:
        with pytest.raises(ValueError, match=r"expected dy of shape \("):
            case.backward(np.zeros((*y.shape, 1)), cache)
        with pytest.raises(ValueError, match=r"expected dy of shape \("):
            case.backward(np.zeros((y.shape[0] + 1, *y.shape[1:])), cache)


@every_example
def test_an_upstream_gradient_of_another_precision_is_a_type_error(case):
    """Even where it meets no numbers of the cache: the arguments' precision is remembered."""
    y, cache = case.forward(**case.inputs, **case.constants)[:2]
    if y.ndim > 0:
        with pytest.raises(TypeError, match="one precision, got dy: float32"):
            case.backward(upstream(y).astype(np.float32), cache)


@every_example
def test_backward_is_linear_in_complex_upstream_gradients(case):
    """backward(a + ib) = backward(a) + i·backward(b)."""
    y, cache = case.forward(**case.inputs, **case.constants)[:2]
    a, b = upstream(y), np.flip(upstream(y))
    together = as_tuple(case.backward(a + 1j * b, cache))
    apart = zip(as_tuple(case.backward(a, cache)), as_tuple(case.backward(b, cache)), strict=True)
    for gradient, (real, imaginary) in zip(together, apart, strict=True):
        assert_close(gradient.real, real, "float64")
        assert_close(gradient.imag, imaginary, "float64")


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(array: np.ndarray) -> np.ndarray:
    """The same values, every other element of a larger array backwards: no order is contiguous."""
    spread = np.zeros(tuple(2 * size for size in array.shape), dtype=array.dtype)
    index = tuple(slice(None, None, -2) for _ in array.shape)
    spread[index] = array
    return spread[index]


@every_example
def test_read_only_inputs_are_left_alone(case, dtype):
    before = {n: to_library(v, np, dtype) for n, v in (case.inputs | case.constants).items()}
    arguments, _, _ = run(case, np, dtype, frozen)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


def batch_last(array: np.ndarray) -> np.ndarray:
    """The first axis innermost, as npbn's own results are."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 0, -1)), -1, 0)


@pytest.mark.parametrize("operation", STRATEGIES)
@given(draw=st.data())
def test_memory_order_does_not_matter(operation, draw):
    case = draw.draw(STRATEGIES[operation])
    dtype = draw.draw(st.sampled_from(["float32", "float64"]))
    orders = st.sampled_from([np.ascontiguousarray, np.asfortranarray, strided, batch_last, frozen])

    def transform(array: np.ndarray) -> np.ndarray:
        return draw.draw(orders)(array) if array.ndim else array

    _, expected, expected_gradients = run(case, np, dtype)
    _, results, gradients = run(case, np, dtype, transform)
    found = (results[0], *as_tuple(gradients))
    tolerance = rounding(case, results[1], dtype)
    for one, other in zip(found, (expected[0], *as_tuple(expected_gradients)), strict=True):
        assert one.dtype == dtype
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


@every_example
def test_nothing_returned_shares_memory_with_an_argument(case, dtype):
    arguments, results, gradients = run(case, np, dtype)
    for name, argument in arguments.items():
        for array in arrays_in((*results, *as_tuple(gradients))):
            assert not np.may_share_memory(argument, array), name


@every_example
def test_repeated_calls_are_identical_to_the_bit(case, xp, dtype):
    """And a backward pass leaves its cache as it was."""
    _, results, gradients = run(case, xp, dtype)
    dy = to_library(upstream(results[0]), xp, dtype)
    once_more = case.backward(dy, results[1])
    _, again, _ = run(case, xp, dtype)
    np.testing.assert_array_equal(to_host(results[0]), to_host(again[0]))
    for gradient, same in zip(as_tuple(gradients), as_tuple(once_more), strict=True):
        np.testing.assert_array_equal(to_host(gradient), to_host(same))


@every_example
def test_complex_inputs_keep_the_real_part(case, xp, dtype):
    """A complex step may not change what the real numbers do."""
    _, real, _ = run(case, np, dtype)
    arguments = {n: to_library(v, xp, dtype) for n, v in (case.inputs | case.constants).items()}
    complex_dtype = {"float32": np.complex64, "float64": np.complex128}[dtype]
    for name in case.inputs:
        stepped = arguments | {
            name: to_library((case.inputs[name] + 1e-30j).astype(complex_dtype), xp)
        }
        y = to_host(case.forward(**stepped)[0])
        assert y.dtype == complex_dtype
        assert_close(y.real, real[0], dtype)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("operation", STRATEGIES)
@given(draw=st.data())
def test_equal_to_pytorch(operation, precision, draw):
    case = draw.draw(STRATEGIES[operation])
    if "gamma" in case.inputs and case.forward.keywords["training"]:
        assume(case.inputs["x"].size > case.inputs["gamma"].size)  # torch wants two values each
    equal_to_pytorch(case, precision)


@every_example
def test_examples_equal_pytorch(case, dtype):
    equal_to_pytorch(case, dtype)


def equal_to_pytorch(case: Case, precision: str) -> None:
    """Forward and every gradient, with torch as an oracle."""
    _, results, gradients = run(case, np, precision)
    tensors = {
        name: torch.tensor(to_library(value, np, precision))
        for name, value in (case.inputs | case.constants).items()
    }
    for name in case.inputs:
        tensors[name].requires_grad_()
    y = case.oracle(torch, **tensors)
    y.backward(torch.tensor(upstream(results[0])).to(y.dtype))
    tolerance = rounding(case, results[1], precision)
    scale = max(1.0, float(np.abs(results[0]).max()))
    np.testing.assert_allclose(results[0], y.detach().numpy(), rtol=0, atol=tolerance * scale)
    for name, gradient in zip(case.inputs, as_tuple(gradients), strict=True):
        expected = tensors[name].grad.numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=tolerance * scale)


def rounding(case: Case, cache, precision: str) -> float:
    """y and its gradients are sums of at most 200 terms; batch norm over few, nearly equal values
    divides by s >= √eps in y and once more in dx."""
    amplification = 1.0
    if "gamma" in case.inputs:
        amplification = max(1.0, 10 / float(np.min(cache.s))) ** 2
    return 200 * BITS[precision] * amplification
