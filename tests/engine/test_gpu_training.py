"""The training loop by the GPU engine, on a stand-in for CuPy that runs its kernels on the CPU."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from models import SMALL, a_split, small_model

import cupy_stand_in
import emulator
from commands import assert_refused
from cupy_stand_in import CUDADriverError, CUDARuntimeError
from npbn import training
from npbn.checkpoint import load_checkpoint
from npbn.engine import build
from npbn.engine.gpu import engine
from npbn.errors import BackendError, NonFiniteError
from npbn.optim import SGD, StepDecay

DEVICE = cupy_stand_in.DEVICE

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ on Linux, which compiles the CUDA kernels"
)


@pytest.fixture(autouse=True)
def short_graphs(cupy, monkeypatch):
    """An epoch of 60 examples is 3 steps, 3 steps, 1 step and 1 step on fewer examples."""
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 3)
    monkeypatch.setattr(engine, "EVALUATED_AT_ONCE", 16)


def a_training(*, layers=False, examples=60, lr=0.1, seed=0, **options):
    model = small_model()
    model.to(DEVICE, "float64")
    train, test = a_split(SMALL, examples, 1), a_split(SMALL, 20, 2)
    optimizer = SGD(model.parameters(), StepDecay(lr, 5, 0.5), momentum=0.9, weight_decay=0.01)
    what = model, optimizer, train, test
    kind = "layers" if layers else "fused"
    chosen = build(kind, *what, batch_size=8, backend=DEVICE)
    return training.Training(
        *what, engine=chosen, batch_size=8, seed=seed, backend=DEVICE, **options
    )


def run(state, epochs=2, **options):
    found: list = []
    state.run(epochs, on_epoch=found.append, **options)
    return [without_times(epoch) for epoch in found]


def without_times(epoch):
    found = dataclasses.asdict(epoch)
    for part in ("train", "test"):
        if found[part] is not None:
            del found[part]["seconds"]
    return found


def losses(epochs):
    """Taken out of them, for what is left to be compared exactly."""
    return [epoch[part].pop("loss") for epoch in epochs for part in ("train", "test")]


def assert_alike(one, other, **bounds):
    """The states."""
    for arrays, others in zip(one.state(), other.state(), strict=True):
        assert arrays.keys() == others.keys()
        for name, value in arrays.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(others[name], value, **bounds, err_msg=name)
            else:
                assert others[name] == value, name


@pytest.mark.parametrize(
    ("examples", "options", "sizes"),
    [
        (60, {}, [24, 24, 8, 4] * 2),
        (57, {}, [24, 24, 8] * 2),  # one is left out
        (60, {"max_steps": 12}, [24, 24, 8, 4, 24, 8]),
    ],
)
@pytest.mark.parametrize("precise_bn", [False, True])
def test_it_trains_as_the_layers_do(examples, options, sizes, precise_bn):
    expected, state = (
        a_training(examples=examples, layers=layers, precise_bn=precise_bn)
        for layers in (True, False)
    )
    state.model.eval()
    seen: list[int] = []
    wanted, found = run(expected, **options), run(state, on_batch=seen.append, **options)
    assert seen == sizes
    assert state.model.training  # for whoever looks with the layers
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=1e-9)
    assert found == wanted
    assert_alike(expected, state, rtol=1e-9, atol=1e-10)


class StopError(Exception):
    pass


def stop_after(calls: int):
    def on_batch(_: int) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise StopError

    return on_batch


@pytest.mark.parametrize(("stop", "step"), [(2, 6), (4, 8), (7, 15)])
def test_stopped_and_resumed_equals_never_stopped(stop, step):
    """In an epoch, at its end, and in the next one; by another object, and by the same one."""
    whole = a_training()
    expected = run(whole)
    first, seen = a_training(), []
    with pytest.raises(StopError):
        first.run(2, on_batch=stop_after(stop), on_epoch=seen.append)
    seen = [without_times(epoch) for epoch in seen]
    arrays, record = first.state()
    assert record["step"] == step
    second = a_training()
    second.load_state(arrays, json.loads(json.dumps(record)))
    for state in (second, first):
        assert seen + run(state) == expected
        assert_alike(whole, state, rtol=0)


def test_an_epoch_waits_for_the_device_at_its_end_alone(cupy, monkeypatch):
    """Of training and of evaluation, the totals are read once."""
    waits = []

    def watched(name, original):
        def call(*arguments):
            waits.append(name)
            return original(*arguments)

        return call

    state = a_training()
    monkeypatch.setattr(cupy, "asnumpy", watched("asnumpy", cupy.asnumpy))
    monkeypatch.setattr(training._Totals, "read", watched("read", training._Totals.read))
    monkeypatch.setattr(state.engine.stream, "synchronize", lambda: waits.append("synchronize"))
    state.run(2, eval_every=2, on_batch=lambda _: waits.append("batch"))
    assert waits == ["batch"] * 4 + ["read"] + ["batch"] * 4 + ["read", "read"]


def test_the_two_streams_wait_for_each_other():
    """The engine's for what was asked of the default one before, and that one for the engine's."""
    state = a_training()
    inside, (outside,) = state.engine.stream, cupy_stand_in.Stream.current

    def check(_):
        assert inside.recorded == outside.seen[inside]
        assert outside.recorded == inside.seen[outside]
        assert cupy_stand_in.Stream.current == [outside]

    before = outside.recorded
    state.run(1, on_batch=check, on_epoch=check)
    assert outside.recorded - before == 1 + 4 + 1  # to begin, for each launch, and to evaluate


@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
def test_a_loss_that_is_not_finite_ends_the_run_and_is_located():
    state, expected = a_training(lr=1e200), a_training(lr=1e200, layers=True)
    start = state.state()
    with pytest.raises(NonFiniteError, match="in epoch 1, the loss became NaN or infinite"):
        state.run(3)
    with pytest.raises(NonFiniteError, match="the loss or the state is NaN or infinite"):
        state.state()
    state.load_state(*start)
    where = state.locate_non_finite()
    assert where == expected.locate_non_finite()
    assert where.startswith("step 2: ")


@pytest.mark.parametrize("failure", [CUDARuntimeError, CUDADriverError])
@pytest.mark.parametrize("place", ["launch", "totals", "evaluation", "checkpoint"])
def test_a_gpu_that_fails_is_one_clear_error(place, failure, cupy, monkeypatch):
    def fail(*_):
        raise failure("cudaErrorIllegalAddress: an illegal memory access\nwas encountered")

    state = a_training()
    if place == "launch":
        monkeypatch.setattr(state.engine, "_graph", fail)
    elif place == "totals":
        monkeypatch.setattr(training._Totals, "read", fail)
    elif place == "evaluation":
        monkeypatch.setattr(state.engine, "evaluate", fail)
    message = (
        rf"^the GPU failed: {failure.__name__}: cudaErrorIllegalAddress: an illegal memory access "
        r"was encountered; .* a run can go on from its last checkpoint"
    )
    with pytest.raises(BackendError, match=message):
        state.run(2, on_epoch=fail if place == "checkpoint" else None)


def test_other_errors_stay_what_they_are():
    with pytest.raises(StopError):
        a_training().run(1, on_batch=stop_after(1))


FEW = """
import dataclasses
from npbn import data

digits = data.load("digits")
few = data.Split(digits.test.images[:5], digits.test.labels[:5])
data.load = lambda *_, **__: dataclasses.replace(digits, test=few)
"""

GPU = f"""{FEW}
from pathlib import Path
import cupy_stand_in
from npbn.engine.gpu import engine
cupy_stand_in.install(Path({{builds!r}}))
engine.STEPS_PER_GRAPH = 2
"""

IN_THE_SECOND_EPOCH = """
def launch(self, *arguments, original=engine.GpuEngine._launch):
    if self.optimizer.steps == 3:
        {what}
    return original(self, *arguments)

engine.GpuEngine._launch = launch
"""
INTERRUPT = IN_THE_SECOND_EPOCH.format(
    what="import os, signal; os.kill(os.getpid(), signal.SIGINT)"
)
FAIL = IN_THE_SECOND_EPOCH.format(what="raise cupy_stand_in.CUDARuntimeError('cudaErrorUnknown')")

UNSUPPORTED = """
from npbn.errors import UnsupportedError

def plan(*_):
    raise UnsupportedError("layer 3 (Sigmoid()): there is no stage for it")

engine.plan = plan
"""

COMMON = ("--dataset", "digits", "--limit-train", "11", "--batch-size", "4", "--lr", "0.1")
COMMON += ("--momentum", "0.9", "--epochs", "2", "--eval-every", "2")
FUSED = (*COMMON, "--engine", "fused")


def test_the_program_trains_by_it_and_goes_on_to_the_bit(builds, trainer, tmp_path):
    """Interrupted by Ctrl-C in the second epoch, of three steps; and by a failure of the GPU."""
    gpu = GPU.format(builds=str(builds))

    def train(*options, prelude=""):
        return trainer(*options, cwd=tmp_path, prelude=gpu + prelude)

    whole = train(*FUSED, "--backend", "cupy", "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "float32, by the fused engine on the GPU\n" in whole.stdout
    stopped = train(*FUSED, "--run", "stopped", prelude=INTERRUPT)
    assert stopped.returncode == 130, stopped.stderr
    assert (
        "stopped after step 5; to go on: python scripts/train.py --resume stopped\n"
        in stopped.stdout
    )
    failed = train(*FUSED, "--run", "failed", prelude=FAIL)
    assert_refused(
        failed, "the GPU failed: CUDARuntimeError: cudaErrorUnknown; ", "--resume failed"
    )
    for name, where in (("stopped", "epoch 1, batch 2"), ("failed", "epoch 1, batch 0")):
        resumed = train("--resume", name)
        assert resumed.returncode == 0, resumed.stderr
        assert f"going on after {where}\n" in resumed.stdout
        assert "by the fused engine on the GPU\n" in resumed.stdout
        one, other = (
            load_checkpoint(tmp_path / r / "last.safetensors")[0] for r in ("whole", name)
        )
        for array, value in one.items():
            np.testing.assert_array_equal(value, other[array], err_msg=array)


def test_a_run_goes_from_the_gpu_to_the_cpu_and_back(builds, trainer, tmp_path):
    gpu = GPU.format(builds=str(builds))
    stopped = trainer(*FUSED, "--run", "run", cwd=tmp_path, prelude=gpu + INTERRUPT)
    assert stopped.returncode == 130, stopped.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    here = trainer(
        "--resume", "run", "--backend", "numpy", "--threads", "1", cwd=tmp_path, prelude=FEW
    )
    assert here.returncode == 0, here.stderr
    assert ", by " in here.stdout and "on the GPU" not in here.stdout
    there = trainer("--resume", "other", cwd=tmp_path, prelude=gpu)
    assert there.returncode == 0, there.stderr
    found = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("run", "other")
    ]
    for part in ("train", "test"):
        one, other = (epoch[part]["loss"] for epoch in found)
        assert one == pytest.approx(other, rel=1e-4), part


def test_it_computes_where_it_is_asked_for_and_can(builds, trainer, tmp_path):
    gpu = GPU.format(builds=str(builds))
    process = trainer(*COMMON, cwd=tmp_path, prelude=gpu)
    assert process.returncode == 0, process.stderr
    assert "float32, by layers\n" in process.stdout  # until it has run on a GPU
    process = trainer(*FUSED, "--run", "2", cwd=tmp_path, prelude=gpu + UNSUPPORTED)
    assert_refused(process, "--engine fused: layer 3 (Sigmoid()): there is no stage for it")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("cupy_stand_in.CUDARuntimeError('lost')", "the GPU failed: CUDARuntimeError: lost; "),
        ("MemoryError('of 3 GiB')", "the GPU has too little free memory: MemoryError: of 3 GiB; "),
    ],
)
def test_failures_before_the_first_step_are_one_line(error, said, builds, trainer, tmp_path):
    fails = f"def fail(*_): raise {error}\n"
    where = {
        "build": "engine.GpuEngine._find_views = fail\n",
        "record": "import npbn.inspection\nnpbn.inspection.histograms = fail\n",
    }
    for name, patch in where.items():
        prelude = GPU.format(builds=str(builds)) + fails + patch
        process = trainer(*FUSED, "--run", name, cwd=tmp_path, prelude=prelude)
        assert_refused(process, said)
        assert not (tmp_path / name).exists()
