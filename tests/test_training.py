"""The loop: metrics, the last batch, reproducibility, modes."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from arrays import to_host
from npbn import backend, inspection, training
from npbn import functional as F
from npbn.data import Split
from npbn.engine.layers import LayersEngine
from npbn.errors import DataError, NonFiniteError
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
    self_and_descendants,
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


def a_training(
    split,
    device=NUMPY,
    *,
    model=None,
    test=None,
    batch_size=8,
    lr=0.1,
    seed=1,
    momentum=0.0,
    dtype=None,
    **options,
):
    model = model or a_model()
    model.to(device, dtype)
    what = (
        model,
        SGD(model.parameters(), lr, momentum=momentum),
        split.to(device),
        (split if test is None else test).to(device),
    )
    engine = LayersEngine(*what, batch_size=batch_size, backend=device)
    return training.Training(
        *what, engine=engine, batch_size=batch_size, seed=seed, backend=device, **options
    )


def train(model, split, device=NUMPY, *, epochs=2, on_batch=None, **options):
    history: list = []
    a_training(split, device, model=model, **options).run(
        epochs, on_batch=on_batch, on_epoch=history.append
    )
    return history


def test_the_loop_is_the_one_in_the_books(device):
    """A loop of a few lines, written here, sees the same batches and finds the same numbers."""
    split, test = a_split(20), a_split(11, seed=1)
    model = a_model()
    model.eval()  # the loop has to switch to training
    history = train(model, split, device, test=test, epochs=3, lr=0.25, seed=5)

    def batch(split, indices):
        x = device.asarray(split.images[indices].astype(np.float32) / np.float32(255))
        return x, device.asarray(split.labels[indices])

    expected = a_model()
    expected.to(device)
    for number, epoch in enumerate(history):
        expected.train()
        order = np.random.default_rng((5, number)).permutation(20)
        losses, correct = 0.0, 0
        for indices in (order[:8], order[8:16], order[16:]):
            x, labels = batch(split, indices)
            logits = expected.forward(x)
            loss, cache = F.softmax_cross_entropy(logits, labels)
            expected.backward(F.softmax_cross_entropy_backward(cache))
            for parameter in expected.parameters().values():
                parameter.data -= 0.25 * parameter.gradient
            losses += float(loss) * len(indices)
            correct += np.sum(np.argmax(to_host(logits), axis=1) == split.labels[indices])
        assert (epoch.train.loss, epoch.train.accuracy) == (losses / 20, correct / 20)

        expected.eval()
        x, labels = batch(test, np.arange(11))
        logits = expected.forward(x)
        assert epoch.test.loss == pytest.approx(float(F.softmax_cross_entropy(logits, labels)[0]))
        correct = np.sum(np.argmax(to_host(logits), axis=1) == test.labels)
        assert epoch.test.accuracy == correct / 11
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, expected.state_dict()[name])


def test_a_pass_reads_the_device_only_at_its_end(monkeypatch):
    """Losses and counts: whatever else became a Python number would stop a GPU."""
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
    run = a_training(a_split(24), device, model=model, momentum=0.9)
    run.optimizer.weight_decay = 0.1
    reads.clear()
    run.run(2, eval_every=2, on_batch=lambda _: reads.append("batch"))
    batches = reads.index("__float__")
    epoch = ["batch"] * batches + ["__float__", "__int__"] * batches
    assert batches > 1
    assert reads == [*epoch, *epoch, "__float__", "__int__"]  # of the only batch of the test split


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
    history = train(a_model(), a_split(64), device, epochs=10)
    assert [epoch.number for epoch in history] == list(range(1, 11))
    assert [epoch.step for epoch in history] == list(range(8, 88, 8))
    assert {epoch.lr for epoch in history} == {0.1}
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
    assert training.steps_per_epoch(examples, 10**400) == 1
    assert epoch.skipped == examples - trained
    assert epoch.test.examples == examples


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
    one = training.evaluate(model, split, batch_size=3)
    whole = training.evaluate(model, split, batch_size=10)
    assert one.accuracy == whole.accuracy
    assert one.loss == pytest.approx(whole.loss, rel=1e-6)
    assert model.training == model.layers[1].training == (mode == "train")
    assert not model.layers[2].training
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_errors():
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        train(a_model(), a_split(4), batch_size=0)
    with pytest.raises(ValueError, match="expected at least 2 training examples, got 1"):
        train(a_model(), a_split(1))
    with pytest.raises(ValueError, match="expected at least 1 test example, got 0"):
        a_training(a_split(4), test=a_split(0))
    with pytest.raises(
        TypeError, match="expected images of dtype uint8, with values from 0 to 255, got float32"
    ):
        Split(np.zeros((3, 1, 4, 4), np.float32), np.zeros(3, int))
    with pytest.raises(TypeError, match="expected labels of an integer dtype, got float64"):
        Split(np.zeros((3, 1, 4, 4), np.uint8), np.zeros(3))
    model = a_model()
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        training.evaluate(model, a_split(4), batch_size=0)
    assert model.training  # also after an error
    with pytest.raises(ValueError, match=r"expected images of shape \(N, C, H, W\)"):
        Split(np.zeros((3, 4, 4)), np.zeros(3))
    with pytest.raises(ValueError, match=r"labels of shape \(N,\)"):
        Split(np.zeros((3, 1, 4, 4)), np.zeros(4))


def test_data_that_is_not_where_it_should_be_is_named():
    """The arrays of the model are named by its first layer; see the tests of the operations."""
    import array_api_strict

    strict = backend.Backend("array-api-strict", array_api_strict, "")
    split = a_split(16)
    for places in ((strict, NUMPY, NUMPY), (NUMPY, strict, NUMPY), (NUMPY, NUMPY, strict)):
        train, test, device = (
            f"{name}: {'numpy' if place is NUMPY else 'array_api_strict'}"
            for name, place in zip(("train", "test", "backend"), places, strict=True)
        )
        with pytest.raises(TypeError, match=f"one library, got {train}.*, {test}.*, {device}"):
            training.Training(
                a_model(),
                SGD(a_model().parameters(), 0.1),
                split.to(places[0]),
                split.to(places[1]),
                engine=a_training(split).engine,
                batch_size=8,
                seed=0,
                backend=places[2],
            )
    model = a_model()
    model.to(strict)
    with pytest.raises(TypeError, match="one library, got x: numpy, weight: array_api_strict"):
        training.evaluate(model, split)
    with pytest.raises(TypeError, match="one precision, got x: float64, weight: float32"):
        training.evaluate(a_model(), split, dtype="float64")


class StopError(Exception):
    pass


def stop_after(batches: int):
    def on_batch(_: int) -> None:
        nonlocal batches
        batches -= 1
        if batches == 0:
            raise StopError

    return on_batch


def without_times(epoch):
    found = dataclasses.asdict(epoch)
    for part in ("train", "test"):
        if found[part] is not None:
            del found[part]["seconds"]
    return found


@pytest.mark.parametrize("stop", range(1, 11))
def test_stopped_and_resumed_equals_never_stopped(stop, device):
    """After every batch of three epochs of which the last has two: state by way of JSON."""
    options = {"momentum": 0.9, "batch_size": 6, "lr": 0.5}
    whole = a_training(a_split(20), device, **options)
    expected: list = []
    whole.run(3, on_epoch=expected.append)

    first, seen = a_training(a_split(20), device, **options), []
    with pytest.raises(StopError):
        first.run(3, on_batch=stop_after(stop), on_epoch=seen.append)
    arrays, record = first.state()
    second = a_training(a_split(20), device, model=a_model(7), **options)
    second.load_state(arrays, json.loads(json.dumps(record)))
    second.run(3, on_epoch=seen.append)

    assert [without_times(e) for e in seen] == [without_times(e) for e in expected]
    arrays, record = second.state()
    expected_arrays, expected_record = whole.state()
    assert record == expected_record
    for name, value in expected_arrays.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert any(name.startswith("velocity.") for name in arrays)


def test_going_on_in_the_same_process(device):
    """A stop is no end: run again, and it is as if there had been none."""
    expected = train(a_model(), a_split(20), device)
    run, seen = a_training(a_split(20), device), []
    with pytest.raises(StopError):
        run.run(2, on_batch=stop_after(2), on_epoch=seen.append)
    run.run(2, on_epoch=seen.append)
    assert [without_times(e) for e in seen] == [without_times(e) for e in expected]


def test_a_state_moves_between_array_libraries(device):
    run = a_training(a_split(20), NUMPY, momentum=0.9)
    run.run(1)
    there = a_training(a_split(20), device, model=a_model(3), momentum=0.9)
    there.load_state(*run.state())
    assert all(
        type(v) is type(there.model.layers[1].weight.data)
        for v in there.optimizer.velocity.values()
    )
    history: list = []
    there.run(2, on_epoch=history.append)
    assert [epoch.number for epoch in history] == [2]


def test_a_state_of_another_model_is_an_error():
    arrays, record = a_training(a_split(20)).state()
    other = a_training(a_split(20), model=Sequential(Flatten(), Linear(16, 2)))
    with pytest.raises(ValueError, match="names of this model"):
        other.load_state(arrays, record)
    with pytest.raises(ValueError, match=r"expected arrays of model and velocity, got x\.y"):
        a_training(a_split(20)).load_state(arrays | {"x.y": np.ones(1)}, record)
    with pytest.raises(ValueError, match=r"got velocity\.9\.weight"):
        a_training(a_split(20)).load_state(arrays | {"velocity.9.weight": np.ones(1)}, record)
    with pytest.raises(ValueError, match="it was written by an older npbn"):
        a_training(a_split(20)).load_state(arrays, record | {"generator": {"state": 1}})


def test_what_ends_a_run():
    def numbers(**options):
        found: list = []
        a_training(a_split(64)).run(9, on_epoch=found.append, **options)
        return found

    assert [e.step for e in numbers(max_steps=19)] == [8, 16, 19]
    assert [e.train.examples for e in numbers(max_steps=19)] == [64, 64, 24]
    assert len(numbers(max_steps=16)) == 2
    whole = numbers()
    target = whole[3].test.accuracy
    first = next(e.number for e in whole if e.test.accuracy >= target)
    assert len(numbers(target_accuracy=target)) == first
    assert [e.test is not None for e in numbers(eval_every=4)] == [False] * 3 + [True] + [
        False
    ] * 3 + [True, True]
    assert numbers(max_steps=19, eval_every=5)[-1].test is not None


@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")
@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, r"step 2: the output of layer 2 \(Linear\) is infinite \(losses before: [\d.]+\)"),
        (1e39, r"step 2: 1\.weight is infinite"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_located(lr, message):
    run = a_training(a_split(64), lr=lr, model=Sequential(Flatten(), Linear(16, 8), Linear(8, 2)))
    start = run.state()
    with pytest.raises(NonFiniteError, match="in epoch 1, the loss became NaN or infinite"):
        run.run(3)
    run.load_state(*start)
    assert re.match(message, run.locate_non_finite())


@pytest.mark.parametrize("label", [-1, 2, 10])
def test_a_label_without_an_output_is_refused_before_training(label):
    good, split = a_split(64), a_split(64)
    split.labels[40] = label
    said = f"expected labels from 0 to 1, got {label} for training image 40"
    with pytest.raises(DataError, match=re.escape(said)):
        a_training(split)
    model = a_training(good).model
    modes = [layer.training for layer in self_and_descendants(model)]
    with pytest.raises(DataError, match=f"got {label} for test image 40"):
        a_training(good, test=split)
    assert [layer.training for layer in self_and_descendants(model)] == modes


def test_a_state_that_is_not_finite_is_not_given_out():
    """Of weights, statistics, velocity, or the loss so far: there is nothing to go on from."""
    for spoil in (
        lambda run: run.model.layers[1].weight.data.fill(np.nan),
        lambda run: run.model.layers[2].moving_var.data.fill(np.inf),
        lambda run: run.optimizer.velocity["1.weight"].fill(-np.inf),
        lambda run: setattr(run._totals, "loss", np.float64(np.nan)),
    ):
        run = a_training(a_split(20), momentum=0.5)
        with pytest.raises(StopError):
            run.run(1, on_batch=stop_after(1))
        run.state()
        spoil(run)
        with pytest.raises(NonFiniteError, match="after step 1, the loss or the state is NaN or"):
            run.state()


def test_a_healthy_epoch_has_no_such_place():
    run, replayed = a_training(a_split(64)), a_training(a_split(64))
    assert replayed.locate_non_finite().startswith("no step of the epoch")
    run.run(1)
    for name, parameter in run.model.parameters().items():  # and it has trained the same
        np.testing.assert_array_equal(parameter.data, replayed.model.parameters()[name].data)


def test_precise_statistics_are_those_of_the_whole_split(device):
    """The first batch norm's are those of its input over all examples, exactly as one batch."""
    split = a_split(40)
    run = a_training(split, device, lr=0.5)
    run.run(1)
    model = run.model
    before = model.state_dict()
    model.layers[1].eval()
    inspection.precise_statistics(model, run.train, batch_size=8)
    x = split.images.reshape(40, 16).astype(np.float64) / 255
    z = x @ before["1.weight"].astype(np.float64).T + before["1.bias"]
    after = model.state_dict()
    np.testing.assert_allclose(after["2.moving_mean"], z.mean(0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(after["2.moving_var"], z.var(0, keepdims=True), rtol=1e-5)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {"2.moving_mean", "2.moving_var"}
    assert model.layers[2].momentum == 0.9 and not model.layers[1].training


def test_precise_statistics_leave_a_last_batch_of_one_out():
    run = a_training(a_split(17))
    inspection.precise_statistics(run.model, run.train, batch_size=8)
    seventeen = run.model.state_dict()
    inspection.precise_statistics(
        run.model, Split(run.train.images[:16], run.train.labels[:16]), batch_size=8
    )
    np.testing.assert_array_equal(seventeen["2.moving_var"], run.model.state_dict()["2.moving_var"])


def test_precise_bn_is_used_for_evaluation_and_changes_no_training():
    plain, precise = (
        train(a_model(), a_split(64), precise_bn=choice, epochs=3) for choice in (False, True)
    )
    assert [e.train.loss for e in plain] == [e.train.loss for e in precise]
    assert [e.test.loss for e in plain] != [e.test.loss for e in precise]


def test_preactivations_are_normalized_by_batch_norm_and_leave_no_trace(device):
    model = lenet_in_small()
    model.to(device)
    x = device.asarray(np.random.default_rng(0).random((10, 1, 4, 4)).astype(np.float32))
    before = model.state_dict()
    found = inspection.preactivations(model, x)
    assert list(found) == ["2", "4"]
    np.testing.assert_allclose(found["2"].mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(found["2"].std((0, 2, 3)), 1, atol=1e-2)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays_stay_in_the_dtype_of_the_model(device, dtype):
    run = a_training(a_split(20), device, momentum=0.9, dtype=dtype, precise_bn=True)
    run.run(2)
    run.load_state(*run.state())
    arrays = [array.data for array in run.model.state().values()]
    for array in (*arrays, *run.optimizer.velocity.values()):
        assert to_host(array).dtype == dtype


@pytest.mark.parametrize("precise_bn", [False, True])
def test_a_batch_norm_in_prediction_mode_stays_frozen(precise_bn, device):
    """Its averages are used and kept; γ and β are trained on."""
    run = a_training(a_split(40), device, lr=0.5, precise_bn=precise_bn)
    run.run(1)
    norm = run.model.layers[2]
    norm.eval()
    before = run.model.state_dict()
    x = device.asarray(np.random.default_rng(0).random((8, 1, 4, 4)).astype(np.float32))
    run.run(3)
    after = run.model.state_dict()
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in after if not name.startswith("2.moving_")}
    assert run.model.training and not norm.training
    entering = run.model.layers[1].forward(run.model.layers[0].forward(x))
    averages = norm.moving_mean.data, norm.moving_var.data
    parameters = norm.gamma.data, norm.beta.data
    expected, _, _ = F.batch_norm(entering, *parameters, *averages, training=False)
    np.testing.assert_array_equal(to_host(norm.forward(entering)), to_host(expected))


def test_a_model_in_prediction_mode_is_put_into_training_mode_as_a_whole():
    model = a_model()
    model.eval()
    train(model, a_split(20), epochs=1)
    assert model.training and model.layers[2].training


def test_the_order_of_an_epoch_follows_from_seed_and_epoch_only():
    """So a run can be extended, and does not depend on what else draws random numbers."""
    longer, shorter = a_training(a_split(20)), a_training(a_split(20))
    longer.run(3)
    shorter.run(1)
    np.random.default_rng(1).permutation(20)
    shorter.run(3)
    for name, value in longer.model.state_dict().items():
        np.testing.assert_array_equal(value, shorter.model.state_dict()[name])
    orders = [a_training(a_split(20), seed=seed)._order().tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
