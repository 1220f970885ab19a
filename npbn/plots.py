"""Draw training runs and what a network computes, as figures of matplotlib.

matplotlib is imported only when something is drawn, because npbn can train without it. The
functions do not use pyplot and open no window. So they also work on machines without a screen.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from npbn.errors import NpbnError
from npbn.inspection import HISTOGRAM_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
"""The records of the epochs of a run; see `npbn.runs`."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito, which colour-blind people can distinguish."""


def colours(count: int) -> Sequence[Any]:
    """Return a colour for each of ``count`` runs: `COLOURS`, or shades if there are more runs."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    return [_viridis(shade) for shade in np.linspace(0, 0.95, count)]


def check_matplotlib() -> None:
    """Raise an error if matplotlib cannot be used.

    Call this function before a long computation whose result will be drawn.

    Raises:
        NpbnError: matplotlib is not installed, or does not work.
    """
    try:
        try:
            import matplotlib  # Only whether this works is of interest.
        except ValueError:
            # Jupyter gives its own MPLBACKEND to commands, whose environment may not have it.
            del os.environ["MPLBACKEND"]
        import matplotlib.figure  # noqa: F401 (as above)
    except ImportError as error:
        if error.name == "matplotlib":
            problem = "not installed: pip install 'matplotlib>=3.10.7'"
        else:
            problem = f"installed but cannot be loaded: {error}"
        raise NpbnError(f"matplotlib is {problem}") from None


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def curves(runs: Mapping[str, Records]) -> Figure:
    """Draw loss and accuracy of each epoch, for one run or several runs.

    Args:
        runs: the metrics of the runs by the names in the legend.
    """
    title = "Loss and accuracy by epoch (train, solid: mean over the epoch; test, dashed: after it)"
    figure = _new_figure(10, 4.2 + _legend_height(10, runs), title)
    panels = figure.subplots(1, 2)
    handles: dict[str, Any] = {}
    for axes, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for colour, (name, records) in zip(colours(len(runs)), runs.items(), strict=True):
            for split, style in (("train", "-"), ("test", "o--")):
                found = [record for record in records if record[split] is not None]
                (handles[name],) = axes.plot(
                    [record["number"] for record in found],
                    [record[split][quantity] for record in found],
                    style,
                    color=colour,
                )
        axes.grid(alpha=0.3)
        _count_epochs(axes)
    panels[0].set_ylabel("loss (mean cross-entropy, nats)")
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylabel("accuracy (fraction right)")
    _add_legend(figure, handles)
    return figure


def batch_norm_parameters(records: Records) -> Figure:
    """Draw γ and β of every batch norm as functions of the epoch."""
    layers = len(records[0]["batch_norm"])
    title = "γ and β of each batch norm: a line for each feature, dotted where all began"
    figure = _new_figure(3.2 * layers, 6, title)
    grid = figure.subplots(2, layers, sharex=True, squeeze=False)
    epochs = [record["number"] for record in records]
    for k in range(layers):
        for axes, name, symbol in zip(grid[:, k], ("gamma", "beta"), "γβ", strict=True):
            values = np.array([record["batch_norm"][k][name] for record in records])
            features = values.shape[1]
            # Colours from dark to bright, in the order of the final values.
            for shade, i in zip(np.linspace(0, 0.9, features), np.argsort(values[-1]), strict=True):
                axes.plot(epochs, values[:, i], color=_viridis(shade), linewidth=1)
            axes.axhline(values[0, 0], color="black", linestyle=":")
            axes.grid(alpha=0.3)
            axes.set_ylabel(symbol)
        grid[0, k].set_title(f"batch norm {k + 1}: {features} features")
        _count_epochs(grid[1, k])
    return figure


def preactivation_histograms(runs: Mapping[str, Records]) -> Figure:
    """Draw histograms of the input of each activation layer, at four epochs that all runs have.

    Args:
        runs: the records of the layers of the runs (`npbn.runs.Run.layers`) by the names in the
            legend. All runs have the same number of activation layers.
    """
    last = min(records[-1]["number"] for records in runs.values())
    epochs = sorted({0, 1, (last + 1) // 2, last})
    some = next(iter(runs.values()))
    layers = len(some[0]["preactivations"])
    title = (
        "Distribution of each layer's pre-activations on a batch of training images "
        f"(beyond ±{HISTOGRAM_EDGES[-1]:g}: in the outermost bins)"
    )
    height = 1.7 * len(epochs) + 0.6 + _legend_height(3 * layers, runs)
    figure = _new_figure(3 * layers, height, title)
    grid = figure.subplots(len(epochs), layers, sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for row, epoch in zip(grid, epochs, strict=True):
        for colour, (name, records) in zip(colours(len(runs)), runs.items(), strict=True):
            for axes, counts in zip(row, records[epoch]["preactivations"].values(), strict=True):
                share = np.array(counts) / max(sum(counts), 1)
                handles[name] = axes.stairs(share, HISTOGRAM_EDGES, color=colour, linewidth=1.5)
                axes.stairs(share, HISTOGRAM_EDGES, color=colour, fill=True, alpha=0.5 / len(runs))
        for axes in row:
            axes.set_yticks([])
            axes.axvline(0, color="black", linewidth=0.5)
        row[0].set_ylabel("before training" if epoch == 0 else f"after epoch {epoch}")
    for k in range(layers):
        grid[0, k].set_title(f"activation {k + 1}")
        grid[-1, k].set_xlabel("pre-activation")
    _add_legend(figure, handles)
    return figure


def filters(weight: np.ndarray) -> Figure:
    """Draw the filters of a convolution, (F, C, K, K), with one row for each input channel."""
    count, channels, _, _ = weight.shape
    figure = _new_figure(1.5 * count + 1, 1.6 * channels + 0.8, "Filters of the first convolution")
    grid = figure.subplots(channels, count, squeeze=False)
    limit = np.max(np.abs(weight))
    for c in range(channels):
        for f in range(count):
            drawn = grid[c, f].imshow(weight[f, c], cmap="RdBu_r", vmin=-limit, vmax=limit)
            _hide_ticks(grid[c, f])
            grid[0, f].set_title(f"filter {f + 1}")
    figure.colorbar(drawn, ax=grid, label="weight")
    return figure


def feature_maps(
    outputs: Mapping[str, np.ndarray], true_class: str, classes: Sequence[str]
) -> Figure:
    """Draw the output of each layer for one image.

    Args:
        outputs: the outputs by their titles: maps, (C, H, W), or vectors, (C,). The first one is
            the image, and the last one is the logits.
        true_class: the class of the image.
        classes: the names of the K classes, in the order of the logits.
    """
    strips = {name: _side_by_side(output) for name, output in outputs.items()}
    heights = [0.25 if s.shape[0] == 1 else 9 * s.shape[0] / s.shape[1] for s in strips.values()]
    heights[0] = 1.5
    title = (
        f"Layer by layer, what becomes of an image ({true_class}): dark is a layer's smallest "
        "value, bright its largest"
    )
    figure = _new_figure(12, sum(heights) + 0.12 * len(heights) + 0.8, title)
    column = figure.subplots(len(strips), 1, height_ratios=heights)
    for axes, (name, strip) in zip(column, strips.items(), strict=True):
        axes.imshow(strip, cmap="viridis", aspect="auto" if strip.shape[0] == 1 else "equal")
        axes.set_anchor("W")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        _hide_ticks(axes)
    column[-1].set_xticks(range(len(classes)), classes)
    return figure


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix: the number of examples for each true and each predicted class."""
    n = len(classes)
    counts = np.zeros((n, n), dtype=np.int64)
    np.add.at(counts, (labels, predictions), 1)
    share = counts / np.maximum(np.sum(counts, axis=1, keepdims=True), 1)
    accuracy = np.trace(counts) / np.sum(counts)
    title = f"Confusion matrix: {np.sum(counts):,} test images, {accuracy:.1%} of them right"
    figure = _new_figure(9, 8, title)
    axes = figure.subplots()
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for true in range(n):
        for predicted in range(n):
            colour = "white" if share[true, predicted] > 0.5 else "black"
            axes.text(
                predicted,
                true,
                f"{counts[true, predicted]}",
                ha="center",
                va="center",
                color=colour,
            )
    axes.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(drawn, label="fraction of the true class", shrink=0.8)
    return figure


def mistakes(
    images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> Figure:
    """Draw the wrong predictions with the highest probabilities, at most 15.

    Args:
        images: the images, (N, C, H, W), with values from 0 to 255.
        labels: the labels, (N,).
        probabilities: the predicted probabilities of the classes, (N, K).
        classes: the names of the K classes.
    """
    predictions = np.argmax(probabilities, axis=1)
    certainty = np.max(probabilities, axis=1)
    wrong = np.flatnonzero(predictions != labels)
    wrong = wrong[np.argsort(-certainty[wrong], kind="stable")][:15]
    title = f"The most confident of {np.sum(predictions != labels):,} mistakes on the test images"
    figure = _new_figure(11, 7.5, title)
    grid = figure.subplots(3, 5)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, wrong, strict=False):
        axes.imshow(np.moveaxis(images[i], 0, -1), cmap="gray", vmin=0, vmax=255)
        taken_for = f"{classes[predictions[i]]}, {certainty[i]:.1%}"
        axes.set_title(f"image {i}: {classes[labels[i]]}\ntaken for {taken_for}", fontsize=9)
    return figure


def _new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of this size in inches."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    return figure


def _side_by_side(output: np.ndarray) -> np.ndarray:
    """Return maps (C, H, W) as one image with gaps between the maps, or a vector (C,) as a row."""
    if output.ndim == 1:
        return output[None, :]
    _, height, width = output.shape
    gap = max(1, width // 12)
    padded = np.pad(output, ((0, 0), (0, 0), (0, gap)), constant_values=np.nan)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def _viridis(value: float) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](value)


def _count_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")


def _hide_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _legend_columns(width: float, labels: Iterable[str]) -> int:
    """Return the number of columns of a legend that fits below a figure of this width in inches."""
    return max(1, int(width * 11 / (max(map(len, labels)) + 6)))


def _legend_height(width: float, labels: Collection[str]) -> float:
    """Return the height of a legend in inches."""
    return 0.3 + 0.22 * math.ceil(len(labels) / _legend_columns(width, labels))


def _add_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Add a legend with these handles by their labels below the figure."""
    width = figure.get_figwidth()
    most = int(width * 10)  # characters in a line
    legend = figure.legend(
        list(handles.values()),
        # matplotlib leaves out labels that begin with an underscore.
        [f" {label}" if label.startswith("_") else label for label in handles],
        loc="outside lower center",
        ncols=_legend_columns(width, handles),
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)  # Dollar signs in names are no formulas.
        if len(label) > most:
            text.set_text(f"{label[: most // 2]} … {label[-(most // 2) :]}")
