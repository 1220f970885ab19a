"""The kernels' source in plain Python: equal to the layers, and inside its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fixed_models
import numpy as np
import pytest
import python_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, a_split, a_tiny_model, models

CpuEngine = python_kernels.load().CpuEngine


@pytest.mark.parametrize("make", fixed_models.ALL)
def test_fixed_models_equal_the_layers(make):
    model, splits, options = make()
    assert python_kernels.difference(CpuEngine, model, splits, **options) <= 1e-11


def test_with_as_many_parts_and_taps_as_the_engine_has():
    model, splits, options = fixed_models.convolutions()
    kernels = python_kernels.load(edits=())
    assert python_kernels.difference(kernels.CpuEngine, model, splits, **options) <= 1e-11


@pytest.mark.parametrize("make", [fixed_models.convolutions, fixed_models.linear_layers])
def test_vectors_of_float32_stay_float32(make):
    """And what needs another sigmoid, and has 16 lanes."""
    model, splits, options = make()
    error = python_kernels.difference(CpuEngine, model, splits, dtype="float32", **options)
    assert error <= 1e-4


@given(
    drawn=models(),
    batch_size=st.integers(2, 18),
    threads=st.integers(1, 3),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=8)
def test_drawn_models_equal_the_layers(drawn, **options):
    model, shape = drawn
    splits = a_split(shape, 18, 1), a_split(shape, 9, 3)
    assert python_kernels.difference(CpuEngine, model, splits, steps=1, **options) <= 1e-11


@pytest.mark.parametrize("batch_size", range(2, 26))
def test_batches_of_every_size(batch_size):
    splits = a_split(TINY, 25, 1), a_split(TINY, batch_size, 3)
    model = a_tiny_model()
    assert python_kernels.difference(CpuEngine, model, splits, batch_size=batch_size) <= 1e-11


# That what is wrong would be seen.


def a_step(edits) -> float:
    kernels = python_kernels.load((*python_kernels.SMALL_CONSTANTS, *edits))
    model, splits, options = fixed_models.convolutions()
    return python_kernels.difference(kernels.CpuEngine, model, splits, **options)


STATISTICS = "statistics(net, k, m, mask, examples)"


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("load(net.values, stages[k].y - 1)", IndexError, "is in no region"),
        ("load(net.values, stages[k].y - net.values.size)", IndexError, "is in no region"),
        ("store(net.values, stages[-1].z + 10**6, mask)", IndexError, "out of range"),
        ("at(net.values, stages[0].weight - 1)", IndexError, "is in no region"),
        ("put(net.values, -1, 0)", IndexError, "is in no region"),
        ("store(net.values, stages[k].y, np.float32(mask))", TypeError, "vector of float64"),
        ("put(net.values, stages[0].weight, thread)", RuntimeError, "two threads"),
        ("put(net.values, m, at(net.values, 0))", RuntimeError, "two threads"),
        ("put(net.values, net.values.lanes * stages[k].y, thread)", RuntimeError, "two threads"),
    ],
)
def test_what_compiled_code_would_do_silently_is_an_error(code, error, message):
    with pytest.raises(error, match=message):
        a_step([("launches", STATISTICS, f"{STATISTICS}; {code}")])


def test_what_nobody_has_written_is_not_a_number():
    """The gap of a plane, for instance, or the seventh to twelfth map of dy."""
    code = (
        "put(net.values, stages[0].weight, at(net.values, stages[0].gradient + stages[0].weight))"
    )
    assert (
        a_step([("launches", STATISTICS, f"{STATISTICS}\n{' ' * 16}if m == 0: {code}")]) == np.inf
    )


def test_a_text_that_is_gone_is_named():
    with pytest.raises(LookupError, match=r"launches.py has 0 times: nowhere"):
        a_step([("launches", "nowhere", "")])
    with pytest.raises(LookupError, match=r"launches.py has \d+ times: return"):
        a_step([("launches", "return", "")])


def test_numba_has_no_part_in_it():
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parents[i]) for i in (0, 1, 2)]!r}\n"
        "import python_kernels; python_kernels.load()\n"
        "assert not {'numba', 'llvmlite'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
