"""Define a table of the operations that other people's code may compute.

For each operation, the table has the names of the gradients, the inputs on which code is examined,
and an adapter for code with the signature of course homework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import functional as F

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""A forward and a backward pass."""


class NotExaminedError(Exception):
    """The error that is raised if code is not meant for a probe. The message says why."""


@dataclass(frozen=True)
class Probe:
    """An input on which code is examined.

    Attributes:
        name: a description of the input, for the messages.
        arguments: the arguments of the forward pass in `npbn.verify.plain`, by name.
    """

    name: str
    arguments: dict[str, Any]


def with_cache(result: Any) -> Any:
    """Return the result of a forward pass as (y, cache, …). A result y becomes (y, None)."""
    return result if isinstance(result, (tuple, list)) else (result, None)


def arguments_in_order(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    """Return a pair in npbn's signature for a forward pass that takes positional arguments."""
    return lambda **arguments: with_cache(forward(*arguments.values())), backward


@dataclass(frozen=True)
class Operation:
    """An operation of `npbn.functional`.

    Attributes:
        gradients: the names of the gradients, in the order in which the backward pass returns them.
        draw: a function that returns the probes, drawn from a generator. Two sizes of an input are
            different if equal sizes could hide that the code confuses the two.
        course_arguments: the number of arguments that the forward pass of course homework needs.
        from_course: a function that turns a pair with the signature of course homework into a pair
            with npbn's signature.
    """

    gradients: tuple[str, ...]
    draw: Callable[[np.random.Generator], list[Probe]]
    course_arguments: int
    from_course: Callable[[Callable[..., Any], Callable[..., Any]], Pair] = arguments_in_order


def probes(operation: str) -> list[Probe]:
    """Return the inputs on which an operation is examined. Every call returns equal inputs."""
    if operation not in OPERATIONS:
        raise ValueError(f"expected an operation of {', '.join(OPERATIONS)}, got {operation!r}")
    return OPERATIONS[operation].draw(np.random.default_rng(2015))


def true_functions(operation: str) -> Pair:
    """Return the forward and the backward pass of an operation in `npbn.functional`."""
    return getattr(F, operation), getattr(F, f"{operation}_backward")


def draw_batch_norm(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, ...], training: bool) -> Probe:
        form = (1, shape[1]) + (1,) * (len(shape) - 2)
        arguments = {
            "x": 1 + 2 * rng.standard_normal(shape),
            "gamma": rng.uniform(0.5, 2, form),
            "beta": rng.standard_normal(form),
            "moving_mean": rng.standard_normal(form),
            "moving_var": rng.uniform(0.5, 2, form),
            "training": training,
            "eps": 0.1,
            "momentum": 0.7,
        }
        return Probe(name, arguments)

    return [
        probe("training, (N, D)", (7, 3), True),
        probe("training, (N, C, H, W)", (3, 2, 4, 5), True),
        probe("prediction, (N, D)", (5, 3), False),
        probe("prediction, (N, C, H, W)", (4, 2, 5, 3), False),
    ]


def course_batch_norm(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    def batch_norm(
        x: Any,
        gamma: Any,
        beta: Any,
        moving_mean: Any,
        moving_var: Any,
        training: bool,
        eps: float,
        momentum: float,
    ) -> Any:
        if x.ndim == 4:
            raise NotExaminedError("homework is for (N, D)")
        parameter = {
            "mode": "train" if training else "test",
            "eps": eps,
            "momentum": momentum,
            "running_mean": moving_mean.ravel().copy(),
            "running_var": moving_var.ravel().copy(),
        }
        out, cache = with_cache(forward(x, gamma.ravel(), beta.ravel(), parameter))
        moving = (parameter["running_mean"], parameter["running_var"])
        return out, (cache, training), moving

    def batch_norm_backward(dy: Any, cache: Any) -> Any:
        cache, training = cache
        if not training:
            raise NotExaminedError("homework has no backward pass in prediction")
        return backward(dy, cache)

    return batch_norm, batch_norm_backward


def draw_conv2d(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, image: tuple[int, int], stride: Any, padding: Any) -> Probe:
        x, weight = rng.standard_normal((2, 3, *image)), rng.standard_normal((4, 3, 3, 2))
        arguments = {"x": x, "weight": weight, "bias": rng.standard_normal(4)}
        return Probe(name, arguments | {"stride": stride, "padding": padding})

    return [
        probe("stride 1, no padding", (5, 6), (1, 1), (0, 0)),
        probe("stride 2, padding 1", (6, 4), (2, 2), (1, 1)),
        probe("stride (2, 1), padding (0, 1)", (7, 5), (2, 1), (0, 1)),
    ]


def course_conv2d(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    def conv2d(x: Any, weight: Any, bias: Any, stride: Any, padding: Any) -> Any:
        if stride[0] != stride[1] or padding[0] != padding[1]:
            raise NotExaminedError("it has one stride and one padding")
        return with_cache(forward(x, weight, bias, {"stride": stride[0], "pad": padding[0]}))

    return conv2d, backward


def draw_pooling(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, x: np.ndarray, kernel: Any, stride: Any, padding: Any) -> Probe:
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        return Probe(name, {"x": x, **options})

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    # The numbers are so far apart that the step of a numeric derivative changes no maximum.
    apart = rng.permutation(np.linspace(-4, 4, 288)).reshape(2, 3, 6, 8)
    return [
        probe("windows side by side", normal(2, 3, 4, 6), (2, 2), (2, 2), (0, 0)),
        probe("overlapping windows", apart, (4, 3), (2, 2), (0, 0)),
        probe("padding, negative numbers", normal(2, 3, 5, 4) - 5, (3, 2), (2, 1), (1, 1)),
        probe("ties", np.floor(2 * normal(2, 3, 4, 6)), (2, 2), (2, 2), (0, 0)),
    ]


def course_pooling(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    def pool(x: Any, kernel_size: Any, stride: Any, padding: Any) -> Any:
        if stride[0] != stride[1] or padding != (0, 0):
            raise NotExaminedError("it has one stride and no padding")
        height, width = kernel_size
        options = {"pool_height": height, "pool_width": width, "stride": stride[0]}
        return with_cache(forward(x, options))

    return pool, backward


def draw_linear(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, examples: int, inputs: int, outputs: int) -> Probe:
        x, weight = rng.standard_normal((examples, inputs)), rng.standard_normal((outputs, inputs))
        return Probe(name, {"x": x, "weight": weight, "bias": rng.standard_normal(outputs)})

    return [probe("square", 4, 3, 3), probe("wide", 5, 2, 4)]


def course_linear(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    def linear(x: Any, weight: Any, bias: Any) -> Any:
        return with_cache(forward(x, weight.T.copy(), bias))

    def linear_backward(dy: Any, cache: Any) -> Any:
        gradients = backward(dy, cache)
        if isinstance(gradients, (tuple, list)) and len(gradients) == 3:
            dx, dw, db = gradients
            return dx, np.transpose(dw), db
        return gradients

    return linear, linear_backward


def draw_elementwise(rng: np.random.Generator) -> list[Probe]:
    return [
        Probe("matrix", {"x": rng.standard_normal((5, 4))}),
        Probe("images", {"x": rng.standard_normal((2, 2, 3, 2))}),
    ]


def draw_loss(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, offset: float, examples: int) -> Probe:
        logits = offset + rng.standard_normal((examples, 4))
        return Probe(name, {"logits": logits, "labels": rng.integers(0, 4, examples)})

    return [probe("ordinary logits", 0, 5), probe("large logits", 1000, 3)]


OPERATIONS = {
    "batch_norm": Operation(
        ("dx", "dgamma", "dbeta"), draw_batch_norm, 4, from_course=course_batch_norm
    ),
    "conv2d": Operation(("dx", "dweight", "dbias"), draw_conv2d, 4, from_course=course_conv2d),
    "avg_pool2d": Operation(("dx",), draw_pooling, 2, from_course=course_pooling),
    "max_pool2d": Operation(("dx",), draw_pooling, 2, from_course=course_pooling),
    "linear": Operation(("dx", "dweight", "dbias"), draw_linear, 3, from_course=course_linear),
    "sigmoid": Operation(("dx",), draw_elementwise, 1),
    "relu": Operation(("dx",), draw_elementwise, 1),
    "softmax_cross_entropy": Operation(("dlogits",), draw_loss, 2),
}
"""All operations by name."""
