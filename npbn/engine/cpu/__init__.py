"""The fused engine on the CPU: kernels in plain Python loops, compiled by Numba.

`CpuEngine` runs the stages of `npbn.engine.plan` on chunks of examples, in threads. Read the
modules in this order: `vector` (what a number is here), `products` (convolutions and linear
layers), `normalization` (what is between them), `launches` (what runs in parallel), `network`
(where it all lies), `engine`. ``README.md`` is the log of what was measured.

Importing this package raises `npbn.errors.UnsupportedError` where Numba cannot be imported.
"""

from npbn.errors import UnsupportedError

try:
    import numba as _  # noqa: F401  # asked for here, so that the reason is given in one line
except ImportError as error:
    reason = " ".join(str(error).split())
    raise UnsupportedError(f"it needs Numba, which cannot be imported: {reason}") from None

from npbn.engine.cpu.engine import CpuEngine

__all__ = ["CpuEngine"]
