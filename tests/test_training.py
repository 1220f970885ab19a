"""The loop: metrics, the last batch, reproducibility, modes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arrays import to_host
from npbn import backend, training
from npbn import functional as F
from npbn.data import Split
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from npbn.optim import SGD

NUMPY = backend.get_backend("numpy")  # for what is the same everywhere


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


def train(model, split, device=NUMPY, *, test=None, batch_size=8, epochs=2, lr=0.1, **options):
    model.to(device)
    return training.fit(
        model,
        SGD(model.parameters(), lr),
        split.to(device),
        (test or split).to(device),
        epochs=epochs,
        batch_size=batch_size,
        generator=options.pop("generator", np.random.default_rng(1)),
        backend=device,
        **options,
    )


def test_the_loop_is_the_one_in_the_books(device):
    """A loop of a few lines, written here, sees the same batches and finds the same numbers."""
    split, test, generator = a_split(20), a_split(11, seed=1), np.random.default_rng(5)
    model = a_model()
    model.eval()  # the loop has to switch to training, each epoch
    history = train(model, split, device, test=test, epochs=3, lr=0.25, generator=generator)

    def batch(split, indices):
        x = device.asarray(split.images[indices].astype(np.float32) / np.float32(255))
        return x, device.asarray(split.labels[indices])

    expected, generator = a_model(), np.random.default_rng(5)
    expected.to(device)
    for epoch in history:
        expected.train()
        order = generator.permutation(20)
        losses, hits = 0.0, 0
        for indices in (order[:8], order[8:16], order[16:]):
            x, labels = batch(split, indices)
            logits = expected.forward(x)
            loss, cache = F.softmax_cross_entropy(logits, labels)
            expected.backward(F.softmax_cross_entropy_backward(cache))
            for parameter in expected.parameters().values():
                parameter.data -= 0.25 * parameter.gradient
            losses += float(loss) * len(indices)
            hits += np.sum(np.argmax(to_host(logits), axis=1) == split.labels[indices])
        assert (epoch.train.loss, epoch.train.accuracy) == (losses / 20, hits / 20)

        expected.eval()
        x, labels = batch(test, np.arange(11))
        logits = expected.forward(x)
        assert epoch.test.loss == pytest.approx(float(F.softmax_cross_entropy(logits, labels)[0]))
        hits = np.sum(np.argmax(to_host(logits), axis=1) == test.labels)
        assert epoch.test.accuracy == hits / 11
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, expected.state_dict()[name])


def test_an_epoch_reads_the_device_twice(monkeypatch):
    """The loss and the hits, at its end: whatever else became a Python number would stop a GPU."""
    import array_api_strict

    reads = []
    strict = type(array_api_strict.asarray(0))

    def watched(name):
        original = getattr(strict, name)

        def read(self, *arguments, **options):
            reads.append(name)
            return original(self, *arguments, **options)

        return read

    for name in ("__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__"):
        monkeypatch.setattr(strict, name, watched(name))
    device = backend.Backend("array-api-strict", array_api_strict, "")
    model = lenet_in_small()
    model.to(device)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    split, generator = a_split(24).to(device), np.random.default_rng(0)
    reads.clear()
    training.train_epoch(model, optimizer, split, batch_size=8, generator=generator, backend=device)
    assert reads == ["__float__", "__int__"]


def lenet_in_small() -> Sequential:
    """Every kind of layer, for the images of `a_split`."""
    return Sequential(
        Conv2d(1, 2, 3, padding=1),
        BatchNorm(2, 4),
        Sigmoid(),
        AvgPool2d(2),
        ReLU(),
        MaxPool2d(2, stride=1),
        Flatten(),
        Linear(2, 4),
        BatchNorm(4, 2),
        Linear(4, 2),
    )


def test_learns_and_records(device):
    seen: list = []
    history = train(a_model(), a_split(64), device, epochs=10, on_epoch=seen.append)
    assert seen == history and [epoch.number for epoch in history] == list(range(1, 11))
    assert history[-1].train.loss < history[0].train.loss / 2
    assert history[-1].test.accuracy == 1.0
    assert history[-1].train.examples == 64 and history[-1].train.seconds > 0


def test_metrics_are_means_over_examples_not_over_batches(device):
    """With a learning rate that moves nothing, the epoch's loss is the loss of the whole split."""
    model, split = Sequential(Flatten(), Linear(16, 2)), a_split(10)
    (epoch,) = train(model, split, device, batch_size=4, epochs=1, lr=1e-30)
    model.to(NUMPY)
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
    assert training.steps_per_epoch(examples, batch_size) == len(batches)
    assert epoch.skipped == examples - trained
    assert epoch.test.examples == examples


def test_a_split_of_one_example_has_nothing_to_train_on():
    (epoch,) = train(a_model(), a_split(1), epochs=1)
    assert epoch.train.examples == 0 and math.isnan(epoch.train.loss)


def test_batches_in_an_order_that_is_given(device):
    split = Split(np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1), np.zeros(20, int))
    order = np.random.default_rng(0).permutation(20)
    seen = [
        round(float(pixel) * 255)
        for x, _ in split.to(device).batches(6, "float64", order=device.asarray(order))
        for pixel in to_host(x).ravel()
    ]
    assert seen == order.tolist()


def test_pixels_are_scaled_to_one(device, dtype):
    split = Split(np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1), np.zeros(3, int))
    ((x, _),) = split.to(device).batches(3, dtype)
    np.testing.assert_array_equal(to_host(x).ravel(), np.array([0, 0.2, 1], dtype))
    assert to_host(x).dtype == dtype


def test_two_runs_of_a_seed_are_identical_to_the_bit(device):
    one, same = a_model(), a_model()
    assert [e.train.loss for e in train(one, a_split(50), device)] == [
        e.train.loss for e in train(same, a_split(50), device)
    ]
    for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_evaluation_changes_nothing(mode, device):
    model, split = a_model(), a_split(10).to(device)
    model.to(device)
    getattr(model, mode)()
    model.layers[2].eval()  # frozen by the user
    before = model.state_dict()
    one = training.evaluate(model, split, backend=device, batch_size=3)
    whole = training.evaluate(model, split, backend=device, batch_size=10)
    assert one.accuracy == whole.accuracy
    assert one.loss == pytest.approx(whole.loss, rel=1e-6)
    assert model.training == model.layers[1].training == (mode == "train")
    assert not model.layers[2].training
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
