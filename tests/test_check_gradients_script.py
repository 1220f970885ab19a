"""scripts/check_gradients.py as its users meet it."""

from __future__ import annotations

import re

import pytest

from commands import assert_refused, run
from npbn.verify.mutants import BATCH_NORM, operation_source


def test_all_of_npbn_is_right_to_machine_precision(tmp_path):
    process = run("check_gradients.py", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    errors = [float(e) for e in re.findall(r" (\d\.\d[eE][-+]\d+)  right", process.stdout)]
    assert len(errors) > 100
    assert max(errors) <= 1e-12
    for name in ("batch_norm", "conv2d", "layer BatchNorm, 4-D", "LeNet, training", "BLeNet, pred"):
        assert name in process.stdout
    assert process.stdout.count("its terms cancel") == 8  # four biases in each of two models
    assert "all right" in process.stdout


def test_homework(tmp_path):
    (tmp_path / "right.py").write_text(operation_source("batch_norm"))
    (tmp_path / "wrong.py").write_text(BATCH_NORM[1].source)
    names = "batch_norm,batch_norm_backward"
    right = run("check_gradients.py", f"right.py:{names}", "--op", "batch_norm", cwd=tmp_path)
    assert right.returncode == 0
    assert re.match(r"batch_norm is right, to 1\d digits", right.stdout)
    ascii_only = {"PYTHONIOENCODING": "ascii"}  # a terminal that cannot show the dots
    wrong = run(
        "check_gradients.py",
        f"wrong.py:{names}",
        "--op",
        "batch_norm",
        cwd=tmp_path,
        env=ascii_only,
    )
    assert wrong.returncode == 1, wrong.stderr
    assert "dx lacks the term through the variance, -x_hat\\xb7mean(gamma" in wrong.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a.py:f,g",), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("--op", "relu"), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("f,g", "--op", "relu"), "expected FILE:FORWARD,BACKWARD, got 'f,g'"),
        (("a.py:f", "--op", "relu"), "expected FILE:FORWARD,BACKWARD"),
        (("no.py:f,g", "--op", "relu"), "no.py is not a file"),
        (("a.py:f,g", "--op", "dropout"), "argument --op: invalid choice: 'dropout'"),
        (("a.py:f,g", "--op", "relu", "--timeout", "0"), "argument --timeout"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, expected, tmp_path):
    process = run("check_gradients.py", *arguments, cwd=tmp_path)
    assert_refused(process, "check_gradients.py: error:", expected)
