"""Check and process arrays for all operations."""

from __future__ import annotations

from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library that follows the Python array API standard."""


def common_namespace(**arrays: Array | None) -> Any:
    """Return the array-API namespace of the arrays, which must have one precision.

    Real and complex arrays of one precision may be mixed, because the complex step, which checks
    gradients, mixes them.

    Args:
        arrays: the arrays by name. None is ignored.

    Raises:
        TypeError: the arrays do not pass `common_library`, the dtype of an array is not a
            floating-point dtype, or float32 and float64 are mixed.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    xp = common_library(**given)
    if len({_precision(xp, name, array) for name, array in given.items()}) > 1:
        found = ", ".join(f"{name}: {array.dtype}" for name, array in given.items())
        raise TypeError(f"expected arrays of one precision, got {found}")
    return xp


def common_library(**arrays: Array) -> Any:
    """Return the array-API namespace of the arrays, which may have any dtypes.

    Args:
        arrays: the arrays by name.

    Raises:
        TypeError: an argument is not an array, or the arrays come from several libraries.
    """
    for name, array in arrays.items():
        if not array_api_compat.is_array_api_obj(array):
            raise TypeError(f"expected {name} to be an array, got {type(array).__name__}")
    try:
        return array_api_compat.array_namespace(*arrays.values())
    except TypeError:
        found = ", ".join(f"{name}: {type(array).__module__}" for name, array in arrays.items())
        raise TypeError(f"expected all arrays from one library, got {found}") from None


def _precision(xp: Any, name: str, array: Array) -> str:
    if array.dtype == xp.float32 or array.dtype == xp.complex64:
        return "single"
    if array.dtype == xp.float64 or array.dtype == xp.complex128:
        return "double"
    raise TypeError(f"expected {name} of dtype float32 or float64, got {array.dtype}")


def check_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``array`` has exactly the ``expected`` shape."""
    if tuple(array.shape) != expected:
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(array.shape)}")


def real_part(array: Array, xp: Any) -> Array:
    """Return the real part of an array, for comparisons.

    A complex step must not change the result of a comparison.
    """
    return xp.real(array) if xp.isdtype(array.dtype, "complex floating") else array


def empty_like(array: Array, xp: Any) -> Array:
    """Return an array with no elements and the dtype of ``array``.

    A cache keeps such an array, so that the backward pass can check the dtype of dy.
    """
    return xp.zeros((0,), dtype=array.dtype, device=array_api_compat.device(array))


def copy(array: Array, xp: Any) -> Array:
    """Return a copy for a cache, because the caller may later change the original array."""
    return xp.asarray(array, copy=True)


def sum_over(array: Array, axes: tuple[int, ...]) -> Array:
    """Return the sum over some axes, which stay in the result with length 1.

    The function first sums over the first of these axes, and then over the other axes. On a GPU,
    this is faster than a single sum, because CuPy divides the work of a sum only among its results.
    A sum for batch norm has few results: one for each channel.
    """
    xp = array_api_compat.array_namespace(array)
    array = xp.sum(array, axis=axes[0], keepdims=True)
    return xp.sum(array, axis=axes[1:], keepdims=True) if len(axes) > 1 else array


def mean_over(array: Array, axes: tuple[int, ...]) -> Array:
    """Return the mean over some axes, which stay in the result with length 1.

    The mean is computed in two steps, for the reason that `sum_over` gives.
    """
    xp = array_api_compat.array_namespace(array)
    array = xp.mean(array, axis=axes[0], keepdims=True)
    return xp.mean(array, axis=axes[1:], keepdims=True) if len(axes) > 1 else array


def elements_at_once(array: Array) -> int:
    """Return the largest number of elements of a temporary array that is good for speed.

    A CPU is fastest if temporary arrays fit into its caches. For an array on a CPU, the result is
    1, which means that temporary arrays should be as small as possible. On a GPU, each operation
    needs a launch of about 10 µs. For an array on a GPU, the result is 2²⁵, which means few
    operations on large arrays.
    """
    return 2**25 if array_api_compat.is_cupy_array(array) else 1
