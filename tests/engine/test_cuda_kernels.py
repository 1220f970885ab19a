"""The GPU engine's kernels on the CPU, launched as on a GPU, against the layers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import NUMPY, SMALL, a_split, models, optional_parts, small_model

import emulated_gpu
import emulator
from emulated_gpu import build
from emulator import Emulator, compiled
from npbn import functional as F
from npbn import training
from npbn.engine.gpu import launch
from npbn.engine.gpu.program import SOURCE
from npbn.engine.layers import LayersEngine
from npbn.engine.plan import plan
from npbn.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD

MANY = 10**6
"""More multiprocessors than there is work for: sums in as many parts as there can be."""

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"

BARRIERS = [
    number
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]
"""The lines where they are."""

pytestmark = pytest.mark.skipif(
    bool(emulated_gpu.missing_compiler()), reason=emulated_gpu.missing_compiler()
)


def programs_of(model, shape, batch_sizes, **options):
    """One for each size of a batch, and one that evaluates 60 examples, 25 at a time."""
    stages = plan(model, shape)
    stride = max(batch_sizes)
    sizes = {
        "fixed": options.pop("fixed", False),
        "multiprocessors": options.pop("multiprocessors", 132),
    }
    found = {
        n: launch.training(stages, n, examples=60, stride=stride, **sizes, **options)
        for n in batch_sizes
    }
    return stages, found, launch.evaluation(stages, 25, examples=60, **sizes)


def kernel_names(programs) -> set[str]:
    return {step.kernel for program in programs for step in program.launches}


def library(*flags, source=None):
    """All kernels for sizes known when they run; those of LeNet for sizes known before, too."""
    names = all_names("float32") | all_names("float64")
    model = LeNet()
    model.to(NUMPY, "float64")
    _, programs, evaluation = programs_of(model, (1, 28, 28), (9, 16), fixed=True)
    names |= kernel_names([*programs.values(), evaluation])
    return compiled(names, *flags, source=source)


def all_names(dtype: str) -> set[str]:
    """The kernels for sizes known when they run."""
    names = set()
    for model in (small_model(), normalized_logits()):
        model.to(NUMPY, dtype)
        _, programs, evaluation = programs_of(model, SMALL, (5,))
        names |= kernel_names([*programs.values(), evaluation])
    return names


def normalized_logits() -> Sequential:
    """With them, the last linear layer and the loss are in launches of their own."""
    return Sequential(*small_model().layers, BatchNorm(3, 2))


def compare(library, model, shape, dtype, *, batch_sizes, bound, classes=3, skipped=0, **options):
    """Some steps both ways: losses, predictions, gradients, parameters and moving averages."""
    model.to(NUMPY, dtype)
    expected = copy.deepcopy(model)
    split = a_split(shape, 60, 1, classes)
    optimizer = {k: options[k] for k in ("momentum", "weight_decay") if k in options}
    layers = LayersEngine(
        expected,
        SGD(expected.parameters(), 0.1, **optimizer),
        split,
        split,
        batch_size=60,
        backend=NUMPY,
    )
    stages, programs, evaluation = programs_of(model, shape, batch_sizes, **options)
    device = Emulator(library, [*programs.values(), evaluation], skipped_barrier=skipped)
    arrays = device.arrays
    write(arrays, stages, split)
    order = np.random.default_rng(2).permutation(60)
    stride = max(batch_sizes)
    arrays["order"][:] = order
    arrays["rates"][: len(batch_sizes)] = 0.1
    try:
        for step, n in enumerate(batch_sizes):
            device.run(programs[n])
            (right,) = layers.steps(order[step * stride : step * stride + n])
            loss = float(arrays["train.losses"][step].sum())
            assert abs(loss - float(right.loss)) <= bound * max(1, abs(float(right.loss)))
            assert arrays["train.correct"][step].sum() == right.correct
            check_parameters(arrays, stages, plan(expected, shape), bound)
        device.run(evaluation)
        metrics = training.evaluate(expected, split, dtype=dtype)
        loss = np.average(arrays["test.losses"].sum(1), weights=(25, 25, 10))
        assert abs(loss - metrics.loss) <= bound * max(1, abs(loss))
        assert arrays["test.correct"].sum() == round(metrics.accuracy * 60)
    finally:
        device.close()


def write(arrays, stages, split) -> None:
    """What the host writes to the device before the first step."""
    for data in ("train", "test"):
        if f"{data}.images" in arrays:
            arrays[f"{data}.images"][:] = split.images.reshape(len(split), -1)
            arrays[f"{data}.labels"][:] = split.labels
    for offset, parameter in launch.parameter_offsets(stages).values():
        arrays["parameters"][offset : offset + parameter.data.size] = parameter.data.ravel()
    for i, stage in enumerate(stages):
        for name in moving_averages(stage):
            arrays[f"{i}.{name}"][:] = stage.state()[name].data.ravel()


def moving_averages(stage) -> list[str]:
    return [] if stage.norm is None else ["moving_mean", "moving_var"]


def check_parameters(arrays, stages, expected, bound) -> None:
    """Gradients within the bound of the largest one; parameters and moving averages of theirs."""
    offsets, right = launch.parameter_offsets(stages), launch.parameter_offsets(expected)
    scale = max(np.abs(parameter.gradient).max() for _, parameter in right.values())
    for name, (offset, parameter) in right.items():
        assert offsets[name][0] == offset
        part = slice(offset, offset + parameter.data.size)
        error = np.abs(arrays["gradients"][part] - parameter.gradient.ravel()).max()
        assert error <= bound * scale, (name, error, scale)
        error = np.abs(arrays["parameters"][part] - parameter.data.ravel()).max()
        assert error <= bound * max(1, np.abs(parameter.data).max()), name
    for i, stage in enumerate(expected):
        for name in moving_averages(stage):
            value = stage.state()[name].data.ravel()
            error = np.abs(arrays[f"{i}.{name}"] - value).max()
            assert error <= bound * max(1, np.abs(value).max()), (i, name)


@given(
    drawn=models(),
    batch_sizes=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    multiprocessors=st.sampled_from([1, 4, MANY]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
def test_equal_to_the_layers(drawn, batch_sizes, **options):
    model, shape = drawn
    compare(library(), model, shape, "float64", batch_sizes=batch_sizes, bound=1e-10, **options)


@pytest.mark.parametrize("network", [LeNet, BLeNet])
def test_the_networks(network):
    model = network(generator=np.random.default_rng(0))
    compare(
        library(),
        model,
        (1, 28, 28),
        "float64",
        batch_sizes=(16, 9),
        bound=1e-10,
        classes=10,
    )


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", [None, Sigmoid, ReLU])
@pytest.mark.parametrize("pool", [None, AvgPool2d, MaxPool2d])
def test_every_combination_of_the_optional_parts(norm, activation, pool):
    model, shape = optional_parts(norm, activation, pool)
    compare(library(), model, shape, "float64", batch_sizes=(7, 2), bound=1e-10)


def test_sizes_known_to_the_compiler():
    """The kernels as they are meant to run on a GPU: everything but the batch size is fixed."""
    model = LeNet(generator=np.random.default_rng(0))
    compare(
        library(),
        model,
        (1, 28, 28),
        "float64",
        batch_sizes=(16, 9),
        bound=1e-10,
        classes=10,
        fixed=True,
    )


@pytest.mark.parametrize("multiprocessors", [1, MANY])
def test_float32(multiprocessors):
    """As for the engine on NumPy."""
    model = LeNet(generator=np.random.default_rng(0))
    compare(
        library(),
        model,
        (1, 28, 28),
        "float32",
        batch_sizes=(30,),
        bound=1e-4,
        classes=10,
        multiprocessors=multiprocessors,
    )


def wide_model() -> Sequential:
    """Sums over more than a strip of a product, and more of a kernel's rows than threads."""
    generator = np.random.default_rng(0)
    return Sequential(
        *(Conv2d(2, 80, 5, generator=generator), BatchNorm(80, 4), AvgPool2d(2), Flatten()),
        Linear(320, 3, generator=generator),
    )


def test_a_hundred_losses_in_float32():
    model = small_model()
    expected = copy.deepcopy(model)
    split = a_split(SMALL, 60, 1)
    stages, programs, _ = programs_of(model, SMALL, (20,), momentum=0.9)
    device = Emulator(library(), programs.values())
    write(device.arrays, stages, split)
    device.arrays["order"][:] = np.arange(60)
    device.arrays["rates"][:] = 0.1
    optimizer = SGD(expected.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(34):
        device.arrays["step"][:] = 0
        for x, labels in split.batches(20, "float32"):
            device.run(programs[20])
            loss, cache = F.softmax_cross_entropy(expected.forward(x), labels)
            expected.backward(F.softmax_cross_entropy_backward(cache))
            optimizer.step()
            losses.append(float(loss))
        found = device.arrays["train.losses"][:3].sum(1)
        np.testing.assert_allclose(found, losses[-3:], atol=2e-3)
    assert losses[-1] < losses[0] - 0.1
    device.close()


@pytest.mark.parametrize("multiprocessors", [1, MANY])
def test_a_variance_far_from_zero_in_float32(multiprocessors):
    """A mean of 1e4, a deviation of about 1e-2: a float32 of that size has steps of 1e-3.

    With one multiprocessor, a part of the batch has several examples.

    Batch norm and its gradients from the very y that the convolution gave, in float64. The bound is
    a few roundings of a sum of 18 × 16 terms, shared out; without the second centring, or means of
    one float, errors are over a thousand times as large.
    """
    model = Sequential(
        *(Conv2d(2, 3, 3, generator=np.random.default_rng(0)), BatchNorm(3, 4), Flatten()),
        *(Linear(108, 3, generator=np.random.default_rng(1)), BatchNorm(3, 2)),
    )
    model.layers[0].weight.data[...] *= 0.04
    model.layers[0].bias.data[...] = 1e4
    stages, programs, _ = programs_of(model, SMALL, (18,), multiprocessors=multiprocessors)
    device = Emulator(library(), programs.values())
    arrays = device.arrays
    write(arrays, stages, a_split(SMALL, 60, 1))
    arrays["order"][:] = np.arange(60)
    arrays["rates"][:] = 0
    device.run(programs[18])
    y, x, dz = (arrays[name].reshape(18, 3, 36).astype(np.float64) for name in ("y0", "x1", "dz0"))
    centred = y - y.mean((0, 2), keepdims=True)
    root = np.sqrt(centred.var((0, 2)) + 1e-5)
    assert 5e-3 < centred.std() < 5e-2
    right = centred / root[:, None]
    dgamma = (dz * right).sum((0, 2))
    offset, _ = launch.parameter_offsets(stages)["0.gamma"]
    for found, expected in (
        (x, right),
        (arrays["0.moving_var"], 0.9 + 0.1 * centred.var((0, 2))),
        (arrays["gradients"][offset : offset + 3], dgamma),
    ):
        bound = 16 * np.finfo(np.float32).eps * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    device.close()


def test_a_label_out_of_range_makes_the_loss_nan():
    stages, programs, evaluation = programs_of(small_model(), SMALL, (8,))
    device = Emulator(library(), [*programs.values(), evaluation])
    split = a_split(SMALL, 60, 1)
    write(device.arrays, stages, split)
    device.arrays["order"][:] = np.arange(60)
    for label in (-1, 3):
        for data, program in (("train", programs[8]), ("test", evaluation)):
            device.arrays[f"{data}.labels"][5] = label
            device.arrays["step"][:] = 0
            device.arrays["rates"][:] = 0
            device.run(program)
            assert np.isnan(device.arrays[f"{data}.losses"][0].sum())
    device.close()


def test_more_examples_than_a_block_has_threads():
    model = Sequential(Flatten(), Linear(4, 3, generator=np.random.default_rng(0)))
    model.to(NUMPY, "float64")
    stages, split = plan(model, (1, 2, 2)), a_split((1, 2, 2), 300, 1)
    program = launch.training(stages, 300, examples=300)
    device = Emulator(library(), [program])
    write(device.arrays, stages, split)
    device.arrays["order"][:] = np.arange(300)
    device.arrays["rates"][:] = 0
    device.run(program)
    logits = model.forward(split.images / 255)
    loss, _ = F.softmax_cross_entropy(logits, split.labels)
    assert abs(device.arrays["train.losses"][0].sum() - loss) <= 1e-10
    assert device.arrays["train.correct"][0].sum() == (logits.argmax(1) == split.labels).sum()
    device.close()


def test_of_equal_logits_the_first_counts():
    model = Sequential(Flatten(), Linear(4, 3, bias=False))
    model.layers[1].weight.data[...] = 0
    model.to(NUMPY, "float64")
    stages, _, evaluation = programs_of(model, (1, 2, 2), (20,))
    device = Emulator(library(), [evaluation])
    split = a_split((1, 2, 2), 60, 1)
    write(device.arrays, stages, split)
    device.run(evaluation)
    assert device.arrays["test.correct"].sum() == np.count_nonzero(split.labels == 0) > 0
    device.close()


def test_of_equal_maxima_the_first_alone_has_the_gradient():
    """Images of one grey: every window of the pooling is a tie."""
    generator = np.random.default_rng(0)
    model = Sequential(
        *(Conv2d(1, 2, 3, generator=generator), MaxPool2d(2), Flatten()),
        Linear(8, 3, generator=generator),
    )
    model.to(NUMPY, "float64")
    stages, programs, evaluation = programs_of(model, (1, 6, 6), (4,))
    device = Emulator(library(), [*programs.values(), evaluation])
    split = a_split((1, 6, 6), 60, 1)
    split.images[...] = 100
    write(device.arrays, stages, split)
    device.arrays["order"][:] = np.arange(60)
    device.run(programs[4])
    gradient = device.arrays["dz0"].reshape(4, 2, 2, 2, 2, 2)  # (N, O, rows of windows, 2, ...)
    assert (gradient[:, :, :, 0, :, 0] != 0).all()
    assert (gradient[:, :, :, 1] == 0).all() and (gradient[..., 1] == 0).all()
    device.close()


def test_runs_are_identical_to_the_bit():
    """In whatever order blocks and threads run: those of the emulator differ from run to run."""

    def run(seed: int):
        model = small_model()
        stages, programs, evaluation = programs_of(model, SMALL, (12,), multiprocessors=MANY)
        device = Emulator(library(), [*programs.values(), evaluation], seed=seed)
        write(device.arrays, stages, a_split(SMALL, 60, 1))
        device.arrays["order"][:] = np.arange(60)
        device.arrays["rates"][:] = 0.1
        for _ in range(3):
            device.run(programs[12])
        found = {
            name: device.arrays[name].copy()
            for name in ("parameters", "train.losses", "0.moving_mean", "0.moving_var")
        }
        device.close()
        return found

    right, other = run(0), run(1000)
    for name, value in right.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def compare_everywhere(library, *cases, **options):
    """Models and multiprocessors; unless given, such as need every barrier between them."""
    for model, multiprocessors, *batch_sizes in cases or EVERYWHERE:
        sizes = {"batch_sizes": batch_sizes or (6, 9), "bound": 1e-10}
        sizes["multiprocessors"] = multiprocessors
        compare(library, model(), SMALL, "float64", **sizes, **options)


EVERYWHERE = (
    *((small_model, MANY), (small_model, 4), (small_model, 1, 39), (wide_model, 4)),
    *((normalized_logits, MANY), (normalized_logits, 4)),
)


def test_weights_of_a_few_channels_at_a_time(monkeypatch):
    monkeypatch.setattr(launch, "WEIGHTS_AT_A_TIME", 1)
    compare_everywhere(library())


def many_maps() -> Sequential:
    """More maps and logits than a block has threads; 272 outputs fill the tiles of a product."""
    generator = np.random.default_rng(0)
    return Sequential(
        *(Conv2d(2, 260, (2, 3), stride=3, generator=generator), BatchNorm(260, 4), ReLU()),
        *(MaxPool2d((3, 2)), Flatten(), Linear(260, 272, generator=generator)),
        *(BatchNorm(272, 2), Sigmoid(), Linear(272, 260, generator=generator)),
        BatchNorm(260, 2),
    )


def wide_kernels() -> Sequential:
    """Kernels wider than what a thread computes of their gradient; the last stage's are maps."""
    generator = np.random.default_rng(0)
    return Sequential(
        *(Conv2d(2, 3, (2, 7), stride=(2, 1), padding=(0, 3), generator=generator), Sigmoid()),
        *(AvgPool2d((1, 2)), Conv2d(3, 5, (3, 6), padding=(1, 2), generator=generator)),
        *(MaxPool2d((2, 1)), Conv2d(5, 3, 1, stride=(1, 2), generator=generator)),
        *(BatchNorm(3, 4), Sigmoid(), AvgPool2d(2), Flatten()),
    )


def long_strides() -> Sequential:
    """In the backward pass, the input's gradient needs more shared memory than the weights'."""
    generator = np.random.default_rng(0)
    return Sequential(
        *(Conv2d(2, 5, 1, padding=20, generator=generator), BatchNorm(5, 4), Sigmoid()),
        *(Conv2d(5, 2, 3, stride=3, padding=1, generator=generator), AvgPool2d(8), Flatten()),
        Linear(8, 3, generator=generator),
    )


@pytest.mark.parametrize("model", [many_maps, wide_kernels])
@pytest.mark.parametrize("multiprocessors", [1, 4, MANY])
def test_more_than_a_block_does_at_once(monkeypatch, model, multiprocessors):
    """And loss, statistics and gradients in many parts, of which some have fewer examples."""
    monkeypatch.setattr(launch, "LOGITS_AT_A_TIME", 200)
    monkeypatch.setattr(launch, "LONG", 8)
    sizes = {"batch_sizes": (39, 21), "bound": 1e-10, "multiprocessors": multiprocessors}
    options = {"momentum": 0.9, "weight_decay": 0.1}
    compare(library(), model(), SMALL, "float64", **sizes, **options)


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_is_caught(monkeypatch, line):
    """Every __syncthreads of the source is needed, and without it, results are wrong here."""
    monkeypatch.setattr(launch, "WEIGHTS_AT_A_TIME", 1)
    monkeypatch.setattr(launch, "BLOCKS_PER_MULTIPROCESSOR", 1)
    with pytest.raises(AssertionError):
        compare_everywhere(library(), skipped=line)


MUTANTS = {
    1: (
        "y[e * s.maps * area + t] = out[t];",
        "y[e * s.maps * area + t + (mutant_number == 1)] = 0;",
    ),
    2: ("row < count && o < s.maps", "row < count && o < s.maps + (mutant_number == 2)"),
    3: ("o < p.maps ? norm.parts : 0", "o < p.maps ? norm.parts + (mutant_number == 3) : 0"),
    4: ("(maps * rows * columns, load", "(maps * rows * columns + (mutant_number == 4), load"),
    5: ("k < inputs)", "k < inputs + (mutant_number == 5))"),
    6: ("at < size", "at < size + (mutant_number == 6)"),
}
"""Indices that go too far, by number: the text, and what it becomes."""

RACES = {
    1: ("blockIdx.y == 0 && member == 0", "blockIdx.y == 0 && (member == 0 || mutant_number == 1)"),
    2: ("blockIdx.x == 0 && blockIdx.y", "(blockIdx.x == 0 || mutant_number == 2) && blockIdx.y"),
    3: ("x != nullptr && first_map == 0", "x != nullptr && (first_map == 0 || mutant_number == 3)"),
    4: ("dw += part *", "dw += part * (mutant_number != 4) *"),
}
"""The same of writes by several threads or blocks, most of which leave what was right anyway."""


def mutated(mutants) -> str:
    source = SOURCE.read_text()
    for old, new in mutants.values():
        assert old in source
        source = source.replace(old, new)
    return source


def sanitized(checks, runtime="libasan.so", source=None, mutant=0) -> subprocess.CompletedProcess:
    """Checks of this module, in a process of its own, by kernels that watch over every access."""
    built = compiled(all_names("float64"), *emulator.SANITIZERS[runtime], source=source)
    code = (
        f"import ctypes\nfrom test_cuda_kernels import *\nlibrary = {str(built)!r}\n"
        f"ctypes.c_int.in_dll(ctypes.CDLL(library), 'mutant_number').value = {mutant}\n{checks}"
    )
    path = subprocess.run(
        [str(build.COMPILER), f"-print-file-name={runtime}"],
        capture_output=True,
        text=True,
        check=True,
    )
    here = Path(__file__).parent
    environment = os.environ | {
        "LD_PRELOAD": path.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",  # ThreadSanitizer does not see what orders its threads
        "PYTHONPATH": os.pathsep.join(map(str, (here.parent.parent, here.parent, here))),
    }
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in process.stderr:
        pytest.skip(
            "ThreadSanitizer does not run here: vm.mmap_rnd_bits of this Linux is too large"
        )
    return process


CHECKS = [
    "compare_everywhere(library)",
    "compare_everywhere(library, (wide_kernels, 1), (wide_kernels, MANY), (long_strides, 4))",
]
LOOPS = [
    "launch.WEIGHTS_AT_A_TIME = 1; compare_everywhere(library)",
    "launch.BLOCKS_PER_MULTIPROCESSOR = 1; compare_everywhere(library)",
]
"""Checks with several passes of loops that often have one. ThreadSanitizer takes long for them."""


@pytest.mark.parametrize(
    ("runtime", "checks"),
    [
        (runtime, checks)
        for runtime in emulator.SANITIZERS
        for checks in (CHECKS if runtime == "libtsan.so" and not LONG else CHECKS + LOOPS)
    ],
)
def test_no_access_out_of_bounds_no_undefined_behaviour_and_no_race(runtime, checks):
    process = sanitized(checks, runtime)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("mutant", MUTANTS)
def test_an_index_that_goes_too_far_is_caught(mutant):
    checks = "compare_everywhere(library)"
    process = sanitized(checks, source=mutated(MUTANTS), mutant=mutant)
    assert process.returncode != 0
    assert "SUMMARY: AddressSanitizer: " in process.stderr, process.stderr
    assert "kernels.cu:" in process.stderr, process.stderr


def test_threads_at_different_barriers_are_caught():
    """Or at their end; and the next kernel runs as if nothing had been."""
    source = """
    __global__ void apart(int) {
        if (threadIdx.x < 7) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
    __global__ void early(int) {
        if (threadIdx.x > 7) {
            return;
        }
        __syncthreads();
    }
    __global__ void together(int) { __syncthreads(); }
    """
    kernels = emulator.Library(compiled(("apart", "early", "together"), source=source))
    for name in ("apart", "early"):
        with pytest.raises(RuntimeError, match=f"{name}: a barrier that not all threads came to"):
            kernels.launch(name, (2, 1, 1), 0, [np.array(1, np.int32)])
        kernels.launch("together", (2, 1, 1), 0, [np.array(1, np.int32)])


def test_warp_shuffles():
    """Values of other threads of the warp; a shuffle that not all of them come to is caught."""
    source = """
    __global__ void right(int* out) {
        const int t = threadIdx.x;
        out[t] = __shfl_xor_sync(0xffffffffu, t, 5);
        out[256 + t] = __shfl_up_sync(0xffffffffu, t, 3, 8);
        out[512 + t] = __shfl_down_sync(0xffffffffu, t, 30);
        out[768 + t] = __shfl_sync(0xffffffffu, t, 9, 4);
        if (t % 32 < 16) {
            out[1024 + t] = __shfl_xor_sync(0x0000ffffu, t, 1);
        }
        __syncwarp();
    }
    __global__ void wrong(int* out) {
        if (threadIdx.x % 32 != 7) {
            out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
        }
    }
    """
    kernels = emulator.Library(compiled(("right", "wrong"), source=source))
    out = np.zeros(1280, np.int32)
    kernels.launch("right", (1, 1, 1), 0, [np.array(out.ctypes.data)])
    t = np.arange(256)
    for found, expected in zip(
        out.reshape(5, 256),
        (
            t ^ 5,
            np.where(t % 8 < 3, t, t - 3),
            np.where(t % 32 < 2, t + 30, t),
            t // 4 * 4 + 1,
            np.where(t % 32 < 16, t ^ 1, 0),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(RuntimeError, match="wrong: a barrier that not all threads came to"):
        kernels.launch("wrong", (1, 1, 1), 0, [np.array(out.ctypes.data)])


@pytest.mark.parametrize("race", RACES)
def test_a_race_is_caught(race):
    checks = "compare_everywhere(library)"
    process = sanitized(checks, "libtsan.so", mutated(RACES), race)
    assert process.returncode != 0
    assert "SUMMARY: ThreadSanitizer: data race" in process.stderr, process.stderr


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_is_a_race(line):
    """Whatever order threads run in: the sanitizer does not wait for results to be wrong."""
    small = "launch.WEIGHTS_AT_A_TIME = launch.BLOCKS_PER_MULTIPROCESSOR = 1"
    checks = f"{small}; compare_everywhere(library, skipped={line})"
    process = sanitized(checks, "libtsan.so")
    assert process.returncode != 0
    assert "SUMMARY: ThreadSanitizer: data race" in process.stderr, process.stderr
    assert "kernels.cu:" in process.stderr, process.stderr
