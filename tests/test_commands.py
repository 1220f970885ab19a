"""``npbn COMMAND``: what the scripts do not show; all on runs of the digits."""

from __future__ import annotations

import shutil

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from torch import nn

import npbn
from commands import assert_refused, run
from commands import npbn_command as command


def test_help_lists_the_commands(tmp_path):
    for arguments in ((), ("--help",)):
        process = command(*arguments, cwd=tmp_path)
        assert process.returncode == 0 and not process.stderr
        for name in npbn.commands.COMMANDS:
            assert f"\n  {name} " in process.stdout
            shown = command(name, "--help", cwd=tmp_path).stdout
            assert shown.startswith(f"usage: npbn {name} ") and "{" not in shown.split("usage")[0]
    assert_refused(command("no-such", cwd=tmp_path), "npbn: error:", "invalid choice: 'no-such'")


def test_a_script_is_the_command(runs):
    """But for what is typed to start it."""
    for script, name, arguments in (
        ("predict.py", "predict", ("with", "--index", "0", "5")),
        ("plot_run.py", "plot", ("with", "--output", "with/plots")),
    ):
        ours, theirs = command(name, *arguments, cwd=runs), run(script, *arguments, cwd=runs)
        assert ours.returncode == 0, ours.stderr
        assert ours.stdout == theirs.stdout
    assert_refused(command("predict", "with", cwd=runs), "npbn predict: error: ")
    assert_refused(run("predict.py", "with", cwd=runs), "predict.py: error: ")


def test_a_stopped_run_says_what_to_type(tmp_path):
    options = ("--dataset", "digits", "--threads", "1", "--engine", "layers", "--run", "a b")
    from commands import CTRL_C, after_step

    process = run("train.py", *options, cwd=tmp_path, prelude=after_step(3, CTRL_C))
    assert process.returncode == 130
    assert "to go on: python scripts/train.py --resume 'a b'\n" in process.stdout


def test_evaluate(runs):
    process = command("evaluate", "with", cwd=runs)
    assert process.returncode == 0, process.stderr
    found = npbn.load(runs / "with")
    test = npbn.data.load("digits").test
    right = found.predict(test.images).argmax(axis=1) == test.labels
    assert f"test images 360  accuracy {right.mean():.4f}  loss " in process.stdout
    fives = right[test.labels == 5]
    assert f"  5  {fives.mean():.4f}  of {fives.size}\n" in process.stdout


def test_runs_says_what_distinguishes_them(runs, tmp_path):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    (folder / "no run").mkdir()
    process = command("runs", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    head, broken, one, other = process.stdout.splitlines()
    assert head.split() == ["name", "differs", "in", "epochs", "best", "seconds"]
    assert broken.startswith("broken   ") and "format: expected 2" in broken
    assert one.startswith("with     with batch norm epochs=3     3/3     ")
    assert other.startswith("without  without batch norm epochs=2  2/2     ")
    assert_refused(command("runs", "none", cwd=tmp_path), "npbn runs: error: none cannot be read")
    assert_refused(command("runs", "runs/no run", cwd=tmp_path), "holds no runs")


@pytest.mark.parametrize("name", ["with", "without"])
def test_exported_models_predict_what_npbn_predicts(runs, tmp_path, name):
    """To float32's rounding: 1e-5 of the largest logit, for sums of up to 256 terms."""
    for file in ("model.onnx", "model.safetensors"):
        process = command("export", name, str(tmp_path / file), cwd=runs)
        assert process.returncode == 0, process.stderr
    loaded = npbn.load(runs / name)
    x = npbn.data.load("digits").test.images[:50] / np.float32(255)
    expected = loaded.model.forward(x)
    bound = 1e-5 * np.abs(expected).max()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    logits, classes = session.run(["logits", "classes"], {"images": x})
    assert np.abs(logits - expected).max() <= bound
    assert np.array_equal(classes, expected.argmax(axis=1))
    theirs = nn.Sequential(
        *(in_torch(layer) for layer in loaded.model.layers),
    ).eval()
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert np.abs(theirs(torch.from_numpy(x)).numpy() - expected).max() <= bound


def in_torch(layer) -> nn.Module:
    """The module that stands in a layer's place."""
    match type(layer).__name__:
        case "Conv2d":
            maps, channels, *kernel = layer.weight.data.shape
            return nn.Conv2d(channels, maps, kernel, padding=layer.padding)
        case "BatchNorm":
            shape = layer.gamma.data.shape
            return (nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) == 4](shape[1], eps=layer.eps)
        case "Linear":
            return nn.Linear(*layer.weight.data.shape[::-1])
        case name:
            return {"AvgPool2d": nn.AvgPool2d(2)}.get(name) or getattr(nn, name)()


def test_what_cannot_be_exported_is_refused(runs, tmp_path):
    process = command("export", "with", "model.pt", cwd=runs)
    assert_refused(process, "npbn export: error: expected a file name with .safetensors or .onnx")
    for file in ("model.onnx", "model.safetensors"):
        process = command("export", "with", str(tmp_path / "no" / file), cwd=runs)
        assert_refused(process, "cannot be written: No such file or directory")
