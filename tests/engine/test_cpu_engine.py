"""The fused engine on the CPU against the layers, which are its specification."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import NUMPY, TINY, a_split, a_tiny_model, models, optional_parts

from npbn import functional as F
from npbn.data import Split
from npbn.engine import build
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

try:
    pytest.importorskip("npbn.engine.cpu")
except UnsupportedError as error:
    pytest.skip(str(error), allow_module_level=True)


def an_engine(model, split, *, kind="fused", batch_size=8, threads=2, test=None, lr=0.5, **options):
    options = {"momentum": 0.9} | options
    optimizer = SGD(model.parameters(), lr, **options)
    what = model, optimizer, split, split if test is None else test
    return build(kind, *what, batch_size=batch_size, backend=NUMPY, threads=threads)


def train(engine, order) -> list[tuple[int, float, int]]:
    return [(r.examples, float(r.loss), int(r.correct)) for r in engine.steps(np.asarray(order))]


def evaluate(engine) -> tuple[float, int]:
    """The mean loss, and how many were right."""
    results = list(engine.evaluate())
    examples = sum(result.examples for result in results)
    assert examples == len(engine.test)
    loss = sum(result.examples * float(result.loss) for result in results) / examples
    return loss, sum(int(result.correct) for result in results)


def assert_close(found, right, bound=1e-11) -> None:
    """Of tuples whose last numbers are a loss and a count."""
    assert (*found[:-2], found[-1]) == (*right[:-2], right[-1])
    assert abs(found[-2] - right[-2]) <= bound * max(1, abs(right[-2]))


def assert_same(model, expected, bound=1e-11) -> None:
    right = expected.state_dict()
    for name, value in model.state_dict().items():
        atol = bound * max(1, np.abs(right[name]).max())
        np.testing.assert_allclose(value, right[name], rtol=0, atol=atol, err_msg=name)


def compare(
    model, shape, dtype, *, threads, bound, batch_size, examples=40, classes=3, **options
) -> None:
    """Two passes both ways: losses, predictions, gradients, parameters and moving averages."""
    model.to(NUMPY, dtype)
    expected = copy.deepcopy(model)
    split, test = a_split(shape, 40, 1, classes), a_split(shape, 33, 3, classes)
    options = {"momentum": 0.0, "lr": 0.1, "test": test, "batch_size": batch_size} | options
    fused = an_engine(model, split, threads=threads, **options)
    layers = an_engine(expected, split, kind="layers", **options)
    rng = np.random.default_rng(2)
    for _ in range(2):
        order = rng.permutation(40)[:examples]
        for found, right in zip(fused.steps(order), layers.steps(order), strict=True):
            assert_close(
                (found.examples, float(found.loss), int(found.correct)),
                (right.examples, float(right.loss), int(right.correct)),
                bound,
            )
            # What a batch norm takes back, the gradient of a bias or β before it, is rounding
            # noise: errors are measured against the largest gradient.
            scale = max(np.abs(p.gradient).max() for p in expected.parameters().values())
            for name, parameter in model.parameters().items():
                right = expected.parameters()[name]
                error = np.abs(parameter.gradient - right.gradient).max()
                assert error <= bound * scale, (name, error, scale)
            assert_same(model, expected, bound)
        assert_close(evaluate(fused), evaluate(layers), bound)
    assert fused.optimizer.steps == layers.optimizer.steps


@given(
    drawn=models(),
    threads=st.integers(1, 4),
    batch_size=st.integers(2, 12),
    examples=st.integers(12, 40),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_equal_to_the_layers(drawn, batch_size, examples, **options):
    model, shape = drawn
    if examples % batch_size == 1:
        examples -= 1  # a batch norm over one example: see Training
    # A larger rate would let some models diverge, and roundings grow without bound.
    sizes = {"batch_size": batch_size, "examples": examples, "lr": 1e-3}
    compare(model, shape, "float64", bound=1e-10, **sizes, **options)


@pytest.mark.parametrize("network", [LeNet, BLeNet])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_networks(network, threads):
    model = network(generator=np.random.default_rng(0))
    sizes = {"batch_size": 16, "classes": 10}
    compare(model, (1, 28, 28), "float64", threads=threads, bound=1e-10, **sizes)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [None, Sigmoid, ReLU])
@pytest.mark.parametrize("pool", [None, AvgPool2d, MaxPool2d])
def test_every_combination_of_the_optional_parts(norm, activation, pool):
    """With more threads than examples in the last batch."""
    model, shape = optional_parts(norm, activation, pool)
    compare(model, shape, "float64", threads=3, batch_size=19, bound=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_float32(threads):
    """Sums of up to 147,456 products, added in another order: bounded by the layers' own errors."""
    model = LeNet(generator=np.random.default_rng(0))
    sizes = {"batch_size": 30, "examples": 30, "classes": 10}
    compare(model, (1, 28, 28), "float32", threads=threads, bound=1e-4, **sizes)


@given(
    drawn=models(),
    dtype=st.sampled_from(["float32", "float64"]),
    batch_size=st.integers(2, 40),
    threads=st.integers(2, 4),
)
def test_the_bits_do_not_depend_on_the_threads(drawn, dtype, batch_size, threads):
    model, shape = drawn
    model.to(NUMPY, dtype)
    split, order = a_split(shape, 40, 1), np.random.default_rng(2).permutation(40)
    order = order[: len(order) - (len(order) % batch_size == 1)]

    def run(threads):
        copied = copy.deepcopy(model)
        engine = an_engine(copied, split, batch_size=batch_size, threads=threads)
        found = [train(engine, order), evaluate(engine), train(engine, order)]
        # As text: a model may diverge, and NaN is not equal to NaN.
        return repr(found), {name: a.tobytes() for name, a in copied.state_dict().items()}

    assert run(1) == run(threads)


def test_runs_are_identical_to_the_bit():
    def run():
        model, split = LeNet(generator=np.random.default_rng(0)), a_split((1, 28, 28), 40, 1, 10)
        engine = an_engine(model, split, threads=3)
        found = [train(engine, np.arange(k, 40)) for k in range(0, 6, 2)], evaluate(engine)
        return found, {name: value.tobytes() for name, value in model.state_dict().items()}

    first = run()
    for _ in range(3):
        assert run() == first


def test_of_equal_maxima_the_first_alone_has_the_gradient():
    """A map of zeros: every window of the pooling is a tie, of pixels that differ."""
    generator = np.random.default_rng(0)
    model = Sequential(
        Conv2d(1, 2, 3, generator=generator),
        MaxPool2d(2),
        Flatten(),
        Linear(8, 3, generator=generator),
    )
    model.to(NUMPY, "float64")
    model.layers[0].weight.data[0] = 0
    expected = copy.deepcopy(model)
    split = a_split(TINY, 5, 1)
    train(an_engine(model, split), range(5))
    train(an_engine(expected, split, kind="layers"), range(5))
    assert_same(model, expected)


def test_of_equal_logits_the_first_counts():
    model = Sequential(Flatten(), Linear(36, 3, bias=False))
    model.layers[1].weight.data[...] = 0
    split = a_split(TINY, 20, 1)
    assert evaluate(an_engine(model, split))[1] == np.count_nonzero(split.labels == 0) > 0


def test_a_label_out_of_range_makes_the_loss_nan():
    for label in (-1, 10):
        split = a_split((1, 28, 28), 8, 1, 10)
        split.labels[5] = label
        engine = an_engine(LeNet(generator=np.random.default_rng(0)), split)
        assert np.isnan(evaluate(engine)[0])
        assert np.isnan(train(engine, range(8))[0][1])


def test_its_gradients_equal_the_complex_step_through_the_layers():
    model = LeNet(generator=np.random.default_rng(0))
    model.to(NUMPY, "float64")
    split = a_split((1, 28, 28), 6, 1, 10)
    x, labels = next(split.batches(6, "float64"))
    train(an_engine(model, split, lr=1e-300), range(6))
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


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_frozen_batch_norm_keeps_its_averages_and_is_trained(when):
    """Put into prediction mode before the engine is made, or between its steps."""
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    model.layers[1].moving_mean.data[...] = 0.3
    expected = copy.deepcopy(model)
    if when == "before":
        model.layers[1].eval(), expected.layers[1].eval()
    fused, layers = an_engine(model, split), an_engine(expected, split, kind="layers")
    if when == "between":
        train(fused, range(30)), train(layers, range(30))
        model.layers[1].eval(), expected.layers[1].eval()
    before = model.layers[1].state_dict()
    for found, right in zip(train(fused, range(30)), train(layers, range(30)), strict=True):
        assert_close(found, right)
    assert_same(model, expected)
    for name, value in model.layers[1].state_dict().items():
        assert np.array_equal(value, before[name]) == name.startswith("moving"), name


def test_a_batch_norm_that_is_not_frozen_any_more_is_trained():
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    model.eval()
    expected = copy.deepcopy(model)
    fused, layers = an_engine(model, split), an_engine(expected, split, kind="layers")
    model.train(), expected.train()
    for found, right in zip(train(fused, range(30)), train(layers, range(30)), strict=True):
        assert_close(found, right)
    assert_same(model, expected)


# What happens to a model, and to what it is given, between the steps.


@pytest.mark.parametrize("batch_size", [4, 1500, 10**400])
def test_batches_of_any_size(batch_size):
    """The order may be shorter than a batch, and the data longer than several."""
    model, split = a_tiny_model(), a_split(TINY, 4500, 1)
    expected = copy.deepcopy(model)
    fused = an_engine(model, split, batch_size=batch_size)
    layers = an_engine(expected, split, batch_size=batch_size, kind="layers")
    for n in (4, 4500, 2, 3302):
        for found, right in zip(train(fused, range(n)), train(layers, range(n)), strict=True):
            assert_close(found, right, 1e-9)
        assert_close(evaluate(fused), evaluate(layers), 1e-9)
    assert_same(model, expected, 1e-9)


def test_a_caller_that_stops_asking_stops_the_training():
    engine = an_engine(a_tiny_model(), a_split(TINY, 30, 1))
    results = engine.steps(np.arange(30))
    assert engine.optimizer.steps == 0
    next(results)
    results.close()
    assert engine.optimizer.steps == 1


def test_several_engines_in_turns():
    split = a_split(TINY, 30, 1)
    several = [a_tiny_model() for _ in range(3)]
    alone = a_tiny_model()
    engines = [
        an_engine(model, split, threads=t) for model, t in zip(several, (2, 3, 2), strict=True)
    ]
    reference = an_engine(alone, split)
    for _ in range(3):
        train(reference, range(30))
        for engine in engines:
            train(engine, range(30))
            evaluate(engine)
    for model in several:
        assert_same(model, alone, 0)


def test_a_model_under_one_engine_after_the_other():
    """Each finds the values where the other has left them."""
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    expected = copy.deepcopy(model)
    engines = [an_engine(model, split, momentum=0) for _ in range(2)]
    reference = an_engine(expected, split, momentum=0)
    for k in (0, 1, 0, 0, 1):
        assert train(engines[k], range(30)) == train(reference, range(30))
        for engine in engines:
            assert evaluate(engine) == evaluate(reference)
    assert_same(model, expected, 0)


def test_values_that_are_replaced_between_steps_are_honoured():
    """By load_state_dict, by hand, and by layers that train in between."""
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    expected = copy.deepcopy(model)
    fused, layers = an_engine(model, split), an_engine(expected, split, kind="layers")
    x = next(split.batches(30, "float64"))[0]

    def load(of: Sequential) -> None:
        of.load_state_dict(other_state)

    def by_hand(of: Sequential) -> None:
        for parameter in of.parameters().values():
            parameter.data = 0.9 * parameter.data

    def averages(of: Sequential) -> None:
        norm = of.layers[1]
        assert isinstance(norm, BatchNorm)
        norm.moving_mean.data = norm.moving_mean.data + 0.3
        norm.moving_var.data = norm.moving_var.data * 2

    def in_place(of: Sequential) -> None:
        of.layers[0].weight.data *= 1.5

    def forward(of: Sequential) -> None:
        of.forward(x)  # the moving averages

    other_state = {name: value * 0.8 for name, value in model.state_dict().items()}
    for change in (load, by_hand, averages, in_place, forward):
        for then in ("step", "evaluate"):
            assert_close(train(fused, range(8))[0], train(layers, range(8))[0])
            change(model), change(expected)
            if then == "step":
                assert_close(train(fused, range(8))[0], train(layers, range(8))[0])
            assert_close(evaluate(fused), evaluate(layers))
            np.testing.assert_allclose(model.forward(x), expected.forward(x), atol=1e-11)
    assert_same(model, expected)


def test_velocities_that_are_replaced_are_honoured():
    """As `Training.load_state` does."""
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    expected = copy.deepcopy(model)
    engines = an_engine(model, split), an_engine(expected, split, kind="layers")
    for engine in engines:
        train(engine, range(8))
        engine.optimizer.velocity = {n: 0.5 * v for n, v in engine.optimizer.velocity.items()}
        train(engine, range(8))
    assert_same(model, expected)
    fused, layers = (engine.optimizer.velocity for engine in engines)
    assert fused.keys() == layers.keys()
    for name, value in layers.items():
        np.testing.assert_allclose(fused[name], value, atol=1e-11, err_msg=name)


def test_copies_are_not_changed_by_later_steps():
    model, split = a_tiny_model(), a_split(TINY, 30, 1)
    engine = an_engine(model, split)
    train(engine, range(8))
    state, copied = model.state_dict(), copy.deepcopy(model)
    before = copy.deepcopy(state)
    train(engine, range(8))
    assert (state["5.weight"] != model.state_dict()["5.weight"]).all()
    for found in (state, copied.state_dict()):
        for name, value in found.items():
            np.testing.assert_array_equal(value, before[name])
    # And the other way about: a copy that is trained leaves the model alone.
    after = model.state_dict()
    train(an_engine(copied, split), range(8))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, after[name])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kinds_of_images_labels_and_indices(threads, dtype):
    """The results have the same bits, whatever they are."""
    split, order = a_split(TINY, 30, 1), np.random.default_rng(0).permutation(30)

    def run(split, order):
        model = a_tiny_model(dtype)
        engine = an_engine(model, split, threads=threads)
        found = [train(engine, order), evaluate(engine), train(engine, order[:7])]
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
    for strange in (
        np.repeat(images, 2, axis=0)[::2],
        np.asfortranarray(images),
        images[:, :, ::-1].copy()[:, :, ::-1],
    ):
        assert not strange.flags.c_contiguous
        assert run(Split(strange, np.repeat(labels, 2)[::2]), order) == expected


def test_a_label_that_is_another_in_one_byte_is_out_of_range():
    split = a_split(TINY, 30, 1)
    split.labels[25] = 256
    assert np.isnan(evaluate(an_engine(a_tiny_model(), split))[0])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", [30, 10**6])
def test_indices_out_of_range(threads, index):
    engine = an_engine(a_tiny_model(), a_split(TINY, 30, 1), threads=threads)
    for place in (0, 5):
        indices = np.arange(6)
        indices[place] = index
        with pytest.raises(IndexError, match="out of bounds"):
            train(engine, indices)
    train(engine, range(6))


@pytest.mark.parametrize("threads", [0, -1])
def test_there_is_at_least_one_thread(threads):
    with pytest.raises(ValueError, match=f"expected at least 1 thread, got {threads}"):
        an_engine(a_tiny_model(), a_split(TINY, 30, 1), threads=threads)
