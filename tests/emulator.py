"""The GPU engine's programs on the CPU: kernels.cu by g++ behind a shim, and the host's part."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from npbn.engine.gpu.program import SOURCE, Launch, Pointer, Program, Structure, largest

SHIM = Path(__file__).with_name("engine") / "cuda_shim.h"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
SANITIZERS = {
    "libasan.so": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"),
    "libtsan.so": ("-O1", "-fsanitize=thread", "-g"),
}
"""The compiler's options, by the library that has to be loaded before Python's."""


def compiled(directory: Path, names: Iterable[str], *flags: str, source: str | None = None) -> Path:
    """The library of these kernels, built once for all processes that share the directory."""
    text = SOURCE.read_text() if source is None else source
    text = text.replace("double shared_memory[];", "double* shared_memory;")  # the shim's
    entries = "\n".join(
        f'static shim::Register kernel{i}("{name}", {name});'
        for i, name in enumerate(sorted(set(names)))
    )
    # The kernels' lines keep their numbers: messages and skipped barriers go by them.
    text = f'#include "{SHIM}"\n#line 1 "kernels.cu"\n{text}\n{entries}\n'
    key = hashlib.sha256((text + SHIM.read_text() + " ".join(flags)).encode()).hexdigest()[:16]
    library = directory / f"kernels-{key}.so"
    with open(directory / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unit = library.with_suffix(".cpp")
            unit.write_text(text)
            options = ["-std=c++17", "-O1", "-fPIC", "-shared", *flags]
            partial = library.with_suffix(".partial")
            subprocess.run(
                [str(COMPILER), *options, str(unit), "-o", str(partial)],
                check=True,
                capture_output=True,
                text=True,
            )
            partial.rename(library)
    return library


class Library:
    """Compiled kernels, to be launched by name.

    Args:
        path: from `compiled`.
        skipped_barrier: the line of a __syncthreads that is to be passed over.
        seed: of the order in which blocks and threads run.
    """

    def __init__(self, path: Path, *, skipped_barrier: int = 0, seed: int = 0) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.allocate.argtypes = [ctypes.c_size_t]
        self.functions.allocate.restype = ctypes.c_void_p
        self.functions.release.argtypes = [ctypes.c_void_p]
        self.functions.signature.restype = ctypes.c_char_p
        self.skipped_barrier = skipped_barrier
        self.seed = seed

    def signature(self, kernel: str) -> list[str]:
        """The types of its arguments, as the shim writes them."""
        found = self.functions.signature(kernel.encode())
        assert found is not None, f"no kernel {kernel}"
        return found.decode().split()

    def launch(
        self, kernel: str, grid: Sequence[int], shared: int, arguments: Iterable[np.ndarray]
    ) -> None:
        values = list(arguments)
        assert len(values) == len(self.signature(kernel))
        self.seed += 1
        failed = self.functions.launch(
            kernel.encode(),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_size_t(shared),
            (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values)),
            ctypes.c_uint(self.seed),
            ctypes.c_int(self.skipped_barrier),
        )
        if failed:
            raise RuntimeError(f"{kernel}: a barrier that not all threads came to")


class Emulator:
    """A device: a program's arrays, and its launches one after the other.

    What no program gives a value is NaN at first, or -1. Every array is a piece of memory of its
    own.

    Args:
        library: from `compiled`.
        programs: that share their arrays.
        options: of a `Library`.
    """

    def __init__(self, library: Path, programs: Sequence[Program], **options: int) -> None:
        self.library = Library(library, **options)
        self.arrays: dict[str, np.ndarray] = {}
        self.addresses: dict[str, int] = {}
        for name, spec in largest(programs).items():
            address = self.library.functions.allocate(spec.nbytes)
            memory = (ctypes.c_char * spec.nbytes).from_address(address)
            array = np.frombuffer(memory, np.uint8)
            array.fill(0xFF)
            self.addresses[name] = address
            self.arrays[name] = array.view(spec.dtype).reshape(spec.shape)
            if spec.value is not None:
                self.arrays[name][...] = spec.value

    def close(self) -> None:
        for address in self.addresses.values():
            self.library.functions.release(address)
        self.arrays.clear()
        self.addresses.clear()

    def run(self, program: Program) -> None:
        """All launches of the program, their arguments checked against the kernels' types.

        What other programs have arrays longer for is out of bounds in this one.
        """
        for name, spec in program.arrays.items():
            sizes = (self.addresses[name], spec.nbytes, self.arrays[name].nbytes)
            self.library.functions.limit(*map(ctypes.c_size_t, sizes))
        for step in program.launches:
            self._check(step)
            values = [program.value(argument, self._address) for argument in step.arguments]
            self.library.launch(step.kernel, step.grid, step.shared, values)

    def _address(self, pointer: Pointer) -> int:
        offset = pointer.offset * self.arrays[pointer.array].itemsize
        return self.addresses[pointer.array] + offset

    def _check(self, step: Launch) -> None:
        """The arguments' types are the kernel's; null goes for any pointer."""
        codes = {"float32": "f", "float64": "d", "int32": "i", "uint8": "b"}
        for code, argument in zip(self.library.signature(step.kernel), step.arguments, strict=True):
            if argument is None:
                assert code[0] == "*", step
            elif isinstance(argument, Pointer):
                name = self.arrays[argument.array].dtype.name
                structure = argument.array.startswith("tensors")
                assert code == "*" + ("s" if structure else codes[name]), (step, argument)
            elif isinstance(argument, Structure):
                assert code == "s", (step, argument)
            elif code != "s":  # an empty one, for sizes known to the compiler
                assert code == codes[argument.dtype.name], (step, argument)
