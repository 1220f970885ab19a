"""Define a table of the operations that other people's code may compute.

To add an operation, add an entry to `OPERATIONS`, and its forward and backward pass to
`npbn.verify.plain`. An entry has the names of the gradients, the inputs on which code is examined
(the probes), and the layouts of arrays that people use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npbn import functional as F
from npbn.verify import plain
from npbn.verify.isolated.calling import NotExaminedError as NotExaminedError
from npbn.verify.mutants import plain_name

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""A forward and a backward function."""

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """An input on which code is examined.

    Attributes:
        name: a description of the input, for the messages.
        arguments: the arguments of the forward function in `npbn.verify.plain`, by name.
        beyond: what makes the input harder than what courses ask, such as "logits of 1000", or an
            empty text.
        optional: whether the result is ignored if the output is wrong, because the code is then not
            meant for this input.
        hard: whether right code may have a large relative error on this input.
    """

    name: str
    arguments: dict[str, Any]
    beyond: str = ""
    optional: bool = False
    hard: bool = False


@dataclass(frozen=True)
class Layout:
    """A layout of arrays that other people's code may use.

    Attributes:
        name: the difference from npbn's layout, such as "examples in columns", or an empty text.
        arguments: functions that convert npbn's arguments (and "dy") to this layout, by name.
            Arguments that are not listed are equal in both layouts.
        outputs: functions that convert outputs and gradients of this layout to npbn's, by name.
        kinds: the kinds of code that may have this layout: "function", "course" (a function with a
            dictionary of options) or "class".
        said: whether the report mentions the layout as a convention.
    """

    name: str = ""
    arguments: Mapping[str, Change] = field(default_factory=dict)
    outputs: Mapping[str, Change] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("function", "course", "class")
    said: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation that other people's code may compute, and how such code is examined.

    The role of an argument is its meaning: arguments named W or kernel have the role "weight".

    Attributes:
        gradients: the names of the gradients, in the order in which the backward pass returns them.
        draw: a function that draws the probes (inputs) from a random generator. Sizes that code may
            confuse, such as N and D, are different.
        layouts: the layouts that are tried, in this order.
        map_layouts: the layouts for x of shape (N, C, H, W), if they are not ``layouts``.
        loss: whether the output is a scalar, so the backward pass gets no upstream gradient.
        roles: the roles of arguments that are not called by their role: "logits" has the role "x".
            `npbn.verify.isolated.calling.NAMES` lists all roles.
        constants: arguments that only other people's code may have, by role, with their values.
    """

    gradients: tuple[str, ...]
    draw: Callable[[np.random.Generator], list[Probe]]
    layouts: tuple[Layout, ...] = (Layout(),)
    map_layouts: tuple[Layout, ...] = ()
    loss: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


@functools.lru_cache(64)
def probes(operation: str, seed: int = 2015) -> list[Probe]:
    """Return the inputs on which an operation is examined. Equal seeds give equal inputs."""
    if operation not in OPERATIONS:
        raise ValueError(f"expected an operation of {', '.join(OPERATIONS)}, got {operation!r}")
    return OPERATIONS[operation].draw(np.random.default_rng(seed))


def true_functions(operation: str) -> Pair:
    """Return the right forward and backward pass of an operation."""
    name = plain_name(operation)
    # Only the plain linear layer takes x of shape (N, d1, ..., dk).
    source: Any = F if hasattr(F, name) and name != "linear" else plain
    return getattr(source, name), getattr(source, f"{name}_backward")


# Changes of arrays.


def transposed(a: np.ndarray) -> np.ndarray:
    return np.transpose(a)


def flat(a: np.ndarray) -> np.ndarray:
    """Return an array of shape (1, D) or (1, C, 1, 1) as a vector."""
    return a.ravel()


def column(a: np.ndarray) -> np.ndarray:
    """Return a vector, or an array of shape (1, D), as a column of shape (D, 1)."""
    return a.reshape(-1, 1)


def row(a: np.ndarray) -> np.ndarray:
    return a.reshape(1, -1)


def from_column(a: np.ndarray) -> np.ndarray:
    """Return an array of shape (D, 1) as a vector, and any other array as it is."""
    return a.ravel() if a.ndim == 2 and a.shape[1] == 1 else a


def from_row(a: np.ndarray) -> np.ndarray:
    """Return an array of shape (1, D) as a vector, and any other array as it is."""
    return a.ravel() if a.ndim == 2 and a.shape[0] == 1 else a


def channels_last(a: np.ndarray) -> np.ndarray:
    return a.transpose(0, 2, 3, 1) if a.ndim == 4 else a


def channels_first(a: np.ndarray) -> np.ndarray:
    return a.transpose(0, 3, 1, 2) if a.ndim == 4 else a


def filters_last(a: np.ndarray) -> np.ndarray:
    """Return weights of shape (F, C, kH, kW) in the shape (kH, kW, C, F)."""
    return np.transpose(a, (2, 3, 1, 0))


def filters_first(a: np.ndarray) -> np.ndarray:
    return a.transpose(3, 2, 0, 1) if a.ndim == 4 else a


def one_hot(a: np.ndarray) -> np.ndarray:
    return np.asarray(np.eye(4)[a])


def _norm_layout(name: str, change: Change, back: Change, **more: Any) -> Layout:
    """Return a layout in which batch norm's gamma, beta and moving averages are converted.

    The function ``change`` converts from npbn's layout, and ``back`` converts to npbn's layout.
    """
    parameters = ("gamma", "beta", "moving_mean", "moving_var")
    results = ("dgamma", "dbeta", "moving_mean", "moving_var")
    arguments = dict.fromkeys(parameters, change) | more.pop("arguments", {})
    outputs = dict.fromkeys(results, back) | more.pop("outputs", {})
    return Layout(name, arguments, outputs, **more)


def as_parameter(a: np.ndarray) -> np.ndarray:
    """Return a vector as (1, D), and any other array in a shape that no parameter has."""
    return a[None]


def column_to_row(a: np.ndarray) -> np.ndarray:
    return a.T if a.ndim == 2 and a.shape[1] == 1 else a


def as_channels(a: np.ndarray) -> np.ndarray:
    """Return a vector in the shape (1, C, 1, 1). Any other array gets one more axis."""
    return a.reshape(1, -1, 1, 1) if a.ndim == 1 else a[None]


# Batch norm and its relatives.


def draw_batch_norm(rng: np.random.Generator, spatial: bool | None = None) -> list[Probe]:
    def probe(
        name: str, shape: tuple[int, ...], training: bool, beyond: str = "", mean: float = 1.0
    ) -> Probe:
        form = (1, shape[1]) + (1,) * (len(shape) - 2)
        arguments = {
            "x": mean + 2 * rng.standard_normal(shape),
            "gamma": rng.uniform(0.5, 2, form),
            "beta": rng.standard_normal(form),
            "moving_mean": rng.standard_normal(form),
            "moving_var": rng.uniform(0.5, 2, form),
            "training": training,
            "eps": 0.1,
            "momentum": 0.7,
        }
        return Probe(name, arguments, beyond, hard=mean > 1)

    def small_variance(shape: tuple[int, ...], name: str) -> Probe:
        """Return a probe with a variance so small that even an eps of 1e-5 matters."""
        found = probe(name, shape, True)
        x = found.arguments["x"]
        return Probe(name, found.arguments | {"x": 1 + 3e-3 * (x - 1)})

    flat_ones = [
        probe("training, (N, D)", (7, 3), True),
        probe("prediction, (N, D)", (5, 3), False),
        small_variance((6, 4), "training, (N, D), small variance"),
        probe("training, (N, D), mean 1e8", (5, 3), True, "a mean of 1e8", 1e8),
    ]
    maps = [
        probe("training, (N, C, H, W)", (3, 2, 4, 5), True),
        probe("prediction, (N, C, H, W)", (4, 2, 5, 3), False),
        small_variance((2, 3, 5, 4), "training, (N, C, H, W), small variance"),
    ]
    return maps if spatial else flat_ones if spatial is False else flat_ones + maps


NORM_LAYOUTS = (
    Layout(kinds=("function", "class")),
    _norm_layout("gamma (D,)", flat, as_parameter),
    _norm_layout(
        "examples in columns",
        column,
        column_to_row,
        arguments={"x": transposed, "dy": transposed},
        outputs={"y": transposed, "dx": transposed},
        said=True,
    ),
)
MAP_LAYOUTS = (
    Layout(kinds=("function", "class")),
    _norm_layout("gamma (C,)", flat, as_channels),
    _norm_layout(
        "gamma (1, C)", row, lambda a: a.reshape(1, -1, 1, 1), kinds=("function", "class")
    ),
    _norm_layout(
        "channels last",
        flat,
        as_channels,
        arguments={"x": channels_last, "dy": channels_last},
        outputs={"y": channels_first, "dx": channels_first},
        kinds=("function", "class"),
        said=True,
    ),
)


def draw_layer_norm(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, int], spread: float = 2.0) -> Probe:
        arguments = {
            "x": 1 + spread * rng.standard_normal(shape),
            "gamma": rng.uniform(0.5, 2, shape[1]),
            "beta": rng.standard_normal(shape[1]),
            "eps": 0.1,
        }
        return Probe(name, arguments)

    return [probe("(N, D)", (5, 4)), probe("small variance", (3, 6), 6e-3)]


def draw_group_norm(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, ...], groups: int) -> Probe:
        form = (1, shape[1], 1, 1)
        arguments = {
            "x": 1 + 2 * rng.standard_normal(shape),
            "gamma": rng.uniform(0.5, 2, form),
            "beta": rng.standard_normal(form),
            "groups": groups,
            "eps": 0.1,
        }
        return Probe(name, arguments)

    return [probe("2 groups", (3, 6, 4, 5), 2), probe("4 groups", (2, 8, 5, 3), 4)]


# Convolution and pooling.


def draw_conv2d(rng: np.random.Generator) -> list[Probe]:
    def probe(
        name: str,
        image: tuple[int, int],
        kernel: tuple[int, int],
        stride: Any,
        padding: Any,
        beyond: str = "",
        optional: bool = False,
    ) -> Probe:
        x, weight = rng.standard_normal((2, 3, *image)), rng.standard_normal((4, 3, *kernel))
        arguments = {"x": x, "weight": weight, "bias": rng.standard_normal(4)}
        return Probe(name, arguments | {"stride": stride, "padding": padding}, beyond, optional)

    return [
        probe("stride 1, padding 1", (5, 6), (3, 3), (1, 1), (1, 1)),
        probe("stride 1, no padding", (5, 7), (3, 3), (1, 1), (0, 0)),
        probe("stride 2, padding 1", (5, 7), (3, 3), (2, 2), (1, 1)),
        probe("stride 2 that leaves a row and a column", (6, 8), (3, 3), (2, 2), (0, 0), DIVIDES),
        probe("kernel 3 × 2, stride 1, no padding", (5, 6), (3, 2), (1, 1), (0, 0), NOT_SQUARE),
        probe("kernel 3 × 2, stride 2, padding 1", (7, 4), (3, 2), (2, 2), (1, 1), NOT_SQUARE),
        probe("stride (2, 1), padding (0, 1)", (7, 5), (3, 3), (2, 1), (0, 1), PAIRS, True),
        probe("stride 3, padding 2", (7, 10), (3, 3), (3, 3), (2, 2), "a stride of 3"),
    ]


DIVIDES = "a stride that does not divide"
STRUCTURE = {
    *("kernels that are not square", "a stride that does not divide", "padding", "a stride of 3"),
    *("stride and padding that differ by axis", "a stride of 1", "feature maps"),
}
"""Values of `Probe.beyond` for which right outputs with wrong gradients make the code wrong.

For the other values, the numbers are extreme or equal, and wrong gradients are only reported.
"""
KINKS = "ties", "zeros"
"""The names of the probes at which some functions have no derivative."""
NOT_SQUARE = "kernels that are not square"
PAIRS = "stride and padding that differ by axis"
CONV_LAYOUTS = (
    Layout(),
    Layout("bias (F, 1)", {"bias": column}, {"dbias": from_column}, ("class",)),
    Layout("bias (1, F)", {"bias": row}, {"dbias": from_row}, ("class",)),
    Layout(
        "channels last, weight (kH, kW, C, F)",
        {
            "x": channels_last,
            "dy": channels_last,
            "weight": filters_last,
            "bias": lambda a: a.reshape(1, 1, 1, -1),
        },
        {
            "y": channels_first,
            "dx": channels_first,
            "dweight": filters_first,
            "dbias": lambda a: a.ravel() if a.shape[:3] == (1, 1, 1) else a,
        },
        said=True,
    ),
    Layout(
        "channels last, weight (kH, kW, C, F), bias (F,)",
        {"x": channels_last, "dy": channels_last, "weight": filters_last},
        {"y": channels_first, "dx": channels_first, "dweight": filters_first},
        said=True,
    ),
)


def draw_pooling(rng: np.random.Generator) -> list[Probe]:
    def probe(
        name: str,
        x: np.ndarray,
        kernel: Any,
        stride: Any,
        padding: Any,
        beyond: str = "",
        optional: bool = False,
    ) -> Probe:
        options = {"kernel_size": kernel, "stride": stride, "padding": padding}
        return Probe(name, {"x": x, **options}, beyond, optional)

    def apart(*shape: int) -> np.ndarray:
        """Return elements whose differences are so large that small steps change no maximum."""
        return rng.permutation(np.linspace(-4, 4, math.prod(shape))).reshape(shape)

    fitting = apart(2, 3, 5, 7)
    close = 1e-3 * rng.permutation(144).reshape(2, 3, 4, 6)
    ties = np.floor(2 * rng.standard_normal((2, 3, 4, 6)))
    return [
        probe("windows side by side", apart(2, 3, 4, 6), (2, 2), (2, 2), (0, 0)),
        probe("numbers that are close", close, (2, 2), (2, 2), (0, 0)),
        probe("windows that overlap and fit", fitting, (3, 3), (2, 2), (0, 0)),
        probe("overlapping windows", apart(2, 3, 6, 8), (4, 3), (2, 2), (0, 0), NOT_SQUARE),
        probe(
            "padding, negative numbers", apart(2, 3, 5, 7) - 5, (3, 3), (2, 2), (1, 1), "padding"
        ),
        probe("padding, kernel 3 × 2", apart(2, 3, 5, 4) - 5, (3, 2), (2, 1), (1, 1), PAIRS, True),
        probe("ties", ties, (2, 2), (2, 2), (0, 0), "ties"),
        probe("stride 1", fitting, (3, 3), (1, 1), (0, 0), "a stride of 1"),
    ]


POOL_LAYOUTS = (
    Layout(),
    Layout(
        "channels last",
        {"x": channels_last, "dy": channels_last},
        {"y": channels_first, "dx": channels_first},
        said=True,
    ),
)


# The others.


def draw_linear(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, examples: int, inputs: int, outputs: int) -> Probe:
        x, weight = rng.standard_normal((examples, inputs)), rng.standard_normal((outputs, inputs))
        return Probe(name, {"x": x, "weight": weight, "bias": rng.standard_normal(outputs)})

    deep = probe("(N, d1, d2)", 3, 10, 4)
    x = deep.arguments["x"].reshape(3, 2, 5)
    return [
        probe("wide", 5, 2, 4),
        probe("square", 4, 3, 3),
        Probe(deep.name, deep.arguments | {"x": x}, optional=True),
    ]


LINEAR_LAYOUTS = (
    Layout("weight (in, out)", {"weight": transposed}, {"dweight": transposed}),
    Layout(),
    Layout(
        "weight (in, out), bias (1, out)",
        {"weight": transposed, "bias": row},
        {"dweight": transposed, "dbias": from_row},
        ("class",),
    ),
    Layout("bias (out, 1)", {"bias": column}, {"dbias": from_column}, ("class",)),
    Layout("bias (1, out)", {"bias": row}, {"dbias": from_row}, ("class",)),
    Layout(
        "examples in columns",
        {"x": transposed, "dy": transposed, "bias": column},
        {"y": transposed, "dx": transposed, "dbias": from_column},
        said=True,
    ),
    Layout(
        "examples in columns, weight (in, out)",
        {"x": transposed, "dy": transposed, "bias": column, "weight": transposed},
        {"y": transposed, "dx": transposed, "dbias": from_column, "dweight": transposed},
        said=True,
    ),
)


def draw_elementwise(rng: np.random.Generator) -> list[Probe]:
    return [
        Probe("matrix", {"x": rng.standard_normal((5, 4))}),
        Probe("images", {"x": rng.standard_normal((2, 2, 3, 2))}, "feature maps", True),
    ]


def draw_sigmoid(rng: np.random.Generator) -> list[Probe]:
    large = np.array([[-800.0, 800.0, 0.5], [30.0, -30.0, 1.0]]) + rng.standard_normal((2, 3))
    return [*draw_elementwise(rng), Probe("±800", {"x": large}, "inputs of ±800")]


def draw_relu(rng: np.random.Generator) -> list[Probe]:
    zeros = rng.standard_normal((4, 3))
    zeros[[0, 2], [1, 2]] = 0
    return [*draw_elementwise(rng), Probe("zeros", {"x": zeros})]


def draw_leaky_relu(rng: np.random.Generator) -> list[Probe]:
    return [
        Probe(p.name, p.arguments | {"slope": 0.2}, p.beyond, p.optional)
        for p in draw_elementwise(rng)
    ]


def draw_dropout(rng: np.random.Generator) -> list[Probe]:
    return [
        Probe(
            p.name,
            p.arguments | {"mask": (rng.random(p.arguments["x"].shape) < 0.6) / 0.6},
            p.beyond,
            p.optional,
        )
        for p in draw_elementwise(rng)
    ]


def draw_loss(rng: np.random.Generator) -> list[Probe]:
    def logits(examples: int) -> np.ndarray:
        return rng.standard_normal((examples, 4))

    def probe(name: str, x: np.ndarray, beyond: str = "") -> Probe:
        return Probe(name, {"logits": x, "labels": rng.integers(0, 4, len(x))}, beyond)

    apart = logits(3)
    apart[0] += 1000
    sure = np.array([[40.0, 0, 1, 2], [0.5, 1, 2, 800]])
    wrong = Probe(
        "a confident mistake", {"logits": sure, "labels": np.array([0, 1])}, "logits of 800"
    )
    return [
        probe("ordinary logits", logits(5)),
        probe("large logits", 1000 + logits(3), "logits of 1000"),
        probe("rows at 0 and 1000", apart, "rows at 0 and 1000"),
        wrong,
    ]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


PROBABILITIES = "it gets probabilities, and returns the gradient by the logits"
LOSS_LAYOUTS = (
    Layout(),
    Layout("labels one-hot", {"labels": one_hot}),
    Layout("labels in a column", {"labels": column}),
    Layout(
        "examples in columns, labels one-hot",
        {"logits": transposed, "labels": lambda a: one_hot(a).T},
        {"dlogits": transposed},
        said=True,
    ),
    Layout(PROBABILITIES, {"logits": softmax}, said=True),
    Layout(PROBABILITIES, {"logits": softmax, "labels": one_hot}, said=True),
)


def draw_svm_loss(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, examples: int) -> Probe:
        logits = 2 * rng.standard_normal((examples, 4))
        return Probe(name, {"logits": logits, "labels": rng.integers(0, 4, examples)})

    return [probe("5 examples", 5), probe("3 examples", 3)]


def draw_embedding(rng: np.random.Generator) -> list[Probe]:
    weight = rng.standard_normal((6, 4))
    return [
        Probe("(N,)", {"indices": np.array([3, 0, 3]), "weight": weight}, optional=True),
        Probe("(N, T)", {"indices": rng.integers(0, 6, (2, 5)), "weight": weight}),
    ]


def draw_rnn_step(rng: np.random.Generator) -> list[Probe]:
    def probe(name: str, n: int, d: int, h: int) -> Probe:
        arguments = {
            "x": rng.standard_normal((n, d)),
            "hidden": rng.standard_normal((n, h)),
            "weight_x": rng.standard_normal((d, h)),
            "weight_h": rng.standard_normal((h, h)),
            "bias": rng.standard_normal(h),
        }
        return Probe(name, arguments)

    return [probe("wide", 3, 5, 4), probe("narrow", 5, 2, 3)]


PROMISES: dict[str, Callable[[Probe], bool]] = {
    "padding at least 1": lambda probe: probe.arguments.get("padding", (1, 1)) != (0, 0),
    "no padding": lambda probe: probe.arguments.get("padding", (0, 0)) == (0, 0),
    "stride 1": lambda probe: probe.arguments.get("stride", (1, 1)) == (1, 1),
    "windows side by side": lambda probe: (
        probe.arguments.get("stride") == probe.arguments.get("kernel_size")
    ),
    "only training": lambda probe: probe.arguments.get("training", True) is True,
}
"""For each promise that an assignment may make about its inputs, whether a probe keeps it."""

NORM_GRADIENTS = ("dx", "dgamma", "dbeta")
LINEAR_GRADIENTS = ("dx", "dweight", "dbias")

OPERATIONS: dict[str, Operation] = {
    "batch_norm": Operation(NORM_GRADIENTS, draw_batch_norm, NORM_LAYOUTS, MAP_LAYOUTS),
    "spatial_batch_norm": Operation(
        NORM_GRADIENTS, functools.partial(draw_batch_norm, spatial=True), MAP_LAYOUTS, MAP_LAYOUTS
    ),
    "layer_norm": Operation(
        NORM_GRADIENTS,
        draw_layer_norm,
        (
            Layout(),
            Layout(
                "gamma (1, D)", {"gamma": row, "beta": row}, {"dgamma": from_row, "dbeta": from_row}
            ),
        ),
    ),
    "group_norm": Operation(NORM_GRADIENTS, draw_group_norm, (Layout(), MAP_LAYOUTS[1])),
    "conv2d": Operation(LINEAR_GRADIENTS, draw_conv2d, CONV_LAYOUTS),
    "avg_pool2d": Operation(("dx",), draw_pooling, POOL_LAYOUTS, constants={"mode": "average"}),
    "max_pool2d": Operation(("dx",), draw_pooling, POOL_LAYOUTS, constants={"mode": "max"}),
    "linear": Operation(LINEAR_GRADIENTS, draw_linear, LINEAR_LAYOUTS),
    "sigmoid": Operation(("dx",), draw_sigmoid),
    "tanh": Operation(("dx",), draw_elementwise),
    "relu": Operation(("dx",), draw_relu),
    "leaky_relu": Operation(("dx",), draw_leaky_relu),
    "dropout": Operation(("dx",), draw_dropout, constants={"p": 0.5, "mode": "train"}),
    "softmax_cross_entropy": Operation(
        ("dlogits",), draw_loss, LOSS_LAYOUTS, loss=True, roles={"logits": "x"}
    ),
    "svm_loss": Operation(("dlogits",), draw_svm_loss, loss=True, roles={"logits": "x"}),
    "embedding": Operation(("dweight",), draw_embedding, roles={"indices": "x"}),
    "rnn_step": Operation(("dx", "dhidden", "dweight_x", "dweight_h", "dbias"), draw_rnn_step),
}
"""All operations by name."""
