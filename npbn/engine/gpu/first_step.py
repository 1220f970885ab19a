"""Compare a step of the GPU engine with the same step by layers, before a training begins.

The engine's kernels cannot be tested on every GPU, driver and compiler. So `npbn.engine.build`
chooses the engine only if this comparison holds. The two steps also let CuPy compile the kernels
that a step needs, before the time of the first epoch begins.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from npbn.backend import Backend, to_numpy
from npbn.engine import Engine
from npbn.layers import Sequential, dtype_of, modes_kept
from npbn.optim import SGD

BOUNDS = {"float32": 1e-3, "float64": 1e-9}
"""The bounds of `difference` for each dtype. A step of LeNet in float32 differs by about 1e-6."""


def first_step(
    engine: Engine, model: Sequential, optimizer: SGD, backend: Backend, examples: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return what one step of an engine computes.

    Afterwards, the parameters, the moving averages and the optimizer are as before, and there are
    no gradients.

    Args:
        engine: the engine of this model and this optimizer.
        model, optimizer, backend: as in `npbn.engine.build`.
        examples: the number of examples in the batch: the first examples of the data.

    Returns:
        The loss, the gradient and the state after the step, each as arrays by name.
    """
    state, steps = model.state_dict(), optimizer.steps
    velocity = {name: to_numpy(value) for name, value in optimizer.velocity.items()}
    with modes_kept(model):
        if not model.training:
            model.train()
        (result,) = engine.steps(np.arange(examples))
    parameters = model.parameters()
    found = {
        "loss": {"loss": np.array(float(result.loss))},
        "gradient": {name: to_numpy(p.gradient) for name, p in parameters.items()},
        "state": model.state_dict(),
    }
    model.load_state_dict(state)
    for parameter in parameters.values():
        parameter.gradient = None
    optimizer.steps = steps
    optimizer.velocity = {name: backend.asarray(value) for name, value in velocity.items()}
    return found


def largest_error(found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """Return the largest error of some arrays over the largest absolute value in ``right``."""
    largest = max(float(np.max(np.abs(value))) for value in right.values())
    # NumPy's max is NaN if an error is NaN; Python's max may not be.
    errors = [np.max(np.abs(found[name] - value)) for name, value in right.items()]
    return float(np.max(errors)) / largest


def difference(
    found: Mapping[str, Mapping[str, np.ndarray]],
    right: Mapping[str, Mapping[str, np.ndarray]],
    model: Sequential,
) -> str:
    """Return in words how two results of `first_step` differ; "" if they agree.

    They agree if the `largest_error` of the loss, of the gradients and of the state is at most the
    bound (`BOUNDS`).
    """
    bound = BOUNDS[dtype_of(model)]
    for kind, arrays in right.items():
        error = largest_error(found[kind], arrays)
        if not error <= bound:  # With `not`, a NaN counts as too large.
            return (
                f"in the first step, the {kind} of the fused engine differs from that of "
                f"the layers by {error:.1e} (bound {bound:.0e})"
            )
    return ""


@contextlib.contextmanager
def saying_if_slow(report: Callable[[str], None] | None, line: str) -> Iterator[None]:
    """Report a line if the code inside takes longer than half a second."""
    timer = threading.Timer(0.5, report or (lambda _: None), [line])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
