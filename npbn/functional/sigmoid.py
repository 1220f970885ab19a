r"""The logistic sigmoid, and its gradient.

**Formula.**

$$y = \sigma(x) = \frac{1}{1 + e^{-x}}$$

This formula has a small relative error for all $x$. (The formula
$\frac{1}{2} (1 + \tanh \frac{x}{2})$ is equal in exact arithmetic, but its two terms cancel to 0
for very negative $x$.) However, $e^{-x}$ overflows for very negative $x$. So the code replaces
every $x$ below $\log t$ by $\log t$, where $t$ is the smallest normal number. This bound is -87.3
in float32 and -708.4 in float64. For $x$ below the bound, $y$ is $t$, although the exact value is
smaller.

**Backward.** With $u = 1 + e^{-x}$, so that $y = 1/u$,

$$\sigma'(x) = -\frac{1}{u^2} \cdot (-e^{-x}) = \frac{1}{u} \cdot \frac{e^{-x}}{u}
  = y (1 - y)$$

because $e^{-x} / u = (u - 1) / u = 1 - y$. $dx$ and $dy$ are the gradients of the loss with respect
to $x$ and $y$. The chain rule gives $dx = dy \cdot y (1 - y)$. So the backward pass needs only the
output $y$ and the gradient $dy$.

**Source.** D. Rumelhart, G. Hinton and R. Williams, "Learning representations by back-propagating
errors", Nature 323, 1986, equations 2 and 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace


class SigmoidCache(NamedTuple):
    """The value that the backward pass needs: the output y of the sigmoid."""

    y: Array


def sigmoid(x: Array) -> tuple[Array, SigmoidCache]:
    r"""Return $y = 1 / (1 + e^{-x})$ for each element, without overflow for any finite x.

    Args:
        x: an array of any shape.

    Returns:
        y, of the shape and dtype of x; the cache.

    Raises:
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x)
    low = math.log(xp.finfo(x.dtype).smallest_normal)
    if xp.isdtype(x.dtype, "complex floating"):
        bounded = xp.where(xp.real(x) < low, xp.full_like(x, low), x)
    else:
        bounded = xp.maximum(x, low)
    y = 1 / (1 + xp.exp(-bounded))
    return y, SigmoidCache(y)


def sigmoid_backward(dy: Array, cache: SigmoidCache) -> Array:
    r"""Return the gradient of the loss with respect to x, $dx = dy \cdot y (1 - y)$.

    Args:
        dy: the gradient of the loss with respect to y, of the shape of y.
        cache: the cache of `sigmoid`.
    """
    (y,) = cache
    common_namespace(dy=dy, y=y)
    check_shape("dy", dy, tuple(y.shape))
    return dy * (y * (1 - y))
