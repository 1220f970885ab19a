"""scripts/benchmark.py: that it measures what it says. How fast anything is, it is no test of."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from commands import SCRIPTS, assert_refused, run
from npbn import models, onnx_graph
from npbn.layers import BatchNorm, Flatten, Linear, MaxPool2d, Sequential

sys.path.insert(0, str(SCRIPTS))
try:
    benchmark, contestants, cpu_rates, machine = (
        importlib.import_module(name)
        for name in ("benchmark", "_contestants", "_cpu_rates", "_machine")
    )
finally:
    sys.path.remove(str(SCRIPTS))

QUICK = ("--quick", "--threads", "1", "--batch-size", "16")
TASKS = ("train", "epoch", "evaluate", "evaluate at once")
SETTINGS = contestants.Settings(
    worker="", model="lenet", backend="numpy", threads=1, batch_size=16, images=40, seed=3
)


def test_quick_run_with_every_value_written(tmp_path):
    process = run(
        "benchmark.py",
        *QUICK,
        *("--contestants", "layers", "engine", "by-hand", "onnx"),
        *("--json", "out.json", "--chart", "out.png"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    report = json.loads((tmp_path / "out.json").read_text())
    (comparison,) = report["results"]
    ours, onnx = ["npbn layers", "npbn engine"], "ONNX Runtime"
    titles = [*ours, "PyTorch eager", "PyTorch, hand-written BN", onnx]
    assert list(comparison["results"]) == titles
    for title, result in comparison["results"].items():
        assert f"| {title} " in process.stdout and result["description"] in process.stdout
        assert "thread" in result["description"]  # one, or more
        assert result["peak_resident_bytes"] > 10_000_000
        if title == onnx:  # it cannot train
            assert result["first_step_seconds"] is None
            assert "train" not in result and "epoch" not in result
        else:
            assert 0 < result["first_step_seconds"] < math.inf
        for task in TASKS[2 if title == onnx else 0 :]:
            assert len(result[task]) == 3 and min(result[task]) > 0
    rows = [line.split("|")[2:] for line in process.stdout.splitlines() if f"| {onnx} " in line]
    for cells in rows:
        assert [cell.strip() == "-" for cell in cells[:4]] == [True, True, False, False]
    assert [cell.strip() == "-" for cell in rows[1][4:6]] == [True, False]
    assert "npbn engine, as a ratio to the fastest peer: train " in process.stdout
    assert "This run does not count" in process.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]

    where = comparison["machine"]
    assert where["date"] == datetime.date.today().isoformat()
    assert where["cores"] >= 1 and where["features"] and "architecture" in where["blas"]
    assert {"npbn", "numpy", "numba", "torch", "onnxruntime"} <= set(where["versions"])
    assert where["threading_layer"] in ("omp", "tbb", "workqueue")
    line = machine.about(where)
    assert f"threading layer {where['threading_layer']}" in line and line in process.stdout

    floor = comparison["floor"]
    assert list(floor["peaks"]) == ["1"] and len(floor["peaks"]["1"]) == 3
    assert list(floor["percent"]) == titles[:-1]
    for title, percents in floor["percent"].items():
        speeds, peaks = comparison["results"][title]["train"], floor["peaks"]["1"]
        for percent, speed, rates in zip(percents, speeds, peaks, strict=True):
            least = floor["operations"] / rates[floor["way"]]
            assert percent == pytest.approx(100 * least / (16 / speed))
    assert "Training, % of the floor: npbn layers " in process.stdout


def test_several_batch_sizes_with_two_threads(tmp_path):
    process = run(
        "benchmark.py",
        *("--quick", "--threads", "2", "--batch-size", "500", "1000"),
        *("--contestants", "engine"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("| npbn engine ") == 4  # two tables each
    for batch_size in ("500", "1,000"):
        assert f"batches of {batch_size}, 2 threads" in process.stdout


def test_who_cannot_take_part_is_left_out(tmp_path):
    no_compiler = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    no_jax = tmp_path / "jax"
    no_jax.mkdir()
    (no_jax / "jax.py").write_text("raise ModuleNotFoundError(name='jax')")
    process = run(
        "benchmark.py",
        *(*QUICK, "--contestants", "compile", "jax"),
        cwd=tmp_path,
        env={**no_compiler, "PYTHONPATH": str(no_jax)},
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    (reason,) = (line for line in lines if line.startswith("left out: torch.compile: "))
    assert "C++ compiler" in reason
    assert "left out: JAX jit: JAX is not installed: pip install jax" in lines
    assert "| PyTorch eager " in process.stdout and "| torch.compile " not in process.stdout


def test_without_onnx_runtime_it_is_left_out(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError(name='onnxruntime')")
    process = run(
        "benchmark.py",
        *(*QUICK, "--contestants", "onnx"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    reason = "onnxruntime is not installed: pip install onnx onnxruntime"
    assert f"left out: ONNX Runtime: {reason}" in process.stdout.splitlines()


@pytest.mark.parametrize(("name", "model"), [("lenet", models.LeNet), ("blenet", models.BLeNet)])
def test_the_networks_are_those_of_npbn(name, model):
    settings = dataclasses.replace(SETTINGS, model=name)
    found = contestants.npbn_model(settings).state_dict()
    expected = model(generator=np.random.default_rng(3)).state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["lenet", "blenet", "wide"])
def test_onnx_runtime_predicts_what_the_layers_do(name):
    """With batch norm folded, and so that every parameter and every moving average matters."""
    generator = np.random.default_rng(1)
    model = contestants.npbn_model(dataclasses.replace(SETTINGS, model=name))
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith(("gamma", "beta", "bias", "moving_mean")):
            state[key] = generator.normal(size=value.shape).astype(np.float32)
        elif key.endswith("moving_var"):
            state[key] = generator.uniform(0.1, 3, size=value.shape).astype(np.float32)
    model.load_state_dict(state)
    model.eval()
    session, description = contestants.onnx_session(model, 2)
    assert "2 threads" in description
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    for n in (1, 7, 256):  # the batch axis is dynamic
        images = generator.random((n, 1, 28, 28), np.float32)
        logits, classes = session.run(["logits", "classes"], {"images": images})
        expected = model.forward(images)
        assert logits.shape == expected.shape == (n, 10)
        assert np.max(np.abs(logits - expected)) <= 2e-6 * np.max(np.abs(expected))
        assert np.array_equal(classes, logits.argmax(1))


def test_onnx_graphs_of_other_layers_are_refused():
    for layers in ([MaxPool2d(2)], [BatchNorm(4, 2)], [Flatten(), BatchNorm(784, 2)]):
        with pytest.raises(ValueError, match="expected a layer of LeNet, got"):
            onnx_graph.onnx_graph(Sequential(*layers, Linear(4, 2)), (1, 28, 28))


def test_engine_and_layers_do_the_same_work():
    """Sums of losses, and of correct predictions of all images at once."""
    found = {}
    for worker in ("layers", "engine"):
        contestant = contestants.prepared(dataclasses.replace(SETTINGS, worker=worker))
        assert contestant.tasks == list(TASKS)
        answers = [
            contestants.measure(contestant, task, size)
            for task, size in zip(TASKS, (16, 16, 32, 40), strict=True)
        ]
        assert all(0 < answer["examples_per_second"] < math.inf for answer in answers)
        found[worker] = [answer["sum"] for answer in answers]
    train, epoch, _, at_once = zip(*found.values(), strict=True)
    assert train[0] == pytest.approx(train[1], rel=1e-4)
    assert epoch[0] == pytest.approx(epoch[1], rel=1e-4)
    assert at_once[0] == at_once[1]


@pytest.mark.parametrize("name", ["lenet", "blenet", "wide"])
def test_pytorch_starts_from_the_weights_of_npbn(name, monkeypatch):
    """Sums of losses, by the layers, PyTorch, and batch norm in elementary operations."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sums = []
    for worker in ("layers", "eager", "by-hand"):
        settings = dataclasses.replace(SETTINGS, worker=worker, model=name)
        sums.append(contestants.measure(contestants.prepared(settings), "train", 16)["sum"])
    assert sums[1:] == pytest.approx(sums[:1] * 2, rel=1e-4)


def test_a_part_of_the_images_is_evaluated_exactly():
    """40 images in batches of 32 are 40 images, not 64."""
    counted = []
    passes = contestants.batch_by_batch(
        np.arange(40),
        np.arange(40),
        step=lambda images, labels: 0,
        correct=lambda images, labels: counted.append(len(images)) or len(images),
        shuffle=lambda: np.arange(40),
        gather=lambda indices: (indices, indices),
    )
    contestant = contestants.Contestant("", 40, passes)
    assert contestants.measure(contestant, "evaluate", 32)["sum"] == 40
    assert counted == [32, 32, 8]  # the first is not counted
    counted.clear()
    assert contestants.measure(contestant, "train", 32)["sum"] == 0
    assert counted == []


@pytest.mark.parametrize("name", ["lenet", "blenet"])
def test_operations_of_a_step_by_hand(name):
    """Forward and by the weights for each layer, by the input for all but the first."""
    side, features = {"lenet": (24, 256), "blenet": (28, 400)}[name]
    model = contestants.npbn_model(dataclasses.replace(SETTINGS, model=name))
    first = 6 * side * side * 25
    others = 16 * (side // 2 - 4) ** 2 * 6 * 25 + features * 120 + 120 * 84 + 84 * 10
    found = cpu_rates.training_operations(model, (1, 28, 28), 256)
    assert found == 256 * 2 * (2 * first + 3 * others)
    assert name != "lenet" or found == 388_362_240
    assert model.training


def test_the_kernel_of_the_peak_computes_all_that_is_counted():
    kernel, lanes = cpu_rates.multiply_add_kernel(), cpu_rates.lanes()
    x = np.arange(cpu_rates.CHAINS, dtype=np.float64)
    assert kernel(0) == lanes * x.sum()
    for _ in range(3):
        x = 0.5 * x + 0.5
    assert kernel(3) == pytest.approx(lanes * x.sum())
    assert cpu_rates.operations_of(3) == 2 * 3 * lanes * len(x)


def test_the_peak_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(cpu_rates, "PRODUCT", 64)
    rates = cpu_rates.Peaks().measure(1)
    assert list(rates) == ["product"] and rates["product"] > 0
    assert cpu_rates.fastest_way([rates]) == "product"


def test_the_faster_way_by_medians_is_the_peak():
    rounds = [{"a": a, "b": b} for a, b in ((9.0, 2.0), (1.0, 3.0), (1.0, 2.0))]
    assert cpu_rates.fastest_way(rounds) == "b"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
def test_features_are_those_of_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    for feature, flag in (("AVX2", "avx2"), ("FMA3", "fma"), ("AVX512F", "avx512f")):
        assert (feature in machine.features()) == (flag in flags)


def test_the_fastest_peer_is_not_of_npbn():
    results = {
        "npbn layers": {"train": [9.0]},
        "PyTorch eager": {"train": [3.0, 4.0, 5.0], "evaluate": [1.0]},
        "JAX jit": {"train": [1.0, 3.9, 90.0]},
    }
    assert benchmark.fastest_peer(results, "train")[0] == "PyTorch eager"
    assert benchmark.fastest_peer(results, "evaluate")[0] == "PyTorch eager"


def test_array_api_cost(tmp_path):
    """Both ways must give the same results, or it stops."""
    process = run("array_api_cost.py", *QUICK, "--json", "out.json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert machine.about(report["machine"]) in process.stdout
    for result in report["results"].values():
        assert all(len(values) == 3 and min(values) > 0 for values in result.values())
    assert "| convolution " in process.stdout
    assert "| batch norm, sigmoid, pooling " in process.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rounds", "0"), "argument --rounds: expected an integer >= 1, got '0'"),
        (("--batch-size", "32", "10001"), "expected batches of at most 10,000 images"),
        (("--quick", "--batch-size", "1001"), "expected batches of at most 1,000 images"),
        (("--contestants", "torch"), "argument --contestants: invalid choice: 'torch'"),
        (("--contestants", "peaks"), "argument --contestants: invalid choice: 'peaks'"),
        (("--chart", "no/such/directory/out.png"), "cannot write"),
        (("--json", "no/such/directory/out.json"), "cannot write"),
        (("--no-such-option",), "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, expected, tmp_path):
    assert_refused(run("benchmark.py", *options, cwd=tmp_path), "benchmark.py: error:", expected)
    assert list(tmp_path.iterdir()) == []


def test_bad_options_of_array_api_cost(tmp_path):
    for options in (("--threads", "0"), ("--batch-size", "x"), ("--json", "no/such/out.json")):
        process = run("array_api_cost.py", *options, cwd=tmp_path)
        assert_refused(process, "array_api_cost.py: error:")
