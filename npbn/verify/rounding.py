r"""Measure by stochastic arithmetic how much rounding changes the result of code.

A right backward pass may have a large relative error. For example, the sigmoid's $dx$ is
$dy \cdot y (1 - y)$. At $x = 30$, $y$ differs from 1 only in the last 3 of its 16 digits, so
$1 - y$ has only 3 digits. No bound relative to $dx$ can know this, because the digits cancel inside
the code.

So the code runs again with arrays that round more coarsely. The result of each arithmetic operation
is multiplied by $1 + \delta r$, with a random $r$ between -1 and 1. If $\delta$ is small, the
change of the final result is proportional to $\delta$. So the ordinary rounding, with the machine
epsilon $u$, changes the final result by about $u / \delta$ of this change. Here,
$\delta = \sqrt{u}$. If the result jumps, for example at a comparison for equality, the change does
not shrink with $\delta$, so a much smaller $\delta$ would take the jump for a large rounding error.

**Source.** J. Vignes, "A stochastic arithmetic for reliable scientific computation", Mathematics
and Computers in Simulation 35(3), 1993.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np

from npbn.functional.arrays import Array

EXACT = {
    *("maximum", "minimum", "fmax", "fmin", "clip", "negative", "positive", "absolute", "fabs"),
    *("sign", "copysign", "floor", "ceil", "rint", "trunc", "heaviside", "conjugate"),
}
"""The names of NumPy functions whose floating-point results have no rounding error."""


class CoarseArray(np.ndarray):
    """A NumPy array whose arithmetic has random relative errors of up to √u.

    Here, u is the machine epsilon of the array's dtype.
    """

    generator = np.random.default_rng(0)

    def __array_finalize__(self, source: Any) -> None:
        """Copy the random generator of the array from which this array is made."""
        if isinstance(source, CoarseArray):
            self.generator = source.generator

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: Any, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        """Call a NumPy function, and round its floating-point results coarsely."""
        plain = [np.asarray(a) if isinstance(a, CoarseArray) else a for a in inputs]
        if out:
            kwargs["out"] = tuple(np.asarray(o) if o is not None else None for o in out)
        if isinstance(kwargs.get("where"), CoarseArray):
            kwargs["where"] = np.asarray(kwargs["where"])
        results = getattr(ufunc, method)(*plain, **kwargs)
        if not isinstance(results, (np.ndarray, np.floating)) or results.dtype.kind != "f":
            return results  # Booleans and integers are exact.
        results = np.asarray(results)
        if ufunc.__name__ not in EXACT:
            results *= roughly_one(results, self.generator)
        return out[0] if out else coarse(results, self.generator)


def roughly_one(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return random factors between 1 - √u and 1 + √u, in the shape and the dtype of an array.

    Here, u is the machine epsilon of the dtype.
    """
    delta = math.sqrt(np.finfo(array.dtype).eps)
    return (1 + delta * generator.uniform(-1, 1, array.shape)).astype(array.dtype)


def coarse(array: Array, generator: np.random.Generator) -> Array:
    """Return a copy of a NumPy array as a `CoarseArray`, whose arithmetic rounds coarsely.

    An array of another library is returned unchanged.
    """
    if not array_api_compat.is_numpy_array(array):
        return array
    result = np.array(array).view(CoarseArray)
    result.generator = generator
    return result
