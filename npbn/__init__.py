"""npbn: batch normalization, and the network around it, with gradients derived by hand.

Where to start: `npbn.functional` is the mathematics, `npbn.layers` the state around it,
`npbn.models` the networks, `npbn.training` the loop; `npbn.train` trains a model on data of yours,
`npbn.load` loads the model of a run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npbn.experiment import load, train

__version__ = "0.1.0"
__all__ = ["load", "train"]

_MODULES = (
    *("backend", "checkpoint", "data", "engine", "errors", "experiment", "functional"),
    *("inspection", "layers", "models", "optim", "plots", "runs", "training", "verify"),
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
