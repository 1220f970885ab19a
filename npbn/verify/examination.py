"""What is wrong with somebody's forward and backward pass, and which mistake it looks like.

The code under examination runs on a few probes: small random inputs, chosen so that every mistake
of the catalogue shows (odd sizes, eps large enough to matter, training and prediction, overlapping
and uneven windows, ties). What comes out is compared with what `npbn.functional` gives, and, where
it differs, with what every mutant of `npbn.verify.mutants` gives, alone and two at a time: a mutant
that gives the very same wrong numbers on every probe is the mistake, or one with the same effect.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn import functional as F
from npbn.verify.mutants import MUTANTS, Mutant, functions_of

OPERATIONS = tuple(dict.fromkeys(mutant.operation for mutant in MUTANTS))

RIGHT = 1e-10
"""Relative error up to which float64 code is right: the probes are well conditioned, and small."""
WRONG = 1e-4
"""Relative error from which it is wrong. Between the two it may be float32, or a small mistake."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Probe:
    """Arguments in the signature of `npbn.verify.plain`, by name, and what they are to show."""

    name: str
    arguments: dict[str, Any]


def probes(operation: str) -> list[Probe]:
    """The inputs that an operation is examined on; the same every time.

    No two sizes of an input are equal where that could hide that they are mixed up.
    """
    rng = np.random.default_rng(2015)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    def batch_norm(name: str, shape: tuple[int, ...], training: bool) -> Probe:
        form = (1, shape[1]) + (1,) * (len(shape) - 2)
        arguments = {
            "x": 1 + 2 * normal(*shape),
            "gamma": rng.uniform(0.5, 2, form),
            "beta": normal(*form),
            "moving_mean": normal(*form),
            "moving_var": rng.uniform(0.5, 2, form),
            "training": training,
            "eps": 0.1,
            "momentum": 0.7,
        }
        return Probe(name, arguments)

    def conv2d(name: str, image: tuple[int, int], stride: Any, padding: Any) -> Probe:
        x, weight = normal(2, 3, *image), normal(4, 3, 3, 2)
        return Probe(
            name,
            {"x": x, "weight": weight, "bias": normal(4), "stride": stride, "padding": padding},
        )

    def pooling(name: str, x: np.ndarray, kernel: Any, stride: Any, padding: Any) -> Probe:
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        return Probe(name, {"x": x, **options})

    if operation == "batch_norm":
        return [
            batch_norm("training, (N, D)", (7, 3), True),
            batch_norm("training, (N, C, H, W)", (3, 2, 4, 5), True),
            batch_norm("prediction, (N, D)", (5, 3), False),
            batch_norm("prediction, (N, C, H, W)", (4, 2, 5, 3), False),
        ]
    if operation == "conv2d":
        return [
            conv2d("stride 1, no padding", (5, 6), (1, 1), (0, 0)),
            conv2d("stride 2, padding 1", (6, 4), (2, 2), (1, 1)),
            conv2d("stride (2, 1), padding (0, 1)", (7, 5), (2, 1), (0, 1)),
        ]
    if operation in ("avg_pool2d", "max_pool2d"):
        # No two are so close that the step of a numeric derivative makes the other the maximum.
        apart = rng.permutation(np.linspace(-4, 4, 288)).reshape(2, 3, 6, 8)
        return [
            pooling("windows side by side", normal(2, 3, 4, 6), (2, 2), (2, 2), (0, 0)),
            pooling("overlapping windows", apart, (4, 3), (2, 2), (0, 0)),
            pooling("padding, negative numbers", normal(2, 3, 5, 4) - 5, (3, 2), (2, 1), (1, 1)),
            pooling("ties", np.floor(2 * normal(2, 3, 4, 6)), (2, 2), (2, 2), (0, 0)),
        ]
    if operation == "linear":
        return [
            Probe("square", {"x": normal(4, 3), "weight": normal(3, 3), "bias": normal(3)}),
            Probe("wide", {"x": normal(5, 2), "weight": normal(4, 2), "bias": normal(4)}),
        ]
    if operation in ("sigmoid", "relu"):
        return [Probe("matrix", {"x": normal(5, 4)}), Probe("images", {"x": normal(2, 2, 3, 2)})]
    if operation == "softmax_cross_entropy":
        return [
            Probe("ordinary logits", {"logits": normal(5, 4), "labels": rng.integers(0, 4, 5)}),
            Probe("large logits", {"logits": 1000 + normal(3, 4), "labels": rng.integers(0, 4, 3)}),
        ]
    raise ValueError(f"expected an operation of {', '.join(OPERATIONS)}, got {operation!r}")


GRADIENTS = {
    "batch_norm": ("dx", "dgamma", "dbeta"),
    "conv2d": ("dx", "dweight", "dbias"),
    "avg_pool2d": ("dx",),
    "max_pool2d": ("dx",),
    "linear": ("dx", "dweight", "dbias"),
    "sigmoid": ("dx",),
    "relu": ("dx",),
    "softmax_cross_entropy": ("dlogits",),
}


def true_functions(operation: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The shipped forward and backward."""
    return getattr(F, operation), getattr(F, f"{operation}_backward")


def outputs(
    operation: str, pair: tuple[Callable[..., Any], Callable[..., Any]], probe: Probe
) -> Outputs:
    """Everything that forward and backward give on a probe, by name."""
    forward, backward = pair
    result = forward(**probe.arguments)
    y, cache = result[0], result[1]
    found = {"y": y}
    if operation == "batch_norm" and len(result) > 2 and result[2] is not None:
        found["moving_mean"], found["moving_var"] = result[2]
    if operation == "softmax_cross_entropy":
        gradients = backward(cache)
    else:
        dy = np.random.default_rng(1502).standard_normal(np.shape(y))
        gradients = backward(dy, cache)
    if not isinstance(gradients, (tuple, list)):
        gradients = (gradients,)
    names = GRADIENTS[operation]
    if len(gradients) != len(names):
        raise ValueError(f"expected {len(names)} gradients ({', '.join(names)})")
    return {
        name: np.asarray(value)
        for name, value in (found | dict(zip(names, gradients, strict=True))).items()
    }


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative error; infinite for another shape, NaN where there should be none, or no numbers."""
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return math.inf
    error = np.max(np.abs(found - expected), initial=0.0)
    scale = np.max(np.abs(expected), initial=0.0)
    relative = float(error / scale) if scale else float(error)
    return math.inf if math.isnan(relative) else relative


@dataclass(frozen=True)
class Examination:
    """The result.

    Attributes:
        verdict: "right", "wrong" or "undecided".
        error: the largest relative error of any output on any probe.
        complaints: what is wrong, one sentence an output.
        mistakes: the mutants that it equals: alternatives, each a combination of one or two.
    """

    operation: str
    verdict: str
    error: float
    complaints: tuple[str, ...] = ()
    mistakes: tuple[tuple[Mutant, ...], ...] = ()

    def __str__(self) -> str:
        if self.verdict == "right":
            digits = 15 if self.error == 0 else min(15, math.floor(-math.log10(self.error)))
            return f"{self.operation} is right, to {digits} digits, forward and backward."
        lines = []
        if self.verdict == "undecided" and math.isnan(self.error):
            lines.append(f"{self.operation}: can't tell.")
        elif self.verdict == "undecided":
            digits = math.floor(-math.log10(self.error))
            lines.append(
                f"{self.operation}: can't tell. It agrees to {digits} digits: that may be float32 "
                "arithmetic, or a small mistake. Compute in float64 and try again."
            )
        else:
            lines.append(f"{self.operation} is wrong.")
        lines += [f"  {complaint}" for complaint in self.complaints]
        if self.mistakes:
            lines.append("Most likely:")
            for k, combination in enumerate(self.mistakes):
                joined = ", AND ".join(f"{m.name}: {m.explanation}" for m in combination)
                lines.append(f"  {'or ' if k else ''}{joined}.")
        elif self.verdict == "wrong":
            lines.append("It equals none of the mistakes that npbn knows.")
        return "\n".join(lines)


def examine(operation: str, results: Mapping[str, Outputs | str | None]) -> Examination:
    """Judge what code gave on each probe.

    A string says how it failed there; None, that its signature has no place for the probe.
    """
    truth = {p.name: outputs(operation, true_functions(operation), p) for p in probes(operation)}
    complaints: dict[str, str] = {}
    largest = 0.0
    for probe, expected in truth.items():
        found = results[probe]
        if found is None:
            continue
        if isinstance(found, str):
            complaints.setdefault(found, f"it {found} ({probe})")
            largest = math.inf
            continue
        for name in expected:
            if name not in found:
                continue  # moving statistics that the signature does not return
            error = difference(found[name], expected[name])
            largest = max(largest, error)
            if error > RIGHT:
                complaints.setdefault(name, _complaint(name, probe, found[name], expected[name]))
    if all(found is None for found in results.values()):
        complaint = "its signature has no place for the arguments of any probe"
        return Examination(operation, "undecided", math.nan, (complaint,))
    if not complaints:
        return Examination(operation, "right", largest)
    verdict = "wrong" if largest > WRONG else "undecided"
    mistakes = _explain(operation, results) if verdict == "wrong" else ()
    return Examination(operation, verdict, largest, tuple(complaints.values()), mistakes)


def _complaint(name: str, probe: str, found: np.ndarray, expected: np.ndarray) -> str:
    if found.shape != expected.shape:
        return f"{name} has the shape {found.shape}, expected {expected.shape} ({probe})"
    if found.dtype.kind not in "fiub":
        return f"{name} has the dtype {found.dtype}, expected float64 ({probe})"
    bad = np.abs(found - expected)
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(bad), np.inf, bad))), bad.shape)
    place = ", ".join(str(int(i)) for i in worst)
    return (
        f"{name}[{place}] is {float(found[worst]):.8g}, expected {float(expected[worst]):.8g} "
        f"({probe})"
    )


def _explain(
    operation: str, results: Mapping[str, Outputs | str | None]
) -> tuple[tuple[Mutant, ...], ...]:
    """The mistakes that it equals: alone, as a pair, or, failing that, output by output."""
    candidates = [m for m in MUTANTS if m.operation == operation]
    for size in (1, 2):
        matching = tuple(
            combination
            for combination in itertools.combinations(candidates, size)
            if _same(operation, combination, results)
        )
        if matching:
            return matching
    return _explain_outputs(operation, candidates, results)


def _explain_outputs(
    operation: str, candidates: list[Mutant], results: Mapping[str, Outputs | str | None]
) -> tuple[tuple[Mutant, ...], ...]:
    """For each output that is wrong, a mutant that is wrong in the same way wherever it is."""
    truth = _outputs_of(operation, true_functions(operation))
    ran = {probe: found for probe, found in results.items() if isinstance(found, dict)}
    wrong: dict[str, list[str]] = {}
    for probe, found in ran.items():
        for name, value in found.items():
            if difference(value, truth[probe][name]) > WRONG:
                wrong.setdefault(name, []).append(probe)

    chosen: list[Mutant] = []
    for name, places in wrong.items():
        fitting = []
        for k, candidate in enumerate(candidates):
            given = _outputs_of(operation, candidate.functions)
            if all(
                name in given[probe] and _equal(ran[probe][name], given[probe][name])
                for probe in places
            ):
                elsewhere = sum(
                    difference(given[probe][other], value) > WRONG
                    for probe, expected in truth.items()
                    for other, value in expected.items()
                    if other != name and other in given[probe]
                )
                fitting.append((elsewhere, k))
        if fitting:  # the one that gets the least else wrong
            candidate = candidates[min(fitting)[1]]
            if candidate not in chosen:
                chosen.append(candidate)
    return (tuple(chosen),) if chosen else ()


def _outputs_of(operation: str, functions: Any) -> dict[str, Outputs]:
    """By probe; empty where the functions cannot run."""
    given: dict[str, Outputs] = {}
    for probe in probes(operation):
        try:
            with np.errstate(all="ignore"):
                given[probe.name] = outputs(operation, functions, probe)
        except Exception:  # a mutant need not be able to run everywhere
            given[probe.name] = {}
    return given


def _same(
    operation: str, combination: tuple[Mutant, ...], results: Mapping[str, Outputs | str | None]
) -> bool:
    try:
        pair = functions_of(operation, combination)
    except ValueError:  # both change the same line
        return False
    for probe in probes(operation):
        found = results[probe.name]
        if found is None:
            continue
        try:
            with np.errstate(all="ignore"):
                expected = outputs(operation, pair, probe)
        except Exception:  # a mutant may be unable to run on a probe, as its model may
            if not isinstance(found, str):
                return False
            continue
        if isinstance(found, str):
            return False
        for name, value in expected.items():
            if name in found and not _equal(found[name], value):
                return False
    return True


def _equal(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    scale = max(1.0, float(np.max(np.abs(expected[finite]), initial=0.0)))
    return bool(np.all(np.abs(found[finite] - expected[finite]) <= 1e-8 * scale))
