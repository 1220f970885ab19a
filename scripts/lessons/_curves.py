"""Measure what takes too long for a lesson, and store the results.

The functions `learning_rates`, `batch_sizes`, `ten_epochs` and `ten_epochs_of_pytorch` train for
minutes on Fashion-MNIST and return results. The folder ``curves`` has one file with the name of
each function. The file contains the results, the machine, the date, the versions and the duration
in minutes. (The machine was busy with other programs during the measurement.) A lesson reads the
results from the file. With the option ``--regenerate``, a lesson first measures the results again
and stores the new results. On another machine, rounding differs, and training with a high learning
rate magnifies the difference.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _lesson import Lesson
from npbn import backend, data, inspection
from npbn.checkpoint import write_file
from npbn.engine.layers import LayersEngine
from npbn.errors import NpbnError
from npbn.layers import ReLU, Sequential, Sigmoid
from npbn.models import LeNet
from npbn.optim import SGD
from npbn.training import Epoch, Training, evaluate

FOLDER = Path(__file__).parent / "curves"

LEARNING_RATES = (0.05, 0.2, 1.0, 5.0)
BATCH_SIZES = (1, 2, 4, 8, 32, 256)
SEEDS = (0, 1, 2)
EPOCHS = 10


def curves(lesson: Lesson, measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return the stored results of the function `measure`.

    If the `lesson` has the option --regenerate, call `measure` with the `arguments` and store the
    results first.
    """
    path = FOLDER / f"{measure.__name__}.json"
    if lesson.regenerate:
        try:
            _write(path, measure, arguments)
        except NpbnError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            sys.exit(2)
    kept = json.loads(path.read_text(encoding="utf-8"))
    made = kept["made"]
    print(f"{path.name}: {made['date']}, {made['on']}, {made['minutes']} min")
    return kept["found"]


def learning_rates() -> list[dict[str, Any]]:
    """Train network A for two epochs with each of several learning rates.

    The function trains with and without batch norm, and with sigmoid and ReLU.
    """
    dataset, found = data.load("fashion-mnist"), []
    for activation in (Sigmoid, ReLU):
        for batch_norm in (True, False):
            for lr in LEARNING_RATES:
                run = new_run(dataset, lr, batch_norm=batch_norm, activation=activation)
                losses, accuracies = [], []
                for epoch in range(2):
                    losses += steps(run, len(dataset.train), epoch)
                    metrics = evaluate(run.model, run.test)
                    accuracies.append(metrics.accuracy)
                found.append(
                    {
                        "activation": activation.__name__,
                        "batch_norm": batch_norm,
                        "lr": lr,
                        "loss": in_parts(losses, 20),
                        "test_accuracy": accuracies,
                    }
                )
    return found


def batch_sizes() -> list[dict[str, Any]]:
    """Train network A with ReLU on 12,800 examples, in batches of several sizes.

    The function trains with and without batch norm. The learning rate is 0.2 for batches of 256.
    The learning rate is proportional to the batch size, so that an example has the same weight for
    all batch sizes.
    """
    dataset, found = data.load("fashion-mnist"), []
    for batch_norm in (True, False):
        for size in BATCH_SIZES:
            run = new_run(dataset, 0.2 * size / 256, size, batch_norm=batch_norm, activation=ReLU)
            found.append(
                {
                    "batch_norm": batch_norm,
                    "batch_size": size,
                    "loss": in_parts(steps(run, 12_800, 0), 10),
                    "test_accuracy": evaluate(run.model, run.test).accuracy,
                }
            )
    return found


def ten_epochs() -> list[dict[str, Any]]:
    """Train as train.py does, with the seeds 0 to 2.

    After each epoch, the function evaluates the network with several kinds of statistics.
    """
    dataset, found = data.load("fashion-mnist"), []
    for seed in SEEDS:
        run = new_run(dataset, 1.0, seed=seed)
        epochs: list[dict[str, Any]] = []

        def note(epoch: Epoch, run: Training = run, epochs: list[Any] = epochs) -> None:
            assert epoch.test is not None
            norms = inspection.batch_norms(run.model)[:2]
            epochs.append(
                {
                    "loss": epoch.train.loss,
                    "train_accuracy": epoch.train.accuracy,
                    "moving": epoch.test.accuracy,
                    "batch": accuracy_with_batch_statistics(run.model, run.test),
                    "precise": _precise(run),
                    "standing_still": _standing_still(run),
                    "gamma": [norm.gamma.data.ravel().tolist() for norm in norms],
                    "beta": [norm.beta.data.ravel().tolist() for norm in norms],
                }
            )

        run.run(EPOCHS, on_epoch=note)
        found.append({"seed": seed, "epochs": epochs})
    return found


def ten_epochs_of_pytorch(networks: dict[str, Callable[[LeNet], Any]]) -> list[dict[str, Any]]:
    """Train in PyTorch with the initial weights of npbn, and on the same batches.

    Args:
        networks: a dict of functions by name. Each function takes an npbn model and returns a
            PyTorch model with the weights of the npbn model.
    """
    import torch

    torch.set_num_threads(1)
    dataset, found = data.load("fashion-mnist"), []
    for name, make in networks.items():
        for seed in SEEDS:
            network = make(LeNet(generator=np.random.default_rng(seed)))
            optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
            epochs = []
            for epoch in range(EPOCHS):
                order = np.random.default_rng((seed, epoch)).permutation(len(dataset.train))
                loss_sum, train_correct, test_correct = 0.0, 0, 0
                network.train()
                for x, labels in _tensors(dataset.train, order):
                    logits = network(x)
                    loss = torch.nn.functional.cross_entropy(logits, labels)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    loss_sum += loss.item() * len(labels)
                    train_correct += int((logits.argmax(1) == labels).sum())
                network.eval()
                with torch.no_grad():
                    for x, labels in _tensors(dataset.test, np.arange(len(dataset.test))):
                        test_correct += int((network(x).argmax(1) == labels).sum())
                epochs.append(
                    {
                        "loss": loss_sum / len(dataset.train),
                        "train_accuracy": train_correct / len(dataset.train),
                        "moving": test_correct / len(dataset.test),
                    }
                )
            found.append({"network": name, "seed": seed, "epochs": epochs})
    return found


def new_run(
    dataset: data.Dataset, lr: float, batch_size: int = 256, *, seed: int = 0, **options: Any
) -> Training:
    """Return a training of network A on `dataset` before the first step.

    The training has the learning rate `lr`, batches of `batch_size` examples, and the random seed
    `seed`. The `options` are arguments of LeNet. All other settings are the settings of train.py.
    """
    model = LeNet(generator=np.random.default_rng(seed), **options)
    optimizer, device = SGD(model.parameters(), lr), backend.get_backend("numpy")
    what = model, optimizer, dataset.train, dataset.test
    engine = LayersEngine(*what, batch_size=batch_size, backend=device)
    return Training(*what, engine=engine, batch_size=batch_size, seed=seed, backend=device)


def steps(run: Training, examples: int, epoch: int) -> list[float]:
    """Train `run` on the first `examples` examples of `epoch`, and return the loss of each step."""
    order = np.random.default_rng((run.seed, epoch)).permutation(len(run.train))[:examples]
    with np.errstate(all="ignore"):  # an infinite loss is also a result
        return [float(result.loss) for result in run.engine.steps(order)]


def in_parts(losses: list[float], count: int) -> list[float]:
    """Divide the `losses` of a run into `count` parts, and return the mean loss of each part."""
    return [float(np.mean(part)) for part in np.array_split(losses, count)]


def accuracy_with_batch_statistics(
    model: Sequential, split: data.Split, batch_size: int = 256
) -> float:
    """Return the accuracy of `model` on `split`, with the statistics of each batch of `split`.

    A batch has `batch_size` examples. A prediction should not use the statistics of the batch.
    """
    correct = 0
    with inspection.batch_norm_momentum(model, 1.0):  # the moving averages do not change
        for x, labels in split.batches(batch_size, "float32"):
            correct += int(np.sum(np.argmax(model.forward(x), axis=1) == labels))
    return correct / len(split)


def _precise(run: Training) -> float:
    """Return the test accuracy of `run` with precise statistics.

    Precise statistics are statistics of the whole training split for the current weights.
    """
    model = copy.deepcopy(run.model)
    inspection.precise_statistics(model, run.train)
    return evaluate(model, run.test).accuracy


def _standing_still(run: Training) -> dict[str, float]:
    """Return test accuracies of `run` after 1 to 40 batches that change only moving averages."""
    model = copy.deepcopy(run.model)
    model.train()
    found = {}
    order = np.arange(256 * 40) % len(run.train)
    for count, (x, _) in enumerate(run.train.batches(256, "float32", order=order), 1):
        model.forward(x)
        if count in (1, 2, 5, 10, 20, 40):
            found[str(count)] = evaluate(model, run.test).accuracy
    return found


def _tensors(split: data.Split, order: np.ndarray) -> Iterator[tuple[Any, Any]]:
    import torch

    for x, labels in split.batches(256, "float32", order=order):
        yield torch.from_numpy(x), torch.from_numpy(labels)


def _write(path: Path, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    backend.keep_freed_memory()
    backend.limit_blas_threads(1)  # the results must not depend on the number of cores
    started = time.perf_counter()
    found = _rounded(measure(*arguments))
    versions = f"Python {platform.python_version()}, {backend.get_backend('numpy').description}"
    if arguments:
        import torch

        versions += f", PyTorch {torch.__version__}"
    made = {
        "by": f"{measure.__name__} in scripts/lessons/_curves.py",
        "date": datetime.date.today().isoformat(),
        "on": f"{versions}, {os.cpu_count()} cores",
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    text = json.dumps({"made": made, "found": found}, indent=1, allow_nan=False)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    write_file(path, (text + "\n").encode())


def _rounded(value: Any) -> Any:
    """Return `value` with each number rounded to four digits.

    The function replaces each number that is not finite by None.
    """
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
