"""scripts/benchmark.py: that it measures what it says. How fast anything is, it is no test of."""

from __future__ import annotations

import json

import pytest

from commands import assert_refused, run

QUICK = ("--quick", "--threads", "1", "--batch-size", "16")


def test_quick_run_with_every_value_written(tmp_path):
    process = run("benchmark.py", *QUICK, "--json", "out.json", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"npbn layers", "npbn engine", "PyTorch eager"} <= report["results"].keys()
    for name, result in report["results"].items():
        assert f"| {name} " in process.stdout and result["description"] in process.stdout
        assert "thread" in result["description"]  # one, or more
        assert result["peak_resident_bytes"] > 10_000_000
        for task in ("train", "evaluate"):
            assert len(result[task]) == 3 and min(result[task]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


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
        (("--batch-size", "10001"), "expected batches of at most 10,000 images"),
        (("--array-api-cost", "--model", "blenet"), "is about network A on NumPy"),
        (("--json", "no/such/directory/out.json"), "cannot write"),
        (("--no-such-option",), "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, expected, tmp_path):
    assert_refused(run("benchmark.py", *options, cwd=tmp_path), "benchmark.py: error:", expected)
    assert list(tmp_path.iterdir()) == []
