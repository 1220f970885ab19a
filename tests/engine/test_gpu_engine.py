"""The host's part of the GPU engine, on a stand-in for CuPy that runs kernels on the CPU."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
from models import NUMPY, SMALL, a_split, small_model

import emulator
from cupy_stand_in import ATTRIBUTES, CompileError
from npbn import training
from npbn.engine.gpu import GpuEngine, engine
from npbn.engine.layers import LayersEngine
from npbn.errors import BackendError, UnsupportedError
from npbn.optim import SGD, StepDecay

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ on Linux, which compiles the CUDA kernels"
)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_epochs_equal_those_of_the_layers(cupy, monkeypatch, momentum):
    """With a smaller last batch, in graphs of four steps; steps by the layers in between."""
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 4)
    monkeypatch.setattr(engine, "EVALUATED_AT_ONCE", 16)
    model = small_model()
    model.to(NUMPY, "float64")
    expected = copy.deepcopy(model)
    train, test = a_split(SMALL, 60, 1), a_split(SMALL, 40, 2)

    def optimizer(model):
        schedule = StepDecay(0.1, 3, 0.5)
        return SGD(model.parameters(), schedule, momentum=momentum, weight_decay=0.01)

    def by_layers(model, optimizer):
        return LayersEngine(model, optimizer, train, test, batch_size=8, backend=NUMPY)

    right = by_layers(expected, optimizer(expected))
    fused = GpuEngine(model, optimizer(model), train, test, batch_size=8)
    between = by_layers(model, fused.optimizer)
    rng = np.random.default_rng(2)
    for _ in range(2):
        order = rng.permutation(60)
        wanted = list(right.steps(order))
        found = list(fused.steps(order))
        assert [result.examples for result in found] == [32, 24, 4]
        np.testing.assert_allclose(fused.losses(8), [r.loss for r in wanted], rtol=1e-10)
        np.testing.assert_allclose(
            [result.loss for result in found],
            [np.mean([r.loss for r in part]) for part in (wanted[:4], wanted[4:7], wanted[7:])],
            rtol=1e-10,
        )
        assert sum(r.correct for r in found) == sum(r.correct for r in wanted)
        (result,) = fused.evaluate()
        metrics = training.evaluate(expected, test, backend=NUMPY, dtype="float64")
        assert abs(result.loss - metrics.loss) <= 1e-10
        assert (result.examples, result.correct) == (40, round(metrics.accuracy * 40))
        scale = max(np.abs(p.gradient).max() for p in expected.parameters().values())
        for name, parameter in model.parameters().items():
            error = np.abs(parameter.gradient - expected.parameters()[name].gradient).max()
            assert error <= 1e-10 * scale, name
        list(between.steps(order[:8])), list(right.steps(order[:8]))
        for found, wanted in (
            (model.state_dict(), expected.state_dict()),
            (fused.optimizer.velocity, right.optimizer.velocity),
        ):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-10, err_msg=name)
    assert fused.optimizer.steps == right.optimizer.steps == 18


def test_an_evaluation_between_steps_changes_nothing(cupy, monkeypatch):
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 2)
    order = np.random.default_rng(2).permutation(60)
    whole, parts = an_engine(), an_engine()
    list(whole.steps(order))
    for _ in parts.steps(order):
        list(parts.evaluate())
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
    fused, order = an_engine(), np.arange(60)
    kernels = dict(fused._kernels)

    def fail(*arguments, **options):
        raise RuntimeError("no launch")

    fused._kernels[min(kernels)] = fail
    with pytest.raises(RuntimeError, match="no launch"):
        list(fused.steps(order))
    fused._kernels.update(kernels)
    other = an_engine()
    list(fused.steps(order)), list(other.steps(order))
    np.testing.assert_array_equal(fused.losses(8), other.losses(8))


def test_an_order_that_does_not_fit_is_refused(cupy):
    with pytest.raises(ValueError, match=r"expected batches of 8, .* got 59 examples"):
        list(an_engine().steps(np.arange(59)))


def test_a_frozen_batch_norm_is_refused(cupy):
    """When the engine is made, or when it is to train; a model that predicts is not frozen."""
    fused = an_engine()
    norm = fused.stages[0].norm
    norm.eval()
    message = r"BatchNorm\(3, 4\) after Conv2d\(.*\) is in prediction mode: .* frozen batch norm"
    with pytest.raises(UnsupportedError, match=message):
        list(fused.steps(np.arange(60)))
    with pytest.raises(UnsupportedError, match=message):
        an_engine(fused.model)
    fused.model.eval()
    an_engine(fused.model)


def an_engine(model=None) -> GpuEngine:
    model, split = model or small_model(), a_split(SMALL, 60, 1)
    model.to(NUMPY, "float64")
    return GpuEngine(model, SGD(model.parameters(), 0.1), split, split, batch_size=8)
