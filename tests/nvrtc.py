"""NVIDIA's compiler for CUDA C++ as a library, by ctypes: it needs neither a GPU nor its driver."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from npbn.engine.gpu.program import OPTIONS


@dataclass(frozen=True)
class Usage:
    """What a kernel needs of a processor: registers of a thread, and bytes of them spilled."""

    kernel: str
    registers: int
    spilled: int


@cache
def find() -> ctypes.CDLL | None:
    """From the wheel nvidia-cuda-nvrtc (or -cu12), or from an installed toolkit."""
    found: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for directory in [] if spec is None else spec.submodule_search_locations or []:
        found += sorted(Path(directory).glob("*/lib/libnvrtc.so.*"))
    found += sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so.*"))
    for path in found:
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # the next one may fit this machine
            continue
    return None


def architectures() -> list[int]:
    """Those that the library compiles for: 90 is sm_90."""
    library, count = _library(), ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), None)
    found = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(found), None)
    return list(found)


def usage(source: str, names: Iterable[str], architecture: int) -> list[Usage]:
    """What each of the kernels needs when it is compiled for this architecture.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's.
    """
    library, program = _library(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        ),
        None,
    )
    try:
        names = sorted(set(names))
        for name in names:
            _check(library.nvrtcAddNameExpression(program, name.encode()), program)
        options = [f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v", *OPTIONS]
        options += ["-ftz=true", "--device-as-default-execution-space"]  # CuPy has them, too
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        _check(library.nvrtcCompileProgram(program, len(options), texts), program)
        log, found = _log(program), []
        for name in names:
            lowered = ctypes.c_char_p()
            _check(
                library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)), program
            )
            found.append(_usage_in(log, name, (lowered.value or b"").decode()))
        return found
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _usage_in(log: str, name: str, lowered: str) -> Usage:
    """From ptxas' lines on a kernel: bytes that are stored and loaded, then registers."""
    part = log.split(f"Compiling entry function '{lowered}'", 1)[1]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
    registers = re.search(r"Used (\d+) registers", part)
    assert spills and registers, part
    return Usage(name, int(registers[1]), int(spills[1]) + int(spills[2]))


def _library() -> ctypes.CDLL:
    library = find()
    assert library is not None
    return library


def _log(program: ctypes.c_void_p) -> str:
    library, size = _library(), ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode()


def _check(result: int, program: ctypes.c_void_p | None) -> None:
    if result:
        library = _library()
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        text = library.nvrtcGetErrorString(result).decode()
        raise RuntimeError(text if program is None else f"{text}\n{_log(program)}")
