"""Somebody else's code, handed over as a file that knows nothing of npbn."""

from __future__ import annotations

import pytest

from npbn.verify import examine_file
from npbn.verify.mutants import BATCH_NORM, CONV2D, operation_source, source_of

COURSE = """
import numpy as np

def batchnorm_forward(x, gamma, beta, bn_param):
    if x.ndim == 4:
        n, c, h, w = x.shape
        out, cache = batchnorm_forward(
            x.transpose(0, 2, 3, 1).reshape(-1, c), gamma, beta, bn_param)
        return out.reshape(n, h, w, c).transpose(0, 3, 1, 2), (cache, x.shape)
    eps, momentum = bn_param["eps"], bn_param["momentum"]
    if bn_param["mode"] == "train":
        mean, var = x.mean(axis=0), x.var(axis=0)
        for name, new in (("running_mean", mean), ("running_var", var)):
            bn_param[name] = momentum * bn_param[name] + (1 - momentum) * new
    else:
        mean, var = bn_param["running_mean"], bn_param["running_var"]
    x_hat = (x - mean) / np.sqrt(var + eps)
    return gamma * x_hat + beta, (x_hat, gamma, var, eps, bn_param["mode"])

def batchnorm_backward(dout, cache):
    if dout.ndim == 4:
        cache, (n, c, h, w) = cache
        dx, dgamma, dbeta = batchnorm_backward(dout.transpose(0, 2, 3, 1).reshape(-1, c), cache)
        return dx.reshape(n, h, w, c).transpose(0, 3, 1, 2), dgamma, dbeta
    x_hat, gamma, var, eps, mode = cache
    dbeta, dgamma = dout.sum(axis=0), (dout * x_hat).sum(axis=0)
    scale = gamma / np.sqrt(var + eps)
    if mode == "test":
        return dout * scale, dgamma, dbeta
    m = len(dout)
    return scale * (dout - dbeta / m - x_hat * dgamma / m), dgamma, dbeta
"""

LOOPS = '''
import numpy as np

def values(x):
    """(index, feature) of every element."""
    return [(i, i[1]) for i in np.ndindex(x.shape)]

def forward(x, gamma, beta, moving_mean, moving_var, training, eps, momentum):
    gammas, betas = gamma.ravel(), beta.ravel()
    mean, var = moving_mean.flatten(), moving_var.flatten()
    if training:
        m = x.size / len(gammas)
        mean, var = np.zeros(len(gammas)), np.zeros(len(gammas))
        for i, j in values(x):
            mean[j] += x[i] / m
        for i, j in values(x):
            var[j] += (x[i] - mean[j]) ** 2 / m
        moving_mean = momentum * moving_mean + (1 - momentum) * mean.reshape(gamma.shape)
        moving_var = momentum * moving_var + (1 - momentum) * var.reshape(gamma.shape)
    s = (var + eps) ** 0.5
    y, x_hat = np.zeros(x.shape), np.zeros(x.shape)
    for i, j in values(x):
        x_hat[i] = (x[i] - mean[j]) / s[j]
        y[i] = gammas[j] * x_hat[i] + betas[j]
    return y, (x_hat, s, gamma, training), (moving_mean, moving_var)

def backward(dy, cache):
    x_hat, s, gamma, training = cache
    gammas, m = gamma.ravel(), dy.size / gamma.size
    dx, dgamma, dbeta = np.zeros(dy.shape), np.zeros(len(gammas)), np.zeros(len(gammas))
    for i, j in values(dy):
        dbeta[j] += dy[i]
        dgamma[j] += dy[i] * x_hat[i]
        for k, l in values(dy):  # the whole Jacobian, element by element
            if j == l:
                slope = float(i == k)
                if training:
                    slope -= 1 / m + x_hat[i] * x_hat[k] / m
                dx[i] += dy[k] * gammas[j] * slope / s[j]
    return dx, dgamma.reshape(gamma.shape), dbeta.reshape(gamma.shape)
'''


def examined(tmp_path, source, names, operation="batch_norm", **options):
    path = tmp_path / "homework.py"
    path.write_text(source)
    return examine_file(path, *names, operation, **options)


def test_right_in_three_styles(tmp_path):
    """Closed form as course homework, node by node, and loops over the Jacobian."""
    names = ("batchnorm_forward", "batchnorm_backward")
    result = examined(tmp_path, COURSE, names)
    assert result.verdict == "right", str(result)
    plain = operation_source("batch_norm")
    result = examined(tmp_path, plain, ("batch_norm", "batch_norm_backward"))
    assert result.verdict == "right", str(result)
    result = examined(tmp_path, LOOPS, ("forward", "backward"))
    assert result.verdict == "right", str(result)


def test_what_it_cannot_do_is_said(tmp_path):
    vectors_only = LOOPS.replace(
        "    gammas, betas =", "    if x.ndim == 4: raise SystemExit\n    gammas, betas ="
    )
    result = examined(tmp_path, vectors_only, ("forward", "backward"))
    assert "it raised SystemExit (training, (N, C, H, W))" in str(result)
    assert len(result.complaints) == 1


@pytest.mark.parametrize("entry", BATCH_NORM + CONV2D, ids=lambda entry: entry.name)
def test_a_mistake_in_a_file_is_named(entry, tmp_path):
    """The whole catalogue of batch norm and convolution, each as a file of plain NumPy."""
    names = (entry.operation, f"{entry.operation}_backward")
    result = examined(tmp_path, entry.source, names, entry.operation)
    assert result.verdict == "wrong"
    assert (entry,) in result.mistakes
    assert entry.explanation in str(result)


COMBINATIONS = [
    (BATCH_NORM, "without the mean path", "dbeta a mean"),
    (BATCH_NORM, "without the variance path", "momentum reversed"),
    (BATCH_NORM, "gamma forgotten in dx", "dgamma a mean"),
    (BATCH_NORM, "n - 1 for n", "dgamma without x_hat"),
    (BATCH_NORM, "eps outside of the root", "dx not divided by s"),
    (BATCH_NORM, "variance path half as large", "moving variance unbiased"),
    (CONV2D, "kernel flipped in dx", "dbias a mean"),
    (CONV2D, "stride ignored in dx", "dweight a mean"),
    (CONV2D, "padding forgotten in dx", "bias forgotten"),
    (CONV2D, "overlaps overwritten in dx", "dbias over the batch only"),
]


@pytest.mark.parametrize(("catalogue", "one", "other"), COMBINATIONS)
def test_of_two_mistakes_in_a_file_at_least_one_is_named(catalogue, one, other, tmp_path):
    pair = [entry for entry in catalogue if entry.name in (one, other)]
    operation = pair[0].operation
    names = (operation, f"{operation}_backward")
    result = examined(tmp_path, source_of(pair), names, operation)
    assert result.verdict == "wrong"
    named = {entry.name for combination in result.mistakes for entry in combination}
    assert named & {one, other}, str(result)


def test_two_mistakes_that_no_pair_of_the_catalogue_equals(tmp_path):
    """Wrong in training alone: each output is explained by itself."""
    source = COURSE.replace(
        "return scale * (dout - dbeta / m - x_hat * dgamma / m), dgamma, dbeta",
        "return scale * (dout - x_hat * dgamma / m), dgamma, dbeta / m",
    )
    result = examined(tmp_path, source, ("batchnorm_forward", "batchnorm_backward"))
    named = {entry.name for combination in result.mistakes for entry in combination}
    assert named == {"without the mean path", "dbeta a mean"}


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("while True: pass", "was not done after 3 seconds"),
        ("import os; os.abort()", "ended its process with exit code"),
        ("return dy.no_such_thing", "raised AttributeError"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("return dy, dy", "expected 3 gradients (dx, dgamma, dbeta)"),
        ("return dy.T, dy, dy", "dx has the shape"),
        ("return dy * float('nan'), dy, dy", "is nan, expected"),
        ("return 'a', 'b', 'c'", "returned no numbers for"),
        ("print('noise'); return None", "expected 3 gradients"),
    ],
)
def test_what_goes_wrong_is_a_finding(body, finding, tmp_path):
    plain = operation_source("batch_norm").split("def batch_norm_backward", 1)[0]
    source = f"{plain}def batch_norm_backward(dy, cache):\n    {body}\n"
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"), timeout=3)
    assert result.verdict == "wrong"
    assert finding in str(result)


def test_what_cannot_be_loaded_is_a_finding(tmp_path):
    result = examined(tmp_path, "def broken(:", ("a", "b"))
    assert result.verdict == "wrong" and "cannot be loaded: SyntaxError" in str(result)
    result = examined(tmp_path, "x = 1", ("a", "b"))
    assert "cannot be loaded: AttributeError" in str(result)


def test_float32_is_undecided(tmp_path):
    source = operation_source("batch_norm").replace(
        "x_hat = (x - mean) / s", "x_hat = ((x - mean) / s).astype(np.float32)"
    )
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"))
    assert result.verdict == "undecided"
    assert "can't tell" in str(result) and "float32" in str(result)


def test_an_adapter_for_a_signature_of_your_own(tmp_path):
    (tmp_path / "adapter.py").write_text(
        "def adapt(forward, backward):\n"
        "    return lambda x: forward(x, None), lambda dy, cache: backward(cache, dy)\n"
    )
    source = (
        "import numpy as np\n"
        "def mine(x, nothing): return np.maximum(x, 0), x\n"
        "def mine_backward(x, dy): return dy * (x > 0)\n"
    )
    adapter = f"{tmp_path / 'adapter.py'}:adapt"
    result = examined(tmp_path, source, ("mine", "mine_backward"), "relu", adapter=adapter)
    assert result.verdict == "right", str(result)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        examine_file(tmp_path / "no.py", "a", "b", "relu")


COURSE_OTHERS = """
def conv_forward(x, w, b, conv_param):
    pair = (conv_param["stride"],) * 2, (conv_param["pad"],) * 2
    return conv2d(x, w, b, *pair)

conv_backward = conv2d_backward

def max_pool_forward(x, pool_param):
    size = (pool_param["pool_height"], pool_param["pool_width"])
    return max_pool2d(x, size, (pool_param["stride"],) * 2)

max_pool_backward = max_pool2d_backward

def affine_forward(x, w, b):
    return x @ w + b, (x, w)

def affine_backward(dout, cache):
    x, w = cache
    return dout @ w.T, x.T @ dout, dout.sum(axis=0)

def relu_forward(x):
    return np.maximum(x, 0), x

def softmax_loss(x, y):
    loss, cache = softmax_cross_entropy(x, y)
    return loss, softmax_cross_entropy_backward(cache)
"""


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        ("conv2d", ("conv_forward", "conv_backward")),
        ("max_pool2d", ("max_pool_forward", "max_pool_backward")),
        ("linear", ("affine_forward", "affine_backward")),
        ("relu", ("relu_forward", "relu_backward")),
        ("softmax_cross_entropy", ("softmax_loss", "softmax_loss")),
    ],
)
def test_course_signatures(operation, names, tmp_path):
    source = operation_source(operation) + COURSE_OTHERS
    if operation != "conv2d":
        source = source.replace("conv_backward = conv2d_backward", "")
    if operation != "max_pool2d":
        source = source.replace("max_pool_backward = max_pool2d_backward", "")
    result = examined(tmp_path, source, names, operation)
    assert result.verdict == "right", str(result)
