r"""The rectified linear unit, and its gradient.

**Formula.** $y = \max(x, 0)$.

**Backward.** $dx$ and $dy$ are the gradients of the loss with respect to $x$ and $y$. The
derivative of $y$ with respect to $x$ is 1 where $x > 0$, and 0 where $x < 0$:

$$dx = dy \text{ where } x > 0 \qquad dx = 0 \text{ where } x \le 0$$

At $x = 0$, the derivative does not exist. npbn uses 0 there, as other libraries do. If $x$ is NaN,
$y$ is NaN.

**Source.** V. Nair and G. Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines",
ICML 2010.
"""

from __future__ import annotations

from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace, empty_like, real_part


class ReLUCache(NamedTuple):
    """The values that the backward pass needs: booleans ``cut`` that are true where x <= 0.

    ``precision`` is an empty array of x's dtype, by which the backward pass checks the dtype of dy.
    """

    cut: Array
    precision: Array


def relu(x: Array) -> tuple[Array, ReLUCache]:
    r"""Return $y = \max(x, 0)$ for each element.

    Args:
        x: an array of any shape.

    Returns:
        y, of the shape and dtype of x; the cache.

    Raises:
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x)
    cut = real_part(x, xp) <= 0
    return xp.where(cut, xp.zeros_like(x), x), ReLUCache(cut, empty_like(x, xp))


def relu_backward(dy: Array, cache: ReLUCache) -> Array:
    r"""Return dx, which is dy where $x > 0$, and 0 elsewhere.

    Args:
        dy: the gradient of the loss with respect to y, of the shape of y.
        cache: the cache of `relu`.
    """
    cut, precision = cache
    xp = common_namespace(dy=dy, x=precision)
    check_shape("dy", dy, tuple(cut.shape))
    return xp.where(cut, xp.zeros_like(dy), dy)
