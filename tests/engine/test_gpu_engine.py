"""The GPU engine by CuPy, on a GPU or an emulated one, against the layers on NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from models import NUMPY, SMALL, a_split, small_model

import emulated_gpu
from arrays import to_host
from npbn import training
from npbn.engine.gpu import GpuEngine, engine
from npbn.engine.layers import LayersEngine
from npbn.errors import BackendError, UnsupportedError
from npbn.optim import SGD, StepDecay


@pytest.fixture(params=["early", "late"])
def cupy(request, cupy_backend):
    """CuPy; on an emulated GPU with early and with late streams."""
    import cupy

    if emulated_gpu.installed():
        emulated_gpu.set_streams(request.param)
    elif request.param == "late":
        pytest.skip("CuPy has a GPU")
    yield cupy
    if emulated_gpu.installed():
        emulated_gpu.reset()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_epochs_equal_those_of_the_layers(cupy, cupy_backend, monkeypatch, momentum):
    """With a smaller last batch, in graphs of four steps; steps by the layers in between."""
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 4)
    monkeypatch.setattr(engine, "EVALUATED_AT_ONCE", 16)
    expected = small_model()
    model = copy.deepcopy(expected)
    train, test = a_split(SMALL, 60, 1), a_split(SMALL, 40, 2)

    def by_layers(model, optimizer, device):
        splits = train.to(device), test.to(device)
        return LayersEngine(model, optimizer, *splits, batch_size=8, backend=device)

    def optimizer(model):
        schedule = StepDecay(0.1, 3, 0.5)
        return SGD(model.parameters(), schedule, momentum=momentum, weight_decay=0.01)

    expected.to(NUMPY, "float64")
    model.to(cupy_backend, "float64")
    right = by_layers(expected, optimizer(expected), NUMPY)
    fused = GpuEngine(model, optimizer(model), train, test, batch_size=8)
    between = by_layers(model, fused.optimizer, cupy_backend)
    rng = np.random.default_rng(2)
    for _ in range(2):
        order = rng.permutation(60)
        wanted = list(right.steps(order))
        found = list(fused.steps(order))
        assert [result.examples for result in found] == [32, 24, 4]
        np.testing.assert_allclose(fused.losses(8), [r.loss for r in wanted], rtol=1e-10)
        np.testing.assert_allclose(
            [float(result.loss) for result in found],
            [np.mean([r.loss for r in part]) for part in (wanted[:4], wanted[4:7], wanted[7:])],
            rtol=1e-10,
        )
        assert sum(int(r.correct) for r in found) == sum(r.correct for r in wanted)
        (result,) = fused.evaluate()
        metrics = training.evaluate(expected, test, dtype="float64")
        assert abs(float(result.loss) - metrics.loss) <= 1e-10
        assert (result.examples, int(result.correct)) == (40, round(metrics.accuracy * 40))
        scale = max(np.abs(p.gradient).max() for p in expected.parameters().values())
        for name, parameter in model.parameters().items():
            gradient = expected.parameters()[name].gradient
            error = np.abs(to_host(parameter.gradient) - gradient).max()
            assert error <= 1e-10 * scale, name
        list(between.steps(order[:8])), list(right.steps(order[:8]))
        for found, wanted in (
            (model.state_dict(), expected.state_dict()),
            (fused.optimizer.velocity, right.optimizer.velocity),
        ):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_allclose(
                    to_host(found[name]), value, rtol=1e-9, atol=1e-10, err_msg=name
                )
    assert fused.optimizer.steps == right.optimizer.steps == 18


def test_an_evaluation_between_steps_changes_nothing(cupy, cupy_backend, monkeypatch):
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 2)
    order = np.random.default_rng(2).permutation(60)
    whole, parts = an_engine(cupy_backend), an_engine(cupy_backend)
    list(whole.steps(order))
    for _ in parts.steps(order):
        list(parts.evaluate())
    for name in ("parameters", "train.losses"):
        np.testing.assert_array_equal(to_host(parts.arrays[name]), to_host(whole.arrays[name]))


def test_early_and_late_streams_give_the_same_bits(emulated, cupy_backend):
    found = []
    for when in ("early", "late"):
        emulated.set_streams(when)
        fused = an_engine(cupy_backend)
        for seed in range(2):
            list(fused.steps(np.random.default_rng(seed).permutation(60)))
            list(fused.evaluate())
        found.append({name: to_host(array) for name, array in fused.arrays.items()})
    early, late = found
    for name in ("parameters", "gradients", "train.losses", "test.losses", "test.correct"):
        np.testing.assert_array_equal(early[name], late[name], err_msg=name)


def test_nothing_reaches_outside_of_its_array(emulated, cupy, cupy_backend):
    """Arrays that end at a page that may not be accessed; freed arrays are gone."""
    emulated.set_guarded(True)
    pool = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(None)
    try:
        fused = an_engine(cupy_backend)
        list(fused.steps(np.arange(60)))
        list(fused.evaluate())
        assert np.isfinite(fused.losses(8)).all()
        del fused
    finally:
        cupy.cuda.set_allocator(pool)


def test_the_work_is_divided_among_the_multiprocessors_of_the_gpu(cupy, cupy_backend, monkeypatch):
    grids = []
    for count in (1, 100):
        monkeypatch.setitem(cupy.cuda.Device().attributes, "MultiProcessorCount", count)
        fused = an_engine(cupy_backend)
        grids.append([call.grid for call in fused.programs["train8"].launches])
        losses = [float(result.loss) for result in fused.steps(np.arange(60))]
        assert np.isfinite(losses).all()
        assert fused.losses(3).shape == (3,)
    assert grids[0] != grids[1]


def test_too_little_memory_is_one_clear_error(emulated, cupy, cupy_backend):
    model, split = small_model(), a_split(SMALL, 60, 1)
    model.to(cupy_backend, "float64")
    optimizer = SGD(model.parameters(), 0.1)
    cupy.get_default_memory_pool().free_all_blocks()
    emulated.set_memory(0)
    with pytest.raises(BackendError, match=r"less free memory than the [1-9]\d* MiB that batches"):
        GpuEngine(model, optimizer, split, split, batch_size=8)


def test_kernels_that_do_not_compile_are_one_clear_error(cupy, cupy_backend, monkeypatch, tmp_path):
    source = tmp_path / "kernels.cu"
    source.write_text("#error no such kernels\n")
    monkeypatch.setattr(engine, "SOURCE", source)
    with pytest.raises(UnsupportedError, match=r"do not compile: [^\n]*no such kernels$"):
        an_engine(cupy_backend)


def test_a_gpu_with_too_little_shared_memory_is_refused(cupy, cupy_backend, monkeypatch):
    attributes = cupy.cuda.Device().attributes  # which CuPy keeps
    monkeypatch.setitem(attributes, "MaxSharedMemoryPerBlockOptin", 10_000)
    with pytest.raises(UnsupportedError, match="bytes of shared memory; this GPU has 10,000 for"):
        an_engine(cupy_backend)


def test_a_launch_that_fails_leaves_no_graph_half_captured(cupy, cupy_backend):
    fused, order = an_engine(cupy_backend), np.arange(60)
    kernels = dict(fused._kernels)

    def fail(*arguments, **options):
        raise RuntimeError("no launch")

    fused._kernels[min(kernels)] = fail
    with pytest.raises(RuntimeError, match="no launch"):
        fused._captured("train8", 1)
    fused._kernels.update(kernels)
    other = an_engine(cupy_backend)
    list(fused.steps(order)), list(other.steps(order))
    np.testing.assert_array_equal(fused.losses(8), other.losses(8))


def test_an_order_that_does_not_fit_is_refused(cupy, cupy_backend):
    with pytest.raises(ValueError, match=r"expected batches of 8, .* got 59 examples"):
        list(an_engine(cupy_backend).steps(np.arange(59)))


def test_a_frozen_batch_norm_is_refused(cupy, cupy_backend):
    """When the engine is made, or when it is to train; a model that predicts is not frozen."""
    fused = an_engine(cupy_backend)
    norm = fused.stages[0].norm
    norm.eval()
    message = r"BatchNorm\(3, 4\) after Conv2d\(.*\) is in prediction mode: .* frozen batch norm"
    with pytest.raises(UnsupportedError, match=message):
        list(fused.steps(np.arange(60)))
    with pytest.raises(UnsupportedError, match=message):
        an_engine(cupy_backend, model=fused.model)
    fused.model.eval()
    an_engine(cupy_backend, model=fused.model)


def an_engine(device, model=None) -> GpuEngine:
    model, split = model or small_model(), a_split(SMALL, 60, 1)
    model.to(device, "float64")
    return GpuEngine(model, SGD(model.parameters(), 0.1), split, split, batch_size=8)
