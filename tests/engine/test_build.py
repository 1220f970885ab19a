"""The choice of an engine."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from models import NUMPY, TINY, a_split, a_tiny_model

from npbn.engine import build
from npbn.engine.gpu.first_step import saying_if_slow
from npbn.engine.layers import LayersEngine
from npbn.errors import UnsupportedError
from npbn.optim import SGD

LAYERS = r"by layers( on \d+ threads?)?"


def built(kind, *, device=NUMPY, **options):
    model, train, test = a_tiny_model(), a_split(TINY, 20, 1), a_split(TINY, 9, 2)
    if device.name == "cupy":
        model.to(device, "float64")
        train, test = train.to(device), test.to(device)
    optimizer = SGD(model.parameters(), 0.1)
    return build(kind, model, optimizer, train, test, batch_size=8, backend=device, **options)


@pytest.fixture
def cpu(monkeypatch):
    """A stand-in for the fused engine on the CPU; what it was made of."""
    made = []

    class CpuEngine:
        description = "by the fused engine on 2 threads"

        def __init__(self, model, optimizer, train, test, *, batch_size, threads, group, report):
            made.append((model, optimizer, len(train), len(test), batch_size, threads, report))

    module = types.ModuleType("npbn.engine.cpu")
    module.CpuEngine = CpuEngine
    monkeypatch.setitem(sys.modules, "npbn.engine.cpu", module)
    return made


@pytest.mark.parametrize("kind", ["auto", "fused"])
def test_on_the_cpu_auto_is_fused(kind, cpu):
    engine = built(kind, threads=3, report=print)
    assert engine.description == "by the fused engine on 2 threads"
    ((_, _, *rest),) = cpu
    assert rest == [20, 9, 8, 3, print]


def test_layers_are_there_for_who_asks_for_them(cpu):
    engine = built("layers")
    assert isinstance(engine, LayersEngine) and re.fullmatch(LAYERS, engine.description)
    assert not cpu


def unsupported(*_, **__):
    raise UnsupportedError("layer 3 (Sigmoid()): there is no stage for it")


def test_where_the_fused_engine_cannot_auto_is_layers_and_says_why(cpu, monkeypatch):
    monkeypatch.setattr(sys.modules["npbn.engine.cpu"], "CpuEngine", unsupported)
    engine = built("auto")
    assert isinstance(engine, LayersEngine)
    reason = r" \(layer 3 \(Sigmoid\(\)\): there is no stage for it\)"
    assert re.fullmatch(LAYERS + reason, engine.description)
    with pytest.raises(UnsupportedError, match=r"^layer 3 \(Sigmoid"):
        built("fused")


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_what_layers_would_refuse_too_is_not_hidden(error, cpu, monkeypatch):
    def refuse(*_, **__):
        raise error("expected x of shape (N, 3, H, W)")

    monkeypatch.setattr(sys.modules["npbn.engine.cpu"], "CpuEngine", refuse)
    with pytest.raises(error, match="expected x of shape"):
        built("auto")


def test_on_a_gpu_auto_is_fused_if_its_first_step_is_that_of_the_layers(cupy_backend, monkeypatch):
    engine = built("auto", device=cupy_backend)
    assert engine.kind == "fused"
    assert not engine.optimizer.velocity and engine.optimizer.steps == 0
    assert all(p.gradient is None for p in engine.model.parameters().values())
    right = built("layers", device=cupy_backend).model.state_dict()
    for name, value in engine.model.state_dict().items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)

    from npbn.engine.gpu import GpuEngine

    def wrong(self, order, original=GpuEngine.steps):
        yield from original(self, order)
        self.arrays["gradients"][0] *= 1.1

    monkeypatch.setattr(GpuEngine, "steps", wrong)
    engine = built("auto", device=cupy_backend)
    assert re.match(
        LAYERS + r" \(in the first step, the gradient of the fused engine differs from that of the "
        r"layers by .* \(bound 1e-09\)\)$",
        engine.description,
    )
    for name, value in engine.model.state_dict().items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    assert built("fused", device=cupy_backend).kind == "fused"  # for who asks for it


def test_a_model_in_prediction_mode_is_compared_in_training_mode(cupy_backend):
    model, split = a_tiny_model(), a_split(TINY, 20, 1).to(cupy_backend)
    model.to(cupy_backend, "float64")
    model.eval()
    optimizer = SGD(model.parameters(), 0.1)
    engine = build("auto", model, optimizer, split, split, batch_size=8, backend=cupy_backend)
    assert engine.kind == "fused" and not model.training


def test_the_user_is_told_if_kernels_take_long():
    told = threading.Event()
    lines = []

    def report(line):
        lines.append(line)
        told.set()

    with saying_if_slow(report, "compiling kernels, once"):
        assert told.wait(timeout=60)
    assert lines == ["compiling kernels, once"]
    with saying_if_slow(None, "nobody listens"):
        pass


def test_on_other_libraries_there_are_layers_only():
    device = dataclasses.replace(NUMPY, name="array-api-strict")
    assert built("auto", device=device).description == "by layers"
    with pytest.raises(UnsupportedError, match="no fused engine for the backend array-api-strict"):
        built("fused", device=device)


def test_other_kinds_are_refused():
    message = "expected an engine of auto, layers, fused, got 'compiled'"
    with pytest.raises(ValueError, match=message):
        built("compiled")


def test_without_numba_there_are_layers_and_a_reason(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("npbn.engine.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert re.match(LAYERS + r" \(it needs Numba, which cannot be", built("auto").description)
    with pytest.raises(UnsupportedError, match="it needs Numba, which cannot be imported"):
        built("fused")


def test_the_interface_imports_no_engine():
    code = (
        "import sys, npbn.engine\n"
        "found = [m for m in sys.modules if m.startswith('npbn.engine.') or m == 'numba']\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
