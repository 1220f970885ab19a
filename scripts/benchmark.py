"""Measure how fast npbn trains and evaluates LeNet with batch norm, compared with PyTorch."""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import argparse
import contextlib
import dataclasses
import importlib.util
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
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from _contestants import (
    EVALUATION_BATCH_SIZE,
    IMAGE,
    NETWORKS,
    TASKS,
    Settings,
    npbn_model,
    serve,
    serve_peaks,
)
from _cpu_rates import fastest_way, training_operations
from _gpu_rates import card_rates
from _machine import about, machine
from _report import check_writable, print_table, quotients, save, spread
from npbn import backend, plots
from npbn.errors import NpbnError

EPILOG = """\
Every contestant runs in its own process. They take turns, in a new order each round, and the
ratio is taken within each round. The tables show medians, with the smallest and the largest value
in brackets. scripts/benchmark.md says more.

contestants:
  layers          npbn's layers
  engine          npbn's fused engine, of the CPU or the GPU
  eager           PyTorch as it comes; always there, for the ratios
  eager-malloc    the same, with the C library's memory allocator set as npbn's programs set it
  compile         PyTorch with torch.compile, which needs a C++ compiler; on a GPU, max-autotune
  compile-malloc  the same, with that allocator
  graph           PyTorch eager, the training step captured with torch.cuda.graph; on a GPU only
  by-hand         PyTorch eager, with batch norm written in elementary operations
  jax             JAX, the whole step in jax.jit
  onnx            ONNX Runtime, which only evaluates; on the CPU only

examples:
  python scripts/benchmark.py                      on the CPU, with all cores
  python scripts/benchmark.py --contestants layers engine
  python scripts/benchmark.py --model wide --batch-size 32 256 4096 --threads 1 2
  python scripts/benchmark.py --backend cupy       on a GPU, against PyTorch there
  python scripts/benchmark.py --backend cupy --batch-size 64 256 1024 8192 --json gpu.json
  python scripts/benchmark.py --quick --json results.json --chart results.png

exit codes: 0 measured, 2 bad input or something missing on this machine, 130 interrupted
"""

SMALLEST_BATCH = 16  # In smaller batches, batch norm magnifies rounding errors; see check_losses.
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
    "onnx": "ONNX Runtime",
}
BASELINE = "eager"
NEEDED_TO_COUNT = {
    "numpy": ("eager", "eager-malloc", "compile", "compile-malloc", "onnx"),
    "cupy": ("eager", "compile", "graph"),
}
ELSEWHERE = {"numpy": ("graph",), "cupy": ("eager-malloc", "compile-malloc", "jax", "onnx")}
TUNED_MALLOC = {  # glibc's names of the settings that npbn.backend.keep_freed_memory makes
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
PEAKS = "peaks"
"""The name of the worker that measures the peak of the CPU, and is not a contestant."""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="benchmark.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--worker", choices=(*CONTESTANTS, PEAKS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        default=list(CONTESTANTS),
        metavar="NAME",
        help="contestants, see below (default: all)",
    )
    networks = "lenet, network A; blenet, network B; or wide, network A with 4 times the maps"
    for name, choices, text in (
        ("--model", tuple(NETWORKS), networks),
        ("--backend", ("numpy", "cupy"), "numpy, all on the CPU; or cupy, all on the GPU"),
    ):
        text += f" (default: {choices[0]})"
        parser.add_argument(name, choices=choices, default=choices[0], help=text)
    for name, minimum, default, text in (
        ("--threads", 1, backend.usable_cpus(), "that each library computes with, on the CPU"),
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
    parser.add_argument("--json", metavar="FILE", help="write every value there as well")
    parser.add_argument("--chart", metavar="FILE.png", help="draw the ratios there as well")
    arguments = parser.parse_args()
    # On the CPU, the number of Fashion-MNIST's test images. A GPU processes these in milliseconds,
    # so on a GPU this is the number of Fashion-MNIST's training images.
    arguments.images = 10_000 if arguments.backend == "numpy" else 60_000
    if arguments.quick:
        arguments.images, arguments.rounds = 1_000, 3
    if max(arguments.batch_size) > arguments.images:
        parser.error(f"expected batches of at most {arguments.images:,} images")
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings of a worker, for one number of threads and one batch size."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(arguments, name) for name in names})


class Worker:
    """A process that runs a contestant or measures the peak, with its stderr in a file."""

    def __init__(
        self, name: str, arguments: argparse.Namespace, caches: str, stderr: IO[bytes]
    ) -> None:
        self.title = CONTESTANTS.get(name, name)
        self.stderr = stderr
        self.tasks: list[str] = []
        # Code compiled in earlier runs would make the time to the first step meaningless.
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
        with contextlib.suppress(OSError):  # If the process has died, `answer` raises the error.
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
        self.process.communicate()  # This closes the pipes and waits for the end.


def check_libraries() -> None:
    """Raise an error of one line if a library that every comparison needs is not installed."""
    missing = [name for name in ("torch", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        install = "in npbn's directory: pip install -e '.[benchmark]'"
        raise NpbnError(f"not installed: {', '.join(missing)}; {install}")


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure with each number of threads and batch size; print tables, return values."""
    check_libraries()
    comparisons = []
    for threads, batch_size in itertools.product(arguments.threads, arguments.batch_size):
        one = argparse.Namespace(**vars(arguments))
        one.threads, one.batch_size = threads, batch_size
        say("")
        say(heading(vars(one)))
        results, peaks = compare_one(one)
        layers = [layer for r in results.values() if (layer := r.get("threading_layer"))]
        where = machine() | {"threading_layer": layers[0] if layers else None}
        say("")
        say(about(where))
        print_results(results)
        least = print_floor(one, results, peaks)
        comparisons.append(
            {
                "threads": threads,
                "batch_size": batch_size,
                "machine": where,
                "floor": least,
                "results": results,
            }
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
        say(
            "This run counts: PyTorch eager and torch.compile, each with and without malloc tuned, "
            "and ONNX Runtime took part."
        )
    else:
        say("This run counts: PyTorch eager, torch.compile and torch.cuda.graph took part.")
    return comparisons


def heading(comparison: Mapping[str, Any]) -> str:
    threads = comparison["threads"]
    return f"batches of {comparison['batch_size']:,}, {count(threads, 'thread')}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


Results = dict[str, dict[str, Any]]
"""For the title of each contestant, its description and the values that were measured by task."""

Peaks = dict[int, list[dict[str, float]]]
"""For each number of threads, the operations per second in each round, in each way."""


def compare_one(arguments: argparse.Namespace) -> tuple[Results, Peaks]:
    """Return every value of each contestant, with one number of threads and one batch size."""
    results: Results = {}
    peaks: Peaks = {}
    with contextlib.ExitStack() as stack:

        def started(name: str) -> Worker:
            stderr = stack.enter_context(tempfile.TemporaryFile())  # A pipe could fill up.
            caches = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="npbn-", ignore_cleanup_errors=True)
            )
            worker = Worker(name, arguments, caches, stderr)
            stack.callback(worker.close)
            return worker

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
            start = time.perf_counter()
            worker = started(name)
            try:
                introduction = worker.answer()
            except NpbnError as error:
                if name in ("layers", BASELINE):
                    raise
                say(f"left out: {error}")
                continue
            seconds = time.perf_counter() - start
            say(f"{title}: {introduction['description']}")
            worker.tasks = introduction["tasks"]
            workers.append(worker)
            results[title] = {
                "description": introduction["description"],
                "threading_layer": introduction["threading_layer"],
                "first_step_seconds": seconds if "train" in worker.tasks else None,
            }
        peak = None
        if arguments.backend == "numpy":
            peak = started(PEAKS)
            peak.answer()
            peaks.update({threads: [] for threads in sorted({1, arguments.threads})})
        sizes = dict.fromkeys(("train", "epoch"), arguments.batch_size)
        sizes["evaluate"] = EVALUATION_BATCH_SIZE
        take_turns(workers, arguments, sizes, results, peak, peaks)
        for worker in workers:
            results[worker.title]["peak_resident_bytes"] = worker.ask(task="peak memory")["bytes"]
        # This task comes last because it needs the most memory, which an allocator may keep.
        take_turns(workers, arguments, {"evaluate at once": arguments.images}, results)
    return results, peaks


def take_turns(
    workers: list[Worker],
    arguments: argparse.Namespace,
    sizes: Mapping[str, int],
    results: Results,
    peak: Worker | None = None,
    peaks: Peaks | None = None,
) -> None:
    """Measure the workers in turns, in several rounds, and add the values to ``results``.

    In each round, the worker ``peak`` also measures the CPU's peak with each number of threads in
    ``peaks``. ``sizes`` has the tasks to measure, with the batch size of each task.
    """
    order = random.Random(arguments.seed)
    quiet = sys.stderr is None or not sys.stderr.isatty()
    rounds = range(arguments.rounds + 1)
    for number in tqdm(rounds, unit=" rounds", leave=False, disable=quiet):
        for task, batch_size in sizes.items():
            turns = [worker for worker in workers if task in worker.tasks]
            order.shuffle(turns)
            sums = {}
            for worker in turns:
                answer = worker.ask(task=task, batch_size=batch_size)
                sums[worker.title] = answer["sum"]
                values = results[worker.title].setdefault(task, [])
                if number > 0:  # Round 0 is a warm-up.
                    values.append(answer["examples_per_second"])
            if task == "train" and number == 0:
                check_losses(sums)
        for threads, rates in (peaks or {}).items():
            assert peak is not None
            answer = peak.ask(threads=threads)
            if number > 0:
                rates.append(answer)


def print_results(results: Results) -> None:
    speeds = [["examples/s", *TASKS]]
    others = [["ratio", *TASKS, "first step", "MB"]]
    for title, result in results.items():
        measured = [task in result for task in TASKS]
        tasks = list(zip(TASKS, measured, strict=True))
        speeds.append([title, *(spread(result[t], ",.0f") if m else "-" for t, m in tasks)])
        cells = [spread(ratios(results, title, t), ".2f") if m else "-" for t, m in tasks]
        seconds, size = result["first_step_seconds"], result["peak_resident_bytes"]
        cells += ["-" if seconds is None else f"{seconds:.1f}", f"{size / 1e6:,.0f}"]
        others.append([title, *cells])
    print_table(speeds)
    print_table(others)
    engine = results.get(CONTESTANTS["engine"])
    if engine is None:
        return
    parts = []
    for task in TASKS:
        title, peer = fastest_peer(results, task)
        parts.append(f"{task} {spread(quotients(engine[task], peer[task]), '.2f')} ({title})")
    say("")
    say(f"{CONTESTANTS['engine']}, as a ratio to the fastest peer: {'; '.join(parts)}.")


def fastest_peer(results: Results, task: str) -> tuple[str, dict[str, Any]]:
    """Return the contestant with the highest median, npbn's excluded, and its results."""
    peers = [(t, r) for t, r in results.items() if not t.startswith("npbn") and task in r]
    return max(peers, key=lambda peer: statistics.median(peer[1][task]))


def print_floor(
    arguments: argparse.Namespace, results: Results, peaks: Peaks
) -> dict[str, Any] | None:
    """Print and return the floor, which is the least time that a training step can take.

    On a CPU, the floor is the time that the layers' products take at peak speed, which is measured
    in the same rounds. On a GPU, the floor is the longer of two times: that of the products at the
    rate computed from the card's clocks, and that of the memory traffic. This function also prints
    the speed of each contestant: on a CPU as a percentage of the floor, on a GPU in microseconds a
    step.
    """
    say("")
    if arguments.backend == "numpy":
        return print_cpu_floor(arguments, results, peaks)
    times = {
        title: arguments.batch_size / statistics.median(result["train"]) * 1e6
        for title, result in results.items()
    }
    parts = ", ".join(f"{title} {time:,.1f}" for title, time in times.items())
    say(f"Microseconds a step: {parts}.")
    if CONTESTANTS["engine"] not in results:  # card_rates needs CuPy, and so does the engine.
        return None
    least = gpu_floor(arguments)
    say(
        "Floor: {microseconds:,.1f}, for {operations:.3g} operations in float32 at "
        "{operations_per_second:.3g} a second, and {bytes:.3g} bytes at "
        "{bytes_per_second:.3g}, by the card's clocks.".format(**least)
    )
    return least


def print_cpu_floor(
    arguments: argparse.Namespace, results: Results, peaks: Peaks
) -> dict[str, Any]:
    batch_size, threads = arguments.batch_size, arguments.threads
    operations = training_operations(npbn_model(settings_of(arguments)), IMAGE, batch_size)
    for number, rates in peaks.items():
        ways = {way: [rate[way] / 1e9 for rate in rates] for way in rates[0]}
        texts = (f"{way} {spread(values, '.1f')}" for way, values in ways.items())
        say(f"GFLOP/s in float32, {count(number, 'thread')}: {', '.join(texts)}.")
    way = fastest_way(peaks[threads])
    rounds = [rate[way] for rate in peaks[threads]]
    rate = statistics.median(rounds)
    say(
        f"Floor: {operations / rate * 1e6:,.0f} microseconds a step of {batch_size:,}, for "
        f"{operations / 1e6:,.0f} million operations at {rate / 1e9:.1f} GFLOP/s ({way}, "
        f"{count(threads, 'thread')})."
    )
    percent = {
        title: [
            100 * speed * operations / batch_size / peak
            for speed, peak in zip(result["train"], rounds, strict=True)
        ]
        for title, result in results.items()
        if "train" in result
    }
    parts = ", ".join(f"{title} {spread(values, '.0f')}" for title, values in percent.items())
    say(f"Training, % of the floor: {parts}.")
    return {
        "microseconds": operations / rate * 1e6,
        "operations": operations,
        "operations_per_second": rate,
        "way": way,
        "peaks": peaks,
        "percent": percent,
    }


def gpu_floor(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the least time of a training step on this GPU, and how it is computed.

    Two times are computed. The first is the time that the operations of the matrix products take.
    The second is the time that the memory traffic takes: in each step, the pixels are read, and the
    parameters and moving averages are read and written. The least time is the longer of the two.
    """
    model = npbn_model(settings_of(arguments))
    n = arguments.batch_size
    operations = training_operations(model, IMAGE, n)
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


def ratios(results: Results, title: str, task: str) -> list[float]:
    """Return the ratio of a contestant's speed to PyTorch eager's speed in each round."""
    return quotients(results[title][task], results[CONTESTANTS[BASELINE]][task])


def draw(comparisons: list[dict[str, Any]], title: str) -> bytes:
    """Return a PNG of the ratios, with a row of panels for each comparison.

    Each row has a panel for each task.
    """
    from matplotlib.figure import Figure

    titles = list(comparisons[0]["results"])[::-1]  # The first contestant is at the top.
    height = 1.2 + len(comparisons) * (1.0 + 0.32 * len(titles))
    figure = Figure(figsize=(14, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    grid = figure.subplots(len(comparisons), len(TASKS), sharey=True, squeeze=False)
    for row, comparison in zip(grid, comparisons, strict=True):
        for axes, task in zip(row, TASKS, strict=True):
            results = comparison["results"]
            for place, name in enumerate(titles):
                if task not in results.get(name, {}):
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
    # Rounding errors stay below this tolerance. A different model, different data or a different
    # training step would exceed the tolerance.
    expected = sums[CONTESTANTS[BASELINE]]
    if not all(math.isclose(value, expected, rel_tol=1e-3) for value in sums.values()):
        found = ", ".join(f"{name}: {value:.6g}" for name, value in sums.items())
        raise NpbnError(f"the contestants do not compute the same; sums of their losses: {found}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        (arguments.threads,), (arguments.batch_size,) = arguments.threads, arguments.batch_size
        settings = settings_of(arguments)
        (serve_peaks if settings.worker == PEAKS else serve)(settings)
        return

    json_path, chart_path = (
        None if name is None else Path(os.path.realpath(name))
        for name in (arguments.json, arguments.chart)
    )
    for path in filter(None, (json_path, chart_path)):
        check_writable(path)
    if chart_path is not None:
        plots.check_matplotlib()
    results = compare(arguments)
    if json_path is not None:
        report = {"machine": machine(), "options": vars(arguments), "results": results}
        save(json_path, (json.dumps(report, indent=2) + "\n").encode())
    if chart_path is not None:
        title = f"npbn's benchmark, --model {arguments.model}"
        save(
            chart_path,
            draw(results, f"{title}\n{textwrap.fill(about(results[0]['machine']), 150)}"),
        )


if __name__ == "__main__":
    run("benchmark.py", main)
