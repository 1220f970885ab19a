"""Sliding windows over images: the geometry that convolution and pooling share.

An output of size H' × W' looks at a padded input through kH × kW windows. Instead of walking over
the H'·W' windows, the code here walks over the kH·kW places *inside* a window: the elements that
sit at place (i, j) of all windows at once form one strided slice of the padded input.

Memory order. Arrays keep the shape (N, C, H, W), but these functions lay them out in memory as
C, H, W, N ("batch last"): however small the windows are, a slice then copies runs of N neighbouring
numbers, and a channel is one contiguous block. The shape never shows it, and any memory order is
accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from npbn.functional.arrays import Array


def pair(name: str, value: int | tuple[int, int], *, minimum: int) -> tuple[int, int]:
    """``value`` as (vertical, horizontal); one int stands for both."""
    both: tuple[Any, ...] = value if isinstance(value, tuple) else (value, value)
    if len(both) != 2 or not all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= minimum for v in both
    ):
        raise ValueError(f"expected {name} as an int >= {minimum} or a pair of them, got {value}")
    return int(both[0]), int(both[1])


def check_pooling_padding(kernel_size: tuple[int, int], padding: tuple[int, int]) -> None:
    """Raise ValueError if padding is more than half the kernel: some windows were all padding."""
    if any(2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(
            f"expected padding of at most half the kernel {kernel_size}, got {padding}"
        )


@dataclass(frozen=True)
class Windows:
    """The positions of a kernel on images of one size.

    Shapes: with input H × W, kernel kH × kW, stride (sH, sW) and padding (pH, pW) on either side,

    $$H' = \\left\\lfloor \\frac{H + 2p_H - k_H}{s_H} \\right\\rfloor + 1$$

    and W' likewise: windows that would reach over the far edge are left out, as in PyTorch.
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

    def rows(self) -> Iterator[tuple[int, slice]]:
        """(p, slice): the kH rows of the padded image that row p of the output looks at."""
        for p in range(self.output_size[0]):
            first = p * self.stride[0]
            yield p, slice(first, first + self.kernel_size[0])

    def columns(self) -> Iterator[tuple[int, slice]]:
        """(j, slice): the W' columns of the padded image at column j of every window."""
        return _places(self.kernel_size[1], self.stride[1], self.output_size[1])

    def places(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """(i, j, slice): the slice of a padded (C, H, W, N) array at place (i, j) of every window.

        Row by row, so that the first place is the window's upper left corner.
        """
        for i, rows in _places(self.kernel_size[0], self.stride[0], self.output_size[0]):
            for j, columns in self.columns():
                yield i, j, (slice(None), rows, columns, slice(None))


def _places(kernel: int, stride: int, outputs: int) -> Iterator[tuple[int, slice]]:
    """Along one axis: (place in the window, the elements at that place of every window)."""
    for i in range(kernel):
        yield i, slice(i, i + stride * (outputs - 1) + 1, stride)


def windows_of(
    x: Array,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
) -> Windows:
    """The windows of a kernel over the images x of shape (N, C, H, W), arguments checked."""
    if x.ndim != 4 or x.size == 0:
        raise ValueError(f"expected x of shape (N, C, H, W), not empty, got {tuple(x.shape)}")
    return Windows(
        image_size=(x.shape[2], x.shape[3]),
        kernel_size=pair("kernel_size", kernel_size, minimum=1),
        stride=pair("stride", stride, minimum=1),
        padding=pair("padding", padding, minimum=0),
    )


def pad(x: Array, windows: Windows, xp: Any) -> Array:
    """x of (N, C, H, W) → a copy padded by zeros, of shape (C, H + 2pH, W + 2pW, N)."""
    n, c, h, w = x.shape
    ph, pw = windows.padding
    shape = (c, *windows.padded_size, n)
    padded = xp.zeros(shape, dtype=x.dtype, device=array_api_compat.device(x))
    padded[:, ph : ph + h, pw : pw + w, :] = xp.permute_dims(x, (1, 2, 3, 0))
    return padded


def unpad(padded: Array, windows: Windows, xp: Any) -> Array:
    """(C, H + 2pH, W + 2pW, N) → its inner part with the shape (N, C, H, W); pad's transpose."""
    (h, w), (ph, pw) = windows.image_size, windows.padding
    return xp.permute_dims(padded[:, ph : ph + h, pw : pw + w, :], (3, 0, 1, 2))
