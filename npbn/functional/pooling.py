r"""Average and max pooling over sliding windows, and their gradients.

**Formula.** The average of a window of $k_H \times k_W$ values, padding zeros counted among them,
and its maximum, padding counted as $-\infty$, are

$$y_{n c p q} = \frac{1}{k_H k_W} \sum_{i, j} x_{n, c, p s_H + i, q s_W + j} \qquad
  y_{n c p q} = \max_{i, j} x_{n, c, p s_H + i, q s_W + j}$$

**Backward.** Each element of $x$ reaches the loss through every window that sees it. Moving it
moves an average by $1 / (k_H k_W)$ as much:

$$dx_{n c h w} = \frac{1}{k_H k_W} \sum_{(p, q) : (h, w) \in \text{window}(p, q)} dy_{n c p q}$$

Where the maximum is unique, moving it moves $y$ by as much, and moving any other element moves
nothing:

$$dx_{n c h w} = \sum_{(p, q) : (h, w) = \arg\max \text{window}(p, q)} dy_{n c p q}$$

*Ties.* There the derivative does not exist; one element is chosen to receive the whole gradient:
the first of the window in reading order (row by row), on every library, as PyTorch chooses. A NaN
in a window makes its maximum NaN.

**Source.** Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, "Gradient-Based Learning Applied to
Document Recognition", Proc. IEEE 86(11), 1998, section II.B (subsampling); V. Dumoulin and F.
Visin, arXiv:1603.07285, section 3 (sizes).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat

from npbn.functional.arrays import Array, check_shape, common_namespace, empty_like, real_part
from npbn.functional.windows import Windows, check_pooling_padding, pad, unpad, windows_of


class AvgPool2dCache(NamedTuple):
    """Geometry, shape of y, an empty array of x's dtype: averaging is linear, x is not needed."""

    windows: Windows
    y_shape: tuple[int, ...]
    precision: Array


class MaxPool2dCache(NamedTuple):
    """The geometry; the place in its window of each maximum, shaped like y; an empty array."""

    windows: Windows
    chosen: Array
    precision: Array


def avg_pool2d(
    x: Array,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> tuple[Array, AvgPool2dCache]:
    r"""The mean of every window, padding zeros included.

    $$y = \frac{1}{k_H k_W} \sum_{i, j} x_{ij}$$

    Args:
        x: (N, C, H, W).
        kernel_size: the window, in pixels; an int or (vertical, horizontal), as are the others.
        stride: step between windows; the kernel size unless given.
        padding: zeros on each side, at most half the kernel.

    Returns:
        y of shape (N, C, H', W') with H' = ⌊(H + 2·pH - kH) / sH⌋ + 1, W' likewise; the cache.

    Raises:
        ValueError: x of another rank; a window larger than the padded image; kernel size or stride
            < 1; padding < 0 or more than half the kernel.
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x)
    windows = _pooling_windows(x, kernel_size, stride, padding)
    padded = pad(x, windows, xp)
    total = _zeros(padded, windows.output_size, xp)
    for _, _, place in windows.places():
        total += padded[place]
    kh, kw = windows.kernel_size
    y = xp.permute_dims(total / (kh * kw), (3, 0, 1, 2))
    return y, AvgPool2dCache(windows, tuple(y.shape), empty_like(x, xp))


def avg_pool2d_backward(dy: Array, cache: AvgPool2dCache) -> Array:
    """dx: every element gathers dy / (kH·kW) from each window that sees it.

    Args:
        dy: gradient of the loss with respect to y, of the shape of y.
        cache: from `avg_pool2d`.
    """
    windows, y_shape, precision = cache
    xp = common_namespace(dy=dy, x=precision)
    check_shape("dy", dy, y_shape)
    kh, kw = windows.kernel_size
    share = xp.permute_dims(dy / (kh * kw), (1, 2, 3, 0))
    dpadded = _zeros(share, windows.padded_size, xp)
    for _, _, place in windows.places():
        dpadded[place] += share
    return unpad(dpadded, windows, xp)


def max_pool2d(
    x: Array,
    kernel_size: int | tuple[int, int],
    *,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> tuple[Array, MaxPool2dCache]:
    r"""The maximum of every window, padding counted as -∞: $y = \max_{i, j} x_{ij}$.

    Arguments, results and errors are those of `avg_pool2d`. Ties go to the first element of the
    window in reading order.
    """
    xp = common_namespace(x=x)
    windows = _pooling_windows(x, kernel_size, stride, padding)
    padded = pad(x, windows, xp)
    maximum = _zeros(padded, windows.output_size, xp)
    chosen = xp.full_like(maximum, -1, dtype=xp.int32)
    # The first element inside the image replaces the initial value, even if it is -inf. Padding
    # never wins.
    inside = pad(xp.ones_like(real_part(x[:1, :1, ...], xp)), windows, xp) > 0
    _, kw = windows.kernel_size
    for i, j, place in windows.places():
        candidate = padded[place]
        greater = (real_part(candidate, xp) > real_part(maximum, xp)) | (chosen < 0)
        better = inside[place] & (greater | xp.isnan(candidate))
        maximum = xp.where(better, candidate, maximum)
        chosen = xp.where(better, xp.full_like(chosen, i * kw + j), chosen)
    y = xp.permute_dims(maximum, (3, 0, 1, 2))
    return y, MaxPool2dCache(windows, xp.permute_dims(chosen, (3, 0, 1, 2)), empty_like(x, xp))


def max_pool2d_backward(dy: Array, cache: MaxPool2dCache) -> Array:
    """dx: every element gathers dy from each window whose maximum it is.

    Args:
        dy: gradient of the loss with respect to y, of the shape of y.
        cache: from `max_pool2d`.
    """
    windows, chosen, precision = cache
    xp = common_namespace(dy=dy, x=precision)
    check_shape("dy", dy, tuple(chosen.shape))
    dy = xp.permute_dims(dy, (1, 2, 3, 0))
    chosen = xp.permute_dims(chosen, (1, 2, 3, 0))
    dpadded = _zeros(dy, windows.padded_size, xp)
    nothing = xp.zeros_like(dy)
    _, kw = windows.kernel_size
    for i, j, place in windows.places():
        dpadded[place] += xp.where(chosen == i * kw + j, dy, nothing)
    return unpad(dpadded, windows, xp)


def _zeros(like: Array, size: tuple[int, int], xp: Any) -> Array:
    """Zeros, batch last as ``like`` is, for images of another size."""
    shape = (like.shape[0], *size, like.shape[3])
    return xp.zeros(shape, dtype=like.dtype, device=array_api_compat.device(like))


def _pooling_windows(
    x: Array,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None,
    padding: int | tuple[int, int],
) -> Windows:
    windows = windows_of(x, kernel_size, kernel_size if stride is None else stride, padding)
    check_pooling_padding(windows.kernel_size, windows.padding)
    return windows
