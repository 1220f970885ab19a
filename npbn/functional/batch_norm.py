r"""Batch normalization: the forward pass and its gradient, derived step by step.

(``scripts/lessons/1_batch_norm_by_hand.py`` computes a 4 × 3 example with numbers.)

**Formula.** Each feature is normalized separately. A feature is a column of an input (N, D) or a
channel of an input (N, C, H, W). Let $x_1, \dots, x_m$ be all values of one feature in the batch.
Their number is $m = N$ for (N, D), and $m = N H W$ for (N, C, H, W).

$$\mu = \frac{1}{m} \sum_i x_i \qquad v = \frac{1}{m} \sum_i (x_i - \mu)^2 \qquad
  s = \sqrt{v + \epsilon}$$

$$\hat{x}_i = \frac{x_i - \mu}{s} \qquad y_i = \gamma \hat{x}_i + \beta$$

In training, $\mu$ and $v$ are the mean and the variance of the batch, and moving averages of both
are kept. In prediction, $\mu$ and $v$ are replaced by these moving averages, which are constants.

**Backward.** $L$ is the loss, and $dz$ is short for $\partial L / \partial z$. So $dy_i$ is given.
$\gamma$ and $\beta$ contribute to every $y_i$, so their gradients are sums over the batch:

$$d\beta = \sum_i dy_i \qquad d\gamma = \sum_i dy_i \hat{x}_i \qquad d\hat{x}_i = \gamma dy_i$$

**Prediction.** $\mu$ and $s$ do not depend on $x$, so $dx_i = d\hat{x}_i / s = \gamma dy_i / s$.

**Training.** $x_i$ influences the loss on three paths: directly through $\hat{x}_i$, through $v$,
and through $\mu$. The last two paths go through *every* $\hat{x}_k$. The derivation follows the
paths node by node. Let $\bar{x}_i = x_i - \mu$ be the centred value, so that
$\hat{x}_i = \bar{x}_i / s$. Every $\bar{x}_i$ is divided by $s$, and $s$ is the root of
$v + \epsilon$:

$$ds = -\frac{1}{s^2} \sum_i d\hat{x}_i \bar{x}_i = -\frac{1}{s} \sum_i d\hat{x}_i \hat{x}_i
  \qquad
  dv = \frac{ds}{2 s} = -\frac{1}{2 s^2} \sum_i d\hat{x}_i \hat{x}_i$$

$\bar{x}_i$ contributes to $\hat{x}_i$, with the derivative $1/s$, and to $v$, with the derivative
$2 \bar{x}_i / m$:

$$d\bar{x}_i = \frac{d\hat{x}_i}{s} + \frac{2 \bar{x}_i}{m} dv
  = \frac{1}{s} \Big( d\hat{x}_i - \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$

$\mu$ is subtracted from every $x_i$, so $d\mu = -\sum_i d\bar{x}_i$. In this sum, the second terms
of all $d\bar{x}_i$ add up to 0, because $\sum_i \hat{x}_i = 0$:

$$d\mu = -\frac{1}{s} \sum_i d\hat{x}_i$$

$x_i$ contributes to $\bar{x}_i$, with the derivative 1, and to $\mu$, with the derivative $1/m$.
So $dx_i = d\bar{x}_i + d\mu / m$, which is

$$dx_i = \frac{1}{s} \Big( d\hat{x}_i - \frac{1}{m} \sum_k d\hat{x}_k -
  \hat{x}_i \cdot \frac{1}{m} \sum_k d\hat{x}_k \hat{x}_k \Big)$$

Finally, insert $d\hat{x}_i = \gamma dy_i$. The sums become
$\sum_k d\hat{x}_k = \gamma d\beta$ and $\sum_k d\hat{x}_k \hat{x}_k = \gamma d\gamma$. The common
factor $\gamma$ moves in front of the bracket:

$$\boxed{ dx_i = \frac{\gamma}{s} \Big( dy_i - \frac{d\beta}{m} -
  \hat{x}_i \frac{d\gamma}{m} \Big) }$$

In words: $dx$ is the gradient $dy$ without its mean and without its component along $\hat{x}$,
scaled by $\gamma / s$. The mean is subtracted because adding a constant to all $x_i$ does not
change $y$. The component along $\hat{x}$ is subtracted because stretching all $x_i$ hardly changes
$y$. Stretching changes $y$ only because of $\epsilon$, so the fraction $\epsilon / s^2$ of this
component remains.

**Several shards.** Several processes may train together (`npbn.distributed`). Each process, or
rank, r then has its own shard of the batch, with $m_r$ of the m values of a feature, and all
formulas above still hold for the whole batch. What a rank needs of the other ranks are sums.

In the forward pass, rank r computes the mean $\mu_r$ and the sum of squares about it, $q_r$, of its
own values, and tells the others these two numbers and $m_r$. The mean of the batch is the sum of
all values, divided by their number, and the sum of values in shard r is $m_r \mu_r$:

$$m = \sum_r m_r \qquad \mu = \frac{1}{m} \sum_r m_r \mu_r$$

For the variance, write $x_i - \mu = (x_i - \mu_r) + (\mu_r - \mu)$ for the values of shard r. In
the square of this sum, the mixed term adds up to $2 (\mu_r - \mu) \sum_i (x_i - \mu_r) = 0$. What
remains are the squares within the shard, and one square between the shard and the batch for each
value:

$$v = \frac{1}{m} \sum_r \big( q_r + m_r (\mu_r - \mu)^2 \big)$$

Without the second term, the variance would be too small by the variance of the shards' means.
Without the weights $m_r$, both would be wrong whenever the shards differ in size.

In the backward pass, $x_i$ influences the loss through the $y_k$ of *all* shards, because $\mu$ and
$v$ are made of all shards. In the boxed formula, this is in three numbers only: m, $d\beta$ and
$d\gamma$. Each is a sum over the batch, so it is the sum of what the ranks have found:

$$d\beta = \sum_r d\beta_r \qquad d\beta_r = \sum_{k \in r} dy_k \qquad
  d\gamma = \sum_r d\gamma_r \qquad d\gamma_r = \sum_{k \in r} dy_k \hat{x}_k$$

The ranks tell each other $m_r$, $d\beta_r$ and $d\gamma_r$, and each computes dx of its own shard.
So in the backward pass, too, three numbers a feature travel, however large the shards are. Every
rank has a copy of $\gamma$ and $\beta$, and $d\gamma_r$ and $d\beta_r$ are the gradients with
respect to its copy. `batch_norm_backward` returns these: like the gradients of all other
parameters, they are added up over the ranks before a step of the optimizer. If dx were computed
with them instead of their sums, dx would be the gradient of a batch norm that normalizes each shard
by itself.

**Rounding.** The variance is computed from $x - \mu$, after $\mu$. The formula $E[x^2] - E[x]^2$
would lose most digits if the mean is large. $\mu$ itself is rounded, so in training the mean of
$\bar{x}$ is subtracted from $\bar{x}$ once more. In exact arithmetic this mean is zero, so the
derivation does not change. In float32, the second subtraction makes the result accurate for a
channel with mean $10^4$ and deviation $10^{-2}$, and brings $y$ close to $\beta$ for a constant
channel. (In prediction, no such correction is possible, because float32 represents a moving mean
near $10^4$ only to about $10^{-3}$.)

**Overflow.** If $\bar{x}^2$ is larger than the largest number of the dtype, the variance is
infinite and $y = \beta$. In float32, this begins at $|\bar{x}| \approx 10^{19}$. A training finds
the infinite moving average when it saves its state.

**Source.** S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by
Reducing Internal Covariate Shift", ICML 2015 (arXiv:1502.03167). The forward pass is Algorithm 1.
The gradients are those of section 3, derived with more intermediate nodes. The second subtraction
is the idea of the corrected two-pass algorithm in T. Chan, G. Golub and R. LeVeque, "Algorithms for
Computing the Sample Variance", The American Statistician 37(3), 1983. The merging of shards is
(2.1b) in their "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from npbn.functional.arrays import Array, check_shape, common_namespace, copy, mean_over, sum_over

if TYPE_CHECKING:
    from npbn.distributed import Group


class BatchNormCache(NamedTuple):
    """The values that the backward pass needs: x̄ = x - μ, s = √(v + eps), γ, and the mode.

    ``training`` is true if the forward pass was in training mode. ``group`` has the ranks that hold
    the shards of the batch, and is None if this process has the whole batch.
    """

    x_centred: Array
    s: Array
    gamma: Array
    training: bool
    group: Group | None = None


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
    group: Group | None = None,
) -> tuple[Array, BatchNormCache, tuple[Array, Array]]:
    r"""Normalize each feature over the batch, then scale by γ and shift by β.

    $$y = \gamma \frac{x - \mu}{\sqrt{v + \epsilon}} + \beta$$

    Args:
        x: the input, (N, D) or (N, C, H, W). The statistics are taken over axis 0, or over axes 0,
            2 and 3.
        gamma, beta: the scale and the shift, (1, D) or (1, C, 1, 1).
        moving_mean, moving_var: the moving averages of the batch mean and of the *biased* batch
            variance (divided by m). They have the shape of gamma, and the units of x and x².
        training: whether to normalize with the statistics of the batch and to update the moving
            averages. If false, the function normalizes with the moving averages, which do not
            change.
        eps: the number that is added to the variance inside the square root, in the units of x².
        momentum: the fraction of the moving averages that is *kept*:
            moving = momentum · moving + (1 - momentum) · batch. (PyTorch's ``momentum`` is the
            fraction that is new: 1 minus this momentum. PyTorch's moving variance is unbiased.)
        group: the ranks (`npbn.distributed.Group`), each of which calls this function with its
            shard of the batch. In training, the statistics are those of the whole batch. By
            default, x is the whole batch.

    Returns:
        y, of the shape and dtype of x; the cache for the backward pass; and the new moving averages
        as (moving_mean, moving_var). In prediction, these are copies of the arguments.

    Raises:
        ValueError: x is empty or has another rank, a parameter has another shape, or eps or
            momentum is out of range.
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
    eps, momentum = float(eps), float(momentum)  # NumPy scalars would impose their dtype.
    smallest = float(xp.finfo(x.dtype).smallest_normal)
    if not eps >= smallest:  # Smaller numbers are 0 on some devices, and everywhere in the end.
        raise ValueError(f"expected eps >= {smallest:.3g} for {x.dtype}, got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"expected momentum between 0 and 1, got {momentum}")

    if training:
        mean = mean_over(x, axes)
        x_centred = x - mean
        rounding = mean_over(x_centred, axes)
        x_centred -= rounding  # This removes the rounding error of the mean.
        var = mean_over(x_centred * x_centred, axes)
        if group is not None and group.size > 1:
            own_mean = mean + rounding
            mean, var = _merge(group, x.size // gamma.size, own_mean, var)
            x_centred += own_mean - mean
        moving_mean = momentum * moving_mean + (1 - momentum) * mean
        moving_var = momentum * moving_var + (1 - momentum) * var
    else:
        x_centred = x - moving_mean
        var = moving_var
        moving_mean, moving_var = copy(moving_mean, xp), copy(moving_var, xp)

    s = xp.sqrt(var + eps)
    y = x_centred * (gamma / s) + beta
    cache = BatchNormCache(x_centred, s, copy(gamma, xp), training, group)
    return y, cache, (moving_mean, moving_var)


def batch_norm_backward(dy: Array, cache: BatchNormCache) -> tuple[Array, Array, Array]:
    r"""Return the gradients of batch norm, computed by the formula at the top of this module.

    In training, with $\hat{x} = \bar{x} / s$ and m values of each feature,

    $$dx = \frac{\gamma}{s} \Big( dy - \frac{d\beta}{m} - \hat{x} \frac{d\gamma}{m} \Big)$$

    In prediction, $dx = \gamma dy / s$.

    Args:
        dy: the gradient of the loss with respect to y, of the shape of y.
        cache: the cache of `batch_norm`.

    Returns:
        dx, which has the shape of x; dgamma and dbeta, which have the shape of gamma. If the batch
        has several shards, dgamma and dbeta are this shard's, as the gradients of all other
        parameters are: their sums over the shards are the gradients.
    """
    x_centred, s, gamma, training, group = cache
    common_namespace(dy=dy, x_centred=x_centred)
    check_shape("dy", dy, tuple(x_centred.shape))
    axes = _statistics_axes(dy)

    dbeta = sum_over(dy, axes)
    dgamma = sum_over(dy * x_centred, axes) / s
    if not training:
        return dy * (gamma / s), dgamma, dbeta
    own = dgamma, dbeta
    m, dgamma, dbeta = _over_shards(group, dy.size // gamma.size, dgamma, dbeta)
    dx = (gamma / s) * (dy - dbeta / m - x_centred * (dgamma / (s * m)))
    return dx, *own


def batch_norm_backward_staged(dy: Array, cache: BatchNormCache) -> tuple[Array, Array, Array]:
    r"""Return the gradients of `batch_norm_backward`, computed node by node.

    The nodes of the forward pass are

    $$\mu = \mathrm{mean}(x), \quad \bar{x} = x - \mu, \quad q = \bar{x}^2, \quad
      v = \mathrm{mean}(q), \quad s = \sqrt{v + \epsilon}, \quad r = 1/s, \quad
      \hat{x} = \bar{x} r, \quad y = \gamma \hat{x} + \beta$$

    In prediction, μ and v are constants, so the backward pass ends at x̄. The arguments and the
    results are those of `batch_norm_backward`.
    """
    x_centred, s, gamma, training, group = cache
    common_namespace(dy=dy, x_centred=x_centred)
    check_shape("dy", dy, tuple(x_centred.shape))
    axes = _statistics_axes(dy)
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
    m, dr = _over_shards(group, dy.size // gamma.size, sum_over(dx_hat * x_centred, axes))
    # r = 1 / s
    ds = -dr / (s * s)
    # s = sqrt(v + eps)
    dv = ds / (2 * s)
    # v = mean(q): the derivative with respect to each of the m elements is 1/m
    dq = dv / m
    # q = x_centred²: the second path from x_centred to y
    dx_centred = dx_centred + 2 * x_centred * dq
    # x_centred = x - mu
    _, dmu = _over_shards(group, 0, -sum_over(dx_centred, axes))
    # mu = mean(x): the second path from x to x_centred
    dx = dx_centred + dmu / m
    return dx, dgamma, dbeta


def _merge(group: Group, m: int, mean: Array, var: Array) -> tuple[Array, Array]:
    """Return mean and variance of the whole batch from those of this rank's shard of m values."""
    xp = common_namespace(mean=mean, var=var)
    found = group.gather(xp.stack([xp.full_like(mean, m), mean, m * var]))
    counts, means, squares = (found[:, i, ...] for i in range(3))
    m = xp.sum(counts, axis=0)
    mean = xp.sum(counts * means, axis=0) / m
    squares = xp.sum(squares + counts * (means - mean) * (means - mean), axis=0)
    return mean, squares / m


def _over_shards(group: Group | None, m: int, *sums: Array) -> list[Any]:
    """Return the number of values of a feature, and sums, over all shards of the batch."""
    if group is None or group.size == 1:
        return [m, *sums]
    xp = common_namespace(sum=sums[0])
    found = xp.sum(group.gather(xp.stack([xp.full_like(sums[0], m), *sums])), axis=0)
    return [found[i, ...] for i in range(1 + len(sums))]


def _statistics_axes(x: Array) -> tuple[int, ...]:
    """Return the axes over which the statistics of a feature are computed."""
    if x.ndim not in (2, 4) or x.size == 0:
        raise ValueError(
            f"expected x of shape (N, D) or (N, C, H, W), not empty, got {tuple(x.shape)}"
        )
    return (0,) if x.ndim == 2 else (0, 2, 3)
