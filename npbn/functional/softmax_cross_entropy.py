r"""Softmax and cross-entropy in one, the mean loss of a batch, and its gradient.

**Formula.** For example $n$ with logits $z_{n 1}, \dots, z_{n K}$ and true class $t_n$,

$$p_{n k} = \frac{e^{z_{n k}}}{\sum_j e^{z_{n j}}} \qquad
  L = -\frac{1}{N} \sum_n \log p_{n t_n}
    = \frac{1}{N} \sum_n \Big( \log \sum_j e^{z_{n j}} - z_{n t_n} \Big)$$

Taking the logarithm analytically, as on the right, avoids $\log 0$. Subtracting the largest
logit of each example first changes neither side, since it cancels, and avoids overflow.

**Backward.** The first term's derivative by $z_{n k}$ is
$e^{z_{n k}} / \sum_j e^{z_{n j}} = p_{n k}$; the second's is 1 if $k = t_n$ and 0 otherwise. So

$$dz_{n k} = \frac{1}{N} \big( p_{n k} - [k = t_n] \big)$$

**Source.** J. Bridle, "Probabilistic Interpretation of Feedforward Classification Network
Outputs", in Neurocomputing, Springer 1990; the stable form: P. Blanchard, D. Higham and N. Higham,
"Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal. 41(4), 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import array_api_compat

from npbn.functional.arrays import (
    Array,
    check_shape,
    common_library,
    common_namespace,
    real_part,
)


class SoftmaxCrossEntropyCache(NamedTuple):
    """The probabilities, and where each example's true class is; both (N, K)."""

    probabilities: Array
    is_label: Array


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, SoftmaxCrossEntropyCache]:
    r"""$L = -\frac{1}{N} \sum_n \log \mathrm{softmax}(z_n)_{t_n}$.

    Args:
        logits: (N, K).
        labels: (N,), integers in [0, K). A label outside that range makes the loss NaN: looking at
            the values would stop a GPU at every step.

    Returns:
        The mean loss, in nats, an array of shape (); the cache.

    Raises:
        ValueError: shapes that do not fit, or an empty batch.
        TypeError: labels of a dtype that is no integer; and see `npbn.functional`.
    """
    xp = common_library(logits=logits, labels=labels)
    common_namespace(logits=logits)
    if logits.ndim != 2 or logits.size == 0:
        raise ValueError(f"expected logits of shape (N, K), not empty, got {tuple(logits.shape)}")
    n, k = logits.shape
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"expected labels of an integer dtype, got {labels.dtype}")
    check_shape("labels", labels, (n,))

    # int64, because the number of classes may not fit into the dtype of the labels.
    classes = xp.arange(k, dtype=xp.int64, device=array_api_compat.device(labels))
    is_label = xp.astype(labels, xp.int64)[:, None] == classes[None, :]
    shifted = logits - xp.max(real_part(logits, xp), axis=1, keepdims=True)
    exponentials = xp.exp(shifted)
    total = xp.sum(exponentials, axis=1, keepdims=True)
    nothing = xp.zeros_like(shifted)
    at_label = xp.sum(xp.where(is_label, shifted, nothing), axis=1, keepdims=True)
    losses = xp.log(total) - at_label
    losses = xp.where(xp.any(is_label, axis=1, keepdims=True), losses, nothing[:, :1] + xp.nan)
    return xp.mean(losses), SoftmaxCrossEntropyCache(exponentials / total, is_label)


def softmax_cross_entropy_backward(cache: SoftmaxCrossEntropyCache) -> Array:
    r"""$dz_{n k} = \frac{1}{N} (p_{n k} - [k = t_n])$: the gradient of the mean loss.

    Args:
        cache: from `softmax_cross_entropy`.

    Returns:
        dlogits, (N, K).
    """
    probabilities, is_label = cache
    xp = common_namespace(probabilities=probabilities)
    n = probabilities.shape[0]
    return (probabilities - xp.astype(is_label, probabilities.dtype)) / n
