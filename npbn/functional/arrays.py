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
