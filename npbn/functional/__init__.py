"""The mathematics: stateless pairs of a forward pass and its hand-derived backward pass.

Each file holds one operation, with the derivation in its docstring and the backward right under
the forward. ``forward(...) -> y, cache`` and ``backward(dy, cache) -> gradients`` hold for all but
`batch_norm`, which also returns the moving statistics, and the loss, whose backward needs no dy.
The gradient of the loss with respect to x is named dx, and has the shape of x.

What holds for every function here:

- *Libraries.* The code is array-API code and runs unchanged on NumPy, on CuPy and on any other
  library of the Python array API standard. The arrays of one call come from one library.
- *Dtypes.* float32 or float64, and the result has the dtype of the arguments. Mixing the two is a
  TypeError, as are integers. A complex number may stand where a real one of the same precision
  may: with it, a complex step f'(x) = Im f(x + ih) / h goes through the very code that trains.
- *Memory.* Arguments are never written to, and nothing returned shares memory with them. Any memory
  order is accepted, and read-only arrays are. Convolution and pooling return arrays of shape
  (N, C, H, W) whose examples are neighbours in memory, because NumPy is fastest on long runs.
- *Caches.* A cache can be used any number of times, as long as nobody writes into a returned y
  (`sigmoid`'s cache is its y).
"""

from npbn.functional.batch_norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_staged,
)
from npbn.functional.conv2d import conv2d, conv2d_backward
from npbn.functional.linear import linear, linear_backward
from npbn.functional.pooling import (
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from npbn.functional.relu import relu, relu_backward
from npbn.functional.sigmoid import sigmoid, sigmoid_backward
from npbn.functional.softmax_cross_entropy import (
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
)

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_staged",
    "conv2d",
    "conv2d_backward",
    "linear",
    "linear_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "relu",
    "relu_backward",
    "sigmoid",
    "sigmoid_backward",
    "softmax_cross_entropy",
    "softmax_cross_entropy_backward",
]
