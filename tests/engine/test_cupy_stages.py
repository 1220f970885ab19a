"""The host's part of the GPU engine, on a stand-in for CuPy that runs kernels on the CPU."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
from test_cuda_kernels import SMALL, small_model
from test_engine import a_split

import emulator
from cupy_stand_in import ATTRIBUTES, CompileError
from npbn import backend, training
from npbn.engine import cupy_stages
from npbn.engine.cupy_stages import CupyEngine
from npbn.errors import BackendError, UnsupportedError
from npbn.optim import SGD, StepDecay

NUMPY = backend.get_backend("numpy")

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ on Linux, which compiles the CUDA kernels"
)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_epochs_equal_those_of_the_layers(cupy, monkeypatch, momentum):
    """With a smaller last batch, in graphs of four steps; steps by the layers in between."""
    monkeypatch.setattr(cupy_stages, "STEPS_OF_A_GRAPH", 4)
    monkeypatch.setattr(cupy_stages, "EVALUATED_AT_ONCE", 16)
    model = small_model()
    model.to(NUMPY, "float64")
    expected = copy.deepcopy(model)
    train, test = a_split(SMALL, 60, 1), a_split(SMALL, 40, 2)

    def optimizer(model):
        schedule = StepDecay(0.1, 3, 0.5)
        return SGD(model.parameters(), schedule, momentum=momentum, weight_decay=0.01)

    def training_of(model, optimizer):
        return training.Training(
            model,
            optimizer,
            train,
            test,
            batch_size=8,
            generator=np.random.default_rng(0),
            backend=NUMPY,
            dtype="float64",
        )

    right = training_of(expected, optimizer(expected))
    engine = CupyEngine(model, optimizer(model), train, test, batch_size=8)
    by_layers = training_of(model, engine.optimizer)
    rng = np.random.default_rng(2)
    for _ in range(2):
        order = rng.permutation(60)
        steps = [right.step(order[i : i + 8]) for i in range(0, 60, 8)]
        losses, hits = engine.train(order)
        np.testing.assert_allclose(losses, [loss for loss, _ in steps], rtol=1e-10)
        assert hits == sum(hits for _, hits in steps)
        loss, hits = engine.evaluate()
        metrics = training.evaluate(expected, test, backend=NUMPY, dtype="float64")
        assert abs(loss - metrics.loss) <= 1e-10
        assert hits == round(metrics.accuracy * 40)
        scale = max(np.abs(p.gradient).max() for p in expected.parameters().values())
        for name, parameter in model.parameters().items():
            error = np.abs(parameter.gradient - expected.parameters()[name].gradient).max()
            assert error <= 1e-10 * scale, name
        by_layers.step(order[:8])
        right.step(order[:8])
        for found, wanted in (
            (model.state_dict(), expected.state_dict()),
            (engine.optimizer.velocity, right.optimizer.velocity),
        ):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-10, err_msg=name)
    assert engine.optimizer.steps == right.optimizer.steps == 18


def test_an_evaluation_between_steps_changes_nothing(cupy, monkeypatch):
    monkeypatch.setattr(cupy_stages, "STEPS_OF_A_GRAPH", 2)
    order = np.random.default_rng(2).permutation(60)
    whole, parts = an_engine(), an_engine()
    whole.train(order)
    for _ in parts.steps(order):
        parts.evaluate()
    for name in ("parameters", "train.losses"):
        np.testing.assert_array_equal(parts.arrays[name], whole.arrays[name])


def test_too_little_memory_is_one_clear_error(cupy, monkeypatch):
    def empty(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(cupy, "empty", empty)
    with pytest.raises(BackendError, match=r"less free memory than the [1-9]\d* MiB that batches"):
        an_engine()


def test_kernels_that_do_not_compile_are_one_clear_error(cupy, monkeypatch):
    def module(**options):
        def fail(name):
            raise CompileError("kernels.cu(1): error")

        return SimpleNamespace(get_function=fail)

    monkeypatch.setattr(cupy, "RawModule", module)
    with pytest.raises(BackendError, match=re.escape("do not compile: kernels.cu(1): error")):
        an_engine()


def test_a_gpu_with_too_little_shared_memory_is_refused(cupy, monkeypatch):
    monkeypatch.setitem(ATTRIBUTES, "MaxSharedMemoryPerBlockOptin", 10_000)
    with pytest.raises(UnsupportedError, match="bytes of shared memory; this GPU has 10,000 for"):
        an_engine()


def test_a_launch_that_fails_leaves_no_graph_half_captured(cupy):
    engine, order = an_engine(), np.arange(60)
    kernels = dict(engine._kernels)

    def fail(*arguments, **options):
        raise RuntimeError("no launch")

    engine._kernels[min(kernels)] = fail
    with pytest.raises(RuntimeError, match="no launch"):
        engine.train(order)
    engine._kernels.update(kernels)
    losses, _ = engine.train(order)
    np.testing.assert_array_equal(losses, an_engine().train(order)[0])


def test_an_order_that_does_not_fit_is_refused(cupy):
    with pytest.raises(ValueError, match=r"expected batches of 8, .* got 59 examples"):
        an_engine().train(np.arange(59))


def an_engine() -> CupyEngine:
    model, split = small_model(), a_split(SMALL, 60, 1)
    model.to(NUMPY, "float64")
    return CupyEngine(model, SGD(model.parameters(), 0.1), split, split, batch_size=8)
