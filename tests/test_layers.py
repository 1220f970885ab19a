"""Layers and models: state, names, modes, errors, and the gradient of a whole network."""

from __future__ import annotations

import math

import numpy as np
import pytest

from arrays import to_host
from cases import EPS64
from npbn import backend
from npbn import functional as F
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Parameter,
    ReLU,
    Sequential,
    Sigmoid,
    dtype_of,
)
from npbn.models import BLeNet, LeNet

NUMPY = backend.get_backend("numpy")


def lenet(**options) -> LeNet:
    return LeNet(generator=np.random.default_rng(0), **options)


def every_layer() -> Sequential:
    """Each kind of layer, once."""
    generator = np.random.default_rng(3)
    return Sequential(
        Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1, generator=generator),
        BatchNorm(3, 4, eps=0.01),
        ReLU(),
        MaxPool2d(2, stride=1),
        Conv2d(3, 2, 2, bias=False, generator=generator),
        AvgPool2d((1, 2), padding=(0, 1)),
        Flatten(),
        Linear(12, 5, bias=False, generator=generator),
        BatchNorm(5, 2, eps=0.01),
        Sigmoid(),
        Linear(5, 4, generator=generator),
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (every_layer(), (3, 2, 5, 6)),
        (lenet(), (4, 1, 28, 28)),
        (lenet(batch_norm=False), (2, 1, 28, 28)),
        (BLeNet(2, 13, 3, generator=np.random.default_rng(0)), (4, 2, 13, 13)),
    ],
    ids=["every layer", "LeNet", "LeNet without", "BLeNet"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "prediction"])
def test_gradient_of_a_whole_network(model, shape, training, device):
    """By every parameter and by the input, along random directions, with the complex step.

    A directional derivative is one number for a whole array. Its terms |gradient · direction| set
    the scale of the rounding, and the depth of the network (16 layers, sums of up to 1,000 terms,
    divisions by s ≥ 0.003) the factor before eps. A bias that batch norm subtracts again has the
    gradient 0, so the scale includes what it is made of: the gradient of all the parameters.
    """
    model.to(device, "float64")
    if training:
        model.train()
    else:
        model.eval()
    rng = np.random.default_rng(1)
    x, labels = (device.asarray(a) for a in (rng.normal(size=shape), rng.integers(0, 3, shape[0])))

    def loss(x):
        return F.softmax_cross_entropy(model.forward(x), labels)

    _, cache = loss(x)
    dx = to_host(model.backward(F.softmax_cross_entropy_backward(cache)))
    gradients = {name: to_host(p.gradient) for name, p in model.parameters().items()}
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    state = model.state_dict()
    for name, parameter in [*model.parameters().items(), ("x", Parameter("x", x))]:
        gradient = gradients.get(name, dx)
        direction = rng.normal(size=gradient.shape)
        value = parameter.data
        stepped = device.asarray(to_host(value) + 1e-30j * direction)
        if name == "x":
            numeric = to_host(loss(stepped)[0]).imag / 1e-30
        else:
            parameter.data = stepped
            numeric = to_host(loss(x)[0]).imag / 1e-30
            parameter.data = value
        model.load_state_dict(state)  # the averages have moved
        analytic = np.sum(gradient * direction)
        scale = np.sum((np.abs(gradient) + largest) * np.abs(direction))
        assert abs(analytic - numeric) <= 1e4 * EPS64 * scale, name


def test_parameters_have_names_data_and_gradients():
    model = Sequential(Conv2d(1, 2, 3), BatchNorm(2, 4), Sequential(Flatten(), Linear(8, 3)))
    parameters = model.parameters()
    assert list(parameters) == [
        "0.weight",
        "0.bias",
        "1.gamma",
        "1.beta",
        "2.1.weight",
        "2.1.bias",
    ]
    assert parameters["1.gamma"].name == "gamma"
    assert parameters["0.weight"].gradient is None
    model.backward(np.ones_like(model.forward(np.ones((2, 1, 4, 4), np.float32))))
    for parameter in parameters.values():
        assert parameter.gradient.shape == parameter.data.shape
        assert parameter.gradient.dtype == np.float32
    assert repr(parameters["2.1.bias"]) == "Parameter('bias', shape=(3,), float32)"


def test_layers_in_attributes_are_part_of_a_layer(rng):
    """A residual block, as a user would write it."""

    class Residual(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Sequential(Linear(4, 4), BatchNorm(4, 2))
            self.scale = Parameter("weight", np.ones((1, 4), np.float32))
            self.shift = Parameter("weight", np.zeros((1, 4), np.float32))

        def forward(self, x):
            return self.inner.forward(x) + x

        def backward(self, dy):
            return self.inner.backward(dy) + dy

    model = Sequential(Residual(), Linear(4, 2))
    assert list(model.parameters()) == [
        "0.scale",
        "0.shift",
        "0.inner.0.weight",
        "0.inner.0.bias",
        "0.inner.1.gamma",
        "0.inner.1.beta",
        "1.weight",
        "1.bias",
    ]
    assert "0.inner.1.moving_var" in model.state_dict()
    model.eval()
    assert not model.layers[0].inner.layers[1].training
    model.to(NUMPY, "float64")
    y = model.forward(rng.normal(size=(3, 4)))
    assert y.dtype == np.float64


def test_gradients_are_set_not_added(rng):
    layer, x, dy = Linear(3, 2), *(rng.normal(size=s).astype(np.float32) for s in ((4, 3), (4, 2)))
    for _ in range(2):
        layer.forward(x)
        layer.backward(dy)
    np.testing.assert_allclose(layer.weight.gradient, dy.T @ x, rtol=1e-5)


def test_layers_pass_their_options_on(rng, device):
    def assert_equal(actual, expected):
        np.testing.assert_array_equal(to_host(actual), to_host(expected))

    x = device.asarray(rng.normal(size=(3, 2, 6, 5)), "float32")
    conv = Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1))
    conv.to(device)
    options = {"stride": (2, 1), "padding": (0, 1)}
    expected, _ = F.conv2d(x, conv.weight.data, conv.bias.data, **options)
    assert_equal(conv.forward(x), expected)
    for layer, function in ((AvgPool2d, F.avg_pool2d), (MaxPool2d, F.max_pool2d)):
        expected, _ = function(x, (3, 2), **options)
        assert_equal(layer((3, 2), **options).forward(x), expected)
    norm = BatchNorm(2, 4, eps=0.5, momentum=0.25)
    norm.to(device)
    four = tuple(array.data for array in norm.state().values())
    expected, _, moving = F.batch_norm(x, *four, training=True, eps=0.5, momentum=0.25)
    assert_equal(norm.forward(x), expected)
    assert_equal(norm.moving_var.data, moving[1])


def test_moving_forgets_gradients():
    layer = Linear(2, 2)
    layer.forward(np.ones((1, 2), np.float32))
    layer.backward(np.ones((1, 2), np.float32))
    layer.to(NUMPY, "float64")
    assert layer.weight.gradient is None


def test_without_a_generator_weights_are_different_every_time():
    assert not np.array_equal(Linear(2, 2).weight.data, Linear(2, 2).weight.data)
    assert not np.array_equal(*(LeNet().layers[0].weight.data for _ in range(2)))


def test_published_sizes():
    assert sum(p.data.size for p in lenet().parameters().values()) == 44_878
    network_b = BLeNet(1, 28, 10)
    assert network_b.parameters()["9.weight"].data.shape == (120, 16 * 5 * 5)
    assert network_b.forward(np.zeros((2, 1, 28, 28), np.float32)).shape == (2, 10)
    without = lenet(batch_norm=False)
    assert not any(isinstance(layer, BatchNorm) for layer in without.layers)
    assert sum(p.data.size for p in without.parameters().values()) == 44_878 - 2 * 226


@pytest.mark.parametrize("size", [12, 13, 14, 15, 16, 17, 28, 33])
def test_network_b_fits_images_of_any_size(size):
    y = BLeNet(3, size, 7).forward(np.zeros((2, 3, size, size), np.float32))
    assert y.shape == (2, 7)


def test_initial_values_are_of_the_published_distributions():
    """Uniform within the bound, and reaching close to it; γ 1, β 0, mean 0, variance 1."""
    model = lenet()
    conv, linear = model.layers[4], model.layers[9]
    for layer, fan_in, fan_out in ((conv, 6 * 25, 16 * 25), (linear, 256, 120)):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < np.abs(layer.weight.data).max() <= bound
        assert abs(layer.weight.data.std() / (bound / math.sqrt(3)) - 1) < 0.05
        assert 0.8 / math.sqrt(fan_in) < np.abs(layer.bias.data).max() <= 1 / math.sqrt(fan_in)
    norm = model.layers[1]
    for array, value in (
        (norm.gamma.data, 1),
        (norm.beta.data, 0),
        (norm.moving_mean.data, 0),
        (norm.moving_var.data, 1),
    ):
        np.testing.assert_array_equal(array, np.full((1, 6, 1, 1), value, np.float32))


def test_one_generator_one_model():
    one, same, other = (LeNet(generator=np.random.default_rng(s)).state_dict() for s in (1, 1, 2))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    assert not np.array_equal(one["0.weight"], other["0.weight"])


def test_initial_moving_variance_can_be_zero():
    """As one of the lessons has it: predicting before training then scales by 1/√eps = 316."""
    layer = BatchNorm(2, 2, initial_moving_var=0.0)
    layer.eval()
    y = layer.forward(np.ones((1, 2), np.float32))
    np.testing.assert_allclose(y, 1 / math.sqrt(1e-5), rtol=1e-6)


def test_training_moves_the_averages_and_prediction_does_not(rng, device):
    layer = BatchNorm(3, 2, momentum=0.5)
    layer.to(device)
    host = rng.normal(5, 1, (8, 3)).astype(np.float32)
    x = device.asarray(host)
    layer.forward(x)
    moved = layer.state_dict()
    np.testing.assert_allclose(
        moved["moving_mean"], 0.5 * host.mean(axis=0, keepdims=True), rtol=1e-6
    )
    layer.eval()
    layer.forward(x)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, moved[name])


def test_a_complex_step_leaves_the_averages_real(rng, device, dtype):
    """They move by the real part alone, so that the layer goes on in real numbers."""
    one, same = BatchNorm(3, 2), BatchNorm(3, 2)
    one.to(device, dtype)
    same.to(device, dtype)
    x = device.asarray(rng.normal(size=(8, 3)), dtype)
    stepped = device.asarray(to_host(x) + np.array(1e-30j, f"c{2 * to_host(x).itemsize}"))
    one.forward(stepped)
    same.forward(x)
    for name, value in one.state_dict().items():
        assert value.dtype == dtype
        np.testing.assert_allclose(value, same.state_dict()[name], rtol=1e-6)
    assert one.forward(x).dtype == x.dtype


def test_modes_reach_every_layer():
    model = Sequential(BatchNorm(2, 2), Sequential(BatchNorm(2, 2)))
    inner = model.layers[1].layers[0]
    model.eval()
    assert not (model.training or model.layers[0].training or inner.training)
    model.train()
    assert model.training and model.layers[0].training and inner.training


def test_state_goes_to_another_model_and_back(rng, device):
    one, other = LeNet(generator=rng), LeNet(generator=rng)
    one.to(device)
    other.to(device)
    x = device.asarray(rng.random((4, 1, 28, 28)), "float32")
    one.forward(x)  # so that the averages have moved
    other.load_state_dict(one.state_dict())
    one.eval()
    other.eval()
    np.testing.assert_array_equal(to_host(one.forward(x)), to_host(other.forward(x)))


def test_state_is_a_copy_and_is_loaded_in_place(device):
    layer = Linear(2, 2)
    layer.to(device)
    data, state = layer.weight.data, layer.state_dict()
    state["weight"][...] = 7
    assert not np.any(to_host(layer.weight.data) == 7)
    layer.load_state_dict(state)
    assert layer.weight.data is data and np.all(to_host(data) == 7)


def test_state_stays_on_the_device():
    """array-api-strict has devices that are none, and refuses to mix them."""
    import array_api_strict

    model = every_layer()
    state = model.state_dict()
    for array in model.state().values():
        data = array_api_strict.asarray(array.data)
        array.data = data.to_device(array_api_strict.Device("device1"))
    model.load_state_dict({name: value + 1 for name, value in state.items()})
    for name, array in model.state().items():
        assert array.data.device == array_api_strict.Device("device1")
        np.testing.assert_array_equal(to_host(array.data), state[name] + 1)


def test_buffers_are_state_that_is_not_trained(dtype, device):
    norm = BatchNorm(3, 2)
    assert list(norm.state()) == ["gamma", "beta", "moving_mean", "moving_var"]
    assert list(norm.parameters()) == ["gamma", "beta"]
    assert repr(norm.moving_mean) == "Buffer('moving_mean', shape=(1, 3), float32)"
    moving = norm.moving_mean
    norm.to(device, dtype)
    assert norm.moving_mean is moving and to_host(moving.data).dtype == dtype
    assert dtype_of(norm) == dtype
    assert dtype_of(Sequential(ReLU())) == "float32"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("weight"), ValueError, "missing: weight; unexpected: none"),
        (lambda s: s.update(other=np.zeros(1)), ValueError, "missing: none; unexpected: other"),
        (lambda s: s.update(bias=np.zeros(3)), ValueError, r"bias of shape \(2,\), got \(3,\)"),
        (lambda s: s.update(weight=np.zeros((4, 1))), ValueError, r"weight of shape \(2, 2\)"),
        (
            lambda s: s.update(bias=np.zeros(2) + 1j),
            TypeError,
            "expected bias of real numbers, got complex128",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, error, message):
    layer = Linear(2, 2)
    before = layer.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    change(state)
    with pytest.raises(error, match=message):
        layer.load_state_dict(state)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_batch_norm_shows_each_option_that_is_not_the_default():
    layer = BatchNorm(3, 2, eps=0.5, momentum=0.25, initial_moving_var=0.0)
    assert repr(layer) == "BatchNorm(3, 2, eps=0.5, momentum=0.25, initial_moving_var=0.0)"
    assert repr(BatchNorm(3, 2)) == "BatchNorm(3, 2)"


def test_repr(device):
    model = every_layer()
    model.to(device)
    assert repr(model).splitlines() == [
        "Sequential(",
        "  (0) Conv2d(2, 3, (3, 2), stride=(1, 2), padding=1)",
        "  (1) BatchNorm(3, 4, eps=0.01)",
        "  (2) ReLU()",
        "  (3) MaxPool2d(2, stride=1)",
        "  (4) Conv2d(3, 2, 2, bias=False)",
        "  (5) AvgPool2d((1, 2), padding=(0, 1))",
        "  (6) Flatten()",
        "  (7) Linear(12, 5, bias=False)",
        "  (8) BatchNorm(5, 2, eps=0.01)",
        "  (9) Sigmoid()",
        "  (10) Linear(5, 4)",
        ")",
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BatchNorm(3, 3), ValueError, "expected num_dims 2 .* or 4 .*, got 3"),
        (lambda: BatchNorm(0, 2), ValueError, "expected num_features >= 1, got 0"),
        (lambda: BatchNorm(3, 2, eps=0), ValueError, "expected eps > 0, got 0"),
        (lambda: BatchNorm(3, 2, momentum=2), ValueError, "expected momentum between 0 and 1"),
        (lambda: BatchNorm(3, 2, momentum=-1), ValueError, "expected momentum between 0 and 1"),
        (lambda: Conv2d(0, 1, 3), ValueError, "expected in_channels >= 1, got 0"),
        (lambda: BatchNorm(3, 2, initial_moving_var=-1), ValueError, "initial_moving_var >= 0"),
        (lambda: Conv2d(1, 0, 3), ValueError, "expected out_channels >= 1, got 0"),
        (lambda: Linear(0, 3), ValueError, "expected in_features >= 1, got 0"),
        (lambda: AvgPool2d(0), ValueError, "expected kernel_size"),
        (lambda: Conv2d(1, 1, True), ValueError, "kernel_size as an int >= 1 .*, got True"),
        (lambda: MaxPool2d(2, stride=True), ValueError, "expected stride as an int >= 1"),
        (lambda: AvgPool2d(2, padding=(1, False)), ValueError, "expected padding as an int >= 0"),
        (
            lambda: AvgPool2d(2, padding=2),
            ValueError,
            r"padding of at most half the kernel \(2, 2\), got \(2, 2\)",
        ),
        (lambda: MaxPool2d((4, 3), padding=2), ValueError, r"at most half the kernel \(4, 3\)"),
        (lambda: BLeNet(1, 11, 10), ValueError, "expected fig_size >= 12, got 11"),
        (lambda: Linear(2, 2).backward(np.ones((1, 2))), RuntimeError, "needs a forward pass"),
        (lambda: Sequential(*[ReLU()] * 2), ValueError, "expected every layer once"),
        (
            lambda: Sequential(*map(Sequential, [ReLU()] * 2)),
            ValueError,
            "expected every layer once",
        ),
        (lambda: Sequential([ReLU()]), TypeError, "expected layers, got list"),
        (lambda: ReLU().to(NUMPY, "int8"), ValueError, "dtype float32 or float64, got int8"),
        (
            lambda: BatchNorm(3, 4).forward(np.ones((2, 3), np.float32)),
            ValueError,
            r"expected x of 4 dimensions, got \(2, 3\)",
        ),
        (
            lambda: lenet().forward(np.zeros((2, 3, 28, 28), np.float32)),
            ValueError,
            r"expected x of shape \(N, 1, H, W\), got \(2, 3, 28, 28\)",
        ),
        (
            lambda: lenet().forward(np.zeros((2, 1, 28, 28))),
            TypeError,
            "one precision, got x: float64, weight: float32",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Block(Layer):
    """A layer of one's own that keeps layers in a list, in a tuple and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = [Parameter("gamma", np.ones(4)), Parameter("gamma", np.ones(4))]
        self.parts = [Linear(4, 4), (BatchNorm(4, 2),)]
        self.heads = {"a": Linear(4, 4), "b": [Linear(4, 2)]}

    def forward(self, x):
        return x

    def backward(self, dy):
        return dy


def test_layers_in_lists_tuples_and_dicts_belong_to_the_layer():
    block = Sequential(Block())
    assert set(block.parameters()) == {
        *("0.scale.0", "0.scale.1", "0.parts.0.weight", "0.parts.0.bias"),
        *("0.parts.1.0.gamma", "0.parts.1.0.beta"),
        *("0.heads.a.weight", "0.heads.a.bias", "0.heads.b.0.weight", "0.heads.b.0.bias"),
    }
    assert "0.parts.1.0.moving_var" in block.state_dict()
    block.eval()
    assert not block.layers[0].parts[1][0].training
    block.load_state_dict({name: 0 * value for name, value in block.state_dict().items()})
    assert not block.layers[0].heads["b"][0].weight.data.any()


def test_a_parameter_of_two_layers_is_refused():
    one, other = Linear(3, 3), Linear(3, 3)
    other.weight = one.weight
    with pytest.raises(ValueError, match=r"of its own as 1\.weight, got that of 0\."):
        Sequential(one, other).parameters()
    block = Block()
    block.parts.append(block.parts[0])
    with pytest.raises(ValueError, match=r"as parts\.2\.weight, got that of parts\.0\.weight"):
        block.parameters()


@pytest.mark.parametrize("generator", [0, np.random.RandomState(0), "0", np.random])
def test_what_is_no_generator_is_refused_where_it_is_given(generator):
    for make in (lambda g: Linear(2, 2, generator=g), lambda g: Conv2d(1, 2, 3, generator=g)):
        with pytest.raises(TypeError, match=r"expected generator as numpy\.random\.default_rng"):
            make(generator)
    with pytest.raises(TypeError, match="expected generator as"):
        LeNet(generator=generator)
    for bits in (np.random.MT19937, np.random.Philox, np.random.SFC64):
        assert Linear(2, 2, generator=np.random.Generator(bits(0))).weight.data.any()


@pytest.mark.parametrize("size", [(2, 3), [2, 3], np.array([2, 3])])
def test_pairs_may_be_lists_and_arrays(size):
    layer = Conv2d(1, 2, size, padding=size, stride=size)
    assert layer.kernel_size == layer.padding == layer.stride == (2, 3)
    assert MaxPool2d(size).kernel_size == (2, 3)
    for wrong in ([2], [2, 3, 4], [2.0, 3.0], np.array(2.5), [[2, 3]], "23", None):
        with pytest.raises(ValueError, match="expected kernel_size as an int >= 1 or a pair"):
            Conv2d(1, 2, wrong)
