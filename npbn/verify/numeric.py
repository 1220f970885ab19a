r"""Derivatives by evaluating a function, to hold derivatives that somebody derived against.

**Complex step.** For a function that is analytic near $x$, with a direction $v$ and a tiny $h$,

$$f(x + i h v) = f(x) + i h f'(x) v - \tfrac{1}{2} h^2 f''(x) v^2 + \dots \qquad\Rightarrow\qquad
  f'(x) v = \frac{\mathrm{Im} f(x + i h v)}{h} + O(h^2)$$

Nothing is subtracted, so nothing cancels and $h = 10^{-30}$ can be used: the result is as accurate
as $f$ itself. It needs code that computes in complex numbers what it computes in real ones: no
``abs``, no conjugation (`numpy.var` has one), no comparison but of real parts.

**Central difference.** For code that takes real numbers only,

$$f'(x) v \approx \frac{f(x + h v) - f(x - h v)}{2 h}$$

Its truncation error grows as $h^2$ and its rounding error as $u / h$, with $u$ the unit of
rounding; both are balanced near $h = u^{1/3}$, where about a third of the digits is lost.

**Source.** W. Squire and G. Trapp, "Using Complex Variables to Estimate Derivatives of Real
Functions", SIAM Review 40(1), 1998; the step of the central difference: W. Press et al.,
"Numerical Recipes", 3rd edition, section 5.7.
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
    """The derivative of ``function`` at x, by a complex step.

    Args:
        function: from an array of x's shape to an array of any shape; analytic, see above.
        x: real, float32 or float64, of any library.
        direction: v, of x's shape.

    Returns:
        With a direction, f'(x)·v, of the shape of f(x). Without, the whole Jacobian, of the shape
        of f(x) followed by that of x: one evaluation for each element of x.
    """
    xp = array_api_compat.array_namespace(x)

    def along(v: Array) -> Array:
        return _imaginary(function(stepped(x, v)), xp) / STEP

    return _jacobian(along, x) if direction is None else along(direction)


def stepped(x: Array, direction: Array) -> Array:
    """x + i·h·direction."""
    xp = array_api_compat.array_namespace(x)
    dtype = xp.complex64 if x.dtype == xp.float32 else xp.complex128
    return xp.astype(x, dtype) + (1j * STEP) * xp.astype(direction, dtype)


def central_difference(function: Function, x: Array, direction: Array | None = None) -> Array:
    """The derivative of ``function`` at x, by a central difference.

    The step is u^(1/3) times the size of x (at least 1), with u the unit of rounding of x's dtype.
    Arguments and results are those of `complex_step`; the function may be any.
    """
    xp = array_api_compat.array_namespace(x)
    size = max(1.0, float(xp.max(xp.abs(x))))
    h = float(xp.finfo(x.dtype).eps) ** (1 / 3) * size

    def along(v: Array) -> Array:
        step = h / max(float(xp.max(xp.abs(v))), math.ulp(0))
        return (function(x + step * v) - function(x - step * v)) / (2 * step)

    return _jacobian(along, x) if direction is None else along(direction)


def takes_complex(function: Function, x: Array, direction: Array) -> bool:
    """Whether the complex step can be trusted with ``function`` at x.

    It can if the function takes complex input, gives complex output with the same real part, and
    has the imaginary part that a central difference along ``direction`` makes expect (code that
    drops or conjugates imaginary parts somewhere is off by much more than the difference).
    """
    xp = array_api_compat.array_namespace(x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy only warns when it drops an imaginary part
            y = function(stepped(x, direction))
    except Exception:  # whatever it is that code for real numbers raises at complex ones
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
    """The direction of one element of x, by its index in reading order."""
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
