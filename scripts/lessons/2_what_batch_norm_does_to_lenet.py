# %% [markdown]
# # What batch norm does to LeNet
#
# The same network twice, with the same weights, on the same images of Fashion-MNIST: with batch
# norm, it learns at once; without, hardly at all. Why? And what goes wrong *with* batch norm, in
# small batches and in prediction?
#
# Short runs are measured here and now. Curves over several epochs come from `curves/*.json`;
# `_curves.py` has the code that measured them, and `--regenerate` measures them again. They are of
# Fashion-MNIST, always. What runs here uses handwritten digits where that is not available. As a
# script, this takes about 20 s on 2 cores.

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
# Network A with sigmoids, batches of 256, SGD with the learning rate 1. Batch norm has no random
# initial values, so both networks start from the same weights.

# %%
dataset = lesson.data()
is_fashion = dataset.key == "fashion-mnist"  # some claims hold only for its images
WITH, WITHOUT = "with batch norm", "without"
COLOURS = {WITH: BLUE, WITHOUT: ORANGE}

steps = 40 if lesson.quick else 100
SNAPSHOTS = (0, 10, steps)
images, _ = next(dataset.test.batches(256, "float32"))


def train(run: Training) -> tuple[list[float], dict[int, list[np.ndarray]]]:
    """Train; return the losses of the steps, and the inputs of the sigmoids at the snapshots."""
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
# Without batch norm, the network is as good as one that gives every class the probability 1/10.
#
# ## What the layers see
#
# The reason is in the numbers that enter the four sigmoids, here on 256 test images. The sigmoid
# itself is drawn in grey: it is sensitive between about -3 and 3.

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
# At first sight, both have values of a healthy size. But a histogram mixes two things: how features
# differ from one another, and how *images* differ in one feature. Only the second carries
# information. (A feature is a channel of a convolution or a unit of a linear layer.) So take each
# feature on its own. Its standard deviation over the images, for the median feature:

# %%


def spread(values: np.ndarray) -> float:
    """Return the median over all features of the standard deviation of a feature."""
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

assert np.allclose(spreads[WITH][0], 1, atol=0.01)  # gamma is 1 then
ratios = np.array(spreads[WITHOUT][0][1:]) / np.array(spreads[WITHOUT][0][:-1])
print(f"without batch norm, from layer to layer: times {', '.join(f'{r:.2f}' for r in ratios)}")
assert np.all(ratios < 1 / 3) and spreads[WITHOUT][0][-1] < 0.01

# %% [markdown]
# Without batch norm, every layer makes the differences between images four or five times smaller:
# the sigmoid's slope is 1/4 at most, and averaging does the rest. In front of the last sigmoid, a
# shoe and a shirt differ in the third decimal. All images look alike there, and so the best answer
# is the same for all: 1/10 for each class. The gradient fares no better on its way back:

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
# Batch norm sets the spread to $|\gamma|$ in every layer, at every step: 1 at first, and later what
# the network has learned to want. The gradient has about the same size everywhere.
#
# ## Learning rates
#
# Two epochs each; the dotted line is guessing.

# %%
by_rate = curves(lesson, learning_rates)
RATES = sorted({run["lr"] for run in by_rate})
figure, rows = plt.subplots(2, len(RATES), figsize=(12, 5.2), sharex=True, sharey=True)
final = {}
for found in by_rate:
    name = WITH if found["batch_norm"] else WITHOUT
    row, column = ("Sigmoid", "ReLU").index(found["activation"]), RATES.index(found["lr"])
    final[found["activation"], name, found["lr"]] = found["test_accuracy"][-1]
    loss = np.array(found["loss"], dtype=float)  # None, for infinity, becomes NaN: not drawn
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
# With sigmoids and batch norm, any of these rates will do, though the largest is a hundred times
# the smallest. Without, only 1 leads away from guessing, and only after an epoch.
#
# ReLU lets the differences through. So it learns without batch norm as well, if more slowly, and at
# small rates only. A step that is too large puts units below 0 for every image; there ReLU has no
# gradient, and nothing brings them back. Batch norm does, as it centres every feature at each step.
# (At 5, it cannot help either.) This is what is left of the units of linear 2 after 150 steps at 1:

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
# They start at 1 and 0. This is what the published setting (learning rate 1, ten epochs, seed 0)
# makes of those of the two convolutions, a line for each channel.

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
# Most channels of the first convolution end with a $\gamma$ of 2 to 5. With such a standard
# deviation, many values are outside of the part of the sigmoid that is almost a straight line. The
# network *learns* to be nonlinear there, and $\beta$ determines the part of the sigmoid. So batch
# norm does not keep the values near 0 for ever. But two numbers for each feature determine where
# the values are. Without batch norm, all weights of the layers before determine this together. (The
# published runs ended with $\gamma$ from 1.9 to 3.5 and $\beta$ from -3.6 to 2.3.)
#
# ## A batch of one
#
# Now for what batch norm costs. In training, an example's result depends on the others in its
# batch. Without any others, a batch norm over (N, D) subtracts the only value there is from itself:
# $\hat{x} = 0$, whatever the image shows. So the network says the same to every image, exactly:

# %%
model = LeNet(generator=np.random.default_rng(0))
alone = [model.forward(images[i : i + 1]) for i in range(5)]
print("largest difference of the outputs for five images:", max(np.ptp(alone, axis=0).ravel()))
assert all(np.array_equal(output, alone[0]) for output in alone)

# %% [markdown]
# And the gradient stops at the last batch norm. Only what is above it learns: how frequent the
# classes are.

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
# **The statistics are noisy.** The mean of N examples misses the mean of all by about
# $\sigma / \sqrt{N}$. Here is the noise of the batch mean, measured in front of the first batch
# norm after a convolution and after a linear layer, in units of the standard deviation $\sigma$.
# (After the first convolution, N images are 576 N values. But neighbours are alike, and one image
# counts for 8 independent values, not for 576.)

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
    """Return the standard deviation of the batch mean, divided by that of the values."""
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
    if not is_fashion:  # the digits are not in random order
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
# The extreme is a batch of two. The mean is the middle between them, so that $\hat{x}$ is -1 for
# one and 1 for the other (except for $\epsilon$). All that is left of a feature is which of two
# images has more of it.

# %%
norm = BatchNorm(120, num_dims=2)  # gamma is 1, beta 0
of_two = [norm.forward(pair) for pair in np.split(before_norm["linear 1"][:400], 200)]
for limit in (0.9, 0.99):
    print(f"in batches of 2, {np.mean(np.abs(of_two) > limit):.1%} of |x_hat| are above {limit}")
assert np.mean(np.abs(of_two) > 0.9) > (0.9 if is_fashion else 0.5)

# %% [markdown]
# **The gradient is cut.** The backward pass of batch norm passes on what is left of $dy$ after
# fitting a line to it (lesson 1). A line has two numbers, so of N directions, N - 2 get through: of
# a random gradient, the fraction $\sqrt{(N - 2) / N}$. Of two points, nothing is left.

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
# **So it learns less.** 12,800 images in batches of each size, with ReLU, which also learns without
# batch norm. The learning rate is proportional to the batch size, so that an image counts
# alike.

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
# Without batch norm, batches of 1 to 8 examples give the same losses: their lines lie on one
# another. With batch norm, batches of 1 learn nothing (the loss stays at $\ln 10$), and batches of
# 2 learn almost nothing. Up to 32, each larger batch size learns more than the one before. (Batches
# of 256 give only 50 steps here, which are few with and without batch norm.) For batches of 1, the
# test accuracy is even worse than that of guessing. The reason is that the variance of one value is
# 0. So its moving average is 0, too, and prediction divides by the root of this moving average.
#
# ## Training is not prediction
#
# In prediction, an image must not depend on the others in its batch. So batch norm uses moving
# averages of the statistics that it saw in training: at each step, a tenth is replaced. They
# describe the weights of about the last ten steps, not those of now. With a learning rate of 1, the
# weights have moved on. The same weights can be evaluated in three ways:

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
# The second way is cheating: what it says about an image depends on 255 others. The third is
# honest: `precise_statistics` passes training images through the network, whose weights stand
# still, and averages over all batches (Wu and Johnson 2021, "precise BatchNorm"). `train.py
# --precise-bn` does that before each evaluation.
#
# Now epoch by epoch, ten epochs of the published setting with three seeds:

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
# The large jumps, like the published run's from .822 to .553 and back to .797, come from the moving
# averages, not from the weights: with precise statistics, the largest shrinks from .185 to .058,
# and the mean from .038 to .020. What remains is the weights' own: at this learning rate, one epoch
# really is better than the next. That the second and the third way agree, to half a percent, shows
# that it is the statistics' age that matters, not from which images they come.
#
# ### Is it age, or noise?
#
# A moving average could also be wrong because it is made of few batches. A test: after each of the
# 30 epochs, let the weights stand still, and let training batches pass that move nothing but the
# moving averages. Were it noise, it would stay as it is. Here is what happens:

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
# It is age. After 20 batches, which make up $1 - 0.9^{20} = 0.88$ of the averages, nearly all is
# well; after 40, all is. So there are three remedies: a smaller learning rate towards the end
# (`--schedule cosine`), which lets the weights nearly stand still; precise statistics; or to know
# about it, and to judge a run by its best epochs and its training loss.
