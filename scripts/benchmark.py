"""How fast npbn's layers train and evaluate LeNet with batch norm, as a ratio to PyTorch eager."""

from __future__ import annotations

from _command_line import ArgumentParser, check_installation, integer, run, say

check_installation()

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import npbn
from npbn import backend, models, optim
from npbn import functional as F
from npbn.data import Split
from npbn.engine import Engine
from npbn.errors import NpbnError
from npbn.functional._arrays import Array
from npbn.layers import Sequential

EPILOG = """\
Every contestant runs in a process of its own. They take turns, in an order shuffled anew for each
round, and the ratio is taken within each round. The table shows medians, with the smallest and the
largest value behind them. scripts/README.md says more.

examples:
  python scripts/benchmark.py                      on the CPU, with all cores
  python scripts/benchmark.py --threads 1
  python scripts/benchmark.py --backend cupy       on a GPU, against PyTorch there
  python scripts/benchmark.py --quick --json results.json
  python scripts/benchmark.py --array-api-cost

exit codes: 0 measured, 2 bad input or something missing on this machine, 130 interrupted
"""

IMAGES = 10_000  # as many as Fashion-MNIST has for testing
LEARNING_RATE = 0.01  # small: the labels are random, there is nothing to learn
SMALLEST_BATCH = 16  # over two or three examples, batch norm magnifies rounding: see check_losses
BASELINE = "PyTorch eager"
TUNED_MALLOC = {  # glibc's names for what npbn.backend.keep_freed_memory sets
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=("npbn", "engine", "torch"), help=argparse.SUPPRESS)
    for name, choices, text in (
        ("--model", ("lenet", "blenet"), "lenet, network A; or blenet, network B"),
        ("--backend", ("numpy", "cupy"), "numpy, all on the CPU; or cupy, all on the GPU"),
    ):
        text += f" (default: {choices[0]})"
        parser.add_argument(name, choices=choices, default=choices[0], help=text)
    for name, minimum, default, text in (
        ("--threads", 1, usable_cores(), "that each library computes with, on the CPU"),
        ("--batch-size", SMALLEST_BATCH, 256, "of training, and of --array-api-cost"),
        ("--evaluation-batch-size", 1, 256, f"of evaluation, over {IMAGES:,} images"),
        ("--steps", 1, 40, "training steps in a round"),
        ("--rounds", 1, 7, "rounds that count; one more comes before them"),
        ("--seed", 0, 0, "of images, labels, initial weights and order"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=integer(minimum), default=default, metavar="N", help=text)
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds of 5 steps, to see whether it works"
    )
    parser.add_argument("--json", metavar="FILE", help="write every value there, too")
    parser.add_argument(
        "--array-api-cost",
        action="store_true",
        help="measure something else: npbn.functional on NumPy against the same mathematics "
        "written with out= into buffers allocated once",
    )

    arguments = parser.parse_args()
    if max(arguments.batch_size, arguments.evaluation_batch_size) > IMAGES:
        parser.error(f"expected batches of at most {IMAGES:,} images")
    if arguments.array_api_cost and (arguments.model, arguments.backend) != ("lenet", "numpy"):
        parser.error("--array-api-cost is about network A on NumPy: leave out --model, --backend")
    if arguments.quick:
        arguments.rounds, arguments.steps = 3, 5
    return arguments


def usable_cores() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


# In a worker: a library and the clock.


@dataclass(frozen=True)
class Contestant:
    """A library, ready to be measured. Model, images and labels are on its device."""

    description: str
    model: Any
    images: Any
    labels: Any
    step: Callable[[Any, Any], Any]
    """A training step on a batch of images and labels; returns the loss."""
    hits: Callable[[Any, Any], Any]
    """How many images of a batch the model classifies as labelled."""
    synchronize: Callable[[], object]
    """Waits for the device."""


def npbn_contestant(arguments: argparse.Namespace) -> Contestant:
    backend.keep_freed_memory()
    backend.limit_blas_threads(arguments.threads)
    device = backend.get_backend(arguments.backend)
    xp = device.xp
    model = npbn_model(arguments)
    model.to(device)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)

    def step(images: Any, labels: Any) -> Any:
        loss, cache = F.softmax_cross_entropy(model.forward(images), labels)
        model.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
        return loss

    def hits(images: Any, labels: Any) -> Any:
        return xp.count_nonzero(xp.argmax(model.forward(images), axis=1) == labels)

    images, labels = (device.asarray(array) for array in random_data(arguments))
    description = f"npbn {npbn.__version__}, {device.description}"
    return Contestant(description, model, images, labels, step, hits, device.synchronize)


def engine_contestant(arguments: argparse.Namespace) -> Contestant:
    """The engine on the same pixels, which it takes as bytes, by their numbers."""
    backend.keep_freed_memory()
    backend.limit_blas_threads(arguments.threads)
    model = npbn_model(arguments)
    images, labels = random_pixels(arguments)
    split = Split(images, labels)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)
    engine = Engine(model, optimizer, images.shape[1:], workers=arguments.threads)

    def step(indices: Any, labels: Any) -> Any:
        return engine.step(split, indices)[0]

    def hits(indices: Any, labels: Any) -> Any:
        return engine.evaluate(Split(images[indices[0] : indices[-1] + 1], labels))[1]

    description = f"npbn {npbn.__version__}, {backend.get_backend('numpy').description}"
    numbers = np.arange(IMAGES)
    return Contestant(description, model, numbers, labels, step, hits, lambda: None)


def torch_contestant(arguments: argparse.Namespace) -> Contestant:
    try:
        import torch
        from torch import nn
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NpbnError("PyTorch is not installed: pip install torch") from None
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.backend == "cupy"
    if on_gpu and not torch.cuda.is_available():
        raise NpbnError("this PyTorch finds no GPU; pytorch.org says how to install one that does")
    device = torch.device("cuda" if on_gpu else "cpu")

    padding, features = (0, 256) if arguments.model == "lenet" else (2, 400)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=padding), nn.BatchNorm2d(6), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(features, 120), nn.BatchNorm1d(120), nn.Sigmoid()),
        *(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.Sigmoid()),
        nn.Linear(84, 10),
    )
    # npbn's initial weights, so that the losses must be npbn's, too.
    weights = npbn_model(arguments).parameters().values()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight.data).reshape(parameter.shape))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()

    def step(images: Any, labels: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def hits(images: Any, labels: Any) -> Any:
        with torch.inference_mode():
            return torch.count_nonzero(model(images).argmax(dim=1) == labels)

    images, labels = (torch.from_numpy(array).to(device) for array in random_data(arguments))
    where = torch.cuda.get_device_name() if on_gpu else backend.cpu_name()
    description = f"PyTorch {torch.__version__} ({torch.get_num_threads()} threads) on {where}"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    return Contestant(description, model, images, labels, step, hits, synchronize)


def npbn_model(arguments: argparse.Namespace) -> Sequential:
    generator = np.random.default_rng(arguments.seed)
    if arguments.model == "lenet":
        return models.LeNet(generator=generator)
    return models.BLeNet(generator=generator)


def random_pixels(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(arguments.seed)
    images = generator.integers(256, size=(IMAGES, 1, 28, 28), dtype=np.uint8)
    return images, generator.integers(10, size=IMAGES)


def random_data(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    images, labels = random_pixels(arguments)
    return images / np.float32(255), labels


def serve(contestant: Contestant) -> None:
    """Say what this is, then answer requests, a line of JSON each, until there are no more."""
    print(json.dumps({"description": contestant.description}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["task"] == "peak memory":
            answer: dict[str, float] = {"bytes": peak_resident_bytes()}
        else:
            answer = measure(contestant, **request)
        print(json.dumps(answer), flush=True)


def measure(contestant: Contestant, task: str, batch_size: int, steps: int) -> dict[str, float]:
    """Train for some steps, or evaluate on all images; examples/s, and the sum of the results."""
    batches = [slice(i, min(i + batch_size, IMAGES)) for i in range(0, IMAGES, batch_size)]
    if task == "train":
        contestant.model.train()
        function = contestant.step
        whole = batches[: IMAGES // batch_size]
        batches = list(itertools.islice(itertools.cycle(whole), steps))
    else:
        contestant.model.eval()
        function = contestant.hits

    def call(batch: slice) -> Any:
        return function(contestant.images[batch], contestant.labels[batch])

    call(batches[0])  # not counted: until now the caches held another contestant's data
    contestant.synchronize()
    started = time.perf_counter()
    total: Any = 0
    for batch in batches:
        total = total + call(batch)
    contestant.synchronize()
    seconds = time.perf_counter() - started
    examples = sum(batch.stop - batch.start for batch in batches)
    return {"examples_per_second": examples / seconds, "sum": float(total)}


def peak_resident_bytes() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# In the parent: the rounds and the table.


class Worker:
    """A contestant in a process of its own, its stderr in a file."""

    def __init__(
        self, name: str, kind: str, environment: dict[str, str], stderr: IO[bytes]
    ) -> None:
        self.name = name
        self.stderr = stderr
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, **environment},
            encoding="utf-8",
            errors="replace",
        )

    def ask(self, **request: str | int) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died; then there is no answer, either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.stderr.seek(0)
            lines = self.stderr.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"its process ended with exit code {code}"
            raise NpbnError(f"{self.name}: {reason.removeprefix('benchmark.py: error: ')}")
        try:
            return dict(json.loads(line))
        except (TypeError, ValueError):
            raise NpbnError(f"{self.name}: expected JSON, got {line.strip()[:80]!r}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes and waits for the end


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all contestants, print the table, return every value."""
    contestants: dict[str, tuple[str, dict[str, str]]] = {
        "npbn layers": ("npbn", {}),
        BASELINE: ("torch", {}),
    }
    if arguments.backend == "numpy":
        contestants["npbn engine"] = ("engine", {})
    if arguments.backend == "numpy" and platform.libc_ver()[0] == "glibc":
        contestants[f"{BASELINE}, malloc tuned"] = ("torch", TUNED_MALLOC)
    tasks = {"train": arguments.batch_size, "evaluate": arguments.evaluation_batch_size}
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name, (kind, environment) in contestants.items():
            stderr = stack.enter_context(tempfile.TemporaryFile())  # a pipe could fill up
            worker = Worker(name, kind, environment, stderr)
            stack.callback(worker.close)
            workers.append(worker)
            results[name] = {**worker.answer(), "train": [], "evaluate": []}
            say(f"{name}: {results[name]['description']}")
        order = random.Random(arguments.seed)
        rounds = range(arguments.rounds + 1)
        quiet = sys.stderr is None or not sys.stderr.isatty()
        for number in tqdm(rounds, unit=" rounds", leave=False, disable=quiet):
            for task, batch_size in tasks.items():
                order.shuffle(workers)
                sums = {}
                for worker in workers:
                    answer = worker.ask(task=task, batch_size=batch_size, steps=arguments.steps)
                    sums[worker.name] = answer["sum"]
                    if number > 0:  # the round before that is to warm up
                        results[worker.name][task].append(answer["examples_per_second"])
                if task == "train" and number == 0:
                    check_losses(sums)
        for worker in workers:
            results[worker.name]["peak_resident_bytes"] = worker.ask(task="peak memory")["bytes"]

    rows = [["contestant", "train, examples/s", "ratio", "evaluate, examples/s", "ratio", "MB"]]
    for name, result in results.items():
        cells = [name]
        for task in tasks:
            ratio = ratios(result[task], results[BASELINE][task])
            cells += [spread(result[task], ",.0f"), spread(ratio, ".2f")]
        rows.append([*cells, f"{result['peak_resident_bytes'] / 1e6:,.0f}"])
    print_table(rows)
    say(f"Median (min-max) of {arguments.rounds} rounds. Ratio: to {BASELINE} in the same round.")
    say("MB: the most memory that was resident in the process at any time (not in a GPU).")
    return results


def check_losses(sums: dict[str, float]) -> None:
    # Rounding stays below this; another model, other data or another step would not.
    if not all(math.isclose(value, sums[BASELINE], rel_tol=1e-3) for value in sums.values()):
        found = ", ".join(f"{name}: {value:.6g}" for name, value in sums.items())
        raise NpbnError(f"the contestants do not compute the same; sums of their losses: {found}")


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}}-{high:{form}})"


def print_table(rows: list[list[str]]) -> None:
    """In Markdown; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    say("")
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        say(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    say("")


# What the array API costs. Each of the next two functions allocates buffers and returns a function
# that computes the same as npbn.functional, forward and backward, in them. Here as there, arrays
# have the shape (N, C, H, W) and the memory order C, H, W, N.


def block_in_buffers(x: Array, gamma: Array, beta: Array, dpooled: Array) -> Callable[[], Any]:
    """Batch norm, sigmoid and 2 × 2 average pooling."""
    x_centred, y, dy, dx = (np.empty_like(x) for _ in range(4))  # keeps the memory order
    pooled, share = (np.empty_like(dpooled) for _ in range(2))
    moving_mean, moving_var = np.zeros_like(gamma), np.ones_like(gamma)
    axes, m = (0, 2, 3), x.size // gamma.size
    low = math.log(np.finfo(x.dtype).smallest_normal)
    places = [np.s_[:, :, i::2, j::2] for i in range(2) for j in range(2)]

    def compute() -> tuple[Array, ...]:
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
        for place in places:  # without an array for the gradient by the sigmoid's output
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


def convolution_in_buffers(x: Array, weight: Array, bias: Array, dy: Array) -> Callable[[], Any]:
    """A convolution without padding; dy in the memory order C, H, W, N, x in any."""
    (n, c, h, w), (out, _, kh, kw), (_, _, out_h, out_w) = x.shape, weight.shape, dy.shape
    images, dimages = (np.empty((h, c, w, n), x.dtype) for _ in range(2))
    strips, dstrips = (np.empty((h, c, kw, out_w, n), x.dtype) for _ in range(2))
    y = np.empty((out, out_h, out_w * n), x.dtype)
    dy_rows = dy.transpose(1, 2, 3, 0).reshape(y.shape)
    dx_row = np.empty((kh * c * kw, out_w * n), x.dtype)
    dmatrix, dmatrix_row = (np.empty((kh * c * kw, out), x.dtype) for _ in range(2))

    def compute() -> tuple[Array, ...]:
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
    """Measure network A's first block both ways, print the table, return every value."""
    backend.keep_freed_memory()
    backend.limit_blas_threads(arguments.threads)
    say(backend.get_backend("numpy").description)
    generator = np.random.default_rng(arguments.seed)

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape, np.float32)

    n = arguments.batch_size
    images, weight, bias = normal(n, 1, 28, 28), normal(6, 1, 5, 5), normal(6)
    gamma, beta = normal(1, 6, 1, 1), normal(1, 6, 1, 1)
    moving_mean, moving_var = np.zeros_like(gamma), np.ones_like(gamma)
    maps, _ = F.conv2d(images, weight, bias)
    dmaps = normal(6, 24, 24, n).transpose(3, 0, 1, 2)
    dpooled = normal(6, 12, 12, n).transpose(3, 0, 1, 2)

    def block() -> tuple[Array, ...]:
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
                times.append(milliseconds(function, arguments.steps))
        results[name] = {"functional_ms": ours, "buffers_ms": theirs}
        rows.append([name, *(spread(v, ".2f") for v in (ours, theirs, ratios(ours, theirs)))])
    print_table(rows)
    say(f"Median (min-max) of {arguments.rounds} rounds of {arguments.steps} calls.")
    return results


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    function()  # not counted: until now the caches held the other one's data
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e3


def save(path: Path, report: dict[str, Any]) -> None:
    """Write the report beside ``path``, then rename it: there is never half a report."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            raise NpbnError(f"cannot write {path}: it is no file")
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if report:
            os.replace(part, path)
    except OSError as error:
        raise NpbnError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        prepare = {
            "npbn": npbn_contestant,
            "engine": engine_contestant,
            "torch": torch_contestant,
        }
        serve(prepare[arguments.worker](arguments))
        return

    path = None if arguments.json is None else Path(os.path.realpath(arguments.json))
    if path is not None:
        save(path, {})  # only to see, before minutes have gone by, whether that will work
    machine = {
        "date": datetime.date.today().isoformat(),
        "cpu": backend.cpu_name(),
        "cores": usable_cores(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    say("{date}: {cpu}, {cores} cores, {system}, Python {python}".format(**machine))
    results = array_api_cost(arguments) if arguments.array_api_cost else compare(arguments)
    if path is not None:
        save(path, {"machine": machine, "options": vars(arguments), "results": results})


if __name__ == "__main__":
    run("benchmark.py", main)
