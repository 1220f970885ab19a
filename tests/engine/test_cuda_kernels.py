"""The GPU engine's kernels on the CPU, launched as on a GPU, against the layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator
from emulator import Emulator, compiled
from npbn import backend, training
from npbn.engine import launch, plan
from npbn.engine.plan import parameters_of
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD
from test_engine import a_split, models

NUMPY = backend.get_backend("numpy")
MANY = 10**6
"""More processors than there is work for: low tiles, and sums in many parts."""

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason="needs g++ (Debian: g++), which compiles the CUDA kernels"
)


def programs_of(model, shape, batch_sizes, **options):
    """One for each size of a batch, and one that evaluates 40 examples in tens and twelves."""
    blocks = plan(model, shape)
    stride = max(batch_sizes)
    sizes = {"fixed": options.pop("fixed", False), "processors": options.pop("processors", 132)}
    found = {
        n: launch.training(blocks, n, examples=60, stride=stride, **sizes, **options)
        for n in batch_sizes
    }
    return blocks, found, launch.evaluation(blocks, 20, examples=60, **sizes)


def kernel_names(programs) -> set[str]:
    return {step.kernel for program in programs for step in program.launches}


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """A directory that all test processes share."""
    return tmp_path_factory.getbasetemp().parent


def library(builds, *flags, source=None):
    """All kernels for sizes known when they run; those of LeNet for sizes known before, too."""
    names = set()
    for dtype in ("float32", "float64"):
        for processors in (1, MANY):
            model = LeNet()
            model.to(NUMPY, dtype)
            _, programs, evaluation = programs_of(model, (1, 28, 28), (4,), processors=processors)
            names |= kernel_names([*programs.values(), evaluation])
    model.to(NUMPY, "float64")
    _, programs, evaluation = programs_of(model, (1, 28, 28), (9, 16), fixed=True)
    names |= kernel_names([*programs.values(), evaluation])
    return compiled(builds, names, *flags, source=source)


def compare(library, model, shape, dtype, *, batch_sizes, bound, classes=3, skipped=0, **options):
    """Some steps both ways: losses, hits, gradients, parameters and moving averages."""
    model.to(NUMPY, dtype)
    expected = copy.deepcopy(model)
    split = a_split(shape, 60, 1, classes)
    optimizer = {k: options[k] for k in ("momentum", "weight_decay", "decay_all") if k in options}
    run = training.Training(
        expected,
        SGD(expected.parameters(), 0.1, **optimizer),
        split,
        split,
        batch_size=8,
        generator=np.random.default_rng(0),
        backend=NUMPY,
        dtype=dtype,
    )
    blocks, programs, evaluation = programs_of(model, shape, batch_sizes, **options)
    device = Emulator(library, [*programs.values(), evaluation], skipped_barrier=skipped)
    arrays = device.arrays
    write(arrays, blocks, split)
    order = np.random.default_rng(2).permutation(60)
    stride = max(batch_sizes)
    arrays["order"][:] = order
    arrays["rates"][: len(batch_sizes)] = 0.1
    try:
        for step, n in enumerate(batch_sizes):
            device.run(programs[n])
            right_loss, right_hits = run.step(order[step * stride : step * stride + n])
            loss = float(arrays["losses"][step])
            assert abs(loss - float(right_loss)) <= bound * max(1, abs(float(right_loss)))
            assert arrays["hits"][step] == right_hits
            check_parameters(arrays, blocks, plan(expected, shape), bound)
        arrays["step"][:] = 0
        for _ in range(3):
            device.run(evaluation)
        metrics = training.evaluate(expected, split, backend=NUMPY, dtype=dtype)
        loss = arrays["losses"][:3].mean()
        assert abs(loss - metrics.loss) <= bound * max(1, abs(loss))
        assert arrays["hits"][:3].sum() == round(metrics.accuracy * 60)
    finally:
        device.close()


def write(arrays, blocks, split) -> None:
    """What the host writes to the device before the first step."""
    arrays["images"][:] = split.images.reshape(len(split), -1)
    arrays["labels"][:] = split.labels
    for offset, parameter in launch.parameter_offsets(blocks).values():
        arrays["parameters"][offset : offset + parameter.data.size] = parameter.data.ravel()
    for i, block in enumerate(blocks):
        for name, owner, attribute in parameters_of(block):
            if attribute != "data":
                arrays[f"{i}.{name}"][:] = getattr(owner, attribute).ravel()


def check_parameters(arrays, blocks, expected, bound) -> None:
    """Gradients within the bound of the largest one; parameters and moving averages of theirs."""
    offsets, right = launch.parameter_offsets(blocks), launch.parameter_offsets(expected)
    scale = max(np.abs(parameter.gradient).max() for _, parameter in right.values())
    for name, (offset, parameter) in right.items():
        assert offsets[name][0] == offset
        part = slice(offset, offset + parameter.data.size)
        error = np.abs(arrays["gradients"][part] - parameter.gradient.ravel()).max()
        assert error <= bound * scale, (name, error / scale)
        error = np.abs(arrays["parameters"][part] - parameter.data.ravel()).max()
        assert error <= bound * max(1, np.abs(parameter.data).max()), name
    for i, block in enumerate(expected):
        for name, owner, attribute in parameters_of(block):
            if attribute != "data":
                value = getattr(owner, attribute).ravel()
                error = np.abs(arrays[f"{i}.{name}"] - value).max()
                assert error <= bound * max(1, np.abs(value).max()), (i, name)


@settings(max_examples=20)
@given(
    drawn=models(),
    batch_sizes=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    processors=st.sampled_from([1, 4, MANY]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decay_all=st.booleans(),
)
def test_equal_to_the_layers(builds, drawn, batch_sizes, **options):
    model, shape = drawn
    compare(
        library(builds), model, shape, "float64", batch_sizes=batch_sizes, bound=1e-10, **options
    )


@pytest.mark.parametrize("network", [LeNet, BLeNet])
def test_the_networks(builds, network):
    model = network(generator=np.random.default_rng(0))
    compare(
        library(builds),
        model,
        (1, 28, 28),
        "float64",
        batch_sizes=(16, 9),
        bound=1e-10,
        classes=10,
    )
