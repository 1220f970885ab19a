"""The catalogue of mistakes: every one is caught, named, and none of the true functions is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from judging import SEED, judged, results
from npbn import functional as F
from npbn.verify import check_gradients
from npbn.verify.examination import CONVENTION
from npbn.verify.mutants import BATCH_NORM, CONV2D, CONVENTIONS, MUTANTS, functions_of, mutant
from npbn.verify.operations import KINKS, OPERATIONS, probes, true_functions


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not hasattr(F, name)])
def test_the_gradients_of_operations_that_only_the_grader_has(operation):
    """They are compared with nothing else."""
    forward, backward = functions_of(operation)
    record = OPERATIONS[operation]
    for probe in probes(operation, SEED):
        wanted = [gradient[1:] for gradient in record.gradients]
        if probe.beyond in ("a mean of 1e8",):
            continue
        inputs = {name: probe.arguments[name] for name in wanted}
        constants = {k: v for k, v in probe.arguments.items() if k not in wanted}
        pair = backward
        if record.loss:

            def pair(dy, cache):
                return dy * backward(cache)

        report = check_gradients(forward, pair, inputs, constants=constants)
        assert report.ok, str(report)


def label(entry) -> str:
    return f"{entry.operation}: {entry.name}"


def test_the_catalogue_is_large_and_its_names_are_unique():
    assert len(MUTANTS) >= 40
    assert len({label(entry) for entry in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_plain_and_the_shipped_functions_are_right(operation):
    for pair in (functions_of(operation), true_functions(operation)):
        examined = judged(operation, *pair)
        assert examined.verdict == "right", str(examined)
        assert examined.error < 1e-12
        assert "is right, to " in str(examined)


CONDITIONAL = ("means over the batch", "the gradient of the sum")
"""Conventions of some families only. Elsewhere, they are mistakes."""


def is_convention(entry) -> bool:
    same = [known for known in CONVENTIONS if known.changes == entry.changes]
    return any(known.name not in CONDITIONAL for known in same)


@pytest.mark.parametrize("entry", CONVENTIONS, ids=label)
def test_a_convention_is_named_and_its_backward_pass_is_the_gradient(entry):
    examined = judged(entry.operation, *entry.functions)
    if entry.name in CONDITIONAL:
        assert examined.verdict == "wrong"
        return
    assert examined.verdict == CONVENTION, str(examined)
    assert examined.conventions == (entry.name,)
    if entry.name.startswith("log(p"):
        return  # The gradient is that of log p, which is close to it.
    forward, backward = entry.functions
    record = OPERATIONS[entry.operation]
    for probe in probes(entry.operation, SEED):
        if probe.beyond or probe.name in KINKS:
            continue
        wanted = [gradient[1:] for gradient in record.gradients]
        inputs = {name: probe.arguments[name] for name in wanted}
        constants = {k: v for k, v in probe.arguments.items() if k not in wanted}

        def with_dy(dy, cache):
            if not record.loss:
                return backward(dy, cache)
            gradient = backward(cache)
            mean = entry.name.endswith("of their mean")
            return gradient * (dy if np.ndim(dy) == 0 else dy[:, None] * (len(dy) if mean else 1))

        assert check_gradients(forward, with_dy, inputs, constants=constants).ok


@pytest.mark.parametrize("entry", MUTANTS, ids=label)
def test_every_mutant_is_caught_and_named(entry):
    examined = judged(entry.operation, *entry.functions)
    if is_convention(entry):
        assert (examined.verdict, examined.conventions) == (CONVENTION, (entry.name,))
        return
    assert examined.verdict == "wrong"
    assert (entry,) in examined.mistakes
    assert entry.explanation in str(examined)


@pytest.mark.parametrize("operation", ["batch_norm", "conv2d"])
def test_two_mistakes_at_once_are_never_right_and_one_is_named(operation):
    """Every pair that can be combined; for those that cancel each other, right is the truth."""
    entries = [entry for entry in MUTANTS if entry.operation == operation]
    rng = np.random.default_rng(0)
    pairs = list(itertools.combinations(entries, 2))
    for k in rng.permutation(len(pairs))[:40]:
        pair = pairs[k]
        try:
            functions = functions_of(operation, pair)
        except ValueError:
            continue  # both change the same line
        if all(is_convention(entry) for entry in pair):
            continue
        examined = judged(operation, *functions)
        assert examined.verdict == "wrong", [entry.name for entry in pair]
        named = {entry for combination in examined.mistakes for entry in combination}
        named |= {entry for entry in pair if entry.name in examined.conventions}
        same_effect = results(operation, *functions)
        assert named & set(pair) or _same_as_one(operation, named, same_effect), [
            entry.name for entry in pair
        ]


def _same_as_one(operation, named, found) -> bool:
    """Two mistakes may amount to a third, or leave nothing that could run."""
    if all(ran.failure for ran in found.values()):
        return True
    for entry in named:
        for probe, expected in results(operation, *entry.functions).items():
            if bool(found[probe].failure) != bool(expected.failure):
                return False
            for name, value in expected.outputs.items():
                if not np.allclose(found[probe].outputs[name], value, equal_nan=True):
                    return False
        return True
    return False


def test_a_change_has_to_fit_the_source():
    with pytest.raises(ValueError, match=r"expected 'no such line' once in plain\.py"):
        mutant("linear", "x", "y", ("no such line", ""))
    with pytest.raises(ValueError, match="cannot be combined"):
        functions_of("batch_norm", BATCH_NORM[:2])


def test_a_mutant_is_a_file_of_plain_numpy():
    source = CONV2D[0].source
    assert source.startswith("import numpy as np\n")
    assert "npbn" not in source
    assert "def conv2d(" in source and "def conv2d_backward(" in source
