"""Functions of PyTorch and JAX: right ones are called right, wrong ones never."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from npbn.verify import check_jax, check_torch, checker

torch = pytest.importorskip("torch")
F = torch.nn.functional

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def verdicts(report):
    """The verdict of each gradient in a word, by name."""
    words = {}
    for finding in report.findings:
        unsure = "can't tell" if finding.within else "wrong"
        words[finding.name] = "right" if finding.ok else unsure
    return words


def batch_norm(*, variance_path=1.0, dgamma=1.0):
    """A fused batch norm with factors of its gradients, of which all but 1 are mistakes."""

    class BatchNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gamma, beta, eps=1e-5):
            x_centred = x - x.mean(0)
            s = torch.sqrt((x_centred * x_centred).mean(0) + eps)
            ctx.save_for_backward(x_centred / s, gamma / s)
            return gamma * (x_centred / s) + beta

        @staticmethod
        def backward(ctx, dy):
            x_hat, factor = ctx.saved_tensors
            through_variance = x_hat * (dy * x_hat).mean(0)
            dx = factor * (dy - dy.mean(0) - variance_path * through_variance)
            return dx, dgamma * (dy * x_hat).sum(0), dy.sum(0), None

    return BatchNorm


def batch(dtype=torch.float64):
    gamma = (torch.rand(4, dtype=torch.float64) + 0.5).to(dtype)
    return {"x": normal(8, 4, dtype=dtype), "gamma": gamma, "beta": normal(4, dtype=dtype)}


RIGHT = {
    "conv2d": (
        functools.partial(F.conv2d, stride=2, padding=1),
        {"input": (2, 3, 6, 5), "weight": (4, 3, 3, 3), "bias": (4,)},
    ),
    "batch_norm": (
        lambda x, gamma, beta: F.batch_norm(
            x, torch.zeros_like(beta), torch.ones_like(beta), gamma, beta, training=True
        ),
        {"x": (6, 3, 2, 2), "gamma": (3,), "beta": (3,)},
    ),
    "layer_norm": (
        lambda x, gamma, beta: F.layer_norm(x, (5,), gamma, beta),
        {"x": (6, 5), "gamma": (5,), "beta": (5,)},
    ),
    "cross_entropy": (
        lambda logits: F.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4, 0])),
        {"logits": (6, 5)},
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), {"x": (2, 2, 4, 4)}),
    "sigmoid": (torch.sigmoid, {"input": (3, 4)}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_functions_of_torch_are_right_in_float64(name):
    """Extrapolated differences have 11 digits, as the tests of `npbn.verify.numeric` show."""
    function, shapes = RIGHT[name]
    report = check_torch(function, **{n: normal(*shape) for n, shape in shapes.items()})
    assert report.ok, str(report)
    assert [finding.name for finding in report.findings] == list(shapes)
    assert max(finding.bound for finding in report.findings) < 1e-9
    assert {finding.method for finding in report.findings} == {"central difference"}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_functions_of_torch_are_never_wrong_in_less(name, dtype):
    function, shapes = RIGHT[name]
    report = check_torch(function, **{n: normal(*s, dtype=dtype) for n, s in shapes.items()})
    assert "wrong" not in verdicts(report).values(), str(report)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize(("dtype", "part"), [(torch.float64, 0.01), *((d, 0.05) for d in DTYPES)])
def test_a_gradient_that_is_some_percent_too_large_is_not_right(name, dtype, part):
    """The function of torch in a ``torch.autograd.Function`` that makes dx larger."""
    function, shapes = RIGHT[name]

    class TooLarge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * (1 + part)

    arguments = {n: normal(*shape, dtype=dtype) for n, shape in shapes.items()}
    first = next(iter(shapes))
    wrong = lambda **given: function(**{**given, first: TooLarge.apply(given[first])})  # noqa: E731
    if name == "sigmoid":
        wrong = lambda input: torch.sigmoid(TooLarge.apply(input))  # noqa: E731
    found = verdicts(check_torch(wrong, **arguments))
    precise = dtype in (torch.float64, torch.float32)
    assert found.pop(first) in ({"wrong"} if precise else {"wrong", "can't tell"})
    assert "wrong" not in found.values()


def test_three_lines_check_a_fused_batch_norm():
    right = check_torch(batch_norm().apply, **batch())
    assert verdicts(right) == {"x": "right", "gamma": "right", "beta": "right"}
    wrong = check_torch(batch_norm(variance_path=0.0).apply, **batch())
    assert verdicts(wrong) == {"x": "wrong", "gamma": "right", "beta": "right"}
    assert str(wrong).startswith("dx: WRONG")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", [{"variance_path": 0.9}, {"dgamma": 0.95}, {"dgamma": 1.1}])
def test_wrong_batch_norm_is_never_right(dtype, mistake):
    """In float64 and float32, it is wrong. Less precise code cannot be told from right code."""
    found = verdicts(check_torch(batch_norm(**mistake), **batch(dtype)))
    wrong = found.pop("x" if "variance_path" in mistake else "gamma")
    if dtype in (torch.float64, torch.float32):
        assert wrong == "wrong" and set(found.values()) == {"right"}
    else:
        assert wrong != "right" and "wrong" not in found.values()


def test_a_gross_mistake_is_wrong_even_in_bfloat16():
    assert verdicts(check_torch(batch_norm(dgamma=20), **batch(torch.bfloat16)))["gamma"] == "wrong"


def test_positional_keyword_and_numpy_arguments_are_the_same():
    arguments = batch()
    expected = str(check_torch(batch_norm().apply, **arguments))
    for function in (batch_norm(), batch_norm().apply):
        assert str(check_torch(function, *arguments.values())) == expected
    arrays = {name: value.numpy() for name, value in arguments.items()}
    assert str(check_torch(batch_norm(), **arrays)) == expected
    reordered = dict(reversed(arguments.items()))
    assert verdicts(check_torch(batch_norm(), eps=1e-3, **reordered))["x"] == "right"


def test_an_option_of_apply_by_keyword():
    class Affine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shift=1.0, factor=2.0):
            ctx.factor = factor
            return factor * x + shift

        @staticmethod
        def backward(ctx, dy):
            return dy * (ctx.factor - (ctx.factor == 3)), None, None

    assert verdicts(check_torch(Affine.apply, normal(3), factor=4.0)) == {"x": "right"}
    assert verdicts(check_torch(Affine.apply, normal(3), factor=3.0)) == {"x": "wrong"}


def test_functions_without_a_signature_take_positional_arguments():
    labels = np.array([0, 1, 2])
    assert verdicts(check_torch(F.conv2d, normal(1, 1, 3, 3), normal(1, 1, 2, 2))) == {
        "x0": "right",
        "x1": "right",
    }
    assert verdicts(check_torch(F.cross_entropy, normal(3, 4), labels)) == {"input": "right"}


def test_setup_context():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(x, w):
            return x * w

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy * w, None

    report = check_torch(Product, w=normal(3), x=normal(3))
    assert verdicts(report) == {"x": "right", "w": "wrong"}
    assert "PyTorch has no gradient for w (None), which counts as 0" in report.notes


class Scaled(torch.nn.Module):
    """A module whose output depends on a moving average, which every forward pass changes."""

    def __init__(self, part=1.0):
        super().__init__()
        self.part = part
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.fixed = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("moving_mean", torch.zeros(3))

    def forward(self, x):
        y = self.weight * (x - self.moving_mean) * self.fixed
        # The weight's gradient is ``part`` of the right one.
        y = self.part * y + (1 - self.part) * (y / self.weight * self.weight.detach())
        self.moving_mean += 0.1 * x.detach().mean(0)
        return y


@pytest.mark.parametrize("part", [1.0, 0.99])
def test_parameters_of_a_module_by_name_and_buffers_as_they_were(part):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), Scaled(part), torch.nn.BatchNorm1d(3))
    model = model.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check_torch(model, normal(6, 2))
    right = dict.fromkeys(("input", "0.weight", "0.bias", "2.weight", "2.bias"), "right")
    found = verdicts(report)
    assert found.pop("1.weight") == ("right" if part == 1 else "wrong")
    assert found == right
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_a_parameter_with_the_name_of_an_argument():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(3))

        def forward(self, weight):
            return self.weight.detach() * weight

    with torch.no_grad():  # That is about the caller's code.
        found = verdicts(check_torch(Product(), normal(3)))
    assert found == {"weight": "right", "module.weight": "wrong"}


def test_only_what_requires_grad_if_anything_does():
    report = check_torch(torch.mul, normal(3).requires_grad_(), other=normal(3))
    assert verdicts(report) == {"x0": "right"}
    assert "dother is not checked: other does not require grad, but x0 does" in report.notes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("part", [1.0, 0.95])
def test_a_mistake_in_a_small_output_shows(dtype, part):
    def function(x):
        small = 1e-6 * (part * torch.cos(x) + (1 - part) * torch.cos(x).detach())
        return {"large": torch.sin(x), "others": [small.sum(), torch.argmax(x), x.detach()]}

    report = check_torch(function, normal(5, dtype=dtype))
    assert verdicts(report) == {"x": "right" if part == 1 else "wrong"}
    assert "1 of 3 outputs do not require grad, and are not checked" in report.notes


def test_in_place_code_and_memory_order():
    strides = []

    def function(x):
        strides.append(x.stride())
        return F.relu(x, inplace=True)

    x = normal(4, 3).t()
    kept = x.clone()
    assert verdicts(check_torch(function, x)) == {"x": "right"}
    assert set(strides) == {(1, 3)} and torch.equal(x, kept)


def test_a_backward_pass_that_changes_its_argument():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return dy.mul_(2)

    report = check_torch(Twice, normal(3))
    assert "the backward pass changes the upstream gradient in place" in report.notes


def test_a_kernel_for_contiguous_gradients_only():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * torch.as_strided(dy, (3, 4), (4, 1))

    report = check_torch(Twice, normal(3, 4))
    assert not report.ok and "not contiguous" in str(report)


def test_float32_or_less_inside_counts():
    """A right product is not called wrong, and a constant of float32 is no rounding."""
    x, w = normal(3, 4), normal(4, 5)
    report = check_torch(lambda x, w: (x.float() @ w.float()).double(), x, w)
    assert report.ok and max(f.bound for f in report.findings) > 1e-6
    report = check_torch(lambda x, w: (x.half() @ w.half()).double(), x, w)
    assert set(verdicts(report).values()) == {"can't tell"}
    report = check_torch(lambda x: x * torch.tensor(2.0) + torch.ones(3), normal(3))
    assert report.ok and report.findings[0].bound < 1e-9


def test_code_that_loses_digits_is_right(monkeypatch):
    """1 - y has 3 digits left at x = 30: stochastic arithmetic measures it in PyTorch, too."""

    class OneMinusSigmoid(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = 1 / (1 + torch.exp(-x))
            ctx.save_for_backward(y)
            return torch.exp(-x) * y

        @staticmethod
        def backward(ctx, dy):
            (y,) = ctx.saved_tensors
            return -factor * dy * y * (1 - y)

    x = torch.rand(5, dtype=torch.float64)
    factor = 1
    assert check_torch(OneMinusSigmoid, x + 30).ok
    with monkeypatch.context() as patch:
        patch.setattr(checker, "ROUNDINGS", 0)
        assert not check_torch(OneMinusSigmoid, x + 30).ok
    factor = 1.01
    assert not check_torch(OneMinusSigmoid, x + 25).ok


@torch.no_grad()
def without_grad(x):
    return 2 * x


def wrong_shape():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy[:2]

    return Cut


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (torch.nn.Dropout(0.5), ValueError, "it is random"),
        (lambda x: x.sum().item(), TypeError, "output, got float: what leaves the library"),
        (lambda x: torch.argmax(x), TypeError, "output, got torch.int64"),
        (torch.fft.fft, TypeError, "output, got torch.complex128"),
        (lambda x: None, TypeError, "output, got NoneType"),
        (lambda x: (), TypeError, "output, got nothing"),
        (lambda x: x.detach(), ValueError, "do not require grad"),
        (without_grad, ValueError, "do not require grad"),
        (lambda x: torch.log(x - 100), ValueError, "NaN or infinite elements in y"),
        (wrong_shape(), RuntimeError, r"got \[2\] but expected shape compatible with \[3\]"),
    ],
)
def test_what_cannot_be_checked_is_said(function, error, message):
    with pytest.raises(error, match=message):
        check_torch(function, normal(3))


def test_arguments_that_cannot_be_checked():
    with pytest.raises(ValueError, match="at least one input"):
        check_torch(torch.nn.ReLU(), torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"expected x of real numbers, got torch\.complex128"):
        check_torch(lambda x: abs(x), np.ones(3) + 1j)
    with pytest.raises(ValueError, match="expected x with elements"):
        check_torch(lambda x: x, normal(0))


# JAX computes in float32 here, as it does unless told otherwise.


@pytest.fixture
def jax():
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", False)
    return jax


def jax_batch_norm(jax, variance_path=1.0):
    jnp = jax.numpy

    def forward(x, gamma, beta):
        x_centred = x - x.mean(0)
        s = jnp.sqrt((x_centred * x_centred).mean(0) + 1e-5)
        return gamma * (x_centred / s) + beta, (x_centred / s, gamma / s)

    def backward(cache, dy):
        x_hat, factor = cache
        through_variance = x_hat * (dy * x_hat).mean(0)
        dx = factor * (dy - dy.mean(0) - variance_path * through_variance)
        return dx, (dy * x_hat).sum(0), dy.sum(0)

    function = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    function.defvjp(forward, backward)
    return lambda x, gamma, beta: function(x, gamma, beta)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_custom_vjp(jax, dtype):
    arguments = {n: jax.numpy.asarray(v.numpy(), dtype) for n, v in batch().items()}
    right = verdicts(check_jax(jax_batch_norm(jax), *arguments.values()))
    wrong = verdicts(check_jax(jax_batch_norm(jax, 0.9), **arguments))
    assert list(right) == list(wrong) == ["x", "gamma", "beta"]
    if dtype == "float32":
        assert set(right.values()) == {"right"} and wrong["x"] == "wrong"
    else:
        assert "wrong" not in right.values() and wrong["x"] != "right"


def test_jax_outputs_that_are_less_precise_than_inputs(jax):
    x = jax.numpy.asarray(normal(4, 3).numpy(), "float32")
    report = check_jax(lambda x: (x @ x.T).astype("bfloat16"), x)
    assert verdicts(report) == {"x": "can't tell"}, str(report)


@pytest.mark.parametrize("part", [1.0, 0.95])
def test_jax_trees_labels_and_outputs(jax, part):
    jnp = jax.numpy

    def loss(parameters, x, labels, axis):
        w = part * parameters["w"] + (1 - part) * jax.lax.stop_gradient(parameters["w"])
        logits = jnp.tanh(x @ w + parameters["b"])
        losses = -jax.nn.log_softmax(logits, axis)[jnp.arange(3), labels]
        return losses.mean(), {"right": (jnp.argmax(logits, axis) == labels).sum()}

    parameters = {"w": normal(2, 4).numpy(), "b": normal(4).numpy()}
    report = check_jax(loss, parameters, normal(3, 2).numpy(), np.array([0, 1, 2]), axis=1)
    found = verdicts(report)
    assert list(found) == ["parameters['b']", "parameters['w']", "x"]
    assert (found["parameters['w']"] == "wrong") == (part != 1)
    assert {found["parameters['b']"], found["x"]} <= {"right", "can't tell"}
    assert any("JAX computed in float32" in note for note in report.notes)


def test_jax_forward_rule_that_differs_from_the_function(jax):
    function = jax.custom_vjp(lambda x: 2 * x)
    function.defvjp(lambda x: (2 * x + 1, None), lambda _, dy: (2 * dy,))
    with pytest.raises(ValueError, match="the forward rule of custom_vjp differs"):
        check_jax(function, normal(3).numpy())


def test_jax_functions_that_cannot_be_checked(jax):
    for function, found in (
        (lambda x: float(x.sum()), "float"),
        (jax.numpy.argmax, "int32"),
        (jax.numpy.fft.fft, "complex64"),
    ):
        with pytest.raises(TypeError, match=f"output, got {found}"):
            check_jax(function, normal(3).numpy())
    with pytest.raises(TypeError, match="expected x of real numbers, got complex"):
        check_jax(lambda x: abs(x), np.ones(3) + 1j)
    with pytest.raises(ValueError, match="at least one input"):
        check_jax(lambda x: x, 3)
