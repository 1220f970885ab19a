"""Train and evaluate by the fused engine on a GPU, with CuPy.

`launch` turns the plan of a model into a `program`, a list of arrays and of launches of the kernels
in ``kernels.cu``. `shapes` computes the sizes that the kernels need. These modules need no GPU.
`GpuEngine` runs the programs with CuPy.
"""

from npbn.engine.gpu.engine import GpuEngine

__all__ = ["GpuEngine"]
