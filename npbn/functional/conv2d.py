r"""Two-dimensional convolution as matrix products, and its gradient.

(``scripts/lessons/3_convolution_as_a_matrix_product.py`` explains the products with pictures.)

**Formula.** There are $N$ images of $C$ channels, and $O$ kernels of $k_H \times k_W$ pixels. The
kernels move over an image in steps of $s_H$ pixels vertically and $s_W$ pixels horizontally. Let
$x$ be the images, padded by zeros. The output has $H' \times W'$ pixels. Its value for example $n$,
output channel $o$ and position $(p, q)$ is

$$y_{n o p q} = b_o + \sum_{c, i, j} w_{o c i j} x_{n, c, p s_H + i, q s_W + j}$$

(This is a cross-correlation, because the kernels are not flipped. All deep-learning libraries
compute it in this way.)

**As matrix products.** Consider one row $p$ of the output. For each position $q$ in this row and
each example $n$, the values of the window are written as a column, in the order of $i$, $c$ and
$j$. These columns are the matrix $X_p$ of shape $(k_H C k_W) \times (W' N)$. Let $W$ be the weights
as a matrix $O \times (k_H C k_W)$, and $Y_p$ the output row as a matrix $O \times (W' N)$. Then

$$Y_p = W X_p + b \mathbf{1}^\top$$

The rows of $X_p$ for one $i$ depend only on row $h = p s_H + i$ of the padded images. These rows of
$X_p$ are the *strip* of image row $h$:

$$S_{h c j q n} = x_{n, c, h, q s_W + j}$$

The function `unfold` computes the strips of all rows $h$. So $X_p$ consists of $k_H$ neighbouring
strips. These are a contiguous block of $S$, so no further copies are needed for $X_p$. (The usual
im2col writes out all $X_p$. At stride 1, im2col stores every number $k_H k_W$ times instead of
$k_W$ times, and the products wait for memory. A block of strips, however, stays in the CPU's
cache.)

On a GPU, each of these products would need a launch, which takes longer than its arithmetic. So on
a GPU, the $X_p$ of all rows are written side by side, as im2col does, and one product computes all
$Y_p$; see `npbn.functional.arrays.elements_at_once`.

**Backward.** $dz$ is short for the gradient of the loss with respect to $z$, so $dY_p$ is given.
Let $\kappa = (i, c, j)$ be the index of a row of $X_p$, and $\rho = (q, n)$ the index of a column.
The forward pass is
$Y_{p, o \rho} = b_o + \sum_\kappa W_{o \kappa} X_{p, \kappa \rho}$. The chain rule sums over all
entries of the output to which an entry contributes. $W$ and $b$ contribute to all columns of all
$Y_p$. An entry of $X_p$ contributes to all output channels:

$$dW_{o \kappa} = \sum_p \sum_\rho dY_{p, o \rho} X_{p, \kappa \rho} \qquad
  dX_{p, \kappa \rho} = \sum_o W_{o \kappa} dY_{p, o \rho} \qquad
  db_o = \sum_p \sum_\rho dY_{p, o \rho}$$

$$dW = \sum_p dY_p X_p^\top \qquad dX_p = W^\top dY_p \qquad db = \sum_p dY_p \mathbf{1}$$

The other two steps of the forward pass only copy: from $x$ to the strips, and from the strips to
$X_p$. The gradient of a number that is copied is the sum of the gradients of its copies. Strip $h$
is part $i$ of every $X_p$ with $p s_H + i = h$. Column $w$ of the padded image is in the strip at
every $(j, q)$ with $q s_W + j = w$:

$$dS_{h c j q n} = \sum_{p, i : p s_H + i = h} dX_{p, (i c j)(q n)} \qquad
  dx_{n c h w} = \sum_{j, q : q s_W + j = w} dS_{h c j q n}$$

The function `fold`, which is the transpose of `unfold`, computes the second sum. Afterwards, the
padding is cut off. The gradient of a pixel that is in no window is 0.

**Source.** K. Chellapilla, S. Puri and P. Simard, "High Performance Convolutional Neural Networks
for Document Processing", 2006 (the matrix product); V. Dumoulin and F. Visin, "A guide to
convolution arithmetic for deep learning", arXiv:1603.07285, sections 2 and 4 (sizes, transpose).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import array_api_compat

from npbn.functional.arrays import (
    Array,
    check_shape,
    common_namespace,
    copy,
    elements_at_once,
    sum_over,
)
from npbn.functional.windows import Windows, pad, unpad, windows_of


class Conv2dCache(NamedTuple):
    """The values that the backward pass needs: the strips of x (see `unfold`) and the weight.

    ``windows`` has the sizes of images and kernels. ``has_bias`` is true if there was a bias.
    """

    strips: Array
    weight: Array
    windows: Windows
    has_bias: bool


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> tuple[Array, Conv2dCache]:
    r"""Return the convolution of images and kernels, with one matrix product for each output row.

    Args:
        x: the images, (N, C, H, W).
        weight: the kernels, (out, C, kH, kW).
        bias: the bias, (out,), or None.
        stride: the distance between neighbouring windows, in pixels; an int or (vertical,
            horizontal).
        padding: the number of zeros added on *each* side; an int or (vertical, horizontal).

    Returns:
        y, (N, out, H', W'), where H' is ⌊(H + 2·padding - kH) / stride⌋ + 1, and W' is computed in
        the same way; and the cache for the backward pass.

    Raises:
        ValueError: the shapes do not fit, the kernel is larger than the padded image, stride < 1 or
            padding < 0.
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x, weight=weight, bias=bias)
    if weight.ndim != 4:
        raise ValueError(f"expected weight of shape (out, in, kH, kW), got {tuple(weight.shape)}")
    out_channels, in_channels, kh, kw = weight.shape
    windows = windows_of(x, (kh, kw), stride, padding)
    n, c, h, w = x.shape
    if c != in_channels:
        raise ValueError(f"expected x of shape (N, {in_channels}, H, W), got {(n, c, h, w)}")
    if bias is None:
        dtype = xp.result_type(x, weight)
    else:
        check_shape("bias", bias, (out_channels,))
        dtype = xp.result_type(x, weight, bias)

    strips = unfold(x, windows)
    weight_matrix = _as_matrix(weight, xp)
    out_h, out_w = windows.output_size
    shape = (out_channels, out_h, out_w * n)
    y = xp.empty(shape, dtype=dtype, device=array_api_compat.device(x))
    for rows in _groups(windows, strips):
        y_rows = weight_matrix @ _windows_at(rows, windows, strips, xp)
        y_rows = y_rows if bias is None else y_rows + bias[:, None]
        y[:, rows.start : rows.stop, :] = xp.reshape(y_rows, (out_channels, len(rows), -1))
    y = xp.permute_dims(xp.reshape(y, (out_channels, out_h, out_w, n)), (3, 0, 1, 2))
    return y, Conv2dCache(strips, copy(weight, xp), windows, bias is not None)


def conv2d_backward(dy: Array, cache: Conv2dCache) -> tuple[Array, Array, Array | None]:
    r"""Return the gradients of a convolution, computed from one output row p after another.

    $$dW = \sum_p dY_p X_p^\top \qquad dX_p = W^\top dY_p \qquad db = \sum_p dY_p \mathbf{1}$$

    Args:
        dy: the gradient of the loss with respect to y, (N, out, H', W').
        cache: the cache of `conv2d`.

    Returns:
        dx, dweight and dbias, with the shapes of x, weight and bias. dbias is None without a bias.
    """
    strips, weight, windows, has_bias = cache
    xp = common_namespace(dy=dy, strips=strips)
    n = strips.shape[-1]
    out_channels, c, kh, kw = weight.shape
    check_shape("dy", dy, (n, out_channels, *windows.output_size))

    weight_matrix = _as_matrix(weight, xp)
    dy_rows = xp.permute_dims(dy, (1, 2, 3, 0))
    dweight = xp.zeros_like(weight_matrix, dtype=xp.result_type(dy, strips))
    dstrips = xp.zeros_like(strips, dtype=xp.result_type(dy, weight))
    for rows in _groups(windows, strips):
        dy_group = xp.reshape(dy_rows[:, rows.start : rows.stop, ...], (out_channels, -1))
        # This is dY Xᵀ, computed as (X dYᵀ)ᵀ, because BLAS is up to twice as fast if the result of
        # the product has more rows than columns.
        dweight += (_windows_at(rows, windows, strips, xp) @ dy_group.T).T
        _add_windows_at(rows, windows, dstrips, weight_matrix.T @ dy_group, xp)
    dweight = xp.permute_dims(xp.reshape(dweight, (out_channels, kh, c, kw)), (0, 2, 1, 3))
    dbias = xp.reshape(sum_over(dy, (0, 2, 3)), (-1,)) if has_bias else None
    return fold(dstrips, windows), dweight, dbias


def unfold(x: Array, windows: Windows) -> Array:
    """Return the strips of the images x: (N, C, H, W) → (H + 2pH, C, kW, W', N).

    A strip has the windows of one image row side by side. So this is im2col along the width only.
    """
    xp = array_api_compat.array_namespace(x)
    n, c, _, _ = x.shape
    padded = xp.permute_dims(pad(x, windows, xp), (1, 0, 2, 3))
    shape = (padded.shape[0], c, windows.kernel_size[1], windows.output_size[1], n)
    strips = xp.empty(shape, dtype=x.dtype, device=array_api_compat.device(x))
    for j, columns in windows.columns():
        strips[:, :, j, :, :] = padded[:, :, columns, :]
    return strips


def fold(strips: Array, windows: Windows) -> Array:
    """Return an array (N, C, H, W) in which each element is the sum of its copies in the strips.

    This is the transpose of `unfold`.
    """
    xp = array_api_compat.array_namespace(strips)
    _, c, _, _, n = strips.shape
    shape = (c, *windows.padded_size, n)
    padded = xp.zeros(shape, dtype=strips.dtype, device=array_api_compat.device(strips))
    for j, columns in windows.columns():
        padded[:, :, columns, :] += xp.permute_dims(strips[:, :, j, :, :], (1, 0, 2, 3))
    return unpad(padded, windows, xp)


def _groups(windows: Windows, strips: Array) -> Iterator[range]:
    """Yield groups of neighbouring output rows. One matrix product computes the rows of a group.

    On a CPU, a group is one row. On a GPU, larger matrices are faster (see `elements_at_once`).
    """
    row = windows.kernel_size[0] * math.prod(strips.shape[1:])  # the number of elements of X_p
    count = max(1, elements_at_once(strips) // row)
    outputs = windows.output_size[0]
    for first in range(0, outputs, count):
        yield range(first, min(first + count, outputs))


def _windows_at(rows: range, windows: Windows, strips: Array, xp: Any) -> Array:
    """Return the matrices X_p of some output rows p side by side: (kH·C·kW, rows·W'·N)."""
    kh, sh = windows.kernel_size[0], windows.stride[0]
    if len(rows) == 1:  # X_p is a block of the strips, so nothing is copied.
        block = strips[rows.start * sh : rows.start * sh + kh, ...]
        return xp.reshape(block, (kh * math.prod(strips.shape[1:3]), -1))
    indices = [p * sh + i for i in range(kh) for p in rows]
    device = array_api_compat.device(strips)
    taken = xp.take(strips, xp.asarray(indices, device=device), axis=0)
    taken = xp.reshape(taken, (kh, len(rows), *strips.shape[1:]))
    by_row = xp.permute_dims(taken, (0, 2, 3, 1, 4, 5))  # (kH, C, kW, rows, W', N)
    return xp.reshape(by_row, (math.prod(by_row.shape[:3]), -1))


def _add_windows_at(rows: range, windows: Windows, dstrips: Array, dx: Array, xp: Any) -> None:
    """Add dx, the gradients of the matrices X_p of some output rows p, to those of the strips.

    This is the transpose of `_windows_at`: for each element of the strips, the gradients of its
    copies are added.
    """
    kh, sh = windows.kernel_size[0], windows.stride[0]
    _, c, kw, w, n = dstrips.shape
    if len(rows) == 1:
        dstrips[rows.start * sh : rows.start * sh + kh, ...] += xp.reshape(dx, (kh, c, kw, w, n))
        return
    dx = xp.permute_dims(xp.reshape(dx, (kh, c, kw, len(rows), w, n)), (0, 3, 1, 2, 4, 5))
    for i in range(kh):
        first = rows.start * sh + i
        dstrips[first : first + sh * (len(rows) - 1) + 1 : sh, ...] += dx[i, ...]


def _as_matrix(weight: Array, xp: Any) -> Array:
    """Return a weight (out, C, kH, kW) as a matrix (out, kH·C·kW); its columns match X_p's rows."""
    return xp.reshape(xp.permute_dims(weight, (0, 2, 1, 3)), (weight.shape[0], -1))
