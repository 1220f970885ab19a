"""The long measurements of the lessons: their code still runs, and makes what their files hold."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from torch import nn

from commands import SCRIPTS
from npbn import data

sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "lessons")]
import _curves

FILES = sorted(_curves.FOLDER.glob("*.json"))


def linear(model):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


ARGUMENTS = {"ten_epochs_of_pytorch": ({"PyTorch": linear},)}


def shape(value):
    """What a value is made of: names, types, and the shape of an element for a whole list."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(value[0])]
    return str if isinstance(value, str) else bool if isinstance(value, bool) else float


@pytest.fixture
def tiny(fashion_mnist, monkeypatch):
    """128 images to train on and 64 to test, in place of 60,000 and 10,000."""
    test = data.Split(fashion_mnist.test.images[:64], fashion_mnist.test.labels[:64])
    dataset = dataclasses.replace(fashion_mnist.limited(128), test=test)
    monkeypatch.setattr(data, "load", lambda name: dataset)
    monkeypatch.setattr(_curves, "EPOCHS", 1)
    monkeypatch.setattr(_curves, "SEEDS", (0,))
    monkeypatch.setattr(_curves, "LEARNING_RATES", (0.05, 5.0))


def test_there_is_a_file_for_every_measurement():
    assert [path.stem for path in FILES] == [
        "batch_sizes",
        "learning_rates",
        "ten_epochs",
        "ten_epochs_of_pytorch",
    ]


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")  # too few steps
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_can_be_measured_again(tiny, monkeypatch, tmp_path, path):
    kept = json.loads(path.read_text("utf-8"))
    monkeypatch.setattr(_curves, "FOLDER", tmp_path)
    monkeypatch.setattr(_curves.backend, "limit_blas_threads", lambda threads: None)
    lesson = _curves.Lesson(regenerate=True)
    found = _curves.curves(lesson, getattr(_curves, path.stem), *ARGUMENTS.get(path.stem, ()))
    made = json.loads((tmp_path / path.name).read_text("utf-8"))["made"]
    assert shape(found) == shape(kept["found"])
    assert made.keys() == kept["made"].keys()
    assert made["by"] == kept["made"]["by"]
