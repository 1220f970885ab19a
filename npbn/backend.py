"""Choose an array library and the device on which it computes.

The mathematics needs only the array API of a library. A `Backend` adds what the training needs
beside it: copies of arrays to and from the host, a method that waits for the device, and a
description of library and device.
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
    """An array library that can be used on this machine.

    Attributes:
        name: "numpy" or "cupy".
        xp: the array-API namespace of the library.
        description: the library, its version and the device, in one line.
        note: the reason why "auto" did not choose a GPU. Otherwise, it is empty.
    """

    name: str
    xp: Any
    description: str
    note: str = ""

    def asarray(self, array: np.ndarray, dtype: Any = None) -> Any:
        """Return an array of the host as an array on the backend's device.

        Args:
            array: the array. NumPy's backend returns it without copying if its dtype is right.
            dtype: a NumPy dtype. By default, the dtype stays.
        """
        dtype = None if dtype is None else getattr(self.xp, np.dtype(dtype).name)
        return self.xp.asarray(array, dtype=dtype)

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.name == "cupy":
            import cupy

            cupy.cuda.get_current_stream().synchronize()

    @contextlib.contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Run the code inside; turn an error of the GPU or its libraries into a `BackendError`.

        Kernels run asynchronously. So an error may appear at a later launch, or when a result is
        read.
        """
        if self.name != "cupy":
            yield
            return
        import cupy

        failures = (
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
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
    """Return the backend of this name.

    Args:
        name: "numpy", "cupy" or "auto". "auto" is CuPy if CuPy can be used, and NumPy otherwise.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: ``name`` is "cupy", and CuPy cannot be used. The message says which of three
            things is missing: CuPy, a driver or a GPU, or a CUDA library.
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
    """Return a copy of an array of any backend as an array of NumPy."""
    if array_api_compat.is_cupy_array(array):
        return np.asarray(array.get())
    return np.array(array)


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next array instead of returning it.

    A training step by layers allocates and frees the same few large arrays again and again. By
    default, glibc returns such memory to the operating system, which must map and clear every page
    again. This takes about a third of the time of a training step of LeNet. (CuPy has a memory pool
    of its own.) The setting applies to the whole process. So programs should call this function,
    and libraries should not. If the C library is not glibc, this function does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # from glibc's malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def limit_blas_threads(threads: int) -> None:
    """Set the number of threads of the CPU's matrix products, for the whole process."""
    largest = 2**31 - 1  # the largest number that the libraries accept
    threadpoolctl.threadpool_limits(min(threads, largest), user_api="blas")


def blas_threads() -> int | None:
    """Return the number of threads of the CPU's matrix products, or None if it is unknown."""
    pools = threadpoolctl.threadpool_info()
    return max((pool["num_threads"] for pool in pools if pool["user_api"] == "blas"), default=None)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use.

    The affinity of the process and the quota of its container limit this number.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(1, min(count, math.ceil(quota) if quota < count else count))


def cpu_quota(groups: Path, mounted: Path) -> float:
    """Return the CPU time per second that control groups allow this process, in CPUs.

    Without a limit, the result is infinite.

    Args:
        groups: the file with the control groups of the process, such as /proc/self/cgroup.
        mounted: the folder in which the control groups are mounted, of version 1 or 2.
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
        # The limit of a group also applies to the groups inside it. In a container, sometimes only
        # the group of the container is mounted.
        for each in (group, *group.parents):
            try:
                texts = [(hierarchy / each / name).read_text() for name in files]
                quota, period = map(int, " ".join(texts).split())
            except (OSError, ValueError):  # There is no such group, or its limit is "max".
                continue
            if quota > 0 and period > 0:  # -1 means that there is no limit.
                quotas.append(quota / period)
    return min(quotas)


def _numpy_backend(note: str = "") -> Backend:
    blas = ", ".join(
        f"{pool['internal_api']} {pool['version']}"
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    )
    description = f"NumPy {np.__version__} ({blas or 'BLAS unknown'}) on {cpu_name()}"
    return Backend("numpy", array_api_compat.numpy, description, note)


def _cupy_backend() -> Backend:
    # Without this, CuPy compiles CUB's kernels for sums. This takes 6 s for each kind of sum.
    os.environ.setdefault("CUPY_ACCELERATORS", "")
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise BackendError(f"CuPy is installed but cannot be loaded: {error}") from None
        raise BackendError(f"CuPy is not installed: {_WHEELS}") from None
    except Exception as error:  # A broken installation may raise any error.
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
    except Exception as error:  # Each CUDA library has exceptions of its own.
        raise BackendError(
            "CuPy and a GPU are there, but a CUDA library cannot be loaded or does not work: "
            f"{_one_line(error)}; the extra [ctk] installs the libraries: {_WHEELS}"
        ) from None

    import array_api_compat.cupy

    version = f"CuPy {cupy.__version__} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"
    return Backend("cupy", array_api_compat.cupy, f"{version} on {device}")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())


def cpu_features() -> list[str]:
    """Return the processor's features that NumPy found and uses."""
    simd: Any = np.show_config(mode="dicts").get("SIMD Extensions", {})
    # On processors other than x86-64, NumPy may use only features that it always expects.
    return list(simd.get("found") or simd.get("baseline", []))


def blas_name() -> str:
    """Return the BLAS library of NumPy's matrix products and the architecture of its kernels."""
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    texts = {
        f"{'OpenBLAS' if pool['internal_api'] == 'openblas' else pool['internal_api']} "
        f"{pool['version']}, architecture {pool.get('architecture', 'unknown')}"
        for pool in pools
    }
    return "; ".join(sorted(texts)) or "BLAS unknown"


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
