"""The GPU engine's programs on the CPU: kernels.cu by g++ behind a shim, and the host's part."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npbn.engine import launch
from npbn.engine.launch import Pointer, Program

SHIM = Path(__file__).with_name("engine") / "cuda_shim.h"
COMPILER = shutil.which("g++")
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def compiled(directory: Path, names: Iterable[str], *flags: str, source: str | None = None) -> Path:
    """The library of these kernels, built once for all processes that share the directory."""
    text = launch.SOURCE.read_text() if source is None else source
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


class Emulator:
    """A device: a program's arrays, and its launches one after the other.

    What no program gives a value is NaN at first, or -1. Every array is a piece of memory of its
    own.

    Args:
        library: from `compiled`.
        programs: that share their arrays.
        skipped_barrier: the line of a __syncthreads that is to be passed over.
        seed: of the order in which blocks and threads run.
    """

    def __init__(
        self, library: Path, programs: Sequence[Program], *, skipped_barrier: int = 0, seed: int = 0
    ) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.allocate.argtypes = [ctypes.c_size_t]
        self.library.allocate.restype = ctypes.c_void_p
        self.library.release.argtypes = [ctypes.c_void_p]
        self.library.signature.restype = ctypes.c_char_p
        self.skipped_barrier = skipped_barrier
        self.seed = seed
        self.arrays: dict[str, np.ndarray] = {}
        self.addresses: dict[str, int] = {}
        for name, spec in largest(programs).items():
            address = self.library.allocate(spec.nbytes)
            memory = (ctypes.c_char * spec.nbytes).from_address(address)
            array = np.frombuffer(memory, np.uint8)
            array.fill(0xFF)
            self.addresses[name] = address
            self.arrays[name] = array.view(spec.dtype).reshape(spec.shape)
            if spec.value is not None:
                self.arrays[name][...] = spec.value

    def close(self) -> None:
        for address in self.addresses.values():
            self.library.release(address)
        self.arrays.clear()
        self.addresses.clear()

    def run(self, program: Program) -> None:
        """All launches of the program, their arguments checked against the kernels' types.

        What other programs have arrays longer for is out of bounds in this one.
        """
        for name, spec in program.arrays.items():
            self.library.limit(
                *map(ctypes.c_size_t, (self.addresses[name], spec.nbytes, self.arrays[name].nbytes))
            )
        for step in program.launches:
            signature = self.library.signature(step.kernel.encode())
            assert signature is not None, f"no kernel {step.kernel}"
            self._check(step, signature.decode())
            values = [self._value(argument) for argument in step.arguments]
            addresses = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
            self.seed += 1
            failed = self.library.launch(
                step.kernel.encode(),
                (ctypes.c_uint * 3)(*step.grid),
                ctypes.c_size_t(step.shared),
                addresses,
                ctypes.c_uint(self.seed),
                ctypes.c_int(self.skipped_barrier),
            )
            if failed:
                raise RuntimeError(f"{step.kernel}: a barrier that not all threads came to")

    def _value(self, argument: Any) -> np.ndarray:
        """The bytes that the kernel gets."""
        if argument is None:
            return np.zeros(1, np.uint64)
        if isinstance(argument, Pointer):
            offset = argument.offset * self.arrays[argument.array].itemsize
            return np.array([self.addresses[argument.array] + offset], np.uint64)
        return np.array([argument])

    def _check(self, step: launch.Launch, signature: str) -> None:
        """The arguments' types are the kernel's; null goes for any pointer."""
        codes = {"float32": "f", "float64": "d", "int32": "i", "uint8": "b"}
        expected = signature.split()
        assert len(expected) == len(step.arguments), (step.kernel, signature)
        for code, argument in zip(expected, step.arguments, strict=True):
            if argument is None:
                assert code[0] == "*", (step.kernel, signature)
            elif isinstance(argument, Pointer):
                name = self.arrays[argument.array].dtype.name
                structure = argument.array.startswith("tensors")
                assert code == "*" + ("s" if structure else codes[name]), (step.kernel, argument)
            elif code != "s":
                assert code == codes[argument.dtype.name], (step.kernel, argument)


def largest(programs: Sequence[Program]) -> dict[str, launch.ArraySpec]:
    """The arrays of all programs, each as large as any of them wants it."""
    found: dict[str, launch.ArraySpec] = {}
    for program in programs:
        for name, spec in program.arrays.items():
            if name not in found or spec.nbytes > found[name].nbytes:
                found[name] = spec
    return found
