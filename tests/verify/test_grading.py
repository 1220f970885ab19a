"""Grading a class: assignments, students, and what is written for people and programs."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from commands import assert_refused, npbn_command
from npbn.errors import SubmissionError
from npbn.verify import grading
from npbn.verify.grading import Assignment, Report, grade, read_assignment, students

HOMEWORK = Path(__file__).parent / "homework"
RELU = """
import numpy as np
def relu_forward(x): return np.maximum(x, 0), x
def relu_backward(dy, x): return dy * (x > 0)
"""
POOL = """
import numpy as np
def pool_forward(x, pool_param):
    h, w, s = pool_param["pool_height"], pool_param["pool_width"], pool_param["stride"]
    y = np.zeros((*x.shape[:2], (x.shape[2] - h) // s + 1, (x.shape[3] - w) // s + 1))
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            y[:, :, i, j] = x[:, :, i * s:i * s + h, j * s:j * s + w].max(axis=(2, 3))
    return y, (x, y, h, w, s)
def pool_backward(dy, cache):
    x, y, h, w, s = cache
    dx = np.zeros_like(x)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            window = x[:, :, i * s:i * s + h, j * s:j * s + w]
            mask = window == y[:, :, i, j][:, :, None, None]
            dx[:, :, i * s:i * s + h, j * s:j * s + w] = mask * dy[:, :, i, j][:, :, None, None]
    return dx
"""
ASSIGNMENT = """
title = "Homework 2"
[[function]]
operation = "relu"
forward = "relu_forward"
backward = "relu_backward"
points = 2
[[function]]
operation = "max_pool2d"
forward = "pool_forward"
backward = "pool_backward"
points = 3
"""
PROMISE = ASSIGNMENT + 'promises = ["windows side by side"]\n'


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a class: files, a folder with several files, a notebook, and one that is broken."""
    files = {
        "anna.py": RELU + POOL,
        "ben/part1.py": RELU.replace("(x > 0)", "1"),
        "ben/part2.py": POOL,
        "carl.py": "def relu_forward(:",
        "dora.ipynb": json.dumps({"cells": [{"cell_type": "code", "source": RELU}]}),
        ".hidden.py": "",
        "notes.txt": "",
    }
    for name, text in files.items():
        (tmp_path / "class" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "class" / name).write_text(text)
    (tmp_path / "homework.toml").write_text(ASSIGNMENT)
    (tmp_path / "promise.toml").write_text(PROMISE)
    return tmp_path


def test_a_class_is_graded(folder):
    options = ("--assignment", "homework.toml", "--seed", "1", "--edits", "30", "--jobs", "2")
    process = npbn_command("grade", "class", *options, "--output", "marks", cwd=folder)
    assert process.returncode == 0, process.stderr
    lines = [line.split() for line in process.stdout.splitlines()[1:6]]
    assert lines == [
        ["student", "relu_forward", "pool_forward", "points"],
        ["anna", "right", "wrong", "2"],
        ["ben", "wrong", "wrong", "0"],
        ["carl", "missing", "missing", "0"],
        ["dora", "right", "missing", "2"],
    ]
    marks = folder / "marks"
    with open(marks / "marks.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["student"] for row in rows] == ["anna", "ben", "carl", "dora"]
    assert rows[0] | {} == {
        "student": "anna",
        "relu_forward": "right",
        "pool_forward": "wrong",
        "points": "2",
        "max points": "5",
        "to decide": "0",
    }
    records = json.loads((marks / "marks.json").read_text())
    assert len(records) == 8
    pool = next(r for r in records if (r["student"], r["operation"]) == ("anna", "max_pool2d"))
    assert (pool["forward"], pool["backward"], pool["lines"]) == ("right", "wrong", [21])
    assert "+= mask" in pool["edits"][0] and pool["mistakes"][0]["name"] == "overlaps overwritten"
    text = (marks / "feedback" / "anna.md").read_text(encoding="utf-8")
    assert text.startswith("# Homework 2: anna\n") and "wrong (0 of 3 points)" in text
    assert "it is right on all probes that keep to: windows side by side" in text
    gradescope = json.loads((marks / "gradescope" / "anna.json").read_text())
    assert [t["score"] for t in gradescope["tests"]] == [2, 0]
    assert [t["max_score"] for t in gradescope["tests"]] == [2, 3]
    assert [t["status"] for t in gradescope["tests"]] == ["passed", "failed"]
    assert "carl.py cannot be parsed" in (marks / "feedback" / "carl.md").read_text()
    assert (marks / "nbgrader.csv").read_text().splitlines()[1] == "Homework 2,anna,2,2,5"
    assert not list(marks.glob(".*"))

    # With a promise, and with less of the edit; what was there before is replaced.
    (marks / "mine.txt").write_text("kept")
    shutil.rmtree(folder / "class" / "ben")
    options = ("--assignment", "promise.toml", "--seed", "1", "--hint", "line")
    process = npbn_command("grade", "class", *options, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert "anna     right         right (a)     5" in process.stdout
    assert (marks / "mine.txt").read_text() == "kept"
    assert not (marks / "feedback" / "ben.md").exists()


@pytest.mark.parametrize(("hint", "shown"), [("line", False), ("reason", False), ("edit", True)])
def test_hints(hint, shown, folder):
    options = ("--functions", "pool_forward,pool_backward", "--op", "max_pool2d")
    process = npbn_command(
        *("check", "class/anna.py", *options, "--edits", "60", "--hint", hint), cwd=folder
    )
    assert process.returncode == 1
    assert "line 21" in process.stdout
    assert ("+= mask" in process.stdout) == shown
    assert ("must be added)" in process.stdout) == shown


def test_functions_are_guessed_without_an_assignment(tmp_path):
    """A teacher who has only a folder: three families, a class each, and a notebook."""
    shutil.copytree(HOMEWORK / "textbook", tmp_path / "class" / "haruki")
    shutil.copytree(HOMEWORK / "mytorch", tmp_path / "class" / "carol")
    shutil.copy(HOMEWORK / "channels_last.ipynb", tmp_path / "class" / "dan.ipynb")
    (tmp_path / "class" / "eve.py").write_text(RELU)
    process = npbn_command("grade", "class", "--edits", "0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    records = json.loads((tmp_path / "marks" / "marks.json").read_text())
    count = dict.fromkeys(("haruki", "carol", "dan", "eve"), 0)
    for record in records:
        count[record["student"]] += 1
        wanted = ("right",) if record["function"] != "pool_forward" else ("right", "wrong")
        assert record["verdict"].split(",")[0].split(" where")[0] in wanted, record
    assert count == {"haruki": 7, "carol": 7, "dan": 2, "eve": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[function]", "is no TOML"),
        ("title = 3", "title has the wrong type: 3"),
        ("", "expected at least one [[function]]"),
        ("colour = 1", "expected one of title, function, got colour"),
        ("[[function]]\noperation = 'relu'", "function 1: forward is missing"),
        ("[[function]]\nforward = 'f'", "function 1: operation is missing"),
        (
            "[[function]]\nforward = 'f'\noperation = 'attention'",
            "operation: expected one of batch_norm,",
        ),
        (
            "[[function]]\nforward = 'f'\noperation = 'relu'\npromises = ['x']",
            "promises: expected 'no padding', ",
        ),
        (
            "[[function]]\nforward = 'f'\noperation = 'relu'\nasks = ['x']",
            "asks: expected 'a mean of 1e8', ",
        ),
        ("[[function]]\nforward = 'f'\noperation = 'relu'\npoints = -1", "a number >= 0"),
    ],
)
def test_a_wrong_assignment_is_refused_in_one_line(text, said, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    (tmp_path / "a.py").write_text(RELU)
    with pytest.raises(SubmissionError) as caught:
        read_assignment(tmp_path / "a.toml")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    process = npbn_command("grade", "a.py", "--assignment", "a.toml", cwd=tmp_path)
    assert_refused(process, "npbn grade: error: ")
    assert not (tmp_path / "marks").exists()


def test_what_cannot_be_graded_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.py").write_text(RELU)
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("no",), "no does not exist"),
        (("empty",), "there is nothing to grade"),
        (("a.txt",), "a.txt is no Python file and no notebook"),
        (("a.py", "--assignment", "no.toml"), "no.toml cannot be read"),
        (("a.py", "--jobs", "0"), "argument --jobs: expected an integer >= 1"),
        (("a.py", "--edits", "0", "--output", "file"), "file cannot be written"),
    ):
        assert_refused(npbn_command("grade", *arguments, cwd=tmp_path), "npbn grade: error:", said)


def test_what_an_assignment_asks_beyond_the_usual(tmp_path):
    source = """
import numpy as np
def loss(x, y):
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    n = len(x)
    d = p.copy()
    d[np.arange(n), y] -= 1
    return -np.log(p[np.arange(n), y]).mean(), d / n
"""
    (tmp_path / "a.py").write_text(source)
    text = '[[function]]\noperation = "softmax_cross_entropy"\nforward = "loss"\n'
    for more, verdict in (
        ("", "right where the assignment asks"),
        ('asks = ["logits of 1000"]', "wrong"),
    ):
        (tmp_path / "a.toml").write_text(text + more)
        assignment = read_assignment(tmp_path / "a.toml")
        (found,) = grade("a", [tmp_path / "a.py"], assignment, seed=1, timeout=60)
        assert found.verdict == verdict, found.text


def test_names_that_differ_in_replaced_characters_have_a_report_each(tmp_path):
    """In the names of files, "#" and "&" become "_"."""
    (tmp_path / "class").mkdir()
    for name in ("anna_1", "anna#1", "anna&1"):
        (tmp_path / "class" / f"{name}.py").write_text(RELU)
    process = npbn_command("grade", "class", "--output", "marks", "--edits", "0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for folder in ("feedback", "gradescope"):
        assert len([*(tmp_path / "marks" / folder).iterdir()]) == 3
    texts = "".join(path.read_text() for path in (tmp_path / "marks" / "feedback").iterdir())
    assert all(name in texts for name in ("anna_1", "anna#1", "anna&1"))


def test_two_students_of_one_name_are_two(tmp_path):
    for name in ("one/anna.py", "two/anna.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(RELU)
    found = students([tmp_path / "one" / "anna.py", tmp_path / "two" / "anna.py"])
    assert list(found) == ["anna", "anna'"]
    report = Report(Assignment(), {name: [] for name in found})
    assert report.rows()[1] == ["anna", "0", "0", "0"]
    assert "Nothing to grade was found" in report.feedback("anna")


def failing(*_, **__):
    raise ZeroDivisionError("a fault of the grader")


@pytest.mark.parametrize("fault", ["of one function", "of a process"])
def test_a_fault_of_the_grader_costs_nobody_else_a_mark(fault, folder, monkeypatch):
    """A person has to decide then, and the report says so."""
    assignment = read_assignment(folder / "homework.toml")
    found = students([folder / "class"])
    if fault == "of one function":
        monkeypatch.setattr(grading, "examine_in", failing)
        grades = {n: grade(n, files, assignment, seed=1, timeout=60) for n, files in found.items()}
    else:
        monkeypatch.setattr(grading.backend, "limit_blas_threads", os._exit)
        grades = grading.grade_all(found, assignment, seed=1, timeout=60)
    assert [g.verdict for g in grades["anna"]] == ["could not be run"] * 2
    assert all(g.open and "the examination itself failed" in g.text for g in grades["anna"])
    assert [g.verdict for g in grades["carl"]] == ["not found"] * 2
    assert len(Report(assignment, grades).rows()) == 5
