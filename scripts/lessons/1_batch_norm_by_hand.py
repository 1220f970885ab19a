# %% [markdown]
# # Batch norm forward and backward, by hand
#
# This lesson computes batch norm for a batch of four examples with three features. The forward pass
# goes through the computational graph one node at a time. The backward pass goes through the nodes
# in the opposite order. The lesson prints every number and checks every gradient at once. An
# `assert` checks every claim about the numbers, so the file fails if a claim is wrong.
#
# The training code of npbn is in `npbn/functional/batch_norm.py`. The docstring of that file
# contains the derivation of this lesson. At the end, the lesson compares the numbers of the lesson
# with the results of the training code.

# %%
from _lesson import BLUE, ORANGE, draw_matrix, print_arrays, start

lesson = start()

import functools

import matplotlib.pyplot as plt
import numpy as np

from npbn import functional as F
from npbn.verify import complex_step

# %% [markdown]
# ## Forward
#
# Each row of `x` is an example, and each column of `x` is a feature. Batch norm treats each column
# separately. In this lesson, $\epsilon$ is 0.25. The usual $\epsilon$ of $10^{-5}$ would have no
# visible effect on the printed numbers. With $\epsilon = 0.25$, the square roots are also simple
# numbers.

# %%
x = np.array([[1.0, 4, 1], [3, 12, -5], [-1, 8, 1], [1, 16, -1]])
gamma = np.array([[1.5, -0.5, 2]])  # gamma scales each feature
beta = np.array([[0.0, 1, -1]])  # beta shifts each feature
eps = 0.25
m = len(x)
print_arrays(x=x, gamma=gamma, beta=beta)

# %% [markdown]
# The graph shows the nodes of the forward pass. An arrow leads from each node to the nodes that use
# the value of the node:
#
# ```
# x ──┬──────────────────► x_centred ──┬─────────────────────────────► x_hat ──► y
#     │                        ▲       │                                 ▲
#     └──► mean ───────────────┘       └──► q ──► v ──► s ──► r ─────────┘
# ```
#
# | node | | in words |
# | --- | --- | --- |
# | `mean` | $\mu = \frac{1}{m} \sum_i x_i$ | the mean over the batch |
# | `x_centred` | $\bar{x}_i = x_i - \mu$ | the centred value |
# | `q` | $q_i = \bar{x}_i^2$ | the square of the centred value |
# | `v` | $v = \frac{1}{m} \sum_i q_i$ | the variance |
# | `s` | $s = \sqrt{v + \epsilon}$ | the standard deviation, except for $\epsilon$ |
# | `r` | $r = 1 / s$ | the reciprocal of `s` |
# | `x_hat` | $\hat{x}_i = \bar{x}_i r$ | the normalized value |
# | `y` | $y_i = \gamma \hat{x}_i + \beta$ | the scaled and shifted value |

# %%
mean = np.mean(x, axis=0, keepdims=True)
x_centred = x - mean
print_arrays(mean=mean, x_centred=x_centred)

q = x_centred**2
v = np.mean(q, axis=0, keepdims=True)
print_arrays(q=q, v=v)

s = np.sqrt(v + eps)
r = 1 / s
print_arrays(s=s, r=r)

x_hat = x_centred * r
y = gamma * x_hat + beta
print_arrays(x_hat=x_hat, y=y)

# %% [markdown]
# Batch norm removes the original mean and the original spread of each feature. The normalized
# feature $\hat{x}$ has mean 0 and variance $v / s^2 = 1 - \epsilon / s^2$, which is slightly less
# than 1. So $y$ has the mean $\beta$ and a standard deviation near $|\gamma|$. The network learns
# $\gamma$ and $\beta$, so the network chooses the mean and the standard deviation of $y$.

# %%
np.testing.assert_allclose(np.mean(x_hat, axis=0, keepdims=True), 0, atol=1e-15)
np.testing.assert_allclose(np.var(x_hat, axis=0, keepdims=True), 1 - eps / s**2)
np.testing.assert_allclose(np.mean(y, axis=0, keepdims=True), beta, atol=1e-15)
print_arrays(variance_of_x_hat=np.var(x_hat, axis=0), standard_deviation_of_y=np.std(y, axis=0))

# %% [markdown]
# ## What a gradient is, and how to check one
#
# The upstream gradient $dy_i = \partial L / \partial y_i$ says how the loss $L$ changes with each
# element of $y$. In a network, the layers above batch norm compute the upstream gradient. In this
# lesson, the upstream gradient is made up, and the loss is $L = \sum_i dy_i y_i$. The derivative of
# this loss with respect to $y_i$ is exactly $dy_i$. For every node $z$, the gradient is
# $dz = \partial L / \partial z$. The gradient $dz$ says how much $L$ grows if a small number is
# added to $z$ and all nodes that depend on $z$ are recomputed.
#
# The function `loss` computes the forward pass with a `change` added to one node. The *complex
# step* computes the derivative from the loss after a tiny imaginary change. The formula contains no
# subtraction, so no digits of the derivative cancel:
#
# $$\frac{\partial L}{\partial z} = \frac{\mathrm{Im}  L(z + i h)}{h} \qquad h = 10^{-30}$$

# %%
dy = np.array([[1.0, -1, 2], [0, 3, 1], [2, 1, -1], [-1, 1, 0]])


def loss(node: str, change: np.ndarray, dy: np.ndarray = dy) -> np.ndarray:
    """Return the loss L after `change` is added to the node with the name `node`.

    The function recomputes all nodes that depend on `node`. `dy` is the upstream gradient.
    """

    def changed(name: str, value: np.ndarray) -> np.ndarray:
        return value + change if name == node else value

    x_ = changed("x", x)
    mean = changed("mean", np.mean(x_, axis=0, keepdims=True))
    x_centred = changed("x_centred", x_ - mean)
    q = changed("q", x_centred**2)
    v = changed("v", np.mean(q, axis=0, keepdims=True))
    s = changed("s", np.sqrt(v + eps))
    r = changed("r", 1 / s)
    x_hat = changed("x_hat", x_centred * r)
    y = changed("gamma", gamma) * x_hat + changed("beta", beta)
    loss: np.ndarray = np.sum(dy * y)
    return loss


def check(node: str, gradient: np.ndarray) -> None:
    numeric = complex_step(lambda change: loss(node, change), np.zeros(gradient.shape))
    error = np.max(np.abs(gradient - numeric))
    print_arrays(**{f"d{node}": gradient})
    print(f"    largest error: {error:.1e}")
    assert error < 1e-14


print_arrays(dy=dy)

# %% [markdown]
# ## Backward
#
# The backward pass follows the arrows of the graph in the opposite direction. The backward pass
# needs only two rules:
#
# - To pass a gradient back through a node, multiply the gradient by the derivative of the node.
# - If a value is used in several places (in several nodes or for all examples), add up the
#   gradients from all these places.
#
# **y = gamma x_hat + beta.** All examples use the same `gamma` and the same `beta`, so the
# gradients of `gamma` and `beta` are sums over the batch.

# %%
dbeta = np.sum(dy, axis=0, keepdims=True)
check("beta", dbeta)

dgamma = np.sum(dy * x_hat, axis=0, keepdims=True)
check("gamma", dgamma)

dx_hat = dy * gamma
check("x_hat", dx_hat)

# %% [markdown]
# **x_hat = x_centred r.** The node `x_hat` is a product, so each factor gets the gradient of
# `x_hat` times the other factor. All examples use the same `r`, so the gradient of `r` is a sum
# over the examples. The node `x_centred` has two paths to the loss. One path goes directly to
# `x_hat`, and the other path goes through `q`. The variable `dx_centred_direct` contains only the
# gradient along the direct path, so the next cell cannot check the gradient of `x_centred` yet.

# %%
dx_centred_direct = dx_hat * r
print_arrays(dx_centred_direct=dx_centred_direct)

dr = np.sum(dx_hat * x_centred, axis=0, keepdims=True)
check("r", dr)

# %% [markdown]
# **r = 1 / s.** The derivative of `r` with respect to `s` is $-1 / s^2$.
#
# **s = √(v + eps).** The derivative of `s` with respect to `v` is $1 / (2 s)$.

# %%
ds = -dr / s**2
check("s", ds)

dv = ds / (2 * s)
check("v", dv)

# %% [markdown]
# **v = mean(q).** Each of the $m$ elements of `q` enters the mean with the factor $1 / m$, so every
# element of `q` gets the gradient $dv / m$.

# %%
dq = np.broadcast_to(dv / m, q.shape)
check("q", dq)

# %% [markdown]
# **q = x_centred².** The node `q` is on the second path from `x_centred` to the loss. The
# derivative of `q` with respect to `x_centred` is $2 \bar{x}$. The sum of the gradients along both
# paths is the complete gradient of `x_centred`.

# %%
dx_centred = dx_centred_direct + 2 * x_centred * dq
check("x_centred", dx_centred)

# %% [markdown]
# **x_centred = x - mean.** Batch norm subtracts the mean from all examples, so the gradient of the
# mean is minus the sum of `dx_centred` over the examples.

# %%
dmean = -np.sum(dx_centred, axis=0, keepdims=True)
check("mean", dmean)

# %% [markdown]
# **mean = mean(x).** Each example enters the mean with the factor $1 / m$. So the path from $x$
# through the mean gives each example the gradient $d\mu / m$. The other path goes from $x$ directly
# to `x_centred`. The sum of the gradients along both paths is $dx$, which is the last gradient of
# the backward pass.

# %%
dx = dx_centred + dmean / m
check("x", dx)

# %% [markdown]
# ## From the stages to one formula
#
# The path through `q` has four gradients: $dr = \sum_k d\hat{x}_k \bar{x}_k$, $ds = -dr / s^2$,
# $dv = ds / (2 s)$ and $dq = dv / m$. Together, the four gradients give the part of $d\bar{x}_i$
# that comes through `q`:
#
# $$2 \bar{x}_i  dq = 2 \bar{x}_i \cdot \frac{1}{m} \cdot \frac{1}{2 s} \cdot \frac{-1}{s^2}
#   \sum_k d\hat{x}_k \bar{x}_k = -\frac{1}{s}  \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k
#   \hat{x}_k$$
#
# The last step distributes the three factors $1 / s$ of the formula. One factor turns $\bar{x}_i$
# into $\hat{x}_i$, one factor turns $\bar{x}_k$ into $\hat{x}_k$, and one factor remains. The
# complete gradient $d\bar{x}_i$ is the sum of the direct part $d\hat{x}_i / s$ and the part through
# `q`:
#
# $$d\bar{x}_i = \frac{1}{s} \Big( d\hat{x}_i - \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k
#   \hat{x}_k \Big)$$

# %%
along_x_hat = np.mean(dx_hat * x_hat, axis=0, keepdims=True)
np.testing.assert_allclose((dx_hat - x_hat * along_x_hat) / s, dx_centred, atol=1e-15)
print_arrays(dx_centred_in_one=(dx_hat - x_hat * along_x_hat) / s)

# %% [markdown]
# The gradient of the mean is $d\mu = -\sum_i d\bar{x}_i$. The second term of $d\bar{x}_i$ is a
# number times $\hat{x}_i$. In the sum over $i$, the second term vanishes, because
# $\sum_i \hat{x}_i = 0$. So $d\mu = -\frac{1}{s} \sum_i d\hat{x}_i$, and the gradient
# $dx_i = d\bar{x}_i + d\mu / m$ is
#
# $$dx_i = \frac{1}{s} \Big( d\hat{x}_i - \frac{1}{m} \sum_k d\hat{x}_k - \hat{x}_i \cdot
#   \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$
#
# Finally, replace $d\hat{x}_i$ by $\gamma  dy_i$. The two sums become $\gamma  d\beta$ and
# $\gamma  d\gamma$. The backward pass computes $d\beta$ and $d\gamma$ anyway, so $dx$ needs no
# other sums:
#
# $$dx_i = \frac{\gamma}{s} \Big( dy_i - \frac{d\beta}{m} - \hat{x}_i  \frac{d\gamma}{m} \Big)$$

# %%
np.testing.assert_allclose(-np.sum(dx_hat, axis=0, keepdims=True) / s, dmean, atol=1e-15)

closed_form = gamma / s * (dy - dbeta / m - x_hat * dgamma / m)
np.testing.assert_allclose(closed_form, dx, atol=1e-15)
print_arrays(closed_form=closed_form)
print(f"    largest difference from the stages: {np.max(np.abs(closed_form - dx)):.1e}")

# %% [markdown]
# ## What the three terms mean
#
# If the mean and the variance were constants, $y$ would be a linear function of $x$ with the slope
# $\gamma / s$. But the mean and the variance are not constants. A change of one $x_i$ changes the
# mean and the variance, and so changes *all* elements of $y$.
#
# **The mean path** is the term $-d\beta / m$, which subtracts the mean of $dy$. If the same number
# is added to all $x_i$ of a feature, $y$ does not change. So the gradient must not ask for such a
# change, and every column of $dx$ has the sum 0.
#
# **The variance path** is the term $-\hat{x}_i d\gamma / m$, which subtracts the part of $dy$ that
# is proportional to $\hat{x}$. If all $\bar{x}_i$ of a feature are multiplied by the same factor,
# $y$ changes only a little. So the gradient must ask for almost no such change. The small change of
# $y$ comes from $\epsilon$, because the factor does not multiply $\epsilon$. So the fraction
# $\epsilon / s^2$ of the part along $\hat{x}$ remains in the gradient.

# %%
zero = np.zeros((1, 3))
np.testing.assert_allclose(loss("x", zero + 7), loss("x", zero))
np.testing.assert_allclose(np.sum(dx, axis=0, keepdims=True), zero, atol=1e-14)
print_arrays(sum_of_dy=np.sum(dy, axis=0), sum_of_dx=np.sum(dx, axis=0))

before = np.sum(gamma / s * dy * x_hat, axis=0)
after = np.sum(dx * x_hat, axis=0)
np.testing.assert_allclose(after / before, (eps / s**2)[0])
print_arrays(along_x_hat_before=before, along_x_hat_after=after, fraction=after / before)
print_arrays(eps_by_s_squared=eps / s**2)

# %% [markdown]
# The picture shows the effect of both paths on 40 examples of one feature. The picture uses the
# usual $\epsilon = 10^{-5}$ and leaves out the factor $\gamma / s$. In each panel, the line is a
# least-squares fit to the points. Except for $\epsilon$, $\hat{x}$ has mean 0 and variance 1. So
# the line through $dy$ in the first panel has the slope $d\gamma / m$, and at $\hat{x} = 0$ the
# line has the height $d\beta / m$, which is the mean of $dy$. So, except for $\epsilon$, the
# backward pass of batch norm is a *linear regression*: the backward pass fits a line to the
# incoming gradient and passes on the residuals.

# %%
rng = np.random.default_rng(0)
many = np.sort(rng.normal(size=40))
many_hat = (many - np.mean(many)) / np.sqrt(np.var(many) + 1e-5)
many_dy = 1.0 + 0.8 * many_hat + 0.5 * rng.normal(size=40)

mean_path = -np.mean(many_dy)
variance_path = -many_hat * np.mean(many_dy * many_hat)
panels = {
    "$dy$, as it comes": many_dy,
    "with the mean path:\n$dy - d\\beta / m$": many_dy + mean_path,
    "with the variance path:\n$dy - \\hat{x}\\; d\\gamma / m$": many_dy + variance_path,
    "with both, as in $dx$:\n$dy - d\\beta / m - \\hat{x}\\; d\\gamma / m$": (
        many_dy + mean_path + variance_path
    ),
}

figure, rows = plt.subplots(1, 4, figsize=(12, 3.6), sharex=True, sharey=True)
for axes, (title, gradient) in zip(rows, panels.items(), strict=True):
    slope, height = np.round(np.polyfit(many_hat, gradient, 1), 3) + 0.0
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.plot(many_hat, gradient, "o", color=BLUE, markersize=5, alpha=0.8)
    axes.plot(many_hat, height + slope * many_hat, color=ORANGE, linewidth=2.5)
    axes.set_title(title)
    axes.text(0.04, 0.92, f"mean {height:.2f}, slope {slope:.2f}", transform=axes.transAxes)
    axes.set_xlabel(r"$\hat{x}_i$")
rows[0].set_ylabel("gradient (one point for each example)")
lesson.show(figure, "three_terms")

slope, height = np.polyfit(many_hat, many_dy + mean_path + variance_path, 1)
assert abs(height) < 1e-14 and abs(slope) < 1e-4

# %% [markdown]
# ## Why a check with an upstream gradient of ones is worthless
#
# A simple way to check a backward pass uses the loss $L = \sum_i y_i$ with an upstream gradient
# $dy$ of ones. But $\sum_i y_i = m \beta$ for every $x$, so the true $dx$ is 0. The gradient
# $d\gamma = \sum_i \hat{x}_i$ is also 0. The variance path is a multiple of $d\gamma$, so the
# variance path is 0 even if the factor is wrong. The next cell computes the errors of four wrong
# backward passes. The first column has the errors for a $dy$ of ones, and the second column has the
# errors for the $dy$ of this lesson.

# %%
ones = np.ones_like(dy)


def backward(dy: np.ndarray, mean_path: float = 1, variance_path: float = 1) -> np.ndarray:
    """Return `dx` for the upstream gradient `dy`, with a factor for each of the two paths.

    The right value is 1 for both factors, `mean_path` and `variance_path`.
    """
    dbeta = np.sum(dy, axis=0, keepdims=True)
    dgamma = np.sum(dy * x_hat, axis=0, keepdims=True)
    dx: np.ndarray = gamma / s * (dy - mean_path * dbeta / m - variance_path * x_hat * dgamma / m)
    return dx


errors: dict[str, list[float]] = {}
print("                             dy of ones   our dy")
for name, mean_path, variance_path in (
    ("right", 1, 1),
    ("without the variance path", 1, 0),
    ("variance path twice", 1, 2),
    ("variance path with a plus", 1, -1),
    ("without the mean path", 0, 1),
):
    errors[name] = []
    for upstream in (ones, dy):
        analytic = backward(upstream, mean_path, variance_path)
        numeric = complex_step(functools.partial(loss, "x", dy=upstream), np.zeros_like(x))
        errors[name].append(np.max(np.abs(analytic - numeric)))
    print(f"{name:27}  {errors[name][0]:10.1e}   {errors[name][1]:.1e}")

assert all(with_ones < 1e-14 for with_ones, _ in list(errors.values())[:4])
assert all(with_dy > 0.1 for _, with_dy in list(errors.values())[1:])

# %% [markdown]
# With a $dy$ of ones, the check finds only one of the four mistakes, which is the missing mean
# path. So npbn checks gradients with random upstream gradients. A table in `npbn/verify/README.md`
# lists 64 mistakes and shows which check finds which mistake.
#
# ## Prediction
#
# In prediction, the result for an example must not depend on the other examples of the batch. So
# prediction uses a moving mean and a moving variance. Each training step updates both moving
# averages. The argument `momentum` is the fraction of the old average that a step keeps. With a
# `momentum` of 0.9, the update is
#
# $$\text{moving} \leftarrow 0.9 \cdot \text{moving} + 0.1 \cdot \text{batch}$$
#
# In prediction, the moving averages are constants, so the mean path and the variance path do not
# exist. The gradient in prediction is $dx_i = \gamma  dy_i / s$, where $s$ comes from the moving
# variance.

# %%
moving_mean, moving_var = np.zeros((1, 3)), np.ones((1, 3))
_, _, (moving_mean, moving_var) = F.batch_norm(
    x, gamma, beta, moving_mean, moving_var, training=True, eps=eps, momentum=0.9
)
np.testing.assert_allclose(moving_mean, 0.9 * 0 + 0.1 * mean)
np.testing.assert_allclose(moving_var, 0.9 * 1 + 0.1 * v)
print_arrays(moving_mean=moving_mean, moving_var=moving_var)


def predict(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = gamma * (x - moving_mean) / np.sqrt(moving_var + eps) + beta
    return y


dx_prediction = gamma * dy / np.sqrt(moving_var + eps)
error = np.max(np.abs(dx_prediction - complex_step(lambda x: np.sum(dy * predict(x)), x)))
print_arrays(dx_prediction=dx_prediction, its_sum=np.sum(dx_prediction, axis=0))
print(f"    largest error: {error:.1e}")
assert error < 1e-14

# %% [markdown]
# The derivatives of each $\hat{x}_i$ with respect to each $x_k$ show the difference between
# training and prediction. The picture shows these derivatives for the second feature. In training,
# the derivatives are
#
# $$\frac{\partial \hat{x}_i}{\partial x_k} = \frac{1}{s} \Big( [i = k] - \frac{1}{m} -
#   \frac{\hat{x}_i \hat{x}_k}{m} \Big)$$
#
# So in training, every example changes the results for all other examples. In prediction, every
# example changes only its own result.

# %%
column = x[:, 1]


def normalize(column: np.ndarray) -> np.ndarray:
    centred = column - np.mean(column)
    normalized: np.ndarray = centred / np.sqrt(np.mean(centred**2) + eps)
    return normalized


training = complex_step(normalize, column)
hat = x_hat[:, 1]
np.testing.assert_allclose(training, (np.eye(m) - 1 / m - np.outer(hat, hat) / m) / s[0, 1])
prediction = np.eye(m) / np.sqrt(moving_var[0, 1] + eps)

figure, rows = plt.subplots(1, 2, figsize=(8, 4.2))
draw_matrix(rows[0], training, "in training")
draw_matrix(rows[1], prediction, "in prediction")
for axes in rows:
    axes.set_xlabel(r"example $k$ of $x_k$")
    axes.set_ylabel(r"example $i$ of $\hat{x}_i$")
figure.suptitle(r"$\partial \hat{x}_i / \partial x_k$, feature 2")
lesson.show(figure, "derivatives")

# %% [markdown]
# ## A batch of 1, and of 2
#
# In a batch of one value, the mean is the only value. So $\bar{x} = 0$, $\hat{x} = 0$ and
# $y = \beta$ for every $x$. The gradients $dx$ and $d\gamma$ are also 0, so the layers below batch
# norm learn nothing. (PyTorch refuses a batch of one value. npbn computes the result of the
# formula. For images, the number of values is $m = N H W$, so a batch of one image is enough.)
#
# A batch of two values is hardly better. With the usual $\epsilon$, $\hat{x}$ is $-1$ for the
# smaller value and $1$ for the larger value, whatever the values are. The gradient $dx$ is close to
# 0, because the backward pass is a linear regression. A straight line fits two points exactly, so
# the regression leaves no residuals.

# %%
for size in (1, 2):
    few_y, cache, _ = F.batch_norm(x[:size], gamma, beta, moving_mean, moving_var, training=True)
    few_dx, few_dgamma, few_dbeta = F.batch_norm_backward(dy[:size], cache)
    print(f"a batch of {size}:")
    print_arrays(x=x[:size], x_hat=(few_y - beta) / gamma, dx=few_dx, dgamma=few_dgamma)
    if size == 1:
        np.testing.assert_array_equal(few_y, beta)
        np.testing.assert_array_equal(few_dx, zero)
        np.testing.assert_array_equal(few_dgamma, zero)
    else:
        np.testing.assert_allclose(np.abs((few_y - beta) / gamma), 1, atol=1e-5)
        assert np.max(np.abs(few_dx)) < 1e-4 < np.max(np.abs(gamma / s * dy[:size]))

# %% [markdown]
# ## npbn does the same
#
# In training, npbn uses the function `batch_norm_backward`, which computes the closed form. The
# function `batch_norm_backward_staged` computes the stages of this lesson one by one. For images,
# the pixels of all examples together are the batch. So the next cell also writes the four examples
# as the four pixels of one image with three channels, and gets the same results.

# %%
for training in (True, False):
    npbn_y, cache, _ = F.batch_norm(
        x, gamma, beta, moving_mean, moving_var, training=training, eps=eps
    )
    np.testing.assert_allclose(npbn_y, y if training else predict(x), rtol=1e-14)
    for npbn_backward in (F.batch_norm_backward, F.batch_norm_backward_staged):
        npbn_dx, npbn_dgamma, npbn_dbeta = npbn_backward(dy, cache)
        expected = dx if training else dx_prediction
        np.testing.assert_allclose(npbn_dx, expected, atol=1e-14)
        mode = "training" if training else "prediction"
        print(
            f"{npbn_backward.__name__} in {mode}: largest difference of dx "
            f"{np.max(np.abs(npbn_dx - expected)):.1e}"
        )
        if training:
            np.testing.assert_allclose(npbn_dgamma, dgamma, atol=1e-14)
            np.testing.assert_allclose(npbn_dbeta, dbeta, atol=1e-14)

image, image_dy = x.T.reshape(1, 3, 2, 2), dy.T.reshape(1, 3, 2, 2)
form = (1, 3, 1, 1)
image_y, cache, _ = F.batch_norm(
    image,
    gamma.reshape(form),
    beta.reshape(form),
    moving_mean.reshape(form),
    moving_var.reshape(form),
    training=True,
    eps=eps,
)
image_dx, _, _ = F.batch_norm_backward(image_dy, cache)
np.testing.assert_allclose(image_y.reshape(3, 4).T, y, atol=1e-14)
np.testing.assert_allclose(image_dx.reshape(3, 4).T, dx, atol=1e-14)
