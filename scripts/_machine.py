"""Describe the machine of a measurement: processor, libraries, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

from npbn import backend

VERSIONS = {  # the names of distributions, and the names of the libraries in a report
    "npbn": "npbn",
    "numpy": "NumPy",
    "numba": "Numba",
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "jax": "JAX",
}

# NumPy 2.4 and later report levels of x86-64. This table names the features of each level that
# matter to a reader.
LEVELS = {"X86_V3": "AVX2 FMA3", "X86_V4": "AVX512F AVX512BW AVX512CD AVX512DQ AVX512VL"}


def machine() -> dict[str, Any]:
    """Return the facts about this machine that a report contains, as values for JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": backend.cpu_name(),
        "cores": backend.usable_cpus(),
        "features": features(),
        "blas": backend.blas_name(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := version(name))},
    }


def about(machine: dict[str, Any]) -> str:
    """Return the facts that `machine` collects in one line of text."""
    versions = [f"Python {machine['python']}"]
    layer = machine.get("threading_layer")
    for name, number in machine["versions"].items():
        versions.append(f"{VERSIONS[name]} {number}")
        if name == "numba" and layer:
            versions[-1] += f" (threading layer {layer})"
    return "{date}: {cpu}, {cores} CPUs, features {listed}; {blas}; {system}; ".format(
        **machine, listed=" ".join(machine["features"]) or "unknown"
    ) + ", ".join(versions)


def features() -> list[str]:
    """Return the processor's features that NumPy uses, by names that a reader knows."""
    return [word for name in backend.cpu_features() for word in LEVELS.get(name, name).split()]


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
