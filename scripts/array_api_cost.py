"""Measure what the array API costs: npbn.functional on NumPy against preallocated buffers."""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from _machine import about, machine
from _report import check_writable, print_table, quotients, save, spread
from npbn import backend
from npbn import functional as F

EPILOG = """\
Network A's first block, forward and backward, in one process and in turns of shuffled order. The
ratio is the time of npbn.functional divided by that of the same mathematics written with out=.

exit codes: 0 measured, 2 bad input, 130 interrupted
"""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="array_api_cost.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, minimum, default, text in (
        ("--threads", 1, backend.usable_cpus(), "of NumPy's matrix products"),
        ("--batch-size", 1, 256, "of the images"),
        ("--rounds", 1, 7, "rounds"),
        ("--seed", 0, 0, "of images, weights and order"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=integer(minimum), default=default, metavar="N", help=text)
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds of 5 calls, to see whether it works"
    )
    parser.add_argument("--json", metavar="FILE", help="write every value there as well")
    arguments = parser.parse_args()
    arguments.calls = 40
    if arguments.quick:
        arguments.calls, arguments.rounds = 5, 3
    return arguments


# Each of the next two functions allocates buffers, and returns a function that computes in these
# buffers what npbn.functional computes, forward and backward. As in npbn.functional, arrays have
# the shape (N, C, H, W) and the memory order C, H, W, N.


def block_in_buffers(
    x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, dpooled: np.ndarray
) -> Callable[[], Any]:
    """Return a function that computes batch norm, sigmoid and 2 × 2 average pooling in buffers."""
    x_centred, y, dy, dx = (np.empty_like(x) for _ in range(4))  # This keeps the memory order.
    pooled, share = (np.empty_like(dpooled) for _ in range(2))
    moving_mean, moving_var = np.zeros_like(gamma), np.ones_like(gamma)
    axes, m = (0, 2, 3), x.size // gamma.size
    low = math.log(np.finfo(x.dtype).smallest_normal)
    places = [np.s_[:, :, i::2, j::2] for i in range(2) for j in range(2)]

    def compute() -> tuple[np.ndarray, ...]:
        mean = np.mean(x, axis=axes, keepdims=True)
        np.subtract(x, mean, out=x_centred)
        np.subtract(x_centred, np.mean(x_centred, axis=axes, keepdims=True), out=x_centred)
        np.multiply(x_centred, x_centred, out=y)
        var = np.mean(y, axis=axes, keepdims=True)
        moving_mean[...] = 0.9 * moving_mean + 0.1 * mean
        moving_var[...] = 0.9 * moving_var + 0.1 * var
        s = np.sqrt(var + 1e-5)
        np.multiply(x_centred, gamma / s, out=y)
        np.add(y, beta, out=y)

        np.maximum(y, low, out=y)
        np.negative(y, out=y)
        np.exp(y, out=y)
        np.add(y, 1, out=y)
        np.divide(1, y, out=y)

        np.add(y[places[0]], y[places[1]], out=pooled)
        for place in places[2:]:
            np.add(pooled, y[place], out=pooled)
        np.divide(pooled, 4, out=pooled)

        np.divide(dpooled, 4, out=share)
        np.subtract(1, y, out=dy)
        np.multiply(dy, y, out=dy)
        for place in places:  # The gradient with respect to the output y has no array of its own.
            np.multiply(dy[place], share, out=dy[place])

        dbeta = np.sum(dy, axis=axes, keepdims=True)
        np.multiply(dy, x_centred, out=dx)
        dgamma = np.sum(dx, axis=axes, keepdims=True) / s
        np.multiply(x_centred, dgamma / (s * m), out=dx)
        np.subtract(dy, dx, out=dx)
        np.subtract(dx, dbeta / m, out=dx)
        np.multiply(dx, gamma / s, out=dx)
        return pooled, dx, dgamma, dbeta

    return compute


def convolution_in_buffers(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, dy: np.ndarray
) -> Callable[[], Any]:
    """Return a function that computes a convolution without padding in buffers.

    The memory order of ``dy`` must be C, H, W, N; ``x`` may have any memory order.
    """
    (n, c, h, w), (out, _, kh, kw), (_, _, out_h, out_w) = x.shape, weight.shape, dy.shape
    images, dimages = (np.empty((h, c, w, n), x.dtype) for _ in range(2))
    strips, dstrips = (np.empty((h, c, kw, out_w, n), x.dtype) for _ in range(2))
    y = np.empty((out, out_h, out_w * n), x.dtype)
    dy_rows = dy.transpose(1, 2, 3, 0).reshape(y.shape)
    dx_row = np.empty((kh * c * kw, out_w * n), x.dtype)
    dmatrix, dmatrix_row = (np.empty((kh * c * kw, out), x.dtype) for _ in range(2))

    def compute() -> tuple[np.ndarray, ...]:
        matrix = weight.transpose(0, 2, 1, 3).reshape(out, -1)
        np.copyto(images, x.transpose(2, 1, 3, 0))
        for j in range(kw):
            np.copyto(strips[:, :, j], images[:, :, j : j + out_w])
        dstrips.fill(0)
        dmatrix.fill(0)
        for p in range(out_h):
            x_row = strips[p : p + kh].reshape(dx_row.shape)
            np.matmul(matrix, x_row, out=y[:, p])
            np.add(y[:, p], bias[:, None], out=y[:, p])
        for p in range(out_h):
            x_row = strips[p : p + kh].reshape(dx_row.shape)
            np.matmul(x_row, dy_rows[:, p].T, out=dmatrix_row)
            np.add(dmatrix, dmatrix_row, out=dmatrix)
            np.matmul(matrix.T, dy_rows[:, p], out=dx_row)
            window = dstrips[p : p + kh]
            np.add(window, dx_row.reshape(window.shape), out=window)
        dimages.fill(0)
        for j in range(kw):
            columns = dimages[:, :, j : j + out_w]
            np.add(columns, dstrips[:, :, j], out=columns)
        dbias = np.sum(dy_rows, axis=(1, 2))
        dweight = dmatrix.T.reshape(out, kh, c, kw).transpose(0, 2, 1, 3)
        maps = y.reshape(out, out_h, out_w, n).transpose(3, 0, 1, 2)
        return maps, dimages.transpose(3, 1, 0, 2), dweight, dbias

    return compute


def array_api_cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure npbn.functional and the code with buffers; print the table and return the values."""
    n = arguments.batch_size
    backend.keep_freed_memory()
    backend.limit_blas_threads(arguments.threads)
    say(backend.get_backend("numpy").description)
    generator = np.random.default_rng(arguments.seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    images, weight, bias = normal(n, 1, 28, 28), normal(6, 1, 5, 5), normal(6)
    gamma, beta = normal(1, 6, 1, 1), normal(1, 6, 1, 1)
    moving_mean, moving_var = np.zeros_like(gamma), np.ones_like(gamma)
    maps, _ = F.conv2d(images, weight, bias)
    dmaps = normal(6, 24, 24, n).transpose(3, 0, 1, 2)
    dpooled = normal(6, 12, 12, n).transpose(3, 0, 1, 2)

    def block() -> tuple[np.ndarray, ...]:
        y, norm, _ = F.batch_norm(maps, gamma, beta, moving_mean, moving_var, training=True)
        activated, sigmoid = F.sigmoid(y)
        pooled, pooling = F.avg_pool2d(activated, 2)
        dy = F.sigmoid_backward(F.avg_pool2d_backward(dpooled, pooling), sigmoid)
        return pooled, *F.batch_norm_backward(dy, norm)

    def convolution() -> tuple[Any, ...]:
        y, cache = F.conv2d(images, weight, bias)
        return y, *F.conv2d_backward(dmaps, cache)

    contests: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "batch norm, sigmoid, pooling": (block, block_in_buffers(maps, gamma, beta, dpooled)),
        "convolution": (convolution, convolution_in_buffers(images, weight, bias, dmaps)),
    }
    order = random.Random(arguments.seed)
    results: dict[str, Any] = {}
    rows = [["forward and backward", "npbn.functional, ms", "in buffers, ms", "ratio"]]
    for name, (functional, buffered) in contests.items():
        for expected, found in zip(functional(), buffered(), strict=True):
            error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
            if not error < 1e-4:
                raise AssertionError(f"{name}: the two differ, relatively by {error:.1e}")
        ours: list[float] = []
        theirs: list[float] = []
        turns = [(functional, ours), (buffered, theirs)]
        for _ in range(arguments.rounds):
            order.shuffle(turns)
            for function, times in turns:
                times.append(milliseconds(function, arguments.calls))
        results[name] = {"functional_ms": ours, "buffers_ms": theirs}
        rows.append([name, *(spread(v, ".2f") for v in (ours, theirs, quotients(ours, theirs)))])
    print_table(rows)
    say("")
    say(f"Median (min-max) of {arguments.rounds} rounds of {arguments.calls} calls.")
    return results


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    function()  # This is not measured, because the caches contain the other function's data.
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e3


def main() -> None:
    arguments = parse_arguments()
    json_path = None if arguments.json is None else Path(os.path.realpath(arguments.json))
    if json_path is not None:
        check_writable(json_path)
    where = machine()
    say(about(where))
    results = array_api_cost(arguments)
    if json_path is not None:
        report = {"machine": where, "options": vars(arguments), "results": results}
        save(json_path, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    run("array_api_cost.py", main)
