"""Check what the GPU engine promises, but for its speed beside PyTorch, on this machine's GPU."""

from __future__ import annotations

from _command_line import ArgumentParser, check_installation, integer, run, say

check_installation()

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

import npbn
from npbn import backend, training
from npbn.backend import Backend, to_numpy
from npbn.checkpoint import write_file
from npbn.data import Split
from npbn.engine.cupy_stages import CupyEngine
from npbn.errors import NpbnError
from npbn.layers import Sequential
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD

EPILOG = """\
Data are random images, so none have to be there. Every check is a line: ok or FAILED, and what was
found. Times are printed, and fail nothing. How fast npbn is beside PyTorch, on the same GPU, is for
scripts/benchmark.py --backend cupy.

exit codes: 0 all ok, 1 something failed, 2 bad input or no GPU to be used, 130 interrupted
"""

BOUNDS = {"float32": 1e-4, "float64": 1e-9}
"""On errors, as fractions of the largest number of their kind."""

LOSS_BOUND = 2e-3
MEMORY_BOUND = 16 * 2**20
"""On what the whole GPU may have less free afterwards, in bytes: others may use it, too."""

LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Setting:
    """The device and the sizes of what is computed on it."""

    device: Backend
    networks: Mapping[str, Callable[..., Sequential]] = field(
        default_factory=lambda: {"LeNet": LeNet, "BLeNet": BLeNet}
    )
    shape: tuple[int, int, int] = (1, 28, 28)
    classes: int = 10
    batch_size: int = 256
    examples: int = 60_000
    tested: int = 10_000
    few: int = 2_600  # ten batches and a smaller one
    steps: int = 100
    epochs: int = 1_000  # in which memory may not grow
    timed_epochs: int = 10
    seed: int = 0

    def split(self, examples: int, device: Backend, seed: int) -> Split:
        """Random images with random labels."""
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
    ) -> tuple[Sequential, CupyEngine]:
        """On training data of so many examples; the first network unless named."""
        model = self.model(name or next(iter(self.networks)), self.device, dtype)
        train, test = self.split(examples, self.device, 1), self.split(self.tested, self.device, 2)
        optimizer = SGD(model.parameters(), LEARNING_RATE)
        return model, CupyEngine(model, optimizer, train, test, batch_size=self.batch_size)

    def layers(
        self, examples: int, device: Backend, name: str | None = None, dtype: str = "float32"
    ) -> training.Training:
        """The same by the layers."""
        model = self.model(name or next(iter(self.networks)), device, dtype)
        split = self.split(examples, device, 1)
        return training.Training(
            model,
            SGD(model.parameters(), LEARNING_RATE),
            split,
            split,
            batch_size=self.batch_size,
            generator=np.random.default_rng(self.seed),
            backend=device,
            dtype=dtype,
        )


@dataclass(frozen=True)
class Finding:
    """What a check found: a line for people, and numbers for programs."""

    ok: bool
    text: str
    numbers: Mapping[str, Any]


def check_card(setting: Setting) -> Finding:
    import cupy

    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    driver = cupy.cuda.runtime.driverGetVersion()
    numbers = {
        "description": setting.device.description,
        "compute_capability": device.compute_capability,
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
        "numpy": np.__version__,
        "npbn": npbn.__version__,
    }
    text = (
        "{description}; sm_{compute_capability}, {multiprocessors} multiprocessors, "
        "driver for CUDA {driver_cuda}, npbn {npbn}, NumPy {numpy}"
    )
    return Finding(True, text.format(**numbers), numbers)


def check_step(setting: Setting, name: str, dtype: str) -> Finding:
    """A step by the engine against one by the layers on the CPU, and evaluation after it."""
    cpu = backend.get_backend("numpy")
    model, engine = setting.engine(setting.few, name, dtype)
    layers = setting.layers(setting.few, cpu, name, dtype)
    batch = np.random.default_rng(setting.seed).permutation(setting.few)[: setting.batch_size]
    losses, _ = engine.train(batch)
    loss, _ = layers.step(batch)
    tested = setting.split(setting.tested, cpu, 2)
    right_test = training.evaluate(layers.model, tested, backend=cpu, dtype=dtype)
    found, right = (
        {name: to_numpy(p.gradient) for name, p in m.parameters().items()}
        for m in (model, layers.model)
    )
    numbers = {
        "gradients": difference(found, right),
        "state": difference(model.state_dict(), layers.model.state_dict()),
        "loss": abs(float(losses[0]) - float(loss)),
        "test_loss": abs(engine.evaluate()[0] - right_test.loss),
    }
    text = (
        "largest error of the gradients {gradients:.1e}, of parameters and averages {state:.1e}, "
        f"of the loss {{loss:.1e}}, of the loss on test data {{test_loss:.1e}} "
        f"(bound {BOUNDS[dtype]:.0e})"
    )
    ok = all(error <= BOUNDS[dtype] for error in numbers.values())  # NaN is not
    return Finding(ok, text.format(**numbers), numbers)


def difference(found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> float:
    """The largest, as a fraction of the largest number."""
    largest = max(np.max(np.abs(value)) for value in right.values())
    # np.max hands NaN on, where Python's max need not.
    errors = [np.max(np.abs(found[name] - value)) for name, value in right.items()]
    return float(np.max(errors) / largest)


def check_repetition(setting: Setting) -> Finding:
    """Two runs of a seed over two epochs."""
    runs = []
    for _ in range(2):
        model, engine = setting.engine(setting.examples)
        order = np.random.default_rng(setting.seed)
        found: list[Any] = []
        for _ in range(2):
            found += engine.train(order.permutation(setting.examples))
            found += engine.evaluate()
        runs.append([np.asarray(part).tobytes() for part in (*found, *model.state_dict().values())])
    differ = sum(a != b for a, b in zip(*runs, strict=True))
    text = f"losses, accuracies and weights of two runs differ in {differ} of {len(runs[0])} parts"
    return Finding(differ == 0, text, {"different_parts": differ})


def check_losses(setting: Setting) -> Finding:
    """The first losses by the engine, and by the layers on the GPU, against those on the CPU."""
    count, size = setting.steps * setting.batch_size, setting.batch_size
    order = np.random.default_rng(setting.seed).permutation(count)
    _, engine = setting.engine(count)
    losses, _ = engine.train(order)
    by_layers = []
    for device in (setting.device, backend.get_backend("numpy")):
        layers = setting.layers(count, device)
        steps = (layers.step(order[i : i + size])[0] for i in range(0, count, size))
        by_layers.append(np.array([float(loss) for loss in steps]))
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
    return Finding(ok, text.format(**numbers), numbers)


def check_memory(setting: Setting) -> Finding:
    """Epochs of a small set, with evaluation."""
    import cupy

    _, engine = setting.engine(setting.few)
    order = np.random.default_rng(setting.seed)

    def used_after(epochs: int) -> tuple[int, int]:
        """By CuPy's arrays; and by all on the GPU, from its whole memory and what is free."""
        for _ in range(epochs):
            engine.train(order.permutation(setting.few))
            engine.evaluate()
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
    return Finding(arrays <= 0 and whole <= MEMORY_BOUND, text, numbers)


def check_time(setting: Setting) -> Finding:
    """Epochs with evaluation, after one that compiles kernels and captures graphs."""
    started = time.perf_counter()
    _, engine = setting.engine(setting.examples)
    order = np.random.default_rng(setting.seed)

    def epoch() -> float:
        """Both calls end by reading results, and so wait for the GPU."""
        start = time.perf_counter()
        engine.train(order.permutation(setting.examples))
        engine.evaluate()
        return time.perf_counter() - start

    epoch()
    setup = time.perf_counter() - started
    seconds = [epoch() for _ in range(setting.timed_epochs)]
    text = (
        f"{setting.timed_epochs} epochs of {setting.examples:,} images with evaluation: "
        f"{sum(seconds):.2f} s (target: 10 of 60,000 in under 2 s); before them, {setup:.1f} s"
    )
    return Finding(True, text, {"epochs_seconds": seconds, "setup_seconds": setup})


def checks(setting: Setting) -> dict[str, Callable[[], Finding]]:
    """By name."""
    steps = {
        f"a step of {name}, {dtype}": partial(check_step, setting, name, dtype)
        for name in setting.networks
        for dtype in BOUNDS
    }
    return {
        "card": partial(check_card, setting),
        **steps,
        "repetition": partial(check_repetition, setting),
        "first losses": partial(check_losses, setting),
        "time": partial(check_time, setting),
        "memory": partial(check_memory, setting),
    }


def check_all(setting: Setting) -> dict[str, dict[str, Any]]:
    """Print a line for each check as it ends; all findings. A failed one does not stop the rest."""
    results = {}
    for name, check in checks(setting).items():
        try:
            finding = check()
        except Exception as error:  # whatever a GPU or its libraries come up with
            text = " ".join(f"{type(error).__name__}: {error}".split())
            finding = Finding(False, text, {})
        say(f"{'ok' if finding.ok else 'FAILED':6}  {name}: {finding.text}")
        results[name] = {"ok": finding.ok, "text": finding.text, **finding.numbers}
    return results


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="check_gpu.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, minimum, default, text in (
        ("--epochs", 1, 1_000, "in which memory may not grow"),
        ("--seed", 0, 0, "of images, labels, initial weights and order"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=integer(minimum), default=default, metavar="N", help=text)
    parser.add_argument("--json", metavar="FILE", help="write every number there, too")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = backend.get_backend("cupy")
    results = check_all(Setting(device, epochs=arguments.epochs, seed=arguments.seed))
    if arguments.json is not None:
        report = {"date": datetime.date.today().isoformat(), "results": results}
        try:
            write_file(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
        except (OSError, ValueError) as error:
            raise NpbnError(f"{arguments.json} cannot be written: {error}") from None
    if not all(result["ok"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    run("check_gpu.py", main)
