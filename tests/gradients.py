"""Gradients by the complex step, and the comparison with those that a backward pass gives.

f'(x) = Im f(x + ih) / h has no subtraction, so h can be so small (1e-30) that the truncation error
vanishes: what remains is the rounding of f itself. It needs a forward pass that is analytic in
complex numbers, which those of npbn.functional are, so what is checked is the code that trains.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cases import EPS64, Case

STEP = 1e-30


def jacobian(case: Case, name: str) -> np.ndarray:
    """∂y / ∂(input ``name``), of shape (input elements, y elements)."""
    x = case.inputs[name]
    rows = []
    for i in range(x.size):
        stepped = x.astype(np.complex128)
        stepped.flat[i] += 1j * STEP
        y = case.forward(**(case.inputs | {name: stepped}), **case.constants)[0]
        rows.append(np.imag(np.asarray(y)).ravel() / STEP)
    return np.array(rows)


def check_gradients(case: Case, backward: Callable | None = None, seed: int = 0) -> None:
    """Assert that the backward pass agrees with the complex step, for a random upstream gradient.

    The error is measured against the larger of the largest element of the gradient and the largest
    sum of *absolute* terms that forms an element: where the terms cancel, as in the gradient by a
    bias that batch norm subtracts again, the result is rounding noise of their size. So it is where
    the backward pass itself subtracts (``Case.formed_from``).

    Bound: each element is a sum of at most y.size products, whose rounding is at most y.size · eps
    of that scale, times the condition of the operation; the factor 8 is for the handful of
    roundings in each product.
    """
    y, cache = case.forward(**case.inputs, **case.constants)[:2]
    dy = np.random.default_rng(seed).standard_normal(np.shape(y))
    gradients = (backward or case.backward)(dy, cache)
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    gradients = tuple(g for g in gradients if g is not None)
    assert len(gradients) == len(case.inputs), "one gradient for each input"
    for (name, value), gradient in zip(case.inputs.items(), gradients, strict=True):
        assert gradient.shape == value.shape, f"d{name} has the shape of {name}"
        terms = jacobian(case, name) * dy.ravel()
        numeric = terms.sum(axis=1).reshape(value.shape)
        scale = max(np.abs(terms).sum(axis=1).max(), case.formed_from * np.abs(dy).max())
        error = np.abs(gradient - numeric).max()
        bound = 8 * y.size * case.condition * EPS64 * scale
        assert error <= bound, (
            f"d{name} is off by {error:.2e}, bound {bound:.2e}, scale {scale:.2e}"
        )
