"""Models and data that the engines are tested with."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from npbn import backend
from npbn.data import Split
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)

NUMPY = backend.get_backend("numpy")


@st.composite
def models(draw) -> tuple[Sequential, tuple[int, int, int]]:
    """Up to two stages of convolution and up to three linear ones, each with its optional parts."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = channels, height, width = draw(
        st.tuples(st.integers(1, 3), st.integers(5, 12), st.integers(5, 12))
    )
    layers = []

    def optional(features: int, num_dims: int) -> None:
        if draw(st.booleans()):
            eps, momentum = draw(st.sampled_from([1e-5, 0.1])), draw(st.sampled_from([0.9, 0.5]))
            norm = BatchNorm(features, num_dims, eps=eps, momentum=momentum)
            # With β = 0, a channel of padding alone can be normalized to 0 but for rounding, which
            # is where ReLU's derivative jumps.
            norm.gamma.data[...] = generator.uniform(0.5, 2, norm.gamma.data.shape)
            norm.beta.data[...] = generator.normal(size=norm.beta.data.shape)
            layers.append(norm)
        activation = draw(st.sampled_from([None, Sigmoid, ReLU]))
        if activation is not None:
            layers.append(activation())

    for _ in range(draw(st.integers(0, 2))):
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        size = [
            (s + 2 * p - k) // t + 1
            for s, p, k, t in zip((height, width), padding, kernel, stride, strict=True)
        ]
        if min(size) < 1:
            break
        out = draw(st.integers(1, 4))
        bias = draw(st.booleans())
        layers.append(
            Conv2d(
                channels,
                out,
                kernel,
                stride=stride,
                padding=padding,
                bias=bias,
                generator=generator,
            )
        )
        channels, (height, width) = out, size
        optional(channels, 4)
        windows = [(a, b) for a in (1, 2, 3) for b in (1, 2) if height % a == 0 == width % b]
        pool = draw(st.sampled_from([None, AvgPool2d, MaxPool2d]))
        if pool is not None:
            window = draw(st.sampled_from(windows))
            layers.append(pool(window))
            height, width = height // window[0], width // window[1]
    layers.append(Flatten())
    features = channels * height * width
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 5))
        layers.append(Linear(features, out, bias=draw(st.booleans()), generator=generator))
        features = out
        optional(features, 2)
    layers.append(Linear(features, 3, generator=generator))
    return Sequential(*layers), shape


def a_split(shape, examples: int, seed: int, classes: int = 3) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (examples, *shape), dtype=np.uint8)
    return Split(images, rng.integers(0, classes, examples))


def optional_parts(norm: bool, activation, pool) -> tuple[Sequential, tuple[int, int, int]]:
    """A convolution with some of what can follow it, and a linear layer."""
    generator = np.random.default_rng(0)
    layers = [Conv2d(2, 3, 3, generator=generator)]
    layers += [BatchNorm(3, 4)] * norm
    layers += [] if activation is None else [activation()]
    layers += [] if pool is None else [pool((2, 3))]
    side = (4, 6) if pool is None else (2, 2)
    layers += [Flatten(), Linear(3 * side[0] * side[1], 3, generator=generator)]
    return Sequential(*layers), (2, 6, 8)


TINY = (1, 6, 6)
"""The shape of the images of `a_tiny_model`."""


def a_tiny_model(dtype="float64") -> Sequential:
    generator = np.random.default_rng(3)
    model = Sequential(
        Conv2d(1, 3, 3, generator=generator),
        BatchNorm(3, 4),
        Sigmoid(),
        AvgPool2d(2),
        Flatten(),
        Linear(12, 3, generator=generator),
    )
    model.to(NUMPY, dtype)
    return model


SMALL = (2, 8, 8)
"""The shape of the images of `small_model`."""


def small_model() -> Sequential:
    """Every kernel has something to do, and 50 places in a convolution make two strips."""
    generator = np.random.default_rng(0)
    return Sequential(
        *(Conv2d(2, 3, 5, padding=1, generator=generator), BatchNorm(3, 4), Sigmoid()),
        AvgPool2d((2, 3)),
        *(Conv2d(3, 2, 2, generator=generator), ReLU(), MaxPool2d((2, 1))),
        *(Flatten(), Linear(2, 40, generator=generator), BatchNorm(40, 2)),
        Linear(40, 3, generator=generator),
    )
