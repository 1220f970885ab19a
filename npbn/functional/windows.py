"""Define the sliding windows over images that convolution and pooling have in common.

An output of H' × W' elements is computed from H'·W' windows of kH × kW elements of the padded
input. The code does not loop over the windows. It loops over the kH·kW places *inside* a window,
because the elements at place (i, j) of all windows are one strided slice of the padded input.

Memory order. The arrays of images that convolution and pooling return have the shape (N, C, H, W),
but in memory the order of their axes is C, H, W, N ("batch last"). So a slice consists of rows of N
neighbouring numbers, however small the windows are, and a channel is one contiguous block.
Arguments may have any memory order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from npbn.functional.arrays import Array


def pair(name: str, value: int | Sequence[int] | np.ndarray, *, minimum: int) -> tuple[int, int]:
    """Return ``value`` as (vertical, horizontal). A single int is used for both.

    Args:
        name: the name of the value in the error message.
        value: an int, or a tuple, a list or an array of two ints.
        minimum: the smallest number that is allowed.

    Raises:
        ValueError: the value is neither an int nor a pair of ints, or is below the minimum.
    """
    both: Any = (value, value)
    if isinstance(value, tuple | list) or (isinstance(value, np.ndarray) and value.ndim == 1):
        both = value
    if len(both) != 2 or not all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= minimum for v in both
    ):
        raise ValueError(f"expected {name} as an int >= {minimum} or a pair of them, got {value}")
    return int(both[0]), int(both[1])


def check_pooling_padding(kernel_size: tuple[int, int], padding: tuple[int, int]) -> None:
    """Raise ValueError if the padding is more than half the kernel size.

    PyTorch has the same limit. Within this limit, every window contains elements of the image.
    """
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"expected padding of at most half the kernel {kernel_size}, got {padding}"
        )


@dataclass(frozen=True)
class Windows:
    """The positions of a kernel on images of one size.

    For images of H × W, a kernel of kH × kW, the stride (sH, sW) and the padding (pH, pW) on each
    side, the output has H' × W' elements, where

    $$H' = \\left\\lfloor \\frac{H + 2p_H - k_H}{s_H} \\right\\rfloor + 1$$

    and W' is computed in the same way. As in PyTorch, a window that would reach beyond the lower or
    the right edge of the padded image is left out.
    """

    image_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.output_size) < 1:
            raise ValueError(
                f"expected images of at least {self.kernel_size} (the kernel) after padding by "
                f"{self.padding}, got {self.image_size}"
            )

    @property
    def padded_size(self) -> tuple[int, int]:
        (h, w), (ph, pw) = self.image_size, self.padding
        return h + 2 * ph, w + 2 * pw

    @property
    def output_size(self) -> tuple[int, int]:
        (h, w), (kh, kw), (sh, sw) = self.padded_size, self.kernel_size, self.stride
        return (h - kh) // sh + 1, (w - kw) // sw + 1

    def columns(self) -> Iterator[tuple[int, slice]]:
        """Yield (j, slice) for each column j of a window.

        The slice contains the W' columns of the padded image that are column j of some window.
        """
        return _places(self.kernel_size[1], self.stride[1], self.output_size[1])

    def places(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """Yield (i, j, slice) for each place (i, j) in a window, row by row.

        The slice of a padded (C, H, W, N) array has the elements at place (i, j) of all windows.
        """
        for i, rows in _places(self.kernel_size[0], self.stride[0], self.output_size[0]):
            for j, columns in self.columns():
                yield i, j, (slice(None), rows, columns, slice(None))


def _places(kernel: int, stride: int, outputs: int) -> Iterator[tuple[int, slice]]:
    """Yield (i, slice) along one axis, for each place i in a window.

    The slice has the elements at place i of all windows. The windows have ``kernel`` elements, and
    there are ``outputs`` windows at a distance of ``stride``.
    """
    for i in range(kernel):
        yield i, slice(i, i + stride * (outputs - 1) + 1, stride)


def windows_of(
    x: Array,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
) -> Windows:
    """Return the windows of a kernel on the images x, (N, C, H, W).

    Raises:
        ValueError: x has another rank or is empty, or an argument is out of range.
    """
    if x.ndim != 4 or x.size == 0:
        raise ValueError(f"expected x of shape (N, C, H, W), not empty, got {tuple(x.shape)}")
    return Windows(
        image_size=(x.shape[2], x.shape[3]),
        kernel_size=pair("kernel_size", kernel_size, minimum=1),
        stride=pair("stride", stride, minimum=1),
        padding=pair("padding", padding, minimum=0),
    )


def pad(x: Array, windows: Windows, xp: Any) -> Array:
    """Return the images x, (N, C, H, W), padded by zeros, as (C, H + 2pH, W + 2pW, N)."""
    n, c, h, w = x.shape
    ph, pw = windows.padding
    shape = (c, *windows.padded_size, n)
    padded = xp.zeros(shape, dtype=x.dtype, device=array_api_compat.device(x))
    padded[:, ph : ph + h, pw : pw + w, :] = xp.permute_dims(x, (1, 2, 3, 0))
    return padded


def unpad(padded: Array, windows: Windows, xp: Any) -> Array:
    """Return padded images, (C, H + 2pH, W + 2pW, N), without the padding, as (N, C, H, W).

    This is the transpose of `pad`.
    """
    (h, w), (ph, pw) = windows.image_size, windows.padding
    return xp.permute_dims(padded[:, ph : ph + h, pw : pw + w, :], (3, 0, 1, 2))
