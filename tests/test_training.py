"""The loop: metrics, the last batch, reproducibility, modes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npbn import backend, training
from npbn import functional as F
from npbn.data import Split
from npbn.layers import BatchNorm, Flatten, Linear, Sequential
from npbn.optim import SGD

NUMPY = backend.get_backend("numpy")


def a_split(n: int, seed: int = 0) -> Split:
    """Two classes that differ in brightness."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    images = rng.integers(0, 128, (n, 1, 4, 4)) + 100 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


def a_model(seed: int = 0) -> Sequential:
    generator = np.random.default_rng(seed)
    return Sequential(
        Flatten(),
        Linear(16, 8, generator=generator),
        BatchNorm(8, 2),
        Linear(8, 2, generator=generator),
    )


def train(model, split, batch_size=8, epochs=2, **options):
    return training.fit(
        model,
        SGD(model.parameters(), options.pop("lr", 0.1)),
        split,
        split,
        epochs=epochs,
        batch_size=batch_size,
        generator=np.random.default_rng(1),
        backend=NUMPY,
        **options,
    )


def test_learns_and_records():
    seen: list = []
    history = train(a_model(), a_split(64), epochs=10, on_epoch=seen.append)
    assert seen == history and [epoch.number for epoch in history] == list(range(1, 11))
    assert history[-1].train.loss < history[0].train.loss / 2
    assert history[-1].test.accuracy == 1.0
    assert history[-1].train.examples == 64 and history[-1].train.seconds > 0
    assert history[-1].lr == 0.1


def test_metrics_are_means_over_examples_not_over_batches():
    """With a learning rate that moves nothing, the epoch's loss is the loss of the whole split."""
    model, split = Sequential(Flatten(), Linear(16, 2)), a_split(10)
    (epoch,) = train(model, split, batch_size=4, epochs=1, lr=1e-30)
    x = split.images.astype(np.float32) / 255
    logits = model.forward(x)
    loss, _ = F.softmax_cross_entropy(logits, split.labels)
    accuracy = np.mean(np.argmax(logits, axis=1) == split.labels)
    for metrics in (epoch.train, epoch.test):
        assert metrics.loss == pytest.approx(float(loss), rel=1e-6)
        assert metrics.accuracy == accuracy


@pytest.mark.parametrize(
    ("examples", "batch_size", "trained"),
    [(17, 8, 16), (17, 16, 16), (16, 8, 16), (18, 8, 18), (5, 8, 5), (3, 1, 3)],
)
def test_a_last_batch_of_one_is_left_out(examples, batch_size, trained):
    batches: list[int] = []
    (epoch,) = train(
        a_model(), a_split(examples), batch_size=batch_size, epochs=1, on_batch=batches.append
    )
    assert epoch.train.examples == trained == sum(batches)
    assert epoch.skipped == examples - trained
    assert epoch.test.examples == examples


def test_a_split_of_one_example_has_nothing_to_train_on():
    (epoch,) = train(a_model(), a_split(1), epochs=1)
    assert epoch.train.examples == 0 and math.isnan(epoch.train.loss)


def test_every_example_once_an_epoch_in_an_order_of_its_own():
    split = Split(np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1), np.zeros(20, int))
    order = np.random.default_rng(0).permutation(20)
    seen = [
        round(float(pixel) * 255)
        for x, _ in split.batches(6, "float64", order=order)
        for pixel in x.ravel()
    ]
    assert seen == order.tolist()


def test_pixels_are_scaled_to_one():
    split = Split(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1), np.zeros(3, int))
    ((x, _),) = split.batches(3, "float32")
    np.testing.assert_array_equal(x.ravel(), np.array([0, 0.2, 1], np.float32))
    assert x.dtype == np.float32


def test_two_runs_of_a_seed_are_identical_to_the_bit():
    one, same = a_model(), a_model()
    assert [e.train.loss for e in train(one, a_split(50))] == [
        e.train.loss for e in train(same, a_split(50))
    ]
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_evaluation_changes_nothing(mode):
    model = a_model()
    getattr(model, mode)()
    before = model.state_dict()
    one = training.evaluate(model, a_split(10), backend=NUMPY, batch_size=3)
    whole = training.evaluate(model, a_split(10), backend=NUMPY, batch_size=10)
    assert one.accuracy == whole.accuracy
    assert one.loss == pytest.approx(whole.loss, rel=1e-6)
    assert model.training == (mode == "train")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_errors():
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        train(a_model(), a_split(4), batch_size=0)
    with pytest.raises(TypeError, match="expected images of dtype uint8, got float32"):
        Split(np.zeros((3, 1, 4, 4), np.float32), np.zeros(3, int))
    with pytest.raises(TypeError, match="expected labels of an integer dtype, got float64"):
        Split(np.zeros((3, 1, 4, 4), np.uint8), np.zeros(3))
    model = a_model()
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        training.evaluate(model, a_split(4), backend=NUMPY, batch_size=0)
    assert model.training  # also after an error
    with pytest.raises(ValueError, match=r"expected images of shape \(N, C, H, W\)"):
        Split(np.zeros((3, 4, 4)), np.zeros(3))
    with pytest.raises(ValueError, match=r"labels of shape \(N,\)"):
        Split(np.zeros((3, 1, 4, 4)), np.zeros(4))
