"""Every operation with inputs to run it on: what the properties in the tests range over.

A case's ``repr`` is the call that makes it, so that a failing example can be pasted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from npbn import functional as F

EPS64 = np.finfo(np.float64).eps


@dataclass
class Case:
    """One operation on given inputs.

    Attributes:
        inputs: what gradients are taken by, float64.
        constants: further array arguments.
        forward: (inputs and constants, as keywords) → y, cache, ...
        backward: dy, cache → the gradients in the order of the inputs.
        oracle: the same by PyTorch: (torch, inputs and constants as tensors) → y.
        condition: by how much the operation magnifies the rounding of its inputs.
        formed_from: the size of the numbers that the backward pass forms an element's factor from
            by subtraction, where the factor itself can be much smaller.
    """

    inputs: dict[str, np.ndarray]
    forward: Callable
    backward: Callable
    oracle: Callable
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    condition: float = 1.0
    formed_from: float = 0.0
    text: str = ""

    def __repr__(self) -> str:
        return self.text


def pastable(make: Callable[..., Case]) -> Callable[..., Case]:
    @functools.wraps(make)
    def wrapper(**arguments) -> Case:
        case = make(**arguments)
        listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        case.text = f"{make.__name__}({listed})"
        return case

    return wrapper


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


@pastable
def batch_norm_case(*, seed, shape, training, eps=1e-5, momentum=0.9, staged=False) -> Case:
    rng = np.random.default_rng(seed)
    parameter = (1, shape[1]) + (1,) * (len(shape) - 2)
    x = rng.uniform(-2, 2, parameter) + normal(rng, *shape)

    def oracle(torch, x, gamma, beta, moving_mean, moving_var):
        flat = [t.reshape(-1) for t in (moving_mean, moving_var, gamma, beta)]
        flat[0], flat[1] = flat[0].clone(), flat[1].clone()  # PyTorch updates them in place
        return torch.nn.functional.batch_norm(
            x, *flat, training=training, momentum=1 - momentum, eps=eps
        )

    return Case(
        inputs={
            "x": x,
            "gamma": rng.uniform(0.5, 2, parameter) * rng.choice([-1, 1], parameter),
            "beta": normal(rng, *parameter),
        },
        constants={
            "moving_mean": normal(rng, *parameter),
            "moving_var": rng.uniform(0.5, 2, parameter),
        },
        forward=functools.partial(F.batch_norm, training=training, eps=eps, momentum=momentum),
        backward=F.batch_norm_backward_staged if staged else F.batch_norm_backward,
        oracle=oracle,
        # x̂ = (x - μ) / s magnifies an error in x by |x| / s. |x| stays below 10, and s is at least
        # √eps, in prediction √0.5. dx, which is divided by s once more, is compared with its own
        # terms, which are, too.
        condition=10 / np.sqrt(eps),
    )


@pastable
def conv2d_case(*, seed, n, c, out, image, kernel, stride=1, padding=0, bias=True) -> Case:
    rng = np.random.default_rng(seed)
    inputs = {"x": normal(rng, n, c, *image), "weight": normal(rng, out, c, *kernel)}
    if bias:
        inputs["bias"] = normal(rng, out)

    def oracle(torch, x, weight, bias=None):
        return torch.nn.functional.conv2d(x, weight, bias, stride=stride, padding=padding)

    return Case(
        inputs=inputs,
        forward=functools.partial(F.conv2d, stride=stride, padding=padding),
        backward=F.conv2d_backward,
        oracle=oracle,
    )


@pastable
def pool_case(*, kind, seed, n, c, image, kernel, stride=None, padding=0) -> Case:
    rng = np.random.default_rng(seed)

    def oracle(torch, x):
        pool = getattr(torch.nn.functional, kind)
        return pool(x, kernel, stride=stride, padding=padding)

    return Case(
        inputs={"x": normal(rng, n, c, *image)},
        forward=functools.partial(
            getattr(F, kind), kernel_size=kernel, stride=stride, padding=padding
        ),
        backward=getattr(F, f"{kind}_backward"),
        oracle=oracle,
    )


@pastable
def linear_case(*, seed, n, features, out, bias=True) -> Case:
    rng = np.random.default_rng(seed)
    inputs = {"x": normal(rng, n, features), "weight": normal(rng, out, features)}
    if bias:
        inputs["bias"] = normal(rng, out)
    return Case(
        inputs=inputs,
        forward=F.linear,
        backward=F.linear_backward,
        oracle=lambda torch, x, weight, bias=None: torch.nn.functional.linear(x, weight, bias),
    )


@pastable
def activation_case(*, kind, seed, shape) -> Case:
    rng = np.random.default_rng(seed)
    return Case(
        inputs={"x": 3 * normal(rng, *shape)},
        forward=getattr(F, kind),
        backward=getattr(F, f"{kind}_backward"),
        oracle=lambda torch, x: getattr(torch, kind)(x),
        formed_from=1.0 if kind == "sigmoid" else 0.0,  # 1 - y, close to 0 where y is close to 1
    )


@pastable
def softmax_cross_entropy_case(*, seed, n, classes) -> Case:
    rng = np.random.default_rng(seed)

    def backward(dy, cache):
        return dy * F.softmax_cross_entropy_backward(cache)

    return Case(
        inputs={"logits": 3 * normal(rng, n, classes)},
        constants={"labels": rng.integers(0, classes, n)},
        forward=F.softmax_cross_entropy,
        backward=backward,
        oracle=lambda torch, logits, labels: torch.nn.functional.cross_entropy(logits, labels),
        formed_from=1 / n,  # (p - 1) / N, close to 0 where p is close to 1
    )


# One small, awkward case of each kind: odd sizes, strides that do not divide, uneven padding.
EXAMPLES = [
    batch_norm_case(seed=1, shape=(5, 3), training=True),
    batch_norm_case(seed=2, shape=(2, 3, 3, 2), training=True, eps=0.1, momentum=0.7),
    batch_norm_case(seed=3, shape=(5, 3), training=False),
    batch_norm_case(seed=4, shape=(2, 3, 3, 2), training=False),
    batch_norm_case(seed=5, shape=(3, 2, 2, 3), training=True, staged=True),
    batch_norm_case(seed=6, shape=(4, 3), training=False, staged=True),
    conv2d_case(seed=7, n=2, c=2, out=3, image=(6, 5), kernel=(3, 2), stride=2, padding=(1, 0)),
    conv2d_case(seed=8, n=1, c=1, out=2, image=(5, 7), kernel=(2, 3), stride=(1, 3), bias=False),
    pool_case(kind="avg_pool2d", seed=9, n=2, c=2, image=(5, 6), kernel=2),
    pool_case(
        kind="avg_pool2d", seed=10, n=1, c=2, image=(5, 4), kernel=(3, 2), stride=2, padding=(1, 1)
    ),
    pool_case(kind="max_pool2d", seed=11, n=2, c=2, image=(5, 6), kernel=2),
    pool_case(
        kind="max_pool2d", seed=12, n=1, c=2, image=(5, 4), kernel=(3, 2), stride=2, padding=(1, 1)
    ),
    linear_case(seed=13, n=3, features=4, out=2),
    linear_case(seed=14, n=1, features=3, out=3, bias=False),
    activation_case(kind="sigmoid", seed=15, shape=(3, 4)),
    activation_case(kind="relu", seed=16, shape=(2, 1, 3, 2)),
    softmax_cross_entropy_case(seed=17, n=3, classes=4),
]


# Hypothesis strategies, named by the axes they draw.
seeds = st.integers(0, 2**32 - 1)
batch_sizes = st.integers(1, 4)
channels = st.integers(1, 3)
features = st.integers(1, 6)
images = st.tuples(st.integers(1, 7), st.integers(1, 7))
kernels = st.tuples(st.integers(1, 3), st.integers(1, 3))
strides = st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))
paddings = st.integers(0, 2) | st.tuples(st.integers(0, 2), st.integers(0, 2))


def both(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def fits(image, kernel, padding) -> bool:
    return all(h + 2 * p >= k for h, p, k in zip(image, both(padding), kernel, strict=True))


@st.composite
def batch_norm_cases(draw) -> Case:
    shape = draw(
        st.tuples(batch_sizes, features)
        | st.tuples(batch_sizes, channels, st.integers(1, 4), st.integers(1, 4))
    )
    return batch_norm_case(
        seed=draw(seeds),
        shape=shape,
        training=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1, 1.0])),
        momentum=draw(st.floats(0, 1)),
        staged=draw(st.booleans()),
    )


@st.composite
def conv2d_cases(draw) -> Case:
    image, kernel, padding = draw(
        st.tuples(images, kernels, paddings).filter(lambda drawn: fits(*drawn))
    )
    return conv2d_case(
        seed=draw(seeds),
        n=draw(batch_sizes),
        c=draw(channels),
        out=draw(channels),
        image=image,
        kernel=kernel,
        stride=draw(strides),
        padding=padding,
        bias=draw(st.booleans()),
    )


@st.composite
def pool_cases(draw) -> Case:
    def allowed(drawn) -> bool:
        image, kernel, padding = drawn
        small = all(2 * p <= k for p, k in zip(both(padding), kernel, strict=True))
        return small and fits(image, kernel, padding)

    image, kernel, padding = draw(st.tuples(images, kernels, paddings).filter(allowed))
    return pool_case(
        kind=draw(st.sampled_from(["avg_pool2d", "max_pool2d"])),
        seed=draw(seeds),
        n=draw(batch_sizes),
        c=draw(channels),
        image=image,
        kernel=kernel,
        stride=draw(st.none() | strides),
        padding=padding,
    )


linear_cases = st.builds(
    linear_case,
    seed=seeds,
    n=batch_sizes,
    features=features,
    out=features,
    bias=st.booleans(),
)
activation_cases = st.builds(
    activation_case,
    kind=st.sampled_from(["sigmoid", "relu"]),
    seed=seeds,
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
)
softmax_cross_entropy_cases = st.builds(
    softmax_cross_entropy_case, seed=seeds, n=batch_sizes, classes=st.integers(1, 5)
)
STRATEGIES = {
    "batch_norm": batch_norm_cases(),
    "conv2d": conv2d_cases(),
    "pool": pool_cases(),
    "linear": linear_cases,
    "activation": activation_cases,
    "softmax_cross_entropy": softmax_cross_entropy_cases,
}
