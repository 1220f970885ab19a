"""The engine against the layers, which are its specification."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npbn import backend, training
from npbn import functional as F
from npbn.data import Split
from npbn.engine import Engine, plan, team
from npbn.errors import UnsupportedError
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
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD
from npbn.verify import complex_step

NUMPY = backend.get_backend("numpy")


@st.composite
def models(draw) -> tuple[Sequential, tuple[int, int, int]]:
    """Up to two blocks of convolution and up to three linear ones, each with its optional parts."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = channels, height, width = draw(
        st.tuples(st.integers(1, 3), st.integers(5, 12), st.integers(5, 12))
    )
    layers = []

    def optional(features: int, num_dims: int) -> None:
        if draw(st.booleans()):
            eps, momentum = draw(st.sampled_from([1e-5, 0.1])), draw(st.sampled_from([0.9, 0.5]))
            norm = BatchNorm(features, num_dims, eps=eps, momentum=momentum)
            # With β = 0, a channel of padding alone can be normalized to 0 but for rounding, which
            # is where ReLU's derivative jumps.
            norm.gamma.data[...] = generator.uniform(0.5, 2, norm.gamma.data.shape)
            norm.beta.data[...] = generator.normal(size=norm.beta.data.shape)
            layers.append(norm)
        activation = draw(st.sampled_from([None, Sigmoid, ReLU]))
        if activation is not None:
            layers.append(activation())

    for _ in range(draw(st.integers(0, 2))):
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        size = [
            (s + 2 * p - k) // t + 1
            for s, p, k, t in zip((height, width), padding, kernel, stride, strict=True)
        ]
        if min(size) < 1:
            break
        out = draw(st.integers(1, 4))
        bias = draw(st.booleans())
        layers.append(
            Conv2d(
                channels,
                out,
                kernel,
                stride=stride,
                padding=padding,
                bias=bias,
                generator=generator,
            )
        )
        channels, (height, width) = out, size
        optional(channels, 4)
        windows = [(a, b) for a in (1, 2, 3) for b in (1, 2) if height % a == 0 == width % b]
        pool = draw(st.sampled_from([None, AvgPool2d, MaxPool2d]))
        if pool is not None:
            window = draw(st.sampled_from(windows))
            layers.append(pool(window))
            height, width = height // window[0], width // window[1]
    layers.append(Flatten())
    features = channels * height * width
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 5))
        layers.append(Linear(features, out, bias=draw(st.booleans()), generator=generator))
        features = out
        optional(features, 2)
    layers.append(Linear(features, 3, generator=generator))
    return Sequential(*layers), shape


def a_split(shape, examples: int, seed: int, classes: int = 3) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (examples, *shape), dtype=np.uint8)
    return Split(images, rng.integers(0, classes, examples))


def compare(model, shape, dtype, *, workers, batch_sizes, bound, classes=3, **options) -> None:
    """Some steps both ways: losses, hits, gradients, parameters and moving averages."""
    model.to(NUMPY, dtype)
    expected = copy.deepcopy(model)
    split = a_split(shape, 40, 1, classes)
    engine = Engine(model, SGD(model.parameters(), 0.1, **options), shape, workers=workers)
    run = training.Training(
        expected,
        SGD(expected.parameters(), 0.1, **options),
        split,
        split,
        batch_size=8,
        generator=np.random.default_rng(0),
        backend=NUMPY,
        dtype=dtype,
    )
    rng = np.random.default_rng(2)
    for n in batch_sizes:
        indices = rng.permutation(40)[:n]
        loss, hits = engine.step(split, indices)
        right_loss, right_hits = run.step(indices)
        assert abs(loss - float(right_loss)) <= bound * max(1, abs(loss))
        assert hits == right_hits
        # What a batch norm takes back, the gradient of a bias or β before it, is rounding noise:
        # errors are measured against the largest gradient.
        scale = max(np.abs(p.gradient).max() for p in expected.parameters().values())
        for name, parameter in model.parameters().items():
            right = expected.parameters()[name]
            error = np.abs(parameter.gradient - right.gradient).max()
            assert error <= bound * scale, (name, error / scale)
        for name, value in model.state_dict().items():
            right = expected.state_dict()[name]
            np.testing.assert_allclose(value, right, atol=bound * max(1, np.abs(right).max()))
    loss, hits = engine.evaluate(split)
    metrics = training.evaluate(expected, split, backend=NUMPY, dtype=dtype)
    assert abs(loss - metrics.loss) <= bound * max(1, abs(loss))
    assert hits == round(metrics.accuracy * 40)


@given(
    drawn=models(),
    workers=st.integers(1, 3),
    batch_sizes=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_equal_to_the_layers(drawn, workers, batch_sizes, momentum, weight_decay):
    model, shape = drawn
    options = {"momentum": momentum, "weight_decay": weight_decay}
    compare(
        model, shape, "float64", workers=workers, batch_sizes=batch_sizes, bound=1e-10, **options
    )


@pytest.mark.parametrize("network", [LeNet, BLeNet])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_networks(network, workers):
    model = network(generator=np.random.default_rng(0))
    compare(
        model,
        (1, 28, 28),
        "float64",
        workers=workers,
        batch_sizes=(16, 9, 16),
        bound=1e-10,
        classes=10,
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [None, Sigmoid, ReLU])
@pytest.mark.parametrize("pool", [None, AvgPool2d, MaxPool2d])
def test_every_combination_of_the_optional_parts(norm, activation, pool):
    """More workers than examples in one of the batches, too."""
    generator = np.random.default_rng(0)
    layers = [Conv2d(2, 3, 3, generator=generator)]
    layers += [BatchNorm(3, 4)] * norm
    layers += [] if activation is None else [activation()]
    layers += [] if pool is None else [pool((2, 3))]
    side = (4, 6) if pool is None else (2, 2)
    layers += [Flatten(), Linear(3 * side[0] * side[1], 3, generator=generator)]
    compare(
        Sequential(*layers), (2, 6, 8), "float64", workers=3, batch_sizes=(7, 2, 7), bound=1e-10
    )


def test_of_equal_maxima_the_first_alone_has_the_gradient():
    """Images of one grey: every window of the pooling is a tie."""
    generator = np.random.default_rng(0)
    model = Sequential(
        Conv2d(1, 2, 3, generator=generator),
        MaxPool2d(2),
        Flatten(),
        Linear(8, 3, generator=generator),
    )
    model.to(NUMPY, "float64")
    expected = copy.deepcopy(model)
    split = Split(np.full((5, 1, 6, 6), 100, np.uint8), np.arange(5) % 3)
    Engine(model, SGD(model.parameters(), 0.1), (1, 6, 6), workers=2).step(split, np.arange(5))
    x, labels = next(split.batches(5, "float64"))
    _, cache = F.softmax_cross_entropy(expected.forward(x), labels)
    expected.backward(F.softmax_cross_entropy_backward(cache))
    for name, parameter in model.parameters().items():
        right = expected.parameters()[name].gradient
        np.testing.assert_allclose(parameter.gradient, right, atol=1e-12, err_msg=name)


def test_unsupported_layers_are_named():
    with pytest.raises(UnsupportedError, match=r"layer 0 \(Sigmoid\(\)\): the engine has no stage"):
        plan(Sequential(Sigmoid(), Flatten(), Linear(4, 2)), (1, 2, 2))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_float32(workers):
    """Sums of up to 147,456 products, added in another order: bounded by the layers' own errors."""
    model = LeNet(generator=np.random.default_rng(0))
    compare(
        model, (1, 28, 28), "float32", workers=workers, batch_sizes=(30,), bound=1e-4, classes=10
    )


def test_runs_are_identical_to_the_bit():
    def run():
        model = LeNet(generator=np.random.default_rng(0))
        engine = Engine(model, SGD(model.parameters(), 1.0), (1, 28, 28), workers=3)
        split = a_split((1, 28, 28), 40, 1, 10)
        losses = [engine.step(split, np.arange(k, 40)) for k in range(5)]
        return losses, engine.evaluate(split), model.state_dict()

    losses, found, state = run()
    for _ in range(3):
        again = run()
        assert again[:2] == (losses, found)
        for name, value in state.items():
            np.testing.assert_array_equal(again[2][name], value)


def test_a_label_out_of_range_makes_the_loss_nan():
    model = LeNet(generator=np.random.default_rng(0))
    engine = Engine(model, SGD(model.parameters(), 1.0), (1, 28, 28), workers=2)
    for label in (-1, 10):
        split = a_split((1, 28, 28), 8, 1, 10)
        split.labels[5] = label
        assert np.isnan(engine.evaluate(split)[0])
        assert np.isnan(engine.step(split, np.arange(8))[0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Conv2d(1, 1, 3), AvgPool2d(2, stride=1)), r"layer 0 .*: the engine pools windows side"),
        ((Conv2d(1, 1, 2), AvgPool2d(2)), r"layer 0 .*: the engine pools windows side by side"),
        ((Conv2d(1, 1, 3), MaxPool2d(2, padding=1)), "the engine pools windows side by side"),
        ((Linear(4, 2),), r"layer 0 \(Linear\(4, 2\)\): the engine has no stage that begins"),
        ((AvgPool2d(2),), r"layer 0 \(AvgPool2d\(2\)\): the engine has no stage that begins"),
        ((Conv2d(1, 1, 3), Sigmoid(), ReLU()), r"layer 2 \(ReLU\(\)\)"),
        ((Conv2d(1, 1, 3),), "the engine's models end with a linear layer"),
        ((), "the engine's models end with a linear layer"),
    ],
)
def test_what_is_not_supported_is_named(layers, message):
    with pytest.raises(UnsupportedError, match=message):
        plan(Sequential(*layers), (1, 6, 6))


def test_its_gradients_equal_the_complex_step_through_the_layers():
    model = LeNet(generator=np.random.default_rng(0))
    model.to(NUMPY, "float64")
    split = a_split((1, 28, 28), 6, 1, 10)
    x, labels = next(split.batches(6, "float64"))
    engine = Engine(model, SGD(model.parameters(), 1e-300), (1, 28, 28), workers=2)
    engine.step(split, np.arange(6))
    rng = np.random.default_rng(2)
    for name, parameter in model.parameters().items():
        value, direction = parameter.data, rng.standard_normal(parameter.data.shape)

        def loss(data, parameter=parameter):
            parameter.data = data
            return F.softmax_cross_entropy(model.forward(x), labels)[0]

        numeric = float(complex_step(loss, value, direction))
        parameter.data = value
        terms = parameter.gradient * direction
        # A bias before a batch norm has the gradient 0; what its terms were is not seen here.
        assert abs(terms.sum() - numeric) <= 1e-12 * max(1e-2, np.abs(terms).sum()), name


# What happens to a model, and to what it is given, between the steps of several workers.

TINY = (1, 6, 6)


def a_tiny_model(dtype="float64") -> Sequential:
    generator = np.random.default_rng(3)
    model = Sequential(
        Conv2d(1, 3, 3, generator=generator),
        BatchNorm(3, 4),
        Sigmoid(),
        AvgPool2d(2),
        Flatten(),
        Linear(12, 3, generator=generator),
    )
    model.to(NUMPY, dtype)
    return model


def an_engine(model, workers=3) -> Engine:
    return Engine(model, SGD(model.parameters(), 0.5, momentum=0.9), TINY, workers=workers)


def by_layers(model, split):
    """A function that takes a step on these examples, and one that evaluates."""
    run = training.Training(
        model,
        SGD(model.parameters(), 0.5, momentum=0.9),
        split,
        split,
        batch_size=8,
        generator=np.random.default_rng(0),
        backend=NUMPY,
        dtype="float64",
    )

    def evaluate() -> tuple[float, int]:
        metrics = training.evaluate(model, split, backend=NUMPY, dtype="float64")
        return metrics.loss, round(metrics.accuracy * len(split))

    return run.step, evaluate


def assert_same(model, expected) -> None:
    right = expected.state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value, right[name], atol=1e-11, err_msg=name)


def assert_close(found, right) -> None:
    assert found[0] == pytest.approx(float(right[0]), abs=1e-11)
    assert found[1] == int(right[1])


def test_batches_may_grow_and_shrink():
    """Beyond what the arrays that workers share were made for; their processes stay."""
    model, split = a_tiny_model(), a_split(TINY, 4500, 1)
    expected = copy.deepcopy(model)
    step, evaluate = by_layers(expected, split)
    engine = an_engine(model)
    pids = None
    for n in (4, 1, 4500, 2, 1, 3300, 4):
        if n == 1:  # a batch norm of one example by the convolution's maps
            engine.step(split, np.arange(n)), step(np.arange(n))
            continue
        assert_close(engine.step(split, np.arange(n)), step(np.arange(n)))
        assert_close(engine.evaluate(split), evaluate())
        here = {worker.process.pid for worker in engine._team._workers}
        assert pids in (None, here)
        pids = here
    assert_same(model, expected)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_as_many_workers_as_one_likes(workers):
    """They change the rounding, and nothing else."""
    split = a_split(TINY, 50, 1)
    one, many = a_tiny_model(), a_tiny_model()
    engines = an_engine(one, 1), an_engine(many, workers)
    for k in range(5):
        alone, together = (engine.step(split, np.arange(k, 50)) for engine in engines)
        assert_close(alone, together)
    assert_same(one, many)
    assert_close(engines[0].evaluate(split), engines[1].evaluate(split))


def test_several_engines_in_turns():
    split, every = a_split(TINY, 30, 1), np.arange(30)
    models = [a_tiny_model() for _ in range(3)]
    alone = a_tiny_model()
    engines = [an_engine(model, workers) for model, workers in zip(models, (2, 3, 2), strict=True)]
    reference = an_engine(alone, 2)
    for _ in range(3):
        reference.step(split, every)
        for engine in engines:
            engine.step(split, every)
            engine.evaluate(split)
    for model in models:
        assert_same(model, alone)


def test_the_processes_of_an_engine_that_has_gone_are_used_again():
    """At once, without the garbage collector."""
    split = a_split(TINY, 30, 1)
    gc.disable()
    try:
        pids = set()
        for _ in range(4):
            engine = an_engine(a_tiny_model())
            engine.step(split, np.arange(30))
            pids.add(frozenset(worker.process.pid for worker in engine._team._workers))
            del engine
        assert len(pids) == 1
        assert pids.pop() <= {worker.process.pid for worker in team._idle}
    finally:
        gc.enable()


def test_a_model_under_one_engine_after_the_other():
    """Each finds the values where the other has left them."""
    model, split, every = a_tiny_model(), a_split(TINY, 30, 1), np.arange(30)
    expected = copy.deepcopy(model)
    optimizers = [SGD(model.parameters(), 0.5) for _ in range(2)]
    engines = [Engine(model, optimizer, TINY, workers=2) for optimizer in optimizers]
    reference = Engine(expected, SGD(expected.parameters(), 0.5), TINY, workers=1)
    for k in (0, 1, 0, 0, 1):
        assert_close(engines[k].step(split, every), reference.step(split, every))
        for engine in engines:
            assert_close(engine.evaluate(split), reference.evaluate(split))
    assert_same(model, expected)


def test_values_that_are_replaced_between_steps_are_honoured():
    """By load_state_dict, by hand, and by layers that train in between."""
    model, split, every = a_tiny_model(), a_split(TINY, 30, 1), np.arange(30)
    expected = copy.deepcopy(model)
    step, evaluate = by_layers(expected, split)
    engine = an_engine(model)
    other = an_engine(a_tiny_model())
    other.step(split, every)
    x = next(split.batches(30, "float64"))[0]

    def load(of: Sequential) -> None:
        of.load_state_dict(other_state)

    def by_hand(of: Sequential) -> None:
        for parameter in of.parameters().values():
            parameter.data = 0.9 * parameter.data

    def averages(of: Sequential) -> None:
        of.layers[1].moving_mean = of.layers[1].moving_mean + 0.3
        of.layers[1].moving_var = of.layers[1].moving_var * 2

    def in_place(of: Sequential) -> None:
        of.layers[0].weight.data *= 1.5

    def forward(of: Sequential) -> None:
        of.forward(x)  # the moving averages

    other_state = {name: value * 0.8 for name, value in model.state_dict().items()}
    for change in (load, by_hand, averages, in_place, forward):
        for then in ("step", "evaluate"):
            assert_close(engine.step(split, every), step(every))
            change(model), change(expected)
            if then == "step":
                assert_close(engine.step(split, every), step(every))
            assert_close(engine.evaluate(split), evaluate())
            np.testing.assert_allclose(model.forward(x), expected.forward(x), atol=1e-11)
    assert_same(model, expected)


def test_copies_are_not_changed_by_later_steps():
    model, split, every = a_tiny_model(), a_split(TINY, 30, 1), np.arange(30)
    engine = an_engine(model)
    engine.step(split, every)
    state, copied = model.state_dict(), copy.deepcopy(model)
    gradients = {name: p.gradient for name, p in model.parameters().items()}
    before = copy.deepcopy((state, gradients))
    engine.step(split, every)
    assert (state["5.weight"] != model.state_dict()["5.weight"]).all()
    for found in (state, copied.state_dict()):
        for name, value in found.items():
            np.testing.assert_array_equal(value, before[0][name])
    for name, value in gradients.items():
        np.testing.assert_array_equal(value, before[1][name])
    # And the other way about: a copy that is trained leaves the model alone.
    after = model.state_dict()
    an_engine(copied).step(split, every)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, after[name])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kinds_of_images_labels_and_indices(workers, dtype):
    """The same results to the bit, whatever they are."""
    split, order = a_split(TINY, 30, 1), np.random.default_rng(0).permutation(30)

    def run(split, order):
        model = a_tiny_model(dtype)
        engine = an_engine(model, workers)
        found = [engine.step(split, order), engine.evaluate(split), engine.step(split, order[:7])]
        for value in model.state_dict().values():
            assert value.dtype == dtype
        return found, [value.tobytes() for value in model.state_dict().values()]

    expected = run(split, order)
    images, labels = split.images, split.labels
    read_only = images.copy()
    read_only.flags.writeable = False
    for kind in ("uint8", "int8", "int16", "int64", "uint64", ">i4"):
        assert run(Split(read_only, labels.astype(kind)), order) == expected
    for kind in ("int8", "uint8", "int16", "uint32", "uint64"):
        assert run(split, order.astype(kind)) == expected
    assert run(split, order - 30) == expected  # from the end
    for strange in (
        np.repeat(images, 2, axis=0)[::2],
        np.asfortranarray(images),
        images[:, :, ::-1].copy()[:, :, ::-1],
    ):
        assert not strange.flags.c_contiguous
        assert run(Split(strange, np.repeat(labels, 2)[::2]), order) == expected


def test_labels_of_another_dtype_than_at_first():
    engine = an_engine(a_tiny_model())
    split = a_split(TINY, 30, 1)
    small = Split(split.images, split.labels.astype(np.uint8))
    assert engine.evaluate(small) == engine.evaluate(split)
    split.labels[25] = 256  # 0, as one byte
    assert np.isnan(engine.evaluate(split)[0])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("index", [30, -31, 10**6])
def test_indices_out_of_range(workers, index):
    split, engine = a_split(TINY, 30, 1), an_engine(a_tiny_model(), workers)
    for place in (0, 5):
        indices = np.arange(6)
        indices[place] = index
        with pytest.raises(IndexError, match="out of bounds"):
            engine.step(split, indices)
    engine.step(split, np.arange(6))


@pytest.mark.parametrize("workers", [0, -1])
def test_there_is_at_least_one_worker(workers):
    model = LeNet(generator=np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"expected at least 1 worker, got {workers}"):
        Engine(model, SGD(model.parameters(), 1.0), (1, 28, 28), workers=workers)
