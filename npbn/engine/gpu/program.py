"""A training step, or an evaluation, on a GPU, as data: arrays and launches, without a device.

A `Program` says which arrays there have to be, and which kernels of ``kernels.cu`` are launched on
them, one after the other. `npbn.engine.gpu.launch` writes programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SOURCE = Path(__file__).with_name("kernels.cu")

OPTIONS = ("--std=c++17", "--prec-div=false", "--prec-sqrt=false")
"""Compiler flags: approximate division and square root of floats (2 ulp)."""

THREADS = 256
"""Threads of a block, as in kernels.cu."""

# The structures of kernels.cu.
SHAPE_FIELDS = (
    *("channels", "height", "width", "maps", "rows", "columns"),
    *("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"),
    *("window_h", "window_w", "maximum", "activation"),
)
_STATISTICS = ("means", "squares", "mean", "rest", "var", "moving_mean", "moving_var")
STRUCTURES = {
    "Shape": dict.fromkeys(SHAPE_FIELDS, "int"),
    "Batch": dict.fromkeys(("images", "labels", "order", "step"), "pointer") | {"stride": "int"},
    "Norm": dict.fromkeys(("gamma", "beta", *_STATISTICS), "pointer")
    | {"parts": "int", "examples_per_part": "int", "eps": "real", "momentum": "real"},
    "Sums": {"sums": "pointer", "parts": "int", "dgamma": "pointer", "dbeta": "pointer"},
    "Tensor": dict.fromkeys(("offset", "size", "partial_offset", "partials", "decays"), "int"),
}


class Pointer(NamedTuple):
    """The address of a number in an array of a program."""

    array: str
    offset: int = 0


NULL = None


@dataclass(frozen=True)
class Structure:
    """A structure of kernels.cu, passed by value.

    Attributes:
        name: of `STRUCTURES`.
        values: by field; what is not there is 0, or null.
    """

    name: str
    values: Mapping[str, Any]


Argument = Pointer | Structure | np.generic | None


@dataclass(frozen=True)
class ArraySpec:
    """An array on the device.

    Attributes:
        value: what is in it at first; None: anything.
    """

    shape: tuple[int, ...]
    dtype: Any
    value: Any = None

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Launch:
    """A kernel, by its C++ name with its template arguments, in a grid of blocks of `THREADS`.

    Attributes:
        shared: bytes of shared memory of a block.
        arguments: in the kernel's order; NumPy scalars have the C++ type's size.
    """

    kernel: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """The arrays and launches of a training step, or of an evaluation.

    Attributes:
        arrays: by name.
        launches: in their order.
        dtype: of the numbers that the kernels call real.
    """

    arrays: dict[str, ArraySpec]
    launches: tuple[Launch, ...]
    dtype: Any

    def value(self, argument: Argument, address: Callable[[Pointer], int]) -> np.ndarray:
        """An argument's bytes as the kernel gets them, in an array without axes."""
        if isinstance(argument, Structure):
            types = {"int": np.int32, "real": self.dtype, "pointer": np.uint64}
            fields = STRUCTURES[argument.name]
            dtype = np.dtype([(name, types[kind]) for name, kind in fields.items()], align=True)
            found = np.zeros((), dtype)
            for name, value in argument.values.items():
                found[name] = self.value(value, address) if fields[name] == "pointer" else value
            return found
        if argument is None:
            return np.array(0, np.uint64)
        if isinstance(argument, Pointer):
            return np.array(address(argument), np.uint64)
        return np.asarray(argument)


def largest(programs: Iterable[Program]) -> dict[str, ArraySpec]:
    """Return the arrays of all programs, each as large as the largest of them needs it."""
    found: dict[str, ArraySpec] = {}
    for program in programs:
        for name, spec in program.arrays.items():
            if name not in found or spec.nbytes > found[name].nbytes:
                found[name] = spec
    return found
