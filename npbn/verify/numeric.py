r"""Compute derivatives numerically, by evaluating only the function.

**Complex step.** For a function $f$ that is analytic near $x$, a direction $v$ and a tiny $h$,

$$f(x + i h v) = f(x) + i h f'(x) v - \tfrac{1}{2} h^2 f''(x) v^2 + \dots \qquad\Rightarrow\qquad
  f'(x) v = \frac{\mathrm{Im} f(x + i h v)}{h} + O(h^2)$$

No numbers are subtracted, so no digits cancel, and $h$ can be as small as $10^{-30}$. The result is
as accurate as $f$ itself. The code of $f$ must compute the same analytic function for complex
numbers. So the code must not use ``abs`` or conjugation (`numpy.var` conjugates), and may compare
only real parts.

**Central difference.** For code that accepts only real numbers,

$$D(h) = \frac{f(x + h v) - f(x - h v)}{2 h} = f'(x) v + c_2 h^2 + c_4 h^4 + \dots$$

The truncation error is proportional to $h^2$, and the rounding error is proportional to $u / h$,
with $u$ the unit of rounding. The best $h$ depends on the scale on which $f$ changes, which may
differ from $|x|$ by many orders of magnitude. So $D$ is evaluated for $h$, $h/4$, $h/16$ and so on.
From these values, Richardson's extrapolation removes the terms in $h^2, h^4, \dots$ one after
another. The estimate that differs least from the estimates before it is the result. This
difference, together with the rounding error $u |f| / h$, is the estimate of its error (Ridders'
method).

**Sources.** The complex step: W. Squire and G. Trapp, "Using Complex Variables to Estimate
Derivatives of Real Functions", SIAM Review 40(1), 1998. The extrapolation: C. Ridders, "Accurate
computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4(2), 1982; W. Press et
al., "Numerical Recipes", 3rd edition, section 5.7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from npbn.backend import to_numpy
from npbn.functional.arrays import Array

STEP = 1e-30
LEVELS = 18
"""The number of steps of an extrapolated difference. The last step is 4¹⁷ times as short as the
first step."""

Function = Callable[[Array], Array]


def complex_step(function: Function, x: Array, direction: Array | None = None) -> Array:
    """Return the derivative of a function f at x, computed by a complex step.

    Args:
        function: the function f, which maps an array of x's shape to an array of any shape. The
            function must be analytic, and its code must be fit for complex numbers.
        x: an array of float32 or float64, of any library.
        direction: a vector v of x's shape, or None.

    Returns:
        With a direction, the product f'(x)·v, in the shape of f(x). Without a direction, the whole
        Jacobian, whose shape is the shape of f(x) followed by the shape of x. The Jacobian takes
        one evaluation of f for each element of x.
    """
    xp = array_api_compat.array_namespace(x)

    def along(v: Array) -> Array:
        return _imaginary(function(stepped(x, v)), xp) / STEP

    return _jacobian(along, x) if direction is None else along(direction)


def stepped(x: Array, direction: Array) -> Array:
    """Return x + i·h·direction, as a complex array, with i the imaginary unit and h = STEP."""
    xp = array_api_compat.array_namespace(x)
    dtype = xp.complex64 if x.dtype == xp.float32 else xp.complex128
    return xp.astype(x, dtype) + (1j * STEP) * xp.astype(direction, dtype)


def central_difference(function: Function, x: Array, direction: Array | None = None) -> Array:
    """Return the derivative of a function at x, extrapolated from central differences.

    The arguments and the result are those of `complex_step`, but the code may accept only real
    numbers.
    """
    xp = array_api_compat.array_namespace(x)

    def along(v: Array) -> Array:
        values, _ = extrapolated_difference(function, x, v)
        return xp.asarray(values, dtype=x.dtype, device=array_api_compat.device(x))

    return _jacobian(along, x) if direction is None else along(direction)


def extrapolated_difference(
    function: Function, x: Array, direction: Array
) -> tuple[np.ndarray, np.ndarray]:
    """Return the derivative of a function at x along a direction, and estimates of its errors.

    Both results are on the host and have the shape of f(x). An error is infinite if f is not finite
    around x.
    """
    xp = array_api_compat.array_namespace(x)
    moved = xp.where(direction != 0, x, xp.zeros_like(x))
    size = max(float(xp.max(xp.abs(moved))), 1e-3 * float(xp.max(xp.abs(x)))) or 1.0
    # A power of two, because x ± step is exact then.
    step = 2.0 ** math.floor(math.log2(size / 2))
    u = float(xp.finfo(x.dtype).eps)
    enough = 0.25 * u ** (2 / 3)
    best = error = np.zeros(())
    before: list[np.ndarray] = []
    for level in range(LEVELS):
        h = step / 4**level
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            right = to_numpy(function(x + h * direction))
            left = to_numpy(function(x - h * direction))
            row = [(right - left) / (2 * h)]
            rounding = u * np.maximum(np.abs(right), np.abs(left)) / h
            if level == 0:
                best, error = row[0], np.full_like(row[0], np.inf)
            for k, older in enumerate(before):
                row.append(row[k] + (row[k] - older) / (16 ** (k + 1) - 1))
                change = np.maximum(np.abs(row[-1] - row[k]), np.abs(row[-1] - older)) + rounding
                best = np.where(change < error, row[-1], best)
                error = np.fmin(change, error)
        before = row
        if np.all(error <= enough * np.max(np.abs(best), initial=0.0)):
            break
    return best, error


def takes_complex(function: Function, x: Array, direction: Array) -> bool:
    """Return whether the complex step gives the right derivative of a function at x.

    The result is True if three conditions hold. The function accepts complex input. The output is
    complex and has the right real part. The imaginary part agrees with a central difference along
    ``direction``. If code drops or conjugates an imaginary part, the imaginary part of the output
    is wrong by much more than the error of the central difference.
    """
    xp = array_api_compat.array_namespace(x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy only warns if it drops an imaginary part.
            y = function(stepped(x, direction))
    except Exception:  # Code for real numbers may raise any error for complex numbers.
        return False
    if not xp.isdtype(y.dtype, "complex floating"):
        return False
    real = to_numpy(function(x))
    u = float(xp.finfo(x.dtype).eps)
    noise = 64 * u * max(1.0, float(xp.max(xp.abs(x))))  # the rounding of sums of x's size
    if not np.max(np.abs(to_numpy(xp.real(y)) - real)) <= u**0.5 * np.max(np.abs(real)) + noise:
        return False
    expected, uncertain = extrapolated_difference(function, x, direction)
    error = np.abs(to_numpy(xp.imag(y)) / STEP - expected)
    return bool(np.all(error <= 1e-2 * np.max(np.abs(expected)) + 4 * uncertain + noise))


def unit(x: Array, index: int) -> Array:
    """Return an array of x's shape that is 1 at one flat (row-major) index and 0 elsewhere."""
    xp = array_api_compat.array_namespace(x)
    flat = xp.zeros((math.prod(x.shape),), dtype=x.dtype, device=array_api_compat.device(x))
    flat[index] = 1.0
    return xp.reshape(flat, x.shape)


def _imaginary(y: Array, xp: Any) -> Array:
    return xp.imag(y) if xp.isdtype(y.dtype, "complex floating") else xp.zeros_like(y)


def _jacobian(along: Function, x: Array) -> Array:
    xp = array_api_compat.array_namespace(x)
    columns = [along(unit(x, i)) for i in range(math.prod(x.shape))]
    return xp.reshape(xp.stack(columns, axis=-1), (*columns[0].shape, *x.shape))
