"""The gradients of a whole network by its loss."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import to_numpy
from npbn.functional.arrays import Array
from npbn.layers import Layer, Parameter, Sequential
from npbn.verify import numeric
from npbn.verify.checker import Finding, Report, compare, like, wrong_form


def check_model(
    model: Sequential,
    x: Array,
    labels: Array,
    *,
    generator: np.random.Generator | None = None,
) -> Report:
    """Compare the gradients of the loss with respect to parameters and x with the complex step.

    The loss is softmax cross-entropy. The model is not changed: a copy is checked, in the mode
    (training or prediction) that the model is in. For a proof, let model and x be float64.

    A derivative of the loss is a single number. The terms that its error is measured against are
    those at the output of the parameter's own layer, dy_j · ∂y_j / ∂parameter.

    Args:
        model: with forward passes that are fit for the complex step, as all of npbn's are.
        x, labels: a batch.
        generator: draws directions, and the elements of large parameters to look at.
    """
    generator = np.random.default_rng(0) if generator is None else generator
    xp = array_api_compat.array_namespace(x)
    layers = list(leaves(copy.deepcopy(model)))

    def forward(start: int, value: Array) -> list[Array]:
        """The outputs of the layers from ``start`` on."""
        outputs = []
        for _, layer in layers[start:]:
            value = layer.forward(value)
            outputs.append(value)
        return outputs

    # The batch rounded differently, for the conditioning; its inputs to every layer.
    u = float(xp.finfo(x.dtype).eps)
    rounded = x * like(x, 1 + u * generator.choice((-1, 1), tuple(x.shape)))
    rounded_inputs = [rounded, *forward(0, rounded)]
    inputs = [x, *forward(0, x)]
    _, cache = F.softmax_cross_entropy(inputs[-1], labels)
    upstream = [F.softmax_cross_entropy_backward(cache)]
    for _, layer in reversed(layers):
        upstream.insert(0, layer.backward(upstream[0]))

    def measure(
        direction: Array, k: int, parameter: Parameter | None, layer_inputs: list[Array]
    ) -> tuple[float, float]:
        """Along a direction of a parameter of layer k, or of its input: numeric value and size."""
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
        return float(xp.imag(loss)) / numeric.STEP, float(size)

    def check(name: str, x: Array, gradient: Array, k: int, parameter: Parameter | None) -> Finding:
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
            method="complex step",
            generator=generator,
        )

    findings = [
        check(prefix + name, parameter.data, parameter.gradient, k, parameter)
        for k, (prefix, layer) in enumerate(layers)
        for name, parameter in layer.parameters().items()
    ]
    return Report((*findings, check("x", x, upstream[0], 0, None)))


def leaves(model: Sequential, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    """The layers that compute, each with what the names of its parameters begin with."""
    for i, layer in enumerate(model.layers):
        if isinstance(layer, Sequential):
            yield from leaves(layer, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}.", layer
