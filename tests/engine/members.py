"""What worker processes and programs of the tests of teams import."""

from __future__ import annotations

import hashlib
import sys
import time

import numpy as np

from npbn.data import Split
from npbn.engine import Engine
from npbn.models import BLeNet
from npbn.optim import SGD


class Member:
    """A worker that meets others, fails, or takes its time.

    Args:
        late: as a fraction of its looks at the flags, how often it goes to sleep after them.
    """

    def __init__(self, late, number, shared, exchange):
        self.number, self.shared, self.exchange = number, shared, exchange
        meeting = exchange.__self__
        meeting.flags = LateFlags(meeting.flags, late, number)

    def meet(self, workers, rounds, seed):
        """What all found in each round: their numbers, the round, and the seed."""
        return np.array(
            [self.exchange(np.array([self.number, k, seed], float), workers) for k in range(rounds)]
        )

    def negate(self, name):
        """The array of that name, in place; and its sum before."""
        array = self.shared[name]
        total = array.sum()
        np.negative(array, out=array)
        return self.number, total

    def fail(self):
        raise ValueError("as it was told to")

    def sleep(self):
        time.sleep(1000)


class LateFlags:
    """Flags, and somebody who often sees them and then falls asleep."""

    def __init__(self, flags, late, seed):
        self.flags, self.late, self.rng = flags, late, np.random.default_rng(seed)

    def __getitem__(self, i):
        value = self.flags[i]
        if self.rng.random() < self.late:
            time.sleep(1e-3 * self.rng.random())
        return value

    def __setitem__(self, i, value):
        self.flags[i] = value


class Touchy(tuple):
    """Numbers that can be read in the process of the tests alone."""

    def __iter__(self):
        if "pytest" not in sys.modules:
            raise ValueError("do not touch")
        return super().__iter__()


def a_split(examples: int = 60) -> Split:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (examples, *(1, 28, 28)), dtype=np.uint8)
    return Split(images, rng.integers(0, 10, examples))


def an_engine(workers: int = 3) -> Engine:
    model = BLeNet(generator=np.random.default_rng(0))
    return Engine(model, SGD(model.parameters(), 0.5, momentum=0.9), (1, 28, 28), workers=workers)


def arrays(engine: Engine) -> list[np.ndarray]:
    """Parameters and moving averages, as they are now."""
    return [getattr(owner, name).copy() for _, owner, name in engine._parameters]


def digest(workers: int) -> str:
    split, engine = a_split(), an_engine(workers)
    losses = [engine.step(split, np.arange(k, 60)) for k in range(3)]
    found = repr((losses, engine.evaluate(split))).encode()
    return hashlib.sha256(found + b"".join(a.tobytes() for a in arrays(engine))).hexdigest()
