"""Enough of CuPy for the GPU engine: arrays are NumPy's, kernels run on the CPU, at once."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from emulator import Library, compiled
from npbn import backend
from npbn.engine.gpu import engine, launch
from npbn.engine.gpu.program import OPTIONS

DEVICE = dataclasses.replace(backend.get_backend("numpy"), name="cupy", description="a stand-in")
"""The backend."""


ATTRIBUTES = {"MaxSharedMemoryPerBlockOptin": launch.MOST_SHARED}
"""Of the device."""


class CompileError(Exception):
    """As cupy.cuda.compiler.CompileException."""


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError."""


class CUDADriverError(RuntimeError):
    """As cupy.cuda.driver.CUDADriverError."""


class Stream:
    """Of one kind of work, launches, and at once; while a graph is captured, into it.

    Attributes:
        current: where work goes; the first is the default.
        seen: up to which of its calls of `record` each other stream has been waited for.
    """

    current: ClassVar[list[Stream]] = []

    def __init__(self) -> None:
        self.captured = None
        self.recorded = 0
        self.seen: dict[Stream, int] = {}

    def __enter__(self):
        Stream.current.append(self)
        return self

    def __exit__(self, *error) -> None:
        assert Stream.current.pop() is self

    def record(self):
        self.recorded += 1
        return self, self.recorded

    def wait_event(self, event) -> None:
        stream, count = event
        self.seen[stream] = count

    def synchronize(self) -> None:
        assert self.captured is None

    def begin_capture(self) -> None:
        assert self.captured is None
        self.captured = []

    def end_capture(self):
        calls, self.captured = self.captured, None

        def launch(stream):
            assert Stream.current[-1] is stream is self
            return [call() for call in calls]

        return SimpleNamespace(launch=launch, calls=calls)


Stream.current.append(Stream())


def stand_in(builds: Path) -> SimpleNamespace:
    """The module; compiled kernels are kept in that directory."""
    streams = []

    def stream(non_blocking):
        assert non_blocking
        streams.append(Stream())
        return streams[-1]

    def module(code, options, name_expressions):
        assert options == OPTIONS
        library = Library(compiled(builds, name_expressions, source=code))

        def function(name):
            def kernel(grid, block, arguments, shared_mem):
                assert block == (256,)
                assert all(argument.shape == () for argument in arguments)
                (most,) = ATTRIBUTES.values()
                assert shared_mem <= kernel.max_dynamic_shared_size_bytes <= most
                (capturing,) = (s for s in streams if s.captured is not None)
                capturing.captured.append(lambda: library.launch(name, grid, shared_mem, arguments))

            return kernel

        return SimpleNamespace(get_function=function)

    def empty(shape, dtype):
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)
        return array

    return SimpleNamespace(
        ndarray=type("ndarray", (), {}),  # array_api_compat asks whether an array is one
        empty=empty,
        asarray=np.asarray,
        asnumpy=np.array,
        RawModule=module,
        cuda=SimpleNamespace(
            Stream=stream,
            Device=lambda: SimpleNamespace(attributes=ATTRIBUTES),
            get_current_stream=lambda: Stream.current[-1],
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            compiler=SimpleNamespace(CompileException=CompileError),
            runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        ),
    )


def address(array: np.ndarray) -> int:
    """In place of npbn.engine.gpu.engine._address."""
    return array.ctypes.data


def install(builds: Path) -> None:
    """In this process, for good: what takes CuPy gets the stand-in."""
    sys.modules["cupy"] = stand_in(builds)
    engine._address = address
    backend._cupy_backend = lambda: DEVICE
