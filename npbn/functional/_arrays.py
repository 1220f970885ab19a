"""What every operation asks of its arrays, in one place."""

from __future__ import annotations

from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library that follows the Python array API standard."""


def common_namespace(**arrays: Array | None) -> Any:
    """The array-API namespace that the named arrays share; ``None`` is passed over.

    Raises:
        TypeError: an argument is no array, or not of a floating-point dtype; the arrays come from
            more than one library; or float32 and float64 are mixed. Real and complex numbers of
            one precision may meet: that is how the complex step runs through a forward pass.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    for name, array in given.items():
        if not array_api_compat.is_array_api_obj(array):
            raise TypeError(f"expected {name} to be an array, got {type(array).__name__}")
    try:
        xp = array_api_compat.array_namespace(*given.values())
    except TypeError:
        found = ", ".join(f"{name}: {type(a).__module__}" for name, a in given.items())
        raise TypeError(f"expected all arrays from one library, got {found}") from None

    precisions = {name: _precision(xp, name, array) for name, array in given.items()}
    if len(set(precisions.values())) > 1:
        found = ", ".join(f"{name}: {array.dtype}" for name, array in given.items())
        raise TypeError(f"expected arrays of one precision, got {found}")
    return xp


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
    """Re(array): what a branch goes by, so that a complex step cannot switch it."""
    return xp.real(array) if xp.isdtype(array.dtype, "complex floating") else array


def copy(array: Array, xp: Any) -> Array:
    """A copy for a cache: what the caller later does to the argument cannot reach it."""
    return xp.asarray(array, copy=True)
