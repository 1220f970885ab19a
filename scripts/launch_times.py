"""Time every launch of the fused engine in a training step of network A on the CPU.

Each launch is compared with the time that its multiplications and additions take at the processor's
peak, which is measured in the same run. On a busy machine the numbers say little.
"""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import math
import statistics
import time

import numpy as np

from _cpu_rates import Peaks
from _machine import about, machine
from npbn import backend
from npbn.data import Split
from npbn.engine.cpu import CpuEngine, launches
from npbn.models import LeNet
from npbn.optim import SGD


def main() -> None:
    parser = ArgumentParser(prog="launch_times.py", description=__doc__)
    parser.add_argument("--batch-size", type=integer(2), default=256, metavar="N")
    parser.add_argument("--threads", type=integer(1), metavar="N", help="default: all CPUs")
    parser.add_argument("--rounds", type=integer(1), default=50, metavar="N", help="default: 50")
    arguments = parser.parse_args()
    rng, n = np.random.default_rng(0), arguments.batch_size
    images = rng.integers(256, size=(n, 1, 28, 28), dtype=np.uint8)
    split = Split(images, rng.integers(10, size=n))
    model = LeNet(generator=rng)
    engine = CpuEngine(
        model,
        SGD(model.parameters(), 0.1),
        split,
        split,
        batch_size=n,
        threads=arguments.threads,
        report=say,
    )
    peak = max(Peaks().measure(engine.threads).values())
    backend.limit_blas_threads(1)
    # Each launch is called separately, in the order of a step. The last call launches nothing: its
    # time is the overhead of a call.
    program = np.concatenate([engine.training_program, engine.prediction_program[1:]])
    calls = [*np.split(program, len(program)), program[:0]]
    rounds: list[list[float]] = []
    for _ in range(arguments.rounds + 1):
        rounds.append([])
        for call in calls:
            started = time.perf_counter()
            engine.execute(call, split, np.arange(n))
            rounds[-1].append(time.perf_counter() - started)
    *seconds, call_alone = (statistics.median(times) for times in zip(*rounds[1:], strict=True))

    say(f"{about(machine())}\n")
    say(f"batches of {n}, {engine.threads} threads, {peak / 1e9:.0f} GFLOP/s at most\n")
    say("| launch | stage | ms | ms at the peak | % of the peak |")
    say("| --- | --: | --: | --: | --: |")
    step = step_at_peak = 0.0
    for (kernel, k), found in zip(program.tolist(), seconds, strict=True):
        taken = 1e3 * max(0, found - call_alone)
        at_peak = 1e3 * operations(engine, kernel, k, n) / peak
        stage = k + 1 if kernel in (launches.FORWARD, launches.BACKWARD) else ""
        percent = f"{100 * at_peak / taken:.0f}" if at_peak and taken else ""
        name = launches.KERNELS[kernel].lower()
        say(f"| {name} | {stage} | {taken:.3f} | {at_peak:.3f} | {percent} |")
        if kernel != launches.PREDICT:
            step, step_at_peak = step + taken, step_at_peak + at_peak
    percent = f"{100 * step_at_peak / step:.0f}"
    say(f"\na step: {step:.2f} ms, {1e3 * n / step:,.0f} examples/s, {percent} % of the peak")
    say(f"a prediction: {taken:.2f} ms, {1e3 * n / taken:,.0f} examples/s")


def operations(engine: CpuEngine, kernel: int, k: int, examples: int) -> int:
    """Return the number of multiplications and additions in a launch's products."""
    products = [
        2 * examples * math.prod(stage.maps) * int(record["taps"])
        for stage, record in zip(engine.stages, engine.net.stages, strict=False)
    ]
    linear = [stage.linear for stage in engine.stages]
    if kernel == launches.FORWARD:
        return products[k]
    if (
        kernel == launches.BACKWARD
    ):  # This is dx, except in the first stage, and the dW of a convolution.
        return products[k] * ((k > 0) + (not linear[k]))
    if kernel == launches.WEIGHTS:  # This is the dW of the linear layers.
        return sum(count for count, one in zip(products, linear, strict=True) if one)
    return sum(products) if kernel == launches.PREDICT else 0


if __name__ == "__main__":
    run("launch_times.py", main)
