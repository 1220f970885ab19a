"""Every kernel compiles for real GPUs, without one, and no register is spilled to memory."""

from __future__ import annotations

import os

import pytest

import nvrtc
from npbn import backend
from npbn.engine.gpu import launch
from npbn.engine.gpu.program import SOURCE
from npbn.engine.plan import plan
from npbn.layers import BatchNorm, Sequential
from npbn.models import LeNet

pytestmark = pytest.mark.skipif(
    nvrtc.find() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12 (no GPU, no CuPy)"
)


def kernels() -> set[str]:
    """For sizes known at run time, both precisions; for LeNet's in float32, as it is trained."""
    found = set()
    for dtype, fixed in (("float32", False), ("float64", False), ("float32", True)):
        # With normalized logits, the last linear layer and the loss have launches of their own.
        for model in (LeNet(), Sequential(*LeNet().layers, BatchNorm(10, 2))):
            model.to(backend.get_backend("numpy"), dtype)
            stages = plan(model, (1, 28, 28))
            for write in (launch.training, launch.evaluation):
                program = write(stages, 256, examples=10_000, fixed=fixed)
                found |= {step.kernel for step in program.launches}
    return found


LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


@pytest.mark.parametrize("generation", [*(["Ampere"] * LONG), "Hopper", "the newest"])
def test_every_kernel_compiles_without_spilling(generation, record_property):
    known = nvrtc.architectures()
    architecture = {"Ampere": 80, "Hopper": 90, "the newest": max(known)}[generation]
    if architecture not in known:
        pytest.skip(f"this NVRTC does not compile for sm_{architecture}")
    found = nvrtc.usage(SOURCE.read_text(), kernels(), architecture)
    report = "\n".join(
        f"sm_{architecture} {usage.registers:4} registers {usage.spilled:4} bytes spilled  "
        f"{usage.kernel}"
        for usage in found
    )
    print(report)
    record_property("usage", report)
    assert not [usage for usage in found if usage.spilled], report


def test_a_kernel_that_does_not_compile_is_reported_with_its_line():
    with pytest.raises(RuntimeError, match=r'kernels\.cu\(1\): error: .* "broken"'):
        nvrtc.usage("__global__ void kernel() { broken; }", ["kernel"], 90)


def test_spills_are_seen():
    """Every thread has 200 numbers to keep, and an order that is known only at run time."""
    source = """
    extern "C" __global__ void __launch_bounds__(1024, 2) kernel(const float* x, float* y, int n) {
        float a[200];
        #pragma unroll
        for (int i = 0; i < 200; ++i) a[i] = x[i * n];
        for (int k = 0; k < n; ++k) {
            #pragma unroll
            for (int i = 0; i < 200; ++i) a[i] = a[(i + 7) % 200] * a[i] + x[k];
        }
        #pragma unroll
        for (int i = 0; i < 200; ++i) y[i * n] = a[i];
    }"""
    (usage,) = nvrtc.usage(source, ["kernel"], 90)
    assert usage.spilled > 0
