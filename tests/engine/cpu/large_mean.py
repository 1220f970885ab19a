"""Batch norm in float32 over a channel with a mean of 1e4 and a standard deviation of 1e-2.

A number near 1e4 has a rounding of 5e-4 there. So what a batch norm computes is measured against
float64 that begins with the same float32 numbers: y of its layer, and the gradient of the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from models import NUMPY

from npbn.data import Split
from npbn.layers import BatchNorm, Conv2d, Flatten, Linear, Sequential
from npbn.optim import SGD

UNIT = 2.0**-24
"""The rounding of a float32 near 1."""
BATCH, ROWS, COLUMNS, CLASSES = 42, 3, 4, 3


def errors(engine_class: Any, eps: float = 1e-12) -> dict[str, float]:
    """Return the errors of one training step by what is a CpuEngine, in units of `UNIT`.

    ``var`` is relative; ``z`` in standard deviations; ``dgamma``, ``dbeta`` and ``dy`` are relative
    to the largest sum of the absolute values of what is summed up.
    """
    rng = np.random.default_rng(0)
    conv = Conv2d(2, 1, 1, bias=False)
    norm = BatchNorm(1, 4, eps=eps, momentum=0)  # the moving averages are the batch's
    linear = Linear(ROWS * COLUMNS, CLASSES, bias=False, generator=np.random.default_rng(1))
    model = Sequential(conv, norm, Flatten(), linear)
    model.to(NUMPY, "float32")
    conv.weight.data[...] = np.array([1e4, 0.035], np.float32).reshape(1, 2, 1, 1)
    norm.gamma.data[...], norm.beta.data[...] = 0.75, 0.25
    weight = linear.weight.data.astype(np.float64)
    images = rng.integers(0, 256, (BATCH, 2, ROWS, COLUMNS), dtype=np.uint8)
    images[:, 0] = 255  # which is 1 as a pixel
    split = Split(images, rng.integers(0, CLASSES, BATCH))
    optimizer = SGD(model.parameters(), 1e-30)
    engine = engine_class(model, optimizer, split, split, batch_size=BATCH, threads=2)
    list(engine.steps(np.arange(BATCH)))

    stages = engine.net.stages
    y = _examples(engine, int(stages["y"][0]), int(stages["y_size"][0]))
    dy = _examples(engine, int(stages["z"][0]), int(stages["y_size"][0]))
    z = _examples(engine, int(stages["x"][1]), int(stages["x_size"][1]))
    assert y.shape == z.shape == dy.shape
    dlogits = np.stack(
        [
            _examples(engine, int(stages["z"][1]) + o, int(stages["y_size"][1]), 1)[0]
            for o in range(CLASSES)
        ]
    )

    mean, var = y.mean(), y.var()
    assert abs(mean - 1e4) < 1 and 0.008 < var**0.5 < 0.012
    inverse = 1 / np.sqrt(var + eps)
    x_hat = (y - mean) * inverse
    dz = weight.T @ dlogits
    terms = dz * x_hat
    dgamma, dbeta = terms.sum(), dz.sum()
    right = 0.75 * inverse * (dz - dbeta / y.size - x_hat * dgamma / y.size)
    return {
        "var": abs(norm.moving_var.data.item() / var - 1) / UNIT,
        "z": np.abs(z - (0.75 * x_hat + 0.25)).max() / UNIT,
        "dgamma": abs(norm.gamma.gradient.item() - dgamma) / np.abs(terms).sum() / UNIT,
        "dbeta": abs(norm.beta.gradient.item() - dbeta) / np.abs(dz).sum() / UNIT,
        "dy": np.abs(dy - right).max() / (0.75 * inverse * np.abs(dz).max()) / UNIT,
    }


def _examples(engine: Any, first: int, step: int, count: int = ROWS * COLUMNS) -> np.ndarray:
    """Vectors of every chunk, by examples: (count, BATCH) in float64."""
    values, lanes = engine.net.values.reshape(-1, 16), 16
    chunks = -(-BATCH // lanes)
    rows = [values[first + m * step :][:count] for m in range(chunks)]
    return np.concatenate(rows, axis=1)[:, :BATCH].astype(np.float64)
