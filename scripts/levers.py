"""What makes the engine fast: how much slower it is without each of the things that it does."""

from __future__ import annotations

from _command_line import ArgumentParser, check_installation, integer, run, say

check_installation()

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from npbn import backend, models, optim
from npbn.data import Split
from npbn.engine import Engine, engine, numpy_stages, shard
from npbn.engine.numpy_stages import ConvPiece, LinearPiece, Piece, Stage
from npbn.engine.plan import Block

EPILOG = """\
The first table: a training step of network A with everything in place, and with one thing left out
at a time, in turns. The second: where the time of a step goes, and what it would take at the rates
at which this core multiplies large matrices and adds arrays that lie in its cache.

Both are of one process on one core, with half of a batch of 256, as each of two workers has it.
npbn/engine/README.md has the results and the story behind them.
"""

Patch = tuple[Any, str, Any]


def exponential_sigmoid(self: Piece) -> None:
    z = self.slope
    if self.block.activation is None:
        return
    np.negative(z, out=z)
    np.exp(z, out=z)
    z += 1
    np.divide(1, z, out=z)


def its_derivative(self: Piece) -> None:
    s = self.slope
    if self.block.activation is None:
        s.fill(1)
    else:
        s *= 1 - s


def plain_sum(self: Piece, array: np.ndarray, out: np.ndarray) -> None:
    np.sum(array, axis=(0, 2), out=out)


def plain_dot(self: Piece, one: np.ndarray, other: np.ndarray, out: np.ndarray) -> None:
    np.sum(one * other, axis=(0, 2), out=out)


def stage_with_dx(self: Stage, *arguments: Any, original: Any = Stage.__init__) -> None:
    *others, _, exchange = arguments
    original(self, *others, False, exchange)


def fresh(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.empty(shape, dtype)


# What is done, and what is put in its place to see what it is worth.
LEVERS: dict[str, tuple[Patch, ...]] = {
    "products small enough not to be packed": ((numpy_stages, "SMALL_PRODUCT", 0),),
    "sums by matrix products": ((Piece, "_sum", plain_sum), (Piece, "_dot", plain_dot)),
    "a small buffer for NumPy": ((engine, "BUFFER", 8192),),
    "arrays that begin at different lines": ((numpy_stages, "work_array", fresh),),
    "sigmoid by tanh": (
        (Block, "halved", False),
        (Piece, "_apply_activation", exponential_sigmoid),
        (Piece, "differentiate_activation", its_derivative),
    ),
    "no dx of the first layer": ((Stage, "__init__", stage_with_dx),),
    "pieces that are not too small": ((shard, "PIECE", 32),),
}


@contextlib.contextmanager
def without(lever: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in LEVERS.get(lever or "", ()):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Contestant:
    """A training step without one of the levers."""

    def __init__(self, lever: str | None, examples: int, batch_size: int) -> None:
        self.lever = lever
        generator = np.random.default_rng(0)
        images = generator.integers(256, size=(examples, 1, 28, 28), dtype=np.uint8)
        self.split = Split(images, generator.integers(10, size=examples))
        self.batches = generator.permutation(examples).reshape(-1, batch_size)
        model = models.LeNet(generator=generator)
        self.engine = Engine(model, optim.SGD(model.parameters(), 0.01), (1, 28, 28), workers=1)

    def milliseconds(self, steps: int) -> float:
        with without(self.lever):
            times = []
            for i in range(steps + 1):
                started = time.perf_counter()
                self.engine.step(self.split, self.batches[i % len(self.batches)])
                times.append(time.perf_counter() - started)
        return statistics.median(times[1:]) * 1e3


def measure_levers(arguments: argparse.Namespace) -> None:
    contestants = [
        Contestant(lever, 20 * arguments.batch_size, arguments.batch_size)
        for lever in (None, *LEVERS)
    ]
    times: dict[str | None, list[float]] = {each.lever: [] for each in contestants}
    order = random.Random(0)
    for number in range(arguments.rounds + 1):
        order.shuffle(contestants)
        for each in contestants:
            found = each.milliseconds(arguments.steps)
            if number:  # the first round does not count
                times[each.lever].append(found)
    say(f"with all of it: {statistics.median(times[None]):.2f} ms a step\n")
    say(f"{'without':<40}      ms  slower by")
    for lever in LEVERS:
        ratio = statistics.median(
            one / all_of_it for one, all_of_it in zip(times[lever], times[None], strict=True)
        )
        say(f"{lever:<40}  {statistics.median(times[lever]):6.2f}  {ratio - 1:+9.0%}")


class Clock:
    """Sums up the time of some methods."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, str], float] = {}

    def watch(self, owner: Any, name: str, what: str) -> Any:
        original = getattr(owner, name)

        def timed(piece: Any, *arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = original(piece, *arguments, **options)
            key = (id(piece), what)
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - started
            return found

        return mock.patch.object(owner, name, timed)


# Passes of an elementwise part over y, as often as an array is read or written, halved.
PASSES = {"statistics": 3, "activation and pooling": 6.75, "gradient": 3.25, "batch norm": 3}


def measure_stages(arguments: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((1024, 1024), np.float32)
    multiply = best(lambda: a @ a) / (2 * 1024**3)
    b = generator.standard_normal(20_000, np.float32)
    add = best(lambda: np.add(b, b, out=b)) / b.size
    say(f"\nthis core: {1e-9 / multiply:.0f} GFLOP/s, an addition in {add * 1e9:.2f} ns\n")
    clock = Clock()
    with contextlib.ExitStack() as stack:
        for kind in (ConvPiece, LinearPiece):
            stack.enter_context(clock.watch(kind, "multiply", "products"))
            stack.enter_context(clock.watch(kind, "differentiate", "products"))
        stack.enter_context(clock.watch(Piece, "activate", "activation and pooling"))
        stack.enter_context(clock.watch(Piece, "sum_up", "gradient"))
        stack.enter_context(clock.watch(Piece, "normalize_backward", "batch norm"))
        contestant = Contestant(None, 20 * arguments.batch_size, arguments.batch_size)
        contestant.milliseconds(2)
        clock.seconds.clear()
        steps = arguments.rounds * arguments.steps + 1
        started = time.perf_counter()
        contestant.milliseconds(steps - 1)  # and one before
        whole = (time.perf_counter() - started) / steps
    say(f"{'stage':<32}{'part':<24}     ms   floor")
    seen = 0.0
    for i, stage in enumerate(contestant.engine.shard.stages):
        (piece,) = stage.pieces
        weight, y = piece.block.layer.weight.data, piece.y
        products = 2 * weight.size * y.size // len(weight) * (2 if i == 0 else 3)
        for what in ("products", *PASSES):
            seconds = clock.seconds.get((id(piece), what))
            if seconds is None:
                continue
            seconds /= steps
            seen += seconds
            floor = products * multiply if what == "products" else PASSES[what] * y.size * add
            say(
                f"{type(piece.block.layer).__name__ + ' ' + str(i + 1):<32}{what:<24}"
                f"{seconds * 1e3:7.3f} {floor * 1e3:7.3f}"
            )
    say(f"{'all else':<56}{(whole - seen) * 1e3:7.3f}")
    say(f"{'a step':<56}{whole * 1e3:7.3f}")


def best(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(50):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = ArgumentParser(
        prog="levers.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=integer(2), default=128, metavar="N")
    parser.add_argument("--rounds", type=integer(1), default=25, metavar="N")
    parser.add_argument("--steps", type=integer(1), default=6, metavar="N", help="in a turn")
    arguments = parser.parse_args()
    backend.keep_freed_memory()
    backend.limit_blas_threads(1)
    say(backend.get_backend("numpy").description)
    measure_levers(arguments)
    measure_stages(arguments)


if __name__ == "__main__":
    run("levers.py", main)
