"""Judge the results of a forward and a backward pass, and find the mistake in them.

The code under examination runs on a few probes, which are small random inputs. The probes are
chosen so that every mistake of the catalogue changes some result: some have odd sizes, a large eps,
overlapping or uneven windows, or ties. Two questions are answered:

1. Is the backward pass the gradient of its own forward pass?
2. Is the forward pass the operation, and by which convention?

The results are compared with those of `npbn.functional`, and with those of other conventions that
are also right (`npbn.verify.mutants.CONVENTIONS`). Wrong results are then compared with the results
of code that has a known mistake (a mutant, `npbn.verify.mutants.MUTANTS`), or two of them. If a
mutant gives the same wrong results on every probe, the examined code has the mistake of this
mutant, or a mistake with the same effect.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npbn.verify.isolated.edits import Change
from npbn.verify.mutants import CONVENTIONS, MUTANTS, Mutant, functions_of, plain_name
from npbn.verify.operations import (
    OPERATIONS,
    PROBABILITIES,
    PROMISES,
    STRUCTURE,
    Probe,
    probes,
    true_functions,
)

RIGHT = 1e-10
"""The largest relative error that right float64 code may have. The inputs on which code is examined
are small and well conditioned."""
WRONG = 1e-4
"""Code with a larger relative error than this is wrong. If the error lies between RIGHT and WRONG,
the code may compute in float32, or may have a small mistake."""

FIXED = {
    "eps": (1e-5, 1e-8, 1e-7, 1e-6, 1e-3, 1e-4, 1e-12, 1e-10, 1e-15, 1e-2),
    "momentum": (0.9, 0.99, 0.999, 0.1, 0.95, 0.5),
    "slope": (0.01, 0.1, 0.2, 0.3),
}
"""For each argument, the values that people write into their code in place of the argument."""


Outputs = dict[str, np.ndarray]
Given = Mapping[str, Outputs]
"""The outputs by name for each probe, by the name of the probe."""


@dataclass
class Ran:
    """The result of running the examined code on one probe, a small random input.

    Attributes:
        outputs: the outputs and gradients by name, converted to npbn's layout of arrays.
        failure: how the code failed, such as "raised KeyError: 'eps'", or an empty text.
        refusal: whether a statement of the code itself raised an AssertionError or a
            NotImplementedError.
        unwritten: whether the failure means that the code is not written yet.
        needs: whether the failure means that something is not installed here.
        uncalled: whether the failure may be due to the grader, which calls the code with arguments
            that it has guessed.
        ended: whether the process of the code ended, or did not answer in time.
        skipped: why the code, or only its backward pass, was not run, or an empty text.
        layout: the name of the layout of arrays that the code uses; see
            `npbn.verify.operations.Layout`.
    """

    outputs: Outputs = field(default_factory=dict)
    failure: str = ""
    refusal: bool = False
    unwritten: bool = False
    needs: bool = False
    uncalled: bool = False
    ended: bool = False
    skipped: str = ""
    layout: str = ""


@dataclass
class Facts:
    """What was observed of the examined code on all probes together.

    Attributes:
        taken: the arguments that the code takes, by npbn's names for them.
        changed: the arguments that the code changes in place.
        missing: the gradients that the code returns as None.
        unknown: the arguments whose meaning is not known, so that the code got None for them.
        order: the names of the gradients in the order in which the code returns them, if this is
            not npbn's order.
        state: a sentence that says how the results of a call depend on earlier calls, or an empty
            text.
        own_gradient: for each gradient, whether it is the gradient of the code's own forward pass.
            This is empty if it was not examined.
        is_class: whether the code is a class.
        without_dy: whether the backward pass takes no upstream gradient.
        base: the conventions that the code follows, where they are not npbn's.
        fixed: the arguments whose values are written in the code, with these values.
        notes: further remarks.
    """

    taken: dict[str, None] = field(default_factory=dict)
    changed: dict[str, None] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    state: str = ""
    own_gradient: dict[str, bool] = field(default_factory=dict)
    is_class: bool = False
    without_dy: bool = False
    base: tuple[Mutant, ...] = ()
    fixed: tuple[tuple[str, float], ...] = ()
    notes: list[str] = field(default_factory=list)


def upstream(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a random upstream gradient for an output of this shape."""
    return np.random.default_rng(seed + 1).standard_normal(shape)


def outputs(
    operation: str, pair: tuple[Callable[..., Any], Callable[..., Any]], probe: Probe, seed: int
) -> Outputs:
    """Return what two functions with npbn's arguments give for a probe: outputs and gradients."""
    forward, backward = pair
    result = forward(**probe.arguments)
    found = {"y": np.asarray(result[0])}
    if len(result) > 2:
        found["moving_mean"], found["moving_var"] = result[2]
    if OPERATIONS[operation].loss:
        gradients = backward(result[1])
    else:
        gradients = backward(upstream(seed, found["y"].shape), result[1])
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    found |= dict(zip(OPERATIONS[operation].gradients, gradients, strict=True))
    return {name: np.asarray(value) for name, value in found.items()}


@functools.lru_cache(100_000)
def given(
    operation: str, mistakes: tuple[Mutant, ...], seed: int, fixed: tuple[Any, ...] = ()
) -> Given:
    """Return the outputs of an operation that has these mistakes, on all probes.

    A probe on which this code raises an error is left out.

    Args:
        operation: the name of the operation.
        mistakes: mutants and conventions; the outputs are right if there are none.
        seed: the seed of the probes.
        fixed: the arguments that have another value than in the probes, as pairs (name, value).
    """
    found: dict[str, Outputs] = {}
    try:
        # npbn.verify.plain is faster than npbn.functional. A test shows that they agree.
        plain = bool(mistakes or fixed)
        pair = functions_of(operation, mistakes) if plain else true_functions(operation)
    except ValueError:  # The mistakes change the same line, so they cannot be combined.
        return found
    for probe in probes(operation, seed):
        changed = {name: value for name, value in fixed if name in probe.arguments}
        moved = Probe(probe.name, probe.arguments | changed)
        with np.errstate(all="ignore"), contextlib.suppress(Exception):
            found[probe.name] = outputs(operation, pair, moved, seed)
    return found


SAID = {
    layout.name
    for operation in OPERATIONS.values()
    for layout in (*operation.layouts, *operation.map_layouts)
    if layout.said
}
"""The names of the layouts that the report mentions as conventions."""


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error of an element, divided by the largest expected element.

    The result is infinite for a wrong shape, for a dtype without real numbers, and for NaN.
    """
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return math.inf
    with np.errstate(all="ignore"):
        error = np.max(np.abs(found - expected), initial=0.0)
        scale = np.max(np.abs(expected), initial=0.0)
        relative = float(error / scale) if scale else float(error)
    return math.inf if math.isnan(relative) else relative


@dataclass(frozen=True)
class Examination:
    """The result of the examination of a forward and a backward pass.

    Attributes:
        operation: the name of the operation.
        verdict: one of the keys of `OF`.
        error: the largest relative error of any output on the inputs that the assignment asks for.
            The error is infinite if the code failed on such an input, and NaN if no output was
            compared.
        forward, backward: "right", "wrong", "not written yet" or "not examined". A backward pass is
            right if it is the gradient of its own forward pass.
        complaints: sentences that say what is wrong, one for each wrong output or failure.
        mistakes: explanations of wrong outputs, of which any one may be true. Each explanation is a
            combination of one or more mutants.
        conventions: in what the code differs from npbn without being wrong.
        beyond: what the code cannot do and the assignment does not ask for, such as "padding".
        right, wrong: the names of the outputs that are right, and of those that are wrong.
        notes: further remarks: which arguments the code changes, and what was not examined.
        changes: changes of the code which, all together, make it right.
        hint: how much the report shows of each change; see `Change.shown`.
    """

    operation: str
    verdict: str
    error: float = math.nan
    forward: str = "not examined"
    backward: str = "not examined"
    complaints: tuple[str, ...] = ()
    mistakes: tuple[tuple[Mutant, ...], ...] = ()
    conventions: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    hint: str = "edit"

    @property
    def edits(self) -> tuple[str, ...]:
        """Return the changes as texts."""
        return tuple(change.shown(self.hint) for change in self.changes)

    @property
    def first(self) -> str:
        """Return in a few words what is wrong, or how right code differs from npbn."""
        if self.verdict in ("right", CONVENTION):
            return "; ".join(self.conventions)
        if self.verdict == ASKED:
            return f"not for {'; '.join(self.beyond)}"
        if self.edits:
            return self.edits[0]
        if self.mistakes:
            return " and ".join(mutant.name for mutant in self.mistakes[0])
        return "".join(self.complaints[:1])

    def __str__(self) -> str:
        verdict, digits = self.verdict, ""
        if self.error < WRONG and verdict != "wrong":
            count = 15 if self.error == 0 else min(15, math.floor(-math.log10(self.error)))
            digits = f", to {count} digits"
        lines = [f"{self.operation} {OF[verdict]}{digits if verdict != UNDECIDED else ''}."]
        if verdict == UNDECIDED and digits and self.backward != "not examined":
            lines = [
                f"{self.operation}: can't tell. It agrees{digits}: that may be float32 "
                "arithmetic, or a small mistake. Compute in float64 and try again."
            ]
        lines += [f"  {complaint}" for complaint in self.complaints]
        if self.beyond and verdict != "wrong":
            lines.append(f"It breaks for {'; '.join(self.beyond)}.")
        if self.conventions:
            lines.append(f"Conventions: {'; '.join(self.conventions)}.")
        if verdict == "wrong" and self.forward == "wrong" and self.backward == "right":
            lines.append("The backward pass is the gradient of this forward pass.")
        if self.right:
            lines.append(f"Right where examined: {', '.join(self.right)}.")
        if self.edits:
            lines += ["This change makes it right:", *(f"  {edit}" for edit in self.edits)]
        if self.mistakes:
            lines.append("Most likely:")
            for k, combination in enumerate(self.mistakes):
                joined = ", AND ".join(f"{m.name}: {m.explanation}" for m in combination)
                lines.append(f"  {'or ' if k else ''}{joined}.")
        elif self.wrong and verdict == "wrong" and not self.edits:
            lines.append("It equals none of the mistakes that npbn knows.")
        if self.notes:
            lines += ["Note:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)


CONVENTION, ASKED = "right, another convention", "right where the assignment asks"
UNWRITTEN, UNDECIDED, UNLOADED = "not written yet", "can't tell", "could not be loaded"
OF = {
    "right": "is right",
    CONVENTION: "is right, by another convention",
    ASKED: "is right where the assignment asks",
    "wrong": "is wrong",
    UNWRITTEN: "is not written yet",
    UNDECIDED: "cannot be judged",
    "could not be run": "could not be run",
    UNLOADED: "could not be loaded here",
}


def examine(
    operation: str,
    results: Mapping[str, Ran],
    facts: Facts,
    seed: int,
    beyond: Mapping[str, str],
) -> Examination:
    """Judge the results of some code.

    Args:
        operation: the name of the operation that the code should compute.
        results: the result on each probe (input), by the name of the probe.
        facts: observations from the calls. The conventions that explain the results are added.
        seed: the seed of the probes.
        beyond: the names of the probes on which the code need not be right, and for each what makes
            it harder than usual, such as "padding".
    """
    results = meant_results(operation, results, facts, seed)
    ran = {name: result.outputs for name, result in results.items() if result.outputs}
    failures = {name: r for name, r in results.items() if r.failure and not r.refusal}
    notes = [f"it changes its argument {name}" for name in facts.changed] + facts.notes
    notes += _unexamined(results)
    if not ran:
        return _without_outputs(operation, results, tuple(notes))

    # If the code runs only on inputs beyond the usual ones, such as a stride of 1, they count.
    if all(name in beyond for name in ran):
        beyond = {name: text for name, text in beyond.items() if name not in ran or text == "ties"}
    core = {name: found for name, found in ran.items() if name not in beyond}
    layouts = [
        n for n in dict.fromkeys(r.layout for r in results.values() if r.outputs) if n in SAID
    ]
    columns = any(layout.startswith("examples in columns") for layout in layouts)
    fixed, base = _conventions(operation, ran, facts, seed, columns, beyond)
    facts.fixed, facts.base = fixed, base

    def variant(mistakes: tuple[Mutant, ...]) -> Given:
        return given(operation, mistakes, seed, fixed)

    truth = variant(base)
    errors = {
        (probe, name): difference(found[name], truth[probe][name])
        for probe, found in ran.items()
        for name in truth[probe]
        if name in found
    }
    hard_ones = {probe.name for probe in probes(operation, seed) if probe.hard}
    errors = {p: 0.0 if p[0] in hard_ones and e <= WRONG else e for p, e in errors.items()}
    usual = {place: e for place, e in errors.items() if place[0] not in beyond}
    bad_failures = [name for name in failures if name not in beyond]
    largest = math.inf if bad_failures else max(usual.values(), default=math.nan)
    tolerance, unit = _tolerance(operation, core or ran, seed, fixed)
    complaints: dict[str, str] = {facts.state: facts.state} if facts.state else {}
    bound = WRONG if largest > max(WRONG, tolerance) else tolerance
    for probe in truth:
        result = results.get(probe)
        if result is None or probe in beyond:
            continue
        for name, value in result.outputs.items():
            if errors.get((probe, name), 0.0) > bound:
                text = _complaint(name, probe, value, truth[probe][name])
                complaints.setdefault(name, text)
    for probe in truth:
        if probe in failures and probe not in beyond:
            failure = results[probe].failure
            complaints.setdefault(failure, f"it {failure} ({probe})")
    wrongly_changed = [n for n in facts.changed if n != "dy" and not n.startswith("moving")]
    if wrongly_changed and plain_name(operation) != "batch_norm":
        text = f"forward changes its argument {wrongly_changed[0]}, which others may still need"
        complaints[text] = text
    names = list(dict.fromkeys(name for _, name in errors))
    wrong = tuple(name for name in names if name in complaints)

    zero = {
        name
        for name in wrong
        if not any(np.any(found[name]) for found in core.values() if name in found)
        and any(np.any(truth[probe][name]) for probe in core)
    }
    for name in facts.missing:
        complaints.setdefault(f"{name} None", f"{name} is None")
    unwritten = zero | set(facts.missing)
    backward_unwritten = any(r.unwritten for name, r in failures.items() if name not in beyond)
    broken = _broken(results, errors, beyond)
    disagreeing = [text for text, forward_right in broken.items() if forward_right]

    hard = set(complaints) - unwritten - {f"{name} None" for name in facts.missing}
    hard -= {r.failure for r in results.values() if r.unwritten}
    conventions = [m.name for m in base]
    conventions += [f"{name} is {value:g} in the code" for name, value in fixed]
    conventions += layouts
    if facts.without_dy and not OPERATIONS[operation].loss:
        conventions.append("the backward pass is without the upstream gradient")
    if largest <= max(RIGHT, tolerance) and unit and tolerance < 0.02 and not complaints:
        conventions.append(f"{unit} arithmetic ({largest / UNITS[unit]:.1f} units)")
    if not complaints and disagreeing:
        text = f"for {disagreeing[0]}, the outputs are right and the gradients are wrong"
        complaints[text] = text
        hard.add(text)

    if complaints and not hard:
        verdict = UNWRITTEN
    elif tolerance >= 0.02:
        verdict = UNDECIDED if largest <= max(tolerance, WRONG) else "wrong"
    elif math.isnan(largest):
        verdict = UNDECIDED
    elif not complaints:
        verdict = ASKED if broken else CONVENTION if conventions else "right"
        if verdict == CONVENTION and conventions[-1].endswith("units)") and len(conventions) == 1:
            verdict = "right"
    elif facts.state or largest > max(WRONG, tolerance) or hard - set(names):
        verdict = "wrong"
    else:
        verdict = UNDECIDED
    plain = given(operation, (), seed)
    if facts.is_class and all(o["y"].ndim != plain[n]["y"].ndim for n, o in ran.items()):
        notes.append("it may expect one example, or another kind of input: an adapter is needed")
        verdict = UNDECIDED if verdict == "wrong" and not OPERATIONS[operation].loss else verdict
    if PROBABILITIES in layouts and verdict == "wrong" and "y" not in wrong:
        notes.append("its gradient may be by the probabilities, which is not examined")
        verdict = UNDECIDED
    if facts.unknown:
        notes.append(f"it got None for {', '.join(facts.unknown)}; an adapter can give more")
        verdict = UNDECIDED if verdict == "wrong" else verdict
    excused = {r.failure: r.needs for r in failures.values() if r.needs or r.uncalled}
    if verdict == "wrong" and hard and hard <= excused.keys():
        verdict = UNLOADED if any(excused.values()) else UNDECIDED
    gradients = [name for name in names if name in OPERATIONS[operation].gradients]
    raised = [failure.failure.startswith("raised") for failure in failures.values()]
    if verdict == "wrong" and not gradients and not wrong and all(raised):
        verdict = "could not be run"
    if verdict in ("right", CONVENTION, ASKED) and not gradients:
        # Right outputs without any gradient are only half of the homework.
        verdict = UNDECIDED
        complaints["no gradient"] = "no gradient was examined"
    right = tuple(name for name in names if name not in wrong)
    if verdict == "wrong":
        notes += _right_under(operation, results, usual, failures, seed)
    if backward_unwritten and verdict == "wrong":
        notes.append("the backward pass is not written yet")
    explained: tuple[tuple[Mutant, ...], ...] = ()
    more: list[str] = []
    if verdict == "wrong" and (wrong or disagreeing):
        meant = {
            place: error
            for place, error in errors.items()
            if broken.get(beyond.get(place[0], ""), True)
        }
        if any(error > WRONG for error in meant.values()):
            explained = _fully(operation, ran, meant, base, variant)
        if not explained:
            more = _other_order(operation, core, truth, errors)
        if not explained and not more:
            explained = _in_part(operation, ran, meant, base, variant)
    return Examination(
        operation,
        verdict,
        largest,
        _forward_verdict(wrong, names),
        _backward_verdict(
            operation, verdict, wrong, names, facts, backward_unwritten, bool(bad_failures)
        ),
        (*more, *complaints.values()),
        explained,
        tuple(conventions),
        tuple(broken),
        right,
        wrong,
        tuple(dict.fromkeys(notes)),
    )


UNITS = {"float32": 2.0**-24, "float16": 2.0**-11}


def _tolerance(operation: str, ran: Given, seed: int, fixed: tuple[Any, ...]) -> tuple[float, str]:
    """Return the largest relative error that right code may have, and the name of its dtype.

    The dtype is the least precise one of the outputs; for float64, its name is empty. For float32
    and float16, 16 times the error of npbn's own code in float32 is allowed, in units of rounding
    of the dtype. So inputs that are sensitive to rounding get a larger bound.
    """
    sizes = [
        value.dtype.itemsize
        for o in ran.values()
        for value in o.values()
        if value.dtype.kind == "f"
    ]
    smallest = min(sizes, default=8)
    if smallest >= 8:
        return RIGHT, ""
    name = "float32" if smallest == 4 else "float16"
    return 16 * max(_growth(operation, seed, fixed), 1.0) * UNITS[name], name


@functools.lru_cache(1000)
def _growth(operation: str, seed: int, fixed: tuple[Any, ...]) -> float:
    """Return the largest relative error of npbn's operation in float32, in units of 2⁻²⁴."""
    truth = given(operation, (), seed, fixed)
    worst = 0.0
    for probe in probes(operation, seed):
        if probe.beyond:
            continue
        low = {
            name: value.astype(np.float32)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f"
            else value
            for name, value in (probe.arguments | dict(fixed)).items()
            if name in probe.arguments
        }
        with np.errstate(all="ignore"), contextlib.suppress(Exception):
            pair = functions_of(operation)
            found = outputs(operation, pair, Probe(probe.name, low), seed)
            errors = [difference(found[name], truth[probe.name][name]) for name in found]
            worst = max([worst, *(e for e in errors if math.isfinite(e))])
    return worst / UNITS["float32"]


def _of_its_kind(
    operation: str, results: Mapping[str, Ran], facts: Facts, seed: int
) -> dict[str, Ran]:
    """Return the results. If code is only for one shape of x, those of the other shape are skipped.

    The shapes are (N, D) and (N, C, H, W), for batch norm. A skipped result has no outputs.
    """
    found = dict(results)
    if not OPERATIONS[operation].map_layouts:
        return found
    groups: dict[int, list[str]] = {}
    right = given(operation, (), seed)
    for probe in probes(operation, seed):
        if probe.name in results and not probe.beyond:
            groups.setdefault(probe.arguments["x"].ndim, []).append(probe.name)
    for ndim, names in groups.items():
        others = [
            name for other, found_names in groups.items() if other != ndim for name in found_names
        ]
        fails = all(not results[n].outputs for n in names)

        def close(name: str) -> bool:
            # The code may have another eps, which matters if the variance is small. With few
            # examples, the variance may be small by chance.
            y = results[name].outputs.get("y", np.empty(0))
            bound = 0.1 if right[name]["y"].ndim == 4 else 0.5
            return "small" in name or difference(y, right[name]["y"]) < bound

        # If code for (N, D) gets (N, C, H, W), broadcasting may give wrong numbers, not an error.
        vectors = facts.is_class or any(results[n].layout == "gamma (D,)" for n in others)
        odd = vectors and any(results[n].failure or not close(n) for n in names)
        works = any(results[n].outputs and not results[n].failure for n in others)
        if not fails:
            works = works and all(close(n) for n in others if results[n].outputs)
        if works and (fails or odd) and not any(results[n].ended for n in names):
            text = "homework is for (N, D)" if ndim == 4 else "homework is for (N, C, H, W)"
            for probe in probes(operation, seed):
                if probe.arguments["x"].ndim == ndim and probe.name in found:
                    found[probe.name] = Ran(skipped=text)
    return found


def meant_results(
    operation: str, results: Mapping[str, Ran], facts: Facts, seed: int
) -> dict[str, Ran]:
    """Return the results for the probes (inputs) that the code is meant for.

    An optional probe is left out if the code fails there, or if its output is wrong.
    """
    found = _of_its_kind(operation, results, facts, seed)
    right = given(operation, (), seed)
    for probe in probes(operation, seed):
        result = found.get(probe.name)
        if not probe.optional or result is None:
            continue
        y = result.outputs.get("y")
        if (
            y is None
            or (facts.is_class and result.failure)
            or (not probe.beyond and difference(y, right[probe.name]["y"]) > WRONG)
        ):
            del found[probe.name]
    return found


def _without_outputs(
    operation: str, results: Mapping[str, Ran], notes: tuple[str, ...]
) -> Examination:
    """Return the examination of code that gave no output on any probe."""
    failed = {name: r for name, r in results.items() if r.failure}
    if not failed:
        reasons = dict.fromkeys(r.skipped for r in results.values())
        return Examination(operation, UNDECIDED, math.nan, complaints=tuple(reasons), notes=notes)
    everywhere = len({r.failure for r in failed.values()}) == 1
    complaints = {
        r.failure: f"it {r.failure}" + f" ({name})" * (not everywhere)
        for name, r in reversed(failed.items())
    }
    verdict = "could not be run"
    if all(r.unwritten for r in failed.values()):
        verdict = UNWRITTEN
    elif any(r.needs for r in failed.values()):
        verdict = UNLOADED
    elif all(r.uncalled for r in failed.values()):
        verdict = UNDECIDED
    lines = tuple(reversed(complaints.values()))
    state = UNWRITTEN if verdict == UNWRITTEN else "not examined"
    return Examination(operation, verdict, math.inf, state, state, lines, notes=notes)


def _conventions(
    operation: str, ran: Given, facts: Facts, seed: int, columns: bool, beyond: Collection[str]
) -> tuple[tuple[tuple[str, float], ...], tuple[Mutant, ...]]:
    """Return the fixed values and the conventions of the code.

    They are those with which npbn's outputs agree with most outputs of the code. Of several
    combinations that agree equally well, the one with the fewest conventions is returned.
    """
    first = probes(operation, seed)[0].arguments
    fixed: tuple[tuple[str, float], ...] = ()
    known = [m for m in CONVENTIONS if m.operation == plain_name(operation)]

    def distance(output: str, values: tuple[tuple[str, float], ...]) -> float:
        """Return the sum of an output's errors over all probes, for the best convention."""
        return min(
            sum(
                min(1.0, difference(found[output], right[probe][output]))
                for probe, found in ran.items()
                if output in found and output in right.get(probe, {})
            )
            for convention in ((), *((m,) for m in known))
            if (right := given(operation, convention, seed, values))
        )

    for name, values in FIXED.items():
        output = "moving_mean" if name == "momentum" else "y"
        if (
            name in first
            and name not in facts.taken
            and facts.taken
            and any(output in found for found in ran.values())
        ):
            choices = [(*fixed, (name, value)) for value in values]
            fixed = min(choices, key=functools.partial(distance, output))
    candidates = known
    if not columns and not facts.is_class:
        candidates = [m for m in candidates if m.name != "means over the batch"]
    if not facts.without_dy:
        candidates = [m for m in candidates if m.name != "the gradient of the sum"]

    def wrong(base: tuple[Mutant, ...]) -> float:
        right = given(operation, base, seed, fixed)
        if not ran.keys() <= right.keys():
            # npbn's code with these conventions fails on a probe on which the examined code runs.
            return math.inf
        return sum(
            3 if name == "y" else 1  # y counts more: it decides which gradients are right.
            for probe, found in ran.items()
            for name, value in found.items()
            if name not in right[probe] or not difference(value, right[probe][name]) <= WRONG
        )

    def close(base: tuple[Mutant, ...]) -> int:
        """Return how many outputs have an error of at most `RIGHT`."""
        right = given(operation, base, seed, fixed)
        return sum(
            name in right.get(probe, {}) and difference(value, right[probe][name]) <= RIGHT
            for probe, found in ran.items()
            if probe not in beyond
            for name, value in found.items()
        )

    best: tuple[Mutant, ...] = ()
    fewest, most = wrong(best), close(best)
    total = sum(len(found) for probe, found in ran.items() if probe not in beyond)
    for size in (1, 2, 3):
        if fewest == 0 and most == total:
            break
        for base in itertools.combinations(candidates, size):
            count, exact = wrong(base), close(base)
            if exact >= most and (count, -exact) < (fewest, -most):
                best, fewest, most = base, count, exact
    return fixed, best


def _broken(
    results: Mapping[str, Ran],
    errors: Mapping[tuple[str, str], float],
    beyond: Mapping[str, str],
) -> dict[str, bool]:
    """Return the demands beyond the usual ones, such as "padding", that the code does not meet.

    The value of a demand is True if the gradients are wrong although y is right. Only the demands
    in `STRUCTURE` can have the value True.
    """
    found: dict[str, bool] = {}
    for probe, demand in beyond.items():
        result = results.get(probe)
        if result is None or (result.skipped and not result.outputs) or result.refusal:
            continue
        wrong = {name for (p, name), e in errors.items() if p == probe and e > WRONG}
        if result.failure or wrong:
            known = "y" not in wrong and all(errors[probe, name] < math.inf for name in wrong)
            forward = known and not result.failure and demand in STRUCTURE
            found[demand] = found.get(demand, False) or forward
    return found


def _right_under(
    operation: str,
    results: Mapping[str, Ran],
    errors: Mapping[Place, float],
    failures: Mapping[str, Ran],
    seed: int,
) -> list[str]:
    """Return a sentence for each promise (`PROMISES`) that makes the code right.

    With such a promise, an assignment restricts its inputs, for example to a padding of at least 1.
    """
    bad = {probe for (probe, _), error in errors.items() if error > WRONG} | set(failures)
    good = {probe for probe, _ in errors} - bad
    found = []
    for promise, keeps in PROMISES.items():
        kept = {probe.name for probe in probes(operation, seed) if keeps(probe)}
        broken = any(name not in kept for name in results)
        if broken and good & kept and not bad & kept:
            found.append(f"it is right on all probes that keep to: {promise}")
    return found


def _forward_verdict(wrong: Sequence[str], names: Sequence[str]) -> str:
    if {"y", "moving_mean", "moving_var"} & set(wrong):
        return "wrong"
    return "right" if "y" in names else "not examined"


def _backward_verdict(
    operation: str,
    verdict: str,
    wrong: Sequence[str],
    names: Sequence[str],
    facts: Facts,
    unwritten: bool,
    failed: bool,
) -> str:
    gradients = [g for g in OPERATIONS[operation].gradients if g in names]
    if unwritten or (verdict == UNWRITTEN and set(wrong) & set(gradients)):
        return UNWRITTEN
    if not gradients:
        return "wrong" if failed else "not examined"
    if facts.own_gradient:
        return "right" if all(facts.own_gradient.values()) else "wrong"
    return "wrong" if set(gradients) & set(wrong) or facts.state else "right"


def _unexamined(results: Mapping[str, Ran]) -> list[str]:
    places: dict[str, list[str]] = {}
    for probe, result in results.items():
        if result.skipped:
            what = "backward not examined" if result.outputs else "not examined"
            places.setdefault(f"{what}, as {result.skipped}", []).append(probe)
        elif result.refusal:
            places.setdefault(f"not examined, as it {result.failure}", []).append(probe)
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


Place = tuple[str, str]
"""The name of a probe and the name of an output."""
Variant = Callable[[tuple[Mutant, ...]], Given]
"""A function that maps a combination of mistakes to the outputs of code with these mistakes."""


def _other_order(
    operation: str, ran: Given, truth: Given, errors: Mapping[Place, float]
) -> list[str]:
    """Return sentences if the gradients are right except for their order, signs or shapes."""
    gradients = OPERATIONS[operation].gradients
    places = [probe for probe, found in ran.items() if all(g in found for g in gradients)]
    if not places:
        return []
    for order in itertools.permutations(gradients):
        if order != gradients and all(
            difference(ran[probe][name].ravel(), truth[probe][true].ravel()) <= WRONG
            for probe in places
            for name, true in zip(gradients, order, strict=True)
        ):
            return [f"the gradients are right, but in another order: {', '.join(order)}"]
    said = []
    for name in gradients:
        wrong = [p for p in places if errors[p, name] > WRONG]
        if not wrong:
            continue
        if all(difference(-ran[p][name], truth[p][name]) <= WRONG for p in places):
            said.append(f"{name} has the wrong sign")
        elif all(
            ran[p][name].size == truth[p][name].size
            and ran[p][name].shape != truth[p][name].shape
            and difference(ran[p][name].ravel(), truth[p][name].ravel()) <= WRONG
            for p in wrong
        ):
            said.append(f"{name} has the right numbers in another shape")
        elif (
            all(
                ran[p][name].size == 1
                and abs(float(np.sum(ran[p][name]) - np.sum(truth[p][name]))) < 1e-6
                for p in wrong
            )
            and ran[wrong[0]][name].shape != truth[wrong[0]][name].shape
        ):
            said.append(f"{name} is summed over all axes: an axis is missing")
    unexplained = [n for (p, n), e in errors.items() if e > WRONG and p in ran]
    if said and len(said) >= len(set(unexplained)):
        return said
    return []


def _fully(
    operation: str,
    ran: Given,
    errors: Mapping[Place, float],
    base: tuple[Mutant, ...],
    variant: Variant,
) -> tuple[tuple[Mutant, ...], ...]:
    """Return the mutants, or else the pairs of mutants, that give the same results as the code.

    The mutants are combined with the conventions ``base`` first, and then with no convention.
    """
    for conventions in dict.fromkeys((base, ())):
        matching = _matching(operation, ran, errors, conventions, variant)
        if matching:
            return tuple(matching)
    return ()


def _in_part(
    operation: str,
    ran: Given,
    errors: Mapping[Place, float],
    base: tuple[Mutant, ...],
    variant: Variant,
) -> tuple[tuple[Mutant, ...], ...]:
    """Return an explanation of wrong results that no mutant and no pair of mutants fully explains.

    For each wrong output, a mutant or a pair that gives this output is chosen, if there is one. The
    explanation is the union of the chosen mutants.
    """
    truth = variant(base)
    chosen: dict[Mutant, None] = {}
    for name in dict.fromkeys(name for (_, name), error in errors.items() if error > WRONG):
        places = [place for place, error in errors.items() if place[1] == name and error > WRONG]
        matching = _matching(operation, ran, places, base, variant)
        if matching:  # Choose the mutants that make the fewest other outputs wrong.
            elsewhere = [
                sum(
                    difference(value, truth[probe][other]) > WRONG
                    for probe, found in variant((*base, *c)).items()
                    for other, value in found.items()
                    if other != name
                )
                for c in matching
            ]
            chosen |= dict.fromkeys(matching[elsewhere.index(min(elsewhere))])
    return (tuple(chosen),) if chosen else ()


def _matching(
    operation: str,
    ran: Given,
    places: Iterable[Place],
    base: tuple[Mutant, ...],
    variant: Variant,
) -> list[tuple[Mutant, ...]]:
    """Return the mutants, or else the pairs, that agree with the code on the outputs ``places``."""
    places = list(places)
    candidates = [m for m in MUTANTS if m.operation == plain_name(operation)]
    matching: list[tuple[Mutant, ...]] = []
    for size in (1, 2):
        for combination in itertools.combinations(candidates, size):
            found = variant((*base, *combination))
            if all(
                name in found.get(probe, {}) and _equal(ran[probe][name], found[probe][name])
                for probe, name in places
            ):
                matching.append(combination)
        if matching:
            break
    return matching


def _equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two outputs are equal, apart from rounding errors of float32 or float64."""
    if found.shape != expected.shape or found.dtype.kind not in "fiub":
        return False
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return False
    scale = max(1.0, float(np.max(np.abs(expected[finite]), initial=0.0)))
    return bool(np.all(np.abs(found[finite] - expected[finite]) <= WRONG * scale))
