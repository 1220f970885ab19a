r"""Batch normalization: the forward pass and its gradient, derived step by step.

(``scripts/lessons/1_batch_norm_by_hand.py`` does it on a 4 × 3 example, with numbers.)

**Formula.** One feature (a column of (N, D), a channel of (N, C, H, W)) at a time. Let
$x_1, \dots, x_m$ be all its values in the batch: $m = N$ for (N, D), $m = N H W$ for (N, C, H, W).

$$\mu = \frac{1}{m} \sum_i x_i \qquad v = \frac{1}{m} \sum_i (x_i - \mu)^2 \qquad
  s = \sqrt{v + \epsilon}$$

$$\hat{x}_i = \frac{x_i - \mu}{s} \qquad y_i = \gamma \hat{x}_i + \beta$$

In training, $\mu$ and $v$ are the batch's own, and moving averages of them are kept. In prediction
they *are* those moving averages: constants, the same for every example.

**What flows back.** $L$ is the loss and $dz$ is short for $\partial L / \partial z$, so that
$dy_i$ is given. $\gamma$ and $\beta$ meet every $y_i$, so their gradients are sums over the batch:

$$d\beta = \sum_i dy_i \qquad d\gamma = \sum_i dy_i \hat{x}_i \qquad d\hat{x}_i = \gamma dy_i$$

**Prediction.** $\mu$ and $s$ do not depend on $x$, so $dx_i = d\hat{x}_i / s = \gamma dy_i / s$.

**Training.** $x_i$ reaches the loss along three paths: through $\hat{x}_i$ directly, through $v$
(and so through *every* $\hat{x}_k$), and through $\mu$ (likewise). To follow them one node at a
time, call the centred value $\bar{x}_i = x_i - \mu$, so that $\hat{x}_i = \bar{x}_i / s$. Every
$\hat{x}_i$ is divided by $s$, and $s$ is the root of $v + \epsilon$:

$$ds = -\frac{1}{s^2} \sum_i d\hat{x}_i \bar{x}_i = -\frac{1}{s} \sum_i d\hat{x}_i \hat{x}_i
  \qquad
  dv = \frac{ds}{2 s} = -\frac{1}{2 s^2} \sum_i d\hat{x}_i \hat{x}_i$$

$\bar{x}_i$ feeds $\hat{x}_i$ (by $1/s$) and $v$ (by $\partial v / \partial \bar{x}_i =
2 \bar{x}_i / m$):

$$d\bar{x}_i = \frac{d\hat{x}_i}{s} + \frac{2 \bar{x}_i}{m} dv
  = \frac{1}{s} \Big( d\hat{x}_i - \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$

$\mu$ is subtracted from every $x_i$, so $d\mu = -\sum_i d\bar{x}_i$. The second term of
$d\bar{x}_i$ adds nothing to that sum, because $\sum_i \hat{x}_i = 0$:

$$d\mu = -\frac{1}{s} \sum_i d\hat{x}_i$$

$x_i$ feeds $\bar{x}_i$ (by 1) and $\mu$ (by $1/m$): $dx_i = d\bar{x}_i + d\mu / m$, that is

$$dx_i = \frac{1}{s} \Big( d\hat{x}_i - \frac{1}{m} \sum_k d\hat{x}_k -
  \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$

Finally put in $d\hat{x}_i = \gamma dy_i$. The sums become
$\sum_k d\hat{x}_k = \gamma d\beta$ and $\sum_k d\hat{x}_k \hat{x}_k = \gamma d\gamma$, and
$\gamma$ comes out of the bracket:

$$\boxed{ dx_i = \frac{\gamma}{s} \Big( dy_i - \frac{d\beta}{m} -
  \hat{x}_i \frac{d\gamma}{m} \Big) }$$

In words: take the incoming gradient; subtract its mean (shifting all $x_i$ together does not change
$y$); subtract its component along $\hat{x}$ (nor does stretching them, except for $\epsilon$, which
leaves the fraction $\epsilon / s^2$ of that component); scale by $\gamma / s$.

**Rounding.** The variance is taken in two passes, from $x - \mu$: $E[x^2] - E[x]^2$ would cancel
catastrophically where the mean is large. And since $\mu$ itself is rounded, in training $\bar{x}$
is centred once more by its own mean. In exact arithmetic that mean is zero, so the derivation is
untouched; in float32 it is what keeps a channel with mean $10^4$ and deviation $10^{-2}$ accurate,
and what brings a constant channel close to $\beta$. (Prediction has no such remedy: a moving mean
near $10^4$ is itself only known to about $10^{-3}$ in float32.)

**Source.** S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", ICML 2015 (arXiv:1502.03167): the forward pass is Algorithm 1,
the gradients are those of section 3, taken through a finer graph. Correcting the second pass by the
rounding of the mean is the idea of the corrected two-pass algorithm in T. Chan, G. Golub and
R. LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37(3), 1983.
"""

from __future__ import annotations

from typing import NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace, copy, mean_over, sum_over


class BatchNormCache(NamedTuple):
    """For the backward passes: x̄ = x - μ, s = √(v + eps), γ, and whether it was in training."""

    x_centred: Array
    s: Array
    gamma: Array
    training: bool


def batch_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    moving_mean: Array,
    moving_var: Array,
    *,
    training: bool,
    eps: float = 1e-5,
    momentum: float = 0.9,
) -> tuple[Array, BatchNormCache, tuple[Array, Array]]:
    r"""Normalize each feature over the batch, then scale by γ and shift by β.

    $$y = \gamma \frac{x - \mu}{\sqrt{v + \epsilon}} + \beta$$

    Args:
        x: (N, D), statistics over axis 0; or (N, C, H, W), statistics over axes 0, 2 and 3.
        gamma, beta: scale and shift, (1, D) or (1, C, 1, 1).
        moving_mean, moving_var: moving averages of the batch mean and of the *biased* batch
            variance (divided by m), shaped like gamma, in the units of x and x².
        training: normalize with the batch's statistics and move the averages; otherwise normalize
            with the averages and leave them as they are.
        eps: added to the variance, inside the square root; in the units of x².
        momentum: the fraction of the moving averages that is *kept*:
            moving = momentum · moving + (1 - momentum) · batch. (PyTorch's ``momentum`` is the
            fraction that is new, 1 minus this one, and its moving variance the unbiased one.)

    Returns:
        y, of the shape and dtype of x; the cache for the backward pass; and the new
        (moving_mean, moving_var), copies where nothing changed.

    Raises:
        ValueError: x of another rank or empty; a parameter of another shape; eps or momentum out
            of range.
        TypeError: see `npbn.functional`.
    """
    xp = common_namespace(
        x=x, gamma=gamma, beta=beta, moving_mean=moving_mean, moving_var=moving_var
    )
    axes = _statistics_axes(x)
    parameter_shape = (1, x.shape[1]) + (1,) * (x.ndim - 2)
    for name, parameter in (
        ("gamma", gamma),
        ("beta", beta),
        ("moving_mean", moving_mean),
        ("moving_var", moving_var),
    ):
        check_shape(name, parameter, parameter_shape)
    eps, momentum = float(eps), float(momentum)  # a NumPy scalar would impose its dtype
    if not eps > 0:
        raise ValueError(f"expected eps > 0, got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"expected momentum between 0 and 1, got {momentum}")

    if training:
        mean = mean_over(x, axes)
        x_centred = x - mean
        x_centred -= mean_over(x_centred, axes)  # the rounding of the mean
        var = mean_over(x_centred * x_centred, axes)
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * var
    else:
        x_centred = x - moving_mean
        var = moving_var
        moving_mean, moving_var = copy(moving_mean, xp), copy(moving_var, xp)

    s = xp.sqrt(var + eps)
    y = x_centred * (gamma / s) + beta
    return y, BatchNormCache(x_centred, s, copy(gamma, xp), training), (moving_mean, moving_var)


def batch_norm_backward(dy: Array, cache: BatchNormCache) -> tuple[Array, Array, Array]:
    r"""The closed form, with x̂ = x̄ / s:

    $$dx = \frac{\gamma}{s} \Big( dy - \frac{d\beta}{m} - \hat{x} \frac{d\gamma}{m} \Big)$$

    in training, and $dx = \gamma dy / s$ in prediction.

    Args:
        dy: gradient of the loss with respect to y, of the shape of y.
        cache: from `batch_norm`.

    Returns:
        dx, of the shape of x; dgamma and dbeta, of the shape of gamma.
    """
    x_centred, s, gamma, training = cache
    common_namespace(dy=dy, x_centred=x_centred)
    check_shape("dy", dy, tuple(x_centred.shape))
    axes = _statistics_axes(dy)
    m = dy.size // gamma.size

    dbeta = sum_over(dy, axes)
    dgamma = sum_over(dy * x_centred, axes) / s
    if not training:
        return dy * (gamma / s), dgamma, dbeta
    dx = (gamma / s) * (dy - dbeta / m - x_centred * (dgamma / (s * m)))
    return dx, dgamma, dbeta


def batch_norm_backward_staged(dy: Array, cache: BatchNormCache) -> tuple[Array, Array, Array]:
    r"""Return the gradients of `batch_norm_backward`, node by node of the computational graph.

    Forward, the nodes are

    $$\mu = \mathrm{mean}(x), \quad \bar{x} = x - \mu, \quad q = \bar{x}^2, \quad
      v = \mathrm{mean}(q), \quad s = \sqrt{v + \epsilon}, \quad r = 1/s, \quad
      \hat{x} = \bar{x} r, \quad y = \gamma \hat{x} + \beta$$

    and in prediction μ and v are constants, so that the graph ends at x̄. Arguments and results
    are those of `batch_norm_backward`.
    """
    x_centred, s, gamma, training = cache
    common_namespace(dy=dy, x_centred=x_centred)
    check_shape("dy", dy, tuple(x_centred.shape))
    axes = _statistics_axes(dy)
    m = dy.size // gamma.size
    r = 1 / s
    x_hat = x_centred * r

    # y = gamma x_hat + beta
    dbeta = sum_over(dy, axes)
    dgamma = sum_over(dy * x_hat, axes)
    dx_hat = dy * gamma
    # x_hat = x_centred r
    dx_centred = dx_hat * r
    if not training:
        return dx_centred, dgamma, dbeta
    dr = sum_over(dx_hat * x_centred, axes)
    # r = 1 / s
    ds = -dr / (s * s)
    # s = sqrt(v + eps)
    dv = ds / (2 * s)
    # v = mean(q): each of the m elements has a share of 1/m
    dq = dv / m
    # q = x_centred²: the second way on which x_centred reaches y
    dx_centred = dx_centred + 2 * x_centred * dq
    # x_centred = x - mu
    dmu = -sum_over(dx_centred, axes)
    # mu = mean(x): the second way on which x reaches x_centred
    dx = dx_centred + dmu / m
    return dx, dgamma, dbeta


def _statistics_axes(x: Array) -> tuple[int, ...]:
    """The axes that a feature's statistics run over."""
    if x.ndim not in (2, 4) or x.size == 0:
        raise ValueError(
            f"expected x of shape (N, D) or (N, C, H, W), not empty, got {tuple(x.shape)}"
        )
    return (0,) if x.ndim == 2 else (0, 2, 3)
