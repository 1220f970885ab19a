"""scripts/train.py interrupted, killed and gone on with: it ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from commands import CTRL_C, SCRIPTS, after_step, assert_refused
from disks import small_disk, unchanged
from npbn.checkpoint import load_checkpoint
from npbn.runs import Run

if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

# An epoch has 7 steps.
QUICK = ("--dataset", "digits", "--limit-train", "400", "--batch-size", "64", "--epochs", "3")
QUICK += ("--threads", "1", "--backend", "numpy")


def state(run: Path) -> tuple:
    """All that two runs that are the same have in common: everything but times."""
    arrays, record = load_checkpoint(run / "last.safetensors")
    del record["metrics_sha256"]  # times are in there
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for part in ("train", "test"):
            if line[part] is not None:
                del line[part]["seconds"]
    arrays = {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}
    return arrays, record, lines


def assert_finished(process: subprocess.CompletedProcess[str]) -> None:
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


@pytest.mark.parametrize(
    "options",
    [
        ("--momentum", "0.9", "--schedule", "cosine", "--lr", "0.1", "--eval-every", "2"),
        ("--precise-bn", "--momentum", "0.5", "--weight-decay", "0.01"),
        ("--no-batch-norm", "--dtype", "float64", "--activation", "relu", "--lr", "0.05"),
        ("--model", "blenet", "--schedule", "step", "--lr-epochs", "1", "--max-steps", "18"),
    ],
    ids=["momentum, cosine, eval-every", "precise-bn", "no-batch-norm, float64", "blenet, step"],
)
def test_interrupted_twice_it_ends_as_if_it_had_not_been(options, trainer, tmp_path):
    """In the middle of the first epoch, and just before the end of the second."""
    assert_finished(trainer(*QUICK, *options, "--run", "whole", cwd=tmp_path))
    arguments = (*QUICK, *options, "--run", "run")
    for step in (3, 10):
        process = trainer(*arguments, cwd=tmp_path, prelude=after_step(step, CTRL_C))
        assert process.returncode == 130, process.stderr
        assert process.stderr.strip() == "train.py: interrupted"
        arguments = ("--resume", "run")
    assert "stopped after step 13; to go on: python scripts/train.py --resume run" in process.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"best.safetensors"} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "layers.jsonl",
        "last.safetensors",
        "lock",
    }
    process = trainer("--resume", "run", cwd=tmp_path)
    assert_finished(process)
    assert "run: run, going on after epoch 1, batch 6" in process.stdout
    assert "s in all" not in process.stdout  # of which a part was before
    assert "note" not in process.stdout
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[0].keys() > set()


def test_a_second_interrupt_stops_at_once(trainer, tmp_path):
    """In the same step as the first; nothing is saved then, and the run goes on from before."""
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    prelude = after_step(10, f"{CTRL_C}; {CTRL_C}")
    process = trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=prelude)
    assert process.returncode == 130
    assert process.stderr.strip() == "train.py: interrupted"
    assert "stopped after" not in process.stdout
    process = trainer("--resume", "run", cwd=tmp_path)
    assert "going on after epoch 1, batch 0" in process.stdout
    assert state(tmp_path / "run") == state(tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_batch_system_stops_it_after_the_batch(name, trainer, tmp_path):
    """The second signal, of whatever kind, ends it at once."""
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    code = 128 + getattr(signal, name)
    send = f"os.kill(os.getpid(), signal.{name})"
    process = trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=after_step(10, send))
    assert process.returncode == code
    assert process.stderr.strip() == f"train.py: stopped by {name}"
    assert "stopped after step 10; to go on: python scripts/train.py --resume" in process.stdout
    process = trainer("--resume", "run", cwd=tmp_path, prelude=after_step(2, f"{CTRL_C}; {send}"))
    assert process.returncode == code
    assert "going on after epoch 1, batch 3" in process.stdout
    assert "stopped after" not in process.stdout
    assert_finished(trainer("--resume", "run", cwd=tmp_path))
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_signal_that_is_ignored_stays_ignored(trainer, tmp_path):
    """As SIGHUP is with nohup."""
    prelude = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    prelude += after_step(3, "os.kill(os.getpid(), signal.SIGHUP)")
    assert_finished(trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=prelude))


def test_sighup_where_the_terminal_is_gone(trainer, tmp_path):
    """Nothing can be printed any more, but the batches are kept."""
    gone = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); os.kill(os.getpid(), signal.SIGHUP)"
    process = trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=after_step(10, gone))
    assert process.returncode == 129
    process = trainer("--resume", "run", cwd=tmp_path)
    assert "going on after epoch 1, batch 3" in process.stdout


def test_a_signal_after_the_last_batch_changes_nothing(trainer, tmp_path):
    prelude = after_step(21, "os.kill(os.getpid(), signal.SIGTERM)")
    process = trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=prelude)
    assert process.returncode == 143
    process = trainer("--resume", "run", cwd=tmp_path)
    assert_finished(process)


# Kill -9 at every step of writing: before each call that makes or names a file or folder, and at
# each fsync, with the end of the file missing and with all of it.
KILL = """
import os, signal

count = 0

def die_here():
    global count
    count += 1
    return count == {at}

def killing(name):
    original = getattr(os, name)
    def call(*arguments, **options):
        cut = name == "fsync" and die_here()
        if cut:
            descriptor = os.dup(arguments[0])
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - 7)
        if cut or die_here():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(os, name, call)

for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir"):
    killing(name)
"""
SMALL = ("--dataset", "digits", "--limit-train", "64", "--batch-size", "32", "--epochs", "1")
SMALL += ("--backend", "numpy", "--momentum", "0.5")
SMALL += ("--engine", "layers")  # Numba's cache would add steps of its own


def test_killed_at_any_step_of_writing(trainer, tmp_path):
    assert_finished(trainer(*SMALL, "--run", "whole", cwd=tmp_path))
    expected = state(tmp_path / "whole")
    started_anew, at = 0, 0
    while True:
        at += 1
        name = f"runs/{at}"
        prelude = KILL.format(at=at)
        process = trainer(*SMALL, "--run", name, cwd=tmp_path, prelude=prelude)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
        if (tmp_path / name).exists():
            process = trainer("--resume", name, cwd=tmp_path)
        else:
            started_anew += 1
            process = trainer(*SMALL, "--run", name, cwd=tmp_path)
        assert_finished(process)
        assert state(tmp_path / name) == expected, at
    # A folder, three files and a checkpoint to begin with, then a line and a checkpoint or two.
    assert started_anew >= 8 and at - started_anew >= 8


def test_killed_while_it_replaces_a_run(trainer, tmp_path):
    """Either the earlier run is there, or the new one, or none; and a new start works."""
    assert_finished(trainer(*SMALL, "--run", "run", "--seed", "1", cwd=tmp_path))
    found = set()
    for at in range(12, 20):
        name = f"run-{at}"
        shutil.copytree(tmp_path / "run", tmp_path / name)
        again = (*SMALL, "--run", name, "--seed", "2", "--overwrite")
        trainer(*again, cwd=tmp_path, prelude=KILL.format(at=at))
        config = tmp_path / name / "config.json"
        seed = json.loads(config.read_text())["seed"] if config.exists() else None
        if seed not in found:
            found.add(seed)
            assert_finished(trainer(*again, cwd=tmp_path))
    assert found == {1, None, 2}


# Any moment, by the clock: also where no step above is. With HYPOTHESIS_PROFILE=long, more often.
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
STOPS = 50 if LONG else 5
ALARM = """
import signal
signal.setitimer(signal.ITIMER_REAL, {seconds})  # its default action is as abrupt as kill -9
"""
TERMINATE = """
import os, signal, threading
timer = threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGTERM))
timer.daemon = True
timer.start()
"""


@pytest.mark.parametrize(
    ("prelude", "codes"),
    [(ALARM, {-signal.SIGALRM}), (TERMINATE, {143, -signal.SIGTERM})],
    ids=["killed", "terminated"],
)
def test_stopped_at_random_moments(prelude, codes, trainer, tmp_path):
    started = time.perf_counter()
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    duration = time.perf_counter() - started
    expected, rng = state(tmp_path / "whole"), np.random.default_rng()
    stops, runs = 0, 0
    while stops < STOPS:
        runs += 1
        name = f"run-{runs}"
        for _ in range(1000):
            exists = (tmp_path / name).exists()
            arguments = ("--resume", name) if exists else (*QUICK, "--run", name)
            seconds = rng.uniform(1e-3, duration) if stops < STOPS else 1000
            process = trainer(*arguments, cwd=tmp_path, prelude=prelude.format(seconds=seconds))
            if process.returncode == 0:
                break
            assert process.returncode in codes, process.stderr
            assert len(process.stderr.strip().splitlines()) <= 1
            stops += 1
        assert state(tmp_path / name) == expected


@pytest.mark.parametrize("attempt", range(20 if LONG else 2))
def test_two_resumes_at_once(attempt, trainer, tmp_path):
    """Both may finish it, one after the other, or one is refused; nothing is written twice."""
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    trainer(*QUICK, "--run", "run", cwd=tmp_path, prelude=after_step(3 + attempt % 7, CTRL_C))
    command = [sys.executable, str(SCRIPTS / "train.py"), "--resume", "run"]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ends = [(*process.communicate(), process.returncode) for process in processes]
    for _, errors, code in ends:
        assert code == 0 or (code == 2 and "run is being written by " in errors), errors
    assert 0 in {code for _, _, code in ends}
    # The arrays alone: true processes have evaluated on more images than the other.
    assert state(tmp_path / "run")[0] == state(tmp_path / "whole")[0]
    assert [record["number"] for record in Run.open(tmp_path / "run").records()] == [0, 1, 2, 3]


@pytest.mark.parametrize("kilobytes", range(20, 1100, 20) if LONG else (40, 380, 560, 940))
def test_a_disk_that_is_full_at_any_file(kilobytes, trainer, tmp_path):
    """One line; and once there is space, the run goes on to the same end, or begins."""
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        process = trainer(*QUICK, "--run", "disk/run", cwd=tmp_path)
        if process.returncode:
            assert_refused(process, "train.py: error: disk/", "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        exists = (disk / "run").exists()
        again = ("--resume", "disk/run") if exists else (*QUICK, "--run", "disk/run")
        assert_finished(trainer(*again, cwd=tmp_path))
        assert state(disk / "run") == state(tmp_path / "whole")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_true_process(signal_number, trainer, tmp_path):
    """Not forked from another; stopped from outside, somewhere in its second epoch."""
    options = (*QUICK, "--epochs", "8")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *options, "--run", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("    1 "):
        pass
    process.send_signal(signal_number)
    _, errors = process.communicate()
    assert (
        process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[signal_number]
    )
    assert "Traceback" not in errors
    assert_finished(trainer("--resume", "run", cwd=tmp_path))
    assert_finished(trainer(*options, "--run", "whole", cwd=tmp_path))
    # The arrays alone: the true process has evaluated on more images than the other.
    assert state(tmp_path / "run")[0] == state(tmp_path / "whole")[0]


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory) -> Path:
    """A folder with a run that came to its end; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert_finished(trainer(*SMALL, "--run", "run", cwd=folder))
    return folder


def test_a_run_that_is_finished(finished, trainer):
    with unchanged(finished):
        process = trainer("--resume", "run", cwd=finished)
    assert_finished(process)
    assert "this run was finished already, after epoch 1" in process.stdout


def test_a_finished_run_is_trained_on(trainer, tmp_path):
    """It ends as one that was to be so long from the beginning."""
    options = (*QUICK, "--momentum", "0.9", "--lr", "0.1")
    assert_finished(trainer(*options, "--epochs", "5", "--run", "whole", cwd=tmp_path))
    assert_finished(trainer(*options, "--epochs", "2", "--run", "run", cwd=tmp_path))
    for epochs, last in (("3", 3), ("5", 5)):
        assert_finished(trainer("--resume", "run", "--epochs", epochs, cwd=tmp_path))
        assert load_checkpoint(tmp_path / "run" / "last.safetensors")[1]["epoch"] == last
    assert state(tmp_path / "run") == state(tmp_path / "whole")
    process = trainer("--resume", "run", "--epochs", "4", cwd=tmp_path)
    assert_refused(process, "train.py: error: --epochs 4: the run has 5 epochs already")
    process = trainer("--resume", "run", cwd=tmp_path)
    assert "this run was finished already, after epoch 5 (5 of 5 epochs); to train on: " in (
        process.stdout
    )


def test_a_run_that_its_steps_have_ended_is_trained_on(trainer, tmp_path):
    """A cosine ends where the training ends, then and now."""
    options = ("--schedule", "cosine", "--lr", "0.1", "--max-steps")
    assert_finished(trainer(*QUICK, *options, "7", "--run", "run", cwd=tmp_path))
    assert_finished(trainer("--resume", "run", "--max-steps", "14", cwd=tmp_path))
    lines = Run.open(tmp_path / "run").records()
    assert [line["step"] for line in lines] == [0, 7, 14]
    for line, total in ((lines[1], 7), (lines[2], 14)):
        expected = 0.1 * (1 + np.cos(np.pi * (total - 1) / total)) / 2
        np.testing.assert_allclose(line["lr"], expected, rtol=1e-12)
    for more in ((), ("--epochs", "4")):
        process = trainer("--resume", "run", *more, cwd=tmp_path)
        assert "finished already, after epoch 2 (--max-steps 14)" in process.stdout
    assert_finished(trainer("--resume", "run", "--max-steps", "30", cwd=tmp_path))
    assert load_checkpoint(tmp_path / "run" / "last.safetensors")[1]["step"] == 28  # 4 epochs


def test_killed_while_the_limits_change(trainer, tmp_path):
    """Before it, or after it; and the run goes on."""
    assert_finished(trainer(*SMALL, "--run", "run", cwd=tmp_path))
    found = set()
    for at in range(1, 6):
        name = f"run-{at}"
        shutil.copytree(tmp_path / "run", tmp_path / name)
        prelude = KILL.format(at=at)
        trainer("--resume", name, "--epochs", "2", cwd=tmp_path, prelude=prelude)
        process = trainer("--resume", name, cwd=tmp_path)
        assert_finished(process)
        found.add("finished already, after epoch 1" in process.stdout)
        assert_finished(trainer("--resume", name, "--epochs", "3", cwd=tmp_path))
        assert json.loads((tmp_path / name / "config.json").read_text())["epochs"] == 3
    assert found == {True, False}


def test_a_run_in_training_is_neither_resumed_nor_replaced(trainer, tmp_path):
    """Stopped in its third batch, so that it is there for as long as it takes."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", after_step(3, "os.kill(os.getpid(), signal.SIGSTOP)") + TRAIN),
            *(*QUICK, "--run", "run"),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    os.waitpid(process.pid, os.WUNTRACED)
    expected = f"train.py: error: run is being written by process {process.pid} on "
    for arguments in (("--resume", "run"), (*QUICK, "--run", "run", "--overwrite")):
        with unchanged(tmp_path):
            assert_refused(trainer(*arguments, cwd=tmp_path), expected)
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert_finished(trainer("--resume", "run", cwd=tmp_path))


TRAIN = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from npbn.commands import start
start("train", "train.py")
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--lr", "2"), "argument --lr: not allowed with --resume"),
        (("--no-batch-norm",), "argument --no-batch-norm: not allowed with --resume"),
        (("--dataset", "digits"), "argument --dataset: not allowed with --resume"),
        (("--run", "x"), "argument --run: not allowed with --resume"),
        (("--run", "run", "--overwrite"), "not allowed with --resume"),
        (("--check-gradients",), "argument --check-gradients: not allowed with --resume"),
        (("--momentum", "0"), "argument --momentum: not allowed with --resume"),  # the default
        (("--from", "run"), "argument --from: not allowed with --resume"),
        (("--epochs", "0"), "argument --epochs: expected an integer >= 1"),
        (("--max-steps", "1"), "--max-steps 1: the run has 2 steps already"),
        (("--data", "."), "--data: not allowed with this run of the digits"),
        (("--threads", "0"), "argument --threads: expected an integer >= 1"),
        (("--backend", "cupy"), "CuPy"),
    ],
)
def test_options_that_do_not_go_with_resume(options, expected, finished, trainer):
    with unchanged(finished):
        process = trainer("--resume", "run", *options, cwd=finished)
    assert_refused(process, "train.py: error:", expected)


def test_resume_of_what_is_no_run(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, expected in (
        ("nothing", "nothing is not a directory; expected the folder of a run"),
        ("file", "file is not a directory; expected the folder of a run"),
        ("folder", "config.json cannot be read: No such file or directory"),
        ("a" * 300, "is not a directory"),
    ):
        with unchanged(tmp_path):
            process = trainer("--resume", name, cwd=tmp_path)
        assert_refused(process, "train.py: error:", expected)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_differs_from_when_it_began_is_said(trainer, tmp_path):
    prelude = after_step(1, CTRL_C)
    trainer(*SMALL, "--run", "run", cwd=tmp_path, prelude=prelude)
    path = tmp_path / "run" / "environment.json"
    device = json.loads(path.read_text())["device"]
    rewrite(path, device="NumPy 1.0", Python="2.7")
    process = trainer("--resume", "run", cwd=tmp_path)
    assert_finished(process)
    notes = [line for line in process.stdout.splitlines() if line.startswith("note")]
    assert len(notes) == 2
    assert f"note: device was NumPy 1.0 when this run began and is {device} now" in process.stdout


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_threads_of_the_run_are_taken_up_again(threads, trainer, tmp_path):
    """Unless it is told otherwise. Only the layers' last bits depend on them."""
    options = (*SMALL, "--threads", threads, "--run", "run")
    process = trainer(*options, cwd=tmp_path, prelude=after_step(1, CTRL_C))
    said = {"1": "by layers on 1 thread", "2": "by layers on 2 threads"}
    if said[threads] not in process.stdout:
        pytest.skip("threadpoolctl does not know this BLAS")
    assert said[threads] in trainer("--resume", "run", cwd=tmp_path).stdout
    other = "2" if threads == "1" else "1"
    process = trainer("--resume", "run", "--threads", other, cwd=tmp_path)
    assert said[other] in process.stdout
    assert f"note: threads was {threads} when this run began and is {other} now" in process.stdout


def test_resumed_where_the_data_is_missing(trainer, tmp_path):
    """A run of Fashion-MNIST, begun elsewhere. (The data set alone is exchanged by hand.)"""
    as_fashion = """
import dataclasses
from npbn import data
load = data.load
data.load = lambda *a, **o: dataclasses.replace(load(*a, **o), key="fashion-mnist")
"""
    trainer(*SMALL, "--run", "run", cwd=tmp_path, prelude=as_fashion + after_step(1, CTRL_C))
    elsewhere = """
import os, pathlib
from npbn.data import published

def download(*_, **__):
    raise published.DataError("no network")

published.IdxSource._download = download
published.SYSTEM_DIRECTORY = pathlib.Path("nowhere")
os.environ.update(XDG_CACHE_HOME=os.path.abspath("cache"), HOME=os.getcwd())
os.environ.pop("NPBN_DATA", None)
"""
    with unchanged(tmp_path / "run"):
        process = trainer("--resume", "run", cwd=tmp_path, prelude=elsewhere)
        assert_refused(process, "could not be downloaded: no network", "ways to get it", "--data")
        assert "downloading Fashion-MNIST into" in process.stdout
        process = trainer("--resume", "run", "--data", ".", cwd=tmp_path, prelude=elsewhere)
        assert_refused(process, "holds none of Fashion-MNIST's files")


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fails_in_the_middle_of_a_run(fault, trainer, tmp_path):
    """The last checkpoint is intact, and once there is space, the run goes on."""
    assert_finished(trainer(*QUICK, "--run", "whole", cwd=tmp_path))
    with small_disk(tmp_path / "disk", kilobytes=1000) as disk:
        full = "open('disk/filler', 'wb', 0).write(bytes(10**7))"
        # Over itself, because the run's lock is open for writing.
        read_only = "os.system('mount --bind disk disk && mount -o remount,bind,ro disk')"
        action = {"full": full, "read-only": read_only}[fault]
        options = (*QUICK, "--run", "disk/run")
        process = trainer(*options, cwd=tmp_path, prelude=after_step(10, action))
        said = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
        assert_refused(process, "train.py: error: disk/run/", f"cannot be written: {said}")
        assert load_checkpoint(disk / "run" / "last.safetensors")[1]["step"] == 7
        process = trainer("--resume", "disk/run", cwd=tmp_path)
        assert_refused(process, "train.py: error: disk/run/", f"cannot be written: {said}")
        new = trainer(*QUICK, "--run", "disk/new", cwd=tmp_path)
        assert_refused(new, "disk/new cannot be written", said)
        if fault == "read-only":
            subprocess.run(["umount", str(disk)], check=True)
        else:
            (disk / "filler").unlink()
        assert sorted(path.name for path in disk.iterdir()) == ["run"]
        assert_finished(trainer("--resume", "disk/run", cwd=tmp_path))
        assert state(disk / "run") == state(tmp_path / "whole")


NAN = ("--lr", "1e30", "--no-batch-norm", "--activation", "relu")


def test_a_loss_that_becomes_nan_is_explained(trainer, tmp_path):
    """And the last good checkpoint is kept, from which it happens again, and may be looked into."""
    process = trainer(*QUICK, *NAN, "--run", "run", cwd=tmp_path)
    message = (
        "in epoch 1, the loss became NaN or infinite: step 2: the output of layer 3 (Conv2d) is ",
        " (losses before: 2.3",
        "most likely the learning rate, 1e+30, is too high",
        "the last good checkpoint is kept: run/last.safetensors",
    )
    assert_refused(process, *message, code=3)
    with unchanged(tmp_path):
        process = trainer("--resume", "run", cwd=tmp_path)
    assert_refused(process, *message, code=3)
    arrays, record = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert (record["epoch"], record["step"]) == (0, 0)
    assert all(np.all(np.isfinite(array)) for array in arrays.values())


def test_an_interrupt_after_the_loss_became_nan_saves_nothing(trainer, tmp_path):
    """The checkpoint is that of an interrupt before, in the middle of the epoch."""
    prelude = after_step(1, CTRL_C)
    options = (*QUICK, *NAN, "--lr", "1e4", "--run", "run")
    assert trainer(*options, cwd=tmp_path, prelude=prelude).returncode == 130
    for step in (2, 6):
        with unchanged(tmp_path):
            prelude = after_step(step, CTRL_C)
            process = trainer("--resume", "run", cwd=tmp_path, prelude=prelude)
        said = "the loss or the state is NaN or infinite: step ", "(Linear) is "
        assert_refused(process, *said, code=3)


def test_statistics_that_overflow_in_the_last_step_are_not_saved(trainer, tmp_path):
    """The losses of the epoch are finite then, and nothing is evaluated."""
    spoil = "self.model.layers[1].moving_var.data += float('inf')"
    options = (*QUICK, "--eval-every", "2", "--run", "run")
    process = trainer(*options, cwd=tmp_path, prelude=after_step(7, spoil))
    said = "after step 7, the loss or the state is NaN or infinite: no step of"
    assert_refused(process, said, code=3)
    assert load_checkpoint(tmp_path / "run" / "last.safetensors")[1]["step"] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
