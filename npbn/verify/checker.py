r"""Is this backward pass the gradient of that forward pass?

For an output $y$ and an upstream gradient $dy$, the element $i$ of the gradient is

$$dx_i = \sum_j dy_j \frac{\partial y_j}{\partial x_i}$$

whose right side is evaluated numerically (`npbn.verify.numeric`), with a random $dy$. (Never with
ones: $\sum_j y_j$ of a normalized $y$ does not depend on $x$, so that many wrong gradients would
pass.)

**The error** is measured against the size of what the sum is made of,

$$\frac{\max_i |\text{analytic}_i - \text{numeric}_i|}
  {\max(\max_i |\text{numeric}_i|, \max_i \sum_j |dy_j \partial y_j / \partial x_i|)}$$

because the terms may cancel: the bias of a layer that feeds batch norm has the gradient 0, and what
is computed for it is the rounding of its terms.

**The bound** comes from the arithmetic. A sum of $n$ rounded terms is off by about $\sqrt{n} u$
of their size, with $u$ the unit of rounding. Inputs that are rounded, by $u$ relatively, move the
gradient by as much as the operation is badly conditioned: that is measured, by doing so. Central
differences are off by $u^{2/3}$ besides. The bound is 64 times the sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from npbn.backend import to_numpy
from npbn.functional.arrays import Array
from npbn.verify import numeric

SAFETY = 64
SAMPLE = 24
"""The elements that are checked one by one. Those beyond are checked all at once."""


@dataclass(frozen=True)
class Finding:
    """The result for one gradient.

    Attributes:
        name: of the input, or the parameter.
        shape: of it.
        error, bound: relative to ``scale``, see the module's docstring.
        scale: what the error is measured against.
        index: of the worst element.
        analytic, numeric: its value by the backward pass, and numerically.
        largest: absolute value of any element, either way.
        method: "complex step" or "central difference".
        problem: why there is nothing to compare, as a sentence; or empty.
    """

    name: str
    shape: tuple[int, ...]
    error: float = math.nan
    bound: float = math.nan
    scale: float = math.nan
    index: tuple[int, ...] = ()
    analytic: float = math.nan
    numeric: float = math.nan
    largest: float = math.nan
    method: str = ""
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the gradient is right."""
        return not self.problem and self.error <= self.bound

    @property
    def cancels(self) -> bool:
        """Whether the gradient is 0 because its terms cancel, as a bias's before batch norm."""
        return self.ok and self.scale > 0 and self.largest <= self.bound * self.scale

    @property
    def verdict(self) -> str:
        """Return a cell for a table: right, right and why it is 0, or what is wrong."""
        if self.cancels:
            return "right: 0, its terms cancel"
        return "right" if self.ok else str(self)

    def __str__(self) -> str:
        if self.problem:
            return f"d{self.name}: {self.problem}"
        if self.cancels:
            return f"d{self.name}: right, and 0: its terms cancel (error {self.error:.1e})"
        if self.ok:
            return f"d{self.name}: right (error {self.error:.1e}, bound {self.bound:.1e})"
        place = ", ".join(str(i) for i in self.index)
        return (
            f"d{self.name}: WRONG, relative error {self.error:.1e}, bound {self.bound:.1e}; worst "
            f"at [{place}]: {self.analytic:.10g} by the backward pass, {self.numeric:.10g} by "
            f"{self.method}"
        )


@dataclass(frozen=True)
class Report:
    """The results for all gradients of an operation or model."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all of them are right."""
        return all(finding.ok for finding in self.findings)

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((finding.error for finding in self.findings), default=0.0)

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


def check_gradients(
    forward: Callable[..., Any],
    backward: Callable[[Array, Any], Any],
    inputs: Mapping[str, Array],
    *,
    constants: Mapping[str, Any] | None = None,
    generator: np.random.Generator | None = None,
    method: str = "auto",
) -> Report:
    """Compare the gradients of a backward pass with numeric ones.

    Args:
        forward: called with inputs and constants as keywords; returns y, or (y, cache, ...).
        backward: (dy, cache) → the gradients by the inputs, in their order: one array, or a tuple
            in which None stands for a gradient that there is not. Without a cache, it is called
            with None for it.
        inputs: what gradients are taken by, by name; float64 arrays for a proof, of any library.
        constants: further arguments.
        generator: draws the upstream gradient and, of large inputs, the elements to look at.
        method: "complex step", "central difference", or "auto": the complex step where the forward
            pass turns out to be fit for it.

    Returns:
        A report; ``print`` it.

    Raises:
        ValueError: no such method, or no inputs.
        Whatever forward and backward raise.
    """
    if method not in ("auto", "complex step", "central difference"):
        raise ValueError(
            f"expected method auto, complex step or central difference, got {method!r}"
        )
    if not inputs:
        raise ValueError("expected at least one input to take a gradient by")
    generator = np.random.default_rng(0) if generator is None else generator
    constants = {} if constants is None else constants
    xp = array_api_compat.array_namespace(*inputs.values())

    def run(values: Mapping[str, Array]) -> tuple[Array, Any]:
        result = forward(**values, **constants)
        return (result[0], result[1]) if isinstance(result, tuple) else (result, None)

    def output(value: Array, name: str, others: Mapping[str, Array]) -> Array:
        """y, as a function of one input."""
        return run({**others, name: value})[0]

    inputs = {
        name: smooth_point(functools.partial(output, name=name, others=inputs), x, generator)
        for name, x in inputs.items()
    }
    y, cache = run(inputs)
    dy = like(y, generator.standard_normal(tuple(y.shape)))
    gradients = backward(dy, cache)
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    if len(gradients) != len(inputs):
        # dbias is None where there is no bias among the inputs.
        gradients = tuple(g for g in gradients if g is not None)
    if len(gradients) != len(inputs):
        problem = f"expected {len(inputs)} gradients ({', '.join(inputs)}), got {len(gradients)}"
        return Report(tuple(Finding(n, tuple(x.shape), problem=problem) for n, x in inputs.items()))

    findings = []
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        shape = tuple(x.shape)
        problem = wrong_form(gradient, shape)
        if problem:
            findings.append(Finding(name, shape, problem=problem))
            continue

        random = like(x, generator.choice((-1.0, 1.0), shape))
        chosen = method
        if method == "auto":
            function = functools.partial(output, name=name, others=inputs)
            fit = numeric.takes_complex(function, x, random)
            chosen = "complex step" if fit else "central difference"
        derive = numeric.complex_step if chosen == "complex step" else numeric.central_difference

        u = float(xp.finfo(x.dtype).eps)
        rounded = {
            other: like(value, to_numpy(value) * (1 + u * generator.choice((-1, 1), value.shape)))
            for other, value in inputs.items()
        }

        def measure(
            direction: Array,
            others: Mapping[str, Array],
            name: str = name,
            derive: Callable[..., Array] = derive,
        ) -> tuple[float, float]:
            function = functools.partial(output, name=name, others=others)
            terms = to_numpy(derive(function, others[name], direction)) * to_numpy(dy)
            return float(terms.sum()), float(np.abs(terms).sum())

        findings.append(
            compare(
                name,
                x,
                to_numpy(gradient).ravel(),
                functools.partial(measure, others=inputs),
                functools.partial(measure, others=rounded),
                math.prod(y.shape),
                chosen,
                generator,
            )
        )
    return Report(tuple(findings))


def smooth_point(
    function: Callable[[Array], Array], x: Array, generator: np.random.Generator
) -> Array:
    """x, or a point close to it, where ``function`` has a derivative as far as can be seen.

    At ReLU's 0 or a tie in a maximum there is none, so that a right backward pass may differ from
    any numeric derivative. There the slopes to both sides differ: by much more than the curvature
    of a smooth function makes them over so short a step. Then x is moved a little, at random.

    Raises:
        ValueError: the function has no derivative anywhere close, as far as can be seen.
    """
    xp = array_api_compat.array_namespace(x)
    u = float(xp.finfo(x.dtype).eps)
    step = 10 * u ** (1 / 3)  # wider than a central difference, which must not reach a kink
    shape = tuple(x.shape)
    for attempt in range(1, TRIES + 1):
        # Signs move every element as far as any, normal numbers move no two of them alike.
        directions = [generator.choice((-1.0, 1.0), shape)]
        directions += [generator.standard_normal(shape) for _ in range(4)]
        if not any(_bends(function, x, step * like(x, v), u) for v in directions):
            return x
        x = x + attempt * 1e-2 * like(x, directions[-1])
    raise ValueError("expected a function with a derivative; it has kinks wherever it was tried")


def _bends(function: Callable[[Array], Array], x: Array, move: Array, u: float) -> bool:
    here, right, left = (to_numpy(function(at)) for at in (x, x + move, x - move))
    bend = np.abs((right - here) - (here - left))
    slope = np.abs(right - here) + np.abs(here - left)
    curvature = 1e4 * u ** (2 / 3) * (1 + np.abs(here))
    return not np.all(bend <= 0.05 * slope + curvature)


TRIES = 20
Measure = Callable[[Array], tuple[float, float]]


def compare(
    name: str,
    x: Array,
    gradient: np.ndarray,
    measure: Measure,
    measure_rounded: Measure,
    count: int,
    method: str,
    generator: np.random.Generator,
) -> Finding:
    """The finding about one gradient.

    Args:
        name, x: the input.
        gradient: by the backward pass, flat.
        measure: along a direction, the numeric derivative and the sum of the absolute terms that
            it is made of.
        measure_rounded: the same with inputs that are rounded differently.
        count: how many terms there are.
        method: how the derivative was taken.
        generator: chooses the elements of large inputs.
    """
    xp = array_api_compat.array_namespace(x)
    u = float(xp.finfo(x.dtype).eps)
    indices = sample(gradient, generator)
    measured = np.array([measure(numeric.unit(x, i)) for i in indices])
    values, sizes = measured[:, 0], measured[:, 1]
    scale = float(max(np.abs(values).max(), sizes.max()))
    differences = np.abs(gradient[indices] - values)
    worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    error = float(differences[worst]) / scale if scale else float(differences[worst])
    if len(indices) < gradient.size:
        # The elements that were not drawn, all at once: their sum with random signs.
        signs = generator.choice((-1.0, 1.0), gradient.size)
        value, size = measure(like(x, signs.reshape(tuple(x.shape))))
        size = max(size, float(np.abs(gradient).sum()))
        if size:
            error = max(error, abs(float(gradient @ signs) - value) / size)

    # Inputs rounded differently: what that moves is the conditioning.
    some = range(0, len(indices), max(1, len(indices) // 4))
    moved = [measure_rounded(numeric.unit(x, indices[k]))[0] - values[k] for k in some]
    conditioning = float(np.abs(moved).max()) / scale if scale else 0.0
    bound = SAFETY * (math.sqrt(count) * u + conditioning)
    if method == "central difference":
        bound += SAFETY * u ** (2 / 3)
    return Finding(
        name=name,
        shape=tuple(x.shape),
        error=error,
        bound=bound,
        scale=scale,
        index=tuple(int(i) for i in np.unravel_index(indices[worst], tuple(x.shape))),
        analytic=float(gradient[indices[worst]]),
        numeric=float(values[worst]),
        largest=float(max(np.abs(values).max(), np.abs(gradient).max())),
        method=method,
    )


def sample(gradient: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Return the elements to check one by one: all, or the largest and some at random."""
    if gradient.size <= SAMPLE:
        return list(range(gradient.size))
    drawn = generator.choice(gradient.size, SAMPLE - 1, replace=False)
    largest = int(np.argmax(np.abs(gradient)))
    return [largest, *(int(i) for i in drawn if i != largest)]


def wrong_form(gradient: Any, shape: Sequence[int]) -> str:
    """Return what is wrong with a gradient's type, shape or dtype; empty if nothing is."""
    if gradient is None:
        return "expected an array, got None"
    if not array_api_compat.is_array_api_obj(gradient):
        return f"expected an array, got {type(gradient).__name__}"
    if tuple(gradient.shape) != tuple(shape):
        return f"expected the shape {tuple(shape)}, got {tuple(gradient.shape)}"
    if not np.all(np.isfinite(to_numpy(gradient))):
        return "has NaN or infinite elements"
    return ""


def like(array: Array, values: np.ndarray) -> Array:
    """Host values as an array of the library, dtype and device of ``array``."""
    xp = array_api_compat.array_namespace(array)
    dtype = xp.float32 if array.dtype in (xp.float32, xp.complex64) else xp.float64
    return xp.asarray(values, dtype=dtype, device=array_api_compat.device(array))
