"""Compiled kernels, one at a time: what they promise about numbers."""

from __future__ import annotations

import decimal
import inspect

import fixed_models
import large_mean
import numpy as np
import pytest
import python_kernels
from exponential_accuracy import (
    EXPONENTIAL,
    LIMIT,
    SIGMOID,
    UNIT,
    error_of_exponential,
    exact,
    largest_error,
    of_all_exponents,
    where_it_matters,
)
from models import TINY, a_split, a_tiny_model

from npbn.errors import UnsupportedError

try:
    from npbn.engine.cpu import CpuEngine
except UnsupportedError as error:
    pytest.skip(str(error), allow_module_level=True)

from numba import njit

from npbn.engine.cpu.network import aligned
from npbn.engine.cpu.normalization import exponential
from npbn.engine.cpu.vector import (
    BYTES,
    at,
    fma,
    full,
    load,
    power_of_two,
    put,
    store,
    total,
    where_equal,
    where_greater,
)


@njit
def exponentials(x, y):
    for i in range(x.size * x.itemsize // BYTES):
        store(y, i, exponential(load(x, i)))


@njit
def sigmoids(x, y):
    for i in range(x.size * x.itemsize // BYTES):
        store(y, i, 1 / (1 + exponential(0 - load(x, i))))  # as `activate` has it


def of_all(kernel, x: np.ndarray) -> np.ndarray:
    """A kernel on any number of numbers."""
    lanes = BYTES // x.itemsize
    padded, y = (aligned(-(-len(x) // lanes) * lanes, x.dtype) for _ in range(2))
    padded[: len(x)] = x
    kernel(padded, y)
    return y[: len(x)]


def test_the_exponential_of_every_float32_exponent():
    x = of_all_exponents("float32", 4096)
    y = of_all(exponentials, x).astype(np.float64)
    right = np.exp(np.clip(x.astype(np.float64), -LIMIT["float32"], LIMIT["float32"]))
    assert np.abs(y / right - 1).max() <= EXPONENTIAL * UNIT["float32"]


def test_the_sigmoid_of_every_float32_exponent():
    x = of_all_exponents("float32", 4096)
    y, exactly = of_all(sigmoids, x).astype(np.float64), x.astype(np.float64)
    right = 1 / (1 + np.exp(np.clip(-exactly, None, 700)))
    inside = exactly >= -LIMIT["float32"]
    assert np.abs(y / right - 1)[inside].max() <= SIGMOID * UNIT["float32"]
    # Beyond, it stays at what e^-87 is, instead of becoming subnormal, or 0.
    assert np.abs(y - right)[~inside].max() <= np.exp(-87) * (1 + SIGMOID * UNIT["float32"])


def test_the_exponential_and_the_sigmoid_where_they_matter(dtype):
    """Against decimal numbers: in float64 NumPy's would be no better."""
    error = error_of_exponential(lambda x: of_all(exponentials, x), dtype)
    assert error <= EXPONENTIAL
    x = where_it_matters(dtype)
    with decimal.localcontext(decimal.Context(prec=40)):
        right = [1 / (1 + e) for e in exact(-x)]
    assert largest_error(of_all(sigmoids, x), right) <= SIGMOID


def test_the_sigmoid_of_every_float64_exponent():
    x = of_all_exponents("float64", 3)
    y, right = of_all(sigmoids, x), 1 / (1 + np.exp(np.clip(-x, None, 709)))
    inside = x >= -LIMIT["float64"]
    # NumPy's has errors of its own.
    assert np.abs(y / right - 1)[inside].max() <= 2 * SIGMOID * UNIT["float64"]
    assert np.abs(y - right)[~inside].max() <= 1e-307


def test_infinities_and_nan(dtype):
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 0, -0.0], dtype)
    sigmoid, e = of_all(sigmoids, x), of_all(exponentials, x)
    assert sigmoid[0] == 1 and 0 <= sigmoid[1] <= 2 * np.exp(-LIMIT[dtype])
    assert np.isfinite(e[:2]).all() and e[0] > np.finfo(dtype).max / 10
    assert e[1] >= np.finfo(dtype).tiny
    assert np.isnan(sigmoid[2:4]).all() and np.isnan(e[2:4]).all()
    assert (sigmoid[4:] == 0.5).all() and (e[4:] == 1).all()


# The vectors' operations, against those of python_kernels on NumPy's rows, which they specify too.

OPERATIONS = 26


def every_operation(v, values, out):
    """With the vectors 0 to 2 of ``values``; ``v`` is where the operations come from."""
    a, b, c = v.load(values, 0), v.load(values, 1), v.load(values, 2)
    number = v.at(values, 3)
    v.store(out, 0, a + b)
    v.store(out, 1, a - b)
    v.store(out, 2, a * b)
    v.store(out, 3, a / b)
    v.store(out, 4, 2 + a)
    v.store(out, 5, a + 2)
    v.store(out, 6, 2 - a)
    v.store(out, 7, a - 2)
    v.store(out, 8, 2 * a)
    v.store(out, 9, a * number)
    v.store(out, 10, 1 / a)
    v.store(out, 11, a / number)
    v.store(out, 12, v.full(values, number))
    v.store(out, 13, v.full(values, 7.0))
    v.store(out, 14, v.where_greater(a, b, a, b))
    v.store(out, 15, v.where_greater(0, c, 0, c))
    v.store(out, 16, v.where_greater(c, 0, a, 0))
    v.store(out, 17, v.where_equal(a, b, c, 0))
    v.store(out, 18, v.where_equal(c, c, a, b))
    v.store(out, 19, v.where_equal(a, 1, b, c))
    v.store(out, 20, v.load(values, 2))
    lanes = BYTES // values.itemsize
    v.put(out, 21 * lanes, v.total(a))
    v.put(out, 21 * lanes + 1, v.total(a * b))
    v.put(out, 21 * lanes + 2, 3)
    v.put(out, 21 * lanes + 3, v.at(values, 2 * lanes + 1))
    v.put(out, 21 * lanes + 4, 0.1)  # of float64, rounded to the array's dtype
    v.put(out, 21 * lanes + 5, v.total(v.full(values, 1.0)))
    v.store(out, 22, v.fma(a, b, c))
    v.store(out, 23, v.fma(number, b, c))
    v.store(out, 24, v.fma(a, number, number))
    v.store(out, 25, v.fma(a, b, a))


def test_operations(dtype):
    operations = at, fma, full, load, put, store, total, where_equal, where_greater
    compiled = as_kernel(every_operation, {one.__name__: one for one in operations})
    lanes = BYTES // np.dtype(dtype).itemsize
    values, out, right = (aligned(size * lanes, dtype) for size in (3, OPERATIONS, OPERATIONS))
    rng = np.random.default_rng(0)
    values[...] = rng.normal(size=3 * lanes)
    values[:3] = values[lanes : lanes + 3] = 1, 0.5, -2  # some are equal
    values[2 * lanes : 2 * lanes + 3] = np.nan, 0, -1
    compiled(values, out)
    every_operation(
        python_kernels.VECTOR,
        *(python_kernels.Checked(array, [(0, array.size)]) for array in (values, right)),
    )
    rounded = 22 * lanes  # before it, the bits are given
    np.testing.assert_array_equal(out[:rounded], right[:rounded])
    error = np.abs(out.astype(np.longdouble) - right)[rounded:]
    assert np.nanmax(error) <= 4 * UNIT[dtype] * np.abs(values[~np.isnan(values)]).max() ** 2
    np.testing.assert_array_equal(np.isnan(out), np.isnan(right))
    assert out[21 * lanes + 5] == lanes


def as_kernel(function, names):
    """Compile it with names of its own in place of v.name."""
    source = inspect.getsource(function).replace("v.", "")
    namespace = {"BYTES": BYTES, **names}
    exec(compile(source.replace("(v, values", "(values"), "<kernel>", "exec"), namespace)
    return njit(namespace[function.__name__])


@njit
def powers(shifted, y):
    for i in range(shifted.size * shifted.itemsize // BYTES):
        store(y, i, power_of_two(load(shifted, i)))


def test_powers_of_two(dtype):
    """Of every exponent that a normal number has."""
    info = np.finfo(dtype)
    k = np.arange(info.minexp, info.maxexp)
    magic = 1.5 * 2.0**info.nmant
    np.testing.assert_array_equal(of_all(powers, (k + magic).astype(dtype)), np.ldexp(1.0, k))


# Whole steps.


def test_a_channel_with_a_large_mean_keeps_its_digits():
    """A mean of 1e4 and a deviation of 1e-2 in float32, to `large_mean.UNIT` u.

    y - mean is exact (both are near 1e4), for the mean as for any other number near. Sums over the
    rows, of rows, and of a vector's lanes have rows + columns + 4 roundings; so many units is the
    mean's error in deviations, too. A square is rounded once more, and so is the variance, into the
    moving average.
    z is rounded in its scale (whose error is half the variance's), its shift, and at last.
    """
    errors = large_mean.errors(CpuEngine)
    sums = large_mean.ROWS + large_mean.COLUMNS + 4
    largest = 4.0  # no example is more deviations from the mean, and β is 1/4
    assert errors["var"] <= sums + 2
    assert errors["z"] <= sums + largest * (sums / 2 + 4)
    # dz has roundings of its own: of three products, and of dx's sum.
    assert errors["dbeta"] <= sums + 4
    assert errors["dgamma"] <= 2 * sums + 8
    assert errors["dy"] <= 4 * sums


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-11), ("float32", 1e-4)])
@pytest.mark.parametrize("batch_size", range(2, 34))
def test_lanes_without_an_example_change_nothing(batch_size, dtype, bound):
    """Batches of one to five chunks, whole and not; evaluations of as many."""
    splits = a_split(TINY, batch_size, 1), a_split(TINY, batch_size - 1, 3)
    sizes = {"batch_size": batch_size, "dtype": dtype, "threads": 2}
    assert python_kernels.difference(CpuEngine, a_tiny_model(), splits, **sizes) <= bound


@pytest.mark.parametrize("make", fixed_models.ALL)
def test_fixed_models_equal_the_layers(make):
    """What the Python harness finds right is right when it is compiled."""
    model, splits, options = make()
    assert python_kernels.difference(CpuEngine, model, splits, **options) <= 1e-11
