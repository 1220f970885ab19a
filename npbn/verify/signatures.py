"""The signatures in which people write these operations, and how to call each.

An adapter turns somebody's (forward, backward) into the signature of `npbn.verify.plain`: all
arguments by name, parameters shaped (1, D) or (1, C, 1, 1), and (y, cache, ...) as the result.

- *npbn*: the names of npbn's arguments, in any order, positional or keyword:
  ``batch_norm(x, gamma, beta, moving_mean, moving_var, training, eps, momentum) -> y, cache,
  (moving_mean, moving_var)``; ``conv2d(x, weight, bias, stride, padding) -> y, cache``;
  ``avg_pool2d(x, kernel_size, stride, padding)``; ``linear(x, weight, bias)``; ``sigmoid(x)``;
  ``softmax_cross_entropy(logits, labels)``. Arguments that it does not have are left out, so
  ``batch_norm(x, gamma, beta, eps) -> y, cache`` is examined in training mode alone.
- *course*: course homework. ``batchnorm_forward(x, gamma, beta, bn_param) -> out, cache`` with
  gamma of shape (D,) and bn_param a dict of "mode" ("train" or "test"), "eps", "momentum" (the
  fraction kept), "running_mean" and "running_var", which it updates; ``conv_forward(x, w, b,
  conv_param)`` with "stride" and "pad"; ``max_pool_forward(x, pool_param)`` with "pool_height",
  "pool_width" and "stride"; ``affine_forward(x, w, b)`` with w of shape (D, out);
  ``relu_forward(x)``; ``softmax_loss(x, y) -> loss, dx``.

In both, ``backward(dy, cache)`` returns the gradients in the order of the arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

SIGNATURES = ("npbn", "course")

Pair = tuple[Callable[..., Any], Callable[..., Any]]


class UnsupportedError(Exception):
    """The code cannot be run on this probe: its signature has no place for an argument."""


def guess(operation: str, forward: Callable[..., Any]) -> str:
    """Which signature a forward pass has, by the names of its arguments."""
    names = list(inspect.signature(forward).parameters)
    homework = any(name.endswith("_param") for name in names) or names[1:3] == ["w", "b"]
    softmax = operation == "softmax_cross_entropy" and names[:2] == ["x", "y"]
    return "course" if homework or softmax else "npbn"


def adapt(
    operation: str, forward: Callable[..., Any], backward: Callable[..., Any], signature: str
) -> Pair:
    """The pair in the signature of `npbn.verify.plain`."""
    if signature == "course":
        return _course(operation, forward, backward)
    return _by_name(operation, forward), backward


def _by_name(operation: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def call(**arguments: Any) -> Any:
        if not anything:
            dropped = arguments.keys() - parameters.keys()
            if "training" in dropped and not arguments["training"]:
                raise UnsupportedError("it has no prediction mode")
            if dropped & {"stride", "padding"} and (
                arguments.get("stride", (1, 1)) != (1, 1) and operation == "conv2d"
            ):
                raise UnsupportedError("it has no stride")
            if "padding" in dropped and arguments["padding"] != (0, 0):
                raise UnsupportedError("it has no padding")
            arguments = {k: v for k, v in arguments.items() if k in parameters}
        result = forward(**arguments)
        return result if isinstance(result, tuple) else (result, None)

    return call


def _course(operation: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    if operation == "batch_norm":

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
            form = gamma.shape
            parameter = {
                "mode": "train" if training else "test",
                "eps": eps,
                "momentum": momentum,
                "running_mean": moving_mean.ravel().copy(),
                "running_var": moving_var.ravel().copy(),
            }
            out, cache = forward(x, gamma.ravel(), beta.ravel(), parameter)
            moving = (parameter["running_mean"], parameter["running_var"])
            return out, (cache, form), tuple(np.reshape(m, form) for m in moving)

        def batch_norm_backward(dy: Any, cache: Any) -> Any:
            cache, form = cache
            dx, dgamma, dbeta = backward(dy, cache)
            if np.size(dgamma) != np.prod(form) or np.size(dbeta) != np.prod(form):
                return dx, dgamma, dbeta
            return dx, np.reshape(dgamma, form), np.reshape(dbeta, form)

        return batch_norm, batch_norm_backward
    if operation == "conv2d":

        def conv2d(x: Any, weight: Any, bias: Any, stride: Any, padding: Any) -> Any:
            if stride[0] != stride[1] or padding[0] != padding[1]:
                raise UnsupportedError("it has one stride and one padding")
            return forward(x, weight, bias, {"stride": stride[0], "pad": padding[0]})

        return conv2d, backward
    if operation in ("avg_pool2d", "max_pool2d"):

        def pool(x: Any, kernel_size: Any, stride: Any, padding: Any) -> Any:
            if stride[0] != stride[1] or padding != (0, 0):
                raise UnsupportedError("it has one stride and no padding")
            height, width = kernel_size
            return forward(x, {"pool_height": height, "pool_width": width, "stride": stride[0]})

        return pool, backward
    if operation == "linear":

        def linear(x: Any, weight: Any, bias: Any) -> Any:
            return forward(x, weight.T.copy(), bias)

        def linear_backward(dy: Any, cache: Any) -> Any:
            dx, dw, db = backward(dy, cache)
            return dx, np.transpose(dw), db

        return linear, linear_backward
    if operation == "softmax_cross_entropy":
        return lambda logits, labels: forward(logits, labels), lambda cache: cache
    return forward, backward
