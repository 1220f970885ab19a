"""Each picture shows the numbers that it was given, and says what they are."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from npbn import plots

CLASSES = ("coat", "bag", "boot")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def record(number: int, rng: np.random.Generator, *, tested: bool = True) -> dict:
    """A line of metrics as train.py writes it, for a network of two batch norms."""

    def metrics() -> dict:
        return {"loss": rng.random(), "accuracy": rng.random(), "examples": 9, "seconds": 1.0}

    return {
        "number": number,
        "train": metrics() if number else None,
        "test": metrics() if number and tested else None,
        "batch_norm": [
            {name: rng.random(size).tolist() for name in ("gamma", "beta")} for size in (3, 5)
        ],
        "preactivations": {
            name: rng.integers(0, 100, len(plots.HISTOGRAM_EDGES) - 1).tolist()
            for name in ("2", "6")
        },
    }


def records(last: int, rng: np.random.Generator, untested: tuple[int, ...] = ()) -> list[dict]:
    return [record(number, rng, tested=number not in untested) for number in range(last + 1)]


def test_curves_are_the_records(rng):
    runs = {"a": records(4, rng, untested=(1, 3)), "b": records(2, rng)}
    figure = plots.curves(runs)
    for axes, quantity in zip(figure.axes, ("loss", "accuracy"), strict=True):
        lines = axes.get_lines()
        expected = (("a", "train", (1, 2, 3, 4)), ("a", "test", (2, 4)), ("b", "train", (1, 2)))
        for line, (name, split, epochs) in zip(lines, expected, strict=False):
            assert line.get_linestyle() == {"train": "-", "test": "--"}[split]
            np.testing.assert_array_equal(line.get_xdata(), epochs)
            values = [runs[name][epoch][split][quantity] for epoch in epochs]
            np.testing.assert_array_equal(line.get_ydata(), values)
        colours = [line.get_color() for line in lines]
        assert colours[0] == colours[1] != colours[2] == colours[3]
        assert axes.get_xlabel() == "epoch"
        assert quantity in axes.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize("name", ["module://no_such.backend", "agg"])
def test_pictures_come_out_whatever_jupyter_says(name):
    program = "from npbn import plots; plots.png(plots._new_figure(2, 2, 'x')); print('drawn')"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"MPLBACKEND": name},
        capture_output=True,
        text=True,
    )
    assert process.stdout == "drawn\n", process.stderr


@pytest.mark.parametrize("length", [8, 60])
@pytest.mark.parametrize("count", [2, 7, 8, 40])
def test_a_legend_fits_below_any_number_of_runs(count, length, rng):
    names = [f"seed={k} {'momentum=0.9 lr=0.05 ' * 3}"[:length] for k in range(count)]
    runs = {name: records(1, rng) for name in names}
    for figure in (plots.curves(runs), plots.preactivation_histograms(runs)):
        plots.png(figure)  # which lays it out
        (legend,) = figure.legends
        box, whole = legend.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0
        assert all(axes.bbox.height > 60 for axes in figure.axes)
        assert [text.get_text() for text in legend.get_texts()] == names
        colours = {
            tuple(
                np.atleast_1d(
                    handle.get_facecolor()
                    if hasattr(handle, "get_facecolor")
                    else handle.get_color()
                )
            )
            for handle in legend.legend_handles
        }
        assert len(colours) == count


def test_batch_norm_parameters_are_a_line_for_each_feature(rng):
    run = records(3, rng)
    figure = plots.batch_norm_parameters(run)
    grid = np.reshape(figure.axes, (2, 2))
    for k, features in enumerate((3, 5)):
        for axes, name, symbol in zip(grid[:, k], ("gamma", "beta"), "γβ", strict=True):
            lines = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
            drawn = sorted(tuple(line.get_ydata()) for line in lines)
            values = np.array([line["batch_norm"][k][name] for line in run])
            assert drawn == sorted(map(tuple, values.T))
            assert len(lines) == features
            np.testing.assert_array_equal(lines[0].get_xdata(), range(4))
            assert axes.get_ylabel() == symbol
        assert grid[0, k].get_title() == f"batch norm {k + 1}: {features} features"


@pytest.mark.parametrize(
    ("last", "epochs"), [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (10, [0, 1, 5, 10])]
)
def test_histograms_are_those_of_the_chosen_epochs(last, epochs, rng):
    runs = {"long": records(last + 2, rng), "short": records(last, rng)}
    figure = plots.preactivation_histograms(runs)
    grid = np.reshape(figure.axes, (len(epochs), 2))
    for row, epoch in zip(grid, epochs, strict=True):
        where = "before training" if epoch == 0 else f"after epoch {epoch}"
        assert row[0].get_ylabel() == where
        for axes, layer in zip(row, ("2", "6"), strict=True):
            outlines = [patch for patch in axes.patches if not patch.get_fill()]
            for outline, run in zip(outlines, runs.values(), strict=True):
                counts = np.array(run[epoch]["preactivations"][layer])
                np.testing.assert_allclose(outline.get_data().values, counts / counts.sum())
                np.testing.assert_array_equal(outline.get_data().edges, plots.HISTOGRAM_EDGES)
    assert {"long", "short", "activation 2", "pre-activation"} <= set(texts(figure))


def test_filters_are_the_weights_on_one_scale_around_zero(rng):
    weight = rng.normal(size=(4, 2, 5, 5))
    *panels, bar = plots.filters(weight).axes
    for axes, (c, f) in zip(panels, np.ndindex(2, 4), strict=True):
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), weight[f, c])
        assert image.get_clim() == (-np.max(np.abs(weight)), np.max(np.abs(weight)))
    assert bar.get_ylabel() == "weight"


def test_feature_maps_stand_side_by_side_and_the_logits_have_names(rng):
    image, maps, logits = rng.random((1, 28, 28)), rng.random((3, 24, 24)), rng.random(3)
    figure = plots.feature_maps({"image": image, "0 Conv2d": maps, "1": logits}, "bag", CLASSES)
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(drawn[0], image[0])
    gap = (drawn[1].shape[1] - 3 * 24) // 2
    for c in range(3):
        start = c * (24 + gap)
        np.testing.assert_array_equal(drawn[1][:, start : start + 24], maps[c])
    assert np.count_nonzero(np.ma.getmaskarray(np.ma.masked_invalid(drawn[1]))) == 24 * 2 * gap
    np.testing.assert_array_equal(drawn[2], logits[None])
    assert {"image", "0 Conv2d", *CLASSES} <= set(texts(figure))
    assert "(bag)" in figure.get_suptitle()


def test_confusion_matrix_has_true_classes_as_rows():
    labels = np.array([0, 0, 0, 1, 1])
    predictions = np.array([0, 2, 2, 1, 0])
    figure = plots.confusion_matrix(labels, predictions, CLASSES)
    axes = figure.axes[0]
    found = np.zeros((3, 3), dtype=int)
    for text in axes.texts:
        column, row = text.get_position()
        found[row, column] = int(text.get_text())
    np.testing.assert_array_equal(found, [[1, 0, 2], [1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(
        axes.get_images()[0].get_array(), [[1 / 3, 0, 2 / 3], [1 / 2, 1 / 2, 0], [0, 0, 0]]
    )
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert tuple(text.get_text() for text in ticks) == CLASSES
    assert "5 test images, 40.0% of them right" in figure.get_suptitle()


def test_mistakes_are_the_wrong_ones_the_surest_first():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 1, 8, 8), np.uint8)
    probabilities = np.array([[0.1, 0.8, 0.1], [0, 0, 1], [0.95, 0, 0.05], [0.6, 0.4, 0]])
    figure = plots.mistakes(images, np.array([0, 2, 1, 1]), probabilities, CLASSES)
    drawn = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in drawn] == [
        "image 2: bag\ntaken for coat, 95.0%",
        "image 0: coat\ntaken for bag, 80.0%",
        "image 3: bag\ntaken for coat, 60.0%",
    ]
    assert [axes.get_images()[0].get_array()[0, 0] for axes in drawn] == [2, 0, 3]


def test_no_mistakes_and_many_mistakes(rng):
    images, labels = np.zeros((40, 1, 8, 8), np.uint8), np.zeros(40, int)
    for right, expected in ((0, 0), (1, 15)):
        probabilities = np.eye(3)[np.full(40, right)]
        figure = plots.mistakes(images, labels, probabilities, CLASSES)
        assert sum(bool(axes.get_images()) for axes in figure.axes) == expected
        assert plots.png(figure)


@pytest.mark.parametrize("name", ["$x", "a$b$c", r"$\nothing$", "_hidden", "new\nline"])
def test_the_name_of_a_run_may_be_anything(name, rng):
    figure = plots.curves({name: records(1, rng)})
    with Image.open(io.BytesIO(plots.png(figure))) as image:
        assert image.format == "PNG" and image.width == 1000
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text.strip() for text in legend] == [name]
