r"""Compute derivatives numerically, by evaluating only the function.

**Complex step.** For a function $f$ that is analytic near $x$, a direction $v$ and a tiny $h$,

$$f(x + i h v) = f(x) + i h f'(x) v - \tfrac{1}{2} h^2 f''(x) v^2 + \dots \qquad\Rightarrow\qquad
  f'(x) v = \frac{\mathrm{Im} f(x + i h v)}{h} + O(h^2)$$

No numbers are subtracted, so no digits cancel, and $h$ can be as small as $10^{-30}$. The result is
as accurate as $f$ itself. The code of $f$ must compute the same analytic function for complex
numbers. So the code must not use ``abs`` or conjugation (`numpy.var` conjugates), and may compare
only real parts.

**Central difference.** For code that accepts only real numbers,

$$f'(x) v \approx \frac{f(x + h v) - f(x - h v)}{2 h}$$

The truncation error is proportional to $h^2$, and the rounding error is proportional to $u / h$,
with $u$ the unit of rounding. The two errors are about equal near $h = u^{1/3}$. With this $h$,
about a third of the digits is lost.

**Sources.** The complex step: W. Squire and G. Trapp, "Using Complex Variables to Estimate
Derivatives of Real Functions", SIAM Review 40(1), 1998. The step of the central difference:
W. Press et al., "Numerical Recipes", 3rd edition, section 5.7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import array_api_compat

from npbn.functional.arrays import Array

STEP = 1e-30

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
    """Return the derivative of a function at x, computed by a central difference.

    The step is u^(1/3) · max(1, max |x_i|), with u the unit of rounding of x's dtype. The arguments
    and the result are those of `complex_step`, but the code may accept only real numbers.
    """
    xp = array_api_compat.array_namespace(x)
    size = max(1.0, float(xp.max(xp.abs(x))))
    h = float(xp.finfo(x.dtype).eps) ** (1 / 3) * size

    def along(v: Array) -> Array:
        step = h / max(float(xp.max(xp.abs(v))), math.ulp(0))
        return (function(x + step * v) - function(x - step * v)) / (2 * step)

    return _jacobian(along, x) if direction is None else along(direction)


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
    real = function(x)
    roundoff = float(xp.finfo(x.dtype).eps) ** 0.5
    scale = max(float(xp.max(xp.abs(real))), roundoff)
    if not float(xp.max(xp.abs(xp.real(y) - real))) <= roundoff * scale:
        return False
    expected = central_difference(function, x, direction)
    error = xp.abs(xp.imag(y) / STEP - expected)
    return bool(
        float(xp.max(error)) <= 1e-2 * max(float(xp.max(xp.abs(expected))), roundoff * scale)
    )


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
