"""What `test_mpi` starts by mpiexec: several cases in one start. Rank 0 prints what was found."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parent), str(Path(__file__).parent / "engine")]

import numpy as np
import pytest
from models import a_split

from engine.test_ranks import trained
from npbn.distributed import ALONE, agree, join
from npbn.errors import DistributedError
from npbn.models import LeNet


def main() -> None:
    group = join()
    rank, size = group.rank, group.size
    own = np.arange(6.0).reshape(2, 3) * (rank + 1)
    np.testing.assert_array_equal(
        group.gather(own), np.stack([np.arange(6.0).reshape(2, 3) * (r + 1) for r in range(size)])
    )
    assert group.gather(np.array(rank)).tolist() == list(range(size))
    # Rows of a view that is not contiguous, and a rank without a row.
    ends = [0, *(max(0, r) for r in range(size))]
    table = np.full((3, size - 1), -1.0)
    table[:, ends[rank] : ends[rank + 1]] = rank
    group.share(table.T, ends)
    assert table.tolist() == [[float(r) for r in range(1, size)]] * 3
    # The same bits as a sum in the order of the ranks; fewer numbers than ranks, too.
    for shape in ((1000,), (3, 5), (1,), ()):
        every = [np.random.default_rng(r).normal(size=shape).astype("f4") for r in range(size)]
        one, two = group.add([every[rank], 2 * every[rank]])
        np.testing.assert_array_equal(one, sum(every[1:], every[0]))
        np.testing.assert_array_equal(two, sum((2 * e for e in every[1:]), 2 * every[0]))
    assert group.broadcast(lambda: rank) == 0
    for error in (DistributedError("text"), KeyError(3)):
        with pytest.raises(type(error)) as caught:
            group.broadcast(lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value.args == error.args
    if size > 1:
        expected = f"rank {size - 1} has another colour than rank 0: blue, not red"
        with pytest.raises(DistributedError, match=expected):
            agree(group, lambda: {"colour": "red" if rank < size - 1 else "blue"})

    model = LeNet(generator=np.random.default_rng(5))
    for dtype in ("float32", "float64"):
        for examples, batch_size in ((150, 64), (41, 20)):
            data = model, a_split((1, 28, 28), examples, 1), a_split((1, 28, 28), 50, 2)
            how = {"kind": "fused", "steps": 23, "batch_size": batch_size, "dtype": dtype}
            right_results, right = trained(ALONE, *copy.deepcopy(data), **how)
            for threads in (1, 2):
                results, found = trained(group, *copy.deepcopy(data), **how, threads=threads)
                assert results == right_results
                for name, value in right.items():
                    assert found[name].tobytes() == value.tobytes(), (name, dtype, threads)
    how |= {"kind": "layers", "steps": 30, "lr": 0.01}
    _, right = trained(ALONE, *data, **how)
    _, found = trained(group, *data, **how)
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12)
    if rank == 0:
        print(f"{size} ranks: all well")


main()
