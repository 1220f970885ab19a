"""Draw the pictures of runs and write them to files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npbn import data, experiment, inspection, plots
from npbn.checkpoint import write_file
from npbn.commands.command_line import say
from npbn.errors import NpbnError
from npbn.experiment import Loaded
from npbn.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_run(loaded: Loaded, dataset: data.Dataset, directory: Path) -> None:
    """Draw all pictures of one run and of its loaded model; the model computes on the CPU."""
    draw_comparison([loaded.run], directory)
    model, dtype = loaded.model, loaded.config.dtype
    if not loaded.config.no_batch_norm:
        _save(plots.batch_norm_parameters(loaded.run.layers()), directory / "batch_norm.png")
    _save(plots.filters(model.parameters()["0.weight"].data), directory / "filters.png")

    x, labels = next(dataset.test.batches(1, dtype))
    outputs = {"the image": x[0]}
    for i, output in enumerate(inspection.activations(model, x)):
        shape = " × ".join(str(size) for size in output.shape[1:])
        outputs[f"{i} {type(model.layers[i]).__name__}\n{shape}"] = output[0]
    classes = dataset.classes
    _save(plots.feature_maps(outputs, classes[labels[0]], classes), directory / "feature_maps.png")

    images, labels = dataset.test.images, dataset.test.labels
    found = inspection.probabilities(model, dataset.test, dtype=dtype)
    matrix = plots.confusion_matrix(labels, found.argmax(axis=1), classes)
    _save(matrix, directory / "confusion_matrix.png")
    _save(plots.mistakes(images, labels, found, classes), directory / "mistakes.png")


def draw_comparison(runs: Sequence[Run], directory: Path) -> None:
    """Draw the pictures that can show one run or several runs."""
    metrics = [run.records() for run in runs]
    layers = [run.layers()[: len(records)] for run, records in zip(runs, metrics, strict=True)]
    for run, records in zip(runs, metrics, strict=True):
        if len(records) < 2:
            raise NpbnError(f"{run.path} has finished no epoch yet: there is nothing to draw")
    labels = _labels(runs)
    _save(plots.curves(dict(zip(labels, metrics, strict=True))), directory / "curves.png")
    if len({len(records[0]["preactivations"]) for records in layers}) > 1:
        say("note: the networks differ in their activations, so preactivations.png is not drawn")
        return
    histograms = plots.preactivation_histograms(dict(zip(labels, layers, strict=True)))
    _save(histograms, directory / "preactivations.png")


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a label for each run: the options in which it differs from other runs.

    The path of the run is added to a label that several runs would have.
    """
    # matplotlib needs valid Unicode.
    paths = [os.fsencode(run.path).decode(errors="replace") for run in runs]
    labels = experiment.differences([experiment.open_run(run.path)[1] for run in runs])
    return [
        label if label and labels.count(label) == 1 else f"{label} {path}".strip()
        for label, path in zip(labels, paths, strict=True)
    ]


def _save(figure: Figure, path: Path) -> None:
    content = plots.png(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise NpbnError(f"{path} cannot be written: {error.strerror}") from None
    say(str(path))
