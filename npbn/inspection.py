"""Inspect a model: outputs of layers, statistics of batch norm, and the first NaN or infinity."""

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
    """Return the output of every layer of a model for the batch x, in the model's current mode."""
    outputs = []
    for layer in model.layers:
        x = layer.forward(x)
        outputs.append(x)
    return outputs


def probabilities(
    model: Layer, split: Split, *, dtype: Any = "float32", batch_size: int = 256
) -> np.ndarray:
    """Return the probability of each class for each example of a split, (N, K).

    The model computes in prediction mode.
    """
    found = []
    with modes_kept(model):
        model.eval()
        for x, labels in split.batches(batch_size, dtype):
            _, cache = F.softmax_cross_entropy(model.forward(x), labels)
            found.append(to_numpy(cache.probabilities))
    return np.concatenate(found)


def preactivations(model: Sequential, x: Array) -> dict[str, np.ndarray]:
    """Return the input of each activation layer for the batch x, by the name of the layer.

    The model computes in training mode: a batch norm that is not frozen uses the statistics of x.
    The moving averages do not change.
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
    """Return a histogram of the `preactivations` of each activation layer, by the layer's name.

    The bins lie between neighbouring `HISTOGRAM_EDGES`. Values beyond the edges count in the first
    or the last bin.
    """
    low, high = HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]
    return {
        name: np.histogram(np.clip(values, low, high), HISTOGRAM_EDGES)[0].tolist()
        for name, values in preactivations(model, x).items()
    }


@contextlib.contextmanager
def batch_norm_momentum(model: Layer, momentum: float) -> Iterator[None]:
    """Run the code inside with the model in training mode and with another momentum of batch norm.

    With momentum 1, a forward pass does not change the moving averages. With momentum 0, it sets
    them to the statistics of the batch. If the model is in training mode already, a batch norm in
    prediction mode stays in prediction mode, because it is frozen. Afterwards, modes and momenta
    are as before.
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
    r"""Replace the moving averages by the statistics of a whole split for the current weights.

    Moving averages lag behind, because they contain statistics of earlier weights. This function
    computes the mean $\mu_k$ and the variance $v_k$ of each batch k, which has $n_k$ examples, for
    the current weights. The statistics of all n examples together are

    $$\mu = \sum_k \frac{n_k}{n} \mu_k \qquad
      v = \sum_k \frac{n_k}{n} (v_k + (\mu_k - \mu)^2)$$

    As in training, all layers compute in training mode, and a batch norm that is frozen keeps its
    averages. If the last of several batches has only one example, it is left out.

    Source: Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021 (arXiv:2105.07576),
    section 3 ("precise BatchNorm").

    Args:
        model: the model, on the backend of ``split``. Its mode is kept.
        split: the training split. Statistics of the test split would use test data for training.
        dtype: the dtype of the model's arrays.
        batch_size: the number of examples in a batch, as in training.
    """
    counts: list[int] = []
    found: list[list[tuple[Array, Array]]] = []  # They stay on the device until the end.
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
    """Return a text that says where a training step has the first NaN or infinity, and the loss.

    The function looks at the parameters, the outputs of the layers, the loss, and the gradients, in
    this order. If no number is NaN or infinite, the text is empty, and the parameters have their
    gradients for a step of the optimizer. The moving averages do not change.
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
