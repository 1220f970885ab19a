"""Homework in the styles that people write it in, without an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npbn.verify import examine_file
from npbn.verify.examination import ASKED, CONVENTION, UNLOADED
from npbn.verify.grading import defined, guess, guessed
from npbn.verify.isolated.loading import notebook_source

HOMEWORK = Path(__file__).parent / "homework"
BOOK = HOMEWORK / "textbook" / "common" / "layers.py"
TORCH = HOMEWORK / "mytorch" / "mytorch" / "nn" / "modules.py"
NOTEBOOK = HOMEWORK / "channels_last.ipynb"

CASES = [
    (BOOK, "Relu", "relu", "right", ()),
    (BOOK, "Sigmoid", "sigmoid", "right", ()),
    (BOOK, "Affine", "linear", "right", ()),
    (BOOK, "SoftmaxWithLoss", "softmax_cross_entropy", CONVENTION, ("log(p + 1e-07)",)),
    (BOOK, "BatchNormalization", "batch_norm", CONVENTION, ("eps is 1e-06 in the code",)),
    (BOOK, "Convolution", "conv2d", "right", ()),
    (BOOK, "Pooling", "max_pool2d", ASKED, ()),
    (TORCH, "Linear", "linear", "right", ()),
    (TORCH, "Sigmoid", "sigmoid", "right", ()),
    (TORCH, "ReLU", "relu", "right", ()),
    (TORCH, "CrossEntropyLoss", "softmax_cross_entropy", ASKED, ()),
    (TORCH, "BatchNorm1d", "batch_norm", CONVENTION, ("eps is 1e-08 in the code",)),
    (TORCH, "Conv2d_stride1", "conv2d", "right", ()),
    (TORCH, "Conv2d", "conv2d", "right", ()),
    (NOTEBOOK, "conv_forward,conv_backward", "conv2d", ASKED, ()),
    (NOTEBOOK, "pool_forward,pool_backward", "avg_pool2d", CONVENTION, ("channels last",)),
]


def name_of(case) -> str:
    return f"{case[0].stem}-{case[1]}"


def examined(path, names, operation, **options):
    forward, _, backward = names.partition(",")
    return examine_file(path, forward, backward or forward, operation, **{"seed": 3} | options)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_code_of_other_families_is_right_without_an_adapter(case):
    path, names, operation, verdict, conventions = case
    found = examined(path, names, operation)
    assert found.verdict == verdict, str(found)
    assert found.backward == "right"
    if conventions:
        assert found.conventions == conventions


MISTAKES = [
    (BOOK, "BatchNormalization", "batch_norm", "dmu / self.batch_size", "dmu"),
    (BOOK, "Affine", "linear", "np.sum(dout, axis=0)", "np.sum(dout, axis=0) / 2"),
    (BOOK, "SoftmaxWithLoss", "softmax_cross_entropy", "return dx / n", "return dx"),
    (BOOK, "Convolution", "conv2d", "self.col.T, dout", "self.col.T, 1.05 * dout"),
    (BOOK, "Pooling", "max_pool2d", "= dout.flatten()", "= 1"),
    (TORCH, "BatchNorm1d", "batch_norm", "dM / self.N", "dM"),
    (TORCH, "BatchNorm1d", "batch_norm", "dLdBZ * self.NZ, axis", "dLdBZ, axis"),
    (TORCH, "Linear", "linear", "dLdZ.T @ self.A", "1.01 * dLdZ.T @ self.A"),
    (TORCH, "Conv2d", "conv2d", "dLdZ.sum(axis=(0, 2, 3))", "dLdZ.mean(axis=(0, 2, 3))"),
    (NOTEBOOK, "conv_forward,conv_backward", "conv2d", "* dZ[i, h, w, c]", "* dZ[i, h, w, 0]"),
    (NOTEBOOK, "pool_forward,pool_backward", "avg_pool2d", "/ f**2", "/ f"),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: f"{name_of(case)}-{case[4]}")
def test_a_mistake_in_such_code_is_found(case, tmp_path):
    path, names, operation, old, new = case
    root = HOMEWORK if path == NOTEBOOK else path.parents[1]
    for file in root.rglob("*"):
        if file.is_file() and "cache" not in str(file):
            copy = tmp_path / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    copy = tmp_path / path.relative_to(root)
    text = copy.read_text(encoding="utf-8")
    assert old in text
    copy.write_text(text.replace(old, new), encoding="utf-8")
    found = examined(copy, names, operation)
    assert (found.verdict, found.backward) == ("wrong", "wrong"), str(found)
    assert found.forward == "right"


def test_names_are_guessed():
    for name, operation in {
        "batchnorm_forward": "batch_norm",
        "spatial_batchnorm_forward": "spatial_batch_norm",
        "spatial_groupnorm_forward": "group_norm",
        "layernorm_forward": "layer_norm",
        "BatchNorm1d": "batch_norm",
        "BatchNormalization": "batch_norm",
        "conv_forward_naive": "conv2d",
        "Conv2D": "conv2d",
        "max_pool_forward_naive": "max_pool2d",
        "MeanPool2d_stride1": "avg_pool2d",
        "affine_forward": "linear",
        "Dense": "linear",
        "FullyConnected": "linear",
        "SoftmaxWithLoss": "softmax_cross_entropy",
        "softmax_loss": "softmax_cross_entropy",
        "svm_loss": "svm_loss",
        "LeakyReLU": "leaky_relu",
        "affine_relu_forward": None,
        "linear_activation_forward": None,
        "ConvTranspose2d": None,
        "train": None,
        "softmax": None,
    }.items():
        assert guess(name) == operation, name
    tasks = {(task.operation, task.forward, task.backward) for task in guessed(defined(NOTEBOOK))}
    assert tasks == {
        ("conv2d", "conv_forward", "conv_backward"),
        ("max_pool2d", "pool_forward", "pool_backward"),
    }
    assert len(guessed(defined(BOOK))) == 7 and len(guessed(defined(TORCH))) == 7


SOURCES = {
    "Python 2": """
import numpy as np
from six.moves import xrange

def forward(x):
    print "forward", x.shape
    n = x.size / 1
    y = np.zeros(n)
    for i in xrange(n):
        y[i] = max(x.ravel()[i], 0)
    return y.reshape(x.shape), x

def backward(dy, x):
    try:
        return dy * (x > 0)
    except ValueError, error:
        raise ValueError, "no"
""",
    "a float as a size, as in Python 2": """
import numpy as np

def forward(x):
    n = x.size / 1
    y = np.zeros(n)
    for i in xrange(n):
        y[i] = max(x.ravel()[i], 0)
    return y.reshape(x.shape), x

def backward(dy, x):
    return dy * (x > 0)
""",
    "an array of one element as a number": """
import numpy as np

def forward(x):
    y = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        y[i] = np.maximum(x[i], np.zeros((1, 1)))
        y[i] = float(np.array([[y[i]]]))
    return y, x

def backward(dy, x):
    return dy * (x > 0)
""",
    "old NumPy": """
import numpy as np

def forward(x):
    return np.maximum(x, np.float(0)), x.astype(np.float)

def backward(dy, x):
    return dy * (x > 0).astype(np.int)
""",
    "a script": """
import numpy as np
import h5py
import matplotlib.pyplot as plt
from tensorflow.keras.datasets import mnist

name = input("your name? ")
plt.rcParams["figure.figsize"] = (3, 4)
(x_train, y_train), _ = mnist.load_data()

def forward(x):
    return np.maximum(x, 0), x

def backward(dy, x):
    return dy * (x > 0)

while True:
    pass
""",
    "Latin-1": "# caf\xe9\nimport numpy as np\n\ndef forward(x): return np.maximum(x, 0), x\n\n"
    "def backward(dy, x): return dy * (x > 0)\n",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_files_are_loaded_as_their_authors_had_them(kind, tmp_path):
    path = tmp_path / "homework.py"
    path.write_text(SOURCES[kind], encoding="latin-1" if kind == "Latin-1" else "utf-8")
    found = examined(path, "forward,backward", "relu", timeout=60)
    assert found.verdict == "right", str(found)


def test_old_code_is_wrong_by_its_results_as_old_code(tmp_path):
    """Not by those of the first try, which ended in errors; and it stays old in a new process."""
    path = tmp_path / "homework.py"
    source = SOURCES["a float as a size, as in Python 2"]
    path.write_text(source.replace("max(x.ravel()[i], 0)", "x.ravel()[i]"))
    found = examined(path, "forward,backward", "relu", timeout=60)
    assert (found.verdict, found.forward, found.backward) == ("wrong", "wrong", "wrong")
    assert not any("raised" in complaint for complaint in found.complaints), str(found)
    path.write_text("import os\n" + source.replace("return dy", "os._exit(3)\n    return dy"))
    found = examined(path, "forward,backward", "relu", timeout=60)
    assert "exit code 3" in str(found) and "raised" not in str(found)


def test_code_that_uses_what_is_not_installed_is_not_held_against_its_author(tmp_path):
    path = tmp_path / "homework.py"
    path.write_text(
        "import no_such_thing as t\ndef f(x): return t.relu(x), x\ndef b(dy, x): pass\n"
    )
    found = examined(path, "f,b", "relu")
    assert found.verdict == UNLOADED
    assert found.complaints == ("it needs no_such_thing, which is not installed",)


def test_relative_imports_and_packages_above(tmp_path):
    package = tmp_path / "project" / "layers"
    package.mkdir(parents=True)
    (package / "masks.py").write_text("from ..utils import zero\ndef mask(x): return x > zero\n")
    (tmp_path / "project" / "utils.py").write_text("zero = 0\n")
    path = package / "relu.py"
    path.write_text(
        "import numpy as np\nfrom .masks import mask\nfrom ..utils import zero\n"
        "def f(x): return np.maximum(x, zero), x\ndef b(dy, x): return dy * mask(x)\n"
    )
    assert examined(path, "f,b", "relu").verdict == "right"


LAYERS = {
    "parameters made by the first forward pass": (
        "linear",
        """
class Dense:
    def __init__(self, units, name=None):
        self.units, self.params, self.grads = units, {}, {}
    def forward(self, X):
        if "W" not in self.params:
            self.params["W"] = np.zeros((X.shape[1], self.units))
            self.params["b"] = np.zeros(self.units)
        self.X = X
        return X @ self.params["W"] + self.params["b"]
    def backward(self, dZ):
        self.grads["dW"], self.grads["db"] = self.X.T @ dZ, dZ.sum(0)
        return dZ @ self.params["W"].T
""",
        "dZ.sum(0)",
    ),
    "parameters made by build": (
        "linear",
        """
class Dense:
    def __init__(self, units, optimizer):
        self.units = units
    def build(self, input_shape):
        self.w, self.b = np.zeros((input_shape[0], self.units)), np.zeros((1, self.units))
    def forward(self, x):
        self.x = x
        return x @ self.w + self.b
    def backward(self, grad):
        self.dw, self.db = self.x.T @ grad, grad.sum(0)
        return grad @ self.w.T
""",
        "",  # The optimizer is unknown, so that wrong numbers prove nothing.
    ),
    "parameters that are objects": (
        "linear",
        """
class Tensor:
    def __init__(self, data): self.data, self.grad = data, None
class Linear:
    def __init__(self, num_in, num_out):
        w, b = Tensor(np.zeros((num_in, num_out))), Tensor(np.zeros(num_out))
        self.params, self.device = {"w": w, "b": b}, np
    def forward(self, inputs):
        self.inputs = inputs
        return inputs @ self.params["w"].data + self.params["b"].data
    def backward(self, grad):
        self.params["w"].grad = self.inputs.T @ grad
        self.params["b"].grad = grad.sum(axis=0)
        return grad @ self.params["w"].data.T
""",
        "grad.sum(axis=0)",
    ),
    "the shape of an example": (
        "relu",
        """
class Relu:
    def __init__(self, in_shape):
        self.mask = np.zeros((1, *in_shape), bool)
    def forward(self, x):
        self.mask = x > self.mask
        return x * self.mask
    def backward(self, dy):
        return dy * self.mask
""",
        "dy * self.mask",
    ),
    "the shape of a batch": (
        "relu",
        """
class Relu:
    def __init__(self, shape):
        n, *rest = shape
        self.x = np.zeros((n, *rest))
        self.x[...] = np.zeros((5, 4)) if n == 5 else self.x
    def forward(self, x):
        self.x[:] = x
        return np.maximum(x, 0)
    def backward(self, eta, y):
        return eta * (y > 0)
""",
        "eta * (y > 0)",
    ),
    "a pair for the window, a number for the stride": (
        "avg_pool2d",
        """
class Pool:
    def __init__(self, pool_size=(2, 2), stride=2):
        self.size, self.s = pool_size, stride
    def forward(self, x):
        (h, w), s = self.size, self.s
        rows, columns = range((x.shape[2] - h) // s + 1), range((x.shape[3] - w) // s + 1)
        self.places = [(i * s, j * s) for i in rows for j in columns]
        self.shape = x.shape
        y = [x[:, :, i:i + h, j:j + w].mean((2, 3)) for i, j in self.places]
        return np.stack(y, -1).reshape(*x.shape[:2], len(rows), len(columns))
    def backward(self, dy):
        dx, (h, w) = np.zeros(self.shape), self.size
        for k, (i, j) in enumerate(self.places):
            part = dy.reshape(*dy.shape[:2], -1)[:, :, k]
            dx[:, :, i:i + h, j:j + w] += part[:, :, None, None] / (h * w)
        return dx
""",
        "part[:, :, None, None]",
    ),
    "parameters and gradients in lists": (
        "linear",
        """
class Affine:
    def __init__(self, W, b):
        self.params, self.grads = [W, b], [np.zeros_like(W), np.zeros_like(b)]
    def forward(self, x):
        self.x = x
        return x @ self.params[0] + self.params[1]
    def backward(self, dout):
        self.grads[0][...] = self.x.T @ dout
        self.grads[1][...] = dout.sum(0)
        return dout @ self.params[0].T
""",
        "dout.sum(0)",
    ),
    "lists that the constructor makes, gradients by name": (
        "linear",
        """
class Affine:
    def __init__(self, n_in, n_out):
        self.params, self.grads = [np.zeros((n_in, n_out)), np.zeros(n_out)], {}
    def forward(self, x):
        self.x = x
        return x @ self.params[0] + self.params[1]
    def gradient(self, dout):
        self.grads = {"W": self.x.T @ dout, "b": dout.sum(0)}
        return dout @ self.params[0].T
    def backward(self, lr):
        self.params[0] -= lr * self.grads["W"]
""",
        "dout.sum(0)",
    ),
    "outputs and gradients in attributes": (
        "linear",
        """
class Layer_Dense:
    def __init__(self, n_inputs, n_neurons):
        self.weights, self.biases = np.zeros((n_inputs, n_neurons)), np.zeros((1, n_neurons))
    def forward(self, inputs):
        self.inputs = inputs
        self.output = inputs @ self.weights + self.biases
    def backward(self, dvalues):
        self.dweights = self.inputs.T @ dvalues
        self.dbiases = dvalues.sum(axis=0, keepdims=True)
        self.dinputs = dvalues @ self.weights.T
""",
        "dvalues.sum(axis=0, keepdims=True)",
    ),
    "two inputs": (
        "rnn_step",
        """
class RNN:
    def __init__(self, Wx, Wh, b):
        self.params = [Wx, Wh, b]
        self.grads = [np.zeros_like(p) for p in self.params]
    def forward(self, x, h_prev):
        self.x, self.h_prev = x, h_prev
        self.h_next = np.tanh(x @ self.params[0] + h_prev @ self.params[1] + self.params[2])
        return self.h_next
    def backward(self, dh_next):
        dt = dh_next * (1 - self.h_next ** 2)
        self.grads[0][...], self.grads[1][...] = self.x.T @ dt, self.h_prev.T @ dt
        self.grads[2][...] = dt.sum(0)
        return dt @ self.params[0].T, dt @ self.params[1].T
""",
        "dt.sum(0)",
    ),
    "channels last, pairs, and the weight (kH, kW, C, F)": (
        "conv2d",
        """
class Conv2D:
    def __init__(self, in_channels, out_channels, k_size=(3, 3), stride=(1, 1)):
        self.k, self.s = (k_size[0], k_size[1]), (stride[0], stride[1])
        self.w, self.b = np.zeros((*self.k, in_channels, out_channels)), np.zeros(out_channels)
        self.dw, self.db = np.zeros_like(self.w), np.zeros_like(self.b)
    def places(self, x):
        (kh, kw), (sh, sw) = self.k, self.s
        self.h, self.v = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
        for i in range(self.h):
            for j in range(self.v):
                yield i, j, slice(i * sh, i * sh + kh), slice(j * sw, j * sw + kw)
    def forward(self, x):
        self.x, y = x, []
        for i, j, rows, columns in self.places(x):
            y.append(np.tensordot(x[:, rows, columns], self.w, 3) + self.b)
        return np.stack(y, 1).reshape(len(x), self.h, self.v, -1)
    def backward(self, dy):
        dx, self.dw = np.zeros_like(self.x), np.zeros_like(self.w)
        for i, j, rows, columns in self.places(self.x):
            self.dw += np.tensordot(self.x[:, rows, columns], dy[:, i, j], (0, 0))
            dx[:, rows, columns] += np.tensordot(dy[:, i, j], self.w, (1, 3))
        self.db = dy.sum((0, 1, 2))
        return dx
""",
        "dy.sum((0, 1, 2))",
    ),
    "a loss of probabilities": (
        "softmax_cross_entropy",
        """
class CrossEntropyLoss:
    def forward(self, p, y):
        self.p, self.y = p, y
        return -np.log(p[np.arange(len(p)), y])
    def backward(self):
        d = self.p.copy()
        d[np.arange(len(d)), self.y] -= 1
        return d / len(d)
""",
        "",
    ),
    "Python 2 in a class": (
        "relu",
        """
import cupy as cp
class Relu:
    def forward(self, x):
        self.options = {"zero": 0 / 1}
        for name, value in self.options.iteritems():
            setattr(self, name, value)
        self.x = x.reshape(x.size / 1)
        self.half = np.floor(x.size * 0.5)
        parts = self.x[:self.half], self.x[self.half:]
        assert self.x[self.half] == parts[1][0]
        return cp.asnumpy(cp.maximum(np.concatenate(parts), self.zero)).reshape(x.shape)
    def backward(self, dy):
        return dy * (self.x > 0).reshape(dy.shape)
""",
        "dy * (self.x > 0)",
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_made_as_their_authors_would(kind, tmp_path):
    operation, source, gradient = LAYERS[kind]
    name = [line for line in source.splitlines() if line.startswith("class")][-1][6:-1]
    path = tmp_path / "homework.py"
    path.write_text("import numpy as np\n" + source)
    found = examined(path, name, operation, timeout=60)
    assert found.verdict in ("right", ASKED, CONVENTION) and found.backward == "right", str(found)
    if operation == "softmax_cross_entropy":
        path.write_text(path.read_text().replace("] -= 1", "] -= 2"))
        found = examined(path, name, operation, timeout=60)
        assert found.verdict == "can't tell" and "by the probabilities" in str(found)
    elif gradient:
        path.write_text(path.read_text().replace(gradient, f"1.1 * {gradient}"))
        assert examined(path, name, operation, timeout=60).verdict == "wrong"
    else:
        path.write_text(path.read_text().replace("grad.sum(0)", "grad.sum(0) * 2"))
        found = examined(path, name, operation, timeout=60)
        assert found.verdict == "can't tell" and "it got None for optimizer" in str(found)


@pytest.mark.parametrize("command", ["", "%matplotlib inline\n", "np.maximum?\n", "!ls\n"])
def test_lines_of_a_notebook_that_only_look_like_commands(command):
    """A comment may end with "?", and an expression may go on after "%" in the next line."""
    cell = (
        "import numpy as np\n" + command + "def relu_forward(x):\n    # why?\n"
        "    text = ('%d values'\n        % (x.size,))\n    return np.maximum(x, 0), x\n"
    )
    source = {"cells": [{"cell_type": "code", "source": [cell]}]}
    found = notebook_source(json.dumps(source).encode())
    assert "# why?" in found and "% (x.size,))" in found
    assert "matplotlib" not in found and "?\ndef" not in found and "!ls" not in found


def test_a_damaged_notebook(tmp_path):
    path = tmp_path / "homework.ipynb"
    path.write_text("{}")
    found = examined(path, "f,b", "relu")
    assert found.verdict == UNLOADED and "damaged notebook" in found.complaints[0]
    cells = ["%matplotlib inline\n!pip install x\nimport numpy as np", "%%bash\nls", "def f(x:"]
    cells += ["def f(x):\n    return np.maximum(x, 0), x\ndef b(dy, x):\n    return dy * (x > 0)"]
    cells = [{"cell_type": "code", "source": cell} for cell in cells]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "# a"}, *cells]}))
    assert examined(path, "f,b", "relu").verdict == "right"


def test_what_a_part_of_the_probes_needs_is_not_held_against_its_author(tmp_path):
    path = tmp_path / "homework.py"
    path.write_text(
        "import numpy as np\nimport no_such_thing as t\n"
        "def f(x): return (np.maximum if len(x) > 4 else t.relu)(x, 0), x\n"
        "def b(dy, x): return dy * (x > 0)\n"
    )
    found = examined(path, "f,b", "relu")
    assert found.verdict == UNLOADED, str(found)


def test_a_layer_for_single_examples_cannot_be_judged(tmp_path):
    """Neither right nor wrong is proved: it may be right for what its author gives it."""
    path = tmp_path / "homework.py"
    path.write_text(
        "import numpy as np\nclass Relu:\n    def forward(self, x):\n"
        "        self.x = x[0]\n        return np.maximum(x[0], 0)\n"
        "    def backward(self, dy):\n        return dy * (self.x > 0)\n"
    )
    found = examined(path, "Relu", "relu")
    assert found.verdict == "can't tell" and "it may expect one example" in str(found)
