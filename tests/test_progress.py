"""The progress of a training where there is no terminal, and on a busy machine."""

from __future__ import annotations

import io
import os
import sys
import threading
from types import SimpleNamespace

import pytest

from npbn.commands import progress
from npbn.commands.progress import Progress, waiting_times


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still, and CPUs that nobody waits for, until a test changes them."""
    found = SimpleNamespace(now=1000.0, waited={"1": 5.0})
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(progress, "waiting_times", lambda: found.waited)
    monkeypatch.setattr(progress.sys, "stderr", None)
    return found


def test_a_line_every_half_minute_says_how_long_it_takes(clock, capsys):
    """Of a run of 1,000 examples, 200 were done before; then there are 2 examples a second."""
    shown = Progress(1000, 200)
    shown.epoch(1)
    for _ in range(100):
        clock.now += 1
        shown.update(2)
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "       (26% of the run done, about 06:09 left)",
        "       (32% of the run done, about 05:38 left)",
        "       (39% of the run done, about 05:07 left)",
    ]


def test_the_bar_counts_examples_of_the_whole_run(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    shown = Progress(1000, 200)
    shown.update(64)
    assert (shown._bar.n, shown._bar.total) == (264, 1000)
    shown.close()


def test_other_lines_count(clock, capsys):
    shown = Progress(1000, 0)
    for _ in range(100):
        clock.now += 1
        shown.update(2)
        shown.say("an epoch")
    assert capsys.readouterr().out.split("\n", 100)[:-1] == ["an epoch"] * 100


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"1": 5.9}, False),
        ({"1": 6.5}, True),
        ({"1": 5.0, "2": 1.5}, True),  # a thread that has begun since then
        ({}, False),
        (None, False),
    ],
)
def test_busy_cpus_are_said_once(after, said, clock, capsys):
    """Two looks, six seconds apart: did one of the threads wait for more than a fifth of them?"""
    shown = Progress(10**6, 0)
    clock.now, clock.waited = clock.now + 4, None
    shown.update(1)
    clock.now, clock.waited = clock.now + 2, after
    for _ in range(3):
        shown.update(1)
        clock.now += 6
    lines = capsys.readouterr().out.splitlines()
    expected = "note: CPUs are busy: a thread of this training waited for one 25% of the time; "
    assert lines == ([expected + "fewer --threads may be faster"] if said else [])


def test_where_the_system_does_not_tell_nothing_is_said(clock, capsys):
    clock.waited = None
    shown = Progress(100, 0)
    clock.now, clock.waited = clock.now + 6, {"1": 100.0}
    shown.update(1)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_how_long_the_threads_of_this_process_have_waited():
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    found = waiting_times()
    release.set()
    thread.join()
    assert found is not None
    assert {str(os.getpid()), str(thread.native_id)} <= found.keys()
    assert min(found.values()) >= 0
