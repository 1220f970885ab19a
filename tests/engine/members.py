"""What worker processes run in the tests of teams; they import it from here."""

from __future__ import annotations

import sys
import time

import numpy as np


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
