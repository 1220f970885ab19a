"""Compute the forward pass and the hand-derived backward pass of each operation, without state.

Each file defines one operation. The docstring of the file derives the gradient, and the backward
function follows the forward function. The signatures are ``forward(...) -> y, cache`` and
``backward(dy, cache) -> gradients``, with two exceptions: `batch_norm` also returns the moving
statistics, and the backward function of the loss has no argument dy. The gradient of the loss with
respect to x is named dx and has the shape of x.

These rules hold for every function:

- *Libraries.* The code uses the Python array API standard. It runs unchanged on NumPy, on CuPy and
  on any other library of this standard. All arrays of one call must come from one library.
- *Dtypes.* The arguments are float32 or float64, and the result has the dtype of the arguments. A
  mixture of the two dtypes raises a TypeError, and so do integers. Complex arrays of the same
  precision are allowed in place of real arrays. So the complex step f'(x) = Im f(x + ih) / h checks
  the code that trains.
- *Memory.* Arguments are never changed, and results do not share memory with arguments. Arrays may
  have any memory order, and they may be read-only. Convolution and pooling return arrays of shape
  (N, C, H, W) in which neighbouring examples are neighbours in memory, because NumPy is fastest on
  long rows.
- *Caches.* A cache can be used any number of times, as long as the returned y is not changed,
  because the cache of `sigmoid` contains y.
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
