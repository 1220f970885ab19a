"""Fixtures: array libraries, dtypes, data, short runs; Hypothesis profiles."""

from __future__ import annotations

import os
import signal

import platformdirs

# Before NumPy comes, and for all programs that the tests start: threads that wait for one another
# beside another busy process cost more than they gain.
for library in ("OPENBLAS", "MKL", "OMP"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Numba starts no more than this: enough to see that results do not depend on it.
os.environ.setdefault("NUMBA_NUM_THREADS", "4")
# Kernels are compiled once, also for programs that the tests start with another home directory.
os.environ.setdefault("NUMBA_CACHE_DIR", str(platformdirs.user_cache_path("npbn") / "kernels"))
# With nohup and in the background, these are ignored, also by the programs that tests start.
for number, handler in {"SIGHUP": signal.SIG_DFL, "SIGINT": signal.default_int_handler}.items():
    if hasattr(signal, number) and signal.getsignal(getattr(signal, number)) is signal.SIG_IGN:
        signal.signal(getattr(signal, number), handler)

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import array_api_strict
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import emulated_gpu
from commands import Trainer, run
from npbn import backend, data
from npbn.data import published
from npbn.data.published import FASHION_MNIST
from npbn.errors import BackendError

# No deadline: a slow machine is no failure. print_blob: a failure can be replayed by pasting.
COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", max_examples=30, **COMMON)
settings.register_profile("ci", max_examples=30, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=300, **COMMON)
# For one property at a time, to see that it never fails by chance.
settings.register_profile("10,000", max_examples=10_000, **COMMON)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


LIBRARIES = {
    "numpy": backend.get_backend("numpy"),
    "array-api-strict": backend.Backend(
        "array-api-strict", array_api_strict, "nothing but the standard"
    ),
}
NO_CUPY = ""
if not emulated_gpu.driver() and not emulated_gpu.missing():
    emulated_gpu.install()
try:
    LIBRARIES["cupy"] = backend.get_backend("cupy")
except BackendError as error:  # the other libraries still run
    NO_CUPY = f"; not cupy: {emulated_gpu.missing() or error}"
if emulated_gpu.installed():
    LIBRARIES["cupy-late"] = LIBRARIES["cupy"]


def pytest_report_header() -> str:
    return f"array libraries: {', '.join(LIBRARIES)}{NO_CUPY}"


@pytest.fixture(params=LIBRARIES)
def device(request) -> Iterator[backend.Backend]:
    """Each array library in turn, as a backend; CuPy on the emulated GPU twice: see there."""
    if request.param == "cupy-late":
        emulated_gpu.set_streams("late")
    yield LIBRARIES[request.param]
    if request.param == "cupy-late":
        emulated_gpu.reset()


@pytest.fixture
def xp(device):
    """Each array library in turn."""
    return device.xp


@pytest.fixture(params=["float32", "float64"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def fashion_mnist() -> data.Dataset:
    """The real data; the tests that need it are skipped where it is not installed."""
    directory = published.SYSTEM_DIRECTORY / "fashion-mnist"
    if not directory.exists():
        pytest.skip("Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)")
    return FASHION_MNIST.read(directory)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20150211)  # the day the batch norm paper came out


@pytest.fixture(scope="session")
def trainer(tmp_path_factory) -> Iterator[Trainer]:
    """scripts/train.py, many times over."""
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A directory with two runs on digits, "with" and "without" batch norm; not to be changed."""
    directory = tmp_path_factory.mktemp("runs")
    common = ("--dataset", "digits", "--backend", "numpy", "--threads", "1")
    for name, options in (
        ("with", ("--batch-size", "64", "--epochs", "3", "--plots")),
        ("without", ("--batch-size", "64", "--epochs", "2", "--no-batch-norm")),
    ):
        process = run("train.py", *common, *options, "--run", name, cwd=directory)
        assert process.returncode == 0, process.stderr
    return directory


@pytest.fixture
def cupy_backend() -> backend.Backend:
    """CuPy on a GPU, or on the emulated one."""
    if "cupy" not in LIBRARIES:
        pytest.skip(NO_CUPY.removeprefix("; "))
    return LIBRARIES["cupy"]


@pytest.fixture
def emulated() -> Iterator[ModuleType]:
    """The emulated GPU, which is as before at the end of the test."""
    if not emulated_gpu.installed():
        pytest.skip(emulated_gpu.missing() or "CuPy has a GPU")
    yield emulated_gpu
    emulated_gpu.reset()
