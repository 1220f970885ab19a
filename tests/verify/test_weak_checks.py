"""Which mistakes the usual weak gradient checks do not see: the table in npbn/verify/README.md.

``PYTHONPATH=tests python tests/verify/test_weak_checks.py`` prints the table anew.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from judging import SEED, judged
from npbn.verify import check_gradients
from npbn.verify.mutants import MUTANTS, Mutant, functions_of
from npbn.verify.operations import OPERATIONS, Probe, probes

README = Path(__file__).parents[2] / "npbn" / "verify" / "README.md"
START, END = "<!-- weak checks: begin -->\n", "<!-- weak checks: end -->"


CHECKED = list(dict.fromkeys(mutant.operation for mutant in MUTANTS))


def ordinary(operation: str) -> list[Probe]:
    """The probes on which right code passes every check: not those at the edge of the numbers."""
    words = ("ties", "close", "zeros", "small variance", "1e8", "800", "rows at", "confident", "d1")
    found = [p for p in probes(operation, SEED) if not any(word in p.name for word in words)]
    return [p for p in found if p.name != "stride 1"]


def agrees(
    operation, pair, *, ones=False, batch=None, eps=None, dtype="float64", step=1e-6, bound=1e-6
) -> bool:
    """A gradient check by central differences: as everybody writes it, but for what is passed.

    It is right where the error is at most ``bound`` of the largest element (or of 1).
    """
    forward, backward = pair
    for probe in ordinary(operation):
        arguments = dict(probe.arguments)
        if batch == 1 and operation == "batch_norm" and arguments["x"].ndim == 4:
            continue  # one image is a batch of its pixels
        if eps is not None and "eps" in arguments:
            arguments["eps"] = eps
        for name, value in arguments.items():
            if name in ("x", "logits", "labels", "mask", "indices", "hidden"):
                arguments[name] = value = value[:batch]
            if isinstance(value, np.ndarray) and value.dtype == np.float64:
                arguments[name] = value.astype(dtype)
        y, cache = forward(**arguments)[:2]
        dy = np.ones_like(y) if ones else np.random.default_rng(0).standard_normal(np.shape(y))
        is_loss = OPERATIONS[operation].loss
        gradients = backward(cache) if is_loss else backward(dy, cache)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for gradient, analytic in zip(OPERATIONS[operation].gradients, gradients, strict=True):
            name = gradient[1:]
            numeric = np.empty(arguments[name].shape)
            for i in np.ndindex(numeric.shape):
                sides = []
                for h in (step, -step):
                    moved = arguments[name].copy()
                    moved[i] += h
                    y = forward(**{**arguments, name: moved})[0]
                    sides.append(float(np.sum(y if is_loss else y * dy)))
                numeric[i] = (sides[0] - sides[1]) / (2 * step)
            if np.shape(analytic) != numeric.shape:
                return False
            error = np.max(np.abs(analytic - numeric), initial=0)
            if not error <= bound * max(1.0, np.max(np.abs(numeric))):
                return False
    return True


def passes_check_gradients(operation, pair) -> bool:
    forward, backward = pair
    for probe in ordinary(operation):
        inputs = {
            gradient[1:]: probe.arguments[gradient[1:]]
            for gradient in OPERATIONS[operation].gradients
        }
        constants = {k: v for k, v in probe.arguments.items() if k not in inputs}
        if OPERATIONS[operation].loss:
            report = check_gradients(
                forward, lambda dy, cache: dy * backward(cache), inputs, constants=constants
            )
        else:
            report = check_gradients(forward, backward, inputs, constants=constants)
        if not report.ok:
            return False
    return True


def passes_examination(operation, pair) -> bool:
    """What check_gradients.py does with somebody's file, here without the file."""
    return judged(operation, *pair).verdict == "right"


LOOSE = {"dtype": "float32", "step": 1e-2, "bound": 3e-2, "eps": 1e-5}

CHECKS = {
    "examination": passes_examination,
    "`check_gradients`": passes_check_gradients,
    "dy of ones": functools.partial(agrees, ones=True),
    "batch of 1": functools.partial(agrees, batch=1),
    "float32, loose bound": functools.partial(agrees, **LOOSE),
}


@functools.cache
def caught(mutant: Mutant, check: str) -> bool:
    try:
        with np.errstate(all="ignore"):
            return not CHECKS[check](mutant.operation, mutant.functions)
    except Exception:  # it cannot even run: whoever checks it sees that
        return True


def table() -> str:
    lines = [
        f"| operation | mistake | {' | '.join(CHECKS)} |",
        "| --- | --- |" + " :-: |" * len(CHECKS),
    ]
    for mutant in MUTANTS:
        cells = ("caught" if caught(mutant, check) else "**missed**" for check in CHECKS)
        lines.append(f"| {mutant.operation} | {mutant.name} | {' | '.join(cells)} |")
    counts = (sum(caught(mutant, check) for mutant in MUTANTS) for check in CHECKS)
    lines.append(f"| | **caught of {len(MUTANTS)}** | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_comes_out():
    text = README.read_text(encoding="utf-8")
    assert text[text.index(START) + len(START) : text.index(END)] == table()


def test_the_weak_checks_miss_what_they_are_known_to_miss():
    missed = {
        check: {mutant.name for mutant in MUTANTS if not caught(mutant, check)} for check in CHECKS
    }
    # Σy of a normalized x does not depend on x: dx is 0 whatever the variance path is.
    assert {"without the variance path", "variance path twice as large"} <= missed["dy of ones"]
    # With one example x̂ is 0, and a sum is a mean.
    assert {"without the variance path", "dgamma a mean"} <= missed["batch of 1"]
    # eps is 1e-5 of the variance.
    assert {"eps left out of the backward pass", "eps left out"} <= missed["float32, loose bound"]
    # The backward pass is the gradient of the forward pass, which is not the one that was meant.
    assert {"momentum reversed", "moving variance unbiased"} <= missed["`check_gradients`"]
    assert not missed["examination"]


def test_no_check_rejects_what_is_right():
    for operation in CHECKED:
        for name, passes in CHECKS.items():
            assert passes(operation, functions_of(operation)), (operation, name)


if __name__ == "__main__":
    print(table(), end="")
