"""What importing npbn costs, and what it may not bring along."""

from __future__ import annotations

import subprocess
import sys

import pytest

from commands import ROOT

HEAVY = (
    "cupy",
    "mpi4py",
    "numba",
    "torch",
    "torchvision",
    "matplotlib",
    "PIL",
    "pooch",
    "sklearn",
    "scipy",
    "jax",
)


def loaded_after(code: str) -> set[str]:
    """Which of the heavy libraries a fresh process has imported after running ``code``."""
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_importing_npbn_imports_nothing_heavy():
    """Except the fused engine on the CPU, which needs Numba, and the graphs, which need onnx."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "npbn").rglob("*.py"))
    ]
    left_out = ("npbn.engine.cpu.", "npbn.onnx_graph.")
    others = [name for name in names if not f"{name}.".startswith(left_out)]
    assert "npbn.training" in others and "npbn.engine.gpu.engine" in others
    assert loaded_after(f"import {', '.join(others)}") == set()


def test_the_check_above_can_fail():
    pytest.importorskip("scipy")
    assert loaded_after("import scipy") == {"scipy"}


def test_training_with_the_files_present_imports_neither_torch_nor_torchvision(fashion_mnist):
    code = "from npbn import data\nassert data.load('fashion-mnist').name == 'Fashion-MNIST'"
    assert loaded_after(code) == set()


def test_functional_imports_nothing_of_npbn_but_itself():
    code = (
        "import sys, npbn.functional\n"
        "others = [m for m in sys.modules if m.startswith('npbn.')"
        " and not m.startswith('npbn.functional')]\n"
        "assert not others, others"
    )
    assert loaded_after(code) == set()
