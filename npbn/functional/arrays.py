"""Checks and helpers for the arrays of all operations."""

from __future__ import annotations

from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library that follows the Python array API standard."""


def common_namespace(**arrays: Array | None) -> Any:
    """The array-API namespace of the named arrays, which have to fit together.

    ``None`` is passed over.

    Raises:
        TypeError: as `common_library`; or an array is not of a floating-point dtype, or float32 and
            float64 are mixed. Real and complex numbers of one precision may meet: that is how the
            complex step runs through a forward pass.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    xp = common_library(**given)
    if len({_precision(xp, name, array) for name, array in given.items()}) > 1:
        found = ", ".join(f"{name}: {array.dtype}" for name, array in given.items())
        raise TypeError(f"expected arrays of one precision, got {found}")
    return xp


def common_library(**arrays: Array) -> Any:
    """The array-API namespace of the named arrays, of whatever dtypes.

    Raises:
        TypeError: an argument is no array, or the arrays come from more than one library.
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
    """Return Re(array), for comparisons: a complex step must not change which branch is taken."""
    return xp.real(array) if xp.isdtype(array.dtype, "complex floating") else array


def empty_like(array: Array, xp: Any) -> Array:
    """Return an empty array of this dtype; caches keep it to check the dtype of dy."""
    return xp.zeros((0,), dtype=array.dtype, device=array_api_compat.device(array))


def copy(array: Array, xp: Any) -> Array:
    """A copy for a cache: what the caller later does to the argument cannot reach it."""
    return xp.asarray(array, copy=True)


def sum_over(array: Array, axes: tuple[int, ...]) -> Array:
    """Return the sum over these axes, which stay in the result with length 1.

    The sum over the first axis comes first, then the sum over the others. In one go, a GPU would
    divide the work among the results only, and these are few: the channels of an image.
    """
    xp = array_api_compat.array_namespace(array)
    array = xp.sum(array, axis=axes[0], keepdims=True)
    return xp.sum(array, axis=axes[1:], keepdims=True) if len(axes) > 1 else array


def mean_over(array: Array, axes: tuple[int, ...]) -> Array:
    """Return the mean over these axes, in the same order as `sum_over`."""
    xp = array_api_compat.array_namespace(array)
    array = xp.mean(array, axis=axes[0], keepdims=True)
    return xp.mean(array, axis=axes[1:], keepdims=True) if len(axes) > 1 else array


def elements_at_once(array: Array) -> int:
    """Return the number of elements of the largest temporary array that is best for speed.

    A CPU is fastest if temporary arrays stay in its caches: the answer is 1, for as few elements as
    can be. On a GPU, every operation costs a launch, about 10 µs: the answer is 2²⁵, for few large
    operations.
    """
    return 2**25 if array_api_compat.is_cupy_array(array) else 1
