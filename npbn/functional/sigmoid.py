r"""The logistic sigmoid, and its gradient.

**Formula.**

$$y = \sigma(x) = \frac{1}{1 + e^{-x}}$$

This form keeps its relative accuracy in both tails (in $\frac{1}{2} (1 + \tanh \frac{x}{2})$,
which is equal, the left tail cancels to 0). Its one weakness is that $e^{-x}$ overflows far on the
left. So $x$ is held above $\log t$, with $t$ the smallest normal number: $x \ge -87.3$ in float32,
$x \ge -708.4$ in float64. To the left of that, $y$ is $t$ where it should be smaller still.

**Backward.** With $u = 1 + e^{-x}$, so that $y = 1/u$,

$$\sigma'(x) = -\frac{1}{u^2} \cdot (-e^{-x}) = \frac{1}{u} \cdot \frac{e^{-x}}{u}
  = y (1 - y)$$

because $e^{-x} / u = (u - 1) / u = 1 - y$. With $dx$ and $dy$ the gradients of the loss
with respect to $x$ and $y$, the chain rule gives $dx = dy \cdot y (1 - y)$. The output is all that
the backward pass needs.

**Source.** D. Rumelhart, G. Hinton and R. Williams, "Learning representations by back-propagating
errors", Nature 323, 1986, equations 2 and 5.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace


class SigmoidCache(NamedTuple):
    """The output."""

    y: Array


def sigmoid(x: Array) -> tuple[Array, SigmoidCache]:
    r"""$y = 1 / (1 + e^{-x})$, elementwise, without overflow for any finite x.

    Args:
        x: any shape.

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
    r"""$dx = dy \cdot y (1 - y)$.

    Args:
        dy: gradient of the loss with respect to y, of the shape of y.
        cache: from `sigmoid`.
    """
    (y,) = cache
    common_namespace(dy=dy, y=y)
    check_shape("dy", dy, tuple(y.shape))
    return dy * (y * (1 - y))
