"""Between NumPy and the other array libraries, in tests."""

from __future__ import annotations

import array_api_compat
import numpy as np

from npbn import backend


def to_library(array, xp, dtype=None):
    """A NumPy array as one of ``xp``; floating-point ones as ``dtype`` if given."""
    if dtype is not None and np.issubdtype(array.dtype, np.floating):
        array = array.astype(dtype)
    return xp.asarray(array)


def to_host(array) -> np.ndarray:
    """An array of any library as one of NumPy."""
    if array_api_compat.is_cupy_array(array):
        return backend.to_numpy(array)
    return np.from_dlpack(array) if not isinstance(array, np.generic) else np.asarray(array)


def arrays_in(value) -> list:
    """All arrays in nested tuples, caches included."""
    if isinstance(value, tuple):
        return [array for part in value for array in arrays_in(part)]
    return [value] if array_api_compat.is_array_api_obj(value) else []
