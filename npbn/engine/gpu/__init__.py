"""The fused engine on a GPU, with CuPy.

`launch` turns a plan into a `program`: arrays and launches of the kernels in ``kernels.cu``, with
the sizes in `shapes`. None of them knows a device; `GpuEngine` runs programs with CuPy.
"""

from npbn.engine.gpu.engine import GpuEngine

__all__ = ["GpuEngine"]
