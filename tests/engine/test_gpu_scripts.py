"""What scripts measure and check on a GPU, on the stand-in for CuPy, with tiny sizes."""

from __future__ import annotations

import argparse
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_cuda_kernels import SMALL, small_model

import emulator
from commands import assert_refused, run
from npbn import backend
from npbn.errors import BackendError
from npbn.layers import Flatten, Linear, Sequential
from test_command_lines import MODULES

NUMPY = backend.get_backend("numpy")
CHECK_GPU, BENCHMARK = MODULES["check_gpu"], MODULES["benchmark"]
SETTING = CHECK_GPU.Setting(
    NUMPY,
    networks={"small": lambda generator: small_model()},
    shape=SMALL,
    classes=3,
    batch_size=8,
    examples=20,
    tested=10,
    few=20,
    steps=3,
    epochs=2,
    timed_epochs=2,
)

try:
    backend.get_backend("cupy")
except BackendError:
    GPU = False
else:
    GPU = True

emulated = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ on Linux, which compiles the CUDA kernels"
)
without_gpu = pytest.mark.skipif(GPU, reason="there is a GPU")


@pytest.fixture
def card(request, monkeypatch):
    """The stand-in with what it lacks: a card, and memory, of which ``used`` bytes are in use."""
    fake = request.getfixturevalue("cupy")
    memory = SimpleNamespace(used=1000)
    properties = {"multiProcessorCount": 132, "totalGlobalMem": 10**9}
    fake.cuda.Device = lambda: SimpleNamespace(id=0, compute_capability="90")
    fake.cuda.runtime = SimpleNamespace(
        getDeviceProperties=lambda number: properties,
        driverGetVersion=lambda: 13020,
        memGetInfo=lambda: (10**9 - memory.used, 10**9),
    )
    pool = SimpleNamespace(used_bytes=lambda: memory.used)
    fake.get_default_memory_pool = lambda: pool
    return memory


@emulated
def test_all_checks_on_the_stand_in(card, capsys):
    results = CHECK_GPU.check_all(SETTING)
    assert all(result["ok"] for result in results.values()), results
    names = ("card", "a step of small, float32", "a step of small, float64")
    names += ("repetition", "first losses", "time", "memory")
    assert tuple(results) == names
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"ok      {name}: ")
    assert "driver for CUDA 13.2" in lines[0]
    assert results["first losses"]["engine"] < 1e-5
    assert results["repetition"]["different_parts"] == 0
    assert len(results["time"]["epochs_seconds"]) == 2
    json.dumps(results)


@emulated
def test_what_is_not_as_promised_is_found(card, capsys, monkeypatch):
    train, calls = CHECK_GPU.CupyEngine.train, []

    def worse(engine, order):
        """Losses that change from run to run, wrong averages, and memory that grows."""
        losses, hits = train(engine, order)
        calls.append(order)
        card.used += 1
        engine.arrays["0.moving_mean"][0] += 0.1
        return losses + 0.01 * len(calls), hits

    monkeypatch.setattr(CHECK_GPU.CupyEngine, "train", worse)
    results = CHECK_GPU.check_all(SETTING)
    assert [name for name, result in results.items() if result["ok"]] == ["card", "time"]
    assert capsys.readouterr().out.count("FAILED  ") == 5


def test_a_check_that_breaks_off_fails_and_the_others_go_on(monkeypatch, capsys):
    def broken(setting):
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr(CHECK_GPU, "checks", lambda _: {"a": lambda: broken(0), "b": found})
    results = CHECK_GPU.check_all(SETTING)
    lines = ["FAILED  a: RuntimeError: an illegal memory access", "ok      b: fine"]
    assert capsys.readouterr().out.splitlines() == lines
    assert [result["ok"] for result in results.values()] == [False, True]


def found():
    return CHECK_GPU.Finding(True, "fine", {"number": 1})


@pytest.mark.parametrize("ok", [True, False])
def test_exit_code_and_results_in_a_file(ok, monkeypatch, tmp_path):
    file = tmp_path / "out.json"
    seen = []
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--epochs", "5", "--json", str(file)])
    monkeypatch.setattr(backend, "get_backend", lambda name: NUMPY)
    monkeypatch.setattr(
        CHECK_GPU, "check_all", lambda setting: seen.append(setting) or {"a": {"ok": ok}}
    )
    if ok:
        CHECK_GPU.main()
    else:
        with pytest.raises(SystemExit) as end:
            CHECK_GPU.main()
        assert end.value.code == 1
    assert seen[0].epochs == 5 and seen[0].examples == 60_000
    assert json.loads(file.read_text())["results"] == {"a": {"ok": ok}}


@emulated
@pytest.mark.usefixtures("card")
def test_the_benchmark_measures_the_same_by_engine_and_layers(monkeypatch):
    """A pass in one call, or batch by batch."""

    def model(arguments):
        return Sequential(Flatten(), Linear(784, 10, generator=np.random.default_rng(0)))

    monkeypatch.setattr(backend, "get_backend", lambda name: NUMPY)
    monkeypatch.setattr(BENCHMARK, "npbn_model", model)
    settings = {"images": 40, "batch_size": 16, "threads": 1, "seed": 0, "backend": "cupy"}
    found = []
    for worker in ("engine", "layers"):
        arguments = argparse.Namespace(**settings, worker=worker)
        contestant = BENCHMARK.prepared(arguments)
        tasks = {"train": 16, "epoch": 16, "evaluate": 32, "evaluate at once": 40}
        answers = {task: BENCHMARK.measure(contestant, task, n) for task, n in tasks.items()}
        assert all(0 < a["examples_per_second"] < math.inf for a in answers.values())
        found.append([answer["sum"] for answer in answers.values()])
        if worker == "engine":
            assert "kernel launches a step" in contestant.description
    assert np.allclose(*found, rtol=1e-5)


@without_gpu
def test_without_a_gpu_one_line_says_so(tmp_path):
    assert_refused(run("check_gpu.py", cwd=tmp_path), "check_gpu.py: error: ", "CuPy")


@without_gpu
@pytest.mark.parametrize("name", ["engine", "graph"])
def test_contestants_on_a_gpu_are_refused_without_one(name, tmp_path):
    options = ("--backend", "cupy", "--quick", "--contestants", name)
    process = run("benchmark.py", *options, cwd=tmp_path)
    assert_refused(process, "benchmark.py: error: PyTorch eager: this PyTorch finds no GPU")
    assert ("left out: npbn engine: CuPy" in process.stdout) == (name == "engine")
