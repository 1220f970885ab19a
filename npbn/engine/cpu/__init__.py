"""Train and evaluate on the CPU with kernels in plain Python loops, which Numba compiles.

`CpuEngine` runs the stages of `npbn.engine.plan` on chunks of examples, in threads. Read the
modules in this order:

- `vector`: a type for one number of each of several examples;
- `products`: convolutions and linear layers;
- `normalization`: batch norm, activation and pooling, which follow a convolution or linear layer;
- `launches`: the work that runs in parallel, and the work between two parallel parts;
- `network`: the arrays that the kernels work on, and the places of all data in these arrays;
- `engine`: `CpuEngine`.

``README.md`` is the log of the measurements.

Importing this package raises `npbn.errors.UnsupportedError` where Numba cannot be imported.
"""

from npbn.errors import UnsupportedError

try:
    import numba as _  # noqa: F401  # imported here so that the error below gives a short reason
except ImportError as error:
    reason = " ".join(str(error).split())
    raise UnsupportedError(f"it needs Numba, which cannot be imported: {reason}") from None

from npbn.engine.cpu.engine import CpuEngine

__all__ = ["CpuEngine"]
