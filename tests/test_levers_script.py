"""scripts/levers.py: what it leaves out must not change what is computed."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest

from commands import SCRIPTS, run
from npbn.data import Split
from npbn.engine import Engine
from npbn.models import LeNet
from npbn.optim import SGD

interrupt = signal.getsignal(signal.SIGINT)
sys.path.insert(0, str(SCRIPTS))
try:
    import levers
finally:
    sys.path.remove(str(SCRIPTS))
    signal.signal(signal.SIGINT, interrupt)  # which the scripts leave to the system


def test_it_measures(tmp_path):
    process = run("levers.py", "--rounds", "1", "--steps", "1", "--batch-size", "4", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for lever in levers.LEVERS:
        assert lever in process.stdout
    assert "a step" in process.stdout.splitlines()[-1]


@pytest.mark.parametrize("lever", levers.LEVERS)
def test_without_a_lever_the_same_is_computed(lever):
    def gradients():
        generator = np.random.default_rng(0)
        images = generator.integers(256, size=(40, 1, 28, 28), dtype=np.uint8)
        split = Split(images, generator.integers(10, size=40))
        model = LeNet(generator=generator)
        Engine(model, SGD(model.parameters(), 0.1), (1, 28, 28), workers=1).step(
            split, np.arange(40)
        )
        return {name: p.gradient for name, p in model.parameters().items()}

    expected = gradients()
    with levers.without(lever):
        found = gradients()
    # Float32, other orders of sums of up to 23,040 terms, measured against the largest gradient.
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-4 * largest, name


def test_every_lever_is_still_there():
    """A name that is patched, and has gone meanwhile, would raise an error here."""
    for lever in levers.LEVERS:
        with levers.without(lever):
            pass
