"""scripts/plot_run.py, and train.py --plots, as their users meet them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from commands import assert_refused, run
from npbn import data, plots
from npbn.checkpoint import load_checkpoint, save_checkpoint
from npbn.models import LeNet

BOTH = {"curves.png", "preactivations.png"}
OF_A_MODEL = {"filters.png", "feature_maps.png", "confusion_matrix.png", "mistakes.png"}


def pictures(directory: Path) -> dict[str, bytes]:
    """The files there, each of which must be a picture with something in it."""
    for path in directory.iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(2**24)) > 20, f"{path} is blank"
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """A directory with a run, "one", that may be changed."""
    shutil.copytree(runs / "with", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "plots")
    return tmp_path


def test_train_draws_what_plot_run_draws(runs, tmp_path):
    process = run("plot_run.py", "with", "--output", str(tmp_path / "here"), cwd=runs)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    drawn = pictures(tmp_path / "here")
    assert drawn.keys() == BOTH | OF_A_MODEL | {"batch_norm.png"}
    assert drawn == pictures(runs / "with" / "plots")
    first, *paths = process.stdout.splitlines()
    assert first.startswith("model: after epoch ")
    assert {Path(path).name for path in paths} == drawn.keys()


def test_the_model_is_drawn_in_prediction_mode(runs):
    model = LeNet()
    arrays, _ = load_checkpoint(runs / "with" / "best.safetensors")
    model.load_state_dict({n[6:]: array for n, array in arrays.items() if n[:6] == "model."})
    model.eval()
    test = data.load("digits").test
    x, labels = next(test.batches(1, "float32"))
    outputs = {"the image": x[0]}
    for i, layer in enumerate(model.layers):
        x = layer.forward(x)
        shape = " × ".join(map(str, x.shape[1:]))
        outputs[f"{i} {type(layer).__name__}\n{shape}"] = x[0]
    figure = plots.feature_maps(outputs, str(labels[0]), "0123456789")
    assert pictures(runs / "with" / "plots")["feature_maps.png"] == plots.png(figure)


def test_without_batch_norm_there_is_no_picture_of_it(runs, tmp_path):
    process = run("plot_run.py", "without", "--output", str(tmp_path / "a" / "b"), cwd=runs)
    assert process.returncode == 0, process.stderr
    assert pictures(tmp_path / "a" / "b").keys() == BOTH | OF_A_MODEL


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are always text")
def test_a_folder_may_have_any_name(runs, copy):
    name = os.fsdecode(b"$a_ \xff")
    (copy / "one").rename(copy / name)
    process = run("plot_run.py", name, str(runs / "without"), "--output", "here", cwd=copy)
    assert process.returncode == 0, process.stderr
    assert pictures(copy / "here").keys() == BOTH


def test_several_runs_are_compared(runs, tmp_path):
    process = run("plot_run.py", "with", "without", "--output", str(tmp_path / "here"), cwd=runs)
    assert process.returncode == 0, process.stderr
    drawn = pictures(tmp_path / "here")
    assert drawn.keys() == BOTH
    alone = pictures(runs / "with" / "plots")
    assert all(drawn[name] != alone[name] for name in BOTH)


def test_a_run_that_was_cut_short_is_drawn_as_far_as_it_came(copy):
    """One epoch is done, half of the next line is written, and nothing was evaluated yet."""
    one = copy / "one"
    lines = (one / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (one / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:50])
    (one / "best.safetensors").unlink()
    process = run("plot_run.py", "one", cwd=copy)
    assert process.returncode == 0, process.stderr
    assert "model: after epoch 3\n" in process.stdout  # the last
    assert pictures(one / "plots").keys() == BOTH | OF_A_MODEL | {"batch_norm.png"}
    process = run("plot_run.py", "one", "--checkpoint", "best", cwd=copy)
    assert_refused(process, "one/best.safetensors cannot be read: No such file")


@pytest.mark.parametrize(("options", "epoch"), [((), 1), (("--checkpoint", "last"), 3)])
def test_the_checkpoint_is_the_best_unless_asked_for_the_last(options, epoch, copy):
    """The best one is replaced, so that the two differ for sure."""
    arrays, record = load_checkpoint(copy / "one" / "last.safetensors")
    other = {name: -0.5 * array if "weight" in name else array for name, array in arrays.items()}
    save_checkpoint(copy / "one" / "best.safetensors", other, record | {"epoch": 1})
    process = run("plot_run.py", "one", *options, cwd=copy)
    assert process.returncode == 0, process.stderr
    assert f"model: after epoch {epoch}\n" in process.stdout
    weight = {1: other, 3: arrays}[epoch]["model.0.weight"]
    assert pictures(copy / "one" / "plots")["filters.png"] == plots.png(plots.filters(weight))


def test_before_the_first_epoch_is_done_there_is_nothing_to_draw(copy):
    path = copy / "one" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert_refused(run("plot_run.py", "one", cwd=copy), "one has finished no epoch yet")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "the following arguments are required: RUN"),
        (("nowhere",), "nowhere is not a directory; expected the folder of a run"),
        (("with", "without"), "argument --output: needed for 2 runs"),
        (
            ("with", "without", "--output", "x", "--checkpoint", "last"),
            "argument --checkpoint: not allowed with several runs",
        ),
        (("with", "--checkpoint", "first"), "argument --checkpoint: invalid choice: 'first'"),
        (("with", "--output", "with/config.json"), "with/config.json/curves.png cannot be written"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, expected, runs):
    assert_refused(run("plot_run.py", *arguments, cwd=runs), "plot_run.py: error:", expected)


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert_refused(
        run("plot_run.py", ".", cwd=tmp_path), "config.json: format: expected 2, got None"
    )
    process = run("plot_run.py", ".", str(tmp_path), "--output", "x", cwd=tmp_path)
    assert_refused(process, "metrics.jsonl cannot be read")


def test_damaged_metrics(copy):
    (copy / "one" / "metrics.jsonl").write_bytes(b"{}\n{\n")
    assert_refused(run("plot_run.py", "one", cwd=copy), "metrics.jsonl is damaged")


STAND_INS = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')",
        "matplotlib is not installed: pip install 'matplotlib>=3.10.7'",
    ),
    "broken": (
        "raise ImportError('numpy is too old')",
        "matplotlib is installed but cannot be loaded: numpy is too old",
    ),
}


@pytest.mark.parametrize("case", STAND_INS)
def test_without_matplotlib_one_line_says_what_to_do(case, runs, tmp_path):
    code, expected = STAND_INS[case]
    (tmp_path / "matplotlib.py").write_text(code)
    found = f"sys.path.insert(0, {str(tmp_path)!r})"
    process = run("plot_run.py", "with", "--output", str(tmp_path / "x"), cwd=runs, prelude=found)
    assert_refused(process, expected)

    options = ("--dataset", "digits", "--backend", "numpy", "--epochs", "1", "--run", "x")
    process = run("train.py", *options, "--plots", cwd=tmp_path, prelude=found)
    assert_refused(process, expected)
    assert process.stdout == ""  # before the training
    assert not (tmp_path / "x").exists()
    assert run("train.py", *options, cwd=tmp_path, prelude=found).returncode == 0


def test_a_run_that_goes_on_can_be_drawn(copy):
    """--plots is no part of a run's configuration."""
    process = run("train.py", "--resume", "one", "--plots", cwd=copy)
    assert process.returncode == 0, process.stderr
    assert pictures(copy / "one" / "plots").keys() == BOTH | OF_A_MODEL | {"batch_norm.png"}
