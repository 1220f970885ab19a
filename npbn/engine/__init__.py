"""Engines train and evaluate a model: one interface, three engines, and the choice among them.

`LayersEngine` (`npbn.engine.layers`) is the textbook loop over the layers, on any array library;
the fused engines plan the same mathematics into stages (`npbn.engine.plan`): `npbn.engine.cpu` for
NumPy's arrays, `npbn.engine.gpu` for CuPy's. The layers are their specification (``tests/engine``).

    engine = build("auto", model, optimizer, train, test, batch_size=256, backend=backend)
    for result in engine.steps(order):
        print(float(result.loss))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from npbn.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from npbn.backend import Backend
    from npbn.data import Split
    from npbn.layers import Sequential
    from npbn.optim import SGD

KINDS = ("auto", "layers", "fused")


class Result(NamedTuple):
    """The result of one batch, or of several that ran together.

    Attributes:
        examples: how many there were.
        loss: their mean loss; may still be on the device.
        correct: how many were classified right; likewise.
    """

    examples: int
    loss: Any
    correct: Any


class Engine(Protocol):
    """A model with its optimizer and its data, ready to be trained and evaluated.

    Parameters, gradients, velocities and moving averages are those of the layers and the optimizer,
    before and after every step.

    Attributes:
        kind: "layers" or "fused".
        description: what computes, "by layers" for instance.
    """

    kind: str
    description: str

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on these examples, in this order, with a step of the optimizer for each batch.

        Every layer stays in the mode that it is in; a batch norm in prediction mode is frozen. A
        caller that stops iterating stops the training. Nothing here waits for the device.

        Args:
            order: indices of training examples. The last batch may be smaller.

        Yields:
            One `Result` for one batch or several, after the steps on them.
        """

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode; the mode of every layer is kept.

        Yields:
            One `Result` for one batch or several.
        """


def build(
    kind: str,
    model: Sequential,
    optimizer: SGD,
    train: Split,
    test: Split,
    *,
    batch_size: int,
    backend: Backend,
    threads: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Engine:
    """Return the engine of this kind for a model: the only place that chooses.

    Args:
        kind: "layers"; "fused", the fused engine of the backend; or "auto", the fused engine where
            it can train this model, else layers. On a GPU, "auto" is layers.
        model, optimizer, train, test: all on ``backend``.
        batch_size: of training.
        backend: from `npbn.backend.get_backend`.
        threads: of the fused engine on the CPU; every CPU that this process may use unless given.
        report: called with lines to show while the fused engine on the CPU compiles its kernels,
            which happens once.

    Raises:
        ValueError: no such kind, or what the model's own forward pass would raise.
        TypeError: what the model's own forward pass would raise.
        UnsupportedError: the fused engine is asked for and cannot train this model, or cannot run
            on this machine.
        BackendError: the GPU cannot run the fused engine.
    """
    if kind not in KINDS:
        raise ValueError(f"expected an engine of {', '.join(KINDS)}, got {kind!r}")
    reason = ""
    if kind == "fused" or (kind == "auto" and backend.name == "numpy"):
        try:
            return _fused(model, optimizer, train, test, batch_size, backend, threads, report)
        except UnsupportedError as error:
            if kind == "fused":
                raise
            reason = str(error)

    from npbn.engine.layers import LayersEngine

    return LayersEngine(
        model, optimizer, train, test, batch_size=batch_size, backend=backend, reason=reason
    )


def _fused(
    model: Sequential,
    optimizer: SGD,
    train: Split,
    test: Split,
    batch_size: int,
    backend: Backend,
    threads: int | None,
    report: Callable[[str], None] | None,
) -> Engine:
    if backend.name == "numpy":
        from npbn.engine.cpu import CpuEngine

        return CpuEngine(
            model, optimizer, train, test, batch_size=batch_size, threads=threads, report=report
        )
    if backend.name == "cupy":
        from npbn.engine.gpu import GpuEngine

        return GpuEngine(model, optimizer, train, test, batch_size=batch_size)
    raise UnsupportedError(f"there is no fused engine for the backend {backend.name}")
