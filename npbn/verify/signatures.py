"""The signatures in which people write these operations, and how to call each.

An adapter turns somebody's (forward, backward) into the signature of `npbn.verify.plain`: all
arguments by name, parameters shaped (1, D) or (1, C, 1, 1), and (y, cache, ...) as the result.

- *npbn*: the names of npbn's arguments, in any order, positional or keyword:
  ``batch_norm(x, gamma, beta, moving_mean, moving_var, training, eps, momentum) -> y, cache,
  (moving_mean, moving_var)``; ``conv2d(x, weight, bias, stride, padding) -> y, cache``;
  ``avg_pool2d(x, kernel_size, stride, padding)``; ``linear(x, weight, bias)``; ``sigmoid(x)``;
  ``softmax_cross_entropy(logits, labels)``. Arguments that it does not have are left out, so
  ``batch_norm(x, gamma, beta, eps) -> y, cache`` is examined only in training mode. For x of shape
  (N, D), gamma is (1, D), and for (N, C, H, W) it is (1, C, 1, 1); code that returns
  dgamma as (D,) and does not look at x.ndim is examined only on (N, D). kernel_size, stride and
  padding are pairs, which may differ by axis; code that takes numbers is examined with those.
- *course*: course homework. ``batchnorm_forward(x, gamma, beta, bn_param) -> out, cache`` for x of
  shape (N, D), with gamma of shape (D,) and bn_param a dict of "mode" ("train" or "test"), "eps",
  "momentum" (the fraction kept), "running_mean" and "running_var", which it updates; backward is
  examined only in training. ``conv_forward(x, w, b, conv_param)`` with "stride" and "pad";
  ``max_pool_forward(x, pool_param)`` with "pool_height", "pool_width" and "stride";
  ``affine_forward(x, w, b)`` with w of shape (D, out); ``relu_forward(x)``.

In both, ``backward(dy, cache)`` returns the gradients in the order of the arguments. A loss may
have ``backward(cache)``, or return its gradient at once, as ``softmax_loss(x, y) -> loss, dx``:
it is forward and backward then, ``softmax_loss,softmax_loss``.

- *any other*, by an adapter of yours: ``adapt(forward, backward)`` gets the two functions, or
  classes, and returns two in npbn's signature, with the arguments it can use. Where it raises
  `npbn.verify.NotExaminedError`, nothing is examined. For a class BatchNorm1D(features, eps) with
  forward(x) and backward(dy), which is to be handed over as ``BatchNorm1D,BatchNorm1D``::

      from npbn.verify import NotExaminedError

      def adapt(forward, backward):
          def batch_norm(x, gamma, beta, training, eps):
              if not training:
                  raise NotExaminedError("prediction is another exercise")
              layer = forward(gamma.size, eps)
              layer.gamma, layer.beta = gamma.ravel(), beta.ravel()
              return layer.forward(x), layer

          def batch_norm_backward(dy, layer):
              dx = layer.backward(dy)
              return dx, layer.dgamma, layer.dbeta

          return batch_norm, batch_norm_backward
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from npbn.verify.operations import OPERATIONS, NotExaminedError, Pair, with_cache

SIGNATURES = ("npbn", "course")


class BadResultError(Exception):
    """The error that is raised if the code under examination returns an unusable result.

    The message is a predicate such as "returned None from backward"; the subject is "it".
    """


def guess(operation: str, forward: Callable[..., Any]) -> str:
    """Guess the signature of a forward pass from the arguments that it needs."""
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name.lower() for p in parameters if p.default is p.empty]
    if len(names) != OPERATIONS[operation].course_arguments:
        return "npbn"
    homework = names[:3] == ["x", "w", "b"] or names[-1].endswith(("_param", "_params"))
    softmax = operation == "softmax_cross_entropy" and names[-1] == "y"
    alone = len(names) == 1  # The argument of sigmoid and relu may have any name.
    return "course" if homework or softmax or alone else "npbn"


def adapt(
    operation: str, forward: Callable[..., Any], backward: Callable[..., Any], signature: str
) -> Pair:
    """Return a forward and a backward pass with the signature of `npbn.verify.plain`.

    Args:
        operation: the name of the operation.
        forward, backward: the forward and the backward pass of other people's code.
        signature: the signature of this code, one of SIGNATURES.
    """
    if operation == "softmax_cross_entropy":
        backward = _of_a_loss(forward, backward)
    if signature == "course":
        return OPERATIONS[operation].from_course(forward, backward)
    call = _by_name(forward)
    if operation == "batch_norm" and "ndim" not in _names(forward):
        return _vectors_if_flat(call, backward)
    return call, backward


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of globals and attributes that the code of a function uses."""
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _of_a_loss(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the backward pass of a loss as a function whose only argument is the cache."""
    if backward is forward:
        return lambda dx: dx  # softmax_loss has returned the gradient in place of a cache.
    if len(inspect.signature(backward).parameters) == 2:
        return lambda cache: backward(1.0, cache)
    return backward


def _by_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``forward`` without the arguments that ``forward`` lacks."""
    signature = inspect.signature(forward)
    names = signature.parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in names.values())

    def call(**arguments: Any) -> Any:
        taken = {k: v for k, v in arguments.items() if anything or k in names}
        dropped = arguments.keys() - taken.keys()
        try:
            signature.bind(**taken)
        except TypeError:
            raise NotExaminedError(
                f"its arguments ({', '.join(names)}) are not npbn's: perhaps the course's, or an "
                "adapter is needed"
            ) from None
        if "training" in dropped and not arguments["training"]:
            raise NotExaminedError("it has no prediction mode")
        if "stride" in dropped and arguments["stride"] != arguments.get("kernel_size", (1, 1)):
            raise NotExaminedError("it has no stride")
        if "padding" in dropped and arguments["padding"] != (0, 0):
            raise NotExaminedError("it has no padding")
        try:
            result = forward(**taken)
        except TypeError as error:  # The code may expect a number in place of a pair.
            numbers = _numbers(taken)
            try:
                result = forward(**numbers)
            except TypeError:
                raise error from None
        return with_cache(result)

    return call


def _numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with one number in place of each pair of equal numbers."""
    pairs = {name: value for name, value in arguments.items() if isinstance(value, tuple)}
    if any(height != width for height, width in pairs.values()):
        raise NotExaminedError("it takes no pairs of unequal numbers")
    return arguments | {name: height for name, (height, _) in pairs.items()}


def _vectors_if_flat(forward: Callable[..., Any], backward: Callable[..., Any]) -> Pair:
    """Return a pair that skips x of shape (N, C, H, W) if dgamma is flat for x of shape (N, D).

    Code with a flat dgamma, of shape (D,), that never reads x.ndim is meant for (N, D) only.
    """
    flat = False

    def batch_norm(**arguments: Any) -> Any:
        if flat and arguments["x"].ndim == 4:
            raise NotExaminedError("its dgamma is flat, for (N, D)")
        return forward(**arguments)

    def batch_norm_backward(dy: Any, cache: Any) -> Any:
        nonlocal flat
        gradients = backward(dy, cache)
        if isinstance(gradients, (tuple, list)) and len(gradients) == 3:
            flat = dy.ndim == 2 and np.ndim(gradients[1]) == 1
        return gradients

    return batch_norm, batch_norm_backward
