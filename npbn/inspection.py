"""Looking into a network: what its layers see, how batch norm stands, where numbers went astray."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import to_numpy
from npbn.data import Split
from npbn.functional.arrays import Array
from npbn.layers import (
    Activation,
    BatchNorm,
    Layer,
    Sequential,
    modes_kept,
    self_and_descendants,
)


def batch_norms(model: Layer) -> list[BatchNorm]:
    """Return all batch norms of a model, in the order of its layers."""
    return [layer for layer in self_and_descendants(model) if isinstance(layer, BatchNorm)]


def activations(model: Sequential, x: Array) -> list[Array]:
    """The output of every layer of ``model`` on the batch x, in its present mode."""
    outputs = []
    for layer in model.layers:
        x = layer.forward(x)
        outputs.append(x)
    return outputs


def probabilities(
    model: Layer, split: Split, *, dtype: Any = "float32", batch_size: int = 256
) -> np.ndarray:
    """Return the model's probability of each class, (N, K), in prediction mode."""
    found = []
    with modes_kept(model):
        model.eval()
        for x, labels in split.batches(batch_size, dtype):
            _, cache = F.softmax_cross_entropy(model.forward(x), labels)
            found.append(to_numpy(cache.probabilities))
    return np.concatenate(found)


def preactivations(model: Sequential, x: Array) -> dict[str, np.ndarray]:
    """Return what enters each activation in training on the batch x, by the layer's name.

    The model is in training mode for that, so batch norm uses the statistics of x, unless it is
    frozen; its moving averages stay as they are.
    """
    with batch_norm_momentum(model, 1.0):
        outputs = activations(model, x)
    return {
        str(i): to_numpy(outputs[i - 1] if i else x)
        for i, layer in enumerate(model.layers)
        if isinstance(layer, Activation)
    }


HISTOGRAM_EDGES = np.linspace(-10, 10, 81)


def histograms(model: Sequential, x: Array) -> dict[str, list[int]]:
    """Return how many `preactivations` lie between neighbouring `HISTOGRAM_EDGES`, by layer.

    What is beyond the edges counts in the first and the last of the bins.
    """
    low, high = HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]
    return {
        name: np.histogram(np.clip(values, low, high), HISTOGRAM_EDGES)[0].tolist()
        for name, values in preactivations(model, x).items()
    }


@contextlib.contextmanager
def batch_norm_momentum(model: Layer, momentum: float) -> Iterator[None]:
    """The model in training mode, its batch norms with another momentum, for a while.

    With 1, a forward pass does not change the moving averages; with 0, it sets them to the batch's
    statistics. As in training, a batch norm in prediction mode within a model in training mode is
    frozen: it stays in its mode.
    """
    norms = batch_norms(model)
    before = [norm.momentum for norm in norms]
    with modes_kept(model):
        if not model.training:
            model.train()
        for norm in norms:
            norm.momentum = momentum
        try:
            yield
        finally:
            for norm, value in zip(norms, before, strict=True):
                norm.momentum = value


def precise_statistics(
    model: Layer, split: Split, *, dtype: Any = "float32", batch_size: int = 256
) -> None:
    r"""Replace the moving averages by the statistics of a whole split, for the weights as they are.

    The moving averages lag behind: they mix statistics of weights that have moved on. Here all
    batches (of $n_k$ values, mean $\mu_k$ and variance $v_k$) count alike, as one large batch:

    $$\mu = \sum_k \frac{n_k}{n} \mu_k \qquad
      v = \sum_k \frac{n_k}{n} (v_k + (\mu_k - \mu)^2)$$

    Each layer's $\mu_k$ and $v_k$ are those of what the layers before it make of the batch in
    training mode, as in training. A last batch of a single example is left out, if there is
    another. A batch norm in prediction mode within a model in training mode is frozen and keeps
    its averages.

    Source: Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576),
    section 3 ("precise BatchNorm").

    Args:
        model: on the backend of ``split``; its mode is kept.
        split: the training split; statistics of a test split would be a peek at it.
        dtype: of the model's arrays.
        batch_size: of the batches; as in training, for the same statistics.
    """
    counts: list[int] = []
    found: list[list[tuple[Array, Array]]] = []  # left on the device until the end
    with batch_norm_momentum(model, 0.0):
        norms = [norm for norm in batch_norms(model) if norm.training]
        for x, _ in split.batches(batch_size, dtype):
            if x.shape[0] == 1 and counts:
                break
            model.forward(x)
            counts.append(x.shape[0])
            found.append([(norm.moving_mean.data, norm.moving_var.data) for norm in norms])
    share = np.array(counts) / sum(counts)
    for k, norm in enumerate(norms):
        means = np.stack([to_numpy(batch[k][0]).astype(np.float64) for batch in found])
        variances = np.stack([to_numpy(batch[k][1]).astype(np.float64) for batch in found])
        mean = np.tensordot(share, means, axes=1)
        var = np.tensordot(share, variances + (means - mean) ** 2, axes=1)
        for buffer, value in ((norm.moving_mean, mean), (norm.moving_var, var)):
            old = buffer.data
            xp = array_api_compat.array_namespace(old)
            device = array_api_compat.device(old)
            buffer.data = xp.asarray(value, dtype=old.dtype, device=device)


def first_non_finite(model: Sequential, x: Array, labels: Array) -> tuple[str, float]:
    """Return where the first NaN or infinity appears in a training step, and the loss.

    The parameters, the forward pass layer by layer, the loss, the backward pass layer by layer. The
    words are empty if there is none; then the gradients are left in the parameters, for a step of
    the optimizer. The moving averages stay as they are.
    """

    def bad(array: Array) -> str:
        host = to_numpy(array)
        if np.all(np.isfinite(host)):
            return ""
        return "NaN" if np.any(np.isnan(host)) else "infinite"

    def name(i: int) -> str:
        return f"layer {i} ({type(model.layers[i]).__name__})"

    for parameter_name, parameter in model.parameters().items():
        if kind := bad(parameter.data):
            return f"{parameter_name} is {kind}", math.nan
    with batch_norm_momentum(model, 1.0), np.errstate(all="ignore"):
        for i, layer in enumerate(model.layers):
            x = layer.forward(x)
            if kind := bad(x):
                return f"the output of {name(i)} is {kind}", math.nan
        loss, cache = F.softmax_cross_entropy(x, labels)
        if kind := bad(loss):
            host, classes = to_numpy(labels), x.shape[1]
            wrong = host[(host < 0) | (host >= classes)]
            if len(wrong):
                return (
                    f"expected labels from 0 to {classes - 1}, got the label {wrong[0]}",
                    math.nan,
                )
            return f"the loss is {kind}: a logit is too large", math.nan
        dy = F.softmax_cross_entropy_backward(cache)
        for i in reversed(range(len(model.layers))):
            dy = model.layers[i].backward(dy)
            for parameter_name, parameter in model.layers[i].parameters().items():
                if kind := bad(parameter.gradient):
                    return f"the gradient by {parameter_name} of {name(i)} is {kind}", float(loss)
            if kind := bad(dy):
                return f"the gradient with respect to the input of {name(i)} is {kind}", float(loss)
    return "", float(loss)
