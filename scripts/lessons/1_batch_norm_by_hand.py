# %% [markdown]
# # Batch norm forward and backward, by hand
#
# Four examples with three features go through batch norm, one node of the computational graph at a
# time, and the gradient comes back the same way. Every number is printed, every gradient is checked
# at once, and every claim about the numbers is asserted: if it were wrong, this file would fail.
#
# The code that trains is in `npbn/functional/batch_norm.py`, with the same derivation in its
# docstring. At the end, the two are compared.

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
# A row is an example, a column a feature. Batch norm treats each column separately. $\epsilon$ is
# 0.25, much more than the usual $10^{-5}$, so that its effect can be seen (and the roots are even).

# %%
x = np.array([[1.0, 4, 1], [3, 12, -5], [-1, 8, 1], [1, 16, -1]])
gamma = np.array([[1.5, -0.5, 2]])  # scale
beta = np.array([[0.0, 1, -1]])  # shift
eps = 0.25
m = len(x)
print_arrays(x=x, gamma=gamma, beta=beta)

# %% [markdown]
# These are the nodes, and this is how they depend on one another:
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
# | `x_centred` | $\bar{x}_i = x_i - \mu$ | centred |
# | `q` | $q_i = \bar{x}_i^2$ | squared |
# | `v` | $v = \frac{1}{m} \sum_i q_i$ | the variance |
# | `s` | $s = \sqrt{v + \epsilon}$ | the standard deviation, except for $\epsilon$ |
# | `r` | $r = 1 / s$ | its reciprocal |
# | `x_hat` | $\hat{x}_i = \bar{x}_i r$ | normalized |
# | `y` | $y_i = \gamma \hat{x}_i + \beta$ | scaled and shifted |

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
# Whatever the mean and the spread of a feature were, $\hat{x}$ has mean 0 and variance
# $v / s^2 = 1 - \epsilon / s^2$, a little less than 1. So $y$ has the mean $\beta$ and a standard
# deviation near $|\gamma|$: the network chooses both.

# %%
np.testing.assert_allclose(np.mean(x_hat, axis=0, keepdims=True), 0, atol=1e-15)
np.testing.assert_allclose(np.var(x_hat, axis=0, keepdims=True), 1 - eps / s**2)
np.testing.assert_allclose(np.mean(y, axis=0, keepdims=True), beta, atol=1e-15)
print_arrays(variance_of_x_hat=np.var(x_hat, axis=0), standard_deviation_of_y=np.std(y, axis=0))

# %% [markdown]
# ## What a gradient is, and how to check one
#
# The layers above say how the loss $L$ changes with each element of $y$: that is the upstream
# gradient $dy_i = \partial L / \partial y_i$. Here it is made up, and $L = \sum_i dy_i y_i$, which
# has just this gradient. For every node $z$, $dz = \partial L / \partial z$: what $L$ gains if a
# little is added to $z$, and all that depends on $z$ is recomputed.
#
# `loss` does that: the forward pass once more, with a `change` added to one node. Fed with a tiny
# imaginary change, it gives the derivative without any subtraction, so that nothing cancels (the
# *complex step*):
#
# $$\frac{\partial L}{\partial z} = \frac{\mathrm{Im}  L(z + i h)}{h} \qquad h = 10^{-30}$$

# %%
dy = np.array([[1.0, -1, 2], [0, 3, 1], [2, 1, -1], [-1, 1, 0]])


def loss(node: str, change: np.ndarray, dy: np.ndarray = dy) -> np.ndarray:
    """Return L after a change of one node and of all nodes that depend on this node."""

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
# The backward pass goes against the arrows. Two rules are enough:
#
# - the gradient that arrives at a node is passed on times the derivative of the node;
# - where a value goes several ways (to several nodes, or to all examples), the gradients of all
#   ways add up.
#
# **y = gamma x_hat + beta.** `gamma` and `beta` serve all examples, so their gradients are sums
# over the batch.

# %%
dbeta = np.sum(dy, axis=0, keepdims=True)
check("beta", dbeta)

dgamma = np.sum(dy * x_hat, axis=0, keepdims=True)
check("gamma", dgamma)

dx_hat = dy * gamma
check("x_hat", dx_hat)

# %% [markdown]
# **x_hat = x_centred r.** This is a product, so each factor gets the gradient times the other
# factor. `r` is used for all examples, so its gradient is a sum. `x_centred` has a second path to
# the loss, through `q`. So this is only a part of its gradient, which cannot be checked yet.

# %%
dx_centred_direct = dx_hat * r
print_arrays(dx_centred_direct=dx_centred_direct)

dr = np.sum(dx_hat * x_centred, axis=0, keepdims=True)
check("r", dr)

# %% [markdown]
# **r = 1 / s**, with the derivative $-1 / s^2$. **s = √(v + eps)**, with the derivative
# $1 / (2 s)$.

# %%
ds = -dr / s**2
check("s", ds)

dv = ds / (2 * s)
check("v", dv)

# %% [markdown]
# **v = mean(q).** Each of the $m$ elements contributes with the factor $1 / m$, so all elements get
# the same gradient.

# %%
dq = np.broadcast_to(dv / m, q.shape)
check("q", dq)

# %% [markdown]
# **q = x_centred².** This is the second path from `x_centred` to the loss, with the derivative
# $2 \bar{x}$. The sum over both paths is the complete gradient of `x_centred`.

# %%
dx_centred = dx_centred_direct + 2 * x_centred * dq
check("x_centred", dx_centred)

# %% [markdown]
# **x_centred = x - mean.** The mean is subtracted from all examples, so its gradient is minus the
# sum over the examples.

# %%
dmean = -np.sum(dx_centred, axis=0, keepdims=True)
check("mean", dmean)

# %% [markdown]
# **mean = mean(x).** Each example contributes with the factor $1 / m$ again. $x$ has two paths:
# directly, and through the mean. This is the end of the backward pass.

# %%
dx = dx_centred + dmean / m
check("x", dx)

# %% [markdown]
# ## From the stages to one formula
#
# The gradient through `q`, put together from $dr = \sum_k d\hat{x}_k \bar{x}_k$, $ds = -dr / s^2$,
# $dv = ds / (2 s)$ and $dq = dv / m$:
#
# $$2 \bar{x}_i  dq = 2 \bar{x}_i \cdot \frac{1}{m} \cdot \frac{1}{2 s} \cdot \frac{-1}{s^2}
#   \sum_k d\hat{x}_k \bar{x}_k = -\frac{1}{s}  \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k
#   \hat{x}_k$$
#
# because one $s$ of the $s^3$ turns $\bar{x}_i$ into $\hat{x}_i$, and one $\bar{x}_k$ into
# $\hat{x}_k$. With the direct way,
#
# $$d\bar{x}_i = \frac{1}{s} \Big( d\hat{x}_i - \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k
#   \hat{x}_k \Big)$$

# %%
along_x_hat = np.mean(dx_hat * x_hat, axis=0, keepdims=True)
np.testing.assert_allclose((dx_hat - x_hat * along_x_hat) / s, dx_centred, atol=1e-15)
print_arrays(dx_centred_in_one=(dx_hat - x_hat * along_x_hat) / s)

# %% [markdown]
# In $d\mu = -\sum_i d\bar{x}_i$, the second term is a number times $\sum_i \hat{x}_i = 0$. So
# $d\mu = -\frac{1}{s} \sum_i d\hat{x}_i$, and $dx_i = d\bar{x}_i + d\mu / m$ is
#
# $$dx_i = \frac{1}{s} \Big( d\hat{x}_i - \frac{1}{m} \sum_k d\hat{x}_k - \hat{x}_i \cdot
#   \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$
#
# Finally, $d\hat{x}_i = \gamma  dy_i$. The sums turn into $\gamma  d\beta$ and $\gamma  d\gamma$,
# which the backward pass needs anyway:
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
# If mean and variance were constants, $y$ would be a linear function of $x$ with the slope
# $\gamma / s$. But mean and variance are no constants: each $x_i$ changes them, and so changes
# *all* elements of $y$.
#
# **The mean path**, $-d\beta / m$, subtracts the mean of $dy$. Adding the same number to all $x_i$
# of a feature changes nothing in $y$, so the gradient must not ask for it: every column of $dx$ has
# the sum 0.
#
# **The variance path**, $-\hat{x}_i d\gamma / m$, subtracts the part of $dy$ that is proportional
# to $\hat{x}$. Stretching all $\bar{x}_i$ of a feature by the same factor changes almost nothing in
# $y$, so the gradient must not ask for it either. "Almost", because $\epsilon$ does not stretch
# along: of the part along $\hat{x}$, the fraction $\epsilon / s^2$ remains.

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
# Both in one picture, with 40 examples of one feature, the usual $\epsilon = 10^{-5}$, and
# $\gamma / s$ left out. The line is fitted to the points by least squares. As $\hat{x}$ has mean 0
# and variance 1, its value at $\hat{x} = 0$ is the mean of $dy$, $d\beta / m$, and its slope is
# $d\gamma / m$. So, except for $\epsilon$, the backward pass of batch norm is a
# *linear regression*:
# it fits a line to the incoming gradient, and passes on the residuals.

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
# It is tempting to check a backward pass with $L = \sum_i y_i$, that is, with $dy$ all ones. But
# $\sum_i y_i = m \beta$, whatever $x$ is. So the true $dx$ is 0; $d\gamma = \sum_i \hat{x}_i$ is 0,
# too; and with it any multiple of the variance path, right or wrong. Here are four wrong backward
# passes, and their errors with both.

# %%
ones = np.ones_like(dy)


def backward(dy: np.ndarray, mean_path: float = 1, variance_path: float = 1) -> np.ndarray:
    """Return dx with each of the two paths counted a given number of times; 1 is right."""
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
# With ones, only the forgotten mean path shows. So npbn checks with random upstream gradients;
# `npbn/verify/README.md` has a table of 64 mistakes and of which check finds which.
#
# ## Prediction
#
# In prediction, an example must not depend on which others happen to be in its batch. So mean and
# variance are moving averages, kept while training (`momentum` is the fraction that is kept):
#
# $$\text{moving} \leftarrow 0.9 \cdot \text{moving} + 0.1 \cdot \text{batch}$$
#
# They are constants. Both paths through them are gone, and $dx_i = \gamma  dy_i / s$, with the $s$
# of the moving variance.

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
# The derivatives of each $y_i$ by each $x_k$ show the difference, here for the second feature and
# without $\gamma$. In training they are
#
# $$\frac{\partial \hat{x}_i}{\partial x_k} = \frac{1}{s} \Big( [i = k] - \frac{1}{m} -
#   \frac{\hat{x}_i \hat{x}_k}{m} \Big)$$
#
# so every example moves the result of every other. In prediction, each goes its own way.

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
# With a single value, the mean is that value: $\bar{x} = 0$, $\hat{x} = 0$ and $y = \beta$,
# whatever $x$ is. $dx$ and $d\gamma$ are 0, so that nothing below the layer learns. (PyTorch
# refuses such a batch. npbn computes what the formula says. For images, $m = N H W$, and one image
# is enough.)
#
# Two values are hardly better. With the usual $\epsilon$, $\hat{x}$ is $-1$ for the smaller value
# and $1$ for the larger value, whatever the values are. $dx$ is close to 0, because two points
# always lie on a straight line, so the linear regression above has no residuals.

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
# `batch_norm_backward` is the closed form, and it is what trains; `batch_norm_backward_staged`
# walks through the stages, as above. For images, the pixels of all examples together are the batch:
# the four examples, written as the four pixels of one image of three channels, give the same.

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
