"""Define the operations of `npbn.functional` again, in plain and slow NumPy code.

This code does not use `npbn.functional`; a test compares the results of both. Each operation is
written as directly as possible, so typical mistakes of people are small changes to this code. The
catalogue of mistakes, `npbn.verify.mutants`, is a list of changes to lines of this file. If a line
here is edited, the catalogue may need the same edit.
"""

import numpy as np


def batch_norm(x, gamma, beta, moving_mean, moving_var, training, eps=1e-5, momentum=0.9):
    axes = (0,) if x.ndim == 2 else (0, 2, 3)
    m = x.size // gamma.size
    if training:
        mean = x.sum(axis=axes, keepdims=True) / m
        var = ((x - mean) ** 2).sum(axis=axes, keepdims=True) / m
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * var
    else:
        mean, var = moving_mean, moving_var
    s = np.sqrt(var + eps)
    x_hat = (x - mean) / s
    y = gamma * x_hat + beta
    return y, (x_hat, s, gamma, training, axes, m), (moving_mean, moving_var)


def batch_norm_backward(dy, cache):
    x_hat, s, gamma, training, axes, m = cache
    dbeta = dy.sum(axis=axes, keepdims=True)
    dgamma = (dy * x_hat).sum(axis=axes, keepdims=True)
    dx_hat = dy * gamma
    if training:
        mean_term = dx_hat.sum(axis=axes, keepdims=True) / m
        variance_term = x_hat * (dx_hat * x_hat).sum(axis=axes, keepdims=True) / m
        dx = (dx_hat - mean_term - variance_term) / s
    else:
        dx = dx_hat / s
    return dx, dgamma, dbeta


def conv2d(x, weight, bias, stride=(1, 1), padding=(0, 0)):
    (sh, sw), (ph, pw) = stride, padding
    out, _, kh, kw = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    n, _, h, w = padded.shape
    y = np.empty((n, out, (h - kh) // sh + 1, (w - kw) // sw + 1))
    for p in range(y.shape[2]):
        for q in range(y.shape[3]):
            window = padded[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw]
            y[:, :, p, q] = np.tensordot(window, weight, axes=((1, 2, 3), (1, 2, 3)))
    y = y + bias.reshape(1, out, 1, 1)
    return y, (padded, weight, stride, padding)


def conv2d_backward(dy, cache):
    padded, weight, (sh, sw), (ph, pw) = cache
    _, _, kh, kw = weight.shape
    n, _, h, w = padded.shape
    dpadded, dweight = np.zeros(padded.shape), np.zeros(weight.shape)
    for p in range(dy.shape[2]):
        for q in range(dy.shape[3]):
            rows, columns = slice(p * sh, p * sh + kh), slice(q * sw, q * sw + kw)
            dweight += np.tensordot(dy[:, :, p, q], padded[:, :, rows, columns], axes=(0, 0))
            dpadded[:, :, rows, columns] += np.tensordot(dy[:, :, p, q], weight, axes=(1, 0))
    dx = dpadded[:, :, ph : h - ph, pw : w - pw]
    dbias = dy.sum(axis=(0, 2, 3))
    return dx, dweight, dbias


def avg_pool2d(x, kernel_size, stride, padding=(0, 0)):
    (kh, kw), (sh, sw), (ph, pw) = kernel_size, stride, padding
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    n, c, h, w = padded.shape
    y = np.empty((n, c, (h - kh) // sh + 1, (w - kw) // sw + 1))
    for p in range(y.shape[2]):
        for q in range(y.shape[3]):
            window = padded[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw]
            y[:, :, p, q] = window.sum(axis=(2, 3)) / (kh * kw)
    return y, (padded.shape, kernel_size, stride, padding)


def avg_pool2d_backward(dy, cache):
    shape, (kh, kw), (sh, sw), (ph, pw) = cache
    dpadded = np.zeros(shape)
    for p in range(dy.shape[2]):
        for q in range(dy.shape[3]):
            share = dy[:, :, p, q] / (kh * kw)
            dpadded[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw] += share[:, :, None, None]
    return dpadded[:, :, ph : shape[2] - ph, pw : shape[3] - pw]


def max_pool2d(x, kernel_size, stride, padding=(0, 0)):
    (kh, kw), (sh, sw), (ph, pw) = kernel_size, stride, padding
    fill = -np.inf
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)), constant_values=fill)
    n, c, h, w = padded.shape
    y = np.empty((n, c, (h - kh) // sh + 1, (w - kw) // sw + 1))
    for p in range(y.shape[2]):
        for q in range(y.shape[3]):
            window = padded[:, :, p * sh : p * sh + kh, q * sw : q * sw + kw]
            y[:, :, p, q] = window.max(axis=(2, 3))
    return y, (padded, kernel_size, stride, padding)


def max_pool2d_backward(dy, cache):
    padded, (kh, kw), (sh, sw), (ph, pw) = cache
    n, c, h, w = padded.shape
    dpadded = np.zeros(padded.shape)
    for p in range(dy.shape[2]):
        for q in range(dy.shape[3]):
            rows, columns = slice(p * sh, p * sh + kh), slice(q * sw, q * sw + kw)
            window = padded[:, :, rows, columns].reshape(n, c, -1)
            first = window.argmax(axis=2)[:, :, None]
            chosen = np.arange(kh * kw) == first
            share = chosen * dy[:, :, p, q][:, :, None]
            dpadded[:, :, rows, columns] += share.reshape(n, c, kh, kw)
    return dpadded[:, :, ph : h - ph, pw : w - pw]


def linear(x, weight, bias):
    return x.reshape(len(x), -1) @ weight.T + bias, (x, weight)


def linear_backward(dy, cache):
    x, weight = cache
    shape, x = x.shape, x.reshape(len(x), -1)
    dx = dy @ weight
    dweight = dy.T @ x
    dbias = dy.sum(axis=0)
    return dx.reshape(shape), dweight, dbias


def sigmoid(x):
    y = 1 / (1 + np.exp(-x))
    return y, (x, y)


def sigmoid_backward(dy, cache):
    x, y = cache
    return dy * y * (1 - y)


def relu(x):
    return np.maximum(x, 0), x


def relu_backward(dy, x):
    return dy * (x > 0)


def softmax_cross_entropy(logits, labels):
    n = logits.shape[0]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(n), labels].sum() / n
    return loss, (np.exp(log_p), labels, n)


def softmax_cross_entropy_backward(cache):
    p, labels, n = cache
    dlogits = p.copy()
    dlogits[np.arange(n), labels] -= 1
    return dlogits / n


def layer_norm(x, gamma, beta, eps=1e-5):
    mean = x.mean(axis=1, keepdims=True)
    s = np.sqrt(((x - mean) ** 2).mean(axis=1, keepdims=True) + eps)
    x_hat = (x - mean) / s
    return gamma * x_hat + beta, (x_hat, s, gamma)


def layer_norm_backward(dy, cache):
    x_hat, s, gamma = cache
    dx_hat = dy * gamma
    mean_term = dx_hat.mean(axis=1, keepdims=True)
    variance_term = x_hat * (dx_hat * x_hat).mean(axis=1, keepdims=True)
    dx = (dx_hat - mean_term - variance_term) / s
    return dx, (dy * x_hat).sum(axis=0), dy.sum(axis=0)


def group_norm(x, gamma, beta, groups, eps=1e-5):
    grouped = x.reshape(len(x), groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    s = np.sqrt(((grouped - mean) ** 2).mean(axis=2, keepdims=True) + eps)
    x_hat = ((grouped - mean) / s).reshape(x.shape)
    return gamma * x_hat + beta, (x_hat, s, gamma, groups)


def group_norm_backward(dy, cache):
    x_hat, s, gamma, groups = cache
    dx_hat = (dy * gamma).reshape(len(dy), groups, -1)
    grouped = x_hat.reshape(dx_hat.shape)
    mean_term = dx_hat.mean(axis=2, keepdims=True)
    variance_term = grouped * (dx_hat * grouped).mean(axis=2, keepdims=True)
    dx = ((dx_hat - mean_term - variance_term) / s).reshape(dy.shape)
    axes = (0, 2, 3)
    dgamma = (dy * x_hat).sum(axis=axes, keepdims=True)
    return dx, dgamma, dy.sum(axis=axes, keepdims=True)


def tanh(x):
    y = np.tanh(x)
    return y, y


def tanh_backward(dy, y):
    return dy * (1 - y * y)


def leaky_relu(x, slope=0.01):
    return np.where(x > 0, x, slope * x), (x, slope)


def leaky_relu_backward(dy, cache):
    x, slope = cache
    return np.where(x > 0, dy, slope * dy)


def dropout(x, mask):
    return x * mask, mask


def dropout_backward(dy, mask):
    return dy * mask


def svm_loss(logits, labels):
    n = logits.shape[0]
    rows = np.arange(n)
    margins = np.maximum(0, logits - logits[rows, labels][:, None] + 1)
    margins[rows, labels] = 0
    return margins.sum() / n, (margins, labels, n)


def svm_loss_backward(cache):
    margins, labels, n = cache
    dlogits = (margins > 0) / n
    dlogits[np.arange(n), labels] = -dlogits.sum(axis=1)
    return dlogits


def embedding(indices, weight):
    return weight[indices], (indices, weight.shape)


def embedding_backward(dy, cache):
    indices, shape = cache
    dweight = np.zeros(shape)
    np.add.at(dweight, indices, dy)
    return dweight


def rnn_step(x, hidden, weight_x, weight_h, bias):
    y = np.tanh(x @ weight_x + hidden @ weight_h + bias)
    return y, (x, hidden, weight_x, weight_h, y)


def rnn_step_backward(dy, cache):
    x, hidden, weight_x, weight_h, y = cache
    da = dy * (1 - y * y)
    return da @ weight_x.T, da @ weight_h.T, x.T @ da, hidden.T @ da, da.sum(axis=0)
