r"""A minimal deep-learning framework without autograd: every gradient is derived by hand.

With m values of a feature in the batch, s = √(variance + eps) and x̂ = (x − mean) / s, this is the
backward pass of batch normalization in training:

```python
dbeta = sum_over(dy, axes)
dgamma = sum_over(dy * x_centred, axes) / s
dx = (gamma / s) * (dy - dbeta / m - x_centred * (dgamma / (s * m)))
```

$$dx_i = \frac{\gamma}{s} \Big( dy_i - \frac{d\beta}{m} - \hat{x}_i \frac{d\gamma}{m} \Big)$$

**Where to read**, in this order:

1. `npbn.functional.batch_norm`: the derivation, step by step; then `npbn.functional.conv2d` and the
   other operations of `npbn.functional`
2. `npbn.layers`, `npbn.models`, `npbn.optim`: the state around the operations, two networks, SGD
3. `npbn.training`: the loop; `npbn.engine`: what computes in it
4. `npbn.verify`: how every gradient is proved
5. `npbn.distributed`: several processes that train one model
6. `npbn.data`, `npbn.experiment`, `npbn.runs`, `npbn.checkpoint`: data, configurations, runs, files

`npbn.train` trains a model on data of yours; `npbn.load` loads the model of a run.

**Lessons**: [batch norm by hand](lessons/1_batch_norm_by_hand.html),
[what batch norm does to LeNet](lessons/2_what_batch_norm_does_to_lenet.html),
[convolution as a matrix product](lessons/3_convolution_as_a_matrix_product.html),
[npbn against PyTorch](lessons/4_npbn_against_pytorch.html),
[batch norm over several machines](lessons/5_batch_norm_over_several_machines.html).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npbn.experiment import load, train

__version__ = "0.1.0"
__all__ = ["load", "train"]

_MODULES = (
    *("backend", "checkpoint", "commands", "data", "distributed", "engine", "errors"),
    *(
        "experiment",
        "functional",
        "inspection",
        "layers",
        "models",
        "optim",
        "plots",
        "runs",
        "training",
        "verify",
    ),
)


def __getattr__(name: str) -> Any:
    """Import what is asked for: ``import npbn`` by itself imports nothing."""
    if name in _MODULES:
        return importlib.import_module(f"npbn.{name}")
    if name in __all__:
        globals()[name] = getattr(importlib.import_module("npbn.experiment"), name)
        return globals()[name]
    raise AttributeError(f"module 'npbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *__all__])
