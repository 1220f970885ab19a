"""Define the interface of an engine, which trains and evaluates a model, and choose an engine.

There are three engines. `LayersEngine` (`npbn.engine.layers`) is the textbook loop over the layers,
on any array library. Two fused engines do the same mathematics stage by stage (`npbn.engine.plan`).
`npbn.engine.cpu` is the fused engine for NumPy's arrays, and `npbn.engine.gpu` is the fused engine
for CuPy's arrays. The fused engines must compute what the layers compute: ``tests/engine`` compares
the results.

    engine = build("auto", model, optimizer, train, test, batch_size=256, backend=backend)
    for result in engine.steps(order):
        print(float(result.loss))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from npbn.distributed import ALONE, Group
from npbn.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np

    from npbn.backend import Backend
    from npbn.data import Split
    from npbn.layers import Sequential
    from npbn.optim import SGD

KINDS = ("auto", "layers", "fused")


class Result(NamedTuple):
    """The result of one batch, or of several batches that ran together.

    Attributes:
        examples: the number of examples.
        loss: the mean loss of the examples. The value may still be on the device.
        correct: the number of examples that were classified correctly. The value may still be on
            the device.
    """

    examples: int
    loss: Any
    correct: Any


class Engine(Protocol):
    """A model with its optimizer and its data, ready to be trained and evaluated.

    Before and after every step, the layers and the optimizer hold the current parameters,
    gradients, velocities and moving averages.

    Attributes:
        kind: "layers" or "fused".
        description: the engine in words for the user, for instance "by layers".
    """

    kind: str
    description: str

    def steps(self, order: np.ndarray) -> Iterator[Result]:
        """Train on the given examples in the given order, with one optimizer step for each batch.

        Every layer keeps its mode; a batch norm in prediction mode is frozen. A caller that stops
        iterating stops the training. This method does not wait for the device.

        Args:
            order: the indices of the training examples. The last batch may be smaller than the
                others.

        Yields:
            One `Result` for one batch or for several batches, after the steps on these batches.
        """

    def evaluate(self) -> Iterator[Result]:
        """Run the test split in prediction mode. Afterwards, every layer gets its old mode back.

        Yields:
            One `Result` for one batch or for several batches.
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
    group: Group = ALONE,
    report: Callable[[str], None] | None = None,
) -> Engine:
    """Return an engine of the given kind for a model.

    Args:
        kind: "layers", "fused" or "auto". "fused" is the fused engine of the backend. "auto" is the
            fused engine if it can train this model, and "layers" otherwise. On a GPU, "auto" is
            the fused engine only if its first step agrees with the step by layers
            (`npbn.engine.gpu.first_step`).
        model, optimizer, train, test: the model, its optimizer, the training split and the test
            split, all on ``backend``.
        batch_size: the number of examples in a training batch.
        backend: a backend from `npbn.backend.get_backend`.
        threads: the number of threads of the fused engine on the CPU. By default, the number of
            CPUs that this process may use, or its share of them (`npbn.distributed.Group`).
        group: the processes that train together. By default, this process is alone.
        report: a function that is called with lines to show to the user while kernels are being
            compiled. The compilation happens once, because the compiled kernels are cached.

    Raises:
        ValueError: ``kind`` is unknown, or the model's own forward pass would raise ValueError.
        TypeError: the model's own forward pass would raise TypeError.
        UnsupportedError: ``kind`` is "fused", and the fused engine cannot train this model or
            cannot run on this machine.
        BackendError: the GPU cannot run the fused engine.
    """
    if kind not in KINDS:
        raise ValueError(f"expected an engine of {', '.join(KINDS)}, got {kind!r}")
    from npbn.engine.layers import LayersEngine

    fused, reason = None, ""
    if kind == "fused" or (kind == "auto" and backend.name in ("numpy", "cupy")):
        try:
            fused = _fused(
                model, optimizer, train, test, batch_size, backend, threads, group, report
            )
        except UnsupportedError as error:
            if kind == "fused":
                raise
            reason = str(error)
    if fused is not None and (kind == "fused" or backend.name == "numpy"):
        return fused
    layers = LayersEngine(
        model, optimizer, train, test, batch_size=batch_size, backend=backend, group=group
    )
    if backend.name == "cupy":
        from npbn.engine.gpu.first_step import difference, first_step, saying_if_slow

        batch = min(batch_size, len(train))
        with saying_if_slow(report, "compiling kernels, once"):
            right = first_step(layers, model, optimizer, backend, batch)
        if fused is not None:
            found = first_step(fused, model, optimizer, backend, batch)
            reason = difference(found, right, model)
            if not reason:
                return fused
    if reason:
        layers.description = f"{layers.description} ({reason})"
    return layers


def _fused(
    model: Sequential,
    optimizer: SGD,
    train: Split,
    test: Split,
    batch_size: int,
    backend: Backend,
    threads: int | None,
    group: Group,
    report: Callable[[str], None] | None,
) -> Engine:
    if backend.name == "numpy":
        from npbn.engine.cpu import CpuEngine

        return CpuEngine(
            model,
            optimizer,
            train,
            test,
            batch_size=batch_size,
            threads=threads,
            group=group,
            report=report,
        )
    if group.size > 1:
        raise UnsupportedError(
            "the fused engine on a GPU trains in one process: it captures a whole step, in which "
            "several processes would have to meet ten times"
        )
    if backend.name == "cupy":
        from npbn.engine.gpu import GpuEngine

        return GpuEngine(model, optimizer, train, test, batch_size=batch_size, report=report)
    raise UnsupportedError(f"there is no fused engine for the backend {backend.name}")
