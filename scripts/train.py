"""Train LeNet with batch norm on Fashion-MNIST, every gradient computed by hand-written code."""

from __future__ import annotations

import time

from _command_line import ArgumentParser, check_installation, integer, number, run, say

STARTED = time.perf_counter()  # before the other imports: they are part of the wait
check_installation()

import argparse
import copy
import platform
import sys

import numpy as np
from tqdm import tqdm

import npbn
from npbn import backend, data, models, optim, training, verify
from npbn.errors import NpbnError
from npbn.layers import BatchNorm, Sequential

EPILOG = """\
examples:
  python scripts/train.py                                the published setting, on what is there
  python scripts/train.py --backend cupy                 on a GPU
  python scripts/train.py --model blenet --epochs 3
  python scripts/train.py --no-batch-norm --lr 0.5       what it is like without
  python scripts/train.py --schedule cosine --momentum 0.9 --lr 0.1

exit codes: 0 trained, 1 nobody reads the output any more, 2 bad input, something missing on this
machine or an output that cannot be written, 130 interrupted
"""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="train.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"npbn {npbn.__version__}")

    where = parser.add_argument_group("where to compute")
    where.add_argument(
        "--backend",
        choices=backend.NAMES,
        default="auto",
        help="array library: numpy (CPU), cupy (NVIDIA GPU), or auto, a GPU if there is a usable "
        "one (default: auto)",
    )
    where.add_argument(
        "--threads",
        type=integer(1),
        metavar="N",
        help="that the CPU's matrix products compute with; 1 is fastest beside other busy programs "
        "(default: the BLAS library's own choice)",
    )
    where.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="(default: float32)"
    )

    what = parser.add_argument_group("data")
    what.add_argument(
        "--dataset",
        choices=data.DATASETS,
        default="auto",
        help="fashion-mnist, downloaded if need be; digits, scikit-learn's handwritten ones; or "
        "auto, Fashion-MNIST if it can be had, else digits (default: auto)",
    )
    what.add_argument(
        "--data",
        metavar="DIR",
        help="directory with Fashion-MNIST's four IDX files, gzipped or not, or with torchvision's "
        "FashionMNIST/raw; no other place is tried then (default: $NPBN_DATA, else the system's "
        "and the user's data directories, else a download)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=("lenet", "blenet"),
        default="lenet",
        help="lenet, network A; or blenet, network B, with a padded first convolution "
        "(default: lenet)",
    )
    model.add_argument("--no-batch-norm", action="store_true", help="leave batch norm out")

    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=integer(1), default=10, metavar="N", help="(default: 10)")
    how.add_argument(
        "--batch-size", type=integer(1), default=256, metavar="N", help="(default: 256)"
    )
    positive = number("a number > 0", lambda value: value > 0)
    fraction = number("a number in [0, 1)", lambda value: 0 <= value < 1)
    how.add_argument(
        "--lr", type=positive, default=1.0, metavar="X", help="learning rate (default: 1.0)"
    )
    how.add_argument(
        "--schedule",
        choices=("constant", "step", "cosine"),
        default="constant",
        help="how the learning rate goes on: constant; step, multiplied by --lr-factor every "
        "--lr-epochs epochs; cosine, down to 0 at the end (default: constant)",
    )
    how.add_argument(
        "--lr-epochs", type=integer(1), metavar="N", help="with --schedule step (default: 3)"
    )
    how.add_argument(
        "--lr-factor", type=positive, metavar="X", help="with --schedule step (default: 0.1)"
    )
    how.add_argument(
        "--momentum", type=fraction, default=0.0, metavar="X", help="of SGD (default: 0)"
    )
    how.add_argument(
        "--weight-decay",
        type=number("a number >= 0", lambda value: value >= 0),
        default=0.0,
        metavar="X",
        help="on weights, not on biases, gamma and beta (default: 0)",
    )
    how.add_argument(
        "--check-gradients",
        action="store_true",
        help="first compare every gradient with the complex step, on one batch, in float64",
    )
    how.add_argument(
        "--seed",
        type=integer(0),
        default=0,
        metavar="N",
        help="of initial weights and shuffling; on one machine, backend and number of "
        "BLAS threads, two runs of a seed are equal to the last bit (default: 0)",
    )
    arguments = parser.parse_args()
    if arguments.dataset == "digits" and arguments.data is not None:
        parser.error("argument --data: not allowed with --dataset digits, which needs no files")
    for option, default in (("lr_epochs", 3), ("lr_factor", 0.1)):
        if getattr(arguments, option) is None:
            setattr(arguments, option, default)
        elif arguments.schedule != "step":
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: not allowed without --schedule step")
    return arguments


def build_model(
    arguments: argparse.Namespace, dataset: data.Dataset, generator: np.random.Generator
) -> Sequential:
    batch_norm = not arguments.no_batch_norm
    if arguments.model == "lenet":
        return models.LeNet(batch_norm=batch_norm, generator=generator)
    _, channels, side, _ = dataset.train.images.shape
    return models.BLeNet(
        channels, side, len(dataset.classes), batch_norm=batch_norm, generator=generator
    )


def build_schedule(arguments: argparse.Namespace, steps_per_epoch: int) -> optim.Schedule:
    if arguments.schedule == "step":
        every = arguments.lr_epochs * steps_per_epoch
        return optim.StepDecay(arguments.lr, every, arguments.lr_factor)
    if arguments.schedule == "cosine":
        return optim.Cosine(arguments.lr, arguments.epochs * steps_per_epoch)
    return optim.Constant(arguments.lr)


def main() -> None:
    arguments = parse_arguments()
    generator = np.random.default_rng(arguments.seed)
    backend.keep_freed_memory()
    if arguments.threads is not None:
        backend.limit_blas_threads(arguments.threads)

    device = backend.get_backend(arguments.backend)
    say(f"npbn {npbn.__version__}, Python {platform.python_version()}, {device.description}")
    if device.note:
        say(f"on the CPU, because: {device.note}")

    dataset = data.load(arguments.dataset, arguments.data, on_download=say)
    for note in dataset.notes:
        say(f"note: {note}")
    train, test = dataset.train.to(device), dataset.test.to(device)
    say(
        f"data: {dataset.name} from {dataset.source}, "
        f"{len(train):,} training and {len(test):,} test images"
    )

    model = build_model(arguments, dataset, generator)
    model.to(device, arguments.dtype)
    count = sum(parameter.data.size for parameter in model.parameters().values())
    with_or_without = "without" if arguments.no_batch_norm else "with"
    say(
        f"model: {type(model).__name__} {with_or_without} batch norm, {count:,} parameters, "
        f"{arguments.dtype}"
    )

    optimizer = optim.SGD(
        model.parameters(),
        build_schedule(arguments, training.steps_per_epoch(len(train), arguments.batch_size)),
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
    )
    say(
        f"training: {arguments.epochs} epoch{'s' * (arguments.epochs > 1)}, "
        f"batches of {arguments.batch_size}, SGD with {arguments.schedule} learning rate "
        f"{arguments.lr}, momentum {arguments.momentum:g}, weight decay "
        f"{arguments.weight_decay:g}, seed {arguments.seed}"
    )
    if arguments.batch_size == 1 and not arguments.no_batch_norm:
        say(
            "note: over a batch of one, batch norm after a linear layer is constant: "
            "little is learned"
        )
    if arguments.check_gradients:
        check_gradients(model, train, device, arguments)
    say("")
    say("epoch    loss  train acc  test acc  examples/s")

    bar = tqdm(
        total=len(train),
        unit=" examples",
        unit_scale=True,
        leave=False,
        disable=sys.stderr is None or not sys.stderr.isatty(),
    )

    def on_epoch(epoch: training.Epoch) -> None:
        bar.clear()
        say(
            f"{epoch.number:5d}  {epoch.train.loss:6.4f}  {epoch.train.accuracy:9.4f}  "
            f"{epoch.test.accuracy:8.4f}  {epoch.train.examples / epoch.train.seconds:10,.0f}"
        )
        if epoch.skipped and epoch.number == 1:
            say("       (one example an epoch is left out: as a batch it has no variance)")
        if epoch.number < arguments.epochs:
            bar.reset()
            bar.set_description(f"epoch {epoch.number + 1}")

    bar.set_description("epoch 1")
    try:
        history = training.fit(
            model,
            optimizer,
            train,
            test,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            generator=generator,
            backend=device,
            dtype=arguments.dtype,
            on_batch=bar.update,
            on_epoch=on_epoch,
        )
    finally:
        bar.close()

    seconds = sum(epoch.train.seconds for epoch in history)
    examples = sum(epoch.train.examples for epoch in history)
    say("")
    say(
        f"{examples / seconds:,.0f} examples/s in training on {device.name}: {seconds:.1f} s of "
        f"training, {time.perf_counter() - STARTED:.1f} s in all"
    )
    first = next((layer for layer in model.layers if isinstance(layer, BatchNorm)), None)
    if first is not None:
        for parameter in (first.gamma, first.beta):
            values = " ".join(f"{v:.3f}" for v in backend.to_numpy(parameter.data).ravel())
            say(f"{parameter.name} of the first batch norm: {values}")


def check_gradients(
    model: Sequential, train: data.Split, device: backend.Backend, arguments: argparse.Namespace
) -> None:
    """Print a table for one batch of the data; end the program if a gradient is wrong."""
    copied = copy.deepcopy(model)
    copied.to(device, "float64")
    x, labels = next(train.batches(arguments.batch_size, "float64"))
    report = verify.check_model(copied, x, labels)
    say("")
    say(f"gradients on a batch of {len(labels)}, float64, by the complex step:")
    say("parameter     relative error  verdict")
    for finding in report.findings:
        say(f"{finding.name:12}  {finding.error:14.1e}  {finding.verdict}")
    if not report.ok:
        raise NpbnError("a gradient is wrong, see above; nothing was trained")


if __name__ == "__main__":
    run("train.py", main)
