"""Check the gradients of the loss of a whole network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import to_numpy
from npbn.functional.arrays import Array
from npbn.layers import Layer, Parameter, Sequential
from npbn.verify import numeric
from npbn.verify.checker import Finding, Report, compare, like, rounded_differently, wrong_form


def check_model(
    model: Sequential,
    x: Array,
    labels: Array,
    *,
    generator: np.random.Generator | None = None,
) -> Report:
    """Compare the gradients of the loss with respect to parameters and x with the complex step.

    The loss is softmax cross-entropy. The model is not changed, because a copy of the model is
    checked. The copy has the same mode, training or prediction. A proof needs a model and an x of
    dtype float64.

    The error of a derivative is measured relative to the size of its terms, as in
    `npbn.verify.checker`. The terms are dy_j · ∂y_j / ∂parameter, where y is the output of the
    parameter's own layer and dy is the gradient of the loss with respect to y.

    Args:
        model: a model whose layers have forward passes that are fit for the complex step. All
            layers of npbn are fit.
        x, labels: the inputs and the labels of a batch.
        generator: draws random directions, and the elements of large parameters to check.
    """
    generator = np.random.default_rng(0) if generator is None else generator
    xp = array_api_compat.array_namespace(x)
    layers = list(leaves(copy.deepcopy(model)))

    def forward(start: int, value: Array) -> list[Array]:
        """Return the outputs of layer ``start`` and all later layers, for an input of ``start``."""
        outputs = []
        for _, layer in layers[start:]:
            value = layer.forward(value)
            outputs.append(value)
        return outputs

    # To measure the conditioning, also compute every layer's input for a batch that is rounded
    # differently.
    u = float(xp.finfo(x.dtype).eps)
    rounded = x * like(x, 1 + u * generator.choice((-1, 1), tuple(x.shape)))
    rounded_inputs = [rounded, *forward(0, rounded)]
    inputs = [x, *forward(0, x)]
    _, cache = F.softmax_cross_entropy(inputs[-1], labels)

    def backward(cache: Any) -> list[Array]:
        """Return the gradients of all layers' inputs and of the logits; set those of parameters."""
        upstream = [F.softmax_cross_entropy_backward(cache)]
        for _, layer in reversed(layers):
            upstream.insert(0, layer.backward(upstream[0]))
        return upstream

    # To see what the rounding of the caches changes, go backward with caches that are rounded
    # differently.
    caches = [layer._cache for _, layer in layers]
    for _, layer in layers:
        layer._cache = rounded_differently(layer._cache, u, generator)
    changed = backward(rounded_differently(cache, u, generator))[0]
    others = [
        parameter.gradient for _, layer in layers for parameter in layer.parameters().values()
    ]
    for (_, layer), before in zip(layers, caches, strict=True):
        layer._cache = before
    upstream = backward(cache)

    def measure(
        direction: Array, k: int, parameter: Parameter | None, layer_inputs: list[Array]
    ) -> tuple[float, float, float]:
        """Return the derivative of the loss along a direction, the size of its terms, and 0.

        The 0 is the error of the derivative, because the complex step has none.

        The derivative is with respect to a parameter of layer k, or, if the parameter is None, with
        respect to the layer's input.
        """
        if parameter is None:
            outputs = forward(k, numeric.stepped(layer_inputs[k], direction))
        else:
            value = parameter.data
            parameter.data = numeric.stepped(value, direction)
            outputs = forward(k, layer_inputs[k])
            parameter.data = value
        loss, _ = F.softmax_cross_entropy(outputs[-1], labels)
        slope = to_numpy(xp.imag(outputs[0])) / numeric.STEP
        size = np.abs(slope * to_numpy(upstream[k + 1])).sum()
        return float(xp.imag(loss)) / numeric.STEP, float(size), 0.0

    def check(
        name: str, x: Array, gradient: Array, other: Array, k: int, parameter: Parameter | None
    ) -> Finding:
        problem = wrong_form(gradient, tuple(x.shape))
        if problem:
            return Finding(name, tuple(x.shape), problem=problem)
        at = functools.partial(measure, k=k, parameter=parameter)
        return compare(
            name,
            x,
            to_numpy(gradient).ravel(),
            functools.partial(at, layer_inputs=inputs),
            functools.partial(at, layer_inputs=rounded_inputs),
            count=inputs[k + 1].size,
            u=u,
            change=float(xp.max(xp.abs(other - gradient))),
            method="complex step",
            generator=generator,
        )

    remaining = iter(others)
    findings = [
        check(prefix + name, parameter.data, parameter.gradient, next(remaining), k, parameter)
        for k, (prefix, layer) in enumerate(layers)
        for name, parameter in layer.parameters().items()
    ]
    return Report((*findings, check("x", x, upstream[0], changed, 0, None)))


def leaves(model: Sequential, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield the layers inside all `Sequential`, each with the prefix of its parameters' names."""
    for i, layer in enumerate(model.layers):
        if isinstance(layer, Sequential):
            yield from leaves(layer, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}.", layer
