"""Compile the kernels once for each dtype, and keep the results in the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import platformdirs
from numba import types
from numba.core import event
from numba.core.dispatcher import Dispatcher
from numba.core.errors import NumbaError

from npbn.engine.cpu import launches, normalization, products
from npbn.errors import UnsupportedError

LOCK = threading.RLock()
"""A lock that is held while kernels are compiled or run.

Not every threading layer of Numba can be used by two Python threads at the same time.
"""

# GNU's OpenMP threads look for new work for a while before they sleep. With GNU's default number,
# the threads look for so long that two trainings at once would take each other's CPUs for nothing.
# With half of the number below, Linux leaves threads that wake up together on one CPU for a while.
# OpenMP reads the variable when its library loads.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def describe_compiler() -> str:
    """Return the version of the compiler, and the processor for which it compiles."""
    name = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    features = numba.config.CPU_FEATURES or llvmlite.binding.get_host_cpu_features().flatten()
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"Numba {numba.__version__} for {name} with features {digest}"


def cache_directory(dtype: Any) -> Path:
    """Return the directory in which the compiled kernels of a dtype are kept.

    The directory is in NUMBA_CACHE_DIR if that is set, otherwise in npbn's directory in the user's
    cache. Its name is a digest of the kernels' sources, Numba's version and the dtype. The digest
    is needed because Numba does not notice a change in a file that the kernel's file imports. Numba
    itself recompiles a kernel for another processor.
    """
    digest = hashlib.sha256(f"{numba.__version__} {np.dtype(dtype)}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    root = numba.config.CACHE_DIR or platformdirs.user_cache_path("npbn") / "kernels"
    return Path(root) / digest.hexdigest()[:16]


def compile_kernels(arguments: tuple[Any, ...], report: Callable[[str], None] | None) -> None:
    """Compile `launches.execute` for arguments of the given types, or load it from the cache.

    Args:
        arguments: the arguments of a call of `launches.execute`.
        report: a function that is called with a line of text when the compilation begins, and
            several times during the compilation.

    Raises:
        UnsupportedError: Numba cannot compile the kernels on this machine.
    """
    if numba.config.DISABLE_JIT:
        raise UnsupportedError("NUMBA_DISABLE_JIT is set, so its kernels cannot be compiled")
    signature = tuple(numba.typeof(argument) for argument in arguments)
    _, net, images, labels, order, _ = signature
    i = types.int64
    kernels = {
        launches.run: (net, i, i, images, labels, order, i, i),
        launches.prepare: (net, i, i, i),
        normalization.merge: (net, i, i, types.boolean),
        launches.summed_up: (net, i),
        launches.execute: signature,
    }
    directory = cache_directory(arguments[1].values.dtype)
    with LOCK, _reported(report):
        if signature in launches.execute.overloads:
            return
        try:
            try:
                _compile(kernels, directory)
            except NumbaError:
                raise
            except (
                Exception
            ):  # A cache file that is cut off after a power cut can raise any exception.
                for path in directory.rglob("*.nb[ci]"):
                    path.unlink(missing_ok=True)
                _compile(kernels, directory)
        except (NumbaError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedError(f"Numba cannot compile its kernels: {reason[0]}") from error


def _compile(kernels: dict[Dispatcher, tuple[Any, ...]], directory: Path) -> None:
    """Compile each kernel for its argument types, or load the kernel from the directory."""
    before = numba.config.OPT
    try:
        with _cached(kernels, directory):
            for kernel, types_ in kernels.items():
                if kernel is launches.execute:
                    # `execute` contains copies of functions that are already optimized. To optimize
                    # them again would only take time.
                    numba.config.OPT = 1
                try:
                    kernel.compile(types_)
                except OSError:  # If the disk is full, the kernel may be compiled, but not saved.
                    if types_ not in kernel.overloads:
                        raise
    finally:
        numba.config.OPT = before


@contextlib.contextmanager
def _cached(kernels: Iterable[Dispatcher], directory: Path) -> Iterator[None]:
    """Let Numba cache the kernels in the directory, if the directory can be written to."""
    before = numba.config.CACHE_DIR
    try:
        directory.mkdir(parents=True, exist_ok=True)
        usable = os.access(directory, os.W_OK)
    except OSError:
        usable = False
    try:
        if usable:
            numba.config.CACHE_DIR = str(directory)
            for kernel in kernels:
                kernel.enable_caching()
        yield
    finally:
        numba.config.CACHE_DIR = before


@contextlib.contextmanager
def _reported(report: Callable[[str], None] | None) -> Iterator[None]:
    """Call ``report`` when the compilation begins, and after every sixth compiled kernel."""
    modules = products, normalization, launches
    kernels = {f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)}
    compiled: set[Dispatcher] = set()
    said: list[str] = []

    def say(line: str) -> None:
        if report is not None and line not in said:
            said.append(line)
            report(line)

    class Listener(event.Listener):
        def on_start(self, _: Any) -> None:
            say(f"compiling {len(kernels)} kernels, once for this machine")

        def on_end(self, event: Any) -> None:
            compiled.add(event.data["dispatcher"])
            done = len(compiled & kernels)
            if done % 6 == 0 < done:
                say(f"compiled {done} of {len(kernels)} kernels")

    with event.install_listener("numba:compile", Listener()):
        yield
