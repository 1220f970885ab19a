"""scripts/check_gradients.py as its users meet it."""

from __future__ import annotations

import csv
import json
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
    assert "Right where examined: y, moving_mean, moving_var, dx, dgamma, dbeta." in right.stdout
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


def test_a_class(tmp_path):
    """A line each, a table, the worst exit code; one file's trouble is not another's."""
    source = operation_source("batch_norm")
    files = {
        "1 right.py": (source, "right", 0),
        "2 float32.py": (source.replace("x_hat = (x", "x_hat = np.float32(x"), "can't tell", 3),
        "3 broken.py": ("def broken(:", "could not be loaded", 3),
        "4 wrong.py": (BATCH_NORM[1].source, "wrong", 1),
        "5 helpers.py": ("", "bad input", 2),
    }
    for name, (text, _, _) in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "6 names.py").write_text(source.replace("def batch_norm", "def bn"))
    options = "--op", "batch_norm", "--functions", "batch_norm,batch_norm_backward"
    for count, (_, _, code) in enumerate(files.values(), 1):
        process = run(
            "check_gradients.py",
            "6 names.py:bn,bn_backward",
            *list(files)[:count],
            *options,
            *("--csv", "marks.csv", "--json", "marks.json", "--edits", "0"),
            cwd=tmp_path,
        )
        assert process.returncode == code, process.stderr
    records = json.loads((tmp_path / "marks.json").read_text())
    assert [record["verdict"] for record in records[1:]] == [v for _, v, _ in files.values()]
    assert (records[4]["forward"], records[4]["backward"]) == ("right", "wrong")
    assert records[4]["mistakes"][0]["name"] == "without the variance path"
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8") as file:
        first, *rows = csv.DictReader(file)
    assert first["file"] == "6 names.py" and first["verdict"] == "right"
    assert [(row["file"], row["verdict"]) for row in rows] == [
        (name, verdict) for name, (_, verdict, _) in files.items()
    ]
    assert rows[3]["right outputs"] == "y moving_mean moving_var dgamma dbeta"
    assert rows[3]["wrong outputs"] == "dx"
    assert rows[3]["what"] == "without the variance path"
    assert "every x moves the batch variance" in rows[3]["report"]
    assert rows[4]["what"] == "5 helpers.py has no function batch_norm"
    lines = process.stdout.splitlines()
    assert len(lines) == 7 and lines[0].startswith("file          verdict ")
    for line, row in zip(lines[2:], rows, strict=True):
        assert re.split("  +", line) == [v for v in list(row.values())[:5] if v]
    assert not list(tmp_path.glob(".marks*"))


def test_trouble_that_is_not_the_author_s(tmp_path):
    (tmp_path / "right.py").write_text(operation_source("relu"))
    refused = run("check_gradients.py", "right.py:relu,relu_backwrd", "--op", "relu", cwd=tmp_path)
    assert_refused(refused, "check_gradients.py: error: right.py has no function relu_backwrd")
    arguments = ("right.py:relu,relu_backward", "--op", "relu")
    refused = run("check_gradients.py", *arguments, "--adapter", "no.py:f", cwd=tmp_path)
    assert_refused(refused, "expected FILE:FUNCTION for the adapter, got 'no.py:f'")
    process = run("check_gradients.py", *arguments, "--csv", "no/marks.csv", cwd=tmp_path)
    assert process.returncode == 2 and "relu is right" in process.stdout
    assert process.stderr.strip() == (
        "check_gradients.py: error: no/marks.csv cannot be written: No such file or directory"
    )


def test_the_help_says_what_an_adapter_is_and_how_a_loss_is_given(tmp_path):
    text = run("check_gradients.py", "--help", cwd=tmp_path).stdout
    assert "softmax_loss,softmax_loss" in text and "NotExaminedError" in text
    assert "returns two functions with npbn's arguments" in text
    assert "gamma is (1, D)" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a.py:f,g",), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("--op", "relu"), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("--csv", "a.csv"), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("a.py:f,g", "--csv", "a.csv"), "FILE:FORWARD,BACKWARD and --op belong together"),
        (("*.py", "--op", "relu", "--functions", "f,g"), "expected FILE:FORWARD,BACKWARD"),
        (("f,g", "--op", "relu"), "expected FILE:FORWARD,BACKWARD or FILE:CLASS, got 'f,g'"),
        (("a.py:f,g,h", "--op", "relu"), "expected FILE:FORWARD,BACKWARD"),
        (("a.py:f", "--op", "relu"), "a.py is not a file"),
        (("no.py:f,g", "--op", "relu"), "no.py is not a file"),
        (("a.py:f,g", "--op", "attention"), "argument --op: invalid choice: 'attention'"),
        (("a.py:f,g", "--op", "relu", "--timeout", "0"), "argument --timeout"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, expected, tmp_path):
    process = run("check_gradients.py", *arguments, cwd=tmp_path)
    assert_refused(process, "check_gradients.py: error:", expected)
