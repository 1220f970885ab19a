"""NVIDIA's compiler for CUDA C++ as a library, by ctypes: it needs neither a GPU nor its driver."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import struct
from collections.abc import Iterable, Iterator
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
            for needed in path.parent.glob("libnvrtc-builtins.so.*"):  # not found by itself
                ctypes.CDLL(str(needed))
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
    with _compiled(source, names, architecture) as (program, lowered):
        log = _log(program)
        return [_usage_in(log, name, lowered[name]) for name in sorted(lowered)]


def parameter_sizes(source: str, names: Iterable[str], architecture: int) -> dict[str, list[int]]:
    """The sizes in bytes of the parameters of each kernel, by its name, as the cubin has them.

    Raises:
        RuntimeError: the source does not compile; the message has the compiler's.
    """
    with _compiled(source, names, architecture) as (program, lowered):
        library, size = _library(), ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)), program)
        cubin = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, cubin), program)
        sections = _sections(cubin.raw)
        return {n: _parameters_in(sections[f".nv.info.{lowered[n]}"]) for n in lowered}


@contextlib.contextmanager
def _compiled(
    source: str, names: Iterable[str], architecture: int
) -> Iterator[tuple[ctypes.c_void_p, dict[str, str]]]:
    """A compiled program, and its kernels' names in the cubin by their names in C++."""
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
        found = {}
        for name in names:
            lowered = ctypes.c_char_p()
            _check(
                library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered)), program
            )
            found[name] = (lowered.value or b"").decode()
        yield program, found
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of an ELF file of 64 bits, by name."""
    table, count, names = (
        struct.unpack_from(f, elf, at)[0] for f, at in (("<Q", 40), ("<H", 60), ("<H", 62))
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i) for i in range(count)]
    start = headers[names][4]
    return {
        elf[start + name : elf.index(b"\0", start + name)].decode(): elf[offset : offset + size]
        for name, _, _, _, offset, size, *_ in headers
    }


def _parameters_in(info: bytes) -> list[int]:
    """The sizes of a kernel's parameters, in their order.

    An attribute is (format, number) and a value of two bytes; in format 4, this value is the size
    of what follows. Attribute 0x17 has an index, the parameter's number, its offset, and a word
    whose upper 14 bits are its size. (NVIDIA does not document this: it is what cuobjdump prints.)
    """
    found, at = {}, 0
    while at < len(info):
        kind, number, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == 4:
            if number == 0x17:
                _, ordinal, _, word = struct.unpack_from("<IHHI", info, at)
                found[ordinal] = word >> 18
            at += value
    return [found[ordinal] for ordinal in sorted(found)]


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
