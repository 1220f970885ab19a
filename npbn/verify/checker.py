r"""Check whether a backward pass computes the gradient of a forward pass.

For an output $y$ and an upstream gradient $dy$, the element $i$ of the gradient is

$$dx_i = \sum_j dy_j \frac{\partial y_j}{\partial x_i}$$

The right side is evaluated numerically by `npbn.verify.numeric`, with a random $dy$. A $dy$ of ones
is not used, because $\sum_j y_j$ of a normalized $y$ does not depend on $x$, and so many wrong
gradients would pass.

**The error** is measured relative to the size of the terms of the sum,

$$\frac{\max_i |\text{analytic}_i - \text{numeric}_i|}
  {\max(\max_i |\text{numeric}_i|, \max_i \sum_j |dy_j \partial y_j / \partial x_i|)}$$

because the terms may cancel. For example, the bias of a layer that feeds batch norm has the
gradient 0, and the computed value of this gradient is only the rounding error of the terms.

**The bound** comes from the arithmetic. It is the sum of three parts:

1. 64 times the sum of two errors. A sum of $n$ rounded terms has an error of about $\sqrt{n} u$
   relative to the size of the terms, with $u$ the unit of rounding. The rounding of the inputs, by
   $u$ relative to each input, changes the gradient: the change is large if the operation is badly
   conditioned. The checker measures this change with inputs that are rounded differently.
2. 4 times the change of the gradient when the arrays in the cache are rounded differently. It is
   large if the backward pass subtracts numbers that are almost equal. For example, the sigmoid's
   $y (1 - y)$ at $x = 30$ has only three correct digits, because $y$ is rounded.
3. 4 times the error of the numeric derivative, if it is a central difference.

If the bound is above `COARSE`, a mistake of that size would not be seen. So the checker then says
that it cannot tell, unless the error is even larger. Code for float32 or float16 is compared with
derivatives in float64, if the forward pass can compute in float64.
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
COARSE = 0.02
"""The largest bound with which a gradient can be called right."""
SAMPLE = 24
"""The number of elements of a gradient that are checked one by one. If a gradient has more
elements, one further check covers all its elements together."""


@dataclass(frozen=True)
class Finding:
    """The result of the check of one gradient.

    Attributes:
        name: the name of the input or the parameter.
        shape: the shape of the input or the parameter.
        error, bound: the error of the gradient and the bound of the error, both relative to
            ``scale``. The module's docstring defines error and bound.
        scale: the size that the error is divided by.
        index: the index of the element with the largest error.
        analytic, numeric: the value of this element by the backward pass, and the numeric value.
        largest: the largest absolute value of any element, by the backward pass or numerically.
        rounding: the size, relative to ``scale``, below which a gradient is only rounding error of
            the cache.
        method: "complex step" or "central difference".
        problem: the reason why the gradient cannot be compared, as a sentence. The sentence is
            empty if the gradient was compared.
    """

    name: str
    shape: tuple[int, ...]
    error: float = math.nan
    bound: float = math.nan
    scale: float = math.nan
    rounding: float = 0.0
    index: tuple[int, ...] = ()
    analytic: float = math.nan
    numeric: float = math.nan
    largest: float = math.nan
    method: str = ""
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Return whether the gradient is right."""
        return not self.problem and self.error <= self.bound and not self.unclear

    @property
    def unclear(self) -> bool:
        """Return whether a wrong gradient could not be told from a right one.

        A gradient that is only rounding error is right nevertheless: no code could compute more.
        """
        return self.error <= self.bound and self.bound > COARSE and self.rounding < 1

    @property
    def cancels(self) -> bool:
        """Return whether the gradient is right, and 0 because its terms cancel.

        An example is the gradient of a bias before batch norm.
        """
        return self.ok and self.scale > 0 and self.largest <= self.bound * self.scale

    @property
    def verdict(self) -> str:
        """Return the result as text for a cell of a table.

        The text says that the gradient is right, or that the gradient is right and why the gradient
        is 0, or what is wrong.
        """
        if self.cancels:
            return "right: 0, its terms cancel"
        return "right" if self.ok else str(self)

    def __str__(self) -> str:
        if self.problem:
            return f"d{self.name}: {self.problem}"
        if self.cancels:
            return f"d{self.name}: right, and 0: its terms cancel (error {self.error:.1e})"
        if self.unclear:
            return (
                f"d{self.name}: can't tell: rounding hides mistakes of up to {self.bound:.0%}; try "
                "float64 inputs, or inputs of another size"
            )
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
    """The results of the checks of all gradients of an operation or of a model.

    Attributes:
        findings: a finding for each gradient.
        notes: further remarks, as sentences.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether all gradients are right."""
        return all(finding.ok for finding in self.findings)

    @property
    def worst(self) -> float:
        """Return the largest relative error of all gradients."""
        return max((finding.error for finding in self.findings), default=0.0)

    def __str__(self) -> str:
        return "\n".join([*(str(finding) for finding in self.findings), *self.notes])


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
        forward: the forward pass. The checker calls it with the inputs and the constants as keyword
            arguments. The forward pass returns y or (y, cache, ...).
        backward: the backward pass. The checker calls it with (dy, cache); cache is None if the
            forward pass returns only y. The backward pass returns the gradients with respect to the
            inputs, in the order of the inputs: one array, or a tuple or a list of arrays. The tuple
            may contain None in place of a gradient that does not exist.
        inputs: the floating-point arrays with respect to which the gradients are checked, by name.
            The arrays may be from any library. A proof needs float64 arrays. Both functions get
            copies, so they may change what they are given.
        constants: further arguments of the forward pass, by name.
        generator: draws the upstream gradient and, for large inputs, the elements to check.
        method: "complex step", "central difference" or "auto". With "auto", the complex step is
            used if the forward pass turns out to be fit for the complex step, and otherwise the
            central difference.

    Returns:
        A report, which can be printed.

    Raises:
        ValueError: the method is unknown; there are no inputs, or an input is empty; the output has
            NaN, or is another for the same inputs; or no point was found where the forward pass has
            a derivative.
        TypeError: an input or the output is not a floating-point array.
        Exception: forward or backward raises this error.
    """
    if method not in ("auto", "complex step", "central difference"):
        raise ValueError(
            f"expected method auto, complex step or central difference, got {method!r}"
        )
    if not inputs:
        raise ValueError("expected at least one input to take a gradient by")
    for name, x in inputs.items():
        check_array(f"the input {name}", x)
        if math.prod(x.shape) == 0:
            raise ValueError(f"expected the input {name} to have elements, got shape {x.shape}")
    generator = np.random.default_rng(0) if generator is None else generator
    constants = {} if constants is None else constants
    xp = array_api_compat.array_namespace(*inputs.values())

    def run(values: Mapping[str, Array], constants: Mapping[str, Any]) -> tuple[Array, Any]:
        result = forward(
            **{name: xp.asarray(x, copy=True) for name, x in values.items()}, **constants
        )
        return (result[0], result[1]) if isinstance(result, tuple) else (result, None)

    # Numeric derivatives are computed in float64, if the forward pass can do that.
    exact_constants = {name: promoted(value) for name, value in constants.items()}
    exact = {name: promoted(x) for name, x in inputs.items()}
    try:
        y, _ = run(exact, exact_constants)
        fit = array_api_compat.is_array_api_obj(y) and y.dtype == xp.float64
    except Exception:  # Code that is written for one dtype may raise any error.
        fit = False
    if not fit:
        exact, exact_constants = dict(inputs), dict(constants)

    def output(value: Array, name: str, others: Mapping[str, Array]) -> Array:
        """Return y as a function of one input."""
        return run({**others, name: value}, exact_constants)[0]

    y, _ = run(inputs, constants)
    check_array("the output y", y)
    if not np.all(np.isfinite(to_numpy(y))):
        raise ValueError("expected a finite output; the forward pass gave NaN or infinity")
    if not np.array_equal(to_numpy(y), to_numpy(run(inputs, constants)[0])):
        raise ValueError(
            "expected the same output for the same inputs; the forward pass is random, or it "
            "changes something that it uses again"
        )
    for name, x in exact.items():
        function = functools.partial(output, name=name, others=exact)
        moved = smooth_point(function, x, generator)
        inputs = {**inputs, name: xp.astype(moved, inputs[name].dtype)}
        exact[name] = xp.astype(inputs[name], x.dtype)

    y, cache = run(inputs, constants)
    dy = like(y, generator.standard_normal(tuple(y.shape)))
    given = xp.asarray(dy, copy=True)
    gradients = in_a_tuple(backward(given, cache), len(inputs))
    notes = []
    if not np.array_equal(to_numpy(given), to_numpy(dy)):
        notes.append("note: the backward pass changes dy, which belongs to its caller")
    if len(gradients) != len(inputs):
        problem = f"expected {len(inputs)} gradients ({', '.join(inputs)}), got {len(gradients)}"
        return Report(tuple(Finding(n, tuple(x.shape), problem=problem) for n, x in inputs.items()))
    u = float(xp.finfo(xp.asarray(dy).dtype).eps)
    u = max(u, *(float(xp.finfo(x.dtype).eps) for x in inputs.values()))
    _, cache = run(inputs, constants)
    try:
        again = backward(xp.asarray(dy, copy=True), rounded_differently(cache, u, generator))
        others = in_a_tuple(again, len(inputs))
    except Exception:  # A cache may hold numbers that must not change.
        others = gradients

    findings = []
    for (name, x), gradient, other in zip(exact.items(), gradients, others, strict=True):
        shape = tuple(x.shape)
        problem = wrong_form(gradient, shape)
        if problem:
            findings.append(Finding(name, shape, problem=problem))
            continue

        random = like(x, generator.choice((-1.0, 1.0), shape))
        chosen = method
        if method == "auto":
            function = functools.partial(output, name=name, others=exact)
            fit = numeric.takes_complex(function, x, random)
            chosen = "complex step" if fit else "central difference"

        rounded = {
            key: like(value, to_numpy(value) * (1 + u * generator.choice((-1, 1), value.shape)))
            for key, value in exact.items()
        }

        def measure(
            direction: Array,
            others: Mapping[str, Array],
            name: str = name,
            chosen: str = chosen,
        ) -> tuple[float, float, float]:
            function = functools.partial(output, name=name, others=others)
            if chosen == "complex step":
                values = to_numpy(numeric.complex_step(function, others[name], direction))
                errors = np.zeros(())
            else:
                values, errors = numeric.extrapolated_difference(function, others[name], direction)
            terms = values * to_numpy(dy)
            error = np.abs(errors * to_numpy(dy)).sum()
            return float(terms.sum()), float(np.abs(terms).sum()), float(error)

        change = 0.0
        if not wrong_form(other, shape):
            change = float(np.abs(to_numpy(other) - to_numpy(gradient)).max())
        findings.append(
            compare(
                name,
                x,
                to_numpy(gradient).ravel(),
                functools.partial(measure, others=exact),
                functools.partial(measure, others=rounded),
                count=math.prod(y.shape),
                u=u,
                change=change,
                method=chosen,
                generator=generator,
            )
        )
    return Report(tuple(findings), tuple(notes))


def in_a_tuple(gradients: Any, count: int) -> tuple[Any, ...]:
    """Return what a backward pass returned as a tuple."""
    if not isinstance(gradients, tuple | list):
        return (gradients,)
    if len(gradients) != count:  # dbias is None if no bias is among the inputs.
        return tuple(gradient for gradient in gradients if gradient is not None)
    return tuple(gradients)


def check_array(name: str, value: Any) -> None:
    """Raise TypeError if a value is not a floating-point array."""
    if not array_api_compat.is_array_api_obj(value):
        raise TypeError(f"expected {name} as a floating-point array, got {type(value).__name__}")
    xp = array_api_compat.array_namespace(value)
    if not xp.isdtype(value.dtype, "real floating"):
        raise TypeError(f"expected {name} as a floating-point array, got {value.dtype}")


def promoted(value: Any) -> Any:
    """Return a floating-point array as float64. Everything else is returned as it is."""
    if not array_api_compat.is_array_api_obj(value):
        return value
    xp = array_api_compat.array_namespace(value)
    return xp.astype(value, xp.float64) if xp.isdtype(value.dtype, "real floating") else value


def rounded_differently(cache: Any, u: float, generator: np.random.Generator) -> Any:
    """Return a cache whose numbers are changed by u relative to each number, up or down."""
    if array_api_compat.is_array_api_obj(cache):
        xp = array_api_compat.array_namespace(cache)
        if not xp.isdtype(cache.dtype, "real floating"):
            return cache
        signs = generator.choice((-1, 1), tuple(cache.shape))
        return like(cache, to_numpy(cache).astype(np.float64) * (1 + u * signs))
    if isinstance(cache, dict):
        return {key: rounded_differently(value, u, generator) for key, value in cache.items()}
    if isinstance(cache, tuple | list):
        values = [rounded_differently(value, u, generator) for value in cache]
        return type(cache)(*values) if hasattr(cache, "_fields") else type(cache)(values)
    return cache


def smooth_point(
    function: Callable[[Array], Array], x: Array, generator: np.random.Generator
) -> Array:
    """Return x, or a point close to x, where ``function`` appears to have a derivative.

    A function has no derivative at the 0 of ReLU or at a tie in a maximum, and there a right
    backward pass may differ from any numeric derivative. At such a kink, the slopes on both sides
    of the point differ by much more than the curvature of a smooth function can explain over a
    short step. If such a difference is found, x is moved a little at random.

    Raises:
        ValueError: no point with a derivative was found close to x.
    """
    xp = array_api_compat.array_namespace(x)
    u = float(xp.finfo(x.dtype).eps)
    # The step is larger than the step of a central difference, which must not reach a kink.
    step = 10 * u ** (1 / 3)
    shape = tuple(x.shape)
    for attempt in range(1, TRIES + 1):
        # Random signs move all elements equally far; normal numbers move each element differently.
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
Measure = Callable[[Array], tuple[float, float, float]]


def compare(
    name: str,
    x: Array,
    gradient: np.ndarray,
    measure: Measure,
    measure_rounded: Measure,
    *,
    count: int,
    u: float,
    change: float,
    method: str,
    generator: np.random.Generator,
) -> Finding:
    """Compare one gradient with the numeric derivative, and return the finding.

    Args:
        name, x: the name and the value of the input.
        gradient: the gradient by the backward pass, as a flat array.
        measure: a function of a direction. The function returns the numeric derivative along the
            direction, the sum of the absolute values of its terms, and an estimate of its error.
        measure_rounded: the function ``measure`` for inputs that are rounded differently.
        count: the number of terms.
        u: the unit of rounding of the backward pass.
        change: the change of the gradient when the cache is rounded differently.
        method: the method of the numeric derivative, "complex step" or "central difference".
        generator: chooses the elements of a large input to check.
    """
    indices = sample(gradient, generator)
    measured = np.array([measure(numeric.unit(x, i)) for i in indices])
    values, sizes, uncertain = measured.T
    scale = float(max(np.abs(values).max(), sizes.max()))
    differences = np.abs(gradient[indices] - values)
    worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    error = float(differences[worst]) / scale if scale else float(differences[worst])
    if len(indices) < gradient.size:
        # Only some elements were checked one by one. Also check all elements together, by the sum
        # of all elements with random signs.
        signs = generator.choice((-1.0, 1.0), gradient.size)
        value, size, _ = measure(like(x, signs.reshape(tuple(x.shape))))
        size = max(size, float(np.abs(gradient).sum()))
        if size:
            error = max(error, abs(float(gradient @ signs) - value) / size)

    # The conditioning is the change of the derivative when the inputs are rounded differently.
    some = range(0, len(indices), max(1, len(indices) // 4))
    moved = [measure_rounded(numeric.unit(x, indices[k]))[0] - values[k] for k in some]
    conditioning = float(np.abs(moved).max()) / scale if scale else 0.0
    bound = SAFETY * (math.sqrt(count) * u + conditioning)
    rounding = 4 * change / scale if scale else 0.0
    bound += rounding + (4 * float(uncertain.max()) / scale if scale else 0.0)
    return Finding(
        name=name,
        shape=tuple(x.shape),
        error=error,
        bound=bound,
        scale=scale,
        rounding=rounding,
        index=tuple(int(i) for i in np.unravel_index(indices[worst], tuple(x.shape))),
        analytic=float(gradient[indices[worst]]),
        numeric=float(values[worst]),
        largest=float(max(np.abs(values).max(), np.abs(gradient).max())),
        method=method,
    )


def sample(gradient: np.ndarray, generator: np.random.Generator) -> list[int]:
    """Return the indices of the elements to check one by one.

    The result has the indices of all elements if the gradient is small. Otherwise the result has
    the index of the element with the largest absolute value, and random indices.
    """
    if gradient.size <= SAMPLE:
        return list(range(gradient.size))
    drawn = generator.choice(gradient.size, SAMPLE - 1, replace=False)
    largest = int(np.argmax(np.abs(gradient)))
    return [largest, *(int(i) for i in drawn if i != largest)]


def wrong_form(gradient: Any, shape: Sequence[int]) -> str:
    """Return what is wrong with a gradient's type, shape or values; "" if nothing is wrong."""
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
    """Return host values as an array of the library, precision and device of ``array``.

    The result is real, even if ``array`` is complex.
    """
    xp = array_api_compat.array_namespace(array)
    dtype = array.dtype
    if xp.isdtype(dtype, "complex floating"):
        dtype = xp.float32 if dtype == xp.complex64 else xp.float64
    return xp.asarray(values, dtype=dtype, device=array_api_compat.device(array))
