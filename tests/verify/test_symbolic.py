"""SymPy derives the gradient of batch norm from the forward formula; the shipped code equals it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import sympy

from npbn import functional as F

module = sys.modules["npbn.functional.batch_norm"]  # the function hides the module of its name


@pytest.mark.parametrize("training", [True, False], ids=["training", "prediction"])
@pytest.mark.parametrize(
    "backward", [F.batch_norm_backward, F.batch_norm_backward_staged], ids=["closed", "staged"]
)
def test_batch_norm_backward_equals_the_derivative_symbolically(backward, training, monkeypatch):
    """The shipped function itself runs, on arrays of symbols instead of numbers."""
    n = 3
    x = sympy.symbols(f"x:{n}", real=True)
    dy = sympy.symbols(f"dy:{n}", real=True)
    gamma, beta, mean = sympy.symbols("gamma beta mu", real=True)
    var, eps = sympy.symbols("v epsilon", positive=True)
    if training:
        mean = sum(x) / n
        var = sum((value - mean) ** 2 for value in x) / n
    s = sympy.sqrt(var + eps)
    loss = sum(d * (gamma * (value - mean) / s + beta) for d, value in zip(dy, x, strict=True))

    def column(values) -> np.ndarray:
        return np.array(values, dtype=object).reshape(-1, 1)

    monkeypatch.setattr(module, "common_namespace", lambda **arrays: np)  # symbols have no dtype
    cache = module.BatchNormCache(
        column([value - mean for value in x]), column([s]), column([gamma]), training
    )
    dx, dgamma, dbeta = backward(column(dy), cache)
    for found, variable in zip(dx.ravel(), x, strict=True):
        assert sympy.simplify(found - sympy.diff(loss, variable)) == 0
    assert sympy.simplify(dgamma.item() - sympy.diff(loss, gamma)) == 0
    assert sympy.simplify(dbeta.item() - sympy.diff(loss, beta)) == 0
