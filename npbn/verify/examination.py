"""Find the mistake in a forward and a backward pass, by comparison with a catalogue of mistakes.

The code under examination runs on a few probes, which are small random inputs. The probes are
chosen so that every mistake of the catalogue changes some result: there are odd sizes, a large eps,
training and prediction, overlapping and uneven windows, and ties. The results are compared with the
results of `npbn.functional`. Wrong results are also compared with the results of the mutants of
`npbn.verify.mutants`, one at a time and in pairs. If a mutant gives the same wrong numbers on every
probe, the code has the mistake of this mutant, or a mistake with the same effect.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npbn.verify.mutants import MUTANTS, Mutant, functions_of
from npbn.verify.operations import OPERATIONS, NotExaminedError, Probe, probes, true_functions
from npbn.verify.signatures import BadResultError

RIGHT = 1e-10
"""The largest relative error of right float64 code. The probes are small and well conditioned."""
WRONG = 1e-4
"""Code with a larger relative error than this is wrong. If the error lies between RIGHT and WRONG,
the code may compute in float32, or may have a small mistake."""

Outputs = dict[str, np.ndarray]


def outputs(
    operation: str, pair: tuple[Callable[..., Any], Callable[..., Any]], probe: Probe
) -> Outputs:
    """Return all outputs of a forward and a backward pass on a probe, by name.

    If the backward pass raises `NotExaminedError`, the result has only the forward pass's outputs.
    """
    forward, backward = pair
    result = forward(**probe.arguments)
    y, cache = result[0], result[1]
    if y is None:
        raise BadResultError("returned None from forward")
    found = {"y": y}
    if operation == "batch_norm" and len(result) > 2 and result[2] is not None:
        found["moving_mean"], found["moving_var"] = result[2]
    try:
        if operation == "softmax_cross_entropy":
            gradients = backward(cache)
        else:
            dy = np.random.default_rng(1502).standard_normal(np.shape(y))
            gradients = backward(dy, cache)
    except NotExaminedError:
        pass
    else:
        found |= _named(operation, gradients)
    arrays = {name: np.asarray(value) for name, value in found.items()}
    if operation == "batch_norm":  # Outputs of shape (D,) get the shape of gamma.
        gamma = probe.arguments["gamma"]
        for name, array in arrays.items():
            if array.shape == (gamma.size,):
                arrays[name] = array.reshape(gamma.shape)
    return arrays


def _named(operation: str, gradients: Any) -> dict[str, Any]:
    names = OPERATIONS[operation].gradients
    if gradients is None:
        raise BadResultError("returned None from backward")
    if not isinstance(gradients, (tuple, list)):
        gradients = (gradients,)
    if len(gradients) != len(names):
        raise BadResultError(
            f"returned {len(gradients)} from backward, expected {len(names)} gradients "
            f"({', '.join(names)})"
        )
    return dict(zip(names, gradients, strict=True))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative error; infinite for a wrong shape, a dtype without numbers, or NaN."""
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return math.inf
    error = np.max(np.abs(found - expected), initial=0.0)
    scale = np.max(np.abs(expected), initial=0.0)
    relative = float(error / scale) if scale else float(error)
    return math.inf if math.isnan(relative) else relative


Place = tuple[str, str]
"""The name of a probe and the name of an output."""

Results = Mapping[str, Outputs | str | NotExaminedError]
"""The result of some code on each probe. A result is the outputs, or an exception that says why the
code was not run, or a text such as "raised KeyError" that says how the code failed."""


@dataclass(frozen=True)
class Examination:
    """The result of the examination of a forward and a backward pass.

    Attributes:
        operation: the name of the operation.
        verdict: "right", "wrong", "undecided", or, if the code failed on all probes, "could not be
            run".
        error: the largest relative error of any output on any probe. The error is infinite if the
            code failed on a probe, and NaN if the code was not run.
        complaints: sentences that say what is wrong, one for each wrong output or failure.
        mistakes: alternative explanations. Each is a combination of one or more mutants.
        right, wrong: the names of the outputs that are right, and of those that are wrong.
        notes: further remarks: which arguments the code changes, and what was not examined.
    """

    operation: str
    verdict: str
    error: float
    complaints: tuple[str, ...] = ()
    mistakes: tuple[tuple[Mutant, ...], ...] = ()
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        """Return the names of the mistakes, or the first complaint if no mistake was found."""
        if self.mistakes:
            return " and ".join(mutant.name for mutant in self.mistakes[0])
        return "".join(self.complaints[:1])

    def __str__(self) -> str:
        lines = []
        if self.verdict == "right":
            digits = 15 if self.error == 0 else min(15, math.floor(-math.log10(self.error)))
            lines.append(f"{self.operation} is right, to {digits} digits.")
        elif self.verdict == "undecided" and math.isnan(self.error):
            lines.append(f"{self.operation}: can't tell.")
        elif self.verdict == "undecided":
            digits = math.floor(-math.log10(self.error))
            lines.append(
                f"{self.operation}: can't tell. It agrees to {digits} digits: that may be float32 "
                "arithmetic, or a small mistake. Compute in float64 and try again."
            )
        elif self.verdict == "wrong":
            lines.append(f"{self.operation} is wrong.")
        else:
            lines.append(f"{self.operation} could not be run.")
        lines += [f"  {complaint}" for complaint in self.complaints]
        if self.right:
            lines.append(f"Right where examined: {', '.join(self.right)}.")
        if self.mistakes:
            lines.append("Most likely:")
            for k, combination in enumerate(self.mistakes):
                joined = ", AND ".join(f"{m.name}: {m.explanation}" for m in combination)
                lines.append(f"  {'or ' if k else ''}{joined}.")
        elif self.wrong and self.verdict == "wrong":
            lines.append("It equals none of the mistakes that npbn knows.")
        if self.notes:
            lines += ["Note:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


def examine(operation: str, results: Results, changed: Iterable[str] = ()) -> Examination:
    """Judge the results of some code.

    Args:
        operation: the name of the operation that the code should compute.
        results: the result on each probe.
        changed: the names of the arguments that the code changed in place.
    """
    truth = {p.name: outputs(operation, true_functions(operation), p) for p in probes(operation)}
    ran = {probe: found for probe, found in results.items() if isinstance(found, dict)}
    failures = {probe: found for probe, found in results.items() if isinstance(found, str)}
    if not ran and not failures:
        reasons = dict.fromkeys(str(reason) for reason in results.values())
        return Examination(operation, "undecided", math.nan, tuple(reasons))
    complaints: dict[str, str] = {}
    if not ran:
        everywhere = len(set(failures.values())) == 1  # The failure does not depend on the probe.
        for probe, failure in failures.items():
            complaints.setdefault(failure, f"it {failure}" + f" ({probe})" * (not everywhere))
        return Examination(operation, "could not be run", math.inf, tuple(complaints.values()))

    errors = {
        (probe, name): difference(found[name], truth[probe][name])
        for probe, found in ran.items()
        for name in truth[probe]
        if name in found  # The code need not return moving averages.
    }
    largest = math.inf if failures else max(errors.values())
    verdict = "right" if largest <= RIGHT else "wrong" if largest > WRONG else "undecided"
    # If the code has a mistake, outputs that differ only by rounding get no complaint.
    bound = WRONG if verdict == "wrong" else RIGHT
    for probe in truth:
        if probe in failures:
            complaints.setdefault(failures[probe], f"it {failures[probe]} ({probe})")
        for name in ran.get(probe, ()):
            if errors[probe, name] > bound:
                pair = ran[probe][name], truth[probe][name]
                complaints.setdefault(name, _complaint(name, probe, *pair))
    names = list(dict.fromkeys(name for _, name in errors))
    wrong = tuple(name for name in names if name in complaints)
    return Examination(
        operation,
        verdict,
        largest,
        tuple(complaints.values()),
        _explain(operation, ran, errors) if verdict == "wrong" and wrong else (),
        tuple(name for name in names if name not in wrong),
        wrong,
        (*(f"it changes its argument {name}" for name in changed), *_unexamined(results, truth)),
    )


def _unexamined(results: Results, truth: Mapping[str, Outputs]) -> list[str]:
    places: dict[str, list[str]] = {}
    for probe, found in results.items():
        if isinstance(found, NotExaminedError):
            places.setdefault(f"not examined, as {found}", []).append(probe)
        elif not isinstance(found, str) and truth[probe].keys() - found.keys():
            left = ", ".join(name for name in truth[probe] if name not in found)
            places.setdefault(f"{left} not examined", []).append(probe)
    return [f"{what}: {'; '.join(where)}" for what, where in places.items()]


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
    operation: str, ran: Mapping[str, Outputs], errors: Mapping[Place, float]
) -> tuple[tuple[Mutant, ...], ...]:
    """Return alternative explanations of wrong results. Each is a combination of mutants.

    If single mutants give the same results as the code, the explanations are these mutants. If not,
    the explanations are the pairs that give the same results. If no pair does, a combination is
    chosen for each wrong output, and the only explanation is the union of these combinations.

    Args:
        operation: the name of the operation.
        ran: the outputs of the code on each probe.
        errors: the relative error of each output on each probe.
    """
    matching = _matching(operation, ran, errors)
    if matching:
        return tuple(matching)
    truth = _given(operation, ())
    chosen: dict[Mutant, None] = {}
    for name in dict.fromkeys(name for (_, name), error in errors.items() if error > WRONG):
        places = [place for place, error in errors.items() if place[1] == name and error > WRONG]
        matching = _matching(operation, ran, places)
        if matching:  # Choose the combination that makes the fewest other outputs wrong.
            elsewhere = [
                sum(
                    difference(value, truth[probe][other]) > WRONG
                    for probe, given in _given(operation, combination).items()
                    for other, value in given.items()
                    if other != name
                )
                for combination in matching
            ]
            chosen |= dict.fromkeys(matching[elsewhere.index(min(elsewhere))])
    return (tuple(chosen),) if chosen else ()


def _matching(
    operation: str, ran: Mapping[str, Outputs], places: Iterable[Place]
) -> list[tuple[Mutant, ...]]:
    """Return the mutants, or else the pairs of mutants, that agree with the code in some places.

    Args:
        operation: the name of the operation.
        ran: the outputs of the code on each probe.
        places: the outputs to compare, as pairs (name of the probe, name of the output).
    """
    candidates = [m for m in MUTANTS if m.operation == operation]
    matching: list[tuple[Mutant, ...]] = []
    for size in (1, 2):
        for combination in itertools.combinations(candidates, size):
            given = _given(operation, combination)
            if all(
                name in given.get(probe, {}) and _equal(ran[probe][name], given[probe][name])
                for probe, name in places
            ):
                matching.append(combination)
        if matching:
            break
    return matching


@functools.cache
def _given(operation: str, mistakes: tuple[Mutant, ...]) -> dict[str, Outputs]:
    """Return the outputs of an operation with these mistakes, for each probe where it can run."""
    given: dict[str, Outputs] = {}
    try:
        pair = functions_of(operation, mistakes)
    except ValueError:  # The mistakes change the same line, so they cannot be combined.
        return given
    for probe in probes(operation):
        with np.errstate(all="ignore"), contextlib.suppress(Exception):
            given[probe.name] = outputs(operation, pair, probe)
    return given


def _equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two outputs are equal, apart from rounding errors of float32 or float64."""
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    scale = max(1.0, float(np.max(np.abs(expected[finite]), initial=0.0)))
    return bool(np.all(np.abs(found[finite] - expected[finite]) <= WRONG * scale))
