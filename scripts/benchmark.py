"""How fast npbn trains and evaluates LeNet with batch norm, as a ratio to PyTorch eager."""

from __future__ import annotations

from _command_line import ArgumentParser, check_installation, integer, run, say

check_installation()

import argparse
import contextlib
import copy
import datetime
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

import npbn
from npbn import backend, optim, plots
from npbn import functional as F
from npbn.data import Split
from npbn.engine import Engine
from npbn.engine.cupy_stages import CupyEngine
from npbn.engine.plan import plan
from npbn.errors import NpbnError
from npbn.functional._arrays import Array
from npbn.layers import AvgPool2d, BatchNorm, Conv2d, Flatten, Linear, Sequential, Sigmoid
from npbn.training import EVALUATION_BATCH_SIZE

EPILOG = """\
Every contestant runs in a process of its own. They take turns, in an order shuffled anew for each
round, and the ratio is taken within each round. The tables show medians, with the smallest and the
largest value behind them. scripts/README.md says more.

contestants:
  layers          npbn's layers
  engine          npbn's engine; on a GPU, the GPU engine
  eager           PyTorch as it comes; always there, for the ratios
  eager-malloc    the same, with the C library's memory allocator set as npbn's programs set it
  compile         PyTorch with torch.compile, which needs a C++ compiler; on a GPU, max-autotune
  compile-malloc  the same, with that allocator
  graph           PyTorch eager, the training step captured with torch.cuda.graph; on a GPU only
  by-hand         PyTorch eager, with batch norm written in elementary operations
  jax             JAX, the whole step in jax.jit

examples:
  python scripts/benchmark.py                      on the CPU, with all cores
  python scripts/benchmark.py --contestants layers engine
  python scripts/benchmark.py --model wide --batch-size 32 256 4096 --threads 1 2
  python scripts/benchmark.py --backend cupy       on a GPU, against PyTorch there
  python scripts/benchmark.py --backend cupy --batch-size 64 256 1024 8192 --json gpu.json
  python scripts/benchmark.py --quick --json results.json --chart results.png
  python scripts/benchmark.py --array-api-cost

exit codes: 0 measured, 2 bad input or something missing on this machine, 130 interrupted
"""

LEARNING_RATE = 0.01  # small: the labels are random, there is nothing to learn
SMALLEST_BATCH = 16  # over two or three examples, batch norm magnifies rounding: see check_losses
CONTESTANTS = {
    "layers": "npbn layers",
    "engine": "npbn engine",
    "eager": "PyTorch eager",
    "eager-malloc": "PyTorch eager, malloc tuned",
    "compile": "torch.compile",
    "compile-malloc": "torch.compile, malloc tuned",
    "graph": "torch.cuda.graph",
    "by-hand": "PyTorch, hand-written BN",
    "jax": "JAX jit",
}
BASELINE = "eager"
NEEDED_TO_COUNT = {
    "numpy": ("eager", "eager-malloc", "compile", "compile-malloc"),
    "cupy": ("eager", "compile", "graph"),
}
ELSEWHERE = {"numpy": ("graph",), "cupy": ("eager-malloc", "compile-malloc", "jax")}
TUNED_MALLOC = {  # glibc's names for what npbn.backend.keep_freed_memory sets
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
IMAGE = (1, 28, 28)
# Compute capabilities whose multiprocessors have 64 lanes for float32; the others of today, 128.
LANES_64 = ("60", "70", "72", "75", "80")
# Padding of the first convolution, maps after the first and the second, features after flattening.
NETWORKS = {"lenet": (0, 6, 16, 256), "blenet": (2, 6, 16, 400), "wide": (0, 24, 64, 1024)}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help="who takes part, see below (default: all)",
    )
    networks = "lenet, network A; blenet, network B; or wide, network A with 4 times the maps"
    for name, choices, text in (
        ("--model", tuple(NETWORKS), networks),
        ("--backend", ("numpy", "cupy"), "numpy, all on the CPU; or cupy, all on the GPU"),
    ):
        text += f" (default: {choices[0]})"
        parser.add_argument(name, choices=choices, default=choices[0], help=text)
    for name, minimum, default, text in (
        ("--threads", 1, usable_cores(), "that each library computes with, on the CPU"),
        ("--batch-size", SMALLEST_BATCH, 256, "of training"),
    ):
        text += f"; several are measured one after another (default: {default})"
        kind = integer(minimum)
        parser.add_argument(name, type=kind, nargs="+", default=[default], metavar="N", help=text)
    for name, minimum, default, text in (
        ("--rounds", 1, 7, "rounds that count; one more comes before them"),
        ("--seed", 0, 0, "of images, labels, initial weights and order"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=integer(minimum), default=default, metavar="N", help=text)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="3 rounds with 1,000 images in place of 10,000 (on a GPU, 60,000), to see whether it "
        "works",
    )
    parser.add_argument("--json", metavar="FILE", help="write every value there, too")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the ratios there, too")
    parser.add_argument(
        "--array-api-cost",
        action="store_true",
        help="measure something else: npbn.functional on NumPy against the same mathematics "
        "written with out= into buffers allocated once",
    )

    arguments = parser.parse_args()
    # As many as Fashion-MNIST has for testing; on a GPU, which is through with those in
    # milliseconds, as many as it has for training.
    arguments.images = 10_000 if arguments.backend == "numpy" else 60_000
    arguments.calls = 40
    if arguments.quick:
        arguments.images, arguments.calls, arguments.rounds = 1_000, 5, 3
    if max(arguments.batch_size) > arguments.images:
        parser.error(f"expected batches of at most {arguments.images:,} images")
    if arguments.array_api_cost:
        for option in ("model", "backend", "contestants", "chart"):
            if getattr(arguments, option) != parser.get_default(option):
                parser.error(f"--array-api-cost is about network A on NumPy: leave out --{option}")
        if len(arguments.threads) + len(arguments.batch_size) > 2:
            parser.error("--array-api-cost takes one number of threads and one batch size")
    return arguments


def usable_cores() -> int:
    if sys.platform != "linux":
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


# In a worker: a library and the clock. Here, threads and batch size are one number each.


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
    shuffle: Callable[[], Any]
    """The numbers of the images in a new order."""
    gather: Callable[[Any], tuple[Any, Any]]
    """Numbers of images → what `step` takes, made from pixels that are bytes."""
    synchronize: Callable[[], object]
    """Waits for the device."""
    whole_pass: bool = False
    """`step` and `hits` take many batches in one call, and return the sum of what they found."""


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

    generator = np.random.default_rng(arguments.seed)
    split = Split(*random_pixels(arguments)).to(device)

    def gather(numbers: Any) -> tuple[Any, Any]:
        return next(split.batches(len(numbers), "float32", order=numbers))

    images, labels = (device.asarray(array) for array in random_data(arguments))
    return Contestant(
        f"npbn {npbn.__version__}, {device.description}",
        model,
        images,
        labels,
        step,
        hits,
        lambda: device.asarray(generator.permutation(arguments.images)),
        gather,
        device.synchronize,
    )


def engine_contestant(arguments: argparse.Namespace) -> Contestant:
    """The engine always takes pixels as bytes, and images by their numbers."""
    backend.keep_freed_memory()
    backend.limit_blas_threads(arguments.threads)
    model = npbn_model(arguments)
    images, labels = random_pixels(arguments)
    split = Split(images, labels)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)
    engine = Engine(model, optimizer, images.shape[1:], workers=arguments.threads)
    generator = np.random.default_rng(arguments.seed)

    def step(numbers: Any, labels: Any) -> Any:
        return engine.step(split, numbers)[0]

    def hits(numbers: Any, labels: Any) -> Any:
        return engine.evaluate(Split(images[numbers[0] : numbers[-1] + 1], labels))[1]

    return Contestant(
        f"npbn {npbn.__version__}, {arguments.threads} workers, "
        f"{backend.get_backend('numpy').description}",
        model,
        np.arange(len(images)),
        labels,
        step,
        hits,
        lambda: generator.permutation(len(images)),
        lambda numbers: (numbers, None),
        lambda: None,
    )


def gpu_engine_contestant(arguments: argparse.Namespace) -> Contestant:
    """As the engine on the CPU; and it always evaluates all images, in parts of its own."""
    device = backend.get_backend("cupy")
    model = npbn_model(arguments)
    model.to(device)
    split = Split(*random_pixels(arguments)).to(device)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)
    engine = CupyEngine(model, optimizer, split, split, batch_size=arguments.batch_size)
    generator = np.random.default_rng(arguments.seed)
    launches = len(engine.programs[f"train{arguments.batch_size}"].launches)
    return Contestant(
        f"npbn {npbn.__version__}, {launches} kernel launches a step, {device.description}",
        model,
        np.arange(arguments.images),
        np.arange(arguments.images),  # not used: the labels are in the engine
        lambda numbers, _: np.sum(engine.train(numbers)[0]),
        lambda _, __: engine.evaluate()[1],
        lambda: generator.permutation(arguments.images),
        lambda numbers: (numbers, None),
        engine.stream.synchronize,
        whole_pass=True,
    )


def torch_contestant(arguments: argparse.Namespace) -> Contestant:
    import torch
    from torch import nn

    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.backend == "cupy"
    if on_gpu and not torch.cuda.is_available():
        raise NpbnError("this PyTorch finds no GPU; pytorch.org says how to install one that does")
    device = torch.device("cuda" if on_gpu else "cpu")

    class HandWritten(nn.Module):
        """Batch norm as one writes it in a lesson; autograd finds the backward pass."""

        moving_mean: torch.Tensor
        moving_var: torch.Tensor

        def __init__(self, features: int, num_dims: int) -> None:
            super().__init__()
            shape = (1, features, 1, 1)[:num_dims]
            self.gamma = nn.Parameter(torch.ones(shape))
            self.beta = nn.Parameter(torch.zeros(shape))
            self.register_buffer("moving_mean", torch.zeros(shape))
            self.register_buffer("moving_var", torch.ones(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean, var = self.moving_mean, self.moving_var
            if self.training:
                axes = (0, 2, 3)[: x.ndim - 1]
                mean = x.mean(axes, keepdim=True)
                var = ((x - mean) ** 2).mean(axes, keepdim=True)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach()
            return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta

    def norm(features: int, num_dims: int) -> nn.Module:
        if arguments.worker == "by-hand":
            return HandWritten(features, num_dims)
        return nn.BatchNorm2d(features) if num_dims == 4 else nn.BatchNorm1d(features)

    padding, first, second, features = NETWORKS[arguments.model]
    model: Any = nn.Sequential(
        *(nn.Conv2d(1, first, 5, padding=padding), norm(first, 4), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(first, second, 5), norm(second, 4), nn.Sigmoid(), nn.AvgPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(features, 120), norm(120, 2), nn.Sigmoid()),
        *(nn.Linear(120, 84), norm(84, 2), nn.Sigmoid()),
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
    if arguments.worker.startswith("compile"):
        # For each shape anew, and so the fastest.
        model = torch.compile(model, dynamic=False, mode="max-autotune" if on_gpu else None)

    def step(images: Any, labels: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def captured(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """The step as a CUDA graph, captured as PyTorch's manual has it."""
        batch_images, batch_labels = (
            torch.from_numpy(array[: arguments.batch_size]).to(device)
            for array in random_data(arguments)
        )
        before = copy.deepcopy(model.state_dict())
        cuda: Any = torch.cuda  # some of which has no types
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):  # to warm up
                step(batch_images, batch_labels)
        cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()  # so that the graph has gradients of its own
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            loss = step(batch_images, batch_labels)
        model.load_state_dict(before)  # copied to where the graph works

        def replay(images: Any, labels: Any) -> Any:
            batch_images.copy_(images)
            batch_labels.copy_(labels)
            graph.replay()
            return loss

        return replay

    def hits(images: Any, labels: Any) -> Any:
        with torch.inference_mode():
            return torch.count_nonzero(model(images).argmax(dim=1) == labels)

    pixels, all_labels = (torch.from_numpy(array).to(device) for array in random_pixels(arguments))
    generator = torch.Generator(device).manual_seed(arguments.seed)

    def gather(numbers: Any) -> tuple[Any, Any]:
        return pixels.index_select(0, numbers).float().div_(255), all_labels[numbers]

    images, labels = (torch.from_numpy(array).to(device) for array in random_data(arguments))
    description = f"PyTorch {torch.__version__} ({torch.get_num_threads()} threads)"
    if on_gpu:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        description += ", TF32 {} in convolutions, {} in matrix products, on {}".format(
            *("on" if allowed else "off" for allowed in tf32), torch.cuda.get_device_name()
        )
    else:
        description += f" on {backend.cpu_name()}"
    return Contestant(
        description,
        model,
        images,
        labels,
        captured(step) if arguments.worker == "graph" else step,
        hits,
        lambda: torch.randperm(arguments.images, generator=generator, device=device),
        gather,
        torch.cuda.synchronize if on_gpu else lambda: None,
    )


def jax_contestant(arguments: argparse.Namespace) -> Contestant:
    # XLA has no other way to be told its number of threads, and asks when it is loaded.
    os.environ.update(NPROC=str(arguments.threads), JAX_PLATFORMS="cpu")
    try:
        import jax
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise
        raise NpbnError("JAX is not installed: pip install jax") from None
    from jax import lax
    from jax import numpy as jnp

    model = npbn_model(arguments)
    # Of each block with batch norm, four: weight, bias, gamma, beta. The last layer has two.
    weights = [jnp.asarray(parameter.data) for parameter in model.parameters().values()]
    moving = [(jnp.zeros_like(gamma), jnp.ones_like(gamma)) for gamma in weights[2::4]]
    padding, *_ = NETWORKS[arguments.model]

    def forward(weights: Any, moving: Any, x: Any, training: bool) -> tuple[Any, Any]:
        """Logits, and the moving averages after this."""
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        after = []
        for i, averages in enumerate(moving):
            weight, bias, gamma, beta = weights[4 * i : 4 * i + 4]
            if weight.ndim == 4:
                border = (padding if i == 0 else 0,) * 2
                x = lax.conv_general_dilated(x, weight, (1, 1), (border, border))
            else:
                x = x.reshape(len(x), -1) @ weight.T
            x = x + bias.reshape(gamma.shape)
            axes = (0, 2, 3)[: x.ndim - 1]
            found = (x.mean(axes, keepdims=True), x.var(axes, keepdims=True))
            mean, var = found if training else averages
            after.append([0.9 * a + 0.1 * b for a, b in zip(averages, found, strict=True)])
            x = jax.nn.sigmoid(gamma * (x - mean) / jnp.sqrt(var + 1e-5) + beta)
            if weight.ndim == 4:
                window = (1, 1, 2, 2)
                x = lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 4
        return x @ weights[-2].T + weights[-1], after

    def train(weights: Any, moving: Any, x: Any, labels: Any) -> tuple[Any, ...]:
        def loss_of(weights: Any) -> tuple[Any, Any]:
            logits, after = forward(weights, moving, x, True)
            right = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -right.mean(), after

        (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        updated = [w - LEARNING_RATE * g for w, g in zip(weights, gradients, strict=True)]
        return loss, updated, after

    def count(weights: Any, moving: Any, x: Any, labels: Any) -> Any:
        return jnp.count_nonzero(forward(weights, moving, x, False)[0].argmax(axis=1) == labels)

    compiled_train, compiled_count = jax.jit(train, donate_argnums=(0, 1)), jax.jit(count)

    latest: Any = None  # to wait for

    def step(images: Any, labels: Any) -> Any:
        nonlocal weights, moving, latest
        latest, weights, moving = compiled_train(weights, moving, images, labels)
        return latest

    def hits(images: Any, labels: Any) -> Any:
        nonlocal latest
        latest = compiled_count(weights, moving, images, labels)
        return latest

    generator = np.random.default_rng(arguments.seed)
    pixels, all_labels = random_pixels(arguments)
    return Contestant(
        f"JAX {jax.__version__} ({arguments.threads} threads) on {backend.cpu_name()}",
        model,  # whose mode means nothing here
        *random_data(arguments),
        step,
        hits,
        lambda: generator.permutation(arguments.images),
        lambda numbers: (pixels.take(numbers, axis=0), all_labels[numbers]),
        lambda: jax.block_until_ready(latest),
    )


def npbn_model(arguments: argparse.Namespace) -> Sequential:
    """That of `npbn.models` for lenet and blenet, with those initial weights."""
    generator = np.random.default_rng(arguments.seed)
    padding, first, second, features = NETWORKS[arguments.model]

    def conv(channels: int, maps: int, padding: int = 0) -> Conv2d:
        return Conv2d(channels, maps, 5, padding=padding, generator=generator)

    def linear(features: int, outputs: int) -> Linear:
        return Linear(features, outputs, generator=generator)

    return Sequential(
        *(conv(1, first, padding), BatchNorm(first, 4), Sigmoid(), AvgPool2d(2)),
        *(conv(first, second), BatchNorm(second, 4), Sigmoid(), AvgPool2d(2)),
        Flatten(),
        *(linear(features, 120), BatchNorm(120, 2), Sigmoid()),
        *(linear(120, 84), BatchNorm(84, 2), Sigmoid()),
        linear(84, 10),
    )


def random_pixels(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(arguments.seed)
    images = generator.integers(256, size=(arguments.images, *IMAGE), dtype=np.uint8)
    return images, generator.integers(10, size=arguments.images)


def random_data(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    images, labels = random_pixels(arguments)
    return images / np.float32(255), labels


def prepared(arguments: argparse.Namespace) -> Contestant:
    """The contestant that this worker is, after its first training step."""
    engine = engine_contestant if arguments.backend == "numpy" else gpu_engine_contestant
    prepare = {"layers": npbn_contestant, "engine": engine, "jax": jax_contestant}
    try:
        contestant = prepare.get(arguments.worker, torch_contestant)(arguments)
        contestant.model.train()
        batch = slice(arguments.batch_size)
        contestant.step(contestant.images[batch], contestant.labels[batch])
        contestant.synchronize()
    except Exception as error:  # torch.compile's goes on for lines after it has said what is wrong
        raise NpbnError((str(error) or type(error).__name__).splitlines()[0]) from error
    return contestant


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


def measure(contestant: Contestant, task: str, batch_size: int) -> dict[str, float]:
    """Go through the images once; examples/s, and the sum of the results."""
    count = len(contestant.images)
    batches = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    if task in ("train", "epoch"):
        contestant.model.train()
        batches = batches[: count // batch_size]  # the whole ones
    else:
        contestant.model.eval()

    def results(batches: list[slice]) -> Iterator[Any]:
        if task == "epoch":
            order = contestant.shuffle()
            for batch in batches:
                yield contestant.step(*contestant.gather(order[batch]))
        else:
            function = contestant.step if task == "train" else contestant.hits
            for batch in batches:
                yield function(contestant.images[batch], contestant.labels[batch])

    for _ in results(batches[:1]):
        pass  # not counted: until now the caches held another contestant's data
    examples = batches[-1].stop
    if contestant.whole_pass:
        batches = [slice(0, examples)]
    contestant.synchronize()
    started = time.perf_counter()
    total: Any = 0
    for result in results(batches):
        total = total + result
    contestant.synchronize()
    seconds = time.perf_counter() - started
    return {"examples_per_second": examples / seconds, "sum": float(total)}


def peak_resident_bytes() -> int:
    """Of this process and those that it has started; what they share counts in each."""
    import psutil

    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        if sys.platform == "linux":
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that has ended has none
            total += int(peak[1]) * 1024 if peak else 0
        else:
            memory = process.memory_info()
            total += getattr(memory, "peak_wset", memory.rss)  # on macOS, what it is now
    return total


# In the parent: the rounds, the tables and the chart.


class Worker:
    """A contestant in a process of its own, its stderr in a file."""

    def __init__(
        self, name: str, arguments: argparse.Namespace, caches: str, stderr: IO[bytes]
    ) -> None:
        self.title = CONTESTANTS[name]
        self.stderr = stderr
        # What was compiled in earlier runs would make the time to the first step mean nothing.
        environment = {"TORCHINDUCTOR_CACHE_DIR": caches}
        if name.endswith("-malloc"):
            environment |= TUNED_MALLOC
        options = ["--worker", name, *sys.argv[1:], "--threads", str(arguments.threads)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options, "--batch-size", str(arguments.batch_size)],
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
            raise NpbnError(f"{self.title}: {reason.removeprefix('benchmark.py: error: ')}")
        try:
            return dict(json.loads(line))
        except (TypeError, ValueError):
            raise NpbnError(f"{self.title}: expected JSON, got {line.strip()[:80]!r}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()  # closes the pipes and waits for the end


def check_libraries() -> None:
    """One line if what a comparison needs is not there."""
    missing = [name for name in ("torch", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        install = "in npbn's directory: pip install -e '.[benchmark]'"
        raise NpbnError(f"not installed: {', '.join(missing)}; {install}")


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all that is asked for, print the tables, return every value."""
    check_libraries()
    comparisons = []
    for threads, batch_size in itertools.product(arguments.threads, arguments.batch_size):
        one = argparse.Namespace(**vars(arguments))
        one.threads, one.batch_size = threads, batch_size
        say("")
        say(heading(vars(one)))
        results = compare_one(one)
        print_results(results)
        least = None
        if one.backend == "cupy":
            say("")
            say(f"Microseconds a step: {microseconds(results, batch_size)}.")
            if CONTESTANTS["engine"] in results:  # and so CuPy is there, which knows the card
                least = floor(one)
                say(
                    "Floor: {microseconds:,.1f}, for {operations:.3g} operations in float32 at "
                    "{operations_per_second:.3g} a second, and {bytes:.3g} bytes at "
                    "{bytes_per_second:.3g}, by the card's clocks.".format(**least)
                )
        comparisons.append(
            {"threads": threads, "batch_size": batch_size, "floor": least, "results": results}
        )
    say("")
    baseline = CONTESTANTS[BASELINE]
    say(f"Median (min-max) of {arguments.rounds} rounds. Ratio: to {baseline} in the same round.")
    say("First step: seconds from the start of the process to the end of the first training step.")
    say("MB: the most memory that was resident before evaluation at once (not in a GPU).")
    say("")
    absent = [
        CONTESTANTS[name]
        for name in NEEDED_TO_COUNT[arguments.backend]
        if not all(CONTESTANTS[name] in comparison["results"] for comparison in comparisons)
    ]
    if arguments.quick:
        say("This run does not count: it was a quick one.")
    elif absent:
        say(f"This run does not count: without {'; '.join(absent)}.")
    elif arguments.backend == "numpy":
        say("This run counts: PyTorch eager and torch.compile took part, with malloc tuned, too.")
    else:
        say("This run counts: PyTorch eager, torch.compile and torch.cuda.graph took part.")
    return comparisons


def heading(comparison: Mapping[str, Any]) -> str:
    threads = comparison["threads"]
    return f"batches of {comparison['batch_size']:,}, {threads} thread{'s' * (threads > 1)}"


def compare_one(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every value of each contestant, with one number of threads and one batch size."""
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name, title in CONTESTANTS.items():
            if name not in (*arguments.contestants, BASELINE):
                continue
            if name in ELSEWHERE[arguments.backend]:
                where = "a GPU" if arguments.backend == "numpy" else "the CPU"
                say(f"left out: {title}: this is for {where} only")
                continue
            if name.endswith("-malloc") and platform.libc_ver()[0] != "glibc":
                say(f"left out: {title}: the C library is not glibc")
                continue
            stderr = stack.enter_context(tempfile.TemporaryFile())  # a pipe could fill up
            caches = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="npbn-", ignore_cleanup_errors=True)
            )
            started = time.perf_counter()
            worker = Worker(name, arguments, caches, stderr)
            stack.callback(worker.close)
            try:
                description = worker.answer()["description"]
            except NpbnError as error:
                if name in ("layers", BASELINE):
                    raise
                say(f"left out: {error}")
                continue
            seconds = time.perf_counter() - started
            say(f"{title}: {description}")
            workers.append(worker)
            results[title] = {"description": description, "first_step_seconds": seconds}
        count = arguments.images
        tasks = {"train": arguments.batch_size, "epoch": arguments.batch_size}
        take_turns(workers, arguments, {**tasks, "evaluate": EVALUATION_BATCH_SIZE}, results)
        for worker in workers:
            results[worker.title]["peak_resident_bytes"] = worker.ask(task="peak memory")["bytes"]
        # Last, for it needs more memory than all else, which an allocator may keep.
        take_turns(workers, arguments, {"evaluate at once": count}, results)
    return results


def take_turns(
    workers: list[Worker],
    arguments: argparse.Namespace,
    tasks: Mapping[str, int],
    results: Mapping[str, dict[str, Any]],
) -> None:
    """The rounds of some tasks, given with their batch sizes; examples/s go into the results."""
    order = random.Random(arguments.seed)
    quiet = sys.stderr is None or not sys.stderr.isatty()
    rounds = range(arguments.rounds + 1)
    for number in tqdm(rounds, unit=" rounds", leave=False, disable=quiet):
        for task, batch_size in tasks.items():
            order.shuffle(workers)
            sums = {}
            for worker in workers:
                answer = worker.ask(task=task, batch_size=batch_size)
                sums[worker.title] = answer["sum"]
                values = results[worker.title].setdefault(task, [])
                if number > 0:  # the round before that is to warm up
                    values.append(answer["examples_per_second"])
            if task == "train" and number == 0:
                check_losses(sums)


TASKS = ("train", "epoch", "evaluate", "evaluate at once")


def print_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    speeds = [["examples/s", *TASKS]]
    others = [["ratio", *TASKS, "first step", "MB"]]
    for title, result in results.items():
        speeds.append([title, *(spread(result[task], ",.0f") for task in TASKS)])
        found = [spread(ratios(results, title, task), ".2f") for task in TASKS]
        seconds, size = result["first_step_seconds"], result["peak_resident_bytes"]
        others.append([title, *found, f"{seconds:.1f}", f"{size / 1e6:,.0f}"])
    print_table(speeds)
    print_table(others)


def microseconds(results: Mapping[str, Mapping[str, Any]], batch_size: int) -> str:
    """Of a training step, by contestant."""
    times = {
        title: batch_size / statistics.median(result["train"]) * 1e6
        for title, result in results.items()
    }
    return ", ".join(f"{title} {time:,.1f}" for title, time in times.items())


def floor(arguments: argparse.Namespace) -> dict[str, float]:
    """What a training step takes at least on this GPU: the longer of arithmetic and memory.

    Arithmetic is the layers' products alone, forward and backward, by the weights and, but for the
    first layer, by what went in. Memory is pixels, parameters and moving averages; the last two are
    read and written.
    """
    model = npbn_model(arguments)
    first, *others = (block.products for block in plan(model, IMAGE))
    n = arguments.batch_size
    operations = 2 * n * (2 * first + 3 * sum(others))  # an addition with each multiplication
    state = sum(value.nbytes for value in model.state_dict().values())
    moved = n * math.prod(IMAGE) + 2 * state
    operations_per_second, bytes_per_second = card_rates()
    return {
        "microseconds": max(operations / operations_per_second, moved / bytes_per_second) * 1e6,
        "operations": operations,
        "bytes": moved,
        "operations_per_second": operations_per_second,
        "bytes_per_second": bytes_per_second,
    }


def card_rates() -> tuple[float, float]:
    """Operations in float32, and bytes to or from memory, that this GPU can do in a second."""
    import cupy

    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime

    def attribute(name: str) -> int:
        """From CUDA 13 on, some of these are no properties any more."""
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), device.id))

    # A multiplication and an addition a cycle in each; kHz; two edges a cycle, and bits.
    lanes = attribute("MultiProcessorCount") * (
        64 if device.compute_capability in LANES_64 else 128
    )
    operations = lanes * 2 * attribute("ClockRate") * 1e3
    bandwidth = 2 * attribute("MemoryClockRate") * 1e3 * attribute("GlobalMemoryBusWidth") / 8
    # A card that shares the computer's memory may name no clock: then that sets no limit here.
    return operations, bandwidth or math.inf


def ratios(results: Mapping[str, Mapping[str, Any]], title: str, task: str) -> list[float]:
    """To PyTorch eager, round by round."""
    return quotients(results[title][task], results[CONTESTANTS[BASELINE]][task])


def draw(comparisons: list[dict[str, Any]], title: str) -> bytes:
    """The ratios as a PNG: a row of panels for each comparison, a panel for each task."""
    from matplotlib.figure import Figure

    titles = list(comparisons[0]["results"])[::-1]  # the first on top
    height = 1.2 + len(comparisons) * (1.0 + 0.32 * len(titles))
    figure = Figure(figsize=(14, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(len(comparisons), len(TASKS), sharey=True, squeeze=False)
    for row, comparison in zip(grid, comparisons, strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            results = comparison["results"]
            for place, name in enumerate(titles):
                if name not in results:
                    continue
                values = ratios(results, name, task)
                median = statistics.median(values)
                colour = plots.COLOURS[0 if name.startswith("npbn") else 5]
                error = [[median - min(values)], [max(values) - median]]
                axes.barh(place, median, 0.7, color=colour, xerr=error, capsize=2)
                axes.annotate(
                    f"{median:.2f}",
                    (max(values), place),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
                )
            axes.axvline(1, color="black", linewidth=0.8)
            axes.margins(x=0.2)
            axes.set_yticks(range(len(titles)), titles)
            axes.set_title(task)
        row[0].set_ylabel(heading(comparison))
    figure.supxlabel(
        f"speed as a ratio to {CONTESTANTS[BASELINE]} in the same round: median, smallest, largest",
        fontsize=10,
    )
    return plots.png(figure)


def check_losses(sums: dict[str, float]) -> None:
    # Rounding stays below this; another model, other data or another step would not.
    expected = sums[CONTESTANTS[BASELINE]]
    if not all(math.isclose(value, expected, rel_tol=1e-3) for value in sums.values()):
        found = ", ".join(f"{name}: {value:.6g}" for name, value in sums.items())
        raise NpbnError(f"the contestants do not compute the same; sums of their losses: {found}")


def quotients(a: list[float], b: list[float]) -> list[float]:
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
    (threads,), (n,) = arguments.threads, arguments.batch_size
    backend.keep_freed_memory()
    backend.limit_blas_threads(threads)
    say(backend.get_backend("numpy").description)
    generator = np.random.default_rng(arguments.seed)

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape, np.float32)

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
                times.append(milliseconds(function, arguments.calls))
        results[name] = {"functional_ms": ours, "buffers_ms": theirs}
        rows.append([name, *(spread(v, ".2f") for v in (ours, theirs, quotients(ours, theirs)))])
    print_table(rows)
    say("")
    say(f"Median (min-max) of {arguments.rounds} rounds of {arguments.calls} calls.")
    return results


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    function()  # not counted: until now the caches held the other one's data
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e3


def save(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename: there is never half a file. Without content, only try."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            raise NpbnError(f"cannot write {path}: it is no file")
        part.write_bytes(content)
        if content:
            os.replace(part, path)
    except OSError as error:
        raise NpbnError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        (arguments.threads,), (arguments.batch_size,) = arguments.threads, arguments.batch_size
        serve(prepared(arguments))
        return

    json_path, chart_path = (
        None if name is None else Path(os.path.realpath(name))
        for name in (arguments.json, arguments.chart)
    )
    for path in filter(None, (json_path, chart_path)):
        save(path, b"")  # only to see, before minutes have gone by, whether that will work
    if chart_path is not None:
        plots.check_matplotlib()
    machine = {
        "date": datetime.date.today().isoformat(),
        "cpu": backend.cpu_name(),
        "cores": usable_cores(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    about = "{date}: {cpu}, {cores} cores, {system}, Python {python}".format(**machine)
    say(about)
    results: Any = array_api_cost(arguments) if arguments.array_api_cost else compare(arguments)
    if json_path is not None:
        report = {"machine": machine, "options": vars(arguments), "results": results}
        save(json_path, (json.dumps(report, indent=2) + "\n").encode())
    if chart_path is not None:
        save(chart_path, draw(results, f"npbn's benchmark, --model {arguments.model}\n{about}"))


if __name__ == "__main__":
    run("benchmark.py", main)
