"""Define a catalogue of mistakes that people make in forward and backward passes.

A mutant replaces right code in `npbn.verify.plain` by wrong code, as people write it. So every
mutant can be run (`Mutant.functions`), combined with another mutant (`functions_of`), and written
to a file of plain NumPy code (`Mutant.source`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npbn.verify import plain

SOURCE = Path(plain.__file__).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Mutant:
    """A mistake in an operation, described by changes to the right source.

    Attributes:
        operation: the name of the operation in `npbn.verify.plain`.
        name: the name of the mistake.
        explanation: the effect of the mistake on the result, for the person who made the mistake.
        changes: pairs (right code, wrong code). The right code is a part of `npbn.verify.plain`.
    """

    operation: str
    name: str
    explanation: str
    changes: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """Return the source of the operation with this mistake, as a file of plain NumPy code."""
        return source_of([self])

    @property
    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the forward and the backward pass with this mistake."""
        return functions_of(self.operation, [self])


def mutant(operation: str, name: str, explanation: str, *changes: tuple[str, str]) -> Mutant:
    """Return a mutant, which is an entry of the catalogue of mistakes.

    Raises:
        ValueError: the operation's code in plain.py does not have the right code of a change
            exactly once.
    """
    original = operation_source(operation)
    for old, _ in changes:
        if original.count(old) != 1:
            raise ValueError(f"{operation}: {name}: expected {old!r} once in plain.py")
    return Mutant(operation, name, explanation, changes)


def plain_name(operation: str) -> str:
    """Return the name of an operation's forward function in plain.py."""
    return {"spatial_batch_norm": "batch_norm"}.get(operation, operation)


def operation_source(operation: str) -> str:
    """Return the source of an operation's forward and backward pass in plain.py."""
    operation = plain_name(operation)
    functions = re.findall(
        rf"^def {operation}(?:_backward)?\(.*?(?=\n\n\n|\Z)", SOURCE, re.M | re.S
    )
    return "import numpy as np\n\n\n" + "\n\n\n".join(functions) + "\n"


def source_of(mutants: Iterable[Mutant]) -> str:
    """Return the source of one operation with all of these mistakes.

    Raises:
        ValueError: two mistakes change the same code, so they cannot be combined.
    """
    mutants = list(mutants)
    source = operation_source(mutants[0].operation)
    for m in mutants:
        for old, new in m.changes:
            if source.count(old) != 1:
                raise ValueError(f"{m.name} cannot be combined with the others")
            source = source.replace(old, new)
    return source


@functools.cache
def _compiled(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace


def functions_of(
    operation: str, mutants: Iterable[Mutant] = ()
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the forward and the backward pass of an operation, with all of these mistakes."""
    mutants = list(mutants)
    source = source_of(mutants) if mutants else operation_source(operation)
    namespace = _compiled(source)
    name = plain_name(operation)
    return namespace[name], namespace[f"{name}_backward"]


MOVING_VARIANCE_UNBIASED = mutant(
    "batch_norm",
    "moving variance unbiased",
    "the moving variance is made from the unbiased batch variance, as PyTorch's is",
    (
        "moving_var = momentum * moving_var + (1 - momentum) * var",
        "moving_var = momentum * moving_var + (1 - momentum) * var * m / (m - 1)",
    ),
)
MOMENTUM_REVERSED = mutant(
    "batch_norm",
    "momentum reversed",
    "the moving averages keep 1 - momentum and take momentum of the new, as PyTorch's do",
    (
        "moving_mean = momentum * moving_mean + (1 - momentum) * mean",
        "moving_mean = (1 - momentum) * moving_mean + momentum * mean",
    ),
    (
        "moving_var = momentum * moving_var + (1 - momentum) * var",
        "moving_var = (1 - momentum) * moving_var + momentum * var",
    ),
)
BATCH_NORM = (
    mutant(
        "batch_norm",
        "without the mean path",
        "dx lacks the term through the mean, -mean(gamma·dy)/s: every x moves the batch mean, and "
        "the mean is subtracted from every x",
        ("dx_hat - mean_term - variance_term", "dx_hat - variance_term"),
    ),
    mutant(
        "batch_norm",
        "without the variance path",
        "dx lacks the term through the variance, -x_hat·mean(gamma·dy·x_hat)/s: every x moves the "
        "batch variance",
        ("dx_hat - mean_term - variance_term", "dx_hat - mean_term"),
    ),
    mutant(
        "batch_norm",
        "prediction-mode gradient in training",
        "dx is gamma·dy/s also in training: mean and variance are treated as constants, but there "
        "they depend on x",
        ("dx_hat - mean_term - variance_term", "dx_hat"),
    ),
    mutant(
        "batch_norm",
        "training-mode gradient in prediction",
        "dx in prediction mode has the terms through the batch's mean and variance; there the "
        "statistics are constants and dx is gamma·dy/s",
        ("    dx_hat = dy * gamma\n    if training:", "    dx_hat = dy * gamma\n    if True:"),
    ),
    mutant(
        "batch_norm",
        "mean path with the wrong sign",
        "the term of dx through the mean is added, it must be subtracted",
        ("dx_hat - mean_term - variance_term", "dx_hat + mean_term - variance_term"),
    ),
    mutant(
        "batch_norm",
        "variance path with the wrong sign",
        "the term of dx through the variance is added, it must be subtracted",
        ("dx_hat - mean_term - variance_term", "dx_hat - mean_term + variance_term"),
    ),
    mutant(
        "batch_norm",
        "variance path twice as large",
        "the term of dx through the variance is twice as large as it should be: the 2 of "
        "d(x²) = 2x dx cancels against the 1/2 of the square root's derivative",
        ("variance_term = x_hat", "variance_term = 2 * x_hat"),
    ),
    mutant(
        "batch_norm",
        "variance path half as large",
        "the term of dx through the variance is half as large as it should be: the 1/2 of the "
        "square root's derivative cancels against the 2 of d(x²) = 2x dx",
        ("variance_term = x_hat", "variance_term = 0.5 * x_hat"),
    ),
    mutant(
        "batch_norm",
        "dvar lacks the factor -1/2",
        "the gradient for the variance lacks the factor -1/2 of the derivative of (v + eps)^(-1/2)",
        ("variance_term = x_hat", "variance_term = -2 * x_hat"),
    ),
    mutant(
        "batch_norm",
        "exponent -3/2 without parentheses",
        "the gradient for the variance has (v + eps)^(-3) / 2: Python raises to a power before it "
        "divides, so that ** -3/2 must be ** (-3/2)",
        ("variance_term = x_hat", "variance_term = 0.5 / s**3 * x_hat"),
    ),
    mutant(
        "batch_norm",
        "moving mean in the backward pass",
        "the backward pass centres x with the moving mean; the forward pass has used the batch's",
        ("return y, (x_hat, s,", "return y, ((x - moving_mean) / s, s,"),
        ("variance_term = x_hat", "variance_term = (x_hat - x_hat.mean(axes, keepdims=True))"),
    ),
    mutant(
        "batch_norm",
        "all elements counted in dx",
        "the means in dx are divided by the number of all elements; it must be N, or N·H·W with "
        "feature maps",
        ("training, axes, m), (", "training, axes, x.size), ("),
    ),
    mutant(
        "batch_norm",
        "features counted in dx",
        "the means in dx are divided by the number of features, shape[1]; they run over the batch, "
        "shape[0]",
        ("training, axes, m), (", "training, axes, x.shape[1]), ("),
    ),
    mutant(
        "batch_norm",
        "mean path divided by the batch size only",
        "the term of dx through the mean is divided by N; with feature maps it must be N·H·W",
        (
            "mean_term = dx_hat.sum(axis=axes, keepdims=True) / m",
            "mean_term = dx_hat.sum(axis=axes, keepdims=True) / len(dy)",
        ),
    ),
    mutant(
        "batch_norm",
        "mean path as a sum",
        "the term of dx through the mean is a sum over the batch; it must be a mean",
        (
            "mean_term = dx_hat.sum(axis=axes, keepdims=True) / m",
            "mean_term = dx_hat.sum(axis=axes, keepdims=True)",
        ),
    ),
    mutant(
        "batch_norm",
        "variance path as a sum",
        "the term of dx through the variance has a sum over the batch; it must be a mean",
        (
            "(dx_hat * x_hat).sum(axis=axes, keepdims=True) / m",
            "(dx_hat * x_hat).sum(axis=axes, keepdims=True)",
        ),
    ),
    mutant(
        "batch_norm",
        "eps left out of the backward pass",
        "dx divides by √v where the forward pass divides by √(v + eps)",
        ("return y, (x_hat, s, gamma,", "return y, (x_hat, np.sqrt(var), gamma,"),
    ),
    mutant(
        "batch_norm",
        "eps left out",
        "the output is divided by √v, without eps: a constant feature gives NaN",
        ("s = np.sqrt(var + eps)", "s = np.sqrt(var)"),
    ),
    mutant(
        "batch_norm",
        "eps counted twice",
        "eps is added to the moving variance, and again in prediction",
        (
            "moving_var = momentum * moving_var + (1 - momentum) * var",
            "moving_var = momentum * moving_var + (1 - momentum) * (var + eps)",
        ),
    ),
    mutant(
        "batch_norm",
        "eps outside of the root",
        "the output is divided by √v + eps, it must be √(v + eps)",
        ("s = np.sqrt(var + eps)", "s = np.sqrt(var) + eps"),
    ),
    mutant(
        "batch_norm",
        "n - 1 for n",
        "the batch variance is the unbiased one, divided by m - 1; batch norm divides by m",
        (
            "((x - mean) ** 2).sum(axis=axes, keepdims=True) / m",
            "((x - mean) ** 2).sum(axis=axes, keepdims=True) / (m - 1)",
        ),
    ),
    MOVING_VARIANCE_UNBIASED,
    MOMENTUM_REVERSED,
    mutant(
        "batch_norm",
        "a bracket of the moving averages misplaced",
        "the moving averages get 1 - momentum·batch; it must be (1 - momentum)·batch",
        (
            "moving_mean = momentum * moving_mean + (1 - momentum) * mean",
            "moving_mean = momentum * moving_mean + (1 - momentum * mean)",
        ),
        (
            "moving_var = momentum * moving_var + (1 - momentum) * var",
            "moving_var = momentum * moving_var + (1 - momentum * var)",
        ),
    ),
    mutant(
        "batch_norm",
        "moving averages not kept",
        "the moving averages stay as they are: the new ones are not computed, or not put back",
        ("momentum * moving_mean + (1 - momentum) * mean", "moving_mean"),
        ("momentum * moving_var + (1 - momentum) * var", "moving_var"),
    ),
    mutant(
        "batch_norm",
        "batch statistics in prediction",
        "prediction normalizes with the batch's own statistics and moves the averages; it must use "
        "the moving averages",
        (
            "    m = x.size // gamma.size\n    if training:",
            "    m = x.size // gamma.size\n    if True:",
        ),
    ),
    mutant(
        "batch_norm",
        "statistics per pixel",
        "feature maps are normalized per pixel, over the batch only; each channel has one mean "
        "and variance over batch, height and width",
        (
            "    axes = (0,) if x.ndim == 2 else (0, 2, 3)\n    m = x.size // gamma.size",
            "    axes = (0,)\n    m = len(x)",
        ),
    ),
    mutant(
        "batch_norm",
        "statistics per example",
        "the statistics run over the features of one example (that is layer norm), not over the "
        "batch",
        (
            "    axes = (0,) if x.ndim == 2 else (0, 2, 3)\n    m = x.size // gamma.size",
            "    axes = tuple(range(1, x.ndim))\n    m = x.size // len(x)",
        ),
    ),
    mutant(
        "batch_norm",
        "gamma forgotten in dx",
        "dx lacks the factor gamma",
        ("dx_hat = dy * gamma", "dx_hat = dy"),
    ),
    mutant(
        "batch_norm",
        "dx not divided by s",
        "dx lacks the factor 1/s",
        ("- variance_term) / s", "- variance_term)"),
        ("dx = dx_hat / s", "dx = dx_hat"),
    ),
    mutant(
        "batch_norm",
        "dx divided by the variance",
        "dx is divided by s², it must be s",
        ("- variance_term) / s", "- variance_term) / s**2"),
        ("dx = dx_hat / s", "dx = dx_hat / s**2"),
    ),
    mutant(
        "batch_norm",
        "dgamma from the centred x",
        "dgamma sums dy·(x - mean), it must be dy·x_hat, which is divided by s",
        ("dgamma = (dy * x_hat).sum", "dgamma = (dy * x_hat * s).sum"),
    ),
    mutant(
        "batch_norm",
        "dgamma a mean",
        "dgamma is a mean over the batch; it must be a sum, the loss has its 1/N already",
        (
            "dgamma = (dy * x_hat).sum(axis=axes, keepdims=True)",
            "dgamma = (dy * x_hat).sum(axis=axes, keepdims=True) / m",
        ),
    ),
    mutant(
        "batch_norm",
        "dbeta a mean",
        "dbeta is a mean over the batch; it must be a sum, the loss has its 1/N already",
        (
            "dbeta = dy.sum(axis=axes, keepdims=True)",
            "dbeta = dy.sum(axis=axes, keepdims=True) / m",
        ),
    ),
    mutant(
        "batch_norm",
        "dgamma without x_hat",
        "dgamma is the sum of dy; it must be the sum of dy·x_hat",
        ("dgamma = (dy * x_hat).sum", "dgamma = dy.sum"),
    ),
    mutant(
        "batch_norm",
        "dgamma with the factor gamma",
        "dgamma sums gamma·dy·x_hat; gamma belongs to dx only",
        ("dgamma = (dy * x_hat).sum", "dgamma = (dy * gamma * x_hat).sum"),
    ),
    mutant(
        "batch_norm",
        "the normalization left out of the backward pass",
        "dx is dy, and dgamma is the sum of dy·x: the mean and the variance are ignored",
        ("return y, (x_hat, s,", "return y, (x, s,"),
        ("dx = (dx_hat - mean_term - variance_term) / s", "dx = dy"),
        ("dx = dx_hat / s", "dx = dy"),
    ),
    mutant(
        "batch_norm",
        "beta divided by s",
        "beta is added before the division by s; it must be added after it",
        ("y = gamma * x_hat + beta", "y = gamma * (x_hat + beta / s)"),
    ),
    mutant(
        "batch_norm",
        "moving averages of the batch only",
        "both terms of the moving averages have the batch's statistics; one must have the old "
        "average",
        ("momentum * moving_mean + (1 - momentum) * mean", "mean"),
        ("momentum * moving_var + (1 - momentum) * var", "var"),
    ),
    mutant(
        "batch_norm",
        "channels mixed by a reshape",
        "feature maps are reshaped to (-1, C) without moving the channels to the end first, so "
        "that each column has numbers of several channels",
        (
            "    axes = (0,) if x.ndim == 2 else (0, 2, 3)\n    m = x.size // gamma.size",
            "    shape, form, x = x.shape, gamma.shape, x.reshape(-1, gamma.size)\n"
            "    gamma, beta = gamma.reshape(1, -1), beta.reshape(1, -1)\n"
            "    moving_mean, moving_var = moving_mean.reshape(1, -1), moving_var.reshape(1, -1)\n"
            "    axes, m = (0,), len(x)",
        ),
        (
            "return y, (x_hat, s, gamma, training, axes, m), (moving_mean, moving_var)",
            "return (\n        y.reshape(shape),\n"
            "        (x_hat, s, gamma, training, axes, m, form),\n"
            "        (moving_mean.reshape(form), moving_var.reshape(form)),\n    )",
        ),
        (
            "    x_hat, s, gamma, training, axes, m = cache\n",
            "    x_hat, s, gamma, training, axes, m, form = cache\n"
            "    shape, dy = dy.shape, dy.reshape(x_hat.shape)\n",
        ),
        (
            "return dx, dgamma, dbeta",
            "return dx.reshape(shape), dgamma.reshape(form), dbeta.reshape(form)",
        ),
    ),
    mutant(
        "batch_norm",
        "dgamma and dbeta swapped",
        "dgamma and dbeta are right, but returned in the wrong order",
        ("return dx, dgamma, dbeta", "return dx, dbeta, dgamma"),
    ),
)

_WINDOW = "np.tensordot(window, weight, axes=((1, 2, 3), (1, 2, 3)))"
_DX = "dpadded[:, :, rows, columns] += np.tensordot(dy[:, :, p, q], weight, axes=(1, 0))"
_DWEIGHT = "dweight += np.tensordot(dy[:, :, p, q], padded[:, :, rows, columns], axes=(0, 0))"
_OUTPUT = "y = np.empty((n, out, (h - kh) // sh + 1, (w - kw) // sw + 1))"
_CROP = "dx = dpadded[:, :, ph : h - ph, pw : w - pw]"

_COL2IM = (
    "    for i in range(kh):\n"
    "        for j in range(kw):\n"
    "            for (p, q), part in parts.items():\n"
    "                dpadded[:, :, p * sh + i, q * sw + j] = part[:, :, i, j]\n"
)

CONV2D = (
    mutant(
        "conv2d",
        "dx of the last example only",
        "only the last example gets a gradient: the line that keeps it is outside of the loop",
        (
            "dx = dpadded[:, :, ph : h - ph, pw : w - pw]",
            "dx = dpadded[:, :, ph : h - ph, pw : w - pw]\n    dx[:-1] = 0",
        ),
    ),
    mutant(
        "conv2d",
        "output one too small",
        "the size of the output lacks the + 1: a kernel as large as the image fits once, not never",
        (_OUTPUT, _OUTPUT.replace(" + 1", "")),
    ),
    mutant(
        "conv2d",
        "padding on one side only in the size of the output",
        "the size of the output counts the padding once; it is on both sides",
        (_OUTPUT, _OUTPUT.replace("h - kh", "h - ph - kh").replace("w - kw", "w - pw - kw")),
    ),
    mutant(
        "conv2d",
        "width of the output from the height",
        "the output is made as wide as it is high; its width follows from the image's width",
        (_OUTPUT, _OUTPUT.replace("(w - kw) // sw", "(h - kh) // sh")),
    ),
    mutant(
        "conv2d",
        "kernel flipped",
        "the kernel is turned by 180° (the mathematicians' convolution); deep learning's is not",
        (_WINDOW, _WINDOW.replace("weight,", "weight[:, :, ::-1, ::-1],")),
    ),
    mutant(
        "conv2d",
        "kernel flipped in dx",
        "dx uses the kernel turned by 180°, but the sums over windows turn it already",
        (_DX, _DX.replace("weight,", "weight[:, :, ::-1, ::-1],")),
    ),
    mutant(
        "conv2d",
        "dweight flipped",
        "dweight is turned by 180°",
        ("return dx, dweight, dbias", "return dx, dweight[:, :, ::-1, ::-1], dbias"),
    ),
    mutant(
        "conv2d",
        "padding forgotten in dx",
        "dx is cut from the corner of the padded gradient; it must be its middle, which starts "
        "behind the padding",
        (_CROP, "dx = dpadded[:, :, : h - 2 * ph, : w - 2 * pw]"),
    ),
    mutant(
        "conv2d",
        "padding not cut off dx",
        "dx still has the padding around it",
        (_CROP, "dx = dpadded"),
    ),
    mutant(
        "conv2d",
        "padding cut off from the end",
        "dx is cut with [pad:-pad], which is nothing where pad is 0",
        (_CROP, "dx = dpadded[:, :, ph:-ph, pw:-pw]"),
    ),
    mutant(
        "conv2d",
        "stride ignored in dx",
        "dx is put together as if the stride were 1",
        (
            _DX,
            "dpadded[:, :, p : p + kh, q : q + kw] += np.tensordot("
            "dy[:, :, p, q], weight, axes=(1, 0))",
        ),
    ),
    mutant(
        "conv2d",
        "stride ignored in dweight",
        "dweight looks at the windows as if the stride were 1",
        (
            _DWEIGHT,
            "dweight += np.tensordot("
            "dy[:, :, p, q], padded[:, :, p : p + kh, q : q + kw], axes=(0, 0))",
        ),
    ),
    mutant(
        "conv2d",
        "strides swapped",
        "the vertical stride is used horizontally and the reverse",
        (
            "    (sh, sw), (ph, pw) = stride, padding\n",
            "    (sw, sh), (ph, pw) = stride, padding\n",
        ),
        (
            "padded, weight, (sh, sw), (ph, pw) = cache",
            "padded, weight, (sw, sh), (ph, pw) = cache",
        ),
    ),
    mutant(
        "conv2d",
        "overlaps overwritten in dx",
        "where windows overlap, the last one overwrites dx; all of them must be added",
        (_DX, _DX.replace("+=", "=")),
    ),
    mutant(
        "conv2d",
        "overlaps overwritten in col2im",
        "where windows overlap, col2im overwrites dx; all parts must be added",
        (_DX, "parts[p, q] = np.tensordot(dy[:, :, p, q], weight, axes=(1, 0))"),
        ("    dpadded, dweight = np.zeros(", "    parts = {}\n    dpadded, dweight = np.zeros("),
        (_CROP, _COL2IM.lstrip() + "    " + _CROP),
    ),
    mutant(
        "conv2d",
        "dx overwritten in the loops",
        "dx is assigned in the loops over filters and windows, so that the last ones are left; all "
        "of them must be added",
        (_DX, "dpadded[:, :, rows, columns] = np.multiply.outer(dy[:, -1, p, q], weight[-1])"),
    ),
    mutant(
        "conv2d",
        "dweight overwritten",
        "dweight is assigned in the loop over the windows, so that the last one is left; all of "
        "them must be added",
        (_DWEIGHT, _DWEIGHT.replace("+=", "=")),
    ),
    mutant(
        "conv2d",
        "dweight overwritten in the loops",
        "dweight is assigned in the loops over examples and windows, so that the last ones are "
        "left; all of them must be added",
        (
            _DWEIGHT,
            "dweight = np.multiply.outer(dy[-1, :, p, q], padded[-1, :, rows, columns])",
        ),
    ),
    mutant(
        "conv2d",
        "dbias over the batch only",
        "dbias takes one position of every map; it must sum over batch, height and width",
        ("dbias = dy.sum(axis=(0, 2, 3))", "dbias = dy[:, :, 0, 0].sum(axis=0)"),
    ),
    mutant(
        "conv2d",
        "dbias a mean",
        "dbias is a mean; it must be a sum over batch, height and width",
        ("dbias = dy.sum(axis=(0, 2, 3))", "dbias = dy.mean(axis=(0, 2, 3))"),
    ),
    mutant(
        "conv2d",
        "dbias divided by the batch size",
        "dbias is divided by the batch size; it must be a sum, the loss has its 1/N already",
        ("dbias = dy.sum(axis=(0, 2, 3))", "dbias = dy.sum(axis=(0, 2, 3)) / n"),
    ),
    mutant(
        "conv2d",
        "dweight a mean",
        "dweight is divided by the batch size; it must be a sum, the loss has its 1/N already",
        ("return dx, dweight, dbias", "return dx, dweight / n, dbias"),
    ),
    mutant(
        "conv2d",
        "im2col order",
        "the columns of the windows are ordered (kH, kW, C) and the weight (C, kH, kW)",
        (
            _WINDOW,
            "window.transpose(0, 2, 3, 1).reshape(n, -1) @ weight.reshape(out, -1).T",
        ),
    ),
    mutant(
        "conv2d",
        "im2col order in dweight",
        "dweight is summed in the order (kH, kW, C) and read in the order (C, kH, kW)",
        (
            "return dx, dweight, dbias",
            "return dx, dweight.transpose(0, 2, 3, 1).reshape(weight.shape), dbias",
        ),
    ),
    mutant(
        "conv2d",
        "bias added at each element of the kernel",
        "the bias is added once for each element of the kernel; it must be added once",
        ("y = y + bias.reshape(1, out, 1, 1)", "y = y + kh * kw * bias.reshape(1, out, 1, 1)"),
    ),
    mutant(
        "conv2d",
        "bias forgotten",
        "the bias is not added",
        ("y = y + bias.reshape(1, out, 1, 1)", "y = y + 0"),
    ),
)

_SHARE = "share = dy[:, :, p, q] / (kh * kw)"

TIES_SHARED_OUT = mutant(
    "max_pool2d",
    "ties shared out",
    "dy is shared out among all elements that equal the maximum; one of them must get it",
    ("chosen = np.arange(kh * kw) == first", "chosen = window == window.max(2)[:, :, None]"),
    ("share = chosen * dy", "share = chosen / chosen.sum(2)[:, :, None] * dy"),
)
POOLING = (
    mutant(
        "avg_pool2d",
        "padding not counted",
        "windows at the edge are divided by how many pixels of the image they see; padding counts",
        (
            "window.sum(axis=(2, 3)) / (kh * kw)",
            "window.sum(axis=(2, 3)) / (min(p * sh + kh, h - ph) - max(p * sh, ph))"
            " / (min(q * sw + kw, w - pw) - max(q * sw, pw))",
        ),
    ),
    mutant(
        "avg_pool2d",
        "gradient not divided by the window",
        "each element gets the whole dy; it must get dy / (kH·kW)",
        (_SHARE, "share = dy[:, :, p, q]"),
    ),
    mutant(
        "avg_pool2d",
        "gradient divided by one side of the window",
        "dy is divided by kH; it must be kH·kW",
        (_SHARE, "share = dy[:, :, p, q] / kh"),
    ),
    mutant(
        "avg_pool2d",
        "overlaps overwritten",
        "where windows overlap, the last one overwrites dx; all of them must be added",
        ("q * sw + kw] += share", "q * sw + kw] = share"),
    ),
    mutant(
        "avg_pool2d",
        "stride ignored in the backward pass",
        "the backward pass looks at the windows as if the stride were 1",
        *(
            (
                "p * sh : p * sh + kh, q * sw : q * sw + kw] += share",
                "p : p + kh, q : q + kw] += share",
            ),
        ),
    ),
    mutant(
        "avg_pool2d",
        "last windows left out",
        "the windows at the lower and the right edge are not visited, and their outputs stay 0",
        ("y = np.empty(", "y = np.zeros("),
        ("range(y.shape[2])", "range(y.shape[2] - 1)"),
        ("range(y.shape[3])", "range(y.shape[3] - 1)"),
        ("range(dy.shape[2])", "range(dy.shape[2] - 1)"),
        ("range(dy.shape[3])", "range(dy.shape[3] - 1)"),
    ),
    mutant(
        "avg_pool2d",
        "overlaps overwritten in col2im",
        "where windows overlap, col2im overwrites dx; all parts must be added",
        (
            "dpadded[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw] += share[:, :, None, None]",
            "parts[p, q] = share[:, :, None, None] + np.zeros((1, 1, kh, kw))",
        ),
        ("    dpadded = np.zeros(", "    parts = {}\n    dpadded = np.zeros("),
        ("    return dpadded[:, :, ph", _COL2IM + "    return dpadded[:, :, ph"),
    ),
    mutant(
        "max_pool2d",
        "ties counted twice",
        "every element that equals the maximum gets the whole dy; one of them must",
        ("chosen = np.arange(kh * kw) == first", "chosen = window == window.max(2)[:, :, None]"),
    ),
    TIES_SHARED_OUT,
    mutant(
        "max_pool2d",
        "gradient shared out",
        "dy is shared out over the window, as for an average; only the maximum must get it",
        ("share = chosen * dy", "share = (chosen * 0 + 1 / (kh * kw)) * dy"),
    ),
    mutant(
        "max_pool2d",
        "overlaps overwritten",
        "where windows overlap, the last one overwrites dx; all of them must be added",
        ("dpadded[:, :, rows, columns] += share", "dpadded[:, :, rows, columns] = share"),
    ),
    mutant(
        "avg_pool2d",
        "the maximum in place of the mean",
        "the outputs are maxima; they must be means",
        ("window.sum(axis=(2, 3)) / (kh * kw)", "window.max(axis=(2, 3))"),
    ),
    mutant(
        "avg_pool2d",
        "the mean over all channels",
        "a window has all channels; each channel must be pooled by itself",
        (
            "window.sum(axis=(2, 3)) / (kh * kw)",
            "window.mean(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0]",
        ),
    ),
    mutant(
        "avg_pool2d",
        "the same example for all",
        "the windows are of one example; each example must be pooled by itself",
        ("window.sum(axis=(2, 3)) / (kh * kw)", "window.sum(axis=(2, 3))[1] / (kh * kw)"),
    ),
    mutant(
        "max_pool2d",
        "the maximum over all channels",
        "a window has all channels; each channel must be pooled by itself",
        ("= window.max(axis=(2, 3))", "= window.max(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0]"),
    ),
    mutant(
        "max_pool2d",
        "the same example for all",
        "the windows are of one example; each example must be pooled by itself",
        ("= window.max(axis=(2, 3))", "= window.max(axis=(2, 3))[1]"),
    ),
    mutant(
        "max_pool2d",
        "the input in place of dy",
        "dx gets the maximum itself; it must get dy at the place of the maximum",
        (
            "chosen * dy[:, :, p, q][:, :, None]",
            "np.where(chosen, window, 0) * np.ones_like(dy[:, :, p, q])[:, :, None]",
        ),
    ),
    mutant(
        "max_pool2d",
        "the maximum in place of the mask",
        "dx gets dy times the maximum, everywhere in the window; it must get dy where the maximum "
        "is",
        (
            "chosen * dy[:, :, p, q][:, :, None]",
            "window.max(2)[:, :, None] * (chosen | True) * dy[:, :, p, q][:, :, None]",
        ),
    ),
    mutant(
        "max_pool2d",
        "maxima overwritten",
        "where windows overlap and have the same maximum, the last one overwrites dx; all of them "
        "must be added",
        (
            "dpadded[:, :, rows, columns] += share.reshape(n, c, kh, kw)",
            "np.copyto(dpadded[:, :, rows, columns], share.reshape(n, c, kh, kw),"
            " where=chosen.reshape(n, c, kh, kw))",
        ),
    ),
    mutant(
        "max_pool2d",
        "stride ignored in the backward pass",
        "the backward pass looks at the windows as if the stride were 1",
        *(
            (
                "rows, columns = slice(p * sh, p * sh + kh), slice(q * sw, q * sw + kw)",
                "rows, columns = slice(p, p + kh), slice(q, q + kw)",
            ),
        ),
    ),
    mutant(
        "max_pool2d",
        "last windows left out",
        "the windows at the lower and the right edge are not visited, and their outputs stay 0",
        ("y = np.empty(", "y = np.zeros("),
        ("range(y.shape[2])", "range(y.shape[2] - 1)"),
        ("range(y.shape[3])", "range(y.shape[3] - 1)"),
        ("range(dy.shape[2])", "range(dy.shape[2] - 1)"),
        ("range(dy.shape[3])", "range(dy.shape[3] - 1)"),
    ),
    mutant(
        "max_pool2d",
        "overlaps overwritten in col2im",
        "where windows overlap, col2im overwrites dx; all parts must be added",
        (
            "dpadded[:, :, rows, columns] += share.reshape(n, c, kh, kw)",
            "parts[p, q] = share.reshape(n, c, kh, kw)",
        ),
        ("    dpadded = np.zeros(", "    parts = {}\n    dpadded = np.zeros("),
        ("    return dpadded[:, :, ph", _COL2IM + "    return dpadded[:, :, ph"),
    ),
    mutant(
        "max_pool2d",
        "windows counted as if side by side",
        "the backward pass visits H // kH times W // kW windows; with another stride, there are "
        "more",
        ("range(dy.shape[2])", "range(min(dy.shape[2], h // kh))"),
        ("range(dy.shape[3])", "range(min(dy.shape[3], w // kw))"),
    ),
    mutant(
        "max_pool2d",
        "padding with zeros",
        "the padding counts as 0, so that it is the maximum of negative numbers; it must be -inf",
        ("fill = -np.inf", "fill = 0"),
    ),
)

OTHERS = (
    mutant(
        "linear",
        "dx with the weight transposed",
        "dx is dy·Wᵀ, it must be dy·W",
        ("dx = dy @ weight", "dx = dy @ weight.T"),
    ),
    mutant(
        "linear",
        "dweight transposed",
        "dweight is transposed",
        ("dweight = dy.T @ x", "dweight = x.T @ dy"),
    ),
    mutant(
        "linear",
        "dweight a mean",
        "dweight is divided by the batch size; it must be a sum, the loss has its 1/N already",
        ("dweight = dy.T @ x", "dweight = dy.T @ x / len(x)"),
    ),
    mutant(
        "linear",
        "dbias a mean",
        "dbias is a mean over the batch; it must be a sum",
        ("dbias = dy.sum(axis=0)", "dbias = dy.mean(axis=0)"),
    ),
    mutant(
        "sigmoid",
        "derivative from x",
        "dx is dy·x·(1 - x); it must be dy·y·(1 - y), with the output y",
        ("dy * y * (1 - y)", "dy * x * (1 - x)"),
    ),
    mutant(
        "sigmoid",
        "derivative without the upstream gradient",
        "dx lacks the factor dy",
        ("dy * y * (1 - y)", "y * (1 - y)"),
    ),
    mutant(
        "sigmoid",
        "tanh in place of the sigmoid",
        "the function is tanh",
        ("y = 1 / (1 + np.exp(-x))", "y = np.tanh(x)"),
        ("dy * y * (1 - y)", "dy * (1 - y * y)"),
    ),
    mutant(
        "sigmoid",
        "derivative of tanh",
        "dx is dy·(1 - y²), which is tanh's",
        ("dy * y * (1 - y)", "dy * (1 - y * y)"),
    ),
    mutant(
        "relu",
        "cut off by the gradient",
        "dx is cut off where dy is negative; it must be where x is",
        ("dy * (x > 0)", "dy * (dy > 0)"),
    ),
    mutant(
        "relu",
        "not cut off",
        "dx is dy everywhere; it must be 0 where x is negative",
        ("dy * (x > 0)", "dy * 1"),
    ),
    mutant(
        "softmax_cross_entropy",
        "softmax over the batch",
        "the sum of the exponentials is over the examples; it must be over the classes",
        (
            "np.exp(shifted).sum(axis=1, keepdims=True)",
            "np.exp(shifted).sum(axis=0, keepdims=True)",
        ),
    ),
    mutant(
        "softmax_cross_entropy",
        "gradient without 1/N",
        "dlogits lacks the factor 1/N of the mean loss",
        ("return dlogits / n", "return dlogits"),
    ),
    mutant(
        "softmax_cross_entropy",
        "gradient divided by N twice",
        "dlogits is divided by N twice",
        ("return dlogits / n", "return dlogits / n / n"),
    ),
    mutant(
        "softmax_cross_entropy",
        "label not subtracted",
        "dlogits is softmax / N; at the label, 1 must be subtracted first",
        ("dlogits[np.arange(n), labels] -= 1", "dlogits[np.arange(n), labels] -= 0"),
    ),
    mutant(
        "softmax_cross_entropy",
        "labels of the whole batch subtracted",
        "dlogits[:, labels] -= 1 subtracts from every row at every label; it must be "
        "dlogits[np.arange(N), labels]",
        ("dlogits[np.arange(n), labels] -= 1", "dlogits[:, labels] -= 1"),
    ),
    mutant(
        "softmax_cross_entropy",
        "not shifted",
        "the logits are not shifted by their maximum, so that large ones overflow",
        ("logits - logits.max(axis=1, keepdims=True)", "logits - 0"),
    ),
    mutant(
        "softmax_cross_entropy",
        "loss a sum",
        "the loss is a sum over the batch, its gradient that of the mean",
        (".sum() / n\n", ".sum()\n"),
    ),
)


def _norm(operation: str, axis: int, x: str, x_hat: str) -> tuple[Mutant, ...]:
    """Return the mistakes that layer norm and group norm share.

    Args:
        operation: the name of the operation.
        axis: the axis of the statistics in plain.py.
        x, x_hat: the names of the input and of the normalized input there.
    """
    mean = f".mean(axis={axis}, keepdims=True)"
    dx = "(dx_hat - mean_term - variance_term)"
    return (
        mutant(
            operation,
            "dx without the mean term",
            "dx lacks - mean(dx̂): a shift of all inputs does not change y",
            (dx, "(dx_hat - variance_term)"),
        ),
        mutant(
            operation,
            "dx without the variance term",
            "dx lacks - x̂·mean(dx̂·x̂): a scale of all inputs hardly changes y",
            (dx, "(dx_hat - mean_term)"),
        ),
        mutant(
            operation,
            "dx with sums",
            "the two terms of dx have sums; they must be means",
            (f"dx_hat{mean}", f"dx_hat.sum(axis={axis}, keepdims=True)"),
            (f"(dx_hat * {x_hat}){mean}", f"(dx_hat * {x_hat}).sum(axis={axis}, keepdims=True)"),
        ),
        mutant(
            operation,
            "gamma missing from dx",
            "dx lacks the factor gamma",
            ("dy * gamma", "dy * np.ones_like(gamma)"),
        ),
        mutant(
            operation,
            "dx not divided by s",
            "dx lacks the factor 1/s",
            (f"{dx} / s", f"{dx} / np.ones_like(s)"),
        ),
        mutant(
            operation,
            "dgamma from x",
            "dgamma is the sum of dy·x; it must be that of dy·x̂, the normalized input",
            ("return gamma * x_hat + beta, (", "return gamma * x_hat + beta, (x, "),
            ("\n    x_hat, s", "\n    x, x_hat, s"),
            ("(dy * x_hat)", "(dy * x)"),
        ),
        mutant(
            operation,
            "eps left out",
            "eps is not added to the variance",
            (" + eps)", ")"),
        ),
        mutant(
            operation,
            "eps outside of the root",
            "eps is added to the standard deviation; it must be added to the variance",
            (" + eps)", ") + eps"),
        ),
        mutant(
            operation,
            "divided by the variance",
            "x is divided by the variance; it must be divided by its root",
            (
                f"s = np.sqrt((({x} - mean) ** 2){mean} + eps)",
                f"s = (({x} - mean) ** 2){mean} + eps",
            ),
        ),
        mutant(
            operation,
            "unbiased variance",
            "the variance is divided by the number of values minus 1",
            (
                f"(({x} - mean) ** 2){mean}",
                f"(({x} - mean) ** 2).sum(axis={axis}, keepdims=True) / ({x}.shape[{axis}] - 1)",
            ),
        ),
    )


NORMS = (
    *_norm("layer_norm", 1, "x", "x_hat"),
    mutant(
        "layer_norm",
        "statistics of the batch",
        "the statistics are over the batch, as in batch norm; they must be over the features",
        ("mean = x.mean(axis=1", "mean = x.mean(axis=0"),
        ("((x - mean) ** 2).mean(axis=1", "((x - mean) ** 2).mean(axis=0"),
        ("dx_hat.mean(axis=1", "dx_hat.mean(axis=0"),
        ("(dx_hat * x_hat).mean(axis=1", "(dx_hat * x_hat).mean(axis=0"),
    ),
    mutant(
        "layer_norm",
        "dx with means over the batch",
        "the terms of dx have means over the batch; they must be over the features",
        ("dx_hat.mean(axis=1", "dx_hat.mean(axis=0"),
        ("(dx_hat * x_hat).mean(axis=1", "(dx_hat * x_hat).mean(axis=0"),
    ),
    *_norm("group_norm", 2, "grouped", "grouped"),
    mutant(
        "group_norm",
        "statistics for each pixel",
        "the statistics are over the channels of a group, for each pixel by itself; they must be "
        "over the pixels as well",
        (
            "x.reshape(len(x), groups, -1)",
            "x.reshape(len(x), groups, x.shape[1] // groups, -1)",
        ),
        (
            "(dy * gamma).reshape(len(dy), groups, -1)",
            "(dy * gamma).reshape(len(dy), groups, dy.shape[1] // groups, -1)",
        ),
    ),
    mutant(
        "group_norm",
        "one group",
        "all channels are one group, as in layer norm",
        ("x.reshape(len(x), groups, -1)", "x.reshape(len(x), 1, -1)"),
        ("(dy * gamma).reshape(len(dy), groups, -1)", "(dy * gamma).reshape(len(dy), 1, -1)"),
    ),
    mutant(
        "group_norm",
        "the length of a group for the number of groups",
        "a group has as many channels as there should be groups",
        ("x.reshape(len(x), groups, -1)", "x.reshape(len(x), x.shape[1] // groups, -1)"),
        (
            "(dy * gamma).reshape(len(dy), groups, -1)",
            "(dy * gamma).reshape(len(dy), dy.shape[1] // groups, -1)",
        ),
    ),
)

COURSES = (
    mutant(
        "tanh",
        "derivative from x",
        "dx is dy·(1 - x²); it must be dy·(1 - y²), with the output y",
        ("return y, y", "return y, x"),
    ),
    mutant(
        "tanh",
        "derivative without the square",
        "dx is dy·(1 - y); it must be dy·(1 - y²)",
        ("1 - y * y", "1 - y"),
    ),
    mutant(
        "tanh",
        "derivative of the sigmoid",
        "dx is dy·y·(1 - y), which is the sigmoid's",
        ("dy * (1 - y * y)", "dy * y * (1 - y)"),
    ),
    mutant(
        "tanh",
        "derivative without the upstream gradient",
        "dx lacks the factor dy",
        ("dy * (1 - y * y)", "1 - y * y"),
    ),
    mutant(
        "leaky_relu",
        "0 for negative inputs",
        "dx is 0 where x is negative, as relu's; it must be slope·dy",
        ("dy, slope * dy", "dy, 0 * dy"),
    ),
    mutant(
        "leaky_relu",
        "the slope without the upstream gradient",
        "dx is the slope where x is negative; it must be slope·dy",
        ("dy, slope * dy", "dy, slope"),
    ),
    mutant(
        "leaky_relu",
        "the slope where x is positive",
        "the sides are exchanged: dx is slope·dy where x is positive",
        ("dy, slope * dy", "slope * dy, dy"),
    ),
    mutant(
        "dropout",
        "backward without the mask",
        "dx is dy; it must be dy·mask",
        ("return dy * mask", "return dy * np.ones_like(mask)"),
    ),
    mutant(
        "dropout",
        "backward with the mask squared",
        "dx is dy·mask²: the mask was applied twice, or its scale",
        ("return dy * mask", "return dy * mask * mask"),
    ),
    mutant(
        "svm_loss",
        "the label's margin counted",
        "the margin of the label itself, which is 1, is counted",
        ("    margins[rows, labels] = 0\n", ""),
        ("dlogits[np.arange(n), labels] = -", "dlogits[np.arange(n), labels] -= "),
    ),
    mutant(
        "svm_loss",
        "margins not cut off",
        "negative margins are counted in the loss; they must be 0",
        ("margins.sum() / n", "(logits - logits[rows, labels][:, None] + 1).sum() / n - 1"),
    ),
    mutant(
        "svm_loss",
        "loss without the margin of 1",
        "the 1 is missing in max(0, s - s_label + 1)",
        ("[:, None] + 1)", "[:, None])"),
    ),
    mutant(
        "svm_loss",
        "gradient without 1/N",
        "dlogits lacks the factor 1/N of the mean loss",
        ("(margins > 0) / n", "(margins > 0) / 1"),
    ),
    mutant(
        "svm_loss",
        "gradient of the label missing",
        "dlogits is 0 at the label; it must be minus the number of positive margins, over N",
        ("= -dlogits.sum(axis=1)", "= 0"),
    ),
    mutant(
        "svm_loss",
        "gradient of the label is -1",
        "dlogits is -1/N at the label; it must be minus the number of positive margins, over N",
        ("= -dlogits.sum(axis=1)", "= -1 / n"),
    ),
    mutant(
        "embedding",
        "repeated indices overwritten",
        "of several gradients of the same row, the last one overwrites the others; all of them "
        "must be added (np.add.at)",
        ("np.add.at(dweight, indices, dy)", "dweight[indices] = dy"),
    ),
    mutant(
        "rnn_step",
        "derivative of tanh missing",
        "the gradient is not multiplied by 1 - h²",
        ("da = dy * (1 - y * y)", "da = dy"),
    ),
    mutant(
        "rnn_step",
        "derivative of tanh at the previous state",
        "the derivative is 1 - h² of the previous state; it must be that of the next",
        ("da = dy * (1 - y * y)", "da = dy * (1 - hidden * hidden)"),
    ),
    mutant(
        "rnn_step",
        "dweight_h from the next state",
        "dWh has the next state; it must have the previous one",
        ("hidden.T @ da", "y.T @ da"),
    ),
    mutant(
        "rnn_step",
        "weights not transposed",
        "dh is da·Wh; it must be da·Whᵀ",
        ("da @ weight_h.T", "da @ weight_h"),
    ),
    mutant(
        "rnn_step",
        "dbias a mean",
        "db is a mean over the batch; it must be a sum",
        ("da.sum(axis=0)", "da.mean(axis=0)"),
    ),
)

MUTANTS = BATCH_NORM + CONV2D + POOLING + OTHERS + NORMS + COURSES

_CACHE = "training, axes, m), (moving_mean"
_UNPACKED = "x_hat, s, gamma, training, axes, m = cache"
_VARIANCE = "(dx_hat * x_hat).sum(axis=axes, keepdims=True) / m"
_LOSS = "loss = -log_p[np.arange(n), labels].sum() / n"

CONVENTIONS = (
    mutant(
        "batch_norm",
        "unbiased batch variance",
        "the batch variance is divided by m - 1, and the backward pass belongs to that",
        (
            "((x - mean) ** 2).sum(axis=axes, keepdims=True) / m",
            "((x - mean) ** 2).sum(axis=axes, keepdims=True) / (m - 1)",
        ),
        (_VARIANCE, _VARIANCE.replace("/ m", "/ (m - 1)")),
    ),
    mutant(
        "batch_norm",
        "eps outside of the root",
        "the output is divided by √v + eps, and the backward pass belongs to that",
        ("s = np.sqrt(var + eps)", "s = np.sqrt(var) + eps"),
        (_CACHE, _CACHE.replace("m)", "m, eps)")),
        (_UNPACKED, _UNPACKED.replace("m =", "m, eps =")),
        (_VARIANCE, f"{_VARIANCE} * s / (s - eps)"),
    ),
    MOVING_VARIANCE_UNBIASED,
    MOMENTUM_REVERSED,
    mutant(
        "batch_norm",
        "eps in the moving variance",
        "the moving variance is the average of var + eps, and prediction divides by its root",
        (
            "moving_var = momentum * moving_var + (1 - momentum) * var",
            "moving_var = momentum * moving_var + (1 - momentum) * (var + eps)",
        ),
        ("mean, var = moving_mean, moving_var", "mean, var = moving_mean, moving_var - eps"),
    ),
    mutant(
        "linear",
        "means over the batch",
        "dweight and dbias are divided by the number of examples, and the loss is not",
        ("dweight = dy.T @ x", "dweight = dy.T @ x / len(x)"),
        ("dbias = dy.sum(axis=0)", "dbias = dy.mean(axis=0)"),
    ),
    mutant(
        "conv2d",
        "means over the batch",
        "dweight and dbias are divided by the number of examples, and the loss is not",
        ("return dx, dweight, dbias", "return dx, dweight / n, dbias / n"),
    ),
    mutant(
        "batch_norm",
        "means over the batch",
        "dgamma and dbeta are divided by the number of examples, and the loss is not",
        ("return dx, dgamma, dbeta", "return dx, dgamma / len(dy), dbeta / len(dy)"),
    ),
    mutant(
        "avg_pool2d",
        "padding not counted",
        "windows at the edge are divided by how many pixels of the image they see",
        (
            "window.sum(axis=(2, 3)) / (kh * kw)",
            "window.sum(axis=(2, 3)) / (min(p * sh + kh, h - ph) - max(p * sh, ph))"
            " / (min(q * sw + kw, w - pw) - max(q * sw, pw))",
        ),
        (
            _SHARE,
            "share = dy[:, :, p, q] / (min(p * sh + kh, shape[2] - ph) - max(p * sh, ph))"
            " / (min(q * sw + kw, shape[3] - pw) - max(q * sw, pw))",
        ),
    ),
    TIES_SHARED_OUT,
    mutant(
        "max_pool2d",
        "ties to the last",
        "of several elements that equal the maximum, the last gets dy",
        (
            "first = window.argmax(axis=2)[:, :, None]",
            "first = kh * kw - 1 - window[:, :, ::-1].argmax(axis=2)[:, :, None]",
        ),
    ),
    mutant("relu", "the gradient at 0 is 1", "dx is dy where x is 0", ("(x > 0)", "(x >= 0)")),
    mutant(
        "softmax_cross_entropy",
        "sums over the batch",
        "the loss is a sum over the batch, and so is its gradient",
        (_LOSS, _LOSS.removesuffix(" / n")),
        ("return dlogits / n", "return dlogits"),
    ),
    mutant(
        "softmax_cross_entropy",
        "the gradient of the sum",
        "the gradient is not divided by the number of examples, though the loss is",
        ("return dlogits / n", "return dlogits"),
    ),
    mutant(
        "softmax_cross_entropy",
        "a loss for each example",
        "the loss is a vector, and the gradient is that of its sum",
        (_LOSS, "loss = -log_p[np.arange(n), labels]"),
        ("return dlogits / n", "return dlogits"),
    ),
    mutant(
        "softmax_cross_entropy",
        "a loss for each example, the gradient of their mean",
        "the loss is a vector, and the gradient is that of its mean",
        (_LOSS, "loss = -log_p[np.arange(n), labels]"),
    ),
    *(
        mutant(
            "softmax_cross_entropy",
            f"log(p + {small:g})",
            f"the loss is the logarithm of p + {small:g}, so that it stays finite",
            (
                "log_p[np.arange(n), labels].sum()",
                f"np.log(np.exp(log_p[np.arange(n), labels]) + {small}).sum()",
            ),
        )
        for small in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
    ),
    mutant(
        "svm_loss",
        "sums over the batch",
        "the loss is a sum over the batch, and so is its gradient",
        ("return margins.sum() / n", "return margins.sum()"),
        ("dlogits = (margins > 0) / n", "dlogits = (margins > 0) * 1.0"),
    ),
)
"""Other definitions of operations that are also right, each with its own backward pass."""
