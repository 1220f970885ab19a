"""Show the progress of a training: a bar on a terminal, and lines where there is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from tqdm import tqdm

from npbn.commands.command_line import say

SILENCE = 30.0
"""The longest time without a line where there is no terminal, in seconds."""
BUSY_AFTER = 5.0
"""The time after which the share of waiting is measured, in seconds."""
BUSY = 0.2
"""If a thread waits for a CPU for more than this fraction of the time, the machine is busy."""


class Progress:
    """The progress of a training, as a bar or as lines. Both show the time left for the whole run.

    If the CPUs are busy with other programs, a note says so once.

    Args:
        total: the number of examples until the end of the run.
        done: the number of examples that are done already.
    """

    def __init__(self, total: int, done: int) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" examples",
            unit_scale=True,
            leave=False,
            disable=not terminal,
        )
        self._lines = not terminal
        self._total = total
        self._began = self._done = done
        self._started = self._said = time.monotonic()
        self._waited: dict[str, float] | None = waiting_times()

    def epoch(self, number: int) -> None:
        """Show the number of the epoch that begins."""
        self._bar.set_description(f"epoch {number}")

    def update(self, examples: int) -> None:
        """Count examples that were trained on."""
        self._done += examples
        self._bar.update(examples)
        now = time.monotonic()
        if self._waited is not None and now - self._started > BUSY_AFTER:
            self._report_waiting(now - self._started)
        if self._lines and now - self._said > SILENCE:
            left = (now - self._started) / (self._done - self._began) * (self._total - self._done)
            share = self._done / self._total
            self.say(
                f"       ({share:.0%} of the run done, about {tqdm.format_interval(left)} left)"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.clear()
        say(line)
        self._said = time.monotonic()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def _report_waiting(self, seconds: float) -> None:
        assert self._waited is not None
        before, self._waited = self._waited, None
        after = waiting_times() or {}
        share = max((t - before.get(task, 0.0) for task, t in after.items()), default=0) / seconds
        if share > BUSY:
            self.say(
                f"note: CPUs are busy: a thread of this training waited for one {share:.0%} of the "
                "time; fewer --threads may be faster"
            )


def waiting_times() -> dict[str, float] | None:
    """Return how long each thread of this process has waited for a CPU, in seconds.

    This is the time in which the thread was ready to run, but other threads ran. The result is None
    if the operating system does not tell.
    """
    found: dict[str, float] = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # The thread has ended.
            _, waiting, _ = path.read_text().split()
            found[path.parent.name] = int(waiting) / 1e9
    return found or None
