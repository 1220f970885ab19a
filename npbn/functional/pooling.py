r"""Average and max pooling over sliding windows, and their gradients.

**Formula.** A window has $k_H \times k_W$ values. In the average of a window, the values of the
padding count as 0. In the maximum of a window, they count as $-\infty$:

$$y_{n c p q} = \frac{1}{k_H k_W} \sum_{i, j} x_{n, c, p s_H + i, q s_W + j} \qquad
  y_{n c p q} = \max_{i, j} x_{n, c, p s_H + i, q s_W + j}$$

**Backward.** $dx$ and $dy$ are the gradients of the loss with respect to $x$ and $y$. An element of
$x$ contributes to the output of every window that contains it. For averages, the derivative of
each output is $1 / (k_H k_W)$:

$$dx_{n c h w} = \frac{1}{k_H k_W} \sum_{(p, q) : (h, w) \in \text{window}(p, q)} dy_{n c p q}$$

For maxima, the derivative of an output with respect to the largest element of its window is 1. The
derivative with respect to every other element is 0:

$$dx_{n c h w} = \sum_{(p, q) : (h, w) = \arg\max \text{window}(p, q)} dy_{n c p q}$$

*Ties.* If several elements of a window are the largest, the derivative does not exist. In this
case, the first of these elements in reading order (row by row) gets the whole gradient, with every
array library and as in PyTorch. If a window contains NaN, its maximum is NaN.

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
    """The values that the backward pass needs: the windows and the shape of y.

    ``precision`` is an empty array of x's dtype, by which the backward pass checks the dtype of dy.
    """

    windows: Windows
    y_shape: tuple[int, ...]
    precision: Array


class MaxPool2dCache(NamedTuple):
    """The values that the backward pass needs: the windows and the places of the maxima.

    ``chosen`` has the shape of y. A maximum at row i and column j of its window has the number
    i·kW + j. ``precision`` is an empty array of x's dtype, by which the dtype of dy is checked.
    """

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
    r"""Return the mean of the values in every window, including the zeros of the padding.

    $$y = \frac{1}{k_H k_W} \sum_{i, j} x_{ij}$$

    Args:
        x: the images, (N, C, H, W).
        kernel_size: the size of a window in pixels, an int or (vertical, horizontal).
        stride: the distance between neighbouring windows in pixels, an int or (vertical,
            horizontal). By default, this is the kernel size.
        padding: the number of zeros on each side, an int or (vertical, horizontal). At most, this
            is half the kernel size.

    Returns:
        y, (N, C, H', W'), where H' is ⌊(H + 2·padding - kernel_size) / stride⌋ + 1, and W' is
        computed in the same way; and the cache for the backward pass.

    Raises:
        ValueError: x has another rank, a window is larger than the padded image, kernel size or
            stride < 1, padding < 0, or padding is more than half the kernel size.
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
    """Return dx. Each element of dx is the sum of dy / (kH·kW) over the windows that contain it.

    Args:
        dy: the gradient of the loss with respect to y, of the shape of y.
        cache: the cache of `avg_pool2d`.
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
    r"""Return the maximum of every window: $y = \max_{i, j} x_{ij}$. The padding counts as -∞.

    Arguments, results and errors are those of `avg_pool2d`. If several elements of a window are the
    largest, only the first of these in reading order (row by row) gets a gradient later.
    """
    xp = common_namespace(x=x)
    windows = _pooling_windows(x, kernel_size, stride, padding)
    padded = pad(x, windows, xp)
    maximum = _zeros(padded, windows.output_size, xp)
    chosen = xp.full_like(maximum, -1, dtype=xp.int32)
    # The first element inside the image always replaces the initial value, even if the element is
    # -inf. An element of the padding is never chosen.
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
    """Return dx. Each element of dx is the sum of dy over the windows whose maximum it is.

    Args:
        dy: the gradient of the loss with respect to y, of the shape of y.
        cache: the cache of `max_pool2d`.
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
    """Return zeros, (C, *size, N), with the number of channels and examples of ``like``."""
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
