"""scripts/train.py and predict.py with CuPy, as programs: what they print and save is NumPy's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from commands import GPU, run
from npbn.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("cupy_backend")

SHORT = ("--dataset", "digits", "--limit-train", "24", "--batch-size", "8", "--lr", "0.1")
SHORT += ("--epochs", "4", "--eval-every", "4", "--momentum", "0.9")


def losses(path) -> list[float]:
    records = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    parts = [record[part] for record in records for part in ("train", "test")]
    return [part["loss"] for part in parts if part is not None]


def train(folder, *options, streams):
    """Train with CuPy, in a run with the name of the engine."""
    name = options[options.index("--engine") + 1]
    process = run(
        *("train.py", *options, "--backend", "cupy", "--run", name),
        cwd=folder,
        prelude=GPU,
        env={"EMULATED_GPU_STREAMS": streams},
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.parametrize("network", ["lenet", "blenet"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_are_those_of_numpy(network, dtype, tmp_path):
    """By layers and by the engine.

    In float32, twelve steps spread the roundings of a step, about 1e-7, by a factor of a few
    hundred: the batches are small.
    """
    options = (*SHORT, "--model", network, "--dtype", dtype)
    process = run(*("train.py", *options, "--backend", "numpy", "--run", "right"), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    right = losses(tmp_path / "right")
    for engine in ("layers", "fused"):
        process = train(tmp_path, *options, "--engine", engine, streams="late")
        said = "by layers" if engine == "layers" else "by the fused engine on the GPU"
        assert f"{dtype}, {said}\n" in process.stdout
        bound = {"float32": 2e-3, "float64": 1e-9}[dtype]
        np.testing.assert_allclose(losses(tmp_path / engine), right, rtol=bound, err_msg=engine)


def test_the_default_is_the_engine_to_the_bit_with_early_streams(tmp_path):
    """The comparison of the first step leaves nothing behind."""
    for engine, streams in (("fused", "late"), ("auto", "early")):
        process = train(tmp_path, *SHORT, "--engine", engine, streams=streams)
        assert "by the fused engine on the GPU\n" in process.stdout
    arrays, others = (
        load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("fused", "auto")
    )
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, others[name], err_msg=name)


ON_THE_CPU = """
import numpy
from npbn import verify

def check_model(model, x, labels, original=verify.check_model):
    assert type(x) is type(labels) is numpy.ndarray
    return original(model, x, labels)

verify.check_model = check_model
"""


def test_gradients_are_checked_and_images_are_classified(tmp_path):
    from PIL import Image

    options = (*SHORT, "--backend", "cupy", "--check-gradients", "--precise-bn", "--run", "run")
    process = run("train.py", *options, cwd=tmp_path, prelude=GPU + ON_THE_CPU)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("  right") == 19
    Image.fromarray(np.full((28, 28), 255, np.uint8)).save(tmp_path / "white.png")
    process = run("predict.py", "run", "white.png", "--invert", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "white.png" in process.stdout
