"""The real CuPy, computing without a GPU: see README.md."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from emulated_gpu import build

CUPY = "14.2.0"
"""The version of CuPy whose compiled modules are known to work: see `_redirect`."""

STREAMS = {"early": 0, "late": 3}
"""When streams run what was asked of them: at once, or when somebody waits for them."""

_HERE = build.HERE
_NAMES = re.compile(r"^([0-9a-f]+) [tT] (cuda[A-Z]\w+)$", re.MULTILINE)
_GLOBAL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^()]*\)\s*)?(\w+)\s*\(")
_SHARED = re.compile(r"(?:alignas\(\d+\)\s*)?extern\s+__shared__\s+([\w:<> ]+?)\s+(\w+)\[\];")
_device: Any = None


def missing_compiler() -> str:
    """Return what this machine lacks to run kernels on the CPU, or nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "an emulated GPU needs Linux on x86-64"
    if build.COMPILER is None or shutil.which("nm") is None:
        return "an emulated GPU needs g++ and nm"
    return ""


def missing() -> str:
    """Return what this machine lacks for an emulated GPU, or nothing."""
    if missing_compiler():
        return missing_compiler()
    try:
        found = importlib.metadata.version("cupy-cuda13x")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != CUPY:
        return f"an emulated GPU needs cupy-cuda13x {CUPY}, got {found}: the extra emulated has it"
    return ""


def driver() -> bool:
    """Return whether this machine has NVIDIA's driver, so that CuPy needs no emulated GPU."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def installed() -> bool:
    """Return whether CuPy has an emulated GPU in this process."""
    return _device is not None


def install() -> None:
    """Give CuPy an emulated GPU, in this process and for good. CuPy must not be imported yet.

    The environment variable EMULATED_GPU_STREAMS is "early", the default, or "late".
    """
    global _device
    if _device is not None:
        return
    assert "cupy" not in sys.modules
    os.environ["CUPY_ACCELERATORS"] = ""  # CUB's kernels are compiled for GPUs
    os.environ["CUPY_CACHE_DIR"] = str(build.directory() / "cupy")
    flags = ("-std=c++17", "-O2", "-fPIC", "-ldl", f"-I{_HERE}")
    sources = "".join(f'#include "{_HERE / name}.cpp"\n' for name in ("threads", "device"))
    library = build.compiled("device", sources, flags)
    _device = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    _device.emulated_log_end.restype = ctypes.c_char_p
    with _without_cuda(str(library)):
        import cupy_backends.cuda.api.runtime as runtime

        _redirect(runtime)
        _load_cublas()
        import cupy
        import cupy.cuda.cub
        import cupy.cuda.thrust

        _redirect(cupy.cuda.cub)
        _redirect(cupy.cuda.thrust)
        from cupy.cuda import compiler

        compiler._get_nvrtc_version = lambda: (13, 0)
        compiler._get_arch_for_options_for_nvrtc = lambda arch=None: ("-arch=sm_90", "cubin")
        compiler._NVRTCProgram = Program
        cupy.cuda.driver.ctxGetCurrent()  # CuPy loads the driver with the first call
    reset()


def reset() -> None:
    """Take all settings back to those that the device has at first."""
    set_streams(os.environ.get("EMULATED_GPU_STREAMS", "early"))
    set_memory(80 << 30)
    set_guarded(False)
    fail("", 0, 0, lasting=False)


def set_streams(when: str) -> None:
    """Let streams run early or late: see `STREAMS`."""
    _device.emulated_set_streams(STREAMS[when])


def fail(kind: str, calls: int, error: int, *, lasting: bool) -> None:
    """Let a call fail.

    Args:
        kind: of the call: launch, copy, allocation, product or wait; "" for none.
        calls: the number of calls of this kind that still succeed.
        error: of CUDA, by its number.
        lasting: whether all later calls fail, too, as on a device that was lost.
    """
    _device.emulated_fail(kind.encode(), ctypes.c_long(calls), error, int(lasting))


def set_memory(size: int) -> None:
    """Set the memory of the GPU, in bytes."""
    _device.emulated_set_memory(ctypes.c_size_t(size))


def set_guarded(on: bool) -> None:
    """Let a page that may not be accessed follow every array that is allocated from now on."""
    _device.emulated_set_guarded(int(on))


@contextlib.contextmanager
def calls() -> Iterator[list[str]]:
    """Note in a list what CuPy asks of the device, one line each; it is full at the end."""
    lines: list[str] = []
    _device.emulated_log_start()
    try:
        yield lines
    finally:
        lines += _device.emulated_log_end().decode().splitlines()


def note(line: str) -> None:
    """Add a line to the calls that are noted."""
    _device.emulated_note(line.encode())


class Program:
    """In place of CuPy's _NVRTCProgram: what CuPy takes for a cubin is a shared library by g++."""

    def __init__(
        self,
        src: str | bytes,
        name: str = "",
        headers: Any = (),
        include_names: Any = (),
        name_expressions: Any = None,
        method: str = "cubin",
    ) -> None:
        self.source = src.decode() if isinstance(src, bytes) else src
        self.name = name
        self.expressions = tuple(name_expressions or ())

    def compile(self, options: Any = (), log_stream: Any = None) -> tuple[bytes, Any]:
        """Return the library, and its names of the expressions."""
        from cupy.cuda.compiler import CompileException

        if not self.source:  # CuPy asks for the version of the compiler and its headers
            return f"// {build.version()}".encode(), None
        labels = {name: f"expression{i}" for i, name in enumerate(self.expressions)}
        names = labels or {name: name for name in _GLOBAL.findall(self.source)}
        kept = [option for option in options if option.startswith("-D")]
        flags = (*build.KERNEL_FLAGS, *kept, *_includes(), "-include", str(_header()))
        try:
            library = build.compiled("kernels", source_with_entries(self.source, names), flags)
        except subprocess.CalledProcessError as error:
            raise CompileException(error.stderr, self.source, self.name, options, "g++") from None
        return library.read_bytes(), labels or None


def source_with_entries(source: str, names: dict[str, str]) -> str:
    """Return CUDA C++ for g++, with entries for the kernels: C++ names with their labels."""
    text = _SHARED.sub(r"#define \2 (static_cast<\1*>(emulated::position.shared))", source)
    waits = "__syncthreads" in text or "__shfl" in text or "__syncwarp" in text
    entries = (
        f"EMULATED_KERNEL({label}, {str(waits).lower()}, {name})" for name, label in names.items()
    )
    return "\n".join((text, *entries, ""))


def _includes() -> tuple[str, str]:
    import cupy

    return f"-I{_HERE / 'include'}", f"-I{Path(cupy.__file__).parent / '_core' / 'include'}"


def _header() -> Path:
    """Return a header with all that CuPy's kernels include; g++ has compiled it already."""
    header = build.directory() / f"kernels-{build.version()}-{CUPY}.h"
    compiled = header.with_suffix(".h.gch")
    if not compiled.exists():
        with build.locked(header):
            if not compiled.exists():
                names = ("complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h")
                lines = [f'#include "{_HERE / "shim.h"}"', *(f"#include <cupy/{n}>" for n in names)]
                header.write_text("\n".join((*lines, "")))
                partial = header.with_suffix(".partial")
                options = ("-x", "c++-header", str(header), "-o", str(partial))
                build.run(*build.KERNEL_FLAGS, *_includes(), *options)
                partial.rename(compiled)
    return header


@contextlib.contextmanager
def _without_cuda(library: str) -> Iterator[None]:
    """While CuPy is imported, give it our driver, and none of NVIDIA's libraries."""
    from cuda import pathfinder

    load, original = pathfinder.load_nvidia_dynamic_lib, ctypes.CDLL

    class CDLL(original):
        def __init__(self, name: str | None, *arguments: Any, **options: Any) -> None:
            super().__init__(library if name == "libcuda.so.1" else name, *arguments, **options)

    ctypes.CDLL = CDLL
    pathfinder.load_nvidia_dynamic_lib = lambda name: None
    # This stays: CuPy asks for the headers of CCCL when it compiles its first kernel.
    pathfinder.find_nvidia_header_directory = lambda name: str(_HERE / "include")
    try:
        yield
    finally:
        ctypes.CDLL = original
        pathfinder.load_nvidia_dynamic_lib = load


def _redirect(module: ModuleType) -> None:
    """Let the functions of the CUDA runtime in a module of CuPy's jump to ours.

    CuPy's modules contain the runtime (it is linked statically), and their symbol tables say where
    its functions begin. There, the machine code becomes ``mov rax, address; jmp rax``.
    """
    path = os.path.realpath(module.__file__ or "")
    with open("/proc/self/maps") as maps:
        base = next(
            int(line.split("-")[0], 16)
            for line in maps
            if line.rstrip().endswith(path) and int(line.split()[2], 16) == 0
        )
    symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    process = ctypes.CDLL(None, use_errno=True)
    for offset, name in _NAMES.findall(symbols):
        plain = re.sub("_pt[sd][sz]$", "", name)  # variants for another default stream
        ours = getattr(_device, f"emulated_{plain}", _device.emulated_other)
        target = ctypes.cast(ours, ctypes.c_void_p).value or 0
        start = base + int(offset, 16)
        if process.mprotect(ctypes.c_void_p(start & ~4095), 8192, 7):  # read, write, execute
            raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memmove(start, b"\x48\xb8" + target.to_bytes(8, "little") + b"\xff\xe0", 12)


def _load_cublas() -> None:
    """Load CuPy's module for cuBLAS with our library in place of NVIDIA's.

    PyTorch may need NVIDIA's in the same process. So ours has another name, and the module is
    loaded from a copy that asks for this name, which is as long.
    """
    name, theirs, ours = "cupy_backends.cuda.libs.cublas", b"libcublas.so.13", b"libemublas.so.1"
    import cupy_backends.cuda.libs as libs

    (path,) = Path(libs.__path__[0]).glob("cublas.*.so")
    symbols = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r" U (cublas\w+)", symbols.stdout))
    source = f'#include "{_HERE / "cublas.cpp"}"\n'
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros"]
    flags += ["-fno-trapping-math", "-fPIC", f"-Wl,-soname,{ours.decode()}"]
    products = build.compiled("cublas", source, flags)
    defined = subprocess.run(["nm", "-D", products], capture_output=True, text=True, check=True)
    absent = needed - set(re.findall(r" T (cublas\w+)", defined.stdout))
    refusals = "".join(
        f'extern "C" int {n}() {{ return NOT_SUPPORTED; }}\n' for n in sorted(absent)
    )
    library = build.compiled("cublas", source + refusals, flags)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    copy = library.with_name(f"{library.stem}-{sys.implementation.cache_tag}-{path.name}")
    if not copy.exists():
        with build.locked(copy):
            partial = copy.with_suffix(".partial")
            partial.write_bytes(path.read_bytes().replace(theirs, ours))
            partial.rename(copy)
    loader = importlib.machinery.ExtensionFileLoader(name, str(copy))
    spec = importlib.util.spec_from_file_location(name, copy, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    libs.cublas = module
