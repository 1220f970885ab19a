"""Measure the float32 rounding error of every operation against float64, next to PyTorch's."""

from __future__ import annotations

from _command_line import ArgumentParser, run

# isort: split

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npbn import backend
from npbn import functional as F
from npbn.errors import NpbnError

UNIT = 2.0**-24
"""Half the distance from 1 to the next float32, which is the largest relative rounding error."""

EPILOG = """\
An error is the largest of any element, divided by the largest element of the exact result (by 1 if
that is 0), in units of 2^-24 = 6.0e-08, which is what rounding once costs. Exact is npbn's own
result in float64 on the same inputs, which check_gradients.py proves. Prints a Markdown table.
"""


@dataclass(frozen=True)
class Case:
    """An operation with given inputs in float32.

    Attributes:
        name: the name of the case in the table.
        inputs: the arrays with respect to which gradients are computed, by npbn's names.
        forward, backward: npbn's forward and backward functions.
        torch: a function of the module torch and of the inputs as tensors that returns PyTorch's
            result y.
        constants: further arrays and options, by npbn's names.
    """

    name: str
    inputs: dict[str, np.ndarray]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    torch: Callable[..., Any]
    constants: dict[str, Any] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(2015)

    def normal(*shape: int, mean: float = 0, deviation: float = 1) -> np.ndarray:
        return rng.normal(mean, deviation, shape).astype(np.float32)

    def batch_norm(name: str, x: np.ndarray, training: bool = True) -> Case:
        form = (1, x.shape[1]) + (1,) * (x.ndim - 2)
        moving = {"moving_mean": normal(*form), "moving_var": 1 + normal(*form) ** 2}
        flat = [array.ravel() for array in moving.values()]

        def oracle(torch: Any, x: Any, gamma: Any, beta: Any) -> Any:
            statistics = [torch.from_numpy(array.copy()) for array in flat]
            return torch.nn.functional.batch_norm(
                x, *statistics, gamma.reshape(-1), beta.reshape(-1), training=training, eps=1e-5
            )

        return Case(
            f"batch_norm, {name}",
            {"x": x, "gamma": 1 + normal(*form) ** 2, "beta": normal(*form)},
            F.batch_norm,
            F.batch_norm_backward,
            oracle,
            {**moving, "training": training},
        )

    maps = (256, 6, 24, 24)
    yield batch_norm("training", normal(*maps, mean=1, deviation=2))
    yield batch_norm("(N, D), training", normal(4096, 84, mean=1, deviation=2))
    yield batch_norm("prediction", normal(*maps, mean=1, deviation=2), training=False)
    yield batch_norm("mean 1e4, deviation 1", normal(*maps, mean=1e4))
    yield batch_norm("mean 1e4, deviation 1e-2", normal(*maps, mean=1e4, deviation=1e-2))
    yield batch_norm("(N, D), mean 1e4, deviation 1e-2", normal(256, 84, mean=1e4, deviation=1e-2))
    yield batch_norm("mean 1e6, deviation 1", normal(*maps, mean=1e6))
    yield batch_norm("deviation 1e-6", normal(*maps, deviation=1e-6))
    yield batch_norm("constant, 0.1", np.full(maps, 0.1, np.float32))

    def convolution(torch: Any, x: Any, weight: Any, bias: Any) -> Any:
        return torch.nn.functional.conv2d(x, weight, bias)

    for name, image, weight in (("1 to 6", (1, 28, 28), (6, 1)), ("6 to 16", (6, 12, 12), (16, 6))):
        yield Case(
            f"conv2d, {name} channels",
            {"x": normal(256, *image), "weight": normal(*weight, 5, 5), "bias": normal(weight[0])},
            F.conv2d,
            F.conv2d_backward,
            convolution,
        )
    for kind in ("avg_pool2d", "max_pool2d"):
        yield Case(
            kind,
            {"x": normal(*maps)},
            getattr(F, kind),
            getattr(F, f"{kind}_backward"),
            lambda torch, x, kind=kind: getattr(torch.nn.functional, kind)(x, 3, 2),
            {"kernel_size": 3, "stride": 2},
        )
    yield Case(
        "linear",
        {"x": normal(256, 256), "weight": normal(120, 256), "bias": normal(120)},
        F.linear,
        F.linear_backward,
        lambda torch, x, weight, bias: torch.nn.functional.linear(x, weight, bias),
    )
    for name, x in (
        ("", normal(256, 864, deviation=2)),
        (", x near -50", normal(256, 84, mean=-50)),
    ):
        yield Case(
            f"sigmoid{name}",
            {"x": x},
            F.sigmoid,
            F.sigmoid_backward,
            lambda torch, x: torch.sigmoid(x),
        )
    yield Case(
        "relu", {"x": normal(256, 864)}, F.relu, F.relu_backward, lambda torch, x: torch.relu(x)
    )
    labels = rng.integers(0, 10, 256)
    for name, logits in (
        ("", normal(256, 10)),
        (", logits of 1e4", normal(256, 10, mean=1e4, deviation=10)),
    ):
        yield Case(
            f"softmax_cross_entropy{name}",
            {"logits": logits},
            F.softmax_cross_entropy,
            lambda dy, cache: dy * F.softmax_cross_entropy_backward(cache),
            lambda torch, logits: torch.nn.functional.cross_entropy(
                logits, torch.from_numpy(labels)
            ),
            {"labels": labels},
        )


def by_npbn(case: Case, dy: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Return npbn's result y and all gradients, computed in ``dtype``."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, np.ndarray) and value.dtype == np.float32
        return value.astype(dtype) if is_float else value

    inputs = {name: cast(value) for name, value in case.inputs.items()}
    constants = {name: cast(value) for name, value in case.constants.items()}
    y, cache = case.forward(**inputs, **constants)[:2]
    gradients = case.backward(cast(dy), cache)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return {"y": y} | {f"d{n}": g for n, g in zip(inputs, gradients, strict=True)}


def by_pytorch(torch: Any, case: Case, dy: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {n: torch.from_numpy(v.copy()).requires_grad_() for n, v in case.inputs.items()}
    y = case.torch(torch, **inputs)
    y.backward(torch.from_numpy(dy))
    return {"y": y.detach().numpy()} | {f"d{n}": t.grad.numpy() for n, t in inputs.items()}


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest error, relative to the largest exact element, in units of `UNIT`."""
    largest = float(np.max(np.abs(exact)))
    return float(np.max(np.abs(found - exact))) / (largest or 1.0) / UNIT


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="accuracy.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.parse_args()


def main() -> None:
    parse_arguments()
    try:
        import torch
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise NpbnError("PyTorch is not installed: pip install torch") from None
    print(
        f"NumPy {np.__version__}, PyTorch {torch.__version__} on the CPU, {backend.cpu_name()}\n\n"
        "| operation on inputs | result | error, npbn | error, PyTorch |\n"
        "| --- | --- | --: | --: |"
    )
    rng = np.random.default_rng(1502)
    for case in cases():
        y = case.forward(**case.inputs, **case.constants)[0]
        dy = rng.standard_normal(np.shape(y)).astype(np.float32)
        exact = by_npbn(case, dy, "float64")
        npbn, pytorch = by_npbn(case, dy, "float32"), by_pytorch(torch, case, dy)
        for k, name in enumerate(exact):
            ours, theirs = error(npbn[name], exact[name]), error(pytorch[name], exact[name])
            print(f"| {case.name if k == 0 else ''} | {name} | {ours:,.2f} | {theirs:,.2f} |")


if __name__ == "__main__":
    run("accuracy.py", main)
