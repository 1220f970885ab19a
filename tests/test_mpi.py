"""Training by several processes that MPI connects: equal bits, stopping, resuming, and failures.

They need mpi4py and an mpiexec that belongs to it: ``pip install -e ".[mpi]"``. `engine.test_ranks`
tests the same mathematics without MPI.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import SCRIPTS, assert_refused, run
from npbn.checkpoint import load_checkpoint

MPIEXEC = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and its mpiexec: pip install mpi4py mpich",
)
TRAIN = ("--dataset", "digits", "--batch-size", "100", "--threads", "1")
LIMIT = 300


def mpi(
    size: int, *arguments: str, cwd: Path, prelude: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``mpiexec -n SIZE python scripts/train.py ARGUMENTS``; see `commands.run` for ``prelude``."""
    with start(size, *arguments, cwd=cwd, prelude=prelude, env=env) as process:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(
    size: int, *arguments: str, cwd: Path, prelude: str = "", env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    program = (
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv[0] = 'train.py'\n"
        f"RANK = int(os.environ['PMI_RANK'])\n{prelude}\n"
        f"runpy.run_path({str(SCRIPTS / 'train.py')!r}, run_name='__main__')"
    )
    return subprocess.Popen(
        [MPIEXEC, "-n", str(size), sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def at_step(step: int, rank: int, action: str) -> str:
    """A prelude: one rank does something after so many batches of training."""
    return f"""
from npbn.training import Training
def train(self, max_steps, on_batch, original=Training._train):
    def watched(examples):
        on_batch(examples)
        if RANK == {rank} and self.optimizer.steps == {step}:
            print("now", file=sys.stderr, flush=True)
            {action}
    return original(self, max_steps, watched)
Training._train = train
"""


def arrays(run: Path) -> dict[str, bytes]:
    return {
        name: array.tobytes()
        for name, array in load_checkpoint(run / "last.safetensors")[0].items()
    }


def without_times(output: str) -> list[str]:
    """Return the lines of a training without its speed, its times and those of the compiler."""
    output = re.sub(r"[\d,]+ examples/s in .*", "", output)
    lines = [re.sub(r" +[\d,]+$", "", line) for line in output.splitlines()]
    return [line for line in lines if not line.startswith("compil")]


@needs_mpi
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_group_and_equal_bits(size, tmp_path):
    program = Path(__file__).parent / "mpi_cases.py"
    command = [MPIEXEC, "-n", str(size), sys.executable, str(program)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{size} ranks: all well\n"


@needs_mpi
def test_the_output_and_the_run_are_those_of_one_process(tmp_path):
    """In a run of 2 epochs, of which the second is resumed by other numbers of ranks."""
    options = (*TRAIN[:-2], "--momentum", "0.9", "--lr", "0.1", "--precise-bn", "--run", "run")
    found = []
    for folder, first, second in (("one", 0, 0), ("four", 4, 3), ("two", 2, 0)):
        cwd = tmp_path / folder
        cwd.mkdir()
        outputs = []
        for size, words in (
            (first, (*options, "--epochs", "1")),
            (second, ("--resume", "run", "--epochs", "2")),
        ):
            process = mpi(size, *words, cwd=cwd) if size else run("train.py", *words, cwd=cwd)
            assert process.returncode == 0 and not process.stderr, process.stderr
            lines = without_times(process.stdout)
            assert (f"{size} processes on 1 machine" in process.stdout) == (size > 0)
            # The one line that tells of processes and threads.
            said = r" on \d threads?(, \d processes on 1 machine \(.*\))?$"
            outputs.append([re.sub(said, "", line) for line in lines])
        files = {path.name for path in (cwd / "run").iterdir()}
        config = json.loads((cwd / "run" / "config.json").read_text())
        found.append((outputs, arrays(cwd / "run"), files, config))
    assert found[0] == found[1] == found[2]


@needs_mpi
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_all_after_one_batch(name, code, tmp_path):
    """The signal goes to one rank, or to mpiexec, as Ctrl-C and a scheduler do."""
    options = (*TRAIN, "--epochs", "2", "--run", "run")
    process = mpi(
        3, *options, cwd=tmp_path, prelude=at_step(20, 1, f"os.kill(os.getpid(), signal.{name})")
    )
    assert process.returncode == code, process.stderr
    said = "interrupted" if name == "SIGINT" else "stopped by SIGTERM"
    assert process.stderr.split("\n") == ["now", "", f"train.py: {said}", ""]
    # The other ranks have begun the next batch when they learn of it, or not: either is right.
    assert re.search("stopped after step 2[01]; to go on: ", process.stdout)
    assert mpi(2, "--resume", "run", cwd=tmp_path).returncode == 0
    whole = run("train.py", *options[:-1], "whole", cwd=tmp_path)
    assert whole.returncode == 0 and arrays(tmp_path / "run") == arrays(tmp_path / "whole")

    endless = (*TRAIN, "--epochs", "9999", "--run", "other")
    with start(2, *endless, cwd=tmp_path) as started:
        while not next(started.stdout).startswith("    1 "):
            pass
        started.send_signal(getattr(signal, name))
        out, err = started.communicate(timeout=LIMIT)
    assert started.returncode == code, err
    assert "to go on: " in out and err == f"\ntrain.py: {said}\n"


FAILURES = {
    "killed": "os.kill(os.getpid(), 9)",
    "exception": "raise ZeroDivisionError('in one rank')",
    "exit": "sys.exit(0)",
    "error": "from npbn.errors import DataError; raise DataError('in one rank')",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
SAID = {
    "killed": "EXIT CODE: 9",
    "exception": "ZeroDivisionError: in one rank",
    "exit": "rank 1 on",
    "error": "rank 1 on",
    "stopped": "in share",
}


@needs_mpi
@pytest.mark.parametrize("kind", FAILURES)
def test_one_rank_fails_and_all_end(kind, tmp_path):
    """In the second epoch: the checkpoint of the first one is whole, and goes on."""
    options = (*TRAIN, "--epochs", "2", "--run", "run")
    prelude = at_step(20, 1, FAILURES[kind])
    with start(3, *options, cwd=tmp_path, prelude=prelude, env={"NPBN_WATCHDOG": "5"}) as process:
        while process.stderr.readline() != "now\n":
            assert process.poll() is None
        since = time.monotonic()
        out, err = process.communicate(timeout=LIMIT)
        took = time.monotonic() - since
    assert process.returncode not in (0, None)
    assert SAID[kind] in out + err
    if kind == "killed":  # mpiexec names the first PID whose end it notices.
        pid = re.search(r"PID (\d+) RUNNING AT", out + err)
        assert pid is not None and re.search(rf"rank \d is {pid[1]}\b", out)
    assert took < 60  # It takes a second, or the watchdog's 5; this machine may be busy.
    assert run("train.py", "--resume", "run", cwd=tmp_path).returncode == 0
    whole = run("train.py", *options[:-1], "whole", cwd=tmp_path)
    assert whole.returncode == 0 and arrays(tmp_path / "run") == arrays(tmp_path / "whole")


@needs_mpi
def test_what_rank_0_cannot_do_ends_all_with_its_line(tmp_path):
    """A full disk, and bad input."""
    full = """
import errno
from npbn import runs
def save(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.safetensors")
if RANK == 0: runs.save_checkpoint = save
"""
    process = mpi(3, *TRAIN, "--epochs", "1", "--run", "run", cwd=tmp_path, prelude=full)
    assert_refused(process, "train.py: error:", "No space left on device")
    assert not (tmp_path / "run").exists()
    assert_refused(mpi(3, "--nonsense", cwd=tmp_path), "unrecognized arguments: --nonsense")
    (tmp_path / "there").mkdir()
    assert_refused(mpi(3, *TRAIN, "--run", "there", cwd=tmp_path), "there exists; choose another")


DIFFERENT = {
    "npbn": "import npbn; npbn.__version__ += f'.{RANK}'",
    "data": """
import npbn.data as data
def load(*words, original=data.load, **options):
    found = original(*words, **options)
    found.train.images[0, 0, 0, 0] += RANK
    return found
data.load = load""",
    "state": """
from npbn import experiment
def build(*words, original=experiment.build_model, **options):
    model = original(*words, **options)
    if RANK == 1: model.layers[0].weight.data[0, 0, 0, 0] += 1
    return model
experiment.build_model = build""",
}


@needs_mpi
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_refused(what, tmp_path):
    process = mpi(3, *TRAIN, "--run", "run", cwd=tmp_path, prelude=DIFFERENT[what])
    assert_refused(process, f"train.py: error: rank 1 has another {what} than rank 0: ")


SSH = """#!/bin/sh
# mpiexec calls it as ssh: [OPTION…] HOST COMMAND…
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec ip netns exec NAMESPACE unshare --uts sh -c "hostname other; $*"
"""


@pytest.fixture
def two_machines(tmp_path) -> Iterator[tuple[str, ...]]:
    """The words of an mpiexec on one of two network namespaces, with a cable between them."""
    names = [f"npbn{os.getpid()}{end}" for end in "ab"]
    here, there = names
    script = f"""
set -e
ip netns add {here}; ip netns add {there}
ip link add va netns {here} type veth peer name vb netns {there}
ip -n {here} addr add 10.77.0.1/24 dev va; ip -n {there} addr add 10.77.0.2/24 dev vb
ip -n {here} link set lo up; ip -n {here} link set va up
ip -n {there} link set lo up; ip -n {there} link set vb up
sleep 3  # MPICH takes no connection that has just come up.
"""
    made = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    try:
        if made.returncode or shutil.which("unshare") is None:
            pytest.skip(f"needs root, ip and unshare: {made.stderr.strip()}")
        (tmp_path / "ssh").write_text(SSH.replace("NAMESPACE", there))
        (tmp_path / "ssh").chmod(0o755)
        hosts = "-launcher", "ssh", "-launcher-exec", str(tmp_path / "ssh")
        # MPICH would see that both share a memory, and would use that.
        tcp = "-genv", "UCX_TLS", "tcp,self", "-genv", "FI_PROVIDER", "tcp"
        yield "ip", "netns", "exec", here, MPIEXEC, *hosts, "-hosts", "10.77.0.1,10.77.0.2", *tcp
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@needs_mpi
@pytest.mark.skipif(
    shutil.which("ip") is None or os.geteuid() != 0,
    reason="needs root, to make two machines of one",
)
def test_two_machines_give_the_bits_of_one_process(two_machines, tmp_path):
    options = (*TRAIN, "--epochs", "2")
    command = [*two_machines, "-n", "2", sys.executable, str(SCRIPTS / "train.py"), *options]
    process = subprocess.run(
        [*command, "--run", "two"], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert process.returncode == 0, process.stderr
    assert re.search(
        r", 2 processes on 2 machines \(rank 0 is \d+ on .*; rank 1 is", process.stdout
    )
    assert run("train.py", *options, "--run", "one", cwd=tmp_path).returncode == 0
    assert arrays(tmp_path / "one") == arrays(tmp_path / "two")


OTHER = """
for name in [name for name in os.environ if name.startswith(("PMI", "HYDI"))]:
    del os.environ[name]
os.environ |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(RANK)}
os.environ |= {"PMIX_NAMESPACE": "1", "PMIX_RANK": str(RANK)}
"""
"""What an mpiexec of Open MPI sets. At PMIX_NAMESPACE, MPICH ends the process."""


@needs_mpi
def test_a_launcher_without_mpi4py_or_with_another_mpi(tmp_path):
    for prelude, expected in (
        ("sys.modules['mpi4py'] = None", "which train together by mpi4py, and it cannot be used"),
        (
            OTHER,
            "(OMPI_COMM_WORLD_SIZE=2), of which mpi4py's MPI sees 1: start them by",
        ),
    ):
        process = mpi(2, *TRAIN, cwd=tmp_path, prelude=prelude)
        assert_refused(process, "train.py: error: mpiexec has started ", expected)
        assert not (tmp_path / "runs").exists()
