"""Measure what takes too long for a lesson, and store the results.

Each function of this file trains for minutes on Fashion-MNIST and returns its results. The folder
``curves`` stores these results, in a file with the name of the function. The file also has the
machine, the date, the versions and the duration in minutes. (The machine was busy with other
programs.) A lesson reads this file. With ``--regenerate``, the lesson first measures again. On
another machine, rounding differs, and training with a high learning rate magnifies the difference.
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
    """Return the stored results of a function. With --regenerate, measure and store them first."""
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
    """Train network A for two epochs with several learning rates.

    This is done with and without batch norm, and with sigmoid and ReLU.
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

    This is done with and without batch norm. The learning rate is 0.2 for batches of 256. It is
    proportional to the batch size, so that an example has the same weight for all sizes.
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

    Some epochs are evaluated with several kinds of statistics.
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
        networks: functions by name. Each returns a PyTorch model with the weights of an npbn model.
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
    """Return a training of network A before its first step, with the settings of train.py."""
    model = LeNet(generator=np.random.default_rng(seed), **options)
    optimizer, device = SGD(model.parameters(), lr), backend.get_backend("numpy")
    what = model, optimizer, dataset.train, dataset.test
    engine = LayersEngine(*what, batch_size=batch_size, backend=device)
    return Training(*what, engine=engine, batch_size=batch_size, seed=seed, backend=device)


def steps(run: Training, examples: int, epoch: int) -> list[float]:
    """Train on the first examples of an epoch, and return the loss of every step."""
    order = np.random.default_rng((run.seed, epoch)).permutation(len(run.train))[:examples]
    with np.errstate(all="ignore"):  # a loss that becomes infinite is also a result
        return [float(result.loss) for result in run.engine.steps(order)]


def in_parts(losses: list[float], count: int) -> list[float]:
    """Divide the losses of a training run into parts, and return the mean loss of each part."""
    return [float(np.mean(part)) for part in np.array_split(losses, count)]


def accuracy_with_batch_statistics(
    model: Sequential, split: data.Split, batch_size: int = 256
) -> float:
    """Return the test accuracy with the statistics of the test batches.

    A prediction should not use these statistics.
    """
    correct = 0
    with inspection.batch_norm_momentum(model, 1.0):  # the moving averages stay as they are
        for x, labels in split.batches(batch_size, "float32"):
            correct += int(np.sum(np.argmax(model.forward(x), axis=1) == labels))
    return correct / len(split)


def _precise(run: Training) -> float:
    """Return the test accuracy with statistics of the training split for the current weights."""
    model = copy.deepcopy(run.model)
    inspection.precise_statistics(model, run.train)
    return evaluate(model, run.test).accuracy


def _standing_still(run: Training) -> dict[str, float]:
    """Return the test accuracies after up to 40 batches that change only the moving averages."""
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
    backend.limit_blas_threads(1)  # so that the file does not depend on how many cores there are
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
    """Return a number rounded to four digits, or None if the number is not finite."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
