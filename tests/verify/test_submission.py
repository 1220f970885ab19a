"""Somebody else's code, handed over as a file that knows nothing of npbn."""

from __future__ import annotations

import itertools
import textwrap
import types

import pytest

from npbn.errors import SubmissionError
from npbn.verify import examine_file, submission
from npbn.verify.examination import ASKED, CONVENTION, UNDECIDED, UNLOADED, UNWRITTEN
from npbn.verify.isolated import calling
from npbn.verify.mutants import BATCH_NORM, CONV2D, operation_source, source_of
from npbn.verify.session import Session
from npbn.verify.submission import examine_in

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

HOMEWORK = """
import numpy as np

def batchnorm_forward(x, gamma, beta, bn_param):
    eps, momentum = bn_param["eps"], bn_param["momentum"]
    N, D = x.shape
    running_mean = bn_param.get("running_mean", np.zeros(D))
    running_var = bn_param.get("running_var", np.zeros(D))
    out, cache = None, None
    if bn_param["mode"] == "train":
        mu, var = x.mean(axis=0), x.var(axis=0)
        std = np.sqrt(var + eps)
        xhat = (x - mu) / std
        out = gamma * xhat + beta
        running_mean = momentum * running_mean + (1 - momentum) * mu
        running_var = momentum * running_var + (1 - momentum) * var
        cache = (x, xhat, gamma, mu, var, std, eps, running_mean)
    elif bn_param["mode"] == "test":
        out = gamma * (x - running_mean) / np.sqrt(running_var + eps) + beta
    bn_param["running_mean"], bn_param["running_var"] = running_mean, running_var
    return out, cache

def batchnorm_backward(dout, cache):
    x, xhat, gamma, mu, var, std, eps, running_mean = cache
    N = dout.shape[0]
    dbeta = dout.sum(axis=0)
    dgamma = (dout * xhat).sum(axis=0)
    dx = gamma / (N * std) * (N * dout - dbeta - xhat * dgamma)
    return dx, dgamma, dbeta
"""
HOMEWORK_NAMES = ("batchnorm_forward", "batchnorm_backward")
DX = "dx = gamma / (N * std) * (N * dout - dbeta - xhat * dgamma)"
STAGED = """
    dxhat = dout * gamma
    dvar = np.sum(dxhat * (x - mu) * -0.5 * (var + eps) ** -1.5, axis=0)
    dmu = np.sum(-dxhat / std, axis=0) + dvar * np.mean(-2 * (x - mu), axis=0)
    dx = dxhat / std + dvar * 2 * (x - mu) / N + dmu / N
"""

CONV = """
import numpy as np

def conv_forward(x, w, b, conv_param):
    stride, pad = conv_param["stride"], conv_param["pad"]
    N, C, H, W = x.shape
    F, _, HH, WW = w.shape
    H_out = 1 + (H + 2 * pad - HH) // stride
    W_out = 1 + (W + 2 * pad - WW) // stride
    xp = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((N, F, H_out, W_out))
    for n, f, i, j in np.ndindex(out.shape):
        window = xp[n, :, i * stride:i * stride + HH, j * stride:j * stride + WW]
        out[n, f, i, j] = np.sum(window * w[f]) + b[f]
    return out, (x, w, b, conv_param)

def conv_backward(dout, cache):
    x, w, b, conv_param = cache
    stride, pad = conv_param["stride"], conv_param["pad"]
    N, C, H, W = x.shape
    F, _, HH, WW = w.shape
    xp = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    dxp, dw = np.zeros_like(xp), np.zeros_like(w)
    db = np.sum(dout, axis=(0, 2, 3))
    for n, f, i, j in np.ndindex(dout.shape):
        rows = slice(i * stride, i * stride + HH)
        columns = slice(j * stride, j * stride + WW)
        dw[f] += dout[n, f, i, j] * xp[n, :, rows, columns]
        dxp[n, :, rows, columns] += dout[n, f, i, j] * w[f]
    dx = dxp[:, :, pad:pad + H, pad:pad + W]
    return dx, dw, db
"""
CONV_NAMES = ("conv_forward", "conv_backward")

SOFTMAX = """
import numpy as np

def softmax_loss(x, y):
    shifted = x - np.max(x, axis=1, keepdims=True)
    log_p = shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))
    N = len(y)
    dx = np.exp(log_p)
    dx[np.arange(N), y] -= 1
    return -np.sum(log_p[np.arange(N), y]) / N, dx / N
"""

POOL = """
import numpy as np

def max_pool_forward(x, pool_param):
    ph, pw, s = pool_param["pool_height"], pool_param["pool_width"], pool_param["stride"]
    N, C, H, W = x.shape
    out = np.zeros((N, C, (H - ph) // s + 1, (W - pw) // s + 1))
    for n, c, i, j in np.ndindex(out.shape):
        out[n, c, i, j] = x[n, c, i * s:i * s + ph, j * s:j * s + pw].max()
    return out, (x, ph, pw, s)

def max_pool_backward(dout, cache):
    x, ph, pw, s = cache
    dx = np.zeros_like(x)
    for n, c, i, j in np.ndindex(dout.shape):
        window = x[n, c, i * s:i * s + ph, j * s:j * s + pw]
        a, b = np.unravel_index(window.argmax(), window.shape)
        dx[n, c, i * s + a, j * s + b] += dout[n, c, i, j]
    return dx
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
    return examine_file(path, *names, operation, **{"seed": 7} | options)


def changed(source, *changes):
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def names_of(result) -> set[str]:
    return {entry.name for combination in result.mistakes for entry in combination}


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
    assert result.verdict == "right"
    assert "not examined, as homework is for (N, D): training, (N, C, H, W)" in str(result)


@pytest.mark.parametrize("entry", BATCH_NORM + CONV2D, ids=lambda entry: entry.name)
def test_a_mistake_in_a_file_is_named(entry, tmp_path):
    """The whole catalogue of batch norm and convolution, each as a file of plain NumPy."""
    names = (entry.operation, f"{entry.operation}_backward")
    result = examined(tmp_path, entry.source, names, entry.operation)
    if entry.name in ("momentum reversed", "moving variance unbiased"):
        assert (result.verdict, result.conventions) == (CONVENTION, (entry.name,))
        return
    if entry.name == "strides swapped":
        assert result.verdict == ASKED
        return
    if entry.name == "channels mixed by a reshape":
        # Where the channels are last, this is right. In courses, they are first.
        assert (result.verdict, result.conventions) == (CONVENTION, ("channels last",))
        return
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
    assert {*names_of(result), *result.conventions} & {one, other}, str(result)


def test_two_mistakes_that_no_pair_of_the_catalogue_equals(tmp_path):
    """Wrong in training alone: each output is explained by itself."""
    source = COURSE.replace(
        "return scale * (dout - dbeta / m - x_hat * dgamma / m), dgamma, dbeta",
        "return scale * (dout - x_hat * dgamma / m), dgamma, dbeta / m",
    )
    result = examined(tmp_path, source, ("batchnorm_forward", "batchnorm_backward"))
    assert names_of(result) == {"without the mean path", "dbeta a mean"}


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("while True: pass", "was not done after 3 seconds"),
        ("import os; os.abort()", "ended its process with exit code"),
        ("return dy.no_such_thing", "raised AttributeError"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("return dy, dy", "returned 2 from backward, expected 3 gradients (dx, dgamma, dbeta)"),
        ("return 'a', 'b', 'c'", "returned no numbers for a gradient"),
        ("print('noise'); return None", "returned None from backward"),
    ],
)
def test_what_cannot_be_run_is_a_finding(body, finding, tmp_path):
    plain = operation_source("batch_norm").split("def batch_norm_backward", 1)[0]
    source = f"{plain}def batch_norm_backward(dy, cache):\n    {body}\n"
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"), timeout=3)
    verdict = "could not be run" if finding.startswith("raised") else "wrong"
    assert result.verdict == (UNWRITTEN if "None" in body else verdict)
    assert (result.forward, result.mistakes) == ("right", ())
    assert f"  it {finding}" in str(result)


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("return dy.T, dy, dy", "dx has the shape"),
        ("return dy * float('nan'), dy, dy", "is nan, expected"),
    ],
)
def test_strange_numbers_are_a_finding(body, finding, tmp_path):
    plain = operation_source("batch_norm").split("def batch_norm_backward", 1)[0]
    source = f"{plain}def batch_norm_backward(dy, cache):\n    {body}\n"
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"))
    assert result.verdict == "wrong"
    assert finding in str(result)


def test_what_cannot_be_loaded_is_a_finding(tmp_path):
    result = examined(tmp_path, "def broken(:", ("a", "b"))
    assert result.verdict == UNLOADED
    assert "it cannot be loaded: SyntaxError: invalid syntax, line 1" in str(result)
    source = "import numpy as np\nx = np.load('no.npy')\ndef f(x): return np.maximum(x, 0), x\n"
    source += "def b(dy, x): return dy * (x > 0)"
    result = examined(tmp_path, source, ("f", "b"), "relu")
    assert result.verdict == "right"
    assert result.notes == (
        "line 2 was left out: FileNotFoundError: [Errno 2] No such file or directory: 'no.npy'",
    )


def test_where_it_failed_is_said(tmp_path):
    source = changed(HOMEWORK, ("    N = dout.shape[0]", "    N = dout.shape[2]"))
    result = examined(tmp_path, source, HOMEWORK_NAMES)
    assert "IndexError: tuple index out of range, line 25 (training, (N, D))" in str(result)


@pytest.mark.parametrize("dx", [DX, STAGED], ids=["closed form", "staged"])
def test_homework_for_vectors_is_right(dx, tmp_path):
    """For (N, D), with a backward pass for training alone; what is not examined is said."""
    result = examined(tmp_path, changed(HOMEWORK, (DX, dx)), HOMEWORK_NAMES)
    assert result.verdict == "right", str(result)
    assert "as homework is for (N, D): training, (N, C, H, W); prediction" in str(result)
    assert "backward not examined, as homework has no backward pass in prediction" in str(result)


def test_prediction_is_examined_in_homework(tmp_path):
    todo = changed(HOMEWORK, ("out = gamma * (x - running_mean)", "pass  # gamma * (x)"))
    result = examined(tmp_path, todo, HOMEWORK_NAMES)
    assert "it returned None from forward (prediction, (N, D))" in str(result)
    assert result.verdict == UNWRITTEN
    beta = changed(HOMEWORK, ("np.sqrt(running_var + eps) + beta", "np.sqrt(running_var + eps)"))
    result = examined(tmp_path, beta, HOMEWORK_NAMES)
    assert result.verdict == "wrong" and result.wrong == ("y",)
    assert result.right == ("moving_mean", "moving_var", "dx", "dgamma", "dbeta")


BN, C2 = ("batch_norm", HOMEWORK, HOMEWORK_NAMES), ("conv2d", CONV, CONV_NAMES)
MP = ("max_pool2d", POOL, ("max_pool_forward", "max_pool_backward"))
SM = ("softmax_cross_entropy", SOFTMAX, ("softmax_loss", "softmax_loss"))


@pytest.mark.parametrize(("operation", "source", "names"), [BN, C2, MP, SM])
def test_homework_is_right(operation, source, names, tmp_path):
    result = examined(tmp_path, source, names, operation)
    assert result.verdict == "right", str(result)
    assert (result.forward, result.backward) == ("right", "right")


MOVED = STAGED.replace("mu)", "running_mean)")
MOVED += "    dgamma = np.sum(dout * (x - running_mean) / std, axis=0)"


@pytest.mark.parametrize(
    ("homework", "old", "new", "mistakes"),
    [
        (BN, DX, STAGED.replace("* -0.5 ", ""), ["dvar lacks the factor -1/2"]),
        (BN, DX, STAGED.replace("-1.5", "-3/2"), ["exponent -3/2 without parentheses"]),
        (BN, DX, MOVED, ["moving mean in the backward pass"]),
        (BN, "N = dout.shape[0]", "N = dout.size", ["all elements counted in dx"]),
        (BN, "N = dout.shape[0]", "N = dout.shape[1]", ["features counted in dx"]),
        (BN, "return dx, dgamma", "return dx, gamma * dgamma", ["dgamma with the factor gamma"]),
        (BN, "return dx, dgamma, dbeta", "return dx, dbeta, dgamma", ["dgamma and dbeta swapped"]),
        (BN, "] = running_mean, running_var", "]", ["moving averages not kept"]),
        (
            BN,
            "gamma / (N * std)",
            "1 / (N * np.sqrt(var))",
            ["eps left out of the backward pass", "gamma forgotten in dx"],
        ),
        (C2, "1 + (", "(", ["output one too small"]),
        (C2, "2 * pad", "pad", ["padding on one side only in the size of the output"]),
        (C2, "W + 2 * pad - WW", "H + 2 * pad - HH", ["width of the output from the height"]),
        (C2, "pad:pad + H, pad:pad + W", "pad:-pad, pad:-pad", ["padding cut off from the end"]),
        (C2, "axis=(0, 2, 3))", "axis=(0, 2, 3)) / N", ["dbias divided by the batch size"]),
        (C2, "dw[f] +=", "dw[f] =", ["dweight overwritten in the loops"]),
        (C2, "columns] += dout", "columns] = dout", ["dx overwritten in the loops"]),
        (C2, "in np.ndindex(out.shape)", "in np.ndindex(N, N, *out.shape[2:])", []),
        (MP, "] += dout", "] = dout", ["maxima overwritten"]),
        (SM, "dx[np.arange(N), y] -= 1", "dx[:, y] -= 1", ["labels of the whole batch subtracted"]),
    ],
)
def test_mistakes_in_homework_are_named(homework, old, new, mistakes, tmp_path):
    """Those of one class, as they were made; without a name where the catalogue has none."""
    operation, source, names = homework
    assert old in source
    result = examined(tmp_path, source.replace(old, new), names, operation)
    assert result.verdict == "wrong", str(result)
    assert set(mistakes) == names_of(result), str(result)


def test_a_stride_that_does_not_divide_is_more_than_courses_ask(tmp_path):
    """Here the size of the output is rounded up, and the last window is cut."""
    source = changed(CONV, ("1 + (H + 2 * pad - HH) // stride", "1 - (HH - H - 2 * pad) // stride"))
    result = examined(tmp_path, source, CONV_NAMES, "conv2d")
    assert result.verdict == ASKED
    assert "a stride that does not divide" in result.beyond


def test_a_probe_that_fails_does_not_hide_the_mistakes(tmp_path):
    """Two of them in the same output, and feature maps that it cannot take."""
    entries = [e for e in BATCH_NORM if e.name in ("mean path as a sum", "gamma forgotten in dx")]
    source = source_of(entries).replace("    axes =", "    n, d = x.shape\n    axes =")
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"))
    assert tuple(entries) in result.mistakes or tuple(entries[::-1]) in result.mistakes


def test_three_mistakes_are_explained_output_by_output(tmp_path):
    entries = [
        e
        for e in BATCH_NORM
        if e.name in ("mean path as a sum", "gamma forgotten in dx", "dgamma a mean")
    ]
    result = examined(tmp_path, source_of(entries), ("batch_norm", "batch_norm_backward"))
    assert names_of(result) == {entry.name for entry in entries}


FLAT = """
import numpy as np

def batchnorm_forward(x, gamma, beta, eps=1e-5):
    mu, var = np.mean(x, axis=0), np.var(x, axis=0)
    xhat = (x - mu) / np.sqrt(var + eps)
    return gamma * xhat + beta, (xhat, gamma, var, eps)

def batchnorm_backward(dout, cache):
    xhat, gamma, var, eps = cache
    N = dout.shape[0]
    dgamma, dbeta = np.sum(dout * xhat, axis=0), np.sum(dout, axis=0)
    return gamma / np.sqrt(var + eps) / N * (N * dout - dbeta - xhat * dgamma), dgamma, dbeta
"""
PAIR = """
def forward(logits, labels): return softmax_loss(logits, labels)

def backward(dy, cache): return cache
"""
NUMBERS = """
def conv2d(x, weight, bias, stride, padding):
    return conv_forward(x, weight, bias, {"stride": stride, "pad": 1 * padding + 0})
"""


@pytest.mark.parametrize(
    ("homework", "old", "new", "verdict"),
    [
        ((BN[0], FLAT, HOMEWORK_NAMES), "", "", "right"),
        (BN, "bn_param", "bn_params", "right"),
        (C2, "conv_forward(x, w, b, conv_param):", "conv_forward(X, W, b, Conv_Params):\n"
         "    x, w, conv_param = X, W, Conv_Params", "right"),
        (C2, "conv_forward(x, w, b, conv_param):", "conv_forward(x, w, b, stride=1, pad=0):\n"
         "    conv_param = {'stride': stride, 'pad': pad}", "right"),
        (C2, "forward(x, w, b, conv_param):", "forward(A, W, b, hparams):\n    0 / 0",
         "could not be run"),
        (BN, "forward(x, gamma, beta, bn_param)", "forward(x, gamma, beta, bn_param, surprise)",
         UNDECIDED),
        (SM, "(x, y):\n", "(scores, y):\n    x = scores\n", "right"),
        ((SM[0], SOFTMAX + PAIR, ("forward", "backward")), "", "", "right"),
        ((C2[0], CONV + NUMBERS, ("conv2d", "conv_backward")), "", "", "right"),
    ],
)  # fmt: skip
def test_signatures_that_people_use(homework, old, new, verdict, tmp_path):
    operation, source, names = homework
    result = examined(tmp_path, source.replace(old, new) if old else source, names, operation)
    assert result.verdict == verdict, str(result)
    if verdict == UNDECIDED:
        assert "An adapter is needed" in str(result)


def test_code_for_vectors_is_not_examined_on_feature_maps(tmp_path):
    result = examined(tmp_path, FLAT, HOMEWORK_NAMES)
    assert "not examined, as homework is for (N, D): training, (N, C, H" in str(result)


def test_a_file_is_run_once_beside_its_modules(tmp_path):
    """So that its globals are one, and its modules are found; its working directory is its own."""
    (tmp_path / "helpers.py").write_text("def both(x): return x.mean(0), x.var(0)")
    source = changed(
        HOMEWORK,
        ("import numpy as np", "import numpy as np\nfrom helpers import both\nsaved = []\n"
         "import os\nhere = os.listdir('.')"),
        ("x.mean(axis=0), x.var(axis=0)", "both(x)"),
        ("    return out, cache", "    saved.append(cache)\n    assert not here\n"
         "    return out, len(saved) - 1"),
        ("gamma, mu, var, std, eps, running_mean = cache",
         "gamma, mu, var, std, eps, running_mean = saved[cache]"),
    )  # fmt: skip
    result = examined(tmp_path, source, HOMEWORK_NAMES)
    assert result.verdict == "right", str(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helpers.py", "homework.py"]


def test_arguments_that_are_written_into_are_noted(tmp_path):
    result = examined(tmp_path, HOMEWORK, HOMEWORK_NAMES)
    assert "changes" not in str(result)
    source = changed(
        HOMEWORK,
        ("        xhat = (x - mu) / std", "        x -= mu\n        xhat = x / std"),
        ("    return dx,", "    dout *= 0\n    return dx,"),
    )
    result = examined(tmp_path, source, HOMEWORK_NAMES)
    assert result.verdict == "right"
    assert result.notes[:2] == ("it changes its argument x", "it changes its argument dy")


def test_beside_a_mistake_float32_is_no_news(tmp_path):
    source = changed(
        HOMEWORK, ("    N, D =", "    x = x.astype(np.float32)\n    N, D ="), (DX, MOVED)
    )
    result = examined(tmp_path, source, HOMEWORK_NAMES)
    assert names_of(result) == {"moving mean in the backward pass"}, str(result)
    assert result.wrong == ("dx", "dgamma") and len(result.complaints) == 2


@pytest.mark.parametrize(
    "body",
    ["raise NotImplementedError", "assert False", "return type('', (), {'__len__': None})()"],
)
def test_without_any_gradient_nothing_is_right(body, tmp_path):
    """Whatever the backward pass does to be left alone."""
    source = "import numpy as np\ndef f(x): return np.maximum(x, 0), x\n"
    source += f"def b(dy, x):\n    {body}\n"
    result = examined(tmp_path, source, ("f", "b"), "relu")
    assert "right" not in result.verdict, str(result)
    source = "import numpy as np\nclass Relu:\n    def forward(self, x): return np.maximum(x, 0)\n"
    source += f"    def backward(self, dy):\n        {body}\n"
    result = examined(tmp_path, source, ("Relu", "Relu"), "relu")
    assert "right" not in result.verdict, str(result)


def test_float32_is_undecided(tmp_path):
    source = operation_source("batch_norm").replace(
        "x_hat = (x - mean) / s", "x_hat = ((x - mean) / s).astype(np.float32)"
    )
    result = examined(tmp_path, source, ("batch_norm", "batch_norm_backward"))
    assert result.verdict == UNDECIDED
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


CLASS = """
class BatchNorm1D:
    def __init__(self, features, eps):
        self.eps = eps

    def forward(self, x):
        y, self.cache = batchnorm_forward(x, *self.theta, self.eps)
        return y

    def backward(self, dy):
        dx, *self.dtheta = batchnorm_backward(dy, self.cache)
        return dx
"""


def test_the_adapter_of_the_help_is_for_a_class(tmp_path):
    example = (calling.__doc__ or "").split("::\n\n")[-1]
    (tmp_path / "adapter.py").write_text(textwrap.dedent(example))
    adapter, names = f"{tmp_path / 'adapter.py'}:adapt", ("BatchNorm1D", "BatchNorm1D")
    result = examined(tmp_path, FLAT + CLASS, names, adapter=adapter)
    assert result.verdict == "right", str(result)
    assert "not examined, as prediction is another exercise: prediction, (N, D)" in str(result)


@pytest.mark.parametrize(
    ("adapter", "finding"),
    [
        ("no.py:adapt", "expected FILE:FUNCTION for the adapter, got 'no.py:adapt'"),
        ("adapter.py", "expected FILE:FUNCTION for the adapter, got 'adapter.py'"),
        ("adapter.py:wrong", "the adapter raised AttributeError: it has no function wrong"),
        ("adapter.py:broken", "the adapter raised ZeroDivisionError: division by zero, line 2"),
        ("adapter.py:breaks", "the adapter raised ZeroDivisionError: division by zero, line 6"),
    ],
)
def test_what_is_wrong_with_the_adapter_is_no_finding(adapter, finding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter.py").write_text(
        "def broken(forward, backward):\n    1 / 0\n"
        "def breaks(forward, backward):\n"
        "    def mine(x, gamma, beta):\n"
        "        y, cache = forward(x, gamma, beta)\n"
        "        return 1 / 0\n"
        "    return mine, backward\n"
    )
    with pytest.raises(SubmissionError, match=finding):
        examined(tmp_path, FLAT, HOMEWORK_NAMES, adapter=adapter)


def test_what_cannot_be_examined_by_no_fault_of_its_author(tmp_path):
    with pytest.raises(SubmissionError, match="is not a file"):
        examine_file(tmp_path / "no.py", "a", "b", "relu")
    (tmp_path / "homework.txt").write_text("{}")
    with pytest.raises(SubmissionError, match=r"is no Python file and no notebook: its name ends"):
        examine_file(tmp_path / "homework.txt", "a", "b", "relu")
    source = "import no_such_thing as t\nforward = t.make()[0]\nx = 1 / 0\nbackward = x"
    said = r"homework\.py has no function forward \(line 3 was left out: ZeroDivisionError"
    with pytest.raises(SubmissionError, match=said):
        examined(tmp_path, source, ("forward", "backward"), "relu")
    with pytest.raises(SubmissionError, match=r"homework\.py has no function backwrd"):
        examined(tmp_path, "def forward(x): pass", ("forward", "backwrd"))


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


def test_the_comparison_with_differences_has_a_time_limit(tmp_path, monkeypatch):
    """Slow code would be called hundreds of times. Then nothing is said of its own gradient."""
    path = tmp_path / "homework.py"
    path.write_text(
        "import numpy as np\ndef f(x): return 2 * np.maximum(x, 0), x\n"
        "def b(dy, x): return 2 * dy * (x > 0)\n"
    )
    with Session(path, 60) as session:
        found = examine_in(session, "f", "b", "relu", seed=1)
        assert (found.forward, found.backward) == ("wrong", "right")
        clock = itertools.count(0, 61)  # seconds
        fake = types.SimpleNamespace(monotonic=lambda: next(clock))
        monkeypatch.setattr(submission, "time", fake)
        found = examine_in(session, "f", "b", "relu", seed=1)
    assert (found.forward, found.backward) == ("wrong", "wrong")
