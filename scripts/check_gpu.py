"""Check on this machine's GPU that the GPU engine is right, and how fast it is."""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import argparse
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import npbn
from _gpu_rates import card_rates
from _report import quotients
from benchmark import CONTESTANTS, check_libraries
from npbn import backend, data, training
from npbn.backend import Backend, to_numpy
from npbn.checkpoint import write_file
from npbn.data import Split
from npbn.engine.gpu import GpuEngine
from npbn.engine.gpu.first_step import largest_error
from npbn.engine.layers import LayersEngine
from npbn.errors import DataError, NpbnError
from npbn.layers import Sequential
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD
from npbn.runs import Run

EPILOG = """\
Every check is a line: ok, or FAILED where something is wrong. Speed fails nothing: it is missed
where a target was not reached. What cannot be checked on this machine is skipped.

checks:
  card            the GPU and versions; always among them
  NETWORK-DTYPE   lenet-float32, lenet-float64, blenet-float32, blenet-float64: a step of training,
                  and evaluation after it, against the layers on the CPU
  repetition      two runs of a seed agree in every bit
  losses          the first ones, of the engine and of the layers on the GPU, against the CPU's
  memory          does not grow
  training        train.py on Fashion-MNIST, 10 epochs: accuracy and time
  speed-BATCH     speed-256, speed-64, speed-1024, speed-8192: training, by benchmark.py, beside
                  PyTorch eager, torch.compile and torch.cuda.graph

examples:
  python scripts/check_gpu.py --json checks.json
  python scripts/check_gpu.py --only training speed-256

exit codes: 0 nothing failed, 1 something did, 2 bad input or no GPU to be used, 130 interrupted
"""

BOUNDS = {"float32": 1e-4, "float64": 1e-9}
"""The bounds on errors, by dtype.

Errors of gradients and of parameters are relative to the largest absolute value of the correct
arrays. Errors of losses are absolute.
"""

LOSS_BOUND = 2e-3
MEMORY_BOUND = 16 * 2**20
"""The bound on how much the memory in use on the whole GPU may grow, in bytes.

The bound is not 0, because other processes may use the GPU as well.
"""

SPEEDS = (
    ("examples_per_second", ",.0f", "examples/s", 5e6),
    ("ratio_to_eager", ".2f", "times PyTorch eager", 10.0),
    ("ratio_to_nearest", ".2f", "times the faster of torch.compile and torch.cuda.graph", 2.0),
)
"""The measures of training speed: name, format, meaning, and the target for batches of 256."""

TARGET_BATCH_SIZE = 256

CONTEST = "engine", "eager", "compile", "graph"
ENGINE, EAGER, *NEAREST = (CONTESTANTS[name] for name in CONTEST)

TRAINING_BOUNDS = {"loss": 0.285, "train_accuracy": 0.893, "test_accuracy": 0.845}
"""The bounds after 10 epochs.

The loss may be at most the bound, the training accuracy and the best test accuracy at least.
"""

TRAINING_TARGET = 2.0
"""The target for the time of the 10 epochs in seconds, evaluation included."""

BATCH_SIZES = (256, 64, 1024, 8192)

NETWORKS: Mapping[str, Callable[..., Sequential]] = {"LeNet": LeNet, "BLeNet": BLeNet}

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Setting:
    """The device, the sizes of the computations, and options to pass on to other scripts."""

    device: Backend
    networks: Mapping[str, Callable[..., Sequential]] = field(default_factory=lambda: NETWORKS)
    shape: tuple[int, int, int] = (1, 28, 28)
    classes: int = 10
    batch_size: int = 256
    examples: int = 60_000
    tested: int = 10_000
    few: int = 2_600  # ten batches and a smaller batch
    steps: int = 100
    epochs: int = 1_000  # the number of epochs during which memory may not grow
    seed: int = 0
    train_options: tuple[str, ...] = ()
    benchmark_options: tuple[str, ...] = ()

    def split(self, examples: int, device: Backend, seed: int) -> Split:
        """Return random images with random labels."""
        generator = np.random.default_rng((self.seed, seed))
        images = generator.integers(256, size=(examples, *self.shape), dtype=np.uint8)
        return Split(images, generator.integers(self.classes, size=examples)).to(device)

    def model(self, name: str, device: Backend, dtype: str) -> Sequential:
        model = self.networks[name](generator=np.random.default_rng(self.seed))
        model.to(device, dtype)
        model.train()
        return model

    def engine(
        self, examples: int, name: str | None = None, dtype: str = "float32"
    ) -> tuple[Sequential, GpuEngine]:
        """Return a model and a GPU engine that trains the model on ``examples`` random examples.

        The model is the first of the networks unless ``name`` is given.
        """
        model = self.model(name or next(iter(self.networks)), self.device, dtype)
        train, test = self.split(examples, self.device, 1), self.split(self.tested, self.device, 2)
        optimizer = SGD(model.parameters(), LEARNING_RATE)
        return model, GpuEngine(model, optimizer, train, test, batch_size=self.batch_size)

    def layers(
        self, examples: int, device: Backend, name: str | None = None, dtype: str = "float32"
    ) -> LayersEngine:
        """Return a layers engine on ``device``, with the model and data of `engine`."""
        model = self.model(name or next(iter(self.networks)), device, dtype)
        train, test = self.split(examples, device, 1), self.split(self.tested, device, 2)
        optimizer = SGD(model.parameters(), LEARNING_RATE)
        return LayersEngine(
            model, optimizer, train, test, batch_size=self.batch_size, backend=device
        )


@dataclass(frozen=True)
class Finding:
    """The result of a check: a line for people, and numbers for programs.

    Attributes:
        status: "ok"; "FAILED"; "missed" if a target of speed was not reached; or "skipped" if
            something that the check needs is not available.
        text: the line for people.
        numbers: the numbers for programs.
    """

    status: str
    text: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


def verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def train(engine: GpuEngine, order: np.ndarray) -> np.ndarray:
    """Train on the examples in the given order; return the mean loss of each step."""
    for _ in engine.steps(order):
        pass
    return engine.losses(-(-len(order) // engine.batch_size))


def check_card(setting: Setting) -> Finding:
    import cupy

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    driver = cupy.cuda.runtime.driverGetVersion()
    operations, bandwidth = card_rates()
    numbers = {
        "description": setting.device.description,
        "compute_capability": device.compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "operations_per_second": operations,
        "bytes_per_second": bandwidth,
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "npbn": npbn.__version__,
    }
    text = (
        "{description}; sm_{compute_capability}, {multiprocessors} multiprocessors, "
        f"by their clocks {operations / 1e12:.1f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s, "
        "driver for CUDA {driver_cuda}, npbn {npbn}, Python {python}, NumPy {numpy}"
    )
    return Finding("ok", text.format(**numbers), numbers)


def check_step(setting: Setting, name: str, dtype: str) -> Finding:
    """Compare a training step of the engine, and an evaluation, with the layers on the CPU."""
    cpu = backend.get_backend("numpy")
    model, engine = setting.engine(setting.few, name, dtype)
    layers = setting.layers(setting.few, cpu, name, dtype)
    batch = np.random.default_rng(setting.seed).permutation(setting.few)[: setting.batch_size]
    losses = train(engine, batch)
    (right_step,) = layers.steps(batch)
    (result,) = engine.evaluate()
    right_test = training.evaluate(layers.model, layers.test, dtype=dtype)
    found, right = (
        {name: to_numpy(p.gradient) for name, p in m.parameters().items()}
        for m in (model, layers.model)
    )
    numbers = {
        "gradients": largest_error(found, right),
        "state": largest_error(model.state_dict(), layers.model.state_dict()),
        "loss": abs(float(losses[0]) - float(right_step.loss)),
        "test_loss": abs(float(result.loss) - right_test.loss),
    }
    text = (
        "largest error of the gradients {gradients:.1e}, of parameters and averages {state:.1e}, "
        f"of the loss {{loss:.1e}}, of the loss on test data {{test_loss:.1e}} "
        f"(bound {BOUNDS[dtype]:.0e})"
    )
    ok = all(error <= BOUNDS[dtype] for error in numbers.values())  # NaN counts as too large.
    return Finding(verdict(ok), text.format(**numbers), numbers)


def check_repetition(setting: Setting) -> Finding:
    """Compare two training runs of two epochs with the same seed, bit by bit."""
    runs = []
    for _ in range(2):
        model, engine = setting.engine(setting.examples)
        order = np.random.default_rng(setting.seed)
        found: list[Any] = []
        for _ in range(2):
            found.append(train(engine, order.permutation(setting.examples)))
            (result,) = engine.evaluate()
            found += float(result.loss), int(result.correct)
        runs.append([np.asarray(part).tobytes() for part in (*found, *model.state_dict().values())])
    differ = sum(a != b for a, b in zip(*runs, strict=True))
    text = f"losses, accuracies and weights of two runs differ in {differ} of {len(runs[0])} parts"
    return Finding(verdict(differ == 0), text, {"different_parts": differ})


def check_losses(setting: Setting) -> Finding:
    """Compare the first losses of engine and layers on the GPU with those on the CPU."""
    count = setting.steps * setting.batch_size
    order = np.random.default_rng(setting.seed).permutation(count)
    _, engine = setting.engine(count)
    losses = train(engine, order)
    by_layers = []
    for device in (setting.device, backend.get_backend("numpy")):
        results = setting.layers(count, device).steps(order)
        by_layers.append(np.array([float(result.loss) for result in results]))
    on_device, right = by_layers
    numbers = {
        "engine": float(np.max(np.abs(losses - right))),
        "layers": float(np.max(np.abs(on_device - right))),
    }
    text = (
        f"{setting.steps} losses by the engine differ from the CPU's by {{engine:.1e}} at most, "
        f"by layers on the GPU by {{layers:.1e}} (bound {LOSS_BOUND:.0e})"
    )
    ok = all(error <= LOSS_BOUND for error in numbers.values())
    return Finding(verdict(ok), text.format(**numbers), numbers)


def check_memory(setting: Setting) -> Finding:
    """Measure how much memory grows over many epochs of a small data set, with evaluation."""
    import cupy

    _, engine = setting.engine(setting.few)
    order = np.random.default_rng(setting.seed)

    def used_after(epochs: int) -> tuple[int, int]:
        """Return the bytes of CuPy's arrays, and the bytes in use on the whole GPU."""
        for _ in range(epochs):
            train(engine, order.permutation(setting.few))
            (result,) = engine.evaluate()
            float(result.loss)
        gc.collect()
        free, total = cupy.cuda.runtime.memGetInfo()
        return cupy.get_default_memory_pool().used_bytes(), total - free

    before, after = used_after(3), used_after(setting.epochs)
    arrays, whole = after[0] - before[0], after[1] - before[1]
    text = (
        f"{setting.epochs:,} epochs: CuPy's arrays grew by {arrays:,} bytes, what is in use of the "
        f"GPU's memory by {whole:,} (bounds 0 and {MEMORY_BOUND:,})"
    )
    numbers = {"epochs": setting.epochs, "arrays_bytes": arrays, "gpu_bytes": whole}
    return Finding(verdict(arrays <= 0 and whole <= MEMORY_BOUND), text, numbers)


def lines(script: str, *options: str) -> Iterator[str]:
    """Yield the lines that another script prints, as soon as the script prints them.

    Raises:
        NpbnError: the script failed. The message is the last line that it wrote to stderr.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    with (
        tempfile.TemporaryFile() as errors,  # A pipe could fill up.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
        ) as process,
    ):
        try:
            assert process.stdout is not None
            yield from process.stdout
            code = process.wait()
        finally:
            process.kill()  # If the caller stops early, the process is still running here.
        if code:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            raise NpbnError(said[-1] if said else f"{script} ended with exit code {code}")


def check_training(setting: Setting) -> Finding:
    """Train with train.py, and judge the accuracy and the time.

    Before that, another process trains for one epoch, so that CuPy's kernels are compiled already.
    """
    try:
        data.load("fashion-mnist")
    except DataError as error:
        return Finding("skipped", str(error))
    options = ["--backend", setting.device.name, "--engine", "fused", *setting.train_options]
    options += ["--dataset", "fashion-mnist", "--seed", str(setting.seed), "--run"]
    with tempfile.TemporaryDirectory(prefix="npbn-") as folder:
        first, whole = f"{folder}/first", f"{folder}/whole"
        for _ in lines("train.py", *options, first, "--epochs", "1"):
            pass
        # train.py prints two lines with "examples/s": the header of the table of epochs, and the
        # summary below the table. The lines come while the run goes on.
        began, ended = (
            time.perf_counter()
            for line in lines("train.py", *options, whole)
            if "examples/s" in line
        )
        return judge_training(ended - began, Run.open(whole).records())


def judge_training(seconds: float, records: list[dict[str, Any]]) -> Finding:
    """Return the finding about a training run.

    Args:
        seconds: the time from the start of the first epoch to the end of the last epoch.
        records: the metrics of the run.
    """
    epochs = records[1:]  # The first record is from before the first epoch.
    last = epochs[-1]["train"]
    numbers = {
        "loss": last["loss"],
        "train_accuracy": last["accuracy"],
        "test_accuracy": max(epoch["test"]["accuracy"] for epoch in epochs),
        "seconds": seconds,
        "seconds_of_training": sum(epoch["train"]["seconds"] for epoch in epochs),
        "seconds_of_evaluation": sum(epoch["test"]["seconds"] for epoch in epochs),
    }
    ok = numbers["loss"] <= TRAINING_BOUNDS["loss"] and all(
        numbers[name] >= TRAINING_BOUNDS[name] for name in ("train_accuracy", "test_accuracy")
    )
    fast = seconds < TRAINING_TARGET
    text = (
        f"{len(epochs)} epochs: loss {{loss:.4f}}, training accuracy {{train_accuracy:.4f}}, best "
        "test accuracy {test_accuracy:.4f} (bounds "
        f"{', '.join(str(bound) for bound in TRAINING_BOUNDS.values())}); {{seconds:.2f}} s, with "
        "{seconds_of_training:.2f} of training, {seconds_of_evaluation:.2f} of evaluation "
        f"(target: under {TRAINING_TARGET:g} s, {reached(fast)})"
    )
    status = "missed" if ok and not fast else verdict(ok)
    return Finding(status, text.format(**numbers), numbers)


def reached(target: bool) -> str:
    return "met" if target else "missed"


def check_speed(setting: Setting, batch_size: int) -> Finding:
    """Measure the training speed with benchmark.py, and compare the speed with PyTorch's."""
    try:
        check_libraries()
    except NpbnError as error:
        return Finding("skipped", str(error))
    with tempfile.TemporaryDirectory(prefix="npbn-") as folder:
        file = Path(folder, "benchmark.json")
        options = ["--backend", setting.device.name, "--batch-size", str(batch_size)]
        options += ["--seed", str(setting.seed), "--json", str(file)]
        options += ["--contestants", *CONTEST, *setting.benchmark_options]
        said = [line.strip() for line in lines("benchmark.py", *options)]
        (comparison,) = json.loads(file.read_text())["results"]
    return judge_speed(comparison, [line for line in said if line.startswith("left out: ")])


def judge_speed(comparison: Mapping[str, Any], left_out: Iterable[str]) -> Finding:
    """Return the finding about a comparison by benchmark.py.

    Args:
        comparison: the results of benchmark.py for one batch size.
        left_out: the lines of benchmark.py about contestants that were left out.
    """
    batch_size = comparison["batch_size"]
    train = {title: result["train"] for title, result in comparison["results"].items()}
    if ENGINE not in train:
        return Finding("FAILED", "; ".join(left_out), {"comparison": comparison})
    speed = statistics.median(train[ENGINE])
    ratios = {title: statistics.median(quotients(train[ENGINE], train[title])) for title in train}
    found = {"examples_per_second": speed, "ratio_to_eager": ratios[EAGER]}
    if all(title in ratios for title in NEAREST):
        found["ratio_to_nearest"] = min(ratios[title] for title in NEAREST)
    parts, fast = [], True
    for name, form, what, target in SPEEDS:
        part = f"{found[name]:{form}} {what}" if name in found else f"{what}: not measured"
        if batch_size == TARGET_BATCH_SIZE:
            enough = name in found and found[name] >= target
            part += f" (target {target:,.0f}: {reached(enough)})"
            fast = fast and enough
        parts.append(part)
    step = batch_size / speed * 1e6
    part = f"{step:,.1f} µs a step"
    if comparison["floor"] is not None:
        floor = comparison["floor"]["microseconds"]
        part += f", {step / floor:.1f} times its floor of {floor:,.1f}"
    text = "; ".join([*parts, part, *left_out])
    numbers = {**found, "microseconds": step, "comparison": comparison}
    return Finding("ok" if fast else "missed", text, numbers)


Check = Callable[[Setting], Finding]


def checks(networks: Iterable[str]) -> dict[str, Check]:
    """Return the checks by name, from the quickest to the slowest."""
    steps = {
        f"{name}-{dtype}".lower(): partial(check_step, name=name, dtype=dtype)
        for name in networks
        for dtype in BOUNDS
    }
    speeds = {f"speed-{size}": partial(check_speed, batch_size=size) for size in BATCH_SIZES}
    return {
        "card": check_card,
        **steps,
        "repetition": check_repetition,
        "losses": check_losses,
        "memory": check_memory,
        "training": check_training,
        **speeds,
    }


def check_all(
    setting: Setting, chosen: Mapping[str, Check]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the checks, and print a line for each check and yield its name and its result.

    After a check that fails, the other checks still run.
    """
    for name, check in chosen.items():
        try:
            finding = check(setting)
        except Exception as error:  # A GPU and its libraries may raise any exception.
            text = " ".join(f"{type(error).__name__}: {error}".split())
            finding = Finding("FAILED", text)
        say(f"{finding.status:7}  {name}: {finding.text}")
        yield name, {"status": finding.status, "text": finding.text, **finding.numbers}


def check_apart(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a check in a process of its own, and return its result.

    After an illegal access to the GPU's memory, every later call of the same process fails.
    """
    with tempfile.TemporaryDirectory(prefix="npbn-") as folder:
        file = Path(folder, "check.json")
        options = ("--epochs", str(arguments.epochs), "--seed", str(arguments.seed))
        try:
            for line in lines("check_gpu.py", "--alone", name, *options, "--json", str(file)):
                say(line.rstrip("\n"))
            result: dict[str, Any] = json.loads(file.read_text())["results"][name]
        except NpbnError as error:
            say(f"FAILED   {name}: {error}")
            return {"status": "FAILED", "text": str(error)}
    return result


def write_report(path: str, results: Mapping[str, Any]) -> None:
    report = {"date": datetime.date.today().isoformat(), "results": results}
    try:
        write_file(path, (json.dumps(report, indent=2) + "\n").encode())
    except (OSError, ValueError) as error:
        raise NpbnError(f"{path} cannot be written: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="check_gpu.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(checks(NETWORKS)),
        metavar="NAME",
        help="checks to do, see below (default: all)",
    )
    for name, minimum, default, text in (
        ("--epochs", 1, 1_000, "in which memory may not grow"),
        ("--seed", 0, 0, "of images, labels, initial weights and order"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=integer(minimum), default=default, metavar="N", help=text)
    parser.add_argument(
        "--json", metavar="FILE", help="write every number there as well, after each check"
    )
    parser.add_argument("--alone", choices=tuple(checks(NETWORKS)), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = backend.get_backend("cupy")
    known = checks(NETWORKS)
    if arguments.alone is not None:
        setting = Setting(device, epochs=arguments.epochs, seed=arguments.seed)
        found = check_all(setting, {arguments.alone: known[arguments.alone]})
        write_report(arguments.json, dict(found))
        return
    results: dict[str, Any] = {}
    if arguments.json is not None:
        # This shows before the checks, which take minutes, whether the file can be written.
        write_report(arguments.json, results)
    for name in known:
        if not (name == "card" or arguments.only is None or name in arguments.only):
            continue
        results[name] = check_apart(name, arguments)
        if arguments.json is not None:
            write_report(arguments.json, results)
    if any(result["status"] == "FAILED" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run("check_gpu.py", main)
