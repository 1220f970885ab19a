r"""The rectified linear unit, and its gradient.

**Formula.** $y = \max(x, 0)$.

**Backward.** $y$ moves with $x$ where $x > 0$ and not at all where $x < 0$:

$$dx = dy \text{ where } x > 0 \qquad dx = 0 \text{ where } x \le 0$$

At $x = 0$ the derivative does not exist; 0 is used, as everywhere. A NaN passes through.

**Source.** V. Nair and G. Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines",
ICML 2010.
"""

from __future__ import annotations

from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace, empty_like, real_part


class ReLUCache(NamedTuple):
    """The places with x <= 0, which are cut off; and an empty array of x's dtype."""

    cut: Array
    precision: Array


def relu(x: Array) -> tuple[Array, ReLUCache]:
    r"""$y = \max(x, 0)$, elementwise.

    Args:
        x: any shape.

    Returns:
        y, of the shape and dtype of x; the cache.

    Raises:
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(x=x)
    cut = real_part(x, xp) <= 0
    return xp.where(cut, xp.zeros_like(x), x), ReLUCache(cut, empty_like(x, xp))


def relu_backward(dy: Array, cache: ReLUCache) -> Array:
    r"""$dx = dy$ where $x > 0$, else 0.

    Args:
        dy: gradient of the loss with respect to y, of the shape of y.
        cache: from `relu`.
    """
    cut, precision = cache
    xp = common_namespace(dy=dy, x=precision)
    check_shape("dy", dy, tuple(cut.shape))
    return xp.where(cut, xp.zeros_like(dy), dy)
