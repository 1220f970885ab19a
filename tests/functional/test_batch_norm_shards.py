"""Batch norm over several shards: against the whole batch, the complex step, and its mutants."""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ranks
from npbn.functional import batch_norm as functional
from npbn.verify import check_gradients

FILE = Path(functional.__code__.co_filename)


def module(*edits: tuple[str, str]) -> Any:
    """Return the module of batch norm, with edits of its source."""
    source = FILE.read_text(encoding="utf-8")
    for text, replacement in edits:
        assert source.count(text) == 1, f"{text}: {source.count(text)} times"
        source = source.replace(text, replacement)
    found = types.ModuleType("npbn.functional.mutant")
    exec(compile(source, str(FILE), "exec"), vars(found))
    return found


class Case:
    """A batch, an upstream gradient, and where the shards end."""

    def __init__(self, seed: int, shape: tuple[int, ...], ends: list[int]) -> None:
        generator = np.random.default_rng(seed)
        features = (1, shape[1]) + (1,) * (len(shape) - 2)
        # Shards with means of their own: so the squares between them matter.
        self.x = generator.normal(size=shape) * generator.uniform(0.5, 2, features)
        for begin, end in itertools.pairwise(ends):
            self.x[begin:end] += generator.normal(size=features)
        self.dy = generator.normal(size=shape)
        self.gamma = generator.uniform(0.5, 2, features)
        self.beta = generator.normal(size=features)
        self.moving = generator.normal(size=features), generator.uniform(0.5, 2, features)
        self.ends = ends

    def __repr__(self) -> str:
        return f"Case({self.x.shape}, {self.ends})"

    def shards(self) -> list[slice]:
        return [slice(a, b) for a, b in itertools.pairwise(self.ends)]

    def over_shards(
        self, functions: Any, x: Any, dy: Any = None, backward: str = "batch_norm_backward"
    ):
        """Return y, the moving averages of each rank, dx and the sums of dγ and dβ."""
        options = {"training": True, "eps": 1e-5, "momentum": 0.7}

        def one(rank: ranks.Rank) -> tuple[Any, ...]:
            own = self.shards()[rank.rank]
            y, cache, moving = functions.batch_norm(
                x[own], self.gamma, self.beta, *self.moving, group=rank, **options
            )
            return y, moving, () if dy is None else getattr(functions, backward)(dy[own], cache)

        found = ranks.each(len(self.shards()), one, seconds=20)
        y = np.concatenate([each[0] for each in found])
        if dy is None:
            return y
        dx = np.concatenate([each[2][0] for each in found])
        dgamma, dbeta = (sum(each[2][i] for each in found) for i in (1, 2))
        return y, [each[1] for each in found], dx, dgamma, dbeta


@st.composite
def cases(draw) -> Case:
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    ends = [0, *np.cumsum(sizes).tolist()]
    shape = draw(st.sampled_from([(3,), (2, 1, 2), (1, 3, 2)]))
    return Case(draw(st.integers(0, 2**32 - 1)), (ends[-1], *shape), ends)


FIXED = [
    Case(0, (6, 3), [0, 3, 6]),
    Case(1, (5, 2, 2, 3), [0, 1, 5]),
    Case(2, (7, 2, 1, 2), [0, 2, 3, 7]),
    Case(3, (4, 2), [0, 1, 2, 4]),
]


def error(functions: Any, case: Case, backward: str = "batch_norm_backward") -> float:
    """Return the largest difference from the whole batch, in units of the rounding to expect."""
    y, cache, moving = module().batch_norm(
        case.x, case.gamma, case.beta, *case.moving, training=True, momentum=0.7
    )
    right = [y, *moving, *module().batch_norm_backward(case.dy, cache)]
    y, movings, *gradients = case.over_shards(functions, case.x, case.dy, backward)
    for other in movings[1:]:  # Every rank has the same moving averages, in every bit.
        assert all(np.array_equal(a, b) for a, b in zip(other, movings[0], strict=True))
    found = [y, *movings[0], *gradients]
    # Every result is a sum of at most m terms: a few ulp of each, of the size of the largest. Where
    # a feature hardly varies, 1/s, and with it every rounding, is larger.
    scale = max(1, 1 / float(np.min(cache.s))) ** 2
    return max(
        float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1)) / (np.finfo(float).eps * scale)
        for a, b in zip(found, right, strict=True)
    )


@pytest.mark.parametrize("backward", ["batch_norm_backward", "batch_norm_backward_staged"])
@given(case=cases())
def test_shards_give_what_the_whole_batch_gives(case, backward):
    assert error(module(), case, backward) < 1000


def gradients_are_right(functions: Any, case: Case, backward: str = "batch_norm_backward") -> bool:
    """Check the gradients by the complex step, through all ranks."""

    def through_ranks(x, gamma, beta):
        one = Case.__new__(Case)
        vars(one).update(vars(case), gamma=gamma, beta=beta)
        return one.over_shards(functions, x), x

    def back(dy, x):
        return case.over_shards(functions, x, dy, backward)[2:]

    inputs = {"x": case.x, "gamma": case.gamma, "beta": case.beta}
    return check_gradients(through_ranks, back, inputs).ok


@pytest.mark.parametrize("backward", ["batch_norm_backward", "batch_norm_backward_staged"])
@pytest.mark.parametrize("case", FIXED, ids=repr)
def test_the_complex_step_through_several_ranks(case, backward):
    assert gradients_are_right(module(), case, backward)


_ALL = "return [found[i, ...] for i in range(1 + len(sums))]"
MUTANTS = {
    "a mean of means": (
        "mean = xp.sum(counts * means, axis=0) / m",
        "mean = xp.mean(means, axis=0)",
    ),
    "no squares between the shards": (
        "squares + counts * (means - mean) * (means - mean)",
        "squares",
    ),
    "squares between without weights": ("squares + counts * (means", "squares + (means"),
    "the shard's squares, not divided alike": ("mean, m * var])", "mean, var])"),
    "the shard's mean is subtracted": ("x_centred += own_mean - mean", "pass"),
    "the shift the other way": ("x_centred += own_mean - mean", "x_centred += mean - own_mean"),
    "the shard's m": (_ALL, "return [m, *(found[i, ...] for i in range(1, 1 + len(sums)))]"),
    "the shard's sums in dx": (_ALL, "return [found[0, ...], *sums]"),
    "gradients that are sums already": ("    return dx, *own", "    return dx, dgamma, dbeta"),
}
BACKWARD = ["the shard's m", "the shard's sums in dx", "gradients that are sums already"]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    mutant = module(MUTANTS[name])
    assert max(error(mutant, case) for case in FIXED) > 1e6
    if name in BACKWARD:
        assert not all(gradients_are_right(mutant, case) for case in FIXED)
