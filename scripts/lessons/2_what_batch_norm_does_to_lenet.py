# %% [markdown]
# # What batch norm does to LeNet
#
# The same network twice, with the same weights, on the same images of Fashion-MNIST: with batch norm
# it learns in a minute; without, it learns nothing. Why? And what goes wrong *with* batch norm: in
# small batches, and in prediction?
#
# Short runs are measured here and now. Curves over several epochs come from `curves/*.json`;
# `_curves.py` has the code that measured them, and `--regenerate` does so anew. They are of
# Fashion-MNIST, always. What runs here uses scikit-learn's digits where Fashion-MNIST is not to be
# had.

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
from npbn import functional as F
from npbn import inspection
from npbn.models import LeNet
from npbn.training import Training, evaluate

dataset = lesson.data()
is_fashion = dataset.key == "fashion-mnist"  # some claims hold for its images alone
WITH, WITHOUT = "with batch norm", "without"
COLOURS = {WITH: BLUE, WITHOUT: ORANGE}

# %% [markdown]
# ## A hundred steps, with and without
#
# Network A with sigmoids, batches of 256, SGD with the learning rate 1. Batch norm has no random
# initial values, so both networks start from the same weights.

# %%
steps = 40 if lesson.quick else 100
SNAPSHOTS = (0, 10, steps)
images, _ = next(dataset.test.batches(256, "float32"))


def train(run: Training) -> tuple[list[float], dict[int, list[np.ndarray]]]:
    """The loss of each step, and what enters the sigmoids of the test images at the snapshots."""
    losses: list[float] = []
    seen = {0: list(inspection.preactivations(run.model, images).values())}
    while len(losses) < steps:
        order = run.generator.permutation(len(run.train))[: 256 * (len(run.train) // 256)]
        for x, labels in run.train.batches(256, "float32", order=order):
            loss, _ = run.step(x, labels)
            losses.append(float(loss))
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
edges = np.linspace(-8, 8, 81)
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
# information. (A feature is a channel or a unit.) This is the standard deviation over the images, of
# the median feature:

# %%


def spread(values: np.ndarray) -> float:
    """The standard deviation within a feature, as batch norm sees it; of the median feature."""
    return float(np.median(np.std(values, axis=(0, 2, 3)[: values.ndim - 1])))


print(f"{'':29}" + "".join(f"{layer:>15}" for layer in LAYERS))
spreads = {name: {step: [spread(v) for v in seen[name][step]] for step in SNAPSHOTS} for name in runs}
for step in SNAPSHOTS:
    for name in runs:
        numbers = "".join(f"{value:15.4f}" for value in spreads[name][step])
        print(f"step {step:3}, {name:19}{numbers}")

figure, axes = plt.subplots(figsize=(6.5, 3.6))
for name, colour in COLOURS.items():
    for step, style in zip(SNAPSHOTS, (":", "--", "-"), strict=True):
        label = f"{name}, {'at the start' if step == 0 else f'after {step} steps'}"
        axes.semilogy(LAYERS, spreads[name][step], style, color=colour, marker="o", label=label)
axes.set_ylabel("spread over the images\n(standard deviation)")
axes.legend(fontsize="small")
lesson.show(figure, "spread")

assert np.allclose(spreads[WITH][0], 1, atol=0.01)  # gamma is 1 then
ratios = np.array(spreads[WITHOUT][0][1:]) / np.array(spreads[WITHOUT][0][:-1])
print(f"without batch norm, from layer to layer: times {', '.join(f'{r:.2f}' for r in ratios)}")
assert np.all(ratios < 1 / 3) and spreads[WITHOUT][0][-1] < 0.01

# %% [markdown]
# Without batch norm, every layer makes the differences between images four or five times smaller:
# the sigmoid's slope is 1/4 at most, and averaging does the rest. In front of the last sigmoid, a
# shoe and a shirt differ in the third decimal. All images look alike there, and so the best answer
# is the same for all: 1/10 for each class. The gradient shrinks in the same way on its way back.
#
# Batch norm sets the spread to $|\gamma|$ in every layer, at every step: 1 at first, and later what
# the network has learned to want.
#
# ## Learning rates
#
# Two epochs each. Where a line ends, the loss has become infinite or NaN.

# %%
by_rate = curves(lesson, learning_rates)
RATES = sorted({run["lr"] for run in by_rate})
figure, rows = plt.subplots(2, len(RATES), figsize=(12, 5.2), sharex=True, sharey=True)
final = {}
for found in by_rate:
    name = WITH if found["batch_norm"] else WITHOUT
    row, column = ("Sigmoid", "ReLU").index(found["activation"]), RATES.index(found["lr"])
    loss = np.array(found["loss"], dtype=float)  # None becomes NaN, which is not drawn
    finite = np.all(np.isfinite(loss))
    final[found["activation"], name, found["lr"]] = found["test_accuracy"][-1] if finite else None
    epochs = np.linspace(0.1, 2, len(loss))
    rows[row][column].plot(epochs, loss, color=COLOURS[name], label=name)
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
        accuracies = [final[activation, name, rate] for rate in RATES]
        print(
            f"{activation + ', ' + name:24}"
            + "".join(f"{'NaN' if a is None else f'{a:.3f}':>8}" for a in accuracies)
        )
