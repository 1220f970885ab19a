"""Define stochastic gradient descent and schedules of the learning rate.

A schedule is a function. Its argument is the number of steps so far, and its value is the learning
rate of the next step.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from npbn.functional.arrays import Array
from npbn.layers import Parameter

Schedule: TypeAlias = Callable[[int], float]


def _check_rate(name: str, value: Any) -> None:
    """Raise ValueError if a value is not a finite number >= 0."""
    if not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"expected {name} as a finite number >= 0, got {value!r}")


@dataclass(frozen=True)
class Constant:
    """A schedule with the same learning rate, ``lr``, at every step."""

    lr: float

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)

    def __call__(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class StepDecay:
    """A schedule that multiplies the learning rate by ``factor`` after every ``every`` steps.

    The learning rate is lr · factor^⌊step / every⌋.
    """

    lr: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        _check_rate("factor", self.factor)
        if self.every < 1:
            raise ValueError(f"expected every >= 1, got {self.every}")

    def __call__(self, step: int) -> float:
        return self.lr * self.factor ** (step // self.every)


@dataclass(frozen=True)
class Cosine:
    """A schedule that decreases the learning rate from ``lr`` to 0 along a cosine.

    The learning rate is lr · (1 + cos(π · step / total)) / 2. From step ``total`` on, it is 0.

    Source: I. Loshchilov and F. Hutter, "SGDR", ICLR 2017 (arXiv:1608.03983), equation 5, without
    restarts.
    """

    lr: float
    total: int

    def __post_init__(self) -> None:
        _check_rate("lr", self.lr)
        if self.total < 1:
            raise ValueError(f"expected total >= 1, got {self.total}")

    def __call__(self, step: int) -> float:
        return self.lr * (1 + math.cos(math.pi * min(step / self.total, 1))) / 2


class SGD:
    r"""Stochastic gradient descent, with momentum and weight decay.

    For each parameter w with gradient g, learning rate η, momentum m and weight decay λ:

    $$v \leftarrow m v + (g + \lambda w) \qquad w \leftarrow w - \eta v$$

    Source: I. Sutskever, J. Martens, G. Dahl and G. Hinton, "On the importance of initialization
    and momentum in deep learning", ICML 2013, equations 1 and 2, with η outside of the velocity as
    in PyTorch.

    Args:
        parameters: the parameters of a model by name, from ``model.parameters()``.
        lr: the learning rate η, or a schedule that returns η for the number of steps so far.
        momentum: m, the fraction of the velocity that is kept, in [0, 1).
        weight_decay: λ. It applies to weights only, because a decay of γ, β and biases would limit
            what a layer can compute and would not regularize the model.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        lr: float | Schedule,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"expected parameters by name, as model.parameters() gives them, "
                f"got {type(parameters).__name__}"
            )
        if not parameters:
            raise ValueError("expected at least one parameter, got none: nothing would be trained")
        _check_rate("momentum", momentum)
        if momentum >= 1:
            raise ValueError(f"expected momentum in [0, 1), got {momentum}")
        _check_rate("weight_decay", weight_decay)
        self.parameters = dict(parameters)
        self.schedule = lr if callable(lr) else Constant(lr)
        self.momentum = float(momentum)  # A NumPy scalar would impose its dtype on the arrays.
        self.weight_decay = float(weight_decay)
        self.steps = 0
        self.velocity: dict[str, Array] = {}

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule(self.steps))

    def step(self) -> None:
        """Update every parameter in place, by one step.

        Raises:
            RuntimeError: a parameter has no gradient yet. In this case, nothing is changed.
        """
        gradients: dict[str, Array] = {}
        for name, parameter in self.parameters.items():
            if parameter.gradient is None:
                raise RuntimeError(f"{name} has no gradient: step needs a backward pass before it")
            gradients[name] = parameter.gradient
        lr = self.lr
        for name, parameter in self.parameters.items():
            v = gradients[name]
            if self.weight_decay and parameter.name == "weight":
                v = v + self.weight_decay * parameter.data
            if self.momentum:
                v = v + self.momentum * self.velocity.get(name, 0.0)  # This creates a new array.
                self.velocity[name] = v
            parameter.data -= lr * v
        self.steps += 1
