"""Compile shared libraries with g++, once for all processes and for all later test runs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import platformdirs

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
KERNEL_FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-w", "-fpermissive", "-fvisibility=hidden"),
    # Each product and each sum is rounded: NVRTC's -fmad is not modelled.
    *("-ffp-contract=off", "-fno-threadsafe-statics", "-fno-strict-aliasing"),
)


def directory() -> Path:
    """Return the directory of compiled files, which is made if it is missing."""
    path = Path(os.environ.get("EMULATED_GPU_CACHE") or platformdirs.user_cache_path("npbn"))
    path /= "emulated_gpu"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def version() -> str:
    """Return a hash of all that compiled kernels depend on beside their source."""
    compiler = subprocess.run(
        [str(COMPILER), "-dumpfullversion"], capture_output=True, text=True, check=True
    ).stdout
    sources = (path for path in sorted(HERE.rglob("*")) if path.suffix in (".cpp", ".h"))
    parts = [compiler, *KERNEL_FLAGS, *(path.read_text() for path in sources)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make a file."""
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled(name: str, source: str, flags: Sequence[str]) -> Path:
    """Return a library that is compiled from this source, unless there is one already.

    Raises:
        subprocess.CalledProcessError: the source does not compile; ``stderr`` has the messages.
    """
    key = hashlib.sha256("\n".join((version(), *flags, source)).encode()).hexdigest()[:16]
    library = directory() / f"{name}-{key}.so"
    if library.exists():
        return library
    with locked(library):
        if not library.exists():
            unit, partial = library.with_suffix(".cpp"), library.with_suffix(".partial")
            unit.write_text(source)
            run(*flags, "-shared", str(unit), "-o", str(partial))
            partial.rename(library)
            unit.unlink()
    return library


def run(*arguments: str) -> None:
    subprocess.run([str(COMPILER), *arguments], check=True, capture_output=True, text=True)
