"""Describe a training step or an evaluation on a GPU as data.

A `Program` lists the arrays that must exist on the GPU, and the launches of kernels of
``kernels.cu`` in their order. `npbn.engine.gpu.launch` writes programs. Nothing here needs a GPU.
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
"""The options of the compiler. Division and square root of floats are approximate (2 ulp)."""

THREADS = 256
"""The number of threads of a block. kernels.cu defines the same constant."""

# The following names list the fields of the structures of kernels.cu, with their types.
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
    """A pointer to a number in an array of a program: the name of the array, and the index."""

    array: str
    offset: int = 0


NULL = None


@dataclass(frozen=True)
class Structure:
    """An argument that is a structure of kernels.cu, passed by value.

    Attributes:
        name: the name of the structure in `STRUCTURES`.
        values: the values by the names of their fields. A field without a value is 0 or null.
    """

    name: str
    values: Mapping[str, Any]


Argument = Pointer | Structure | np.generic | None


@dataclass(frozen=True)
class ArraySpec:
    """The description of an array on the GPU.

    Attributes:
        shape, dtype: the shape and the dtype of the array.
        value: the initial value of all elements, or an array of initial values. None means that the
            array need not be initialized.
    """

    shape: tuple[int, ...]
    dtype: Any
    value: Any = None

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * np.dtype(self.dtype).itemsize)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: the C++ name of the kernel, with its template arguments.
        grid: the number of blocks along each axis. A block has `THREADS` threads.
        shared: the number of bytes of shared memory of a block.
        arguments: the arguments in the order of the kernel's parameters. A NumPy scalar has the
            size of the parameter's C++ type.
    """

    kernel: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """The arrays and the launches of a training step or of an evaluation.

    Attributes:
        arrays: the arrays by name.
        launches: the launches in their order.
        dtype: the dtype of the C++ type ``real`` of the kernels, float32 or float64.
    """

    arrays: dict[str, ArraySpec]
    launches: tuple[Launch, ...]
    dtype: Any

    def value(self, argument: Argument, address: Callable[[Pointer], int]) -> np.ndarray:
        """Return the bytes that are passed for an argument, as a NumPy array without axes.

        Args:
            argument: the argument.
            address: a function that turns a `Pointer` into an address in the GPU's memory.
        """
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
    """Return the arrays of several programs by name. For each name, return the largest array."""
    found: dict[str, ArraySpec] = {}
    for program in programs:
        for name, spec in program.arrays.items():
            if name not in found or spec.nbytes > found[name].nbytes:
                found[name] = spec
    return found
