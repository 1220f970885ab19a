"""Define the layers, which hold the state around the operations of `npbn.functional`.

The state of a layer is its parameters, its moving statistics, its mode (training or prediction) and
the cache of its last forward pass. The mathematics is in `npbn.functional`.

Layers start on the host in float32, with NumPy; `Layer.to` moves them to another backend or dtype.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import array_api_compat
import numpy as np

from npbn import functional as F
from npbn.backend import Backend, to_numpy
from npbn.functional.arrays import Array, real_part
from npbn.functional.windows import check_pooling_padding, pair

if TYPE_CHECKING:
    from npbn.distributed import Group


class Buffer:
    """An array of a layer's state that is not trained, such as a moving average.

    Attributes:
        name: the role of the array in the layer: "moving_mean" or "moving_var".
        data: the array.
    """

    def __init__(self, name: str, data: Array) -> None:
        self.name = name
        self.data = data

    def __repr__(self) -> str:
        shape = tuple(self.data.shape)
        return f"{type(self).__name__}({self.name!r}, shape={shape}, {self.data.dtype})"


class Parameter(Buffer):
    """An array of a layer's state that is trained, with its gradient.

    Attributes:
        name: the role of the array in the layer: "weight", "bias", "gamma" or "beta".
        data: the array.
        gradient: the gradient of the loss with respect to the array. Each backward pass replaces
            it. It is None before the first backward pass.
    """

    def __init__(self, name: str, data: Array) -> None:
        super().__init__(name, data)
        self.gradient: Array | None = None


class Layer(ABC):
    """The base class of all layers.

    To write a layer of your own, define ``forward`` and ``backward``. If the layer has its own
    ``__init__``, it must call ``super().__init__()`` first. Parameters, buffers and layers in
    attributes of the layer belong to its state, under the names of the attributes. An attribute may
    also be a list, a tuple or a dict of them: the name of the first layer in a list ``blocks`` is
    ``blocks.0``.
    """

    def __init__(self) -> None:
        self.training = True
        self._cache: Any = None  # the cache of the last forward pass

    @abstractmethod
    def forward(self, x: Array) -> Array:
        """Return the output of the layer for the batch x."""

    @abstractmethod
    def backward(self, dy: Array) -> Array:
        """Return the gradient with respect to x, and set the gradients of the parameters.

        Args:
            dy: the gradient of the loss with respect to the output of the last forward pass.
        """

    def children(self) -> dict[str, Layer]:
        """Return the layers inside this layer by name."""
        return dict(_members("", vars(self), Layer))

    def parameters(self) -> dict[str, Parameter]:
        """Return the parameters by name. The names are those of `state`."""
        return {n: array for n, array in self.state().items() if isinstance(array, Parameter)}

    def state(self) -> dict[str, Buffer]:
        """Return the parameters and buffers by name.

        The name of an array in a child is the child's name, a dot, and the array's name there.

        Raises:
            ValueError: an array belongs to two layers. A backward pass would keep the gradient of
                only one of them.
        """
        found = dict(_members("", vars(self), Buffer))
        for prefix, child in self.children().items():
            found |= {f"{prefix}.{name}": array for name, array in child.state().items()}
        names: dict[int, str] = {}
        for name, array in found.items():
            other = names.setdefault(id(array), name)
            if other != name:
                raise ValueError(f"expected an array of its own as {name}, got that of {other}")
        return found

    def train(self) -> None:
        """Switch to training mode, in which batch norm uses the statistics of the batch."""
        self.training = True
        for child in self.children().values():
            child.train()

    def eval(self) -> None:
        """Switch to prediction mode, in which batch norm uses its moving statistics."""
        self.training = False
        for child in self.children().values():
            child.eval()

    def to(self, backend: Backend, dtype: Any = None) -> None:
        """Move parameters and statistics to ``backend``.

        Args:
            backend: a backend from `npbn.backend.get_backend`.
            dtype: float32 or float64. By default, the dtype stays.
        """
        if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
            raise ValueError(f"expected dtype float32 or float64, got {dtype}")
        for array in self.state().values():
            array.data = backend.asarray(to_numpy(array.data), dtype)
        for parameter in self.parameters().values():
            parameter.gradient = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of the parameters and moving statistics on the host, by name."""
        return {name: to_numpy(array.data) for name, array in self.state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of ``state`` to this layer, which keeps its dtype and backend.

        Raises:
            ValueError: a name is missing or unexpected, or a shape differs. In this case, nothing
                is changed.
            TypeError: a value is complex. In this case, nothing is changed.
        """
        own = self.state()
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or unexpected:
            raise ValueError(
                f"expected a state with the names of this model; missing: "
                f"{', '.join(sorted(missing)) or 'none'}; unexpected: "
                f"{', '.join(sorted(unexpected)) or 'none'}"
            )
        values = {name: to_numpy(value) for name, value in state.items()}
        for name, array in own.items():
            expected = tuple(array.data.shape)
            if values[name].shape != expected:
                raise ValueError(f"expected {name} of shape {expected}, got {values[name].shape}")
            if np.iscomplexobj(values[name]):
                raise TypeError(f"expected {name} of real numbers, got {values[name].dtype}")
        for name, array in own.items():
            xp = array_api_compat.array_namespace(array.data)
            device = array_api_compat.device(array.data)
            array.data[...] = xp.asarray(values[name], dtype=array.data.dtype, device=device)

    def _last_cache(self) -> Any:
        if self._cache is None:
            raise RuntimeError(f"{self!r}: backward needs a forward pass before it")
        return self._cache

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Sequential(Layer):
    """Layers that run one after another. The name of layer i is the text of the number i."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"expected layers, got {type(layer).__name__}")
        self.layers = layers
        all_of_them = list(self_and_descendants(self))
        if len({id(layer) for layer in all_of_them}) < len(all_of_them):
            raise ValueError("expected every layer once: its cache holds one batch only")

    def forward(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def children(self) -> dict[str, Layer]:
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def __repr__(self) -> str:
        lines = [f"({i}) {layer!r}" for i, layer in enumerate(self.layers)]
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)"


class Conv2d(Layer):
    """A convolution (`npbn.functional.conv2d`) with its weight and bias.

    The initial weight is Xavier-uniform: uniform between ±√(6 / (fan_in + fan_out)), where fan_in =
    in_channels·kH·kW and fan_out = out_channels·kH·kW (Glorot and Bengio, AISTATS 2010, section
    4.2). The initial bias is uniform between ±1/√fan_in.

    Args:
        in_channels, out_channels: the number of channels of x, and of y.
        kernel_size, stride, padding: sizes in pixels, each an int or (vertical, horizontal).
        bias: whether there is a bias. It has no effect if batch norm follows.
        generator: the generator of the initial values. By default, this is a new generator.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        generator: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size = pair("kernel_size", kernel_size, minimum=1)
        self.stride = pair("stride", stride, minimum=1)
        self.padding = pair("padding", padding, minimum=0)
        shape = (_positive("out_channels", out_channels), _positive("in_channels", in_channels))
        self.weight, self.bias = _initial_weight_and_bias(
            (*shape, *self.kernel_size), bias, generator
        )

    def forward(self, x: Array) -> Array:
        bias = None if self.bias is None else self.bias.data
        y, self._cache = F.conv2d(
            x, self.weight.data, bias, stride=self.stride, padding=self.padding
        )
        return y

    def backward(self, dy: Array) -> Array:
        dx, self.weight.gradient, dbias = F.conv2d_backward(dy, self._last_cache())
        if self.bias is not None:
            self.bias.gradient = dbias
        return dx

    def __repr__(self) -> str:
        out_channels, in_channels, _, _ = self.weight.data.shape
        options = {"stride": (self.stride, (1, 1)), "padding": (self.padding, (0, 0))}
        text = "".join(
            f", {name}={_short(value)}"
            for name, (value, default) in options.items()
            if value != default
        )
        text += "" if self.bias is not None else ", bias=False"
        return f"Conv2d({in_channels}, {out_channels}, {_short(self.kernel_size)}{text})"


class Linear(Layer):
    """A linear layer (`npbn.functional.linear`) with its weight and bias.

    The initial values have the distributions of `Conv2d`, with fan_in = in_features and fan_out =
    out_features.

    Args:
        in_features, out_features: the number of features of x, and of y.
        bias: whether there is a bias. It has no effect if batch norm follows.
        generator: the generator of the initial values. By default, this is a new generator.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        generator: np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (_positive("out_features", out_features), _positive("in_features", in_features))
        self.weight, self.bias = _initial_weight_and_bias(shape, bias, generator)

    def forward(self, x: Array) -> Array:
        bias = None if self.bias is None else self.bias.data
        y, self._cache = F.linear(x, self.weight.data, bias)
        return y

    def backward(self, dy: Array) -> Array:
        dx, self.weight.gradient, dbias = F.linear_backward(dy, self._last_cache())
        if self.bias is not None:
            self.bias.gradient = dbias
        return dx

    def __repr__(self) -> str:
        out_features, in_features = self.weight.data.shape
        text = "" if self.bias is not None else ", bias=False"
        return f"Linear({in_features}, {out_features}{text})"


class BatchNorm(Layer):
    """Batch normalization (`npbn.functional.batch_norm`) with γ, β and the moving statistics.

    The initial values are 1 for γ, and 0 for β and for the moving mean.

    Args:
        num_features: D for an input (N, D), or C for an input (N, C, H, W).
        num_dims: 2 for an input (N, D), or 4 for an input (N, C, H, W).
        eps: the number that is added to the variance, in the units of x².
        momentum: the fraction of the moving statistics that is *kept* at each step. (PyTorch's
            momentum is the fraction that is new.)
        initial_moving_var: the initial moving variance. With 0, a prediction before the first
            training step would multiply by 1/√eps.

    Attributes:
        group: the ranks that have the shards of a batch (`npbn.distributed.Group`), while they
            train together; otherwise None.
    """

    def __init__(
        self,
        num_features: int,
        num_dims: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.9,
        initial_moving_var: float = 1.0,
    ) -> None:
        super().__init__()
        if num_dims not in (2, 4):
            raise ValueError(
                f"expected num_dims 2 for (N, D) or 4 for (N, C, H, W), got {num_dims}"
            )
        if not eps > 0:
            raise ValueError(f"expected eps > 0, got {eps}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected momentum between 0 and 1, got {momentum}")
        if not initial_moving_var >= 0:
            raise ValueError(f"expected initial_moving_var >= 0, got {initial_moving_var}")
        shape = (1, _positive("num_features", num_features)) + (1,) * (num_dims - 2)
        self.num_dims = num_dims
        self.eps = eps
        self.momentum = momentum
        self.initial_moving_var = initial_moving_var
        self.group: Group | None = None
        self.gamma = Parameter("gamma", np.ones(shape, np.float32))
        self.beta = Parameter("beta", np.zeros(shape, np.float32))
        self.moving_mean = Buffer("moving_mean", np.zeros(shape, np.float32))
        self.moving_var = Buffer("moving_var", np.full(shape, initial_moving_var, np.float32))

    def forward(self, x: Array) -> Array:
        if x.ndim != self.num_dims:
            raise ValueError(f"expected x of {self.num_dims} dimensions, got {tuple(x.shape)}")
        y, self._cache, moving = F.batch_norm(
            x,
            self.gamma.data,
            self.beta.data,
            self.moving_mean.data,
            self.moving_var.data,
            training=self.training,
            eps=self.eps,
            momentum=self.momentum,
            group=self.group,
        )
        # Drop the imaginary part of a complex step, which belongs to this forward pass only.
        xp = array_api_compat.array_namespace(x)
        self.moving_mean.data, self.moving_var.data = (real_part(m, xp) for m in moving)
        return y

    def backward(self, dy: Array) -> Array:
        dx, self.gamma.gradient, self.beta.gradient = F.batch_norm_backward(dy, self._last_cache())
        return dx

    def __repr__(self) -> str:
        options = {
            "eps": (self.eps, 1e-5),
            "momentum": (self.momentum, 0.9),
            "initial_moving_var": (self.initial_moving_var, 1.0),
        }
        text = "".join(
            f", {name}={value}" for name, (value, default) in options.items() if value != default
        )
        return f"BatchNorm({self.gamma.data.shape[1]}, {self.num_dims}{text})"


class AvgPool2d(Layer):
    """Average pooling, with the arguments of `npbn.functional.avg_pool2d`."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.kernel_size = pair("kernel_size", kernel_size, minimum=1)
        self.stride = self.kernel_size if stride is None else pair("stride", stride, minimum=1)
        self.padding = pair("padding", padding, minimum=0)
        check_pooling_padding(self.kernel_size, self.padding)

    def forward(self, x: Array) -> Array:
        y, self._cache = F.avg_pool2d(x, self.kernel_size, stride=self.stride, padding=self.padding)
        return y

    def backward(self, dy: Array) -> Array:
        return F.avg_pool2d_backward(dy, self._last_cache())

    def __repr__(self) -> str:
        stride = "" if self.stride == self.kernel_size else f", stride={_short(self.stride)}"
        padding = "" if self.padding == (0, 0) else f", padding={_short(self.padding)}"
        return f"{type(self).__name__}({_short(self.kernel_size)}{stride}{padding})"


class MaxPool2d(AvgPool2d):
    """Maximum pooling, with the arguments of `npbn.functional.max_pool2d`."""

    def forward(self, x: Array) -> Array:
        y, self._cache = F.max_pool2d(x, self.kernel_size, stride=self.stride, padding=self.padding)
        return y

    def backward(self, dy: Array) -> Array:
        return F.max_pool2d_backward(dy, self._last_cache())


class Activation(Layer):
    """The base class of operations on single elements.

    Attributes:
        operation: the forward and the backward function of `npbn.functional`.
    """

    operation: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

    def forward(self, x: Array) -> Array:
        y, self._cache = self.operation[0](x)
        return y

    def backward(self, dy: Array) -> Array:
        return self.operation[1](dy, self._last_cache())


class Sigmoid(Activation):
    """The sigmoid of each element (`npbn.functional.sigmoid`)."""

    operation = F.sigmoid, F.sigmoid_backward


class ReLU(Activation):
    """The rectified linear unit of each element (`npbn.functional.relu`)."""

    operation = F.relu, F.relu_backward


ACTIVATIONS: dict[str, type[Activation]] = {"sigmoid": Sigmoid, "relu": ReLU}
"""The activations by the names that commands use."""


class Flatten(Layer):
    """A layer that reshapes (N, C, H, W) to (N, C·H·W).

    The result is a view of the input if the memory order of the input allows a view.
    """

    def forward(self, x: Array) -> Array:
        self._cache = tuple(x.shape)
        return _reshape(x, (x.shape[0], math.prod(x.shape[1:])))

    def backward(self, dy: Array) -> Array:
        return _reshape(dy, self._last_cache())


@contextlib.contextmanager
def modes_kept(layer: Layer) -> Iterator[None]:
    """Run the code inside; afterwards, restore the mode (training or prediction) of every layer."""
    modes = [(each, each.training) for each in self_and_descendants(layer)]
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def self_and_descendants(layer: Layer) -> Iterator[Layer]:
    """Yield a layer and all layers inside it."""
    yield layer
    for child in layer.children().values():
        yield from self_and_descendants(child)


def dtype_of(layer: Layer) -> str:
    """Return the dtype of a layer's first array, "float32" or "float64".

    For a layer without arrays, this is "float32".
    """
    for array in layer.state().values():
        xp = array_api_compat.array_namespace(array.data)
        return "float64" if array.data.dtype == xp.float64 else "float32"
    return "float32"


def _members(prefix: str, value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the objects of a kind in a dict, a list or a tuple, at any depth, with their names."""
    items = enumerate(value) if isinstance(value, list | tuple) else value.items()
    for key, item in items:
        if isinstance(item, kind):
            yield f"{prefix}{key}", item
        elif isinstance(item, list | tuple | dict) and key != "_cache":
            yield from _members(f"{prefix}{key}.", item, kind)


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    return array_api_compat.array_namespace(x).reshape(x, shape)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")
    return value


def _short(value: tuple[int, int]) -> str:
    """Return a pair as text: one number if both numbers are equal, otherwise the pair."""
    return str(value[0] if value[0] == value[1] else value)


def _initial_weight_and_bias(
    shape: tuple[int, ...], bias: bool, generator: np.random.Generator | None
) -> tuple[Parameter, Parameter | None]:
    """Return the initial weight of this shape, (out, in, ...), and the initial bias or None.

    The distributions are those of `Conv2d`.
    """
    generator = np.random.default_rng() if generator is None else generator
    if not isinstance(generator, np.random.Generator):
        raise TypeError(f"expected generator as numpy.random.default_rng(seed), got {generator!r}")
    receptive_field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * receptive_field, shape[1] * receptive_field

    def uniform(bound: float, shape: tuple[int, ...]) -> np.ndarray:
        return generator.uniform(-bound, bound, shape).astype(np.float32)

    weight = Parameter("weight", uniform(math.sqrt(6 / (fan_in + fan_out)), shape))
    if not bias:
        return weight, None
    return weight, Parameter("bias", uniform(1 / math.sqrt(fan_in), shape[:1]))
