"""The catalogue of mistakes: every one is caught, named, and none of the true functions is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from npbn.verify.examination import examine, outputs
from npbn.verify.mutants import BATCH_NORM, CONV2D, MUTANTS, functions_of, mutant
from npbn.verify.operations import OPERATIONS, probes, true_functions


def results(operation, forward, backward):
    """What two functions give on every probe, or how they fail."""
    found = {}
    for probe in probes(operation):
        try:
            with np.errstate(all="ignore"):
                found[probe.name] = outputs(operation, (forward, backward), probe)
        except Exception as error:
            found[probe.name] = f"raised {type(error).__name__}: {error}"
    return found


def label(entry) -> str:
    return f"{entry.operation}: {entry.name}"


def test_the_catalogue_is_large_and_its_names_are_unique():
    assert len(MUTANTS) >= 40
    assert len({label(entry) for entry in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_plain_and_the_shipped_functions_are_right(operation):
    for pair in (functions_of(operation), true_functions(operation)):
        examined = examine(operation, results(operation, *pair))
        assert examined.verdict == "right", str(examined)
        assert examined.error < 1e-14
        assert "is right, to 1" in str(examined)


@pytest.mark.parametrize("entry", MUTANTS, ids=label)
def test_every_mutant_is_caught_and_named(entry):
    examined = examine(entry.operation, results(entry.operation, *entry.functions))
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
        examined = examine(operation, results(operation, *functions))
        assert examined.verdict == "wrong", [entry.name for entry in pair]
        named = {entry for combination in examined.mistakes for entry in combination}
        same_effect = results(operation, *functions)
        assert named & set(pair) or _same_as_one(operation, named, same_effect), [
            entry.name for entry in pair
        ]


def _same_as_one(operation, named, found) -> bool:
    """Two mistakes may amount to a third, or leave nothing that could run."""
    if all(isinstance(value, str) for value in found.values()):
        return True
    for entry in named:
        given = results(operation, *entry.functions)
        for probe, expected in given.items():
            if isinstance(found[probe], str) != isinstance(expected, str):
                return False
            if isinstance(expected, str):
                continue
            for name, value in expected.items():
                if not np.allclose(found[probe][name], value, equal_nan=True):
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
