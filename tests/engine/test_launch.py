"""Launch sequences and their arrays, without any device."""

from __future__ import annotations

import configparser
import itertools
import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import models

from npbn.engine.gpu import launch, shapes
from npbn.engine.gpu.program import SOURCE, STRUCTURES, THREADS, Pointer, Program, Structure
from npbn.engine.plan import plan
from npbn.errors import UnsupportedError
from npbn.layers import BatchNorm, Conv2d, Flatten, Linear, Sequential
from npbn.models import LeNet


def names(program: Program) -> list[str]:
    return [step.kernel.split("<")[0] for step in program.launches]


def pointers(arguments) -> Iterator[Pointer]:
    """Those in structures, too."""
    for argument in arguments:
        if isinstance(argument, Structure):
            yield from pointers(argument.values.values())
        elif isinstance(argument, Pointer):
            yield argument


def test_the_sequence_for_lenet():
    stages = plan(LeNet(), (1, 28, 28))
    forward = ["conv_forward"] * 2 + ["linear_forward"] * 2 + ["linear_cross_entropy"]
    backward = ["linear_backward"] * 2 + ["conv_backward"] * 2
    assert names(launch.training(stages, 256, examples=1000)) == [*forward, *backward, "sgd"]
    assert names(launch.evaluation(stages, 256, examples=600)) == forward * 3


@given(
    drawn=models(),
    n=st.integers(1, 300),
    multiprocessors=st.sampled_from([1, launch.MULTIPROCESSORS, 10**6]),
    fixed=st.booleans(),
)
def test_what_holds_for_every_program(drawn, n, multiprocessors, fixed):
    model, shape = drawn
    stages = plan(model, shape)
    options = {"examples": 1000, "multiprocessors": multiprocessors, "fixed": fixed}
    program = launch.training(stages, n, **options)
    for each in (program, launch.evaluation(stages, n, **options)):
        for step in each.launches:
            assert min(step.grid) >= 1
            for argument in pointers(step.arguments):
                spec = each.arrays[argument.array]
                assert 0 <= argument.offset < max(1, np.prod(spec.shape))

    # Every parameter once, one after the other; no number of the partial sums in two of them.
    (table,) = (spec.value for name, spec in program.arrays.items() if name.startswith("tensors"))
    tensors = sorted(map(tuple, table))
    ends = [offset + size for offset, size, *_ in tensors]
    assert [offset for offset, *_ in tensors] == [0, *ends[:-1]]
    assert program.arrays["parameters"].shape == (ends[-1],)
    assert ends[-1] == sum(p.data.size for p in model.parameters().values())
    taken = sorted((start, start + size * parts) for _, size, start, parts, _ in tensors if parts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert taken[-1][1] <= program.arrays["partials"].shape[0]


def test_a_thousand_classes_fit_into_shared_memory():
    stages = plan(Sequential(Flatten(), Linear(4, 1000)), (1, 2, 2))
    for step in launch.training(stages, 256, examples=1000).launches:
        assert step.shared <= 48 * 1024


def test_images_may_be_more_numbers_than_an_int_counts():
    program = launch.training(plan(LeNet(), (1, 28, 28)), 4, examples=3_000_000)
    assert program.arrays["train.images"].shape == (3_000_000, 784)


def test_a_bias_before_batch_norm_has_no_partial_sums():
    """Its gradient stays exactly 0."""
    layers = Conv2d(1, 2, 3), BatchNorm(2, 4), Flatten(), Linear(8, 3), BatchNorm(3, 2)
    stages = plan(Sequential(*layers), (1, 4, 4))
    program = launch.training(stages, 4, examples=4)
    parts = {offset: count for offset, _, _, count, _ in program.arrays["tensors4"].value}
    for name, (offset, _) in launch.parameter_offsets(stages).items():
        assert (parts[offset] > 0) == name.endswith(".weight"), name


def test_programs_of_one_model_share_what_outlives_a_step():
    stages = plan(LeNet(), (1, 28, 28))
    large, small = (launch.training(stages, n, examples=1000).arrays for n in (256, 100))
    for name in (
        "parameters",
        "gradients",
        "velocities",
        "0.moving_mean",
        "train.images",
    ):
        assert large[name] == small[name]


def test_sizes_are_those_of_the_kernels():
    """The numbers that the Python and kernels.cu have in common."""
    source = SOURCE.read_text()
    names = (
        "THREADS",
        "TILE",
        "TILE_K",
        "VECTOR",
        "ROWS_PER_THREAD",
        "MAPS_PER_THREAD",
        "TAPS_PER_THREAD",
        "BANKS",
        "PARAMETERS_PER_BLOCK",
    )
    for name in (*names, "SIGMOID", "RELU"):
        (value,) = re.findall(rf"\b{name} = (\d+)", source)
        python = {"SIGMOID": 1, "RELU": 2}.get(name) or getattr(shapes, name, THREADS)
        assert int(value) == python
    for structure, fields in STRUCTURES.items():
        (body,) = re.findall(rf"struct {structure} {{(.*?)}};", source, re.DOTALL)
        body = re.sub(r"//.*", "", body)
        found = {}
        for declaration in body.split(";")[:-1]:
            kind = re.findall(r"\b(?:int|real)\b", declaration)
            for name in declaration.split(","):
                pointer = "*" in name or "*" in declaration.split(",")[0]
                found[re.findall(r"\w+", name)[-1]] = "pointer" if pointer else kind[0]
        assert list(found.items()) == list(fields.items())


@pytest.mark.parametrize(
    ("layers", "shape", "n", "message"),
    [
        ((Conv2d(1, 8, 3), Flatten(), Linear(8 * 98 * 98, 1)), (1, 100, 100), 30_000, "y0 would"),
        ((Flatten(), Linear(4, 70_000 * 16)), (1, 2, 2), 2, "need a grid of"),
        (
            (Conv2d(1, 1, 3), Flatten(), Linear(300**2, 1)),
            (1, 302, 302),
            2,
            "bytes of shared memory",
        ),
    ],
)
def test_what_is_too_large_is_refused(layers, shape, n, message):
    with pytest.raises(UnsupportedError, match=message):
        launch.training(plan(Sequential(*layers), shape), n, examples=10)


def test_the_source_is_part_of_the_package():
    assert SOURCE.is_file()
    settings = configparser.ConfigParser()
    settings.read(SOURCE.parents[3] / "setup.cfg")
    assert settings["options.package_data"]["npbn.engine.gpu"] == SOURCE.name
