r"""Measure how far rounding moves the result of code: stochastic arithmetic.

A right backward pass may have a large relative error. For example, the sigmoid's $dx$ is
$dy \cdot y (1 - y)$. At $x = 30$, $y$ is 1 to 13 digits, so $1 - y$ has only the 3 digits that are
left. No bound that is relative to $dx$ can know this, because the cancellation is inside the code.

The code itself tells: it runs again with arrays that round more coarsely. The result of each
arithmetic operation is multiplied by $1 + \delta r$, with a random $r$ between -1 and 1. If
$\delta$ is small, the change of the result is proportional to $\delta$, so the ordinary rounding,
by $u$, moves the result by about $u / \delta$ of this change. $\delta = \sqrt{u}$ is used. A much
smaller $\delta$ would measure a jump of the code (a comparison for equality, say) as if it were
rounding.

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
"""The names of NumPy's functions of floating-point numbers that do not round."""


class CoarseArray(np.ndarray):
    """A NumPy array whose arithmetic has random relative errors of up to √u."""

    generator = np.random.default_rng(0)

    def __array_finalize__(self, source: Any) -> None:
        """Take over the generator of the array that this array is made from."""
        if isinstance(source, CoarseArray):
            self.generator = source.generator

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: Any, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        """Call a function of NumPy, and round its results coarsely."""
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
    """Return random factors between 1 - √u and 1 + √u, in the shape and the dtype of an array."""
    delta = math.sqrt(np.finfo(array.dtype).eps)
    return (1 + delta * generator.uniform(-1, 1, array.shape)).astype(array.dtype)


def coarse(array: Array, generator: np.random.Generator) -> Array:
    """Return an array with coarse arithmetic and the same elements.

    If the array is not from NumPy, it is returned unchanged.
    """
    if not array_api_compat.is_numpy_array(array):
        return array
    result = np.array(array).view(CoarseArray)
    result.generator = generator
    return result
