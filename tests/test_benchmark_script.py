"""scripts/benchmark.py: that it measures what it says. How fast anything is, it is no test of."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from commands import assert_refused, run
from npbn import models
from test_command_lines import MODULES

QUICK = ("--quick", "--threads", "1", "--batch-size", "16")
TASKS = ("train", "epoch", "evaluate", "evaluate at once")


def test_quick_run_with_every_value_written(tmp_path):
    process = run(
        "benchmark.py",
        *QUICK,
        *("--contestants", "layers", "engine", "by-hand"),
        *("--json", "out.json", "--chart", "out.png"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    report = json.loads((tmp_path / "out.json").read_text())
    (comparison,) = report["results"]
    titles = ["npbn layers", "npbn engine", "PyTorch eager", "PyTorch, hand-written BN"]
    assert list(comparison["results"]) == titles
    for title, result in comparison["results"].items():
        assert f"| {title} " in process.stdout and result["description"] in process.stdout
        assert "thread" in result["description"]  # one, or more
        assert result["peak_resident_bytes"] > 10_000_000
        assert 0 < result["first_step_seconds"] < math.inf
        for task in TASKS:
            assert len(result[task]) == 3 and min(result[task]) > 0
    assert "This run does not count" in process.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_several_batch_sizes_on_the_wide_network_with_two_threads(tmp_path):
    process = run(
        "benchmark.py",
        *("--quick", "--model", "wide", "--threads", "2", "--batch-size", "500", "1000"),
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


@pytest.mark.parametrize(("name", "model"), [("lenet", models.LeNet), ("blenet", models.BLeNet)])
def test_the_networks_are_those_of_npbn(name, model, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--model", name, "--seed", "3"])
    arguments = MODULES["benchmark"].parse_arguments()
    found = MODULES["benchmark"].npbn_model(arguments).state_dict()
    expected = model(generator=np.random.default_rng(3)).state_dict()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_array_api_cost(tmp_path):
    """Both ways must give the same results, or it stops."""
    process = run(
        "benchmark.py",
        "--quick",
        "--threads",
        "1",
        "--array-api-cost",
        "--batch-size",
        "16",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert "| convolution " in process.stdout
    assert "| batch norm, sigmoid, pooling " in process.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rounds", "0"), "argument --rounds: expected an integer >= 1, got '0'"),
        (("--batch-size", "32", "10001"), "expected batches of at most 10,000 images"),
        (("--quick", "--batch-size", "1001"), "expected batches of at most 1,000 images"),
        (("--contestants", "torch"), "argument --contestants: invalid choice: 'torch'"),
        (("--array-api-cost", "--model", "blenet"), "is about network A on NumPy"),
        (("--array-api-cost", "--chart", "a.png"), "leave out --chart"),
        (("--array-api-cost", "--threads", "1", "2"), "takes one number of threads"),
        (("--chart", "no/such/directory/out.png"), "cannot write"),
        (("--json", "no/such/directory/out.json"), "cannot write"),
        (("--no-such-option",), "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, expected, tmp_path):
    assert_refused(run("benchmark.py", *options, cwd=tmp_path), "benchmark.py: error:", expected)
    assert list(tmp_path.iterdir()) == []
