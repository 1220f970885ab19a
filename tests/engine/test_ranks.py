"""Training by several ranks, here threads, against one process: by layers, and in every bit."""

from __future__ import annotations

import copy
import types
from pathlib import Path

import numpy as np
import pytest
from cpu import fixed_models
from models import NUMPY, a_split, a_tiny_model

import ranks
from npbn.distributed import ALONE
from npbn.engine import build
from npbn.errors import UnsupportedError
from npbn.layers import BatchNorm, Conv2d, Flatten, Linear, ReLU, Sequential
from npbn.models import LeNet
from npbn.optim import SGD

try:
    import npbn.engine.cpu as _  # noqa: F401
except UnsupportedError:
    FUSED = False
else:
    FUSED = True


def trained(
    group, model, split, test, *, kind, steps, batch_size, dtype="float64", threads=1, lr=0.3
):
    """Return the results, and all arrays, of a training of a copy of the model."""
    model = copy.deepcopy(model)
    model.to(NUMPY, dtype)
    optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.01)
    what = model, optimizer, split, test
    how = {"batch_size": batch_size, "backend": NUMPY, "threads": threads, "group": group}
    engine = build(kind, *what, **how)
    results, epoch = [], 0
    while optimizer.steps < steps:
        order = np.random.default_rng((3, epoch)).permutation(len(split))
        order = order[: (steps - optimizer.steps) * batch_size]
        results += [(r.examples, float(r.loss), int(r.correct)) for r in engine.steps(order)]
        epoch += 1
    results += [(r.examples, float(r.loss), int(r.correct)) for r in engine.evaluate()]
    velocity = {f"velocity.{name}": np.array(v) for name, v in optimizer.velocity.items()}
    gradients = {f"gradient.{n}": np.array(p.gradient) for n, p in model.parameters().items()}
    return results, model.state_dict() | velocity | gradients


# Of 20 examples in batches of 8, the last has 4; of 19 in batches of 6, one. With 3 or 4 ranks,
# there are shards of equal and of different sizes, of one example, and empty ones.
@pytest.mark.parametrize(("examples", "batch_size"), [(20, 8), (19, 6), (9, 3), (8, 2)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_layers_over_shards_are_layers_over_the_batch(size, examples, batch_size):
    """But for rounding, which training amplifies: hence the low learning rate."""
    generator = np.random.default_rng(0)
    model = Sequential(
        *(Conv2d(1, 3, 3, generator=generator), BatchNorm(3, 4), ReLU(), Flatten()),
        *(Linear(48, 5, generator=generator), BatchNorm(5, 2), Linear(5, 4, generator=generator)),
    )
    data = model, a_split((1, 6, 6), examples, 1), a_split((1, 6, 6), 600, 2)
    how = {"kind": "layers", "steps": 30, "batch_size": batch_size, "lr": 0.01}
    right_results, right = trained(ALONE, *data, **how)
    for results, found in ranks.each(size, lambda group: trained(group, *data, **how)):
        assert [r[::2] for r in results] == [r[::2] for r in right_results]
        losses = [[r[1] for r in of] for of in (results, right_results)]
        np.testing.assert_allclose(*losses, rtol=0, atol=1e-12)
        for name, value in right.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_a_frozen_batch_norm_over_shards():
    """The gradients of its γ and β are summed over the ranks, as all others are."""
    model = a_tiny_model()
    norm = next(layer for layer in model.layers if isinstance(layer, BatchNorm))
    norm.training = False
    data = model, a_split((1, 6, 6), 20, 1), a_split((1, 6, 6), 10, 2)
    how = {"kind": "layers", "steps": 5, "batch_size": 8}
    _, right = trained(ALONE, *data, **how)
    for _, found in ranks.each(3, lambda group: trained(group, *data, **how)):
        for name, value in right.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.skipif(not FUSED, reason="Numba is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_give_the_bits_of_one_process(size, dtype):
    """23 steps, with a ragged last batch, more ranks than chunks, and ranks without any."""
    model = LeNet(generator=np.random.default_rng(5))
    for examples, batch_size in ((150, 64), (41, 20), (300, 290)):
        data = model, a_split((1, 28, 28), examples, 1), a_split((1, 28, 28), 50, 2)
        how = {"kind": "fused", "steps": 23, "batch_size": batch_size, "dtype": dtype}
        right_results, right = trained(ALONE, *data, **how)
        for threads in (1, 2):
            work = lambda group: trained(group, *data, **how, threads=threads)  # noqa: B023, E731
            for results, found in ranks.each(size, work):
                assert results == right_results
                assert [n for n, v in right.items() if found[n].tobytes() != v.tobytes()] == []


@pytest.mark.skipif(not FUSED, reason="Numba is not installed")
def test_models_of_all_kinds_by_ranks():
    for make in fixed_models.ALL:
        model, splits, options = make()
        how = {"kind": "fused", "steps": 4, "batch_size": options["batch_size"]}
        right_results, right = trained(ALONE, model, *splits, **how)
        work = lambda group: trained(group, model, *splits, **how)  # noqa: B023, E731
        for results, found in ranks.each(3, work):
            np.testing.assert_equal(results, right_results)
            assert [n for n, v in right.items() if found[n].tobytes() != v.tobytes()] == []


MUTANTS = {
    "the statistics stay here": ("kernel == launches.FORWARD", "kernel == -1"),
    "only the means are shared": ("MEANS, 2 * stages[k]", "MEANS, stages[k]"),
    "the sums of the last stage stay here": ("kernel == launches.LOSS", "kernel == -1"),
    "the losses stay here": ("[last]['maps'] + 2)", "[last]['maps'])"),
    "the sums of a stage stay here": ("kernel == launches.BACKWARD and k > 0", "kernel == -1"),
    "x and dy of linear layers stay here": ("if stage['linear']", "if False"),
    "dy stays here": ("(stage['z'], stage['y_size'])", "(stage['x'], stage['x_size'])"),
    "dW of parts as of chunks": ("parts, stage['partials_size']), of_parts", "0, 1), [0] * 4"),
    "dW stays here": ("kernel == launches.WEIGHTS", "kernel == -1"),
    "the evaluation stays here": ("kernel == launches.PREDICT", "kernel == -1"),
}


@pytest.mark.skipif(not FUSED, reason="Numba is not installed")
@pytest.mark.parametrize("name", MUTANTS)
def test_what_is_not_shared_is_missed(name, monkeypatch):
    from npbn.engine.cpu import engine, sharing

    source = Path(sharing.__file__).read_text(encoding="utf-8").replace('"', "'")
    text, replacement = MUTANTS[name]
    assert source.count(text) == 1
    mutant = types.ModuleType("npbn.engine.cpu.mutant")
    exec(source.replace(text, replacement), vars(mutant))
    monkeypatch.setattr(engine, "sharing", mutant)
    model = LeNet(generator=np.random.default_rng(5))
    data = model, a_split((1, 28, 28), 300, 1), a_split((1, 28, 28), 50, 2)
    how = {"kind": "fused", "steps": 2, "batch_size": 290}
    right_results, right = trained(ALONE, *data, **how)
    found = ranks.each(3, lambda group: trained(group, *data, **how))
    assert any(
        results != right_results
        or any(v.tobytes() != arrays[n].tobytes() for n, v in right.items())
        for results, arrays in found
    )


def test_the_fused_engine_on_a_gpu_is_refused_in_words():
    backend = types.SimpleNamespace(name="cupy")
    split, model = a_split((1, 6, 6), 8, 1), a_tiny_model()
    what = model, SGD(model.parameters(), 0.1), split, split
    group: object = ranks.Rank(0, 2, None, [])
    with pytest.raises(UnsupportedError, match="on a GPU trains in one process: it captures"):
        build("fused", *what, batch_size=4, backend=backend, group=group)
