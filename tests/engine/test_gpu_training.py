"""The training loop on CuPy, by the engine and by layers, on a GPU or on an emulated one."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import NUMPY, SMALL, a_split, small_model

import commands
import emulated_gpu
from commands import CTRL_C, after_step, assert_refused
from npbn import training
from npbn.checkpoint import load_checkpoint
from npbn.engine import build
from npbn.engine.gpu import engine
from npbn.errors import BackendError, NonFiniteError
from npbn.optim import SGD, StepDecay


@pytest.fixture(autouse=True)
def short_graphs(monkeypatch):
    """An epoch of 60 examples is 3 steps, 3 steps, 1 step and 1 step on fewer examples."""
    monkeypatch.setattr(engine, "STEPS_PER_GRAPH", 3)
    monkeypatch.setattr(engine, "EVALUATED_AT_ONCE", 16)


def a_training(device, *, kind="fused", examples=60, lr=0.1, seed=0, **options):
    model = small_model()
    model.to(device, "float64")
    splits = a_split(SMALL, examples, 1).to(device), a_split(SMALL, 20, 2).to(device)
    optimizer = SGD(model.parameters(), StepDecay(lr, 5, 0.5), momentum=0.9, weight_decay=0.01)
    what = model, optimizer, *splits
    chosen = build(kind, *what, batch_size=8, backend=device)
    return training.Training(
        *what, engine=chosen, batch_size=8, seed=seed, backend=device, **options
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


@pytest.mark.parametrize("streams", emulated_gpu.STREAMS)
@pytest.mark.parametrize(
    ("examples", "options", "sizes"),
    [
        (60, {}, [24, 24, 8, 4] * 2),
        (57, {}, [24, 24, 8] * 2),  # one is left out
        (60, {"max_steps": 12}, [24, 24, 8, 4, 24, 8]),
    ],
)
@pytest.mark.parametrize("precise_bn", [False, True])
def test_it_trains_as_numpy_does(
    examples, options, sizes, precise_bn, streams, cupy_backend, emulated
):
    """By the engine and by layers, whether streams are early or late."""
    emulated.set_streams(streams)
    expected = a_training(NUMPY, kind="layers", examples=examples, precise_bn=precise_bn)
    wanted = run(expected, **options)
    right = losses(wanted)
    for kind in ("fused", "layers"):
        state = a_training(cupy_backend, kind=kind, examples=examples, precise_bn=precise_bn)
        state.model.eval()
        seen: list[int] = []
        found = run(state, on_batch=seen.append, **options)
        if kind == "fused":
            assert seen == sizes
        assert state.model.training  # for whoever looks with the layers
        np.testing.assert_allclose(losses(found), right, rtol=1e-9)
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
def test_stopped_and_resumed_equals_never_stopped(stop, step, cupy_backend):
    """In an epoch, at its end, and in the next one; by another object, and by the same one."""
    whole = a_training(cupy_backend)
    expected = run(whole)
    first, seen = a_training(cupy_backend), []
    with pytest.raises(StopError):
        first.run(2, on_batch=stop_after(stop), on_epoch=seen.append)
    seen = [without_times(epoch) for epoch in seen]
    arrays, record = first.state()
    assert record["step"] == step
    second = a_training(cupy_backend)
    second.load_state(arrays, json.loads(json.dumps(record)))
    for state in (second, first):
        assert seen + run(state) == expected
        assert_alike(whole, state, rtol=0)


def test_an_epoch_waits_for_the_device_only_at_its_end(emulated, cupy_backend):
    """In later epochs, its steps allocate nothing, and ask for nothing but graphs and sums."""
    state = a_training(cupy_backend)
    run(state, 1)
    for epochs, eval_every in ((2, 100), (3, 1)):
        with emulated.calls() as calls:
            state.run(epochs, eval_every=eval_every, on_batch=lambda _: emulated.note("batch"))
        last = len(calls) - calls[::-1].index("batch")
        steps, end = calls[:last], calls[last:]
        waits = [i for i, call in enumerate(steps) if waits_for_the_device(call)]
        assert not waits, [steps[i] for i in waits]
        assert not [call for call in calls if call.startswith("allocate")]
        assert sum(call.startswith("launch graph") for call in steps) == 4
        assert sum(call.startswith("copy") and "device to host" in call for call in end) == 4


def waits_for_the_device(call: str) -> bool:
    return call.startswith("wait") or "device to host" in call


@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
def test_a_loss_that_is_not_finite_ends_the_run_and_is_located(cupy_backend):
    state = a_training(cupy_backend, lr=1e200)
    expected = a_training(cupy_backend, kind="layers", lr=1e200)
    start = state.state()
    with pytest.raises(NonFiniteError, match="in epoch 1, the loss became NaN or infinite"):
        state.run(3)
    with pytest.raises(NonFiniteError, match="the loss or the state is NaN or infinite"):
        state.state()
    state.load_state(*start)
    where = state.locate_non_finite()
    assert where == expected.locate_non_finite()
    assert where.startswith("step 2: ")


ILLEGAL_ADDRESS, UNKNOWN, OUT_OF_MEMORY = 700, 999, 2


@pytest.mark.parametrize("kind", ["fused", "layers"])
@pytest.mark.parametrize("call", ["launch", "copy", "product", "wait"])
def test_a_gpu_that_fails_is_one_clear_error(call, kind, emulated, cupy_backend):
    if (call, kind) == ("product", "fused"):
        return  # it has no products of cuBLAS
    state = a_training(cupy_backend, kind=kind)
    run(state, 1)
    emulated.fail(call, 3, ILLEGAL_ADDRESS, lasting=True)
    message = r"^the GPU failed: CU\w*Error: .* a run can go on from its last checkpoint"
    with pytest.raises(BackendError, match=message):
        state.run(2)
    emulated.reset()  # CuPy complains about what it frees on a lost device


def test_other_errors_stay_what_they_are(cupy_backend):
    with pytest.raises(StopError):
        a_training(cupy_backend).run(1, on_batch=stop_after(1))


# The program.

FEW = """
import dataclasses
from npbn import data

digits = data.load("digits")
few = data.Split(digits.test.images[:5], digits.test.labels[:5])
data.load = lambda *_, **__: dataclasses.replace(digits, test=few)
"""

GPU = f"""{FEW}
{commands.GPU}
from npbn.engine.gpu import engine
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
FAIL = IN_THE_SECOND_EPOCH.format(what="emulated_gpu.fail('launch', 0, 999, lasting=True)")

UNSUPPORTED = """
from npbn.errors import UnsupportedError

def plan(*_):
    raise UnsupportedError("layer 3 (Sigmoid()): there is no stage for it")

engine.plan = plan
"""

COMMON = ("--dataset", "digits", "--limit-train", "11", "--batch-size", "4", "--lr", "0.1")
COMMON += ("--momentum", "0.9", "--epochs", "2", "--eval-every", "2")
FUSED = (*COMMON, "--engine", "fused")


def test_the_program_trains_by_it_and_goes_on_to_the_bit(emulated, trainer, tmp_path):
    """Interrupted by Ctrl-C in the second epoch, of three steps; and by a failure of the GPU."""

    def train(*options, prelude=""):
        return trainer(*options, cwd=tmp_path, prelude=GPU + prelude)

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
    said = "the GPU failed: CUDARuntimeError: cudaErrorUnknown: "
    assert_refused(failed, said, "--resume failed")
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


@pytest.mark.usefixtures("cupy_backend")
@pytest.mark.parametrize("engines", ["fused", "layers"])
def test_a_run_goes_from_the_gpu_to_the_cpu_and_back(engines, trainer, tmp_path):
    """What began on the one goes on on the other, in both directions, and ends alike."""
    options = (*COMMON, "--epochs", "4", "--eval-every", "1", "--engine", engines)
    gpu, cpu = ("--backend", "cupy"), ("--backend", "numpy", "--threads", "1")
    found = {}
    for name, first, second in (("there", gpu, cpu), ("back", cpu, gpu), ("stay", cpu, cpu)):
        stop = GPU + after_step(2, CTRL_C)
        started = trainer(*options, *first, "--run", name, cwd=tmp_path, prelude=stop)
        assert started.returncode == 130, started.stderr
        resumed = trainer("--resume", name, *second, cwd=tmp_path, prelude=GPU)
        assert resumed.returncode == 0, resumed.stderr
        assert ("on the GPU" in resumed.stdout) == (second is gpu and engines == "fused")
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        found[name] = last["train"]["loss"], last["test"]["loss"]
    for name in ("there", "back"):
        assert found[name] == pytest.approx(found["stay"], rel=2e-3), name


@pytest.mark.usefixtures("cupy_backend")
def test_it_computes_where_it_is_asked_for_and_can(trainer, tmp_path):
    process = trainer(*FUSED, "--run", "2", cwd=tmp_path, prelude=GPU + UNSUPPORTED)
    assert_refused(process, "--engine fused: layer 3 (Sigmoid()): there is no stage for it")


CALLS = {"launch": 400, "copy": 60, "allocation": 30, "product": 300, "wait": 30}
"""How many of them there may be before the one that fails, by kind."""


@settings(max_examples=max(8, settings().max_examples // 3))
@given(data=st.data())
def test_a_failure_at_any_call_is_one_line_and_the_run_goes_on(data, emulated, trainer, tmp_path):
    """A GPU that is lost, or has no memory: at a random call, by layers and by the engine."""
    kind = data.draw(st.sampled_from(sorted(CALLS)))
    calls = data.draw(st.integers(0, CALLS[kind]))
    error = OUT_OF_MEMORY if kind == "allocation" else data.draw(st.sampled_from([700, 999]))
    engines = data.draw(st.sampled_from(["fused", "layers"]))
    fails = f"emulated_gpu.fail({kind!r}, {calls}, {error}, lasting={kind != 'allocation'})\n"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    options = (*COMMON, "--engine", engines, "--backend", "cupy", "--run", "run")
    process = trainer(*options, cwd=tmp_path, prelude=GPU + fails)
    if process.returncode == 0:  # there were fewer calls
        return
    assert_refused(process, "GPU")
    if (tmp_path / "run").exists():
        assert "--resume run" in process.stderr
        resumed = trainer("--resume", "run", "--backend", "numpy", cwd=tmp_path, prelude=FEW)
        assert resumed.returncode == 0, resumed.stderr
