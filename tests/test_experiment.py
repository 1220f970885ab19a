"""A configuration and what it stands for; a run's folder back to a model."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import npbn
from npbn import experiment
from npbn.data import Dataset, Split
from npbn.errors import CheckpointError, DataError
from npbn.experiment import Config
from npbn.layers import BatchNorm, Flatten, Linear, Sequential, Sigmoid

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
CHECKED = [name for name, field in FIELDS.items() if "check" in field.metadata]


def dataset(side=28, channels=1, classes=10, train=32, test=8) -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(256, size=(count, channels, side, side), dtype=np.uint8)
        return Split(images, rng.integers(classes, size=count))

    names = tuple(f"class {k}" for k in range(classes))
    return Dataset("drawn images", "memory", names, split(train), split(test), key="digits")


@st.composite
def configs(draw) -> Config:
    options = {}
    for name in draw(st.sets(st.sampled_from(CHECKED))):
        check = FIELDS[name].metadata["check"]
        kinds = {
            bool: st.booleans(),
            int: st.integers(-1, 10**20),
            float: st.floats(-0.5, 2) | st.integers(0, 1),
            str: st.text() if check.choices is None else st.sampled_from(check.choices),
        }
        options[name] = draw(kinds[check.type].filter(check))
    if options.get("schedule") != "step":
        options.pop("lr_epochs", None), options.pop("lr_factor", None)
    return Config(**options, classes=tuple(draw(st.lists(st.text(), max_size=3))))


@given(configs())
def test_json_gives_the_configuration_back(config):
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize(
    "value",
    [-1, float("nan"), "no such thing", [], b"", {}, 10**400, True],
    ids=lambda value: str(value)[:9],
)
def test_a_wrong_value_is_named(name, value):
    check = FIELDS[name].metadata["check"]
    if check(value):
        step = {"schedule": "step"} if name in ("lr_epochs", "lr_factor") else {}
        assert getattr(Config(**({name: value} | step)), name) == value
        return
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(value))}$"):
        Config(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        Config.from_json(Config().to_json() | {name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name):
    values = Config().to_json()
    del values[name]
    with pytest.raises(ValueError, match=f"^{name}: missing$"):
        Config.from_json(values)


def test_other_formats_and_fields_are_refused():
    values = Config().to_json()
    with pytest.raises(ValueError, match=r"^workers: no such field$"):
        Config.from_json(values | {"workers": 2})
    for other in (1, None, "2", 3):
        with pytest.raises(ValueError, match=f"^format: expected 2, got {other}: another version"):
            Config.from_json(values | {"format": other})
    with pytest.raises(ValueError, match=r"^classes: expected"):
        Config.from_json(values | {"classes": [1, 2]})
    with pytest.raises(ValueError, match="lr_factor: expected schedule step"):
        Config(lr_factor=0.5)


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        ((28, 1, 10), "LeNet"),
        ((28, 3, 10), "BLeNet"),
        ((12, 1, 10), "BLeNet"),
        ((32, 1, 2), "BLeNet"),
    ],
)
def test_the_model_follows_from_the_data(sizes, model):
    images = dataset(*sizes)
    config = Config(epochs=1).fitted(images)
    assert (config.side, config.channels, len(config.classes)) == sizes
    training = experiment.build_training(config, images, npbn.backend.get_backend("numpy"))
    assert type(training.model).__name__ == model
    training.run(1)
    assert training.epoch == 1


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (30, "30 → 15, takes 4 off → 11, halves → 5.5; .* 28 or 32"),
        (33, "33 → 16.5, takes 4 off → 12.5, halves → 6.25; .* 32 or 36"),
        (8, "8 → 4, takes 4 off → 0, halves → 0; .* 12 or 16"),
    ],
)
def test_images_of_a_size_that_no_model_takes_are_refused(side, words):
    with pytest.raises(DataError, match=f"images of {side} × {side}: BLeNet halves {words}"):
        Config().fitted(dataset(side))


def test_lenet_refuses_other_images():
    with pytest.raises(DataError, match="32 × 32, 3 channels, 10 classes: LeNet takes images of"):
        Config(model="lenet").fitted(dataset(32, 3))


def test_a_model_of_ones_own_trains_in_one_call():
    generator = np.random.default_rng(0)
    layers = Linear(16, 8, generator=generator), BatchNorm(8, 2), Sigmoid()
    model = Sequential(Flatten(), *layers, Linear(8, 2, generator=generator))
    images = np.zeros((64, 1, 4, 4), np.uint8)
    labels = np.arange(64) % 2
    images[labels == 1, :, :2] = 255
    split = Split(images, labels)
    epochs = []
    training = npbn.train(
        model,
        Dataset("halves", "drawn", ("below", "above"), split, split),
        epochs=5,
        batch_size=16,
        on_epoch=epochs.append,
    )
    assert training.model is model and training.best == 1
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5]
    training.run(6)
    assert training.epoch == 6


def test_options_of_one_call_are_checked():
    with pytest.raises(ValueError, match=r"^epochs: expected an integer >= 1, got 0$"):
        npbn.train(npbn.models.LeNet(), dataset(), epochs=0)
    with pytest.raises(TypeError, match="epoch"):
        npbn.train(npbn.models.LeNet(), dataset(), epoch=1)


def test_a_run_gives_its_model_back(runs):
    loaded = npbn.load(runs / "with")
    assert loaded.config.classes == tuple("0123456789") and not loaded.model.training
    test = npbn.data.load("digits").test
    probabilities = loaded.predict(test.images)
    assert probabilities.shape == (len(test), 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    best = max(line["test"]["accuracy"] for line in loaded.run.records()[1:])
    assert np.mean(probabilities.argmax(axis=1) == test.labels) == pytest.approx(best)
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 1, 28, 28\)"):
        loaded.predict(test.images[:, :, 1:])
    with pytest.raises(CheckpointError, match="not a directory"):
        npbn.load(runs / "none")
