"""Compare processes with threads, and with PyTorch's DistributedDataParallel (gloo).

All train network A on the same machine with as many CPUs: one process with N threads, N processes
with one thread each, and N processes of PyTorch, whose batch norm takes the statistics of each
process's own examples (its synchronized batch norm needs GPUs). They take turns. Before, the time
of the messages between the ranks is measured. On a busy machine the numbers say little.

Needs mpi4py with its mpiexec, and PyTorch: pip install -e ".[mpi]" torch
"""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from _machine import about, machine
from _report import print_table, quotients, spread
from npbn import backend
from npbn.data import Split
from npbn.distributed import Group, join
from npbn.engine.cpu import CpuEngine
from npbn.errors import NpbnError
from npbn.models import LeNet
from npbn.optim import SGD

WARMUP, STEPS = 30, 200
MESSAGES = {
    "a flag": (1,),
    "the statistics of a small layer": (32, 16),
    "the statistics of the largest layer": (240, 16),
    "the gradients": (44_878,),
    "x and dy of the linear layers": (209_000,),
}
"""The shapes of some arrays that the ranks share in a step of network A with a batch of 256.

Two-dimensional arrays are float64, and one-dimensional arrays are float32.
"""


def a_split(examples: int) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(examples, 1, 28, 28), dtype=np.uint8)
    return Split(images, rng.integers(10, size=examples))


def npbn_rate(batch_size: int, threads: int, group: Group) -> float:
    """Return the examples in a second of the fused engine."""
    split, model = a_split(20 * batch_size), LeNet(generator=np.random.default_rng(0))
    optimizer = SGD(model.parameters(), 0.1)
    engine = CpuEngine(
        model, optimizer, split, split, batch_size=batch_size, threads=threads, group=group
    )
    order = np.tile(np.arange(len(split)), (WARMUP + STEPS) // 20 + 1)
    for step, _ in enumerate(engine.steps(order[: (WARMUP + STEPS) * batch_size]), 1):
        if step == WARMUP:
            started = time.perf_counter()
    return STEPS * batch_size / (time.perf_counter() - started)


def message_times(group: Group) -> dict[str, float]:
    """Return the time of each of the MESSAGES in µs, the median of many."""
    found = {}
    for name, shape in MESSAGES.items():
        rows = np.zeros(shape, np.float64 if len(shape) > 1 else np.float32)
        rows = rows.T if rows.ndim > 1 else rows
        ends = [len(rows) * r // group.size for r in range(group.size + 1)]
        times = []
        for _ in range(1000):
            started = time.perf_counter()
            group.share(rows, ends)
            times.append(1e6 * (time.perf_counter() - started))
        found[name] = statistics.median(times[100:])
    return found


def ddp_rank(rank: int, size: int, batch_size: int, store: str, found: str) -> None:
    """Train in one of several processes of PyTorch; rank 0 writes the examples in a second."""
    import torch
    import torch.distributed
    from torch.nn.parallel import DistributedDataParallel

    from _pytorch import lenet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    model = DistributedDataParallel(lenet())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    split, own = a_split(20 * batch_size), batch_size // size
    images = torch.from_numpy(split.images).float() / 255
    labels = torch.from_numpy(split.labels)
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            torch.distributed.barrier()
            started = time.perf_counter()
        first = step % 20 * batch_size + rank * own
        loss = torch.nn.functional.cross_entropy(
            model(images[first : first + own]), labels[first : first + own]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.distributed.barrier()
    if rank == 0:  # The clock stops when all ranks are done.
        rate = STEPS * own * size / (time.perf_counter() - started)
        Path(found).write_text(json.dumps(rate))
    torch.distributed.barrier()
    os._exit(0)  # Threads of gloo sometimes abort at an ordinary exit.


def ddp_rate(batch_size: int, size: int) -> float:
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        found = os.path.join(folder, "rate")
        arguments = size, batch_size, os.path.join(folder, "store"), found
        spawn(ddp_rank, arguments, nprocs=size)  # type: ignore[no-untyped-call]
        return float(json.loads(Path(found).read_text()))


def work(what: str, batch_size: int, size: int) -> None:
    """Measure in this process, and print the result as JSON."""
    backend.limit_blas_threads(1)
    group = join()
    result: Any
    if what == "messages":
        result = message_times(group)
    elif what == "ddp":
        result = ddp_rate(batch_size, size)
    else:
        result = npbn_rate(batch_size, size if what == "threads" else 1, group)
    if group.rank == 0:
        print(json.dumps(result))


def measured(what: str, batch_size: int, size: int) -> Any:
    """Run `work` in a process, or in several."""
    command = [sys.executable, __file__, "--batch-size", str(batch_size), "--ranks", str(size)]
    if what in ("messages", "ranks"):
        here = shutil.which("mpiexec", path=os.path.dirname(sys.executable))
        command[:0] = [here or "mpiexec", "-n", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(size if what == "threads" else 1)}
    process = subprocess.run(
        [*command, "--work", what], capture_output=True, text=True, env=environment
    )
    if process.returncode:
        raise NpbnError(f"{what}: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout)


def main() -> None:
    parser = ArgumentParser(prog="benchmark_ranks.py", description=__doc__)
    parser.add_argument("--batch-size", type=integer(2), default=256, metavar="N")
    parser.add_argument("--ranks", type=integer(2), default=2, metavar="N", help="default: 2")
    parser.add_argument("--rounds", type=integer(1), default=5, metavar="N", help="default: 5")
    parser.add_argument("--work", help="for the program's own use")
    arguments = parser.parse_args()
    size, batch_size = arguments.ranks, arguments.batch_size
    if arguments.work:
        work(arguments.work, batch_size, size)
        return
    for module in ("mpi4py", "torch"):
        if importlib.util.find_spec(module) is None:
            raise NpbnError(f"{module} is not installed: pip install {module}")
    kinds = {
        "one": "1 process, 1 thread",
        "threads": f"1 process, {size} threads",
        "ranks": f"{size} processes, 1 thread each",
        "ddp": f"PyTorch DDP (gloo), {size} processes",
    }
    say(f"{about(machine())}\n\nbatches of {batch_size}")
    rows = [["what the ranks share", "bytes", "µs"]]
    for name, found in measured("messages", batch_size, size).items():
        shape = MESSAGES[name]
        numbers = f"{int(np.prod(shape)) * (8 if len(shape) > 1 else 4):,}"
        rows.append([name, numbers, f"{found:.1f}"])
    print_table(rows)
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, found in rates.items():
            found.append(measured(kind, batch_size, size))
    rows = [["", "examples/s", "ratio to threads"]]
    for kind, name in kinds.items():
        ratios = quotients(rates[kind], rates["threads"])
        rows.append([name, spread(rates[kind], ",.0f"), spread(ratios, ".2f")])
    print_table(rows)


if __name__ == "__main__":
    run("benchmark_ranks.py", main)
