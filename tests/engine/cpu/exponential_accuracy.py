"""How exact the exponential of the kernels must be, and how exact one is."""

from __future__ import annotations

import decimal
from collections.abc import Callable

import numpy as np

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
"""The rounding of a number near 1: half the distance to the next."""
LIMIT = {"float32": 87.0, "float64": 708.0}
"""Of the exponential: beyond it e^x stays where it is, which is a normal number."""

# The relative error of e^x, in units u, for |x| <= LIMIT. With r in ±ln 2 / 2 and p about e^r:
# - r: k · HIGH is exact, so is x - k · HIGH (a multiple of the last place of x or HIGH, and below
#   1/2); the sum with k · LOW is rounded by u/4 (below 1/2), LOW itself by what makes 0.02 u, and
#   the product, where there is no fused multiply-add, by 0.02 u.          0.29 u
# - The polynomial without its next term, r^8 / 8! (r^14 / 14!) / e^r.     0.13 u
# - Its last sum is rounded by u above 1, by u/2 in [0.7, 1).              1.00 u
#   The sum before by as much, times r / e^r.                              0.25 u
#   The one before by u/2 or u/4, times r² / e^r; and all others.          0.06 u
# - Products that are rounded for themselves (no fused multiply-add).      0.42 u
# 2^k is exact. Together 2.15 u.
EXPONENTIAL = 2.2
# 1 + e^-x and its inverse are rounded by u each, and an error of e^-x counts no more than fully.
SIGMOID = EXPONENTIAL + 2


def of_all_exponents(dtype: str, mantissas: int) -> np.ndarray:
    """With both signs: 0, subnormals, normal numbers; among the mantissas both extremes."""
    bits, places = {"float32": (32, 23), "float64": (64, 52)}[dtype]
    rng = np.random.default_rng(0)
    exponents = np.arange(2 ** (bits - 1 - places) - 1, dtype=f"uint{bits}")
    drawn = rng.integers(0, 2**places, (len(exponents), mantissas), dtype=exponents.dtype)
    drawn[:, :2] = 0, 2**places - 1
    x = ((exponents[:, None] << exponents.dtype.type(places)) | drawn).ravel().view(dtype)
    return np.concatenate([x, -x])


def exact(x: np.ndarray) -> list[decimal.Decimal]:
    """e^x by more digits than matter, of numbers that are not too large."""
    with decimal.localcontext(decimal.Context(prec=40, Emin=-(10**6), Emax=10**6)):
        return [decimal.Decimal(float(one)).exp() for one in x]


def largest_error(y: np.ndarray, right: list[decimal.Decimal]) -> float:
    """Relative, of y, in units."""
    with decimal.localcontext(decimal.Context(prec=40, Emin=-(10**6), Emax=10**6)):
        pairs = zip(y.tolist(), right, strict=True)
        return max(abs(float(decimal.Decimal(a) / b - 1)) for a, b in pairs) / UNIT[y.dtype.name]


def where_it_matters(dtype: str) -> np.ndarray:
    """Numbers of all sizes up to the limit, and those where k changes."""
    limit, rng = LIMIT[dtype], np.random.default_rng(1)
    x = [
        rng.uniform(-limit, limit, 3000),
        rng.uniform(-2, 2, 3000),
        np.arange(-100, 101) * np.log(2) / 2,
        np.array([limit, -limit, 0, 1, -1]),
    ]
    return np.clip(np.concatenate(x).astype(dtype), -limit, limit)


def error_of_exponential(exponential: Callable[[np.ndarray], np.ndarray], dtype: str) -> float:
    """The largest relative error, in units; infinite where NaN is lost, or a limit not kept."""
    x = where_it_matters(dtype)
    error = largest_error(exponential(x), exact(x))
    beyond = np.array([np.inf, 2 * LIMIT[dtype], -np.inf, -2 * LIMIT[dtype], np.nan], dtype)
    found = exponential(beyond)
    limits = exponential(np.array([LIMIT[dtype], -LIMIT[dtype]], dtype)).repeat(2)
    kept = np.array_equal(found[:4], limits) and np.isnan(found[4]) and limits.min() > 0
    return error if kept else np.inf
