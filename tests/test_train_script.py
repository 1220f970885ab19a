"""scripts/train.py as its users meet it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from PIL import Image

import npbn
from commands import CTRL_C, NO_NETWORK, SCRIPTS, after_step, assert_refused, run
from npbn import backend, data, training
from npbn.checkpoint import load_checkpoint, save_checkpoint
from npbn.distributed import LAUNCHERS
from npbn.engine.layers import LayersEngine
from npbn.models import LeNet
from npbn.optim import SGD
from npbn.runs import Run

LAYERS = r"by layers( on \d+ threads?)?"
QUICK = ("--dataset", "digits", "--backend", "numpy", "--epochs", "1")
SHORT = (*QUICK, "--limit-train", "64", "--batch-size", "16")
fused = pytest.mark.skipif(
    importlib.util.find_spec("npbn.engine.cpu") is None
    or importlib.util.find_spec("numba") is None,
    reason="needs the fused engine on the CPU",
)
EPOCH_LINE = re.compile(r"^ +(\d+) +(\d\.\d{4}) +(\d\.\d{4}) +(\d\.\d{4}) +([\d,]+)$", re.MULTILINE)


def metrics(output: str) -> list[tuple[str, ...]]:
    """Epoch, loss, train accuracy, test accuracy: all but the speed."""
    return [match.groups()[:4] for match in EPOCH_LINE.finditer(output)]


def test_one_epoch_of_fashion_mnist(fashion_mnist, tmp_path):
    """The main job, on real data: after one epoch it has learned most of what there is."""
    process = run("train.py", "--backend", "numpy", "--epochs", "1", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    output = process.stdout
    assert re.search(r"^npbn \d.*Python \d.*NumPy \d", output)
    assert "Fashion-MNIST from /usr/share/datasets/fashion-mnist, 60,000 training" in output
    assert "LeNet with batch norm, 44,878 parameters, float32" in output
    ((number, loss, train_accuracy, _),) = metrics(output)
    assert number == "1"
    # PyTorch's first epoch has a loss of .729 to .733 over three seeds, and .73 of accuracy.
    assert 0.65 < float(loss) < 0.85
    assert 0.68 < float(train_accuracy) < 0.78
    assert re.search(
        r"^[\d,]+ examples/s in training on numpy: [\d.]+ s of training, [\d.]+ s in all$",
        output,
        re.MULTILINE,
    )
    for name in ("gamma", "beta"):
        (values,) = re.findall(rf"^{name} of the first batch norm: (.*)$", output, re.MULTILINE)
        assert len(values.split()) == 6
    (folder,) = (tmp_path / "runs").iterdir()  # named by date and time, and said
    assert re.search(rf"^run: runs/{re.escape(folder.name)}$", output, re.MULTILINE)
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "config.json",
        "environment.json",
        "last.safetensors",
        "layers.jsonl",
        "lock",
        "metrics.jsonl",
    ]


def test_two_runs_of_a_seed_are_alike_and_another_seed_is_not(tmp_path):
    def run_with_seed(seed, name):
        limit = ("--limit-train", "500", "--batch-size", "50", "--run", name)
        process = run("train.py", *QUICK, *limit, "--seed", seed, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return metrics(process.stdout), process.stdout.splitlines()[-3:-1]

    first = run_with_seed("3", "first")
    assert first == run_with_seed("3", "same")
    assert first != run_with_seed("4", "other")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "blenet"), "BLeNet with batch norm, 62,158 parameters"),
        (("--no-batch-norm",), "LeNet without batch norm, 44,426 parameters"),
        (("--dtype", "float64"), "float64"),
        (("--schedule", "cosine", "--momentum", "0.9", "--lr", "0.1"), "cosine learning rate 0.1"),
        (
            ("--schedule", "step", "--lr-epochs", "1", "--lr-factor", "0.5"),
            "step learning rate 1.0",
        ),
        (("--weight-decay", "1e-4"), "SGD"),
        (("--batch-size", "718"), "one example an epoch is left out"),
        (("--batch-size", "5000"), "batches of 5000"),
    ],
)
def test_options(options, expected, tmp_path):
    process = run("train.py", *QUICK, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert expected in process.stdout
    assert len(metrics(process.stdout)) == 1
    assert ("first batch norm" in process.stdout) == ("--no-batch-norm" not in options)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (("--lr-epochs", "2", "--lr-factor", "0.5"), lambda step: 0.5 ** (step // 12)),
        ((), lambda step: 0.1 ** (step // 18)),
        (("--schedule", "cosine"), lambda step: (1 + math.cos(math.pi * step / 24)) / 2),
        (("--schedule", "constant"), lambda step: 1.0),
    ],
    ids=["step", "step by default", "cosine", "constant"],
)
def test_the_options_reach_the_training(options, rate, tmp_path):
    """What is printed is what a training set up by hand arrives at; an epoch has 6 steps."""
    common = ("--epochs", "4", "--seed", "7", "--threads", "1", "--schedule", "step")
    common += ("--engine", "layers")
    sgd = ("--lr", "0.3", "--momentum", "0.7", "--weight-decay", "0.02")
    process = run("train.py", *QUICK, *common, *sgd, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr

    digits, device = data.load("digits"), backend.get_backend("numpy")
    model = LeNet(generator=np.random.default_rng(7))
    optimizer = SGD(
        model.parameters(), lambda step: 0.3 * rate(step), momentum=0.7, weight_decay=0.02
    )
    with threadpoolctl.threadpool_limits(1):
        history: list = []
        what = model, optimizer, digits.train, digits.test
        engine = LayersEngine(*what, batch_size=256, backend=device)
        training.Training(*what, engine=engine, batch_size=256, seed=7, backend=device).run(
            4, on_epoch=history.append
        )
    assert metrics(process.stdout) == [
        (
            str(epoch.number),
            *(f"{v:.4f}" for v in (epoch.train.loss, epoch.train.accuracy, epoch.test.accuracy)),
        )
        for epoch in history
    ]
    norm = model.layers[1]
    assert process.stdout.splitlines()[-3:-1] == [
        f"{name} of the first batch norm: {' '.join(f'{v:.3f}' for v in array.data.ravel())}"
        for name, array in (("gamma", norm.gamma), ("beta", norm.beta))
    ]


def test_a_run_begins_with_the_weights_of_another(trainer, tmp_path):
    process = trainer(*SHORT, "--model", "blenet", "--run", "first", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    options = ("--from", "first", "--lr", "1e-30", "--epochs", "1", "--dtype", "float64")
    process = trainer(*SHORT, *options, "--run", "second", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "weights: from first, after epoch 1\n" in process.stdout
    assert "model: BLeNet" in process.stdout
    first, second = (npbn.load(tmp_path / name).model for name in ("first", "second"))
    for name, parameter in second.parameters().items():
        np.testing.assert_allclose(
            parameter.data, first.parameters()[name].data, rtol=1e-6, atol=1e-25
        )
    assert json.loads((tmp_path / "second" / "environment.json").read_text())["from"] == "first"
    for options, expected in (
        (("--from", "none"), "none is not a directory; expected the folder of a run"),
        (("--from", "first", "--model", "lenet"), "--model: not allowed with --from"),
        (("--from", "first", "--no-batch-norm"), "--no-batch-norm: not allowed with --from"),
    ):
        assert_refused(trainer(*SHORT, *options, cwd=tmp_path), "train.py: error:", expected)


def test_weights_for_other_images(trainer, tmp_path):
    assert trainer(*SHORT, "--run", "first", cwd=tmp_path).returncode == 0
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(2):
            image = np.full((12, 12), 100 * k, np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{k}.png")
    options = ("--dataset", "folder", "--data", "photos", "--from", "first")
    expected = (
        "--from first: the model takes images of 28 × 28, channels 1, in 10 classes; the data "
        "has images of 12 × 12, channels 1, in 2 classes"
    )
    assert_refused(trainer(*options, cwd=tmp_path), expected)


def test_quiet_prints_the_last_line_and_json_has_the_result(trainer, tmp_path):
    options = (*SHORT, "--quiet", "--json", "result.json", "--run", "run")
    process = trainer(*options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    best = result["best_test_accuracy"]
    assert process.stdout == f"best test accuracy {best:.4f}; checkpoints last and best in run\n"
    assert (result["status"], result["run"], result["epochs"]) == ("trained", "run", 1)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (result["train"], result["test"]) == (records[-1]["train"], records[-1]["test"])
    assert result["config"]["seed"] == 0 and result["steps"] == records[-1]["step"]


@pytest.mark.parametrize(
    ("options", "prelude", "code", "status"),
    [
        (("--lr", "1e30", "--activation", "relu", "--no-batch-norm"), "", 3, "not finite"),
        ((), after_step(2, "os.kill(os.getpid(), signal.SIGTERM)"), 143, "stopped"),
        ((), after_step(2, "raise MemoryError"), 2, "failed"),
    ],
)
def test_json_has_the_result_however_it_ends(options, prelude, code, status, trainer, tmp_path):
    options = (*SHORT, *options, "--json", "result.json", "--run", "run")
    process = trainer(*options, cwd=tmp_path, prelude=prelude)
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["best_test_accuracy"]) == (status, None)
    process = trainer(*SHORT, "--json", "no/such/result.json", cwd=tmp_path)
    assert_refused(process, "argument --json: there is no directory no/such")


def events(run: Path) -> dict[tuple[str, int], float | None]:
    """The values of the event files of a run by tag and epoch; None for a histogram.

    Records of TensorFlow's format: length, its checksum, an Event, its checksum.
    """
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for path in sorted((run / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                scalar = value.simple_value if value.HasField("simple_value") else None
                found[value.tag, event.step] = scalar
    return found


def test_metrics_for_tensorboard(trainer, tmp_path):
    """Of the resumed part, too."""
    options = (*SHORT, "--tensorboard", "--epochs", "2", "--eval-every", "2", "--run", "run")
    process = trainer(*options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    process = trainer("--resume", "run", "--epochs", "3", "--tensorboard", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = events(tmp_path / "run")
    for record in Run.open(tmp_path / "run").records()[1:]:
        number = record["number"]
        assert found["lr", number] == record["lr"] == 1
        for split in ("train", "test"):
            for quantity in ("loss", "accuracy"):
                assert ((f"{quantity}/{split}", number) in found) == (record[split] is not None)
                if record[split] is not None:
                    expected = np.float32(record[split][quantity])
                    assert found[f"{quantity}/{split}", number] == expected
    assert {number for tag, number in found if tag == "batch_norm_4/gamma"} == {1, 2, 3}


def test_without_tensorboardx_it_is_said_at_once(trainer, tmp_path):
    prelude = "import sys; sys.modules['tensorboardX'] = None"
    process = trainer(*SHORT, "--tensorboard", cwd=tmp_path, prelude=prelude)
    assert_refused(process, "--tensorboard: tensorboardX cannot be loaded", "pip install")
    assert not (tmp_path / "runs").exists()


def test_runs_of_the_same_second_have_names_of_their_own(trainer, tmp_path):
    prelude = """
import datetime
class Now(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(2026, 1, 2, 3, 4, 5)
datetime.datetime = Now
"""
    for _ in range(3):
        process = trainer(*SHORT, "--epochs", "1", cwd=tmp_path, prelude=prelude)
        assert process.returncode == 0, process.stderr
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {f"2026-01-02-03.04.05{more}" for more in ("", "-2", "-3")}
    assert "run: runs/2026-01-02-03.04.05-3\n" in process.stdout


def test_quiet_pictures(trainer, tmp_path):
    process = trainer(*SHORT, "--quiet", "--plots", "--run", "run", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "plots" / "curves.png").exists()


def test_the_launchers_that_are_known():
    assert LAUNCHERS == {
        "OMPI_COMM_WORLD_SIZE": ("mpiexec", "OMPI_COMM_WORLD_RANK"),
        "PMI_SIZE": ("mpiexec", "PMI_RANK"),
        "SLURM_STEP_NUM_TASKS": ("srun", "SLURM_PROCID"),
        "WORLD_SIZE": ("torchrun", "RANK"),
    }


@pytest.mark.parametrize("variable", LAUNCHERS)
def test_a_launcher_of_copies_without_mpi_is_refused(variable, trainer, tmp_path):
    """One copy, or another value, is none of our business."""
    prelude = "import os; os.environ[{!r}] = {!r}"
    process = trainer(*SHORT, cwd=tmp_path, prelude=prelude.format(variable, "2"))
    expected = f"{LAUNCHERS[variable][0]} has started 2 copies of this program ({variable}=2)"
    assert_refused(process, "train.py: error:", expected)
    assert not (tmp_path / "runs").exists()
    for value in ("1", "", "x"):
        process = trainer(*SHORT, cwd=tmp_path, prelude=prelude.format(variable, value))
        assert process.returncode == 0, process.stderr


def test_too_little_memory_is_said_in_one_line(tmp_path):
    if sys.platform != "linux":
        pytest.skip("no limit of memory")
    # The imports need about 400 MiB of addresses, and this training needs about 700.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (560 * 2**20,) * 2)"
    options = (
        "--dataset",
        "digits",
        "--engine",
        "layers",
        "--batch-size",
        "20000",
        "--threads",
        "1",
    )
    model = ("--model", "blenet", "--dtype", "float64")
    process = run("train.py", *options, *model, cwd=tmp_path, prelude=limit)
    expected = ("out of memory: Unable to allocate", "a smaller --batch-size or --limit-train")
    assert_refused(process, "train.py: error:", *expected)


@pytest.mark.parametrize("engine", ["layers", "fused"])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_limited_and_said(threads, engine, tmp_path):
    """In one line, so that several processes differ from one process by this line only."""
    if not any(pool["user_api"] == "blas" for pool in threadpoolctl.threadpool_info()):
        pytest.skip("threadpoolctl does not know this BLAS")
    options = ("--threads", str(threads), "--engine", engine)
    process = run("train.py", *QUICK, *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    said = [line for line in process.stdout.splitlines() if re.search(r"\d threads?\b", line)]
    by = {"layers": "by layers", "fused": "by the fused engine"}[engine]
    assert len(said) == 1 and f"{by} on {threads} thread" in said[0]
    assert ("threads" in said[0]) == (threads > 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("options", [QUICK, ("--help",)], ids=["training", "help"])
def test_a_full_disk_is_one_line(options, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, str(SCRIPTS / "train.py"), *options],
            cwd=tmp_path,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert_refused(process, "train.py: error: cannot write the output: No space left on device")


def test_check_gradients_before_training(tmp_path):
    process = run("train.py", *QUICK, "--check-gradients", "--batch-size", "64", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    rows = re.findall(r"^([\w.]+) +(\d\.\de[-+]\d+)  right(.*)$", process.stdout, re.MULTILINE)
    assert len(rows) == 19  # 18 parameters and the input
    assert max(float(error) for _, error, _ in rows) <= 1e-12
    assert [name for name, _, rest in rows if "cancel" in rest] == [
        "0.bias",
        "4.bias",
        "9.bias",
        "12.bias",
    ]
    assert len(metrics(process.stdout)) == 1


def test_help_names_every_option_and_the_exit_codes(tmp_path):
    process = run("train.py", "--help", cwd=tmp_path)
    assert process.returncode == 0
    for text in ("--backend", "--dataset", "--data", "--model", "--no-batch-norm", "--epochs"):
        assert text in process.stdout
    assert "exit codes" in process.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--epochs", "0"), "argument --epochs: expected an integer >= 1, got '0'"),
        (("--epochs", "two"), "expected an integer >= 1, got 'two'"),
        (("--batch-size", "-5"), "argument --batch-size: expected an integer >= 1, got '-5'"),
        (("--lr", "0"), "argument --lr: expected a number > 0, got '0'"),
        (("--lr", "nan"), "argument --lr: expected a number > 0, got 'nan'"),
        (("--momentum", "1"), "argument --momentum: expected a number in [0, 1), got '1'"),
        (("--weight-decay", "inf"), "argument --weight-decay: expected a number >= 0"),
        (("--threads", "0"), "argument --threads: expected an integer >= 1, got '0'"),
        (("--lr-epochs", "3"), "argument --lr-epochs: not allowed without --schedule step"),
        (
            ("--schedule", "cosine", "--lr-factor", "0.1"),
            "argument --lr-factor: not allowed without --schedule step",
        ),
        (("--seed", "-1"), "argument --seed: expected an integer >= 0, got '-1'"),
        (("--backend", "torch"), "argument --backend: invalid choice: 'torch'"),
        (("--model", "vgg"), "argument --model: invalid choice: 'vgg'"),
        (("--dtype", "float16"), "argument --dtype: invalid choice: 'float16'"),
        (("--dataset", "cifar"), "argument --dataset: invalid choice: 'cifar'"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
        (("--data", "no/such/directory"), "no/such/directory is not a directory"),
        (
            ("--dataset", "digits", "--data", "."),
            "argument --data: not allowed with --dataset digits",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(options, expected, tmp_path):
    process = run("train.py", "--backend", "numpy", *options, cwd=tmp_path)
    assert_refused(process, "train.py: error:", expected)


def test_an_explicit_directory_never_falls_through(tmp_path):
    """Neither from --data nor from $NPBN_DATA, although the system may have the files."""
    expected = "holds none of Fashion-MNIST's files"
    options = ("--backend", "numpy", "--epochs", "1")
    assert_refused(run("train.py", *options, "--data", str(tmp_path), cwd=tmp_path), expected)
    env = {"NPBN_DATA": str(tmp_path)}
    assert_refused(run("train.py", *options, cwd=tmp_path, env=env), expected)


BARE = """
import pathlib
from npbn.data import published
published.SYSTEM_DIRECTORY = pathlib.Path("nowhere")
"""


def test_without_data_and_network_auto_trains_on_digits_and_says_so(tmp_path):
    env = NO_NETWORK | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    process = run(
        "train.py", "--backend", "numpy", "--epochs", "1", cwd=tmp_path, env=env, prelude=BARE
    )
    assert process.returncode == 0, process.stderr
    assert "Fashion-MNIST is not on this machine and could not be downloaded" in process.stdout
    for way in ("dataset-fashion-mnist", "with a network, run this again", "$NPBN_DATA"):
        assert way in process.stdout
    assert "handwritten digits from npbn, 1,437 training and 360 test" in process.stdout
    assert len(metrics(process.stdout)) == 1


def test_without_data_and_network_fashion_mnist_is_refused(tmp_path):
    env = NO_NETWORK | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    process = run(
        "train.py",
        "--backend",
        "numpy",
        "--dataset",
        "fashion-mnist",
        cwd=tmp_path,
        env=env,
        prelude=BARE,
    )
    assert_refused(process, "could not be downloaded", "ways to get it", "--data")


CUPY_STAND_INS = {
    "not installed": (
        "raise ModuleNotFoundError(\"No module named 'cupy'\", name='cupy')",
        "CuPy is not installed: pip install 'cupy-cuda13x[ctk]'",
    ),
    "broken": (
        "raise ImportError('libcudart.so.13: cannot open shared object file')",
        "CuPy is installed but cannot be loaded: ImportError: libcudart.so.13",
    ),
    "no device": (
        "class ndarray: pass\ndef is_available(): return False",
        "no usable NVIDIA driver or GPU",
    ),
    "no cuBLAS": (
        "import numpy\nclass ndarray: pass\nfloat32 = numpy.float32\n"
        "def is_available(): return True\n"
        "def ones(*args, **kwargs): raise RuntimeError('libcublas.so.13:\\n not found')",
        "library cannot be loaded or does not work: RuntimeError: libcublas.so.13: not found",
    ),
}


@pytest.mark.parametrize("case", CUPY_STAND_INS)
def test_cupy_that_cannot_be_used_is_told_apart(case, tmp_path):
    """A stand-in for CuPy fails as the real one does; the machine need not be broken for it."""
    code, expected = CUPY_STAND_INS[case]
    (tmp_path / "cupy.py").write_text(code)
    found = f"sys.path.insert(0, {str(tmp_path)!r})"
    process = run("train.py", *QUICK, "--backend", "cupy", cwd=tmp_path, prelude=found)
    assert_refused(process, "train.py: error:", expected)
    assert process.stdout == ""
    auto = run("train.py", *QUICK, "--backend", "auto", cwd=tmp_path, prelude=found)
    assert auto.returncode == 0, auto.stderr
    assert "on the CPU, because: CuPy" in auto.stdout and expected in auto.stdout


def test_progress_bar_on_a_terminal_only(tmp_path):
    """Piped, standard error stays empty (above); on a terminal a bar is drawn and removed."""
    fcntl, pty, termios = (
        pytest.importorskip(name, reason="no pseudo-terminals on this system")
        for name in ("fcntl", "pty", "termios")
    )
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *QUICK],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
    )
    os.close(end)
    drawn = ""
    try:
        while True:
            drawn += os.read(terminal, 4096).decode()
    except OSError:  # how Linux says that the other end is closed
        os.close(terminal)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "epoch 1:" in drawn and "examples" in drawn
    assert len(metrics(output)) == 1


def hear_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and hand that down; the tests may be in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_interrupt_during_the_imports_ends_without_a_traceback(tmp_path):
    """The first import of each script leaves Ctrl-C to the system until there is a loop to stop."""
    code = "import os, signal, _command_line; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        preexec_fn=hear_interrupts,
    )
    assert process.returncode == -signal.SIGINT
    assert process.stdout == process.stderr == ""


def test_without_its_dependencies_it_says_what_to_do(tmp_path):
    """With Python's own library alone (-S -E leaves site-packages out)."""
    process = subprocess.run(
        [sys.executable, "-S", "-E", str(SCRIPTS / "train.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert_refused(process, "not installed: npbn, numpy", "pip install -e .")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_interrupt_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", str(SCRIPTS / "train.py"), *QUICK, "--epochs", "100000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )
    assert process.stdout is not None
    while not EPOCH_LINE.match(process.stdout.readline()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "train.py: interrupted"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "train.py"), *QUICK, "--epochs", "3"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None  # for communicate, which would read it
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and "Exception ignored" not in errors


@fused
def test_the_engine_reaches_what_the_layers_reach_and_resumes_to_the_bit(tmp_path):
    """On another number of threads, too."""
    common = (*QUICK, "--epochs", "2", "--batch-size", "100")
    layers = run("train.py", *common, "--engine", "layers", "--run", "layers", cwd=tmp_path)
    two = ("--threads", "2", "--run", "whole")
    whole = run("train.py", *common, *two, cwd=tmp_path)  # auto: it is the default
    assert whole.returncode == 0, whole.stderr
    assert re.search(rf"float32, {LAYERS}\n", layers.stdout)
    assert "float32, by the fused engine on 2 threads\n" in whole.stdout
    for one, other in zip(metrics(layers.stdout), metrics(whole.stdout), strict=True):
        assert abs(float(one[1]) - float(other[1])) < 2e-3  # the loss
    options = ("--engine", "fused", "--threads", "2", "--run", "stopped")
    stopped = run("train.py", *common, *options, cwd=tmp_path, prelude=after_step(20, CTRL_C))
    assert stopped.returncode == 130, stopped.stderr
    resumed = run("train.py", "--resume", "stopped", "--threads", "1", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "by the fused engine on 1 thread\n" in resumed.stdout
    assert_same_state(tmp_path / "stopped", tmp_path / "whole")


NOT_THERE = """
from npbn import engine
from npbn.errors import UnsupportedError

def fused(*_):
    raise UnsupportedError("layer 3 (Sigmoid()): there is no stage for it")

engine._fused = fused
"""

# What layers compute, by the name of the fused engine.
THERE = """
from npbn import engine
from npbn.engine.layers import LayersEngine

class FusedEngine:
    kind = "fused"
    description = "by the fused engine on 2 threads"

    def __init__(self, *what, batch_size, device):
        self.engine = LayersEngine(*what, batch_size=batch_size, backend=device)
        self.steps, self.evaluate = self.engine.steps, self.engine.evaluate

def fused(*arguments):
    *what, batch_size, device, _, _, _ = arguments
    return FusedEngine(*what, batch_size=batch_size, device=device)

engine._fused = fused
"""


def test_what_the_fused_engine_cannot_do_is_left_to_the_layers(tmp_path):
    process = run("train.py", *QUICK, cwd=tmp_path, prelude=NOT_THERE)
    assert process.returncode == 0, process.stderr
    line = rf"float32, {LAYERS} \(layer 3 \(Sigmoid\(\)\): there is no stage for it\)\n"
    assert re.search(line, process.stdout)
    options = ("--engine", "fused", "--run", "other")
    process = run("train.py", *QUICK, *options, cwd=tmp_path, prelude=NOT_THERE)
    message = "train.py: error: --engine fused: layer 3 (Sigmoid()): there is no stage for it"
    assert_refused(process, message, "; --engine layers can do it")


@pytest.mark.parametrize("options", [(), ("--engine", "fused"), ("--engine", "layers")])
def test_a_run_goes_on_by_the_kind_of_engine_that_it_began_with(options, tmp_path):
    """And by layers where the fused engine is not to be had any more; a line says why."""
    common = (*QUICK, *options, "--epochs", "2", "--batch-size", "100", "--run", "run")
    stop = after_step(20, CTRL_C)
    process = run("train.py", *common, cwd=tmp_path, prelude=f"{THERE}\n{stop}")
    assert process.returncode == 130, process.stderr
    name = LAYERS if "layers" in options else "by the fused engine on 2 threads"
    assert re.search(f"float32, {name}\n", process.stdout)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["engine"] == ("layers" if "layers" in options else "fused")
    assert config["threads"] is None and "workers" not in config
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    there = run("train.py", "--resume", "run", cwd=tmp_path, prelude=THERE)
    assert there.returncode == 0, there.stderr
    assert re.search(f"float32, {name}\n", there.stdout)
    gone = run("train.py", "--resume", "other", cwd=tmp_path, prelude=NOT_THERE)
    assert gone.returncode == 0, gone.stderr
    reason = "" if "layers" in options else " (layer 3 (Sigmoid()): there is no stage for it)"
    assert re.search(rf"float32, {LAYERS}{re.escape(reason)}\n", gone.stdout)
    assert_same_state(tmp_path / "run", tmp_path / "other")


def test_what_began_by_layers_goes_on_by_layers(tmp_path):
    """Although the fused engine has been installed since."""
    common = (*QUICK, "--epochs", "2", "--batch-size", "100", "--run", "run")
    stop = after_step(20, CTRL_C)
    process = run("train.py", *common, cwd=tmp_path, prelude=f"{NOT_THERE}\n{stop}")
    assert process.returncode == 130, process.stderr
    process = run("train.py", "--resume", "run", cwd=tmp_path, prelude=THERE)
    assert process.returncode == 0, process.stderr
    assert re.search(rf"float32, {LAYERS}\n", process.stdout)


def test_a_run_of_an_older_npbn_is_refused_in_one_line(tmp_path):
    """Its order of examples came from a generator, whose state the checkpoint has."""
    process = run("train.py", *QUICK, "--engine", "layers", "--run", "run", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    path = tmp_path / "run" / "last.safetensors"
    arrays, record = load_checkpoint(path)
    save_checkpoint(path, arrays, record | {"generator": {"bit_generator": "PCG64"}})
    process = run("train.py", "--resume", "run", cwd=tmp_path)
    assert_refused(process, "train.py: error: run/last.safetensors", "written by an older npbn")


def assert_same_state(one: Path, other: Path) -> None:
    one, other = (load_checkpoint(path / "last.safetensors")[0] for path in (one, other))
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
