"""Train LeNet with batch norm on Fashion-MNIST, every gradient computed by hand-written code."""

from __future__ import annotations

import time

from _command_line import ArgumentParser, CtrlC, check_installation, integer, number, run, say

STARTED = time.perf_counter()  # before the other imports: they are part of the wait
check_installation()

import argparse
import copy
import dataclasses
import datetime
import math
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import npbn
from _experiment import ACTIVATIONS, build_training, load_data, load_model, load_training
from _pictures import draw_run
from npbn import backend, data, engine, inspection, plots, training, verify
from npbn.engine.layers import LayersEngine
from npbn.errors import CheckpointError, NonFiniteError, NpbnError, UnsupportedError
from npbn.runs import Run

EPILOG = """\
examples:
  python scripts/train.py                                the published setting, on what is there
  python scripts/train.py --backend cupy                 on a GPU
  python scripts/train.py --model blenet --epochs 3
  python scripts/train.py --no-batch-norm --lr 0.5       what it is like without
  python scripts/train.py --schedule cosine --momentum 0.9 --lr 0.1
  python scripts/train.py --run runs/first               a folder to find again
  python scripts/train.py --resume runs/first            after Ctrl-C, or a power cut

exit codes: 0 trained, 1 nobody reads the output any more, 2 bad input, something missing on this
machine, an output that cannot be written, or a loss that became NaN, 130 interrupted
"""

# On what a run that goes on may differ from the one that was interrupted.
FREE_WITH_RESUME = ("resume", "data", "backend", "threads", "plots")
NOT_CONFIGURATION = ("resume", "run", "overwrite", "check_gradients", "plots")


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
        "--engine",
        choices=engine.KINDS,
        default="auto",
        help="layers, the textbook; fused, the same mathematics planned into fused stages; or "
        "auto, fused on the CPU if it can train this model, else layers (default: auto)",
    )
    where.add_argument(
        "--threads",
        type=integer(1),
        metavar="N",
        help="CPU threads, of the fused engine or of the BLAS library for layers; use 1 on a busy "
        "machine (default: every CPU that this process may use)",
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
    what.add_argument(
        "--limit-train",
        type=integer(2),
        metavar="N",
        help="train on the first N examples alone",
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
    model.add_argument(
        "--activation", choices=tuple(ACTIVATIONS), default="sigmoid", help="(default: sigmoid)"
    )

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
    share = number("a number in (0, 1]", lambda value: 0 < value <= 1)
    how.add_argument(
        "--lr-factor", type=share, metavar="X", help="with --schedule step (default: 0.1)"
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
        "--max-steps", type=integer(1), metavar="N", help="stop after N steps of the optimizer"
    )
    how.add_argument(
        "--target-accuracy",
        type=share,
        metavar="X",
        help="stop when the test accuracy is at least X",
    )
    how.add_argument(
        "--eval-every",
        type=integer(1),
        default=1,
        metavar="N",
        help="epochs from one evaluation to the next (default: 1)",
    )
    how.add_argument(
        "--precise-bn",
        action="store_true",
        help="before each evaluation, recompute batch norm's statistics over the training set "
        "instead of the moving averages",
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
        help="of initial weights and shuffling; on one machine and backend, two runs of a seed are "
        "equal to the last bit, by layers with one number of threads (default: 0)",
    )

    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--run",
        metavar="DIR",
        help="new folder for configuration, metrics and checkpoints (default: runs/DATE-TIME)",
    )
    kept.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    kept.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in this folder, with its own options, from its last checkpoint: "
        "it ends as if it had never been interrupted",
    )
    kept.add_argument(
        "--plots", action="store_true", help="draw the run at the end, as plot_run.py does"
    )

    arguments = parser.parse_args()
    if arguments.dataset == "digits" and arguments.data is not None:
        parser.error("argument --data: not allowed with --dataset digits, which needs no files")
    if arguments.schedule == "step":
        arguments.lr_epochs = arguments.lr_epochs or 3
        arguments.lr_factor = arguments.lr_factor or 0.1
    for option in ("lr_epochs", "lr_factor"):
        if arguments.schedule != "step" and getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: not allowed without --schedule step")
    if arguments.overwrite and arguments.run is None:
        parser.error("argument --overwrite: not allowed without --run, which names what to replace")
    if arguments.resume is not None:
        # Once more, without the defaults, to see what was given.
        nothing = argparse.Namespace(**dict.fromkeys(vars(arguments)))
        for option, value in vars(parser.parse_args(namespace=nothing)).items():
            if option not in FREE_WITH_RESUME and value is not None:
                name = option.replace("_", "-")
                parser.error(f"argument --{name}: not allowed with --resume: the run has its own")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    backend.keep_freed_memory()
    if arguments.plots:
        plots.check_matplotlib()
    session = start(arguments) if arguments.resume is None else resume(arguments)
    train(session)
    if arguments.plots:
        model, _ = load_model(session.run, None)
        draw_run(session.run, model, session.dataset, session.run.path / "plots")


@dataclasses.dataclass
class Session:
    """What a new run and one that goes on have in common."""

    run: Run
    state: training.Training
    dataset: data.Dataset
    device: backend.Backend
    resumed: bool

    def describe(self) -> None:
        """The lines above the table."""
        config, dataset, model = self.run.config, self.dataset, self.state.model
        say(
            f"data: {dataset.name} from {dataset.source}, "
            f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
        )
        count = sum(parameter.data.size for parameter in model.parameters().values())
        say(
            f"model: {type(model).__name__} {'without' if config['no_batch_norm'] else 'with'} "
            f"batch norm, {count:,} parameters, {config['dtype']}"
            f", {self.state.engine.description}"
        )
        say(
            f"training: {config['epochs']} epoch{'s' * (config['epochs'] > 1)}, "
            f"batches of {config['batch_size']}, SGD with {config['schedule']} learning rate "
            f"{config['lr']}, momentum {config['momentum']:g}, weight decay "
            f"{config['weight_decay']:g}, seed {config['seed']}"
        )
        if config["batch_size"] == 1 and not config["no_batch_norm"]:
            say(
                "note: over a batch of one, batch norm after a linear layer is constant: "
                "little is learned"
            )

    def record(self, epoch: training.Epoch | None) -> dict[str, Any]:
        """A line of the metrics; None stands for the time before the first epoch."""
        model, split = self.state.model, self.state.train
        if epoch is None:
            found: dict[str, Any] = {"number": 0, "step": 0, "train": None, "test": None}
        else:
            found = dataclasses.asdict(epoch)
        found["batch_norm"] = [
            {
                name: backend.to_numpy(p.data).ravel().tolist()
                for name, p in norm.parameters().items()
            }
            for norm in inspection.batch_norms(model)
        ]
        x, _ = next(split.batches(256, self.run.config["dtype"]))
        found["preactivations"] = inspection.histograms(model, x)
        return found

    def save(self, epoch: training.Epoch | None = None, *, best: bool = False) -> None:
        """After an epoch, or in the middle of one."""
        arrays, record = self.state.state()  # first, for it refuses a state that is not finite
        if epoch is not None:
            self.run.append(self.record(epoch))
        self.run.save(arrays, record, best=best)


def start(arguments: argparse.Namespace) -> Session:
    """A new run."""
    config = {
        name: value for name, value in vars(arguments).items() if name not in NOT_CONFIGURATION
    }
    now = datetime.datetime.now()
    default = now.strftime("runs/%Y-%m-%d-%H.%M.%S")
    path = Path(default if arguments.run is None else arguments.run)
    Run.check_name(path, overwrite=arguments.overwrite)  # before anything that takes long
    device = open_device(arguments.backend, arguments.threads)
    dataset = load_data(config, on_download=say)
    for note in dataset.notes:
        say(f"note: {note}")
    _, channels, side, _ = dataset.train.images.shape
    config |= {
        "backend": device.name,
        "dataset": dataset.key,
        "data": None if arguments.data is None else str(Path(arguments.data).resolve()),
        # What a model needs to predict without the data set.
        "classes": list(dataset.classes),
        "channels": channels,
        "side": side,
    }
    with device.explaining_failures():
        try:
            state = build_training(config, dataset, device)
        except UnsupportedError as error:
            raise NpbnError(f"--engine fused: {error}; --engine layers can do it") from None
    # Which it was, so that the rest of the run is computed likewise.
    config["engine"] = "layers" if isinstance(state.engine, LayersEngine) else "fused"
    session = Session(Run(path, config), state, dataset, device, resumed=False)
    session.describe()
    if arguments.check_gradients:
        check_gradients(session)
    environment = describe_environment(device) | {
        "command": shlex.join(sys.argv),
        "started": now.isoformat(timespec="seconds"),
    }
    with device.explaining_failures():
        session.run = Run.create(
            path,
            config,
            environment,
            (session.record(None), *session.state.state()),
            overwrite=arguments.overwrite,
        )
    say(f"run: {path}")
    return session


def resume(arguments: argparse.Namespace) -> Session:
    """A run that goes on."""
    run = Run.open(arguments.resume)
    config, there = run.config, run.environment()
    run.load()  # which vouches for the configuration, too, before anything is done with it
    if arguments.data is not None and config["dataset"] == "digits":
        raise NpbnError("--data: not allowed with this run of the digits, which need no files")
    try:
        name = config["backend"] if arguments.backend == "auto" else arguments.backend
        changes: dict[str, Any] = {"threads": arguments.threads or config["threads"]}
        device = open_device(name, changes["threads"])
        options = {"data": arguments.data} if arguments.data else {}
        dataset = load_data(config | options, on_download=say)
        if device.name == "cupy" != config["backend"]:
            changes["engine"] = "layers"
        with device.explaining_failures():
            state, record = load_training(run, dataset, device, **changes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.path / 'config.json'} is of another version of npbn: {error}"
        ) from None
    session = Session(run, state, dataset, device, resumed=True)
    session.describe()
    run.rewind(record)
    for name, value in describe_environment(device).items():
        if there.get(name) != value:
            say(
                f"note: {name} was {there.get(name)} when this run began and is {value} now: "
                "the last bits may differ"
            )
    say(f"run: {run.path}, going on after epoch {state.epoch}, batch {state.batch}")
    return session


def open_device(name: str, threads: int | None) -> backend.Backend:
    """The backend; without a number of threads, every CPU that this process may use computes."""
    usable = backend.usable_cpus()
    backend.limit_blas_threads(threads or min(usable, backend.blas_threads() or usable))
    device = backend.get_backend(name)
    say(f"npbn {npbn.__version__}, Python {platform.python_version()}, {device.description}")
    if device.note:
        say(f"on the CPU, because: {device.note}")
    return device


def describe_environment(device: backend.Backend) -> dict[str, str | None]:
    """What the last bits of a result depend on."""
    return {
        "npbn": npbn.__version__,
        "commit": commit(),
        "Python": platform.python_version(),
        "device": device.description,
        "platform": platform.platform(),
    }


def commit() -> str | None:
    """Of the checkout that npbn is in, if it is in one."""
    try:
        process = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(npbn.__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


class StoppedError(Exception):
    """Ctrl-C, between two batches; what there is has been saved."""


def train(session: Session) -> None:
    """Train to the end, saving after each epoch; print the table and what came out."""
    config, state, run = session.run.config, session.state, session.run
    say("")
    say("epoch    loss  train acc  test acc  examples/s")
    bar = tqdm(
        total=len(state.train),
        initial=state.batch * state.batch_size,
        unit=" examples",
        unit_scale=True,
        leave=False,
        disable=sys.stderr is None or not sys.stderr.isatty(),
    )
    bar.set_description(f"epoch {state.epoch + 1}")
    epochs: list[training.Epoch] = []
    best = state.best

    def on_batch(examples: int) -> None:
        bar.update(examples)
        if ctrl_c.pressed:
            session.save()
            raise StoppedError

    def on_epoch(epoch: training.Epoch) -> None:
        nonlocal best
        epochs.append(epoch)
        bar.clear()
        accuracy = "-" if epoch.test is None else f"{epoch.test.accuracy:.4f}"
        say(
            f"{epoch.number:5d}  {epoch.train.loss:6.4f}  {epoch.train.accuracy:9.4f}  "
            f"{accuracy:>8}  {epoch.train.examples / epoch.train.seconds:10,.0f}"
        )
        if epoch.skipped and epoch.number == 1:
            say("       (one example an epoch is left out: as a batch it has no variance)")
        session.save(epoch, best=state.best > best)
        best = state.best
        if epoch.number < config["epochs"]:
            bar.reset()
            bar.set_description(f"epoch {epoch.number + 1}")
        if ctrl_c.pressed:
            raise StoppedError

    try:
        # NaN and infinity are looked for in the results.
        with CtrlC() as ctrl_c, np.errstate(over="ignore", invalid="ignore"):
            state.run(
                config["epochs"],
                max_steps=config["max_steps"] or math.inf,
                eval_every=config["eval_every"],
                target_accuracy=config["target_accuracy"] or math.inf,
                on_batch=on_batch,
                on_epoch=on_epoch,
            )
    except StoppedError:
        bar.close()
        say(f"stopped after step {state.optimizer.steps}; to go on: --resume {run.path}")
        raise KeyboardInterrupt from None
    except NonFiniteError as error:
        bar.close()
        raise NpbnError(f"{error}: {explain_non_finite(session)}") from None
    finally:
        bar.close()
    conclude(session, epochs)


def explain_non_finite(session: Session) -> str:
    """Where it began, by doing the epoch over from the last checkpoint, and why."""
    state, run = session.state, session.run
    state.load_state(*run.load())
    with np.errstate(over="ignore", invalid="ignore"):
        where = state.locate_non_finite()
    cause = ""
    if "label" not in where and state.optimizer.steps > 0:
        cause = f"; most likely the learning rate, {state.optimizer.lr:g}, is too high"
    return f"{where}{cause}; the last good checkpoint is kept: {run.path / 'last.safetensors'}"


def conclude(session: Session, epochs: list[training.Epoch]) -> None:
    """What there is to say at the end."""
    state = session.state
    say("")
    if not epochs:
        say(f"this run was finished already, after epoch {state.epoch}")
    else:
        seconds = sum(epoch.train.seconds for epoch in epochs)
        examples = sum(epoch.train.examples for epoch in epochs)
        in_all = f", {time.perf_counter() - STARTED:.1f} s in all" if not session.resumed else ""
        say(
            f"{examples / seconds:,.0f} examples/s in training on {session.device.name}: "
            f"{seconds:.1f} s of training{in_all}"
        )
    say(f"best test accuracy {state.best:.4f}; checkpoints last and best in {session.run.path}")
    norms = inspection.batch_norms(state.model)
    for parameter in (norms[0].gamma, norms[0].beta) if norms else ():
        values = " ".join(f"{v:.3f}" for v in backend.to_numpy(parameter.data).ravel())
        say(f"{parameter.name} of the first batch norm: {values}")


def check_gradients(session: Session) -> None:
    """Print a table for one batch of the data; end the program if a gradient is wrong."""
    copied = copy.deepcopy(session.state.model)
    copied.to(session.device, "float64")
    x, labels = next(session.state.train.batches(session.state.batch_size, "float64"))
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
