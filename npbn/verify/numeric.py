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

A smaller $h$ has a smaller truncation error, but the rounding error is proportional to $u / h$,
where $u$ is the machine epsilon. The best $h$ depends on the distance over which $f$ changes, which
is not known. For example, batch norm of calendar years changes over a few years, and not over a
fraction of 2000. So $D$ is computed for a sequence of steps, each a quarter of the step before.
*Richardson's extrapolation* removes the terms of the truncation error one after the other:

$$T_{j, 0} = D(h_j) \qquad T_{j, k} = T_{j, k-1} + \frac{T_{j, k-1} - T_{j-1, k-1}}{16^k - 1}
  \qquad h_j = 4^{-j} h_0$$

*Ridders' method* returns the $T_{j, k}$ that differs least from the two values from which it is
computed. This difference is also the estimate of the error. If the steps are too large or too
small, the values differ much, so they are not returned.

**Sources.** The complex step: W. Squire and G. Trapp, "Using Complex Variables to Estimate
Derivatives of Real Functions", SIAM Review 40(1), 1998. The extrapolation: C. Ridders, "Accurate
computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4(2), 1982, as in W. Press
et al., "Numerical Recipes", 3rd edition, section 5.7.
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

Function = Callable[[Array], Array]


def complex_step(function: Function, x: Array, direction: Array | None = None) -> Array:
    """Return the derivative of a function f at x, computed by a complex step.

    Args:
        function: the function f, which maps an array of x's shape to an array of any shape. The
            function must be analytic, and its code must compute it for complex numbers, too.
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
    """Return the derivative of a function at x, computed by extrapolated central differences.

    The arguments and the result are those of `complex_step`, but the code may accept only real
    numbers.
    """

    def along(v: Array) -> Array:
        return like(x, extrapolated(function, x, v)[0])

    return _jacobian(along, x) if direction is None else along(direction)


def extrapolated(
    function: Function,
    x: Array,
    direction: Array,
    noise: np.ndarray | float = 0.0,
    precision: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the derivative along a direction by Ridders' method, and an estimate of its error.

    Both results are NumPy arrays of float64, in the shape of f(x). The estimate of the error
    includes rounding: the outputs and x have relative rounding errors of about the machine epsilon.
    The rounding of x matters if x is large compared with the step. All outputs use the same value
    T_{j, k} of the extrapolation, because for a single output two values may agree by chance.

    Args:
        function, x, direction: the arguments of `central_difference`.
        noise: the error of f(x) by rounding inside of f, if it is known.
        precision: the machine epsilon of f, if f is less precise than the dtype of x, or 0.
    """
    moves = to_numpy(direction).astype(np.float64)
    moving = moves != 0
    u = max(float(np.finfo(to_numpy(x).dtype).eps), precision)
    # A step of ``whole`` changes x by about the size of x.
    lengths = scales(x)[moving] / np.abs(moves[moving])
    whole = float(_power_of_two(np.min(lengths, initial=1e300)))

    def at(step: float) -> np.ndarray:
        with np.errstate(all="ignore"):  # A large step may lead out of the domain of f.
            return np.asarray(to_numpy(function(x + like(x, step * moves))), dtype=np.float64)

    # An output that is the same far away from x does not depend on x, so it has no error.
    here = at(0.0)
    try:
        depends = (at(FAR * whole) != here) | (at(-FAR * whole) != here)
    except Exception:  # The code may not accept numbers of this size.
        depends = np.full(here.shape, True)
    best = error = reach = np.full(here.shape, np.inf)
    row: list[np.ndarray] = []
    totals: list[float] = []  # the sum of all estimated errors after each row
    # The smallest step is at least 4u times the size of x.
    for j in range(1, 1 + min(RUNGS, int(math.log(1 / (4 * u), 4)))):
        h = whole / 4**j
        right, left = at(h), at(-h)
        with np.errstate(all="ignore"):
            above, row = row, [(right - left) / (2 * h)]
            rounded = np.maximum(np.abs(right), np.abs(left)) + whole * np.abs(row[0])
            rounding = np.maximum(u * rounded, noise) / h
            rounding = np.where(depends | (right != left), rounding, 0.0)
            # But for rounding, D(h) comes closer to the derivative in every row. If D(h) moves away
            # from the best value instead, that value has a larger error than was estimated.
            error = np.fmax(error, np.abs(row[0] - best) - reach - 4 * rounding)
            for k, entry in enumerate(above, 1):
                row.append(row[-1] + (row[-1] - entry) / (16**k - 1))
                change = np.maximum(np.abs(row[-1] - row[-2]), np.abs(row[-1] - entry)) + rounding
                if np.sum(change) < np.sum(error):  # False if there is NaN
                    best, error, reach = row[-1], change, np.abs(row[0] - row[-1])
        totals.append(float(np.sum(error)))
        if len(totals) > 3 and totals[-4] == totals[-1] < np.inf:
            break  # With the last three steps, no smaller estimate of the error was found.
    return best, error


FAR = 1024
"""The length of the move that shows which outputs depend on x, relative to the size of x."""

RUNGS = 12
"""The largest number of steps h. The smallest step is 4^-12 = 6e-8 times the size of x."""


def scales(x: Array) -> np.ndarray:
    """Return the length of a large step for each element of x.

    The length for x_i is about |x_i|. If |x_i| is less than the median of all |x_j| > 0, the length
    is about this median, because a single element may be close to 0 by chance. The length is a
    power of 2, so the step itself is not rounded.
    """
    sizes = np.abs(to_numpy(x)).astype(np.float64)
    usual = np.median(sizes[sizes > 0]) if np.any(sizes > 0) else 1.0
    return _power_of_two(np.maximum(sizes, usual))


def _power_of_two(number: np.ndarray) -> np.ndarray:
    return np.asarray(2.0 ** np.floor(np.log2(number)))


def takes_complex(
    function: Function, x: Array, direction: Array, noise: np.ndarray | float = 0.0
) -> bool:
    """Return whether the complex step gives the right derivative of a function at x.

    The result is True if three conditions hold. The function accepts complex input. The output is
    complex and has the right real part. The imaginary part agrees with a central difference along
    ``direction``. If code drops or conjugates an imaginary part, the imaginary part of the output
    is wrong by much more than the error of the central difference.

    Args:
        function, x, direction, noise: the arguments of `extrapolated`.
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
    roundoff = float(xp.finfo(x.dtype).eps) ** 0.5
    scale = max(float(np.max(np.abs(real))), roundoff)
    y = to_numpy(y)
    if not np.max(np.abs(np.real(y) - real)) <= roundoff * scale:
        return False
    expected, error = extrapolated(function, x, direction, noise)
    difference = np.abs(np.imag(y) / STEP - expected)
    size = max(float(np.max(np.abs(expected))), roundoff * scale)
    # The bound is tight, because in a batch norm whose eps is much larger than the variance, a
    # conjugation has only a small effect.
    return bool(np.all(difference <= 64 * roundoff**2 * size + np.minimum(error, 1e-2 * size)))


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


def like(array: Array, values: np.ndarray) -> Array:
    """Return a NumPy array as an array with the library, dtype and device of ``array``.

    If ``array`` is complex, the result is real and has the same precision.
    """
    xp = array_api_compat.array_namespace(array)
    dtype = xp.real(array).dtype if xp.isdtype(array.dtype, "complex floating") else array.dtype
    return xp.asarray(values, dtype=dtype, device=array_api_compat.device(array))
