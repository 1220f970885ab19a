"""The GPU engine's programs on the CPU: kernels.cu by g++ behind a shim, and the host's part."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import emulated_gpu
from emulated_gpu import build
from npbn.engine.gpu.program import SOURCE, THREADS, Launch, Pointer, Program, Structure, largest

SANITIZERS = {
    "libasan.so": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"),
    "libtsan.so": ("-O1", "-fsanitize=thread", "-g"),
}
"""The compiler's options, by the library that has to be loaded before Python's."""


def compiled(names: Iterable[str], *flags: str, source: str | None = None) -> Path:
    """The library of these kernels, with all that they need to run without CuPy."""
    labels = {name: f"kernel{i}" for i, name in enumerate(sorted(set(names)))}
    text = emulated_gpu.source_with_entries(
        SOURCE.read_text() if source is None else source, labels
    )
    # A test may give kernels deliberate errors by this number. The kernels' lines keep their
    # numbers, because messages and skipped barriers go by them.
    head = f'#include "{build.HERE}/threads.cpp"\nextern "C" int mutant_number = 0;\n'
    names = "".join(f'{{"{name}", emulated_{label}}},\n' for name, label in labels.items())
    find = f"""
extern "C" const emulated::Kernel* find(const char* name) {{
    const std::pair<std::string, const emulated::Kernel* (*)()> kernels[] = {{{names}}};
    for (const auto& [known, kernel] : kernels) {{
        if (known == name) return kernel();
    }}
    return nullptr;
}}
"""
    whole = f'{head}#line 1 "kernels.cu"\n{text}{find}'
    # -Bsymbolic: its functions call each other, and not those of the emulated GPU.
    options = ("-std=c++17", "-O1", "-fPIC", "-Wl,-Bsymbolic", *flags)
    return build.compiled("emulator", whole, options)


class Kernel(ctypes.Structure):
    """As in shim.h."""

    _fields_ = (
        *(("position", ctypes.c_void_p), ("thread", ctypes.c_void_p), ("block", ctypes.c_void_p)),
        *(("parameters", ctypes.c_int), ("sizes", ctypes.POINTER(ctypes.c_size_t))),
        ("signature", ctypes.c_char_p),
    )


class Library:
    """Compiled kernels, to be launched by name.

    Args:
        path: from `compiled`.
        skipped_barrier: the line of a __syncthreads that is to be passed over.
        seed: of the order in which blocks and threads run.
    """

    def __init__(self, path: Path, *, skipped_barrier: int = 0, seed: int = 0) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.emulated_allocate.argtypes = [ctypes.c_size_t]
        self.functions.emulated_allocate.restype = ctypes.c_void_p
        self.functions.emulated_release.argtypes = [ctypes.c_void_p]
        self.functions.find.restype = ctypes.POINTER(Kernel)
        self.skipped_barrier = skipped_barrier
        self.seed = seed

    def find(self, kernel: str) -> Kernel:
        found = self.functions.find(kernel.encode())
        assert found, f"no kernel {kernel}"
        return found.contents

    def signature(self, kernel: str) -> list[str]:
        """The types of its arguments, as the shim writes them."""
        return self.find(kernel).signature.decode().split()

    def launch(
        self, kernel: str, grid: Sequence[int], shared: int, arguments: Iterable[np.ndarray]
    ) -> None:
        values = list(arguments)
        assert len(values) == len(self.signature(kernel))
        self.seed += 1
        failed = self.functions.emulated_run(
            ctypes.byref(self.find(kernel)),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(THREADS, 1, 1),
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
            address = self.library.functions.emulated_allocate(spec.nbytes)
            memory = (ctypes.c_char * spec.nbytes).from_address(address)
            array = np.frombuffer(memory, np.uint8)
            array.fill(0xFF)
            self.addresses[name] = address
            self.arrays[name] = array.view(spec.dtype).reshape(spec.shape)
            if spec.value is not None:
                self.arrays[name][...] = spec.value

    def close(self) -> None:
        for address in self.addresses.values():
            self.library.functions.emulated_release(address)
        self.arrays.clear()
        self.addresses.clear()

    def run(self, program: Program) -> None:
        """All launches of the program, their arguments checked against the kernels' types.

        What other programs have arrays longer for is out of bounds in this one.
        """
        for name, spec in program.arrays.items():
            sizes = (self.addresses[name], spec.nbytes, self.arrays[name].nbytes)
            self.library.functions.emulated_limit(*map(ctypes.c_size_t, sizes))
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
                structure = argument.array.startswith(("tensors", "means"))
                assert code == "*" + ("s" if structure else codes[name]), (step, argument)
            elif isinstance(argument, Structure):
                assert code == "s", (step, argument)
            elif code != "s":  # an empty one, for sizes known to the compiler
                assert code == codes[argument.dtype.name], (step, argument)
