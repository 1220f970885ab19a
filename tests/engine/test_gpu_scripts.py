"""What scripts measure and check on a GPU, on the emulated one where there is none; tiny sizes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import json
import math
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from models import SMALL, small_model

import emulated_gpu
from commands import assert_refused, run
from npbn import backend
from npbn.errors import NpbnError
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
    train_options=("--limit-train", "512", "--epochs", "2", "--threads", "1"),
    benchmark_options=("--quick", "--threads", "1", "--contestants", "engine", "eager"),
)
CHECKS = CHECK_GPU.checks(SETTING.networks)
HERE = {n: c for n, c in CHECKS.items() if n != "training" and not n.startswith("speed-")}
"""In this process, and so on the emulated GPU where there is none."""

without_gpu = pytest.mark.skipif(emulated_gpu.driver(), reason="there may be a GPU")


@pytest.fixture
def setting(cupy_backend):
    return dataclasses.replace(SETTING, device=cupy_backend)


def test_checks_on_a_gpu(setting, capsys):
    results = dict(CHECK_GPU.check_all(setting, HERE))
    assert {result["status"] for result in results.values()} == {"ok"}, results
    names = ["card", "small-float32", "small-float64", "repetition", "losses", "memory"]
    assert list(results) == names
    lines = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"ok       {name}: ")
    assert "driver for CUDA 1" in lines[0]
    assert results["losses"]["engine"] < 1e-5
    assert results["repetition"]["different_parts"] == 0
    json.dumps(results)


def test_what_is_not_as_promised_is_found(setting, capsys, monkeypatch):
    train, kept = CHECK_GPU.train, []

    def worse(engine, order):
        """Losses that change from run to run, wrong averages, and memory that grows."""
        losses = train(engine, order)
        kept.append(engine.cupy.zeros(1))
        engine.arrays["0.moving_mean"][0] += 0.1
        return losses + 0.01 * len(kept)

    monkeypatch.setattr(CHECK_GPU, "train", worse)
    results = dict(CHECK_GPU.check_all(setting, HERE))
    assert [name for name, result in results.items() if result["status"] == "ok"] == ["card"]
    assert capsys.readouterr().out.count("FAILED   ") == 5


def broken(setting):
    raise RuntimeError("an illegal\nmemory access")


def found(setting):
    return CHECK_GPU.Finding("ok", "fine", {"number": 1})


def slow(setting):
    return CHECK_GPU.Finding("missed", "not in time")


def interrupted(setting):
    raise KeyboardInterrupt


def test_a_check_that_breaks_off_fails_and_the_others_go_on(capsys):
    results = dict(CHECK_GPU.check_all(SETTING, {"a": broken, "b": found}))
    lines = ["FAILED   a: RuntimeError: an illegal memory access", "ok       b: fine"]
    assert capsys.readouterr().out.splitlines() == lines
    assert [result["status"] for result in results.values()] == ["FAILED", "ok"]


def check_here(name, arguments):
    """In place of a process of its own."""
    setting = dataclasses.replace(SETTING, epochs=arguments.epochs, examples=60_000)
    known = CHECK_GPU.checks(CHECK_GPU.NETWORKS)
    return dict(CHECK_GPU.check_all(setting, {name: known[name]}))[name]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs main with these options, as if there were a GPU, and what it found, by the file."""

    def check(*options):
        file = tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", ["check_gpu.py", *options, "--json", str(file)])
        monkeypatch.setattr(backend, "get_backend", lambda name: NUMPY)
        monkeypatch.setattr(CHECK_GPU, "check_apart", check_here)
        try:
            CHECK_GPU.main()
            code = 0
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            code = 130
        return code, json.loads(file.read_text())["results"]

    return check


@pytest.mark.parametrize(
    ("checks", "code", "statuses"),
    [
        ({"card": found, "a": slow}, 0, {"card": "ok", "a": "missed"}),
        ({"card": broken, "a": found}, 1, {"card": "FAILED", "a": "ok"}),
        ({"card": found, "a": interrupted, "b": found}, 130, {"card": "ok"}),
    ],
)
def test_exit_code_and_results_in_a_file(checks, code, statuses, check, monkeypatch):
    monkeypatch.setattr(CHECK_GPU, "checks", lambda networks: checks)
    ended, results = check()
    assert ended == code
    assert {name: result["status"] for name, result in results.items()} == statuses
    assert results["card"].get("number", 1) == 1


def test_checks_by_name_and_options(check, monkeypatch):
    seen = []

    def one(setting):
        seen.append(setting)
        return found(setting)

    monkeypatch.setattr(CHECK_GPU, "checks", lambda networks: dict.fromkeys(("card", *"abc"), one))
    assert list(check("--only", "c", "b", "--epochs", "5")[1]) == ["card", "b", "c"]
    assert {(setting.epochs, setting.examples) for setting in seen} == {(5, 60_000)}


def test_a_file_that_cannot_be_written_is_found_out_before_the_checks(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_gpu.py", "--json", "no/such/directory/out.json"])
    monkeypatch.setattr(backend, "get_backend", lambda name: NUMPY)
    monkeypatch.setattr(CHECK_GPU, "checks", lambda networks: {"card": found})
    with pytest.raises(NpbnError, match=r"out\.json cannot be written"):
        CHECK_GPU.main()
    assert capsys.readouterr().out == ""


def test_names_are_listed_and_others_refused(tmp_path):
    described = run("check_gpu.py", "--help", cwd=tmp_path).stdout.split("checks:\n")[1]
    for name in CHECK_GPU.checks(CHECK_GPU.NETWORKS):
        assert f" {name}" in described
    process = run("check_gpu.py", "--only", "card", "speed", cwd=tmp_path)
    assert_refused(process, "argument --only: invalid choice: 'speed'", "'speed-8192'")


# What is left to other scripts; here they really run, on the CPU.


def test_training_of_a_few_images_is_too_bad(fashion_mnist):
    ((_, result),) = CHECK_GPU.check_all(SETTING, {"training": CHECKS["training"]})
    assert result["status"] == "FAILED", result
    assert "2 epochs: loss" in result["text"]
    assert 0.285 < result["loss"] < 4 and 0 < result["train_accuracy"] < 0.893
    assert 0 < result["test_accuracy"] < 0.845
    parts = result["seconds_of_training"], result["seconds_of_evaluation"]
    assert min(parts) > 0 and sum(parts) < 2 * result["seconds"]
    json.dumps(result)


@pytest.mark.parametrize(
    ("loss", "train", "best", "seconds", "status"),
    [
        (0.285, 0.893, 0.845, 1.99, "ok"),
        (0.285, 0.893, 0.845, 2.0, "missed"),
        (0.2851, 0.893, 0.845, 1.0, "FAILED"),
        (0.285, 0.8929, 0.845, 1.0, "FAILED"),
        (0.285, 0.893, 0.8449, 3.0, "FAILED"),
        (math.nan, 0.893, 0.845, 1.0, "FAILED"),
    ],
)
def test_training_is_judged_by_its_last_epoch_and_its_best_test(loss, train, best, seconds, status):
    def epoch(loss, train, test):
        return {
            "train": {"loss": loss, "accuracy": train, "seconds": 0.25},
            "test": {"accuracy": test, "seconds": 0.125},
        }

    before = {"train": None, "test": None}
    records = [before, epoch(0.1, 0.99, best), epoch(loss, train, best - 0.1)]
    finding = CHECK_GPU.judge_training(seconds, records)
    assert finding.status == status
    assert ("s, missed)" in finding.text) == (seconds >= 2)
    assert finding.numbers["seconds_of_training"] == 0.5
    assert finding.numbers["seconds_of_evaluation"] == 0.25


def test_training_is_skipped_without_the_data(monkeypatch, tmp_path):
    monkeypatch.setenv("NPBN_DATA", str(tmp_path))
    ((_, result),) = CHECK_GPU.check_all(SETTING, {"training": CHECKS["training"]})
    assert result["status"] == "skipped"
    assert "$NPBN_DATA" in result["text"]


def test_what_another_script_refuses_is_told():
    with pytest.raises(NpbnError, match=r"^train\.py: error: argument --epochs: expected"):
        list(CHECK_GPU.lines("train.py", "--epochs", "0"))


def test_another_script_ends_when_nobody_listens_any_more(tmp_path):
    options = ("--dataset", "digits", "--backend", "numpy", "--epochs", "100000")
    lines = CHECK_GPU.lines("train.py", *options, "--run", str(tmp_path / "run"))
    assert next(lines).startswith("npbn")
    process = lines.gi_frame.f_locals["process"]
    lines.close()
    assert process.returncode == -signal.SIGKILL  # not only at the next line that it prints


@pytest.fixture(scope="module")
def comparison():
    """By a real run of the benchmark: without CUDA graphs and torch.compile."""
    finding = CHECK_GPU.check_speed(SETTING, 16)
    assert finding.status == "ok", finding
    assert "times PyTorch eager; times the faster" in finding.text
    assert "torch.cuda.graph: not measured; " in finding.text
    return finding.numbers["comparison"]


def beside(comparison, batch_size, **ratios):
    """The same, with the engine at 6 million examples/s, so many times as fast as others."""
    changed = copy.deepcopy(comparison)
    changed |= {"batch_size": batch_size, "floor": {"microseconds": batch_size / 60}}
    example = changed["results"]["npbn engine"]
    for name, ratio in {"engine": 1, **ratios}.items():
        speeds = [6e6 / ratio * factor for factor in (0.1, 1, 10)]
        changed["results"][BENCHMARK.CONTESTANTS[name]] = {**example, "train": speeds}
    return changed


@pytest.mark.parametrize(
    ("batch_size", "ratios", "status", "missed", "nearest"),
    [
        (256, {"eager": 10, "compile": 2, "graph": 3}, "ok", 0, 2),
        (256, {"eager": 10, "compile": 4, "graph": 2.5}, "ok", 0, 2.5),
        (256, {"eager": 10, "compile": 4, "graph": 1.9}, "missed", 1, 1.9),
        (256, {"eager": 9.9, "compile": 1, "graph": 1}, "missed", 2, 1),
        (256, {"eager": 10, "graph": 3}, "missed", 1, None),
        (64, {"eager": 1, "compile": 1, "graph": 1}, "ok", 0, 1),
    ],
)
def test_speed_is_judged_beside_eager_and_the_faster_of_the_others(
    batch_size, ratios, status, missed, nearest, comparison
):
    finding = CHECK_GPU.judge_speed(beside(comparison, batch_size, **ratios), ["left out: x"])
    assert finding.status == status
    assert finding.text.startswith("6,000,000 examples/s")
    assert finding.text.count(": missed)") == missed
    assert finding.text.count("(target") == (3 if batch_size == 256 else 0)
    assert f"{batch_size / 6:,.1f} µs a step, 10.0 times its floor of" in finding.text
    assert finding.text.endswith("; left out: x")
    assert finding.numbers.get("ratio_to_nearest") == (nearest and pytest.approx(nearest))
    assert finding.numbers["ratio_to_eager"] == pytest.approx(ratios["eager"])


def test_fewer_examples_than_wanted_are_missed(comparison):
    slow = beside(comparison, 256, eager=10, compile=2, graph=2)
    for result in slow["results"].values():
        result["train"] = [0.8 * speed for speed in result["train"]]
    finding = CHECK_GPU.judge_speed(slow, [])
    assert finding.status == "missed"
    assert "4,800,000 examples/s (target 5,000,000: missed)" in finding.text


def test_without_the_engine_in_it_a_comparison_fails(comparison):
    without = copy.deepcopy(comparison)
    del without["results"]["npbn engine"]
    finding = CHECK_GPU.judge_speed(without, ["left out: npbn engine: no kernels"])
    assert (finding.status, finding.text) == ("FAILED", "left out: npbn engine: no kernels")


def test_speed_is_skipped_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = CHECK_GPU.check_speed(SETTING, 256)
    assert finding.status == "skipped"
    assert (
        "not installed: torch; in npbn's directory: pip install -e '.[benchmark]'" in finding.text
    )


def test_the_rates_of_cards(cupy_backend, emulated, monkeypatch):
    """An H100's; an A100 has half as many lanes; some cards name no memory clock."""
    import cupy

    runtime = cupy.cuda.runtime
    attribute = runtime.deviceGetAttribute
    operations, bandwidth = BENCHMARK.card_rates()
    assert operations == pytest.approx(66.9e12, rel=1e-3)  # in the data sheet: 66.9 TFLOP/s
    assert bandwidth == pytest.approx(3.35e12, rel=1e-2)  # and 3.35 TB/s
    older = SimpleNamespace(id=0, compute_capability="80")
    with monkeypatch.context() as patched:
        patched.setattr(cupy.cuda, "Device", lambda: older)
        assert BENCHMARK.card_rates()[0] == operations / 2
    clock = runtime.cudaDevAttrMemoryClockRate
    monkeypatch.setattr(
        runtime,
        "deviceGetAttribute",
        lambda number, device: 0 if number == clock else attribute(number, device),
    )
    assert BENCHMARK.card_rates()[1] == math.inf


def test_the_floor_of_a_step_on_an_h100(cupy_backend, emulated, monkeypatch, capsys):
    """By hand, for network A: 388 million operations, as they take 6 µs there."""
    results = {"npbn engine": {"train": [256e6 / 50]}}
    monkeypatch.setattr(BENCHMARK, "compare_one", lambda arguments: (results, {}))
    monkeypatch.setattr(BENCHMARK, "print_results", lambda results: None)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--backend", "cupy"])
    (found,) = BENCHMARK.compare(BENCHMARK.parse_arguments())
    maps = 6 * 24 * 24 * 25, 16 * 8 * 8 * 6 * 25
    others = maps[1] + 256 * 120 + 120 * 84 + 84 * 10
    floor = found["floor"]
    assert floor["operations"] == 256 * 2 * (2 * maps[0] + 3 * others) == 388_362_240
    averages = 2 * (6 + 16 + 120 + 84)
    assert floor["bytes"] == 256 * 784 + 2 * 4 * (44_878 + averages)
    assert floor["operations_per_second"] == 132 * 128 * 2 * 1.98e9
    assert floor["bytes_per_second"] == 2 * 2.619e9 * 5120 / 8
    assert floor["microseconds"] == pytest.approx(5.8, abs=0.05)
    output = capsys.readouterr().out
    assert "Microseconds a step: npbn engine 50.0.\nFloor: 5.8, for 3.88e+08 operations" in output


def test_the_benchmark_measures_the_same_by_engine_and_layers(cupy_backend, monkeypatch):
    """A pass in one call, or batch by batch."""

    def model(arguments):
        return Sequential(Flatten(), Linear(784, 10, generator=np.random.default_rng(0)))

    contestants = importlib.import_module("_contestants")
    monkeypatch.setattr(contestants, "npbn_model", model)
    settings = {"images": 40, "batch_size": 16, "threads": 1, "seed": 0, "backend": "cupy"}
    found = []
    for worker in ("engine", "layers"):
        arguments = argparse.Namespace(**settings, worker=worker)
        contestant = contestants.prepared(arguments)
        tasks = {"train": 16, "epoch": 16, "evaluate": 32, "evaluate at once": 40}
        answers = {task: contestants.measure(contestant, task, n) for task, n in tasks.items()}
        assert all(0 < a["examples_per_second"] < math.inf for a in answers.values())
        found.append([answer["sum"] for answer in answers.values()])
        if worker == "engine":
            assert "kernel launches a step" in contestant.description
    assert np.allclose(*found, rtol=1e-5)


@without_gpu
def test_a_process_that_fails_is_a_check_that_failed(capsys):
    arguments = argparse.Namespace(epochs=1, seed=0)
    result = CHECK_GPU.check_apart("card", arguments)
    assert result["status"] == "FAILED"
    assert result["text"].startswith("check_gpu.py: error: CuPy")
    assert capsys.readouterr().out.startswith("FAILED   card: check_gpu.py: error: CuPy")


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
