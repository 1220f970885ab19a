# %% [markdown]
# # Batch norm over several machines
#
# A batch may be divided among several processes, on one machine or on many. Each process, or
# *rank*, then has a part of the batch, its *shard*. Most layers do not notice: they treat every
# example by itself, and the gradients of their weights are sums over the examples, which can be
# added up over the ranks. Batch norm is different. Its mean and its variance are those of the
# *batch*, so every example influences every other one, in the forward pass and in the backward
# pass.
#
# This lesson first does both passes by hand, for two ranks with two numbers each. Then it shows
# what happens if every rank takes the statistics of its own shard, by training: the smaller the
# shards, the lower the accuracy. The training code is in `npbn/functional/batch_norm.py`, and
# `mpiexec -n 4 python scripts/train.py` runs it on four processes.

# %%
from _lesson import BLUE, ORANGE, print_arrays, start

lesson = start()

import threading

import matplotlib.pyplot as plt
import numpy as np

from npbn import functional as F
from npbn.data import Split
from npbn.inspection import batch_norms
from npbn.layers import ReLU
from npbn.models import LeNet
from npbn.optim import SGD
from npbn.training import evaluate
from npbn.verify import complex_step

# %% [markdown]
# ## Statistics of each shard by itself
#
# One feature, four examples: rank 0 has the first two, rank 1 has the others. In this lesson,
# $\epsilon$ is 0.25, so that it is visible in the numbers.

# %%
x = [np.array([1.0, 3.0]), np.array([4.0, 12.0])]  # the shards of rank 0 and of rank 1
gamma, beta, eps = 2.0, 1.0, 0.25


def normalized(values: np.ndarray, mean: float, v: float) -> np.ndarray:
    x_hat: np.ndarray = (values - mean) / np.sqrt(v + eps)
    return x_hat


alone = [normalized(shard, shard.mean(), shard.var()) for shard in x]
batch = np.concatenate(x)
together = normalized(batch, batch.mean(), batch.var())
print_arrays(rank_0_alone=alone[0], rank_1_alone=alone[1], whole_batch=together)

# %% [markdown]
# Each rank by itself gives nearly the same two numbers, -1 and 1, although its inputs are very
# different. *Two numbers, normalized by their own mean and variance, are always -1 and 1*, but for
# $\epsilon$: all that is left of an example is whether it is larger than its neighbour. That rank 1
# has the large numbers is lost. In the whole batch, it is not.

# %%
for shard, normalized_alone in zip(x, alone, strict=True):
    v = shard.var()
    np.testing.assert_allclose(normalized_alone, [-np.sqrt(v / (v + eps)), np.sqrt(v / (v + eps))])

# %% [markdown]
# ## Forward, together
#
# Each rank finds three numbers for its shard: how many values there are, $m_r$; their mean,
# $\mu_r$; and the sum of squares about this mean, $q_r$.

# %%
counts = np.array([shard.size for shard in x])
means = np.array([shard.mean() for shard in x])
squares = np.array([np.sum((shard - shard.mean()) ** 2) for shard in x])
print_arrays(counts=counts, means=means, squares=squares)

# %% [markdown]
# The ranks tell each other these numbers. From then on, each rank computes the same:
#
# $$m = \sum_r m_r \qquad \mu = \frac{1}{m} \sum_r m_r \mu_r \qquad
#   v = \frac{1}{m} \sum_r \big( q_r + m_r (\mu_r - \mu)^2 \big)$$
#
# In numbers: $\mu = (2 \cdot 2 + 2 \cdot 8) / 4 = 5$, and
# $v = (2 + 2 \cdot 9 + 32 + 2 \cdot 9) / 4 = 17.5$. The two nines are the squares *between* the
# shards. Without them, $v$ would be 8.5: the variance within the shards only.

# %%
m = counts.sum()
mean = np.sum(counts * means) / m
v = np.sum(squares + counts * (means - mean) ** 2) / m
s = np.sqrt(v + eps)
print_arrays(mean=mean, variance=v, without_the_second_term=np.sum(squares) / m)
assert (mean, v) == (5, 17.5) == (batch.mean(), batch.var())

x_hat = [normalized(shard, mean, v) for shard in x]
y = [gamma * each + beta for each in x_hat]
print_arrays(y_of_rank_0=y[0], y_of_rank_1=y[1])
np.testing.assert_allclose(np.concatenate(x_hat), together)

# %% [markdown]
# ## Backward, together
#
# The upstream gradients are made up; the loss is $L = \sum_i dy_i y_i$ over both ranks. The
# gradient of batch norm needs two sums over the *batch*, and the number of its values:
#
# $$d\beta = \sum_i dy_i \qquad d\gamma = \sum_i dy_i \hat{x}_i \qquad
#   dx_i = \frac{\gamma}{s} \Big( dy_i - \frac{d\beta}{m} - \hat{x}_i \frac{d\gamma}{m} \Big)$$
#
# Each rank adds up its own terms, and the ranks tell each other the results.

# %%
dy = [np.array([1.0, -2.0]), np.array([0.0, 3.0])]
dbeta = [np.sum(each) for each in dy]
dgamma = [np.sum(each * hat) for each, hat in zip(dy, x_hat, strict=True)]
print_arrays(dbeta_by_rank=np.array(dbeta), dgamma_by_rank=np.array(dgamma))


def gradient(rank: int, sum_of_dy: float, sum_of_products: float, m: int) -> np.ndarray:
    terms = dy[rank] - sum_of_dy / m - x_hat[rank] * sum_of_products / m
    dx: np.ndarray = gamma / s * terms
    return dx


dx = [gradient(rank, sum(dbeta), sum(dgamma), m) for rank in (0, 1)]
print_arrays(dx_of_rank_0=dx[0], dx_of_rank_1=dx[1])

# %% [markdown]
# The complex step goes through the whole batch and knows nothing of ranks. It agrees. The most
# natural mistake, each rank's own sums in place of those of the batch, does not survive it.

# %%


def loss(changed: np.ndarray) -> np.ndarray:
    x_centred = changed - np.mean(changed)
    s = np.sqrt(np.mean(x_centred * x_centred) + eps)
    total: np.ndarray = np.sum(np.concatenate(dy) * (gamma * x_centred / s + beta))
    return total


right = complex_step(loss, batch)
np.testing.assert_allclose(np.concatenate(dx), right, atol=1e-14)
wrong = [gradient(rank, dbeta[rank], dgamma[rank], counts[rank]) for rank in (0, 1)]
print_arrays(complex_step=right, with_sums_of_the_shard=np.concatenate(wrong))
assert np.max(np.abs(np.concatenate(wrong) - right)) > 0.1

# %% [markdown]
# ## Why the sums are all that has to travel
#
# What does rank 0 need to know of rank 1? Not its four, four thousand or four million values: in
# the forward pass $m_1$, $\mu_1$ and $q_1$; in the backward pass $d\beta_1$ and $d\gamma_1$. If
# rank 1 had *other* values with the same sums, rank 0 would compute the same. Two values are given
# by their mean and squares, but three are not. So let rank 1 have three values, then three others
# with the same mean and the same sum of squares, and a $dy$ with the same sums.

# %%


def dx_of_rank_0(x_1: np.ndarray, dy_1: np.ndarray) -> np.ndarray:
    """Return dx of rank 0 by the complex step through both ranks."""

    def loss(x_0: np.ndarray) -> np.ndarray:
        values = np.concatenate([x_0, x_1])
        x_centred = values - np.mean(values)
        y = gamma * x_centred / np.sqrt(np.mean(x_centred * x_centred) + eps) + beta
        total: np.ndarray = np.sum(np.concatenate([dy[0], dy_1]) * y)
        return total

    found: np.ndarray = complex_step(loss, x[0])
    return found


x_1, dy_1 = np.array([4.0, 8, 12]), np.array([0.0, -1, 3])
other_x_1 = 8 + 4 / np.sqrt(3) * np.array([2.0, -1, -1])
other_dy_1 = dy_1.mean() + np.sum(dy_1 * (x_1 - 8)) / 32 * (other_x_1 - 8)
for one, other in ((x_1, other_x_1), (dy_1, other_dy_1)):
    np.testing.assert_allclose(np.sum(one), np.sum(other))
    np.testing.assert_allclose(np.sum((x_1 - 8) * (x_1 - 8)), np.sum((other_x_1 - 8) ** 2))
print_arrays(x_of_rank_1=x_1, others=other_x_1, dy_of_rank_1=dy_1, other_dy=other_dy_1)

before, now = dx_of_rank_0(x_1, dy_1), dx_of_rank_0(other_x_1, other_dy_1)
print_arrays(dx_of_rank_0_before=before, dx_of_rank_0_now=now)
np.testing.assert_allclose(now, before, atol=1e-14)

# %% [markdown]
# For each feature, that is three numbers forward and three backward (with $m_r$ once more),
# whatever the size of the shards. Network A has 226 features in four batch norms: about 5 kB for
# each step, where the gradients of its parameters are 180 kB.
#
# ## The function that trains
#
# `npbn.functional.batch_norm` does the same if it is given a *group*, which can `gather` arrays:
# every rank gives one, and every rank gets all of them. Here, ranks are threads. In
# `npbn/distributed.py`, they are processes that MPI connects.

# %%
slots: list[np.ndarray] = [np.zeros(0), np.zeros(0)]
barrier = threading.Barrier(2)


class Rank:
    """One of two ranks that are threads."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, own: np.ndarray) -> np.ndarray:
        slots[self.rank] = own
        barrier.wait()
        found = np.stack(slots)
        barrier.wait()
        return found


results: dict[int, np.ndarray] = {}


def work(rank: int) -> None:
    of_one_feature = {"gamma": gamma, "beta": beta, "moving_mean": 0.0, "moving_var": 1.0}
    parameters = {name: np.array([[value]]) for name, value in of_one_feature.items()}
    group: object = Rank(rank)
    _, cache, _ = F.batch_norm(x[rank][:, None], **parameters, training=True, eps=eps, group=group)  # type: ignore[arg-type]
    results[rank] = F.batch_norm_backward(dy[rank][:, None], cache)[0][:, 0]


threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print_arrays(dx_of_rank_0=results[0], dx_of_rank_1=results[1])
np.testing.assert_allclose(np.concatenate([results[0], results[1]]), right, atol=1e-14)

# %% [markdown]
# ## What goes wrong with statistics of each shard
#
# Now LeNet, trained in batches of 256 that are divided into shards. Each shard is normalized by its
# own statistics; the gradients are averaged over the shards, as it is done in most training over
# several GPUs. One rank's moving averages are used for prediction. With one shard, this is ordinary
# batch norm, which is what synchronized batch norm computes for any number of shards.

# %%
data = lesson.data()
examples = 5_120 if lesson.quick else 10_240
sizes = [256, 16, 2] if lesson.quick else [256, 64, 16, 4, 2]
seeds = range(1 if lesson.quick else 2)
dataset = data.limited(examples) if len(data.train) > examples else data
test = Split(dataset.test.images[:2000], dataset.test.labels[:2000])


def accuracy(shard: int, seed: int) -> float:
    """Train for one pass over the examples; return the test accuracy."""
    model = LeNet(activation=ReLU, generator=np.random.default_rng(seed))
    optimizer = SGD(model.parameters(), 0.2)
    order = np.random.default_rng(seed).permutation(len(dataset.train))
    for x, labels in dataset.train.batches(256, "float32", order=order[: len(order) // 256 * 256]):
        total = {name: np.zeros_like(p.data) for name, p in model.parameters().items()}
        moving = []
        for first in range(0, 256, shard):
            own = slice(first, first + shard)
            _, cache = F.softmax_cross_entropy(model.forward(x[own]), labels[own])
            model.backward(F.softmax_cross_entropy_backward(cache) * np.float32(shard / 256))
            for name, parameter in model.parameters().items():
                total[name] += parameter.gradient
            if first == 0:  # The first rank's moving averages are kept.
                moving = [(n.moving_mean.data, n.moving_var.data) for n in batch_norms(model)]
            for norm, kept in zip(batch_norms(model), moving, strict=True):
                norm.moving_mean.data, norm.moving_var.data = kept
        for name, parameter in model.parameters().items():
            parameter.gradient = total[name]
        optimizer.step()
    return evaluate(model, test).accuracy


found = np.array([[accuracy(shard, seed) for seed in seeds] for shard in sizes])
for size, accuracies in zip(sizes, found, strict=True):
    print(f"shards of {size:3}: test accuracy {' '.join(f'{a:.3f}' for a in accuracies)}")

# %% [markdown]
# Each dot is a training; the line goes through their means.

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.axhline(found[0].mean(), color=ORANGE, label="synchronized: any shard size")
axes.semilogx(sizes, found.mean(axis=1), "o-", base=2, color=BLUE, label="statistics of each shard")
for seed in seeds:
    axes.semilogx(sizes, found[:, seed], ".", base=2, color=BLUE, alpha=0.4)
axes.set(xlabel="examples in a shard", ylabel="test accuracy", title="Batches of 256 in shards")
axes.legend()
lesson.show(figure, "shards")

# %% [markdown]
# Down to shards of 16, two seeds differ more than two sizes. With two examples in a shard, accuracy
# falls clearly: mean and variance of two images say nothing of the data, and in prediction the
# moving averages take the place of statistics that the network has never seen. So synchronized
# batch norm matters where a machine or a GPU has room for a few examples only, as in detection and
# segmentation of large images. It also makes training *reproducible*: with statistics of each
# shard, the result depends on the number of machines. With sums of the batch, it does not.

# %%
assert found[-1].mean() < found[0].mean() - 0.05
