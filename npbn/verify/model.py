"""Check the gradients of the loss of a whole network."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import to_numpy
from npbn.functional.arrays import Array
from npbn.layers import Layer, Parameter, Sequential
from npbn.verify import numeric
from npbn.verify.checker import Finding, Measured, Report, compare, moved_by_rounding, wrong_form
from npbn.verify.numeric import like


def check_model(
    model: Sequential,
    x: Array,
    labels: Array,
    *,
    generator: np.random.Generator | None = None,
) -> Report:
    """Compare the gradients of the loss of a model with numeric derivatives by the complex step.

    The gradients are those with respect to all parameters and x. The loss is softmax cross-entropy.
    The model is not changed, because a copy of the model is checked. The copy has the same mode,
    training or prediction. A proof needs a model and an x of dtype float64.

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
    loss, cache = F.softmax_cross_entropy(inputs[-1], labels)
    upstream = [F.softmax_cross_entropy_backward(cache)]
    for _, layer in reversed(layers):
        upstream.insert(0, layer.backward(upstream[0]))

    owners = [
        (prefix + name, parameter.data, k, parameter)
        for k, (prefix, layer) in enumerate(layers)
        for name, parameter in layer.parameters().items()
    ]
    checked = [*owners, ("x", x, 0, None)]

    def all_gradients(values: Mapping[str, Array]) -> list[Array]:
        """Return the gradients of a new copy of the model with other parameters and another x."""
        other = copy.deepcopy(model)
        named = [p for _, layer in leaves(other) for p in layer.parameters().values()]
        for parameter, (name, *_) in zip(named, owners, strict=True):
            parameter.data = values[name]
        _, cache = F.softmax_cross_entropy(other.forward(values["x"]), labels)
        dx = other.backward(F.softmax_cross_entropy_backward(cache))
        return [*(parameter.gradient for parameter in named), dx]

    gradients = [p.gradient for _, _, _, p in owners] + [upstream[0]]
    problems = [wrong_form(g, x.shape) for g, (_, x, _, _) in zip(gradients, checked, strict=True)]
    moved = [np.zeros(())] * len(checked)
    if not any(problems):
        values = {name: value for name, value, _, _ in checked}
        moved = moved_by_rounding(all_gradients, values, gradients, generator)

    def measure(
        direction: Array, k: int, parameter: Parameter | None, layer_inputs: list[Array]
    ) -> Measured:
        """Return the derivative of the loss along a direction, the size of its terms, and 0.

        The 0 is the estimated error, because the complex step has no truncation error. The
        derivative is with respect to a parameter of layer k. If the parameter is None, the
        derivative is with respect to the layer's input.
        """
        if parameter is None:
            outputs = forward(k, numeric.stepped(layer_inputs[k], direction))
        else:
            value = parameter.data
            parameter.data = numeric.stepped(value, direction)
            outputs = forward(k, layer_inputs[k])
            parameter.data = value
        stepped_loss, _ = F.softmax_cross_entropy(outputs[-1], labels)
        slope = to_numpy(xp.imag(outputs[0])) / numeric.STEP
        size = np.abs(slope * to_numpy(upstream[k + 1])).sum()
        return float(xp.imag(stepped_loss)) / numeric.STEP, float(size), 0.0

    findings = []
    for i, (name, value, k, parameter) in enumerate(checked):
        if problems[i]:
            findings.append(Finding(name, tuple(value.shape), problem=problems[i]))
            continue
        at = functools.partial(measure, k=k, parameter=parameter)
        findings.append(
            compare(
                name,
                value,
                gradients[i],
                functools.partial(at, layer_inputs=inputs),
                functools.partial(at, layer_inputs=rounded_inputs),
                outputs=inputs[k + 1],
                size=float(loss),
                moved=moved[i],
                method="complex step",
                generator=generator,
            )
        )
    return Report(tuple(findings))


def leaves(model: Sequential, prefix: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield the layers in nested `Sequential`, each with the prefix of its parameters' names."""
    for i, layer in enumerate(model.layers):
        if isinstance(layer, Sequential):
            yield from leaves(layer, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}.", layer
