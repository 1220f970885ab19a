# %% [markdown]
# # What batch norm does to LeNet
#
# This lesson trains LeNet on Fashion-MNIST with batch norm and without batch norm. Both networks
# start from the same weights and see the same images. The network with batch norm learns at once,
# and the network without batch norm learns hardly anything. The lesson shows the reason. The lesson
# also shows what goes wrong *with* batch norm in small batches and in prediction.
#
# The lesson trains short runs each time. Curves over several epochs come from the files
# `curves/*.json`. The code in `_curves.py` measured these curves, and the option `--regenerate`
# measures the curves again. The stored curves always show Fashion-MNIST. The short runs use
# handwritten digits if Fashion-MNIST is not available. As a script, the lesson takes about 20 s on
# 2 cores.

# %%
from _lesson import BLUE, GREEN, ORANGE, start

lesson = start(curves=True)

import copy
import math

import matplotlib.pyplot as plt
import numpy as np

from _curves import (
    accuracy_with_batch_statistics,
    batch_sizes,
    curves,
    learning_rates,
    new_run,
    ten_epochs,
)
from _curves import steps as train_steps
from npbn import functional as F
from npbn import inspection
from npbn.layers import BatchNorm, ReLU
from npbn.models import LeNet
from npbn.training import Training, evaluate

# %% [markdown]
# ## A hundred steps, with and without
#
# Both networks are network A (LeNet) with sigmoids. SGD trains both networks with batches of 256
# and the learning rate 1. Batch norm has no random initial values, so both networks start from the
# same weights.

# %%
dataset = lesson.data()
is_fashion = dataset.key == "fashion-mnist"  # some claims hold only for Fashion-MNIST
WITH, WITHOUT = "with batch norm", "without"
COLOURS = {WITH: BLUE, WITHOUT: ORANGE}

steps = 40 if lesson.quick else 100
SNAPSHOTS = (0, 10, steps)
images, _ = next(dataset.test.batches(256, "float32"))


def train(run: Training) -> tuple[list[float], dict[int, list[np.ndarray]]]:
    """Train `run`, and return the loss of each step and the sigmoid inputs at each snapshot."""
    losses: list[float] = []
    seen = {0: list(inspection.preactivations(run.model, images).values())}
    of_an_epoch = len(run.train) // 256
    for epoch in range(math.ceil(steps / of_an_epoch)):
        order = np.random.default_rng((run.seed, epoch)).permutation(len(run.train))
        for result in run.engine.steps(order[: 256 * of_an_epoch]):
            losses.append(float(result.loss))
            if len(losses) in SNAPSHOTS:
                seen[len(losses)] = list(inspection.preactivations(run.model, images).values())
            if len(losses) == steps:
                break
    return losses, seen


runs = {
    WITH: new_run(dataset, 1.0, batch_norm=True),
    WITHOUT: new_run(dataset, 1.0, batch_norm=False),
}
losses, seen = {}, {}
for name, run in runs.items():
    losses[name], seen[name] = train(run)

figure, axes = plt.subplots(figsize=(8, 3.4))
for name, values in losses.items():
    axes.plot(np.arange(1, steps + 1), values, color=COLOURS[name], label=name)
axes.axhline(math.log(10), color="0.5", linestyle=":", label=r"guessing: $\ln 10$")
axes.set_xlabel("step")
axes.set_ylabel("training loss")
axes.legend(loc="center right")
lesson.show(figure, "pair")

for name, values in losses.items():
    print(f"{name:15}: loss {values[0]:.3f} at first, {np.mean(values[-10:]):.3f} in the end")
assert np.mean(losses[WITHOUT][-10:]) > math.log(10) - 0.05
assert np.mean(losses[WITH][-10:]) < (0.9 if is_fashion and not lesson.quick else 1.6)

# %% [markdown]
# Without batch norm, the trained network is only as good as a network that gives every class the
# probability 1/10.
#
# ## What the layers see
#
# The numbers that enter the four sigmoids show why the network without batch norm does not learn.
# The histograms show these numbers for 256 test images. The grey curve is the sigmoid, which is
# sensitive to inputs between about -3 and 3.

# %%
LAYERS = ("convolution 1", "convolution 2", "linear 1", "linear 2")
edges = np.linspace(-4, 4, 81)
figure, rows = plt.subplots(len(SNAPSHOTS), 4, figsize=(12, 6.4), sharex=True)
for row, step in zip(rows, SNAPSHOTS, strict=True):
    for i, axes in enumerate(row):
        for name, colour in COLOURS.items():
            values = np.clip(seen[name][step][i].ravel(), edges[0], edges[-1])
            share = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=share, color=colour, alpha=0.6, label=name)
        sigmoid = axes.twinx()
        sigmoid.plot(edges, 1 / (1 + np.exp(-edges)), color="0.6", linewidth=1)
        sigmoid.set_yticks([])
        axes.set_yticks([])
    row[0].set_ylabel("at the start" if step == 0 else f"after {step} steps")
for i, layer in enumerate(LAYERS):
    rows[0][i].set_title(layer)
rows[0][0].legend(fontsize="small")
figure.suptitle("How often which value enters the sigmoid")
lesson.show(figure, "histograms")

# %% [markdown]
# At first sight, the values in both networks have a healthy size. But a histogram mixes two kinds
# of differences. Features differ from one another, and *images* differ in the value of one feature.
# (A feature is a channel of a convolution or a unit of a linear layer.) Only the differences
# between images carry information. So the next cell computes the standard deviation over the images
# for each feature separately, and prints the median over the features of each layer.

# %%


def spread(values: np.ndarray) -> float:
    """Compute the standard deviation of each feature of `values`, and return the median."""
    return float(np.median(np.std(values, axis=(0, 2, 3)[: values.ndim - 1])))


print(f"{'':29}" + "".join(f"{layer:>15}" for layer in LAYERS))
spreads = {
    name: {step: [spread(v) for v in seen[name][step]] for step in SNAPSHOTS} for name in runs
}
for step in SNAPSHOTS:
    for name in runs:
        numbers = "".join(f"{value:15.4f}" for value in spreads[name][step])
        print(f"step {step:3}, {name:19}{numbers}")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8))
for name, colour in COLOURS.items():
    for unit in range(6):
        values = np.clip(seen[name][0][-1][:, unit], edges[0], edges[-1])
        left.hist(values, edges, color=colour, alpha=0.5, label=None if unit else name)
    for step, style in zip(SNAPSHOTS, (":", "--", "-"), strict=True):
        label = f"{name}, {'at the start' if step == 0 else f'after {step} steps'}"
        right.semilogy(LAYERS, spreads[name][step], style, color=colour, marker="o", label=label)
left.set_ylim(0, 60)
left.set_title(
    "Six units of linear 2, each on its own, at the start\n(the narrow columns go up to 256)"
)
left.set_xlabel("value that enters the sigmoid")
left.set_ylabel("how many of 256 images")
left.legend()
right.set_title("Spread over the images, standard deviation")
right.legend(fontsize="small")
lesson.show(figure, "spread")

assert np.allclose(spreads[WITH][0], 1, atol=0.01)  # gamma is 1 at the start
ratios = np.array(spreads[WITHOUT][0][1:]) / np.array(spreads[WITHOUT][0][:-1])
print(f"without batch norm, from layer to layer: times {', '.join(f'{r:.2f}' for r in ratios)}")
assert np.all(ratios < 1 / 3) and spreads[WITHOUT][0][-1] < 0.01

# %% [markdown]
# Without batch norm, every layer makes the differences between images four or five times smaller.
# The slope of the sigmoid is at most 1/4, and averaging makes the differences still smaller. In
# front of the last sigmoid, the values for a shoe and the values for a shirt differ only in the
# third decimal. All images look alike in front of the last sigmoid, so the best answer of the
# network gives every class the probability 1/10 for every image. The gradient also shrinks on the
# way back through the layers. The next cell prints the size of the gradient of each weight.

# %%
labels = dataset.test.labels[:256]
weights = ("convolution 1", "convolution 2", "linear 1", "linear 2", "linear 3")
print(f"size of the gradient {'':8}" + "".join(f"{layer:>15}" for layer in weights))
of_first = {}
for name in runs:
    model = LeNet(batch_norm=name == WITH, generator=np.random.default_rng(0))
    _, cache = F.softmax_cross_entropy(model.forward(images), labels)
    model.backward(F.softmax_cross_entropy_backward(cache))
    sizes_of = [
        float(np.linalg.norm(np.asarray(parameter.gradient)))
        for parameter in model.parameters().values()
        if parameter.name == "weight"
    ]
    of_first[name] = sizes_of[0]
    print(f"at the start, {name:15}" + "".join(f"{size:15.4f}" for size in sizes_of))
assert of_first[WITH] > 100 * of_first[WITHOUT]

# %% [markdown]
# Batch norm sets the standard deviation of each feature to $|\gamma|$ in every layer and at every
# step. At the start, $|\gamma|$ is 1. Later, the network has learned other values of $\gamma$. With
# batch norm, the gradient has about the same size in every layer.
#
# ## Learning rates
#
# The picture shows the training loss over two epochs for each learning rate. The dotted line is the
# loss of guessing.

# %%
by_rate = curves(lesson, learning_rates)
RATES = sorted({run["lr"] for run in by_rate})
figure, rows = plt.subplots(2, len(RATES), figsize=(12, 5.2), sharex=True, sharey=True)
final = {}
for found in by_rate:
    name = WITH if found["batch_norm"] else WITHOUT
    row, column = ("Sigmoid", "ReLU").index(found["activation"]), RATES.index(found["lr"])
    final[found["activation"], name, found["lr"]] = found["test_accuracy"][-1]
    # The file has None for an infinite loss. None becomes NaN, and NaN is not drawn.
    loss = np.array(found["loss"], dtype=float)
    rows[row][column].plot(np.linspace(0.1, 2, len(loss)), loss, color=COLOURS[name], label=name)
    rows[row][column].set_title(f"{found['activation']}, learning rate {found['lr']:g}")
for axes in rows.flat:
    axes.axhline(math.log(10), color="0.5", linestyle=":", linewidth=1)
    axes.set_ylim(0, 3)
rows[0][0].legend(loc="lower left", fontsize="small")
for axes in rows[1]:
    axes.set_xlabel("epoch")
for row in rows:
    row[0].set_ylabel("training loss")
lesson.show(figure, "learning_rates")

print("test accuracy after two epochs, at the learning rate")
print(f"{'':24}" + "".join(f"{rate:>8g}" for rate in RATES))
for activation in ("Sigmoid", "ReLU"):
    for name in (WITH, WITHOUT):
        reached = [final[activation, name, rate] for rate in RATES]
        print(
            f"{activation + ', ' + name:24}" + "".join(f"{accuracy:8.3f}" for accuracy in reached)
        )

for rate in RATES:
    assert final["Sigmoid", WITH, rate] > 0.7
    assert final["Sigmoid", WITHOUT, rate] < (0.6 if rate == 1 else 0.11)
    assert (final["ReLU", WITHOUT, rate] > 0.7) == (rate < 1)
    assert (final["ReLU", WITH, rate] > 0.7) == (rate < 5)

# %% [markdown]
# With sigmoids and batch norm, the network learns at each of the four learning rates, although the
# largest rate is a hundred times the smallest rate. With sigmoids and without batch norm, the
# network becomes better than guessing only at the learning rate 1, and only after an epoch.
#
# ReLU does not shrink the differences between images. So a network with ReLU learns without batch
# norm as well, but more slowly and only at small learning rates. A training step that is too large
# can make the input of a ReLU negative for every image. ReLU has no gradient for negative inputs,
# so without batch norm nothing brings such a unit back. Batch norm brings the unit back, because
# batch norm centres every feature at each step. (At the learning rate 5, batch norm cannot help
# either.) The next cell trains both networks with ReLU for 150 steps at the learning rate 1. The
# cell prints the share of the units of linear 2 that still have a positive input for any of 256
# images.

# %%
alive = {}
for name in runs:
    run = new_run(dataset, 1.0, batch_norm=name == WITH, activation=ReLU)
    epoch = 0
    while run.optimizer.steps < 150:
        train_steps(run, min(256 * 150, 256 * (len(run.train) // 256)), epoch)
        epoch += 1
    *_, entering = inspection.preactivations(run.model, images).values()
    alive[name] = float(np.mean(np.any(entering > 0, axis=0)))
    print(f"{name:15}: {alive[name]:4.0%} are above 0 for any of 256 images")
if is_fashion:
    assert alive[WITHOUT] < 0.5 < 0.8 < alive[WITH]

# %% [markdown]
# ## What gamma and beta become
#
# At the start, every $\gamma$ is 1 and every $\beta$ is 0. The picture shows how $\gamma$ and
# $\beta$ of the batch norms after the two convolutions change in the published setting (learning
# rate 1, ten epochs, seed 0). Each line shows one channel.

# %%
by_seed = curves(lesson, ten_epochs)
figure, rows = plt.subplots(2, 2, figsize=(10, 5), sharex=True)
for row, name, start_value in zip(rows, ("gamma", "beta"), (1, 0), strict=True):
    for i, axes in enumerate(row):
        after = [epoch[name][i] for epoch in by_seed[0]["epochs"]]
        from_the_start = np.array([np.full(len(after[0]), start_value), *after])
        axes.axhline(start_value, color="0.7", linewidth=1)
        axes.plot(from_the_start, color=BLUE, alpha=0.8)
    row[0].set_ylabel(name)
for axes, layer in zip(rows[0], LAYERS, strict=False):
    axes.set_title(layer)
for axes in rows[1]:
    axes.set_xlabel("epoch")
lesson.show(figure, "gamma_and_beta")

for found in by_seed:
    last = found["epochs"][-1]
    for name in ("gamma", "beta"):
        print(f"seed {found['seed']}, {name:5} of convolution 1: {sorted(last[name][0])}")
    assert max(last["gamma"][0]) > 3 and max(last["gamma"][1]) > 1

# %% [markdown]
# Most channels of the first convolution end with a $\gamma$ of 2 to 5. The value of $\gamma$ is the
# standard deviation of the numbers that enter the sigmoid. With a standard deviation of 2 to 5,
# many numbers lie outside of the part of the sigmoid that is almost a straight line. So the network
# *learns* to be nonlinear in the first convolution, and $\beta$ determines which part of the
# sigmoid the network uses.
#
# Batch norm does not keep the values near 0 for ever. But with batch norm, two numbers for each
# feature determine where the values are. Without batch norm, all weights of the layers before
# determine together where the values are. (The published runs ended with $\gamma$ from 1.9 to 3.5
# and $\beta$ from -3.6 to 2.3.)
#
# ## A batch of one
#
# Batch norm also has costs. In training, the result for an example depends on the other examples of
# the batch. In a batch of one example, batch norm over an array of the shape (N, D) subtracts each
# value from itself. So $\hat{x}$ is 0 for every image, and the network gives exactly the same
# output for every image. The next cell compares the outputs for five images.

# %%
model = LeNet(generator=np.random.default_rng(0))
alone = [model.forward(images[i : i + 1]) for i in range(5)]
print("largest difference of the outputs for five images:", max(np.ptp(alone, axis=0).ravel()))
assert all(np.array_equal(output, alone[0]) for output in alone)

# %% [markdown]
# With a batch of one, the gradient stops at the last batch norm. Only $\beta$ of the last batch
# norm and the parameters of the last linear layer get a gradient. These parameters can learn only
# how frequent each class is.

# %%
loss, cache = F.softmax_cross_entropy(alone[-1], np.array([7]))
model.backward(F.softmax_cross_entropy_backward(cache))
for name, parameter in model.parameters().items():
    largest = np.max(np.abs(np.asarray(parameter.gradient)))
    print(f"{name:9} largest gradient {largest:.1e}")
    assert (largest > 0) == (name in ("13.beta", "15.weight", "15.bias"))

# %% [markdown]
# ## Small batches
#
# **The statistics are noisy.** Let $\sigma$ be the standard deviation of a feature. The mean of a
# batch of N examples differs from the mean of all examples by about $\sigma / \sqrt{N}$. This
# difference is the noise of the batch mean. The next cell measures the noise in units of $\sigma$
# in front of two batch norms. One batch norm follows the first convolution, and the other batch
# norm follows the first linear layer. (After the first convolution, N images give 576 N values of
# each feature. But neighbouring values are similar, so one image counts for only 8 independent
# values, not for 576.)

# %%
many = dataset.train.images[: 1024 if lesson.quick else 4096]
batches_of_256 = [
    many[i : i + 256].astype(np.float32) / 255 for i in range(0, len(many) - 255, 256)
]
through = [inspection.activations(model, x) for x in batches_of_256]
before_norm = {
    "convolution 1": np.concatenate([outputs[0] for outputs in through]),
    "linear 1": np.concatenate([outputs[9] for outputs in through]),
}
sizes = 2 ** np.arange(7)


def noise_of_the_mean(values: np.ndarray, size: int) -> float:
    """Return the noise of the mean of `values` over batches of `size` examples.

    The noise is the standard deviation of the mean divided by the standard deviation of `values`.
    """
    axes = (0, 2, 3)[: values.ndim - 1]
    of_batches = [np.mean(part, axis=axes) for part in np.split(values, len(values) // size)]
    return float(np.sqrt(np.mean(np.var(of_batches, axis=0) / np.var(values, axis=axes))))


figure, axes = plt.subplots(figsize=(6.5, 3.8))
axes.loglog(sizes, 1 / np.sqrt(sizes), color="0.5", linestyle=":", label=r"$1 / \sqrt{N}$")
axes.loglog(
    sizes, 1 / np.sqrt(576 * sizes), color="0.8", linestyle=":", label=r"$1 / \sqrt{576 N}$"
)
for layer, colour in (("convolution 1", GREEN), ("linear 1", BLUE)):
    noise = [noise_of_the_mean(before_norm[layer], int(size)) for size in sizes]
    axes.loglog(sizes, noise, "o-", color=colour, label=layer)
    print(
        f"{layer:13}: {', '.join(f'{n:.3f}' for n in noise)} for N = {', '.join(map(str, sizes))}"
    )
    if not is_fashion:  # the handwritten digits are not in random order
        continue
    if layer == "linear 1":
        np.testing.assert_allclose(noise, 1 / np.sqrt(sizes), rtol=0.2)
    else:
        assert np.all(np.array(noise) < 1 / np.sqrt(sizes))
        assert np.all(np.array(noise) > 3 / np.sqrt(576 * sizes))
axes.set_xticks(sizes, labels=map(str, sizes))
axes.minorticks_off()
axes.set_xlabel("batch size N")
axes.set_ylabel("noise of the batch mean,\nin standard deviations")
axes.legend(fontsize="small")
lesson.show(figure, "noise")

# %% [markdown]
# A batch of two is the extreme case. The mean of two values lies in the middle between the values.
# So $\hat{x}$ is -1 for the smaller value and 1 for the larger value (except for $\epsilon$). In a
# batch of two, $\hat{x}$ says only which of the two images has the larger value of the feature.

# %%
norm = BatchNorm(120, num_dims=2)  # gamma is 1, and beta is 0
of_two = [norm.forward(pair) for pair in np.split(before_norm["linear 1"][:400], 200)]
for limit in (0.9, 0.99):
    print(f"in batches of 2, {np.mean(np.abs(of_two) > limit):.1%} of |x_hat| are above {limit}")
assert np.mean(np.abs(of_two) > 0.9) > (0.9 if is_fashion else 0.5)

# %% [markdown]
# **The gradient is cut.** The backward pass of batch norm fits a line to $dy$ and passes on the
# residuals, as lesson 1 shows. A line has two parameters, so batch norm passes on only $N - 2$ of
# $N$ directions of the gradient. Of the length of a random gradient, batch norm passes on the
# fraction $\sqrt{(N - 2) / N}$. In a batch of two, a line fits both points exactly, so batch norm
# passes on nothing.

# %%
rng = np.random.default_rng(0)
print("batch size   gradient that gets through   sqrt((N - 2) / N)")
for size in (2, 4, 8, 32, 256):
    x = before_norm["linear 1"][:size]
    norm.forward(x)
    dy = rng.normal(size=x.shape).astype(np.float32)
    dx = norm.backward(dy)
    s = np.sqrt(np.var(x, axis=0) + 1e-5)
    through_norm = np.linalg.norm(s * dx) / np.linalg.norm(dy)
    print(f"{size:10} {through_norm:28.4f} {math.sqrt((size - 2) / size):19.4f}")
    np.testing.assert_allclose(through_norm, math.sqrt((size - 2) / size), atol=0.06)

# %% [markdown]
# **Small batches learn less with batch norm.** The picture shows the training loss on 12,800 images
# for batches of each size. The networks use ReLU, because a network with ReLU also learns without
# batch norm. The learning rate is proportional to the batch size, so that each image has the same
# influence at every batch size.

# %%
by_size = curves(lesson, batch_sizes)
figure, columns = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
panels = dict(zip((WITH, WITHOUT), columns, strict=True))
last_loss = {}
for found in by_size:
    name = WITH if found["batch_norm"] else WITHOUT
    size = found["batch_size"]
    seen_images = 1.28 * np.arange(0.5, len(found["loss"]))
    panels[name].plot(
        seen_images,
        found["loss"],
        "o-",
        markersize=3,
        color=plt.get_cmap("viridis")(0.95 - math.log2(size) / 9),
        label=f"batch size {size}",
    )
    last_loss[name, size] = found["loss"][-1]
    print(
        f"{name:15}, batch size {size:3}: loss {found['loss'][-1]:.3f} over the last tenth, "
        f"test accuracy {found['test_accuracy']:.3f}"
    )
for name, axes in panels.items():
    axes.axhline(math.log(10), color="0.5", linestyle=":", linewidth=1)
    axes.set_title(name)
    axes.set_xlabel("thousand images seen")
columns[0].set_ylabel("training loss")
columns[0].legend(fontsize="small", ncols=2, loc="lower left")
columns[0].set_ylim(0, 2.6)
lesson.show(figure, "batch_sizes")

assert abs(last_loss[WITH, 1] - math.log(10)) < 0.01
assert [last_loss[WITH, n] for n in (1, 2, 4, 8, 32)] == sorted(
    (last_loss[WITH, n] for n in (1, 2, 4, 8, 32)), reverse=True
)
assert np.ptp([last_loss[WITHOUT, n] for n in (1, 2, 4, 8)]) < 0.05

# %% [markdown]
# Without batch norm, batches of 1, 2, 4 and 8 examples give the same losses, so the four lines lie
# on top of one another. With batch norm, batches of 1 learn nothing (the loss stays at $\ln 10$),
# and batches of 2 learn almost nothing. Up to a batch size of 32, each larger batch size learns
# more than the batch size before. (Batches of 256 give only 50 steps in this measurement, and 50
# steps are few both with and without batch norm.) With batch norm and batches of 1, the test
# accuracy is even worse than the accuracy of guessing. The reason is that the variance of one value
# is 0. So the moving average of the variance is also 0, and prediction divides by the root of the
# moving average.
#
# ## Training is not prediction
#
# In prediction, the result for an image must not depend on the other images of the batch. So batch
# norm uses moving averages of the statistics of the training batches. Each training step replaces a
# tenth of the moving averages. So the moving averages describe the weights of about the last ten
# steps, not the current weights. At a learning rate of 1, the weights change a lot in ten steps.
# The next cell evaluates the current weights with three kinds of statistics.

# %%
run = runs[WITH]
by_moving = evaluate(run.model, run.test).accuracy
by_batch = accuracy_with_batch_statistics(run.model, run.test)
precise = copy.deepcopy(run.model)
inspection.precise_statistics(precise, dataset.limited(min(5120, len(dataset.train))).train)
by_precise = evaluate(precise, run.test).accuracy
print(f"test accuracy of the network from above, after {steps} steps:")
print(f"    {by_moving:.3f} with the moving averages")
print(f"    {by_batch:.3f} with the statistics of each batch of 256 test images, as in training")
print(f"    {by_precise:.3f} with statistics of training images, for the weights as they are")

# %% [markdown]
# Statistics of the test batch are cheating, because the prediction for one image then depends on
# 255 other images. Precise statistics are honest. The function `precise_statistics` passes training
# images through the network while the weights stay fixed, and averages the statistics over all
# batches (Wu and Johnson 2021, "precise BatchNorm"). The command `train.py --precise-bn` computes
# precise statistics before each evaluation.
#
# The next picture shows the test accuracy with all three kinds of statistics after each epoch. The
# runs are ten epochs of the published setting with three seeds.

# %%
ways = {
    "moving": ("moving averages", ORANGE, 1.5),
    "batch": ("statistics of the test batch", GREEN, 5),
    "precise": ("precise statistics", BLUE, 1.5),
}
figure, columns = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
accuracies = {
    way: np.array([[epoch[way] for epoch in found["epochs"]] for found in by_seed]) for way in ways
}
for i, axes in enumerate(columns):
    for way, (label, colour, width) in ways.items():
        epochs = np.arange(1, len(accuracies[way][i]) + 1)
        axes.plot(epochs, accuracies[way][i], ".-", color=colour, linewidth=width, label=label)
    axes.set_title(f"seed {by_seed[i]['seed']}")
    axes.set_xlabel("epoch")
columns[0].set_ylabel("test accuracy")
columns[2].legend(loc="lower right")
lesson.show(figure, "train_and_predict")

print("test accuracy                  mean   worst epoch   jump between epochs: mean   largest")
mean_jump, largest_jump = {}, {}
for way, (label, _, _) in ways.items():
    jumps = np.abs(np.diff(accuracies[way], axis=1))
    mean_jump[way], largest_jump[way] = np.mean(jumps), np.max(jumps)
    print(
        f"{label:29} {np.mean(accuracies[way]):.3f} {np.min(accuracies[way]):13.3f} "
        f"{mean_jump[way]:33.3f} {largest_jump[way]:9.3f}"
    )
gain = accuracies["precise"] - accuracies["moving"]
print(
    f"precise statistics: better than the moving averages in {np.sum(gain > 0)} of {gain.size} "
    f"epochs, by {np.max(gain):.3f} at most, and worse by {-np.min(gain):.3f} at most"
)
assert mean_jump["moving"] > 1.9 * mean_jump["precise"]
assert largest_jump["moving"] > 3 * largest_jump["precise"]
assert np.max(np.abs(accuracies["batch"] - accuracies["precise"])) < 0.005
assert np.sum(gain > 0) >= 27

# %% [markdown]
# With moving averages, the test accuracy makes large jumps. For example, the test accuracy of the
# published run fell from .822 to .553 and then rose to .797. The large jumps come from the moving
# averages, not from the weights. With precise statistics, the largest jump shrinks from .185 to
# .058, and the mean jump shrinks from .038 to .020. The remaining jumps come from the weights,
# because at this learning rate one epoch really is better than the next epoch. Statistics of the
# test batch and precise statistics give test accuracies that agree to half a percent. So the age of
# the statistics matters. The images behind the statistics do not matter.
#
# ### Age or noise?
#
# Moving averages can be wrong for two reasons. Either the statistics are old, or the statistics are
# noisy because only a few batches contribute to a moving average. An experiment tells age from
# noise. After each of the 30 epochs, the experiment passes training batches through the network
# while the weights stay fixed. These batches change only the moving averages. If the errors came
# from noise, the errors would stay as large as before. The picture shows how the errors change.

# %%
figure, axes = plt.subplots(figsize=(7, 4))
counts = [0, 1, 2, 5, 10, 20, 40]
distance = []
for found in by_seed:
    for epoch in found["epochs"]:
        passed = [epoch["moving"], *(epoch["standing_still"][str(n)] for n in counts[1:])]
        distance.append(np.array(passed) - epoch["precise"])
        axes.plot(counts, distance[-1], color=BLUE, alpha=0.4, linewidth=1)
axes.axhline(0, color="0.5", linestyle=":")
axes.plot(counts, np.mean(distance, axis=0), color=ORANGE, linewidth=3, label="mean of 30 epochs")
axes.set_xlabel("training batches since the weights stand still")
axes.set_ylabel("test accuracy,\ncompared with precise statistics")
axes.legend()
lesson.show(figure, "standing_still")

left = np.mean(np.abs(distance), axis=0)
for count, value in zip(counts, left, strict=True):
    print(f"after {count:2} batches, {value:.4f} from precise statistics, on average")
assert left[0] > 10 * left[-1]

# %% [markdown]
# The errors come from the age of the moving averages, not from noise. After 20 batches, the new
# batches make up $1 - 0.9^{20} = 0.88$ of the moving averages, and nearly all of the error is gone.
# After 40 batches, the moving averages are practically as good as precise statistics. So there are
# three remedies for the jumps. The first remedy is a smaller learning rate towards the end of the
# training (`--schedule cosine`), because the weights then hardly change. The second remedy is to
# use precise statistics. The third remedy is to expect the jumps, and to judge a run by the best
# epochs and by the training loss.
