"""Set up the contestants of benchmark.py and measure their speed.

A contestant is a library with a model that has npbn's architecture and npbn's initial weights.
benchmark.py starts each contestant in its own process, and the process answers the requests of
benchmark.py.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import npbn
from npbn import backend, optim
from npbn import functional as F
from npbn.data import Split
from npbn.errors import NpbnError
from npbn.layers import AvgPool2d, BatchNorm, Conv2d, Flatten, Linear, Sequential, Sigmoid

LEARNING_RATE = 0.01  # This is small because the labels are random.
EVALUATION_BATCH_SIZE = 256
IMAGE = (1, 28, 28)
# The padding of the first convolution, and the number of maps after each of the two convolutions.
NETWORKS = {"lenet": (0, 6, 16), "blenet": (2, 6, 16), "wide": (0, 24, 64)}
TASKS = ("train", "epoch", "evaluate", "evaluate at once")

Array = Any
"""An array of the library that the contestant computes with."""

Pass = Callable[[int, int], Any]
"""A function of the number of images and the batch size, which processes the images in batches.

In training, the function returns the sum of the losses of the batches. In evaluation, it returns
the number of images that the model classifies as labelled.
"""


@dataclass(frozen=True)
class Settings:
    """The settings of one worker process: one number of threads and one batch size."""

    worker: str
    model: str
    backend: str
    threads: int
    batch_size: int
    images: int
    seed: int


@dataclass(frozen=True)
class Contestant:
    """A library that is ready to be measured, with model, images and labels on its device.

    Attributes:
        description: the names and versions of the library and of the device.
        images: the number of images.
        passes: a pass for each task. The pass "evaluate" also does the task "evaluate at once".
        synchronize: a function that waits for the device.
        threading_layer: a function that returns Numba's threading layer after the first step, or
            None if Numba does not compute.
    """

    description: str
    images: int
    passes: dict[str, Pass]
    synchronize: Callable[[], object] = lambda: None
    threading_layer: Callable[[], str | None] = lambda: None

    @property
    def tasks(self) -> list[str]:
        return [task for task in TASKS if task.removesuffix(" at once") in self.passes]


def batches(examples: int, batch_size: int) -> list[slice]:
    """Return the slice of each batch; the last batch may be smaller than the others."""
    return [slice(i, min(i + batch_size, examples)) for i in range(0, examples, batch_size)]


def batch_by_batch(
    images: Array,
    labels: Array,
    *,
    step: Callable[[Array, Array], Array],
    correct: Callable[[Array, Array], Array],
    shuffle: Callable[[], Array],
    gather: Callable[[Array], tuple[Array, Array]],
    set_mode: Callable[[bool], object] = lambda training: None,
) -> dict[str, Pass]:
    """Return the passes of a library that is called once for each batch.

    Args:
        images: the images as floats.
        labels: the labels of the images.
        step: a function that does a training step on images and labels, and returns the loss.
        correct: a function of images and labels that returns the number of images that the model
            classifies as labelled.
        shuffle: a function that returns the indices of all images in a new order.
        gather: a function of indices that converts the images at these indices from bytes to
            floats, and returns these images and their labels.
        set_mode: a function that sets the model's mode; its argument True means training.
    """

    def train(examples: int, batch_size: int) -> Array:
        set_mode(True)
        return total(step(images[b], labels[b]) for b in batches(examples, batch_size))

    def epoch(examples: int, batch_size: int) -> Array:
        set_mode(True)
        order = shuffle()
        return total(step(*gather(order[b])) for b in batches(examples, batch_size))

    def evaluate(examples: int, batch_size: int) -> Array:
        set_mode(False)
        return total(correct(images[b], labels[b]) for b in batches(examples, batch_size))

    return {"train": train, "epoch": epoch, "evaluate": evaluate}


def total(results: Iterable[Array]) -> Array:
    """Return the sum of the results, or 0 if there is none, without waiting for the device."""
    found: Array = 0
    for result in results:
        found = found + result
    return found


def layers_contestant(settings: Settings) -> Contestant:
    """Return the contestant that trains with npbn's layers, set up as in train.py."""
    backend.keep_freed_memory()
    backend.limit_blas_threads(settings.threads)
    device = backend.get_backend(settings.backend)
    xp = device.xp
    model = npbn_model(settings)
    model.to(device)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)

    def step(images: Array, labels: Array) -> Array:
        loss, cache = F.softmax_cross_entropy(model.forward(images), labels)
        model.backward(F.softmax_cross_entropy_backward(cache))
        optimizer.step()
        return loss

    def correct(images: Array, labels: Array) -> Array:
        return xp.count_nonzero(xp.argmax(model.forward(images), axis=1) == labels)

    generator = np.random.default_rng(settings.seed)
    split = Split(*random_pixels(settings)).to(device)

    def gather(indices: Array) -> tuple[Array, Array]:
        return next(split.batches(len(indices), "float32", order=indices))

    passes = batch_by_batch(
        *(device.asarray(array) for array in random_data(settings)),
        step=step,
        correct=correct,
        shuffle=lambda: device.asarray(generator.permutation(settings.images)),
        gather=gather,
        set_mode=lambda training: model.train() if training else model.eval(),
    )
    count = settings.threads
    threads = f" on {count} thread{'s' * (count > 1)}" if settings.backend == "numpy" else ""
    return Contestant(
        f"npbn {npbn.__version__}{threads}, {device.description}",
        settings.images,
        passes,
        device.synchronize,
    )


def engine_contestant(settings: Settings) -> Contestant:
    """Return the contestant that trains with npbn's fused engine, which takes pixels as bytes.

    An engine evaluates all of its test split. On the CPU, this contestant therefore builds one
    engine for each size of an evaluation batch; the engine for batches of 256 also trains. On a
    GPU, a single engine trains and evaluates all images in parts of a fixed size, so that the batch
    size of an evaluation task has no effect.
    """
    from npbn import engine

    backend.keep_freed_memory()
    backend.limit_blas_threads(settings.threads)
    device = backend.get_backend(settings.backend)
    model = npbn_model(settings)
    model.to(device)
    optimizer = optim.SGD(model.parameters(), LEARNING_RATE)
    images, labels = random_pixels(settings)
    train = Split(images, labels).to(device)
    generator = np.random.default_rng(settings.seed)
    whole = settings.backend == "cupy"

    def build(tested: int, batch_size: int) -> engine.Engine:
        return engine.build(
            *("fused", model, optimizer, train),
            Split(images[:tested], labels[:tested]).to(device),
            batch_size=batch_size,
            backend=device,
            threads=settings.threads,
        )

    size = settings.images if whole else min(EVALUATION_BATCH_SIZE, settings.images)
    trainer = build(size, settings.batch_size)

    @functools.cache
    def evaluator(tested: int) -> engine.Engine:
        """Return an engine for a test split of this size.

        If the function returns a new engine, this engine is used only for evaluation. Its training
        batch size is 1, to save memory.
        """
        return trainer if tested == size else build(tested, 1)

    def steps(order: np.ndarray) -> float:
        """Train on the images in this order; return the sum of the mean losses of the batches.

        One result of the engine may stand for several batches.
        """
        results = list(trainer.steps(order))
        # float waits for the device.
        losses = sum(float(result.loss) * result.examples for result in results)
        return losses / settings.batch_size

    def evaluate(examples: int, batch_size: int) -> float:
        if whole:
            parts = [settings.images]
        else:
            parts = [batch.stop - batch.start for batch in batches(examples, batch_size)]
        results = [result for part in parts for result in evaluator(part).evaluate()]
        return float(sum(int(result.correct) for result in results))

    def threading_layer() -> str | None:
        """Return Numba's threading layer, or None if no parallel kernel has run.

        Numba chooses the threading layer when the first parallel kernel runs.
        """
        if (numba := sys.modules.get("numba")) is None:
            return None
        try:
            return str(numba.threading_layer())
        except ValueError:
            return None

    description = trainer.description
    if whole:
        from npbn.engine.gpu import GpuEngine

        assert isinstance(trainer, GpuEngine)
        launches = len(trainer.programs[f"train{settings.batch_size}"].launches)
        description += f", {launches} kernel launches a step"
    return Contestant(
        f"npbn {npbn.__version__}, {description}, {device.description}",
        settings.images,
        {
            "train": lambda examples, _: steps(np.arange(examples)),
            "epoch": lambda examples, _: steps(generator.permutation(settings.images)[:examples]),
            "evaluate": evaluate,
        },
        threading_layer=threading_layer,
    )


def torch_contestant(settings: Settings) -> Contestant:
    """Return a contestant that trains with PyTorch.

    The worker's name selects the variant: eager, torch.compile, a CUDA graph of the training step,
    or eager with batch norm written by hand.
    """
    import torch
    from torch import nn

    from _pytorch import HandWrittenBatchNorm, lenet

    torch.set_num_threads(settings.threads)
    on_gpu = settings.backend == "cupy"
    if on_gpu and not torch.cuda.is_available():
        raise NpbnError("this PyTorch finds no GPU; pytorch.org says how to install one that does")
    device = torch.device("cuda" if on_gpu else "cpu")
    padding, *maps = NETWORKS[settings.model]
    norms: dict[str, Any] = {}
    if settings.worker == "by-hand":
        for name, num_dims in (("norm_of_maps", 4), ("norm_of_vectors", 2)):
            norms[name] = functools.partial(HandWrittenBatchNorm, num_dims=num_dims)
    model: Any = lenet(padding=padding, maps=(maps[0], maps[1]), **norms)
    # The model gets npbn's initial weights, so that its losses must agree with npbn's.
    weights = npbn_model(settings).parameters().values()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight.data).reshape(parameter.shape))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    criterion = nn.CrossEntropyLoss()
    if settings.worker.startswith("compile"):
        # Without dynamic shapes, PyTorch compiles the model for each shape separately. That gives
        # the fastest code.
        model = torch.compile(model, dynamic=False, mode="max-autotune" if on_gpu else None)

    def step(images: Array, labels: Array) -> Array:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def captured() -> Callable[[Array, Array], Array]:
        """Return the step as a CUDA graph, captured as PyTorch's manual describes."""
        model.train()
        batch_images, batch_labels = (
            torch.from_numpy(array[: settings.batch_size]).to(device)
            for array in random_data(settings)
        )
        before = copy.deepcopy(model.state_dict())
        cuda: Any = torch.cuda  # Some of its functions have no type annotations.
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(3):  # These steps warm up the GPU.
                step(batch_images, batch_labels)
        cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()  # So the graph allocates its own gradients.
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            loss = step(batch_images, batch_labels)
        model.load_state_dict(before)  # This copies into the arrays that the graph uses.

        def replay(images: Array, labels: Array) -> Array:
            batch_images.copy_(images)
            batch_labels.copy_(labels)
            graph.replay()
            return loss

        return replay

    def correct(images: Array, labels: Array) -> Array:
        with torch.inference_mode():
            return torch.count_nonzero(model(images).argmax(dim=1) == labels)

    pixels, all_labels = (torch.from_numpy(array).to(device) for array in random_pixels(settings))
    generator = torch.Generator(device).manual_seed(settings.seed)

    def gather(indices: Array) -> tuple[Array, Array]:
        return pixels.index_select(0, indices).float().div_(255), all_labels[indices]

    description = f"PyTorch {torch.__version__} ({torch.get_num_threads()} threads)"
    if on_gpu:
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        description += ", TF32 {} in convolutions, {} in matrix products, on {}".format(
            *("on" if allowed else "off" for allowed in tf32), torch.cuda.get_device_name()
        )
    else:
        description += f" on {backend.cpu_name()}"
    passes = batch_by_batch(
        *(torch.from_numpy(array).to(device) for array in random_data(settings)),
        step=captured() if settings.worker == "graph" else step,
        correct=correct,
        shuffle=lambda: torch.randperm(settings.images, generator=generator, device=device),
        gather=gather,
        set_mode=lambda training: model.train(training),
    )
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    return Contestant(description, settings.images, passes, synchronize)


def onnx_contestant(settings: Settings) -> Contestant:
    """Return the contestant that evaluates with ONNX Runtime, which does not train."""
    session, description = onnx_session(npbn_model(settings), settings.threads)
    images, labels = random_data(settings)

    def evaluate(examples: int, batch_size: int) -> int:
        found = 0
        for batch in batches(examples, batch_size):
            (classes,) = session.run(["classes"], {"images": images[batch]})
            found += int(np.count_nonzero(classes == labels[batch]))
        return found

    description += f" on {backend.cpu_name()}"
    return Contestant(description, settings.images, {"evaluate": evaluate})


def onnx_session(model: Sequential, threads: int) -> tuple[Any, str]:
    """Return a session of ONNX Runtime with the model in prediction mode, and its description."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        raise NpbnError(f"{error.name} is not installed: pip install onnx onnxruntime") from None
    from npbn.onnx_graph import onnx_graph

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(
        onnx_graph(model, IMAGE), options, providers=["CPUExecutionProvider"]
    )
    plural = "s" * (threads > 1)
    return session, (
        f"ONNX Runtime {onnxruntime.__version__} ({threads} thread{plural}), "
        f"onnx {onnx.__version__}"
    )


def jax_contestant(settings: Settings) -> Contestant:
    """Return the contestant that trains with JAX, with a whole step in one jax.jit."""
    # XLA reads its number of threads only from this variable, and only when XLA is loaded.
    os.environ.update(NPROC=str(settings.threads), JAX_PLATFORMS="cpu")
    try:
        import jax
    except ModuleNotFoundError as error:
        if error.name != "jax":
            raise
        raise NpbnError("JAX is not installed: pip install jax") from None
    from jax import lax
    from jax import numpy as jnp

    # Each block with batch norm has four parameters: weight, bias, gamma, beta. The last layer has
    # two parameters: weight, bias.
    initial = npbn_model(settings).parameters().values()
    weights = [jnp.asarray(parameter.data) for parameter in initial]
    moving = [(jnp.zeros_like(gamma), jnp.ones_like(gamma)) for gamma in weights[2::4]]
    padding, *_ = NETWORKS[settings.model]

    def forward(weights: Any, moving: Any, x: Array, training: bool) -> tuple[Array, Any]:
        """Return the logits, and the moving averages updated by this batch."""
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
            batch = (x.mean(axes, keepdims=True), x.var(axes, keepdims=True))
            mean, var = batch if training else averages
            after.append([0.9 * a + 0.1 * b for a, b in zip(averages, batch, strict=True)])
            x = jax.nn.sigmoid(gamma * (x - mean) / jnp.sqrt(var + 1e-5) + beta)
            if weight.ndim == 4:
                window = (1, 1, 2, 2)
                x = lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 4
        return x @ weights[-2].T + weights[-1], after

    def train(weights: Any, moving: Any, x: Array, labels: Array) -> tuple[Array, Any, Any]:
        def loss_of(weights: Any) -> tuple[Array, Any]:
            logits, after = forward(weights, moving, x, True)
            right = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -right.mean(), after

        (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        updated = [w - LEARNING_RATE * g for w, g in zip(weights, gradients, strict=True)]
        return loss, updated, after

    def count(weights: Any, moving: Any, x: Array, labels: Array) -> Array:
        return jnp.count_nonzero(forward(weights, moving, x, False)[0].argmax(axis=1) == labels)

    compiled_train, compiled_count = jax.jit(train, donate_argnums=(0, 1)), jax.jit(count)

    latest: Array = None  # the latest result, for which `synchronize` waits

    def step(images: Array, labels: Array) -> Array:
        nonlocal weights, moving, latest
        latest, weights, moving = compiled_train(weights, moving, images, labels)
        return latest

    def correct(images: Array, labels: Array) -> Array:
        nonlocal latest
        latest = compiled_count(weights, moving, images, labels)
        return latest

    generator = np.random.default_rng(settings.seed)
    pixels, all_labels = random_pixels(settings)
    passes = batch_by_batch(
        *random_data(settings),
        step=step,
        correct=correct,
        shuffle=lambda: generator.permutation(settings.images),
        gather=lambda indices: (pixels.take(indices, axis=0), all_labels[indices]),
    )
    return Contestant(
        f"JAX {jax.__version__} ({settings.threads} threads) on {backend.cpu_name()}",
        settings.images,
        passes,
        lambda: jax.block_until_ready(latest),
    )


def npbn_model(settings: Settings) -> Sequential:
    """Return the network that the settings name, with initial weights drawn from the seed.

    For lenet and blenet, the network and its weights are those of `npbn.models`.
    """
    generator = np.random.default_rng(settings.seed)
    padding, first, second = NETWORKS[settings.model]
    side = ((IMAGE[1] + 2 * padding - 4) // 2 - 4) // 2

    def conv(channels: int, maps: int, padding: int = 0) -> Conv2d:
        return Conv2d(channels, maps, 5, padding=padding, generator=generator)

    def linear(features: int, outputs: int) -> Linear:
        return Linear(features, outputs, generator=generator)

    return Sequential(
        *(conv(1, first, padding), BatchNorm(first, 4), Sigmoid(), AvgPool2d(2)),
        *(conv(first, second), BatchNorm(second, 4), Sigmoid(), AvgPool2d(2)),
        Flatten(),
        *(linear(second * side * side, 120), BatchNorm(120, 2), Sigmoid()),
        *(linear(120, 84), BatchNorm(84, 2), Sigmoid()),
        linear(84, 10),
    )


def random_pixels(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return random images as bytes, and random labels."""
    generator = np.random.default_rng(settings.seed)
    images = generator.integers(256, size=(settings.images, *IMAGE), dtype=np.uint8)
    return images, generator.integers(10, size=settings.images)


def random_data(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of `random_pixels` as float32, divided by 255, and their labels."""
    images, labels = random_pixels(settings)
    return images / np.float32(255), labels


def prepared(settings: Settings) -> Contestant:
    """Return the contestant of this worker after its first training step.

    A contestant that does not train has evaluated one batch instead.
    """
    prepare = {
        "layers": layers_contestant,
        "engine": engine_contestant,
        "onnx": onnx_contestant,
        "jax": jax_contestant,
    }
    try:
        contestant = prepare.get(settings.worker, torch_contestant)(settings)
        first = contestant.passes.get("train", contestant.passes["evaluate"])
        first(settings.batch_size, settings.batch_size)
        contestant.synchronize()
    except Exception as error:  # The first line of torch.compile's long messages is enough.
        raise NpbnError((str(error) or type(error).__name__).splitlines()[0]) from error
    return contestant


def measure(contestant: Contestant, task: str, batch_size: int) -> dict[str, float]:
    """Process the images once; return the speed in examples/s and the sum of the results.

    In training, a last batch that would be smaller than the others is left out.
    """
    run = contestant.passes[task.removesuffix(" at once")]
    images = contestant.images
    if task in ("train", "epoch"):
        images -= images % batch_size  # Only whole batches are measured.
    # This batch is not measured: the CPU's caches still hold another contestant's data.
    run(batch_size, batch_size)
    contestant.synchronize()
    started = time.perf_counter()
    result = run(images, batch_size)
    contestant.synchronize()
    seconds = time.perf_counter() - started
    return {"examples_per_second": images / seconds, "sum": float(result)}


def serve(settings: Settings) -> None:
    """Print a description of the contestant, then answer requests until there are no more.

    The description, each request and each answer are one line of JSON.
    """
    sys.stdout = sys.stderr  # So the output of libraries is not mixed with the answers.
    contestant = prepared(settings)
    introduction = {
        "description": contestant.description,
        "tasks": contestant.tasks,
        "threading_layer": contestant.threading_layer(),
    }

    def answer(task: str, batch_size: int = 0) -> dict[str, float]:
        if task == "peak memory":
            return {"bytes": peak_resident_bytes()}
        return measure(contestant, task, batch_size)

    answer_requests(introduction, answer)


def serve_peaks(settings: Settings) -> None:
    """Answer each request with the CPU's operations per second, by way of measuring them."""
    from _cpu_rates import Peaks

    peaks = Peaks()
    answer_requests({}, lambda threads: peaks.measure(threads))


def answer_requests(introduction: object, answer: Callable[..., object]) -> None:
    print(json.dumps(introduction), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=sys.__stdout__, flush=True)


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process and of the processes that it has started.

    The result is the sum over the processes, so that shared pages count several times.
    """
    import psutil

    found = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        if sys.platform == "linux":
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = re.search(r"VmHWM:\s+(\d+) kB", status)  # A process that has ended has no peak.
            found += int(peak[1]) * 1024 if peak else 0
        else:
            memory = process.memory_info()
            found += getattr(
                memory, "peak_wset", memory.rss
            )  # On macOS, only the current size is known.
    return found
