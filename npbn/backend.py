"""Array libraries and the devices they compute on.

A `Backend` is what the loop above the mathematics needs of a library beyond the array API:
arrays from and to the host, waiting for the device, and a line that says what it runs on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import array_api_compat
import array_api_compat.numpy
import numpy as np
import threadpoolctl

from npbn.errors import BackendError

NAMES = ("auto", "numpy", "cupy")

_WHEELS = "pip install 'cupy-cuda13x[ctk]' or, for a driver with CUDA 12, 'cupy-cuda12x[ctk]'"


@dataclass(frozen=True)
class Backend:
    """An array library, ready to use.

    Attributes:
        name: "numpy" or "cupy".
        xp: its array-API namespace.
        description: library, version and device, in one line.
        note: why "auto" did not choose a GPU, where it did not.
    """

    name: str
    xp: Any
    description: str
    note: str = ""

    def asarray(self, array: np.ndarray, dtype: Any = None) -> Any:
        """A host array on this backend's device, as ``dtype`` (a NumPy dtype) if given.

        A host backend returns the array itself where nothing has to change.
        """
        dtype = None if dtype is None else getattr(self.xp, np.dtype(dtype).name)
        return self.xp.asarray(array, dtype=dtype)

    def synchronize(self) -> None:
        """Wait until the device has finished all that was asked of it."""
        if self.name == "cupy":
            import cupy

            cupy.cuda.get_current_stream().synchronize()

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Inside, an error of the GPU's own becomes a `BackendError`.

        Kernels run asynchronously, so an error may surface at a later launch, or where
        somebody waits for a result.
        """
        if self.name != "cupy":
            yield
            return
        import cupy

        failures = (
            *(cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError),
            cupy.cuda.cublas.CUBLASError,
        )
        try:
            yield
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise BackendError(
                f"the GPU has too little free memory: {_one_line(error)}; take smaller batches, or "
                "see in nvidia-smi what else uses it"
            ) from None
        except failures as error:
            raise BackendError(
                f"the GPU failed: {_one_line(error)}; if nvidia-smi no longer lists it, it was "
                "lost or reset; a run can go on from its last checkpoint once it is back, or on "
                "the CPU"
            ) from None


def get_backend(name: str = "auto") -> Backend:
    """The backend called ``name``; "auto" is CuPy where it works, else NumPy.

    Raises:
        ValueError: no such backend.
        BackendError: CuPy was asked for and cannot be used. The message tells three cases apart:
            not installed, no driver or device, libraries that cannot be loaded.
    """
    if name not in NAMES:
        raise ValueError(f"expected a backend of {', '.join(NAMES)}, got {name!r}")
    if name == "numpy":
        return _numpy_backend()
    try:
        return _cupy_backend()
    except BackendError as error:
        if name == "cupy":
            raise
        return _numpy_backend(note=str(error))


def to_numpy(array: Any) -> np.ndarray:
    """A host copy of an array of any backend."""
    if array_api_compat.is_cupy_array(array):
        return np.asarray(array.get())
    return np.array(array)


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next array instead of returning it.

    A training step allocates and frees the same few large arrays over and over. By default glibc
    hands such memory back to the operating system, which then has to map and clear every page of
    it anew: about a third of a training step of LeNet. (CuPy has its own memory pool.) The
    setting holds for the whole process, so it is for programs to make, not for libraries. Where
    the C library is not glibc, this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from glibc's malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def limit_blas_threads(threads: int) -> None:
    """Let the CPU's matrix products compute with this many threads, in the whole process."""
    largest = 2**31 - 1  # that the libraries can be told; they have limits of their own below it
    threadpoolctl.threadpool_limits(min(threads, largest), user_api="blas")


def blas_threads() -> int | None:
    """Return the number of threads of the CPU's matrix products; None if it is unknown."""
    pools = threadpoolctl.threadpool_info()
    return max((pool["num_threads"] for pool in pools if pool["user_api"] == "blas"), default=None)


def usable_cpus() -> int:
    """Return how many CPUs this process may use, by its affinity and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(count, math.ceil(quota) if quota < count else count))


def cpu_quota(groups: Path, mounted: Path) -> float:
    """Return the CPUs' worth of time that control groups grant this process; inf without a limit.

    Args:
        groups: the file that names the groups of the process, by controller.
        mounted: where the groups' hierarchies are mounted: version 2, or version 1's controllers.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchy, files = mounted, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            hierarchy, files = mounted / controllers, ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # A group's limit holds for those inside. In a container, only its own may be mounted.
        for each in (group, *group.parents):
            try:
                texts = [(hierarchy / each / name).read_text() for name in files]
                quota, period = map(int, " ".join(texts).split())
            except (OSError, ValueError):  # no such group here, or "max"
                continue
            if quota > 0 and period > 0:  # -1: no limit
                quotas.append(quota / period)
    return min(quotas)


def _numpy_backend(note: str = "") -> Backend:
    blas = ", ".join(
        f"{pool['internal_api']} {pool['version']}, "
        f"{pool['num_threads']} thread{'s' * (pool['num_threads'] > 1)}"
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    )
    description = f"NumPy {np.__version__} ({blas or 'BLAS unknown'}) on {cpu_name()}"
    return Backend("numpy", array_api_compat.numpy, description, note)


def _cupy_backend() -> Backend:
    # Without this, CuPy compiles kernels of CUB for sums: 6 s for each kind of sum, at first use.
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise BackendError(f"CuPy is installed but cannot be loaded: {error}") from None
        raise BackendError(f"CuPy is not installed: {_WHEELS}") from None
    except Exception as error:  # a broken installation raises whatever its loader raises
        raise BackendError(
            f"CuPy is installed but cannot be loaded: {_one_line(error)}; to reinstall it: "
            f"{_WHEELS}"
        ) from None
    if not cupy.is_available():
        raise BackendError(
            "CuPy is installed, but there is no usable NVIDIA driver or GPU: nvidia-smi should "
            "list one, with a driver at least as new as the CUDA version of the CuPy wheel; "
            "the backend numpy needs none"
        )
    try:
        # A kernel needs NVRTC and the CUDA headers, a matrix product needs cuBLAS.
        ones = cupy.ones((2, 2), dtype=cupy.float32)
        if float((ones @ (ones + ones)).sum()) != 16:
            raise RuntimeError("a 2 x 2 matrix product came out wrong")
        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()
        cuda = cupy.cuda.runtime.runtimeGetVersion()
    except Exception as error:  # every CUDA library has its own exceptions
        raise BackendError(
            "CuPy and a GPU are there, but a CUDA library cannot be loaded or does not work: "
            f"{_one_line(error)}; the extra [ctk] installs the libraries: {_WHEELS}"
        ) from None

    import array_api_compat.cupy

    version = f"CuPy {cupy.__version__} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"
    return Backend("cupy", array_api_compat.cupy, f"{version} on {device}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())


def cpu_name() -> str:
    """Return the name of the processor."""
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
