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

**The bound** comes from the arithmetic. It is the sum of four errors.

- A sum of $n$ rounded terms has an error of about $\sqrt{n} u$ relative to the size of the terms.
  Here, $u$ is the machine epsilon.
- The inputs are rounded, with a relative error of $u$. This changes the numeric derivative, and the
  change is large if the operation is badly conditioned. For the complex step, the checker measures
  this change with inputs that are rounded differently.
- A central difference has a truncation error and a rounding error. Its method estimates both; see
  `npbn.verify.numeric`.
- Rounding errors inside the backward pass change its gradient. For example, digits of $1 - y$
  cancel where $y$ is close to 1. The checker measures this error with stochastic arithmetic, for
  each element of the gradient; see `npbn.verify.rounding`. The measurement needs NumPy arrays. For
  other arrays, this error counts as 0, so a right gradient may be called wrong where digits cancel.

**Can't tell.** If the bound is so large that it may hide a mistake of some percent, a gradient
within the bound gets the verdict "can't tell". In float64, the last of the four errors is ignored
for this decision. There, it is this large only where the gradient is about $10^{-13}$ of the terms
that it is computed from, which is 0 for all practical purposes.
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
from npbn.functional.arrays import Array, common_library
from npbn.verify import numeric
from npbn.verify.numeric import like
from npbn.verify.rounding import coarse

SAFETY = 64
"""The factor of the first two errors in the bound. Their size is known only roughly."""

SAFETY_OF_DIFFERENCE = 1
"""The factor of the estimated error of a central difference. In experiments with float64 and
float32, the true error was never more than 0.5 of the estimate."""

SAFETY_OF_ROUNDING = 8
"""The factor of the error by stochastic arithmetic.

This error is the largest of a few random samples, so the true error may be a few times larger.
"""

HIDDEN = 0.02
"""The largest relative mistake that may stay hidden if a gradient is called right."""

VANISHING = 1e-8
"""The checker computes how large a hidden mistake may be relative to a gradient element. There, the
element counts as at least VANISHING · Σ|dy · y| / |x|. A smaller element has nearly no effect: if x
changes by its own size, the terms dy · y change by less than the fraction VANISHING."""

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
        largest: the largest absolute value of any element, analytic or numeric.
        method: "complex step" or "central difference".
        hidden: the largest mistake that the bound may hide, relative to the gradient.
        problem: the reason why the gradient cannot be compared, as a sentence. The sentence is
            empty if the gradient was compared.
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
    hidden: float = 0.0
    problem: str = ""

    @property
    def within(self) -> bool:
        """Return whether the error of the gradient is within the bound."""
        return not self.problem and self.error <= self.bound

    @property
    def ok(self) -> bool:
        """Return whether the gradient is right.

        If the bound may hide a relative mistake of more than `HIDDEN`, the gradient is not called
        right.
        """
        return self.within and self.hidden <= HIDDEN

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
        is 0, or what is wrong, or that the checker cannot tell.
        """
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
        if self.within:
            return (
                f"d{self.name}: can't tell: rounding may hide a mistake of {self.hidden:.2g} times "
                f"the gradient (error {self.error:.1e}, by {self.method}); use float64, or inputs "
                "for which the function is better conditioned"
            )
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
        findings: the results, one for each gradient.
        notes: what else the reader should know, as sentences.
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
        return "\n".join([*map(str, self.findings), *(f"Note: {note}" for note in self.notes)])


def check_gradients(
    forward: Callable[..., Any],
    backward: Callable[[Array, Any], Any],
    inputs: Mapping[str, Array],
    *,
    constants: Mapping[str, Any] | None = None,
    generator: np.random.Generator | None = None,
    method: str = "auto",
    precision: float = 0.0,
) -> Report:
    """Compare the gradients of a backward pass with numeric derivatives of the forward pass.

    Args:
        forward: the forward pass. The checker calls it with the inputs and the constants as keyword
            arguments. The forward pass returns y or (y, cache, ...).
        backward: the backward pass. The checker calls it with (dy, cache); cache is None if the
            forward pass returns only y. The backward pass returns the gradients with respect to the
            inputs, in the order of the inputs: one array, or a tuple or list of arrays. It may
            contain None in place of a gradient that does not exist.
        inputs: the arrays with respect to which the gradients are checked, by name. The arrays may
            be from any library. A proof needs float64 arrays.
        constants: further arguments of the forward pass, by name.
        generator: draws the upstream gradient and, for large inputs, the elements to check.
        method: "complex step", "central difference" or "auto". With "auto", the complex step is
            used if the forward pass turns out to be fit for the complex step, and otherwise the
            central difference.
        precision: the machine epsilon of the code, if the code is less precise than the dtypes of
            the arrays. An example is 2⁻⁷ for code that takes float32 and computes in bfloat16.

    Returns:
        A report, which can be printed. The code gets copies of all arrays, so the arrays of the
        caller stay as they are. The report notes if the code changes its arguments in place.

    Raises:
        ValueError: the method is unknown, there are no inputs, an array is empty or has NaN or
            infinite elements, the code is random, or no point was found where the forward pass has
            a derivative.
        TypeError: an input or y is not an array of floating-point numbers.
        Exception: forward or backward raises this error.
    """
    if method not in ("auto", "complex step", "central difference"):
        raise ValueError(
            f"expected method auto, complex step or central difference, got {method!r}"
        )
    check_inputs(inputs)
    generator = np.random.default_rng(0) if generator is None else generator
    code = Code(forward, backward, {} if constants is None else constants, tuple(inputs), precision)
    code.check_forward(inputs)
    inputs = {
        name: smooth_point(
            functools.partial(code.output, name=name, others=inputs), x, generator, precision
        )
        for name, x in inputs.items()
    }
    y, _ = code.run(inputs)
    dy = like(y, generator.standard_normal(tuple(y.shape)))
    notes = code.changes(inputs, dy)
    gradients = code.gradients(inputs, dy)
    if len(gradients) != len(inputs):
        problem = f"expected {len(inputs)} gradients ({', '.join(inputs)}), got {len(gradients)}"
        findings = [Finding(n, tuple(x.shape), problem=problem) for n, x in inputs.items()]
        return Report(tuple(findings), notes)

    rounded = {
        name: x * like(x, 1 + max(unit_of_rounding(x), precision) * random_signs(x, generator))
        for name, x in inputs.items()
    }
    problems = [
        wrong_form(gradient, x.shape)
        for gradient, x in zip(gradients, inputs.values(), strict=True)
    ]
    if not any(problems) and not all(
        agree(gradient, again, precision)
        for gradient, again in zip(gradients, code.gradients(inputs, dy), strict=True)
    ):
        raise ValueError(
            "expected a backward pass that returns the same gradients for the same arguments, got "
            "other gradients at the second call: it is random, or keeps something"
        )

    def results(arguments: Mapping[str, Array]) -> list[Any]:
        """Return y, and the gradients if they can be compared."""
        values = dict(arguments)
        dy = values.pop(DY)
        return [code.run(values)[0], *([] if any(problems) else code.gradients(values, dy))]

    arguments = {**inputs, DY: dy}
    expected = [y, *([] if any(problems) else gradients)]
    noise, *moved = moved_by_rounding(results, arguments, expected, generator, precision)

    findings = []
    for k, (name, x) in enumerate(inputs.items()):
        if problems[k]:
            findings.append(Finding(name, tuple(x.shape), problem=problems[k]))
            continue
        chosen = method
        if method == "auto":
            signs = random_signs(x, generator)
            function = functools.partial(code.output, name=name, others=inputs)
            fit = numeric.takes_complex(function, x, like(x, signs * numeric.scales(x)), noise)
            chosen = "complex step" if fit else "central difference"

        def measure(
            direction: Array,
            others: Mapping[str, Array],
            name: str = name,
            chosen: str = chosen,
        ) -> Measured:
            function = functools.partial(code.output, name=name, others=others)
            weights = to_numpy(dy).astype(np.float64)
            if chosen == "complex step":
                slopes = to_numpy(numeric.complex_step(function, others[name], direction))
                error = 0.0
            else:
                slopes, errors = numeric.extrapolated(
                    function, others[name], direction, noise, precision
                )
                error = float(np.sum(errors * np.abs(weights)))
            terms = slopes * weights
            return float(terms.sum()), float(np.abs(terms).sum()), error

        findings.append(
            compare(
                name,
                x,
                gradients[k],
                functools.partial(measure, others=inputs),
                functools.partial(measure, others=rounded),
                outputs=y,
                size=float(np.sum(np.abs(to_numpy(y * dy)))),
                moved=moved[k] if moved else np.zeros(x.shape),
                method=chosen,
                generator=generator,
                precision=precision,
            )
        )
    return Report(tuple(findings), notes)


def random_signs(x: Array, generator: np.random.Generator) -> np.ndarray:
    """Return random numbers, each 1 or -1, in the shape of an array."""
    return generator.choice((-1.0, 1.0), tuple(x.shape))


def check_inputs(inputs: Mapping[str, Array]) -> None:
    """Raise an error if the gradient of an input cannot be checked. The error names the input."""
    if not inputs:
        raise ValueError("expected at least one input to take a gradient by")
    xp = common_library(**inputs)
    for name, x in inputs.items():
        if not xp.isdtype(x.dtype, "real floating"):
            raise TypeError(f"expected {name} of a floating-point dtype (float64), got {x.dtype}")
        if math.prod(x.shape) == 0:
            raise ValueError(f"expected {name} with elements, got the shape {tuple(x.shape)}")
        if not np.all(np.isfinite(to_numpy(x))):
            raise ValueError(f"expected {name} without NaN and infinite elements")


@dataclass(frozen=True)
class Code:
    """A forward and a backward pass to check. They get copies of the caller's arrays.

    Attributes:
        forward, backward, constants: the arguments of `check_gradients`.
        names: the names of the inputs.
        precision: the machine epsilon of the code, if the code is less precise than the dtypes of
            the arrays, or 0.
    """

    forward: Callable[..., Any]
    backward: Callable[[Array, Any], Any]
    constants: Mapping[str, Any]
    names: tuple[str, ...]
    precision: float

    def run(self, inputs: Mapping[str, Array]) -> tuple[Array, Any]:
        """Call the forward pass; return y, and the cache or None."""
        result = self.forward(**{k: copied(v) for k, v in {**inputs, **self.constants}.items()})
        if isinstance(result, (tuple, list)) and result:
            y, cache = result[0], result[1] if len(result) > 1 else None
        else:
            y, cache = result, None
        if not array_api_compat.is_array_api_obj(y):
            raise TypeError(
                "expected the forward pass to return an array y, or (y, cache) with one array y, "
                f"got {type(y).__name__} for y"
            )
        return y, cache

    def output(self, value: Array, name: str, others: Mapping[str, Array]) -> Array:
        """Return y for a value of the input ``name`` and the given values of all other inputs."""
        return self.run({**others, name: value})[0]

    def gradients(self, inputs: Mapping[str, Array], dy: Array) -> tuple[Any, ...]:
        """Return the gradients of the backward pass, in the order of the inputs."""
        gradients = self.backward(copied(dy), self.run(inputs)[1])
        if isinstance(gradients, list) and any(map(array_api_compat.is_array_api_obj, gradients)):
            gradients = tuple(gradients)
        listed: tuple[Any, ...] = gradients if isinstance(gradients, tuple) else (gradients,)
        if len(listed) != len(self.names):
            # Drop each None, such as the dbias of a layer without a bias.
            listed = tuple(g for g in listed if g is not None)
        return listed

    def check_forward(self, inputs: Mapping[str, Array]) -> None:
        """Raise an error if y has no gradient: y is random, empty, not real or not finite."""
        y, again = self.run(inputs)[0], self.run(inputs)[0]
        xp = array_api_compat.array_namespace(y)
        if not xp.isdtype(y.dtype, "real floating"):
            raise TypeError(f"expected y of a floating-point dtype, got {y.dtype}")
        if math.prod(y.shape) == 0:
            raise ValueError(f"expected y with elements, got the shape {tuple(y.shape)}")
        if not np.all(np.isfinite(to_numpy(y))):
            raise ValueError("expected finite outputs, got NaN or infinite elements in y")
        if not agree(y, again, self.precision):
            raise ValueError(
                "expected a forward pass that returns the same y for the same inputs, got another "
                "y at the second call: it is random (like dropout), or keeps something; draw the "
                "random numbers before, and pass them as a constant"
            )

    def changes(self, inputs: Mapping[str, Array], dy: Array) -> tuple[str, ...]:
        """Return notes that say which arguments the code changes in place."""
        given = {k: copied(v) for k, v in {**inputs, **self.constants}.items()}
        result = self.forward(**given)
        cache = result[1] if isinstance(result, (tuple, list)) and len(result) > 1 else None
        notes = [
            f"the forward pass changes {name} in place, so its caller loses {name}"
            for name, value in {**inputs, **self.constants}.items()
            if array_api_compat.is_array_api_obj(value) and not same(value, given[name])
        ]
        given_dy = copied(dy)
        self.backward(given_dy, cache)
        if not same(dy, given_dy):
            notes.append("the backward pass changes dy in place, so its caller loses dy")
        return tuple(notes)


def copied(value: Any) -> Any:
    """Return a copy of an array. Other values are returned as they are."""
    if not array_api_compat.is_array_api_obj(value):
        return value
    if isinstance(value, np.ndarray):
        return value.copy()  # Unlike asarray, copy keeps a subclass of np.ndarray.
    return array_api_compat.array_namespace(value).asarray(value, copy=True)


def same(first: Array, second: Array) -> bool:
    """Return whether two arrays are equal. Here, NaN equals NaN."""
    a, b = to_numpy(first), to_numpy(second)
    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


def agree(first: Array, second: Array, precision: float = 0.0) -> bool:
    """Return whether two results of the same code agree to half of their digits.

    Two calls may add the terms of a sum in different orders, so the results may differ by rounding.
    """
    if tuple(first.shape) != tuple(second.shape):
        return False
    a, b = to_numpy(first).astype(np.float64), to_numpy(second).astype(np.float64)
    root = math.sqrt(max(unit_of_rounding(first), precision))
    return bool(np.max(np.abs(a - b)) <= root * np.max(np.abs(a)))


def unit_of_rounding(*arrays: Array) -> float:
    """Return the largest machine epsilon of the arrays' dtypes and float64.

    Arrays of integers do not count.
    """
    dtypes = [to_numpy(array).dtype for array in arrays]
    return max(float(np.finfo(d).eps) for d in (*dtypes, np.dtype(np.float64)) if d.kind in "fc")


def moved_by_rounding(
    results: Callable[[Mapping[str, Array]], Sequence[Array]],
    arguments: Mapping[str, Array],
    expected: Sequence[Array],
    generator: np.random.Generator,
    precision: float = 0.0,
) -> list[np.ndarray]:
    """Estimate how much rounding errors inside a function change each element of its results.

    Args:
        results: a function that maps arrays by name to a sequence of arrays.
        arguments: the arrays by name. If an array is not from NumPy, the rounding is not measured,
            and all estimates are 0.
        expected: the arrays that the function returns for these arguments.
        generator: draws the random rounding errors.
        precision: the machine epsilon of the code, if the code is less precise than the dtypes of
            the arrays, or 0.

    Returns:
        An array of estimates for each result, in the shape of the result.
    """
    exact = [to_numpy(result).astype(np.float64) for result in expected]
    moved = [np.zeros(result.shape) for result in exact]
    if not all(map(array_api_compat.is_numpy_array, arguments.values())):
        return moved
    for _ in range(ROUNDINGS):
        try:
            with np.errstate(all="ignore"):
                found = results({name: coarse(x, generator) for name, x in arguments.items()})
        except Exception:  # The code may not accept a CoarseArray.
            continue
        for k, result in enumerate(found):
            root = math.sqrt(max(unit_of_rounding(expected[k]), precision))
            change = np.abs(np.asarray(to_numpy(result)) - exact[k]) * root
            moved[k] = np.fmax(moved[k], np.where(np.isfinite(change), change, 0))
    return moved


DY = "upstream gradient dy"
"""The name of dy among the inputs. It is no identifier, so no input has the same name."""

ROUNDINGS = 4
"""The number of runs with stochastic arithmetic."""


def smooth_point(
    function: Callable[[Array], Array],
    x: Array,
    generator: np.random.Generator,
    precision: float = 0.0,
) -> Array:
    """Return x, or a point close to x, where ``function`` appears to have a derivative.

    ReLU has no derivative at 0, and a maximum has none where its two largest elements are equal. At
    such a kink, the slopes on both sides differ, so a right backward pass may differ from a numeric
    derivative. If a kink is found at x, random points close to x are tried.

    Raises:
        ValueError: no point with a derivative was found close to x.
    """
    u = max(unit_of_rounding(x), precision)
    shape = tuple(x.shape)
    sizes = np.maximum(np.abs(to_numpy(x)).astype(np.float64), numeric.scales(x).min() / 32)
    for attempt in range(1, TRIES + 1):
        # With random signs, all elements move equally far for their size. With normal random
        # numbers, the distances differ.
        directions = [generator.choice((-1.0, 1.0), shape)]
        directions += [generator.standard_normal(shape) for _ in range(4)]
        y = to_numpy(function(x)).astype(np.float64)
        if not any(_bends(function, x, y, math.sqrt(u) * sizes * v, u) for v in directions):
            return x
        x = x + like(x, attempt * 1e-2 * sizes * directions[-1])
    raise ValueError("expected a function with a derivative; it has kinks wherever it was tried")


def _bends(
    function: Callable[[Array], Array], x: Array, y: np.ndarray, move: np.ndarray, u: float
) -> bool:
    """Return whether a function f with f(x) = y has a kink at x in the direction of a short move.

    Let the bend be |(f(x + move) - y) - (y - f(x - move))|. At a kink, the bend is proportional to
    the move. In a smooth function, the bend is proportional to the square of the move. So if the
    move is 4 times shorter, the bend is 4 times smaller at a kink, and 16 times smaller in a smooth
    function. The limit of 8 is between these two factors. A bend is no kink if it is less than 5 %
    of the changes of y, or as small as rounding errors.
    """
    bends, changes = [], []
    for part in (1, 1 / 4):
        right, left = (
            to_numpy(function(x + like(x, step * move))).astype(np.float64)
            for step in (part, -part)
        )
        bends.append(np.abs((right - y) - (y - left)))
        changes.append(np.abs(right - y) + np.abs(y - left))
    rounding = 100 * u * (1 + np.abs(y)) + 10 * math.sqrt(u) * np.max(changes[1])
    return not np.all(bends[1] <= np.maximum(bends[0] / 8, 0.05 * changes[1]) + rounding)


TRIES = 20
Measured = tuple[float, float, float]
Measure = Callable[[Array], Measured]


def compare(
    name: str,
    x: Array,
    gradient: Array,
    measure: Measure,
    measure_rounded: Measure,
    *,
    outputs: Array,
    size: float,
    moved: np.ndarray,
    method: str,
    generator: np.random.Generator,
    precision: float = 0.0,
) -> Finding:
    """Compare the gradient with respect to one input with numeric derivatives.

    Args:
        name, x: the name and the value of the input.
        gradient: the gradient by the backward pass.
        measure: a function of a direction v, an array of x's shape. The function returns the
            numeric derivative Σ_j dy_j · ∂y_j/∂v, the sum of the absolute values of these terms,
            and the estimated error of the derivative.
        measure_rounded: the function ``measure`` for inputs that are rounded differently.
        outputs: the outputs y.
        size: the sum of the absolute values of dy · y.
        moved: the estimate by `moved_by_rounding` for each element of the gradient.
        method: the method of the numeric derivative, "complex step" or "central difference".
        generator: chooses the elements of a large input to check.
        precision: the machine epsilon of the code, if the code is less precise than the dtypes of
            the arrays, or 0.
    """
    u = max(unit_of_rounding(x, outputs, gradient), precision)
    gradient = to_numpy(gradient).ravel().astype(np.float64)
    lengths, moved = numeric.scales(x).ravel(), moved.ravel()
    indices = sample(gradient, generator)
    values, sizes, errors = np.array([measure(numeric.unit(x, i)) for i in indices]).T
    sizes = np.maximum(sizes, np.abs(values))
    scale = float(sizes.max()) or 1.0

    # The conditioning is the change of the derivative when the inputs are rounded differently. The
    # estimated error of a central difference includes this change already.
    conditioning = 0.0
    if method == "complex step":
        some = range(0, len(indices), max(1, len(indices) // 4))
        changes = [measure_rounded(numeric.unit(x, indices[k]))[0] - values[k] for k in some]
        conditioning = float(np.abs(changes).max()) / scale
    common = SAFETY * (math.sqrt(math.prod(outputs.shape)) * u + conditioning)

    difference = SAFETY_OF_DIFFERENCE * errors
    rounding = SAFETY_OF_ROUNDING * moved[indices]
    bounds = common * scale + difference + rounding
    differences = np.abs(gradient[indices] - values)
    worst = int(np.argmax(differences / bounds))
    error, bound = differences[worst] / scale, bounds[worst] / scale

    # Estimate the largest mistake that the bound may hide, relative to the gradient. All elements
    # share the common error. An element counts separately if its own errors are larger than that.
    unsure = difference + rounding * (u > np.finfo(np.float64).eps)
    relevant = np.maximum(sizes, VANISHING * size / lengths[indices])
    alone = unsure > common * scale
    hidden = max(common, float(np.max(unsure[alone] / relevant[alone], initial=0.0)))

    if len(indices) < gradient.size:
        # Only some elements were checked one by one. Also check all elements together: the
        # derivative along a direction of random signs, each times the length of its element of x.
        direction = generator.choice((-1.0, 1.0), gradient.size) * lengths
        value, total, estimate = measure(like(x, direction.reshape(tuple(x.shape))))
        total = max(total, float(np.abs(gradient * direction).sum())) or 1.0
        moved_together = SAFETY_OF_ROUNDING * float(moved @ lengths)
        together = abs(float(gradient @ direction) - value) / total
        allowed = common + (SAFETY_OF_DIFFERENCE * estimate + moved_together) / total
        hidden = max(hidden, SAFETY_OF_DIFFERENCE * estimate / total)
        if together / allowed > error / bound:
            error, bound = together, allowed
    return Finding(
        name=name,
        shape=tuple(x.shape),
        error=float(error),
        bound=float(bound),
        scale=scale,
        index=tuple(int(i) for i in np.unravel_index(indices[worst], tuple(x.shape))),
        analytic=float(gradient[indices[worst]]),
        numeric=float(values[worst]),
        largest=float(max(np.abs(values).max(), np.abs(gradient).max())),
        method=method,
        hidden=float(hidden),
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
    if to_numpy(gradient).dtype.kind not in "fiub":
        return f"expected real numbers, got the dtype {gradient.dtype}"
    if not np.all(np.isfinite(to_numpy(gradient))):
        return "has NaN or infinite elements"
    return ""
