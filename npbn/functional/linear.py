r"""The affine map of a fully connected layer, and its gradient.

**Formula.** For example $n$ and output $o$,

$$y_{n o} = \sum_d x_{n d} w_{o d} + b_o \qquad\text{that is}\qquad
  Y = X W^\top + \mathbf{1} b^\top$$

**Backward.** $dz$ is short for the gradient of the loss with respect to $z$, so $dy_{n o}$ is
given. The chain rule sums over all outputs to which an entry contributes. $x_{n d}$ contributes to
$y_{n o}$ for all $o$, with the derivative $w_{o d}$. $w_{o d}$ contributes to $y_{n o}$ for all
$n$, with the derivative $x_{n d}$. $b_o$ contributes to $y_{n o}$ for all $n$, with the derivative
1:

$$dx_{n d} = \sum_o dy_{n o} w_{o d} \qquad dw_{o d} = \sum_n dy_{n o} x_{n d} \qquad
  db_o = \sum_n dy_{n o}$$

$$dX = dY W \qquad dW = dY^\top X \qquad db = dY^\top \mathbf{1}$$

**Source.** I. Goodfellow, Y. Bengio and A. Courville, "Deep Learning", MIT Press 2016, section
6.5.4.
"""

from __future__ import annotations

from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace, copy


class LinearCache(NamedTuple):
    """The values that the backward pass needs: the input x, and the weight.

    ``has_bias`` is true if there was a bias.
    """

    x: Array
    weight: Array
    has_bias: bool


def linear(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, LinearCache]:
    r"""Return the output of a linear layer, $Y = X W^\top + \mathbf{1} b^\top$.

    Args:
        x: the input, (N, D).
        weight: the weight, (out, D).
        bias: the bias, (out,), or None.

    Returns:
        y, (N, out); and the cache for the backward pass.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x, weight=weight, bias=bias)
    if weight.ndim != 2:
        raise ValueError(f"expected weight of shape (out, in), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ValueError(f"expected x of shape (N, {in_features}), got {tuple(x.shape)}")
    if bias is not None:
        check_shape("bias", bias, (out_features,))

    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return y, LinearCache(copy(x, xp), copy(weight, xp), bias is not None)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, Array, Array | None]:
    r"""Return the gradients $dX = dY W$, $dW = dY^\top X$ and $db = dY^\top \mathbf{1}$.

    Args:
        dy: the gradient of the loss with respect to y, (N, out).
        cache: the cache of `linear`.

    Returns:
        dx, dweight and dbias, with the shapes of x, weight and bias. dbias is None without a bias.
    """
    x, weight, has_bias = cache
    xp = common_namespace(dy=dy, x=x)
    check_shape("dy", dy, (x.shape[0], weight.shape[0]))
    dx = dy @ weight
    dweight = dy.T @ x
    dbias = xp.sum(dy, axis=0) if has_bias else None
    return dx, dweight, dbias
