"""Train LeNet with batch norm on Fashion-MNIST, every gradient computed by hand-written code."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import npbn
from npbn import backend, distributed, experiment, inspection, plots, runs, training, verify
from npbn.checkpoint import write_file
from npbn.commands.command_line import (
    STARTED,
    ArgumentParser,
    OutputError,
    PostponedStop,
    Stopped,
    quiet,
    say,
    silence,
    typed,
    value,
)
from npbn.commands.pictures import draw_run
from npbn.commands.progress import Progress
from npbn.commands.tensorboard import EventFile, check_tensorboard
from npbn.data import YOURS, Dataset, Split
from npbn.distributed import Group
from npbn.errors import (
    BackendError,
    CheckpointError,
    DataError,
    NonFiniteError,
    NpbnError,
    RunExistsError,
    UnsupportedError,
)
from npbn.experiment import Config

EPILOG = """\
examples:
  {train}                                the published setting, on what is there
  {train} --backend cupy                 on a GPU
  {train} --model blenet --epochs 3
  {train} --no-batch-norm --lr 0.5       without batch norm
  {train} --schedule cosine --momentum 0.9 --lr 0.1
  {train} --dataset folder --data photos --side 32 --test-fraction 0.2
  {train} --run runs/first               a folder to find again
  {train} --resume runs/first            after Ctrl-C, or a power cut
  {train} --resume runs/first --epochs 20
  {train} --from runs/first --lr 0.1     a new run that begins with these weights

Ctrl-C, SIGTERM and SIGHUP stop the training after the batch, and keep what was trained. A second
signal stops at once.

exit codes: 0 trained, 1 the output pipe was closed, 2 bad input, something missing on this
machine, or an output that cannot be written, 3 the loss became NaN, 130, 143 or 129 stopped by
Ctrl-C, SIGTERM or SIGHUP
"""

# The options that are allowed with --resume.
FREE_WITH_RESUME = {"resume", "data", "backend", "threads", *runs.LIMITS}
FREE_WITH_RESUME |= {"plots", "tensorboard", "quiet", "json"}
# The options that --from copies from the run whose weights it takes.
OF_THE_WEIGHTS = ("model", "no_batch_norm", "activation")

# The fields of `Config` that are options of the command line, in groups, with their help texts.
OPTIONS = {
    "where to compute": {
        "backend": "array library: numpy (CPU), cupy (NVIDIA GPU), or auto, a GPU if there is a "
        "usable one",
        "engine": "layers, the textbook; fused, the same mathematics planned into fused stages; "
        "or auto, fused on the CPU if it can train this model, else layers",
        "threads": "CPU threads, of the fused engine or of the BLAS library for layers; use 1 on "
        "a busy machine (default: every CPU that this process may use)",
        "dtype": "of all numbers",
    },
    "data": {
        "dataset": "fashion-mnist, mnist or kmnist, downloaded if need be; digits, handwritten "
        "ones that npbn carries; idx, any four files in MNIST's format; folder, image files in a "
        "folder for each class; or auto, Fashion-MNIST if it is available, else digits",
        "data": "directory with the four IDX files, gzipped or not, or as torchvision lays them "
        "out, such as FashionMNIST/raw; no other place is tried then (default: $NPBN_DATA, else "
        "the system's and the user's data directories, else a download). With folder: it holds "
        "train/CLASS/* and test/CLASS/*, or CLASS/* and --test-fraction",
        "channels": "1, grey, or 3, colour, with folder (default: 3 if any image has colours)",
        "side": "of the square images, in pixels, with folder (default: their own)",
        "test_fraction": "share of each class to keep for testing, with folder; --seed chooses",
        "limit_train": "train on the first N examples only",
    },
    "model": {
        "model": "lenet, network A; blenet, network B, with a padded first convolution, for "
        "images of any size; or auto, lenet for grey images of 28 × 28 in 10 classes, else blenet",
        "no_batch_norm": "leave batch norm out",
        "activation": "what follows each batch norm",
    },
    "training": {
        "epochs": "passes over the training images",
        "batch_size": "examples a step",
        "lr": "learning rate",
        "schedule": "of the learning rate: constant; step, multiplied by --lr-factor every "
        "--lr-epochs epochs; cosine, down to 0 where the training ends",
        "lr_epochs": "with --schedule step (default: 3)",
        "lr_factor": "with --schedule step (default: 0.1)",
        "momentum": "of SGD",
        "weight_decay": "of weights, not of biases, gamma and beta",
        "max_steps": "stop after N steps of the optimizer, even within an epoch",
        "target_accuracy": "stop when the test accuracy is at least X",
        "eval_every": "epochs from one evaluation to the next",
        "precise_bn": "before each evaluation, recompute batch norm's statistics over the "
        "training set, in place of the moving averages",
        "seed": "of initial weights and shuffling; on one machine and backend, two runs of a seed "
        "are equal to the last bit, by layers with one number of threads",
    },
}
# For words in an error message about the data, the option that the advice to the user names.
ADVICE = {
    "training examples": "--limit-train",
    "test_fraction": "--test-fraction",
    "a side": "--side",
    "into a directory": "--data",
    "'s files": "--dataset and --data",
}
METAVARS = {int: "N", float: "X", str: "DIR"}


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(train=typed(program)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"npbn {npbn.__version__}")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            flag, default = f"--{name.replace('_', '-')}", fields[name].default
            check = fields[name].metadata["check"]
            if check is experiment.FLAG:
                group.add_argument(flag, action="store_true", help=text)
                continue
            group.add_argument(
                flag,
                type=str if check.type is str else value(check.type, check.description, check),
                choices=check.choices,
                default=default,
                metavar=None if check.choices else METAVARS[check.type],
                help=text if default is None else f"{text} (default: {default})",
            )

    kept = parser.add_argument_group("what is checked and kept")
    kept.add_argument(
        "--check-gradients",
        action="store_true",
        help="first compare every gradient with the complex step, on one batch, in float64",
    )
    kept.add_argument(
        "--run",
        metavar="DIR",
        help="new folder for configuration, metrics and checkpoints (default: runs/DATE-TIME, with "
        "a number if that exists)",
    )
    kept.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    kept.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in this folder, with its own options, from its last checkpoint: "
        "it ends as if it had never been interrupted. With --epochs or --max-steps, the run is "
        "trained until then; a cosine then ends there, too",
    )
    kept.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        help="begin with the model of the run in this folder, from its best checkpoint",
    )
    kept.add_argument("--plots", action="store_true", help="draw the run at the end")
    kept.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the metrics for TensorBoard, too: tensorboard --logdir DIR",
    )
    kept.add_argument("--quiet", action="store_true", help="print only the last line")
    kept.add_argument(
        "--json", metavar="FILE", help="write the result to this file, however the training ends"
    )

    arguments = parser.parse_args(words)
    if arguments.dataset == "digits" and arguments.data is not None:
        parser.error("argument --data: not allowed with --dataset digits, which needs no files")
    if arguments.dataset in YOURS and arguments.data is None:
        parser.error(f"argument --data: expected a directory with --dataset {arguments.dataset}")
    for option in ("channels", "side", "test_fraction"):
        if arguments.dataset != "folder" and getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: not allowed without --dataset folder")
    if arguments.schedule == "step":
        arguments.lr_epochs = arguments.lr_epochs or 3
        arguments.lr_factor = arguments.lr_factor or 0.1
    for option in ("lr_epochs", "lr_factor"):
        if arguments.schedule != "step" and getattr(arguments, option) is not None:
            name = option.replace("_", "-")
            parser.error(f"argument --{name}: not allowed without --schedule step")
    if arguments.overwrite and arguments.run is None:
        parser.error("argument --overwrite: not allowed without --run, which names what to replace")
    # Parse again without the defaults, to see which options were given.
    nothing = argparse.Namespace(**dict.fromkeys(vars(arguments)))
    given = {k: v for k, v in vars(parser.parse_args(words, nothing)).items() if v is not None}
    arguments.limits = {name: given[name] for name in runs.LIMITS if name in given}
    for option in given:
        name = "from" if option == "source" else option.replace("_", "-")
        if arguments.resume is not None and option not in FREE_WITH_RESUME:
            parser.error(f"argument --{name}: not allowed with --resume: the run has its own")
        if arguments.source is not None and option in OF_THE_WEIGHTS:
            parser.error(f"argument --{name}: not allowed with --from: the weights have their own")
    if arguments.json is not None and not os.path.isdir(os.path.dirname(arguments.json) or "."):
        parser.error(f"argument --json: there is no directory {os.path.dirname(arguments.json)}")
    return arguments


def main(program: str, words: list[str]) -> None:
    group = distributed.join()
    with group.together(), silence() if group.rank else contextlib.nullcontext():
        run(group.broadcast(lambda: parse_arguments(program, words)), program, group)


def run(arguments: argparse.Namespace, program: str, group: Group) -> None:
    """Train as the arguments say. Only rank 0 prints, and reads and writes the run's folder."""
    backend.keep_freed_memory()
    if arguments.plots:
        plots.check_matplotlib()
    if arguments.tensorboard:
        check_tensorboard()
    with quiet() if arguments.quiet else contextlib.nullcontext():
        try:
            begin = start if arguments.resume is None else resume
            session = begin(arguments, group)
            if arguments.tensorboard:
                group.broadcast(session.open_events)
            train(session, program, arguments.json)
        except MemoryError as error:
            raise NpbnError(
                f"out of memory: {error or 'no more is free'}; a smaller --batch-size or "
                "--limit-train needs less"
            ) from None
        if arguments.plots:
            group.broadcast(session.draw)


@dataclasses.dataclass
class Session:
    """A new or resumed run that is about to train."""

    run: runs.Run
    config: Config
    state: training.Training
    dataset: Dataset
    device: backend.Backend
    resumed: bool
    group: Group
    events: EventFile | None = None

    def open_events(self) -> None:
        """Begin to write the metrics for TensorBoard."""
        self.events = EventFile(self.run.path, self.state.epoch)

    def draw(self) -> None:
        """Draw the run."""
        draw_run(experiment.load(self.run.path), self.dataset, self.run.path / "plots")

    def describe(self) -> None:
        """Print the description of data, model and training that stands above the table."""
        config, dataset, model = self.config, self.dataset, self.state.model
        say(
            f"data: {dataset.name} from {dataset.source}, "
            f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
        )
        count = sum(parameter.data.size for parameter in model.parameters().values())
        say(
            f"model: {type(model).__name__} {'without' if config.no_batch_norm else 'with'} "
            f"batch norm, {count:,} parameters, {config.dtype}, {self.state.engine.description}"
            f"{self.group.description}"
        )
        say(
            f"training: {config.epochs} epoch{'s' * (config.epochs > 1)}, "
            f"batches of {config.batch_size}, SGD with {config.schedule} learning rate "
            f"{config.lr}, momentum {config.momentum:g}, weight decay "
            f"{config.weight_decay:g}, seed {config.seed}"
        )
        if config.batch_size == 1 and not config.no_batch_norm:
            say(
                "note: over a batch of one, batch norm after a linear layer is constant: "
                "little is learned"
            )

    def records(self, epoch: training.Epoch | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the two records for `Run.append`. Before the first epoch, ``epoch`` is None."""
        model, split = self.state.model, self.state.train
        metrics: dict[str, Any] = {"number": 0, "step": 0, "train": None, "test": None}
        if epoch is not None:
            metrics = dataclasses.asdict(epoch)
        parameters = [
            {
                name: backend.to_numpy(p.data).ravel().tolist()
                for name, p in norm.parameters().items()
            }
            for norm in inspection.batch_norms(model)
        ]
        x, _ = next(split.batches(256, self.config.dtype))
        return metrics, {
            "number": metrics["number"],
            "batch_norm": parameters,
            "preactivations": inspection.histograms(model, x),
        }

    def save(self, epoch: training.Epoch | None = None, *, best: bool = False) -> None:
        """Save a checkpoint and, after an epoch, the metrics of the epoch."""
        # Call `state` before any writing, because it raises an error if the state is not finite.
        arrays, record = self.state.state()

        def write() -> None:
            if epoch is not None:
                metrics, layers = self.records(epoch)
                self.run.append(metrics, layers)
                if self.events is not None:
                    self.events.add(metrics, layers)
            self.run.save(arrays, record, best=best)

        self.group.broadcast(write)


def start(arguments: argparse.Namespace, group: Group) -> Session:
    """Create a new run and return its session."""
    names = [name for options in OPTIONS.values() for name in options]
    config = Config(**{name: getattr(arguments, name) for name in names})
    now = datetime.datetime.now()
    path = Path(now.strftime("runs/%Y-%m-%d-%H.%M.%S") if arguments.run is None else arguments.run)
    if arguments.run is not None:  # This check comes before steps that take long.
        group.broadcast(lambda: check_name(path, overwrite=arguments.overwrite))
    source = None
    if arguments.source is not None:
        source = group.broadcast(lambda: experiment.load(arguments.source))
    model = None if source is None else source.model
    if source is not None:
        of_weights = {name: getattr(source.config, name) for name in OF_THE_WEIGHTS}
        config = dataclasses.replace(config, **of_weights)
    device = open_device(config.backend, config.threads, group)
    dataset = load_data(config, group)
    for note in dataset.notes:
        say(f"note: {note}")
    if source is not None:
        try:
            experiment.check_images(source.config, dataset)
        except DataError as error:
            raise NpbnError(f"--from {arguments.source}: {error}") from None
        say(f"weights: from {arguments.source}, after epoch {source.epoch}")
    data = None if config.data is None else str(Path(config.data).resolve())
    config = dataclasses.replace(config.fitted(dataset), backend=device.name, data=data)
    with device.explaining_failures():
        try:
            state = experiment.build_training(
                config, dataset, device, model=model, report=say, group=group
            )
        except UnsupportedError as error:
            raise NpbnError(f"--engine fused: {error}; --engine layers can do it") from None
    # The configuration keeps the engine that was chosen, so that a resumed run uses it again.
    config = dataclasses.replace(config, engine=state.engine.kind)
    session = Session(runs.Run(path, {}), config, state, dataset, device, False, group)
    session.describe()
    if arguments.check_gradients:
        group.broadcast(lambda: check_gradients(session))
    environment = describe_environment(session) | {
        "command": shlex.join(sys.argv),
        "from": arguments.source,
        "started": now.isoformat(timespec="seconds"),
    }
    with device.explaining_failures():
        first = (*session.records(None), *session.state.state())

    def create() -> Path:
        for name in [path] if arguments.run is not None else unused(path):
            try:
                session.run = runs.Run.create(
                    name, config.to_json(), environment, first, overwrite=arguments.overwrite
                )
                break
            except RunExistsError:
                if arguments.run is not None:
                    raise
        return session.run.path

    session.run.path = group.broadcast(create)
    say(f"run: {session.run.path}")
    return session


def unused(path: Path) -> Iterator[Path]:
    """Yield names for a run that do not exist: the path, or the path with -2, -3 and so on."""
    names = (path.with_name(f"{path.name}-{k}" if k > 1 else path.name) for k in itertools.count(1))
    return (name for name in names if not os.path.lexists(name))


def check_name(path: Path, *, overwrite: bool) -> None:
    """Raise an error if `Run.create` would refuse this name.

    Without `overwrite`, the message says what to type.
    """
    try:
        runs.Run.check_name(path, overwrite=overwrite)
    except CheckpointError as error:
        advice = "" if overwrite else "; choose another name, or --overwrite it"
        raise CheckpointError(f"{error}{advice}") from None


def load_data(config: Config, group: Group) -> Dataset:
    """Return the data set; an error about the data names the option that may correct it.

    Rank 0 loads the data first. So only rank 0 downloads files, which the other ranks then find.
    """
    loaded: list[Dataset] = []
    try:
        group.broadcast(lambda: loaded.append(experiment.load_data(config, on_download=say)))
        return loaded[0] if loaded else experiment.load_data(config)
    except DataError as error:
        for words, option in ADVICE.items():
            if words in str(error):
                raise DataError(f"{error}; see {option}") from None
        raise


def resume(arguments: argparse.Namespace, group: Group) -> Session:
    """Return the session of a run that continues from its last checkpoint."""
    run = runs.Run(arguments.resume, {})

    def read() -> tuple[Any, ...]:
        nonlocal run
        run, _ = experiment.open_run(arguments.resume)
        run.lock()
        # `load` also verifies the configuration against the checkpoint before it is used.
        return run.config, run.environment(), *run.load()

    run.config, there, arrays, record = group.broadcast(read)
    before = Config.from_json(record["config"])
    config = dataclasses.replace(before, **arguments.limits)
    for name, done in (("epochs", record["epoch"]), ("max_steps", record["step"])):
        limit = arguments.limits.get(name)
        if limit is not None and limit < done:
            option, what = f"--{name.replace('_', '-')}", name.removeprefix("max_")
            raise NpbnError(f"{option} {limit}: the run has {done} {what} already")
    if arguments.data is not None and config.dataset == "digits":
        raise NpbnError("--data: not allowed with this run of the digits, which need no files")
    name = config.backend if arguments.backend == "auto" else arguments.backend
    threads = arguments.threads or config.threads
    device = open_device(name, threads, group)
    dataset = load_data(dataclasses.replace(config, data=arguments.data or config.data), group)
    now = dataclasses.replace(config, threads=threads)
    with device.explaining_failures():
        state, record = experiment.load_training(run, now, dataset, device, report=say, group=group)
    session = Session(run, config, state, dataset, device, True, group)
    session.describe()

    def prepare() -> None:
        run.rewind(record)
        if config != before:
            run.extend(config.to_json(), arrays, record)

    group.broadcast(prepare)
    for name, here in describe_environment(session).items():
        if there.get(name, here) != here:
            say(
                f"note: {name} was {there[name]} when this run began and is {here} now: "
                "the last bits may differ"
            )
    say(f"run: {run.path}, going on after epoch {state.epoch}, batch {state.batch}")
    return session


def open_device(name: str, threads: int | None, group: Group) -> backend.Backend:
    """Return the backend, and limit the number of BLAS threads.

    If ``threads`` is None, the limit is the number of CPUs that this process may use, divided by
    the number of ranks that may use the same CPUs. If fewer BLAS threads are set now, this number
    is the limit.
    """
    usable = group.threads
    backend.limit_blas_threads(threads or min(usable, backend.blas_threads() or usable))
    device = backend.get_backend(name)
    say(f"npbn {npbn.__version__}, Python {platform.python_version()}, {device.description}")
    if device.note:
        say(f"on the CPU, because: {device.note}")
    return device


def describe_environment(session: Session) -> dict[str, str | None]:
    """Return the versions and devices on which the last bits of a result may depend."""
    found = {
        "npbn": npbn.__version__,
        "commit": commit(),
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
    if session.device.name != "numpy":
        return found | {"device": session.device.description}
    found |= {
        "device": backend.cpu_name(),
        "NumPy": f"{np.__version__} with {' '.join(backend.cpu_features()) or 'no CPU features'}",
        "BLAS": backend.blas_name(),
    }
    if session.state.engine.kind == "layers":
        return found | {"threads": str(backend.blas_threads())}
    from npbn.engine.cpu.compilation import describe_compiler

    # The number of threads does not change the results of the fused engine.
    return found | {"compiler": describe_compiler()}


def commit() -> str | None:
    """Return the commit of npbn's git checkout, or None if npbn is not in a checkout."""
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


def train(session: Session, program: str, json_file: str | None) -> None:
    """Train to the end and save after each epoch; print the table of epochs and a summary.

    The result is written to ``json_file``, if that is given, even if the training fails.
    """
    config, state, run = session.config, session.state, session.run
    say("")
    say("epoch    loss  train acc  test acc  examples/s")
    epochs: list[training.Epoch] = []
    best = state.best
    examples = len(state.train) - training.left_out(len(state.train), state.batch_size)
    total = config.epochs * examples
    if config.max_steps is not None:
        total = min(total, config.max_steps * state.batch_size)
    done = state.epoch * examples + state.batch * state.batch_size
    progress = Progress(total, done)
    progress.epoch(state.epoch + 1)

    def on_batch(examples: int) -> None:
        progress.update(examples)
        # A signal for one rank stops all of them after this batch.
        stop = max(session.group.gather(np.array(postponed.signal or 0)))
        if stop:
            session.save()
            progress.close()
            with contextlib.suppress(OutputError):  # After SIGHUP, the terminal may be gone.
                steps = state.optimizer.steps
                say(f"stopped after step {steps}; to go on: {resuming(program, run)}")
            raise Stopped(int(stop))

    def on_epoch(epoch: training.Epoch) -> None:
        nonlocal best
        epochs.append(epoch)
        accuracy = "-" if epoch.test is None else f"{epoch.test.accuracy:.4f}"
        progress.say(
            f"{epoch.number:5d}  {epoch.train.loss:6.4f}  {epoch.train.accuracy:9.4f}  "
            f"{accuracy:>8}  {epoch.train.examples / epoch.train.seconds:10,.0f}"
        )
        if epoch.skipped and epoch.number == 1:
            say("       (one example an epoch is left out: as a batch it has no variance)")
        session.save(epoch, best=state.best > best)
        best = state.best
        progress.epoch(epoch.number + 1)

    status = "failed"
    try:
        # NumPy's warnings are off because the training itself looks for NaN and infinity.
        with PostponedStop() as postponed, np.errstate(over="ignore", invalid="ignore"):
            state.run(
                config.epochs,
                max_steps=config.max_steps or math.inf,
                eval_every=config.eval_every,
                target_accuracy=config.target_accuracy or math.inf,
                on_batch=on_batch,
                on_epoch=on_epoch,
            )
        status = "trained"
    except Stopped:
        status = "stopped"
        raise
    except BackendError as error:
        raise BackendError(f"{error}: {resuming(program, run)}") from None
    except NonFiniteError as error:
        status = "not finite"
        progress.close()
        raise NonFiniteError(f"{error}: {explain_non_finite(session)}") from None
    finally:
        progress.close()
        if session.events is not None:
            session.events.close()
        if json_file is not None and session.group.rank == 0:
            write_result(json_file, session, status, epochs)
    conclude(session, epochs, program)


def write_result(
    path: str, session: Session, status: str, epochs: Sequence[training.Epoch]
) -> None:
    """Write the result of a training to a JSON file."""
    state = session.state
    last = dataclasses.asdict(epochs[-1]) if epochs else {"train": None, "test": None}
    seconds = sum(epoch.train.seconds for epoch in epochs)
    examples = sum(epoch.train.examples for epoch in epochs)
    result = {
        "run": str(session.run.path),
        "status": status,
        "config": session.config.to_json(),
        "epochs": state.epoch,
        "steps": state.optimizer.steps,
        "best_test_accuracy": state.best if state.best >= 0 else None,
        "train": last["train"],
        "test": last["test"],
        "seconds": seconds,
        "examples_per_second": examples / seconds if seconds else None,
    }
    try:
        write_file(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise NpbnError(f"{path} cannot be written: {error.strerror}") from None


def resuming(program: str, run: runs.Run) -> str:
    """Return the command that resumes a run."""
    return f"{typed(program)} --resume {shlex.quote(str(run.path))}"


def explain_non_finite(session: Session) -> str:
    """Return where NaN or infinity began, and a likely cause if there is one.

    For this, the layers train again from the last checkpoint, up to the first such value.
    """
    state, run = session.state, session.run
    state.load_state(*session.group.broadcast(run.load))
    with np.errstate(over="ignore", invalid="ignore"):
        where = state.locate_non_finite()
    cause = ""
    if state.optimizer.steps > 0:
        cause = f"; most likely the learning rate, {state.optimizer.lr:g}, is too high"
    return f"{where}{cause}; the last good checkpoint is kept: {run.path / 'last.safetensors'}"


def conclude(session: Session, epochs: Sequence[training.Epoch], program: str) -> None:
    """Print the speed, batch norm's first parameters, the best accuracy and the run's folder."""
    state, config = session.state, session.config
    say("")
    if not epochs:
        ended = f"{state.epoch} of {config.epochs} epochs"
        if config.max_steps is not None and state.optimizer.steps >= config.max_steps:
            ended = f"--max-steps {config.max_steps}"
        elif state.best >= (config.target_accuracy or math.inf):
            ended = f"--target-accuracy {config.target_accuracy}"
        say(
            f"this run was finished already, after epoch {state.epoch} ({ended}); to train on: "
            f"{resuming(program, session.run)} with more --epochs or --max-steps"
        )
    else:
        seconds = sum(epoch.train.seconds for epoch in epochs)
        examples = sum(epoch.train.examples for epoch in epochs)
        in_all = f", {time.perf_counter() - STARTED:.1f} s in all" if not session.resumed else ""
        say(
            f"{examples / seconds:,.0f} examples/s in training on {session.device.name}: "
            f"{seconds:.1f} s of training{in_all}"
        )
    norms = inspection.batch_norms(state.model)
    for parameter in (norms[0].gamma, norms[0].beta) if norms else ():
        values = " ".join(f"{v:.3f}" for v in backend.to_numpy(parameter.data).ravel())
        say(f"{parameter.name} of the first batch norm: {values}")
    found = f"best test accuracy {state.best:.4f}" if state.best >= 0 else "nothing was evaluated"
    say(f"{found}; checkpoints last and best in {session.run.path}", always=True)


def check_gradients(session: Session) -> None:
    """Check the gradients on one batch of the data, on the CPU, and print a table.

    On a GPU, the check would be tens of thousands of launches of small kernels.

    Raises:
        NpbnError: a gradient is wrong, or it cannot be told whether it is right.
    """
    copied = copy.deepcopy(session.state.model)
    copied.to(backend.get_backend("numpy"), "float64")
    train, count = session.state.train, session.state.batch_size
    batch = Split(backend.to_numpy(train.images[:count]), backend.to_numpy(train.labels[:count]))
    x, labels = next(batch.batches(count, "float64"))
    report = verify.check_model(copied, x, labels)
    say("")
    say(f"gradients on a batch of {len(labels)}, float64, by the complex step:")
    say("parameter     relative error  verdict")
    for finding in report.findings:
        say(f"{finding.name:12}  {finding.error:14.1e}  {finding.verdict}")
    if not report.ok:
        raise NpbnError("a gradient is not right, see above; nothing was trained")
