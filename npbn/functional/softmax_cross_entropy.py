r"""The mean cross-entropy loss of a batch, with softmax included, and its gradient.

**Formula.** Example $n$ has the logits $z_{n 1}, \dots, z_{n K}$ and the true class $t_n$. Its
probabilities $p_{n k}$, and the mean loss $L$ of $N$ examples, are

$$p_{n k} = \frac{e^{z_{n k}}}{\sum_j e^{z_{n j}}} \qquad
  L = -\frac{1}{N} \sum_n \log p_{n t_n}
    = \frac{1}{N} \sum_n \Big( \log \sum_j e^{z_{n j}} - z_{n t_n} \Big)$$

The code computes the last formula, in which $\log 0$ cannot occur. Before that, the code subtracts
the largest logit of each example from the logits of this example. This avoids overflow, and does
not change $p$ and $L$.

**Backward.** The derivative of $\log \sum_j e^{z_{n j}}$ with respect to $z_{n k}$ is
$e^{z_{n k}} / \sum_j e^{z_{n j}} = p_{n k}$. The derivative of $z_{n t_n}$ is 1 if $k = t_n$, and 0
otherwise; this is written as $[k = t_n]$. So the gradient of $L$ with respect to $z_{n k}$ is

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
    """The values that the backward pass needs: the probabilities, (N, K), and the true classes.

    ``is_label``, (N, K), has a boolean for each example and class: whether the class is the label.
    """

    probabilities: Array
    is_label: Array


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, SoftmaxCrossEntropyCache]:
    r"""Return the mean loss $L = -\frac{1}{N} \sum_n \log \mathrm{softmax}(z_n)_{t_n}$.

    Args:
        logits: the logits z, (N, K).
        labels: the true classes t, (N,), integers from 0 to K - 1. If a label is out of this range,
            the loss is NaN. No error is raised, because a check of the values would have to wait
            for the GPU at every step.

    Returns:
        The mean loss in nats, an array of shape (); and the cache for the backward pass.

    Raises:
        ValueError: the shapes do not fit, or the batch is empty.
        TypeError: the labels are not integers; see also `npbn.functional`.
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
    r"""Return the gradient of the mean loss: $dz_{n k} = \frac{1}{N} (p_{n k} - [k = t_n])$.

    Args:
        cache: the cache of `softmax_cross_entropy`.

    Returns:
        The gradient with respect to the logits, (N, K).
    """
    probabilities, is_label = cache
    xp = common_namespace(probabilities=probabilities)
    n = probabilities.shape[0]
    return (probabilities - xp.astype(is_label, probabilities.dtype)) / n
