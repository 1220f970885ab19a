"""What a step on a GPU costs beside its arithmetic, counted on the emulated GPU."""

from __future__ import annotations

import collections
import gc

import numpy as np
import pytest
from models import SMALL, a_split, small_model

import nvrtc
from npbn.engine import build
from npbn.engine.gpu.program import SOURCE
from npbn.models import BLeNet, LeNet
from npbn.optim import SGD

IMAGES = (1, 28, 28)


def an_engine(kind, device, *, model=None, examples=64, batch_size=32, **options):
    model = model or LeNet(generator=np.random.default_rng(0))
    model.to(device)
    shape = SMALL if options.pop("small", False) else IMAGES
    train, test = (a_split(shape, examples, seed, 3).to(device) for seed in (1, 2))
    optimizer = SGD(model.parameters(), 0.1, **options)
    return build(kind, model, optimizer, train, test, batch_size=batch_size, backend=device)


def calls_of_a_step(emulated, engine) -> collections.Counter[str]:
    """The calls of two steps less the calls of one, by their first words.

    CuPy's pool may first need more memory, which depends on what it has been used for: so the
    passes are repeated until one asks for none.
    """
    for _ in range(20):
        counts = []
        for examples in (np.arange(64), np.arange(32)):
            with emulated.calls() as calls:
                list(engine.steps(examples))
            counts.append(collections.Counter(kind_of(call) for call in calls))
        if not any(count["allocate"] for count in counts):
            break
    two, one = counts
    two.subtract(one)
    return +two


def kind_of(call: str) -> str:
    words = call.split()
    if words[0] == "copy":
        return " ".join(words[2:5])
    return words[0]


def test_a_step_by_layers_takes_at_most_340_launches(emulated, cupy_backend):
    """And no waiting, no copies to the host, and no new memory."""
    counts = calls_of_a_step(emulated, an_engine("layers", cupy_backend))
    assert counts["launch"] + counts["product"] <= 340
    assert counts["set"] <= 15
    assert not counts["wait"] + counts["device to host"] + counts["allocate"], counts


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_by_the_engine_is_a_graph(momentum, emulated, cupy_backend):
    """Its ten kernels are captured, and nothing else is asked of the GPU."""
    engine = an_engine("fused", cupy_backend, momentum=momentum)
    order = np.arange(64)
    list(engine.steps(order))
    with emulated.calls() as calls:
        list(engine.steps(order))
    counts = collections.Counter(kind_of(call) for call in calls)
    graphs = [call for call in calls if call.startswith("launch graph")]
    assert [call.split(" stream ")[0] for call in graphs] == ["launch graph of 10"] * 2
    assert not counts["wait"] + counts["device to host"] + counts["allocate"] + counts["product"]
    assert counts["host to device"] <= 3  # order, rates, and the number of the first step


def test_nothing_but_launches_is_captured(emulated, cupy_backend):
    with emulated.calls() as calls:
        engine = an_engine("fused", cupy_backend)
        list(engine.steps(np.arange(64)))
        list(engine.evaluate())
    inside, captures = False, 0
    for call in calls:
        if call.startswith("begin capture"):
            inside, captures = True, captures + 1
        elif call.startswith("end capture"):
            inside = False
        elif inside:
            assert call.startswith("launch ") and call.endswith(" captured"), call
        assert "while a stream captures" not in call
    assert captures == 2  # a step, and an evaluation
    assert sum(call.startswith("upload graph") for call in calls) == 2


@pytest.mark.parametrize("kind", ["layers", "fused"])
def test_memory_stays_as_it_is_over_100_epochs(kind, emulated, cupy_backend):
    import cupy

    engine = an_engine(
        kind, cupy_backend, model=small_model(), examples=9, batch_size=4, momentum=0.9, small=True
    )
    pool = cupy.get_default_memory_pool()

    def epochs(count: int) -> tuple[int, int]:
        for epoch in range(count):
            results = list(engine.steps(np.random.default_rng(epoch).permutation(9)))
            results += engine.evaluate()
            [float(result.loss) for result in results]
            del results
        gc.collect()
        return pool.used_bytes(), pool.total_bytes()

    before = epochs(3)
    assert epochs(100) == before


@pytest.mark.skipif(nvrtc.find() is None, reason="needs NVRTC: the wheel nvidia-cuda-nvrtc")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("network", [LeNet, BLeNet])
def test_parameters_have_the_sizes_that_nvidias_compiler_gives_them(
    network, dtype, emulated, cupy_backend
):
    """What the host passes, in bytes, is what the kernels of the cubin take."""
    model = network(generator=np.random.default_rng(0))
    model.to(cupy_backend, dtype)
    train, test = (a_split(IMAGES, 64, seed).to(cupy_backend) for seed in (1, 2))
    engine = build(
        *("fused", model, SGD(model.parameters(), 0.1), train, test),
        batch_size=32,
        backend=cupy_backend,
    )
    launches = [call for program in engine.programs.values() for call in program.launches]
    names = {call.kernel for call in launches}
    sizes = nvrtc.parameter_sizes(SOURCE.read_text(), names, 90)
    for program in engine.programs.values():
        for call in program.launches:
            values = [program.value(argument, engine._address) for argument in call.arguments]
            assert [value.nbytes for value in values] == sizes[call.kernel], call.kernel
    assert len(names) >= 10
