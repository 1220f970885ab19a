"""The engine's worker processes: how they meet, and what happens when one of them ends."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import threadpoolctl
from members import Member, Touchy, a_split, an_engine, arrays, digest

from commands import assert_refused, run
from npbn.engine import Engine, numpy_stages, team
from npbn.engine.team import Team, start_workers
from npbn.errors import NpbnError, WorkerError


@pytest.fixture(autouse=True)
def none_left():
    """Checks that no worker has been left behind; and makes what hangs fail."""

    def too_long(*_):
        raise TimeoutError("it hangs")

    def check() -> None:
        assert {process.pid for process in serving()} - idle() <= before

    # What other tests' failures refer to, say.
    before = {process.pid for process in serving()} - idle()
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield check
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    check()


def idle() -> set[int]:
    return {worker.process.pid for worker in team._idle}


def serving(of: int | None = None) -> list[psutil.Process]:
    """The worker processes of a process, this one unless given, and what has been one."""
    found = []
    for process in psutil.Process(of).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE or "team.serve" in str(process.cmdline()):
                found.append(process)
    return found


def pids(of: Team) -> list[int]:
    return [worker.process.pid for worker in of._workers]


def kill(pid: int) -> None:
    """And wait until it has ended, without taking notice for the parent."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def a_team(size: int, late: float = 0.0) -> tuple[Team, Member]:
    """A team, and its first worker."""
    common, own = {"all": ((2, 3), "float32")}, {"mine": ((5,), "int64")}
    found = Team(size, (Member, late), common, own, (3, "float64"))
    return found, Member(late, 0, found.common, found.exchange)


@functools.cache
def expected_after(steps: int) -> list[np.ndarray]:
    split, engine = a_split(), an_engine()
    for _ in range(steps):
        engine.step(split, np.arange(60))
    return arrays(engine)


def assert_as_after(engine: Engine, steps: int) -> None:
    """As a new one is after so many steps on all of the examples."""
    for one, expected in zip(arrays(engine), expected_after(steps), strict=True):
        np.testing.assert_array_equal(one, expected)


# A team.


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_find_the_same_in_every_round(size):
    """Also if fewer of them are asked in between, and if they see one another's flags late."""
    members, first = a_team(size, late=0.05)
    for seed, asked in enumerate([size, 1, size, max(1, size - 1), max(1, size - 2), size]):
        rounds = 50 + seed % 2
        members.ask("meet", [(asked, rounds, seed)] * (asked - 1))
        found = [first.meet(asked, rounds, seed), *members.answers()]
        assert len(found) == asked
        expected = [[(i, k, seed) for i in range(asked)] for k in range(rounds)]
        for one in found:
            np.testing.assert_array_equal(one, expected)


def test_who_is_late_still_reads_what_was_meant_for_it():
    """The second goes on to the next meeting while the first has not read this one's yet."""
    flags, slots = np.zeros((2, 8), np.int64), np.zeros((2, 2, 1))
    one, two = (team.Meeting(i, flags, slots, lambda: None) for i in range(2))

    class Late:
        def __getitem__(self, i, flags=one.flags):
            value = flags[i]
            if i == 8 and value == one.count:
                time.sleep(0.1)
            return value

        def __setitem__(self, i, value, flags=one.flags):
            flags[i] = value

    one.flags = Late()
    thread = threading.Thread(target=lambda: [two.exchange(np.full(1, k), 2) for k in (7, 8)])
    thread.start()
    found = [one.exchange(np.zeros(1), 2)[1, 0] for _ in range(2)]
    thread.join()
    assert found == [7, 8]


def test_what_was_exchanged_is_not_overwritten_by_later_meetings():
    members, first = a_team(2)
    members.ask("meet", [(2, 5, 0)])
    found = [first.exchange(np.full(3, float(k)), 2) for k in range(5)]
    members.answers()
    assert [array[:, 0].tolist() for array in found] == [[k, 1] for k in range(5)]


def test_arrays_of_all_and_arrays_of_one():
    members, _ = a_team(3)
    members.common["all"][:] = 1.5
    for number, own in enumerate(members.own, 1):
        own["mine"][:] = number
    members.ask("negate", [("mine",), ("mine",)])
    assert members.answers() == [(1, 5), (2, 10)]
    assert [own["mine"].tolist() for own in members.own] == [[-1] * 5, [-2] * 5]
    members.ask("negate", [("all",)])
    assert members.answers() == [(1, 9)]
    assert (members.common["all"] == -1.5).all()
    for array in (members.common["all"], *(own["mine"] for own in members.own)):
        assert array.ctypes.data % 64 == 0


def test_its_processes_go_on_to_the_next_team():
    start_workers(2)
    started = idle()
    for size in (3, 2, 3):
        members, first = a_team(size)
        members.ask("meet", [(size, 3, 0)] * (size - 1))
        first.meet(size, 3, 0)
        members.answers()
        assert set(pids(members)) <= started
        # At once: nothing waits for the garbage collector.
        del members, first
        assert idle() == started


def test_looking_whether_a_worker_is_there_does_not_take_its_answer():
    members, _ = a_team(2)
    members.ask("negate", [("mine",)])
    (worker,) = members._workers
    assert select.select([worker.channel.socket], [], [], 30)[0]
    worker.check()
    assert members.answers() == [(1, 0)]


def test_idle_workers_sleep():
    members, first = a_team(3)
    members.ask("meet", [(3, 3, 0)] * 2)
    first.meet(3, 3, 0)
    members.answers()
    time.sleep(0.5)  # those of other tests may be starting still

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in serving())

    before = seconds()
    time.sleep(1)
    assert seconds() - before <= 0.05


# The end of a worker.


def test_a_worker_that_is_killed_while_the_first_waits_for_it():
    members, first = a_team(3)
    members.ask("sleep", [(), ()])
    threading.Timer(0.2, kill, [pids(members)[1]]).start()
    start = time.perf_counter()
    with pytest.raises(WorkerError, match=r"a worker .* has ended \(exit code -9\); out of memory"):
        first.meet(3, 1, 0)
    assert time.perf_counter() - start < 5
    members.dissolve()


def test_a_worker_that_is_killed_while_it_waits_for_the_first():
    members, first = a_team(3)
    members.ask("meet", [(3, 2, 0)] * 2)
    first.meet(3, 1, 0)
    time.sleep(0.1)
    kill(pids(members)[0])
    first.meet(3, 1, 0)  # its flag is up
    with pytest.raises(WorkerError, match=r"exit code -9"):
        members.answers()
    members.dissolve()


def test_a_worker_that_is_killed_before_it_has_read_what_to_do():
    """The socket says so in another way then."""
    members, first = a_team(2)
    members.ask("negate", [("mine",)])
    members.answers()
    (pid,) = pids(members)
    os.kill(pid, signal.SIGSTOP)
    members.ask("meet", [(2, 1, 0)])
    threading.Timer(0.2, kill, [pid]).start()
    with pytest.raises(WorkerError, match=r"exit code -9"):
        first.meet(2, 1, 0)
    members.dissolve()


def test_idle_workers_that_have_died_are_not_handed_out():
    start_workers(2)
    alive, dead = (worker.process.pid for worker in team._idle[-2:])
    kill(dead)
    members, first = a_team(3)
    assert dead not in pids(members) and alive in pids(members)
    members.ask("meet", [(3, 3, 0)] * 2)
    first.meet(3, 3, 0)
    assert len(members.answers()) == 2


@pytest.mark.parametrize("waiting", [True, False])
def test_an_exception_in_a_worker(waiting, none_left):
    """The first has its traceback; the other waits for somebody who will not come."""
    members, first = a_team(3)
    members._workers[0].send("meet", 0, 3, 1, 0)
    members._asked[:] = members._workers[1:]
    members._workers[1].send("fail", 0)
    with pytest.raises(WorkerError, match="as it was told to") as caught:
        first.meet(3, 1, 0) if waiting else members.answers()
    text = str(caught.value)
    assert text.startswith("in a worker process of the engine:\nTraceback")
    assert "members.py" in text and "ValueError" in text
    members.dissolve()
    none_left()


def test_a_set_up_that_fails():
    members = Team(2, (Member,), {}, {}, (1, "float64"))  # an argument is missing
    members.ask("meet", [(2, 1, 0)])
    with pytest.raises(WorkerError, match=r"TypeError: .*__init__"):
        members.answers()
    members.dissolve()


def test_an_interrupt_while_a_team_is_set_up(monkeypatch):
    """A worker that has half of a message is not used again."""

    def send_half(channel, message):
        channel.socket.sendall(message[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(team.Channel, "send", send_half)
    with pytest.raises(KeyboardInterrupt):
        a_team(3)
    monkeypatch.undo()
    members, first = a_team(3)
    members.ask("meet", [(3, 1, 0)] * 2)
    first.meet(3, 1, 0)
    assert len(members.answers()) == 2


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_no_workers_where_files_cannot_be_sent(monkeypatch):
    monkeypatch.delattr(socket, "send_fds")
    with pytest.raises(WorkerError, match="more than one worker needs Linux or macOS; ask for one"):
        an_engine(2)
    an_engine(1).step(a_split(), np.arange(9))


def test_processes_that_cannot_be_started(monkeypatch):
    before = idle()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(WorkerError, match=r"cannot start a worker process of .*/python"):
        start_workers(len(before) + 1)
    assert issubclass(WorkerError, NpbnError) and idle() == before


# The engine.


@pytest.mark.parametrize("method", ["step", "evaluate"])
def test_the_engine_goes_on_after_the_end_of_a_worker(method, none_left):
    split, engine = a_split(), an_engine()
    engine.step(split, np.arange(60))
    before = arrays(engine)
    kill(pids(engine._team)[1])
    with pytest.raises(WorkerError, match=r"exit code -9"):
        engine.step(split, np.arange(60)) if method == "step" else engine.evaluate(split)
    none_left()
    for one, expected in zip(arrays(engine), before, strict=True):
        np.testing.assert_array_equal(one, expected)
    engine.step(split, np.arange(60))
    assert_as_after(engine, 2)


def test_the_engine_goes_on_after_an_exception_in_a_worker(none_left):
    split, engine = a_split(), an_engine()
    layer = engine.blocks[0].layer
    layer.kernel_size = Touchy(layer.kernel_size)
    with pytest.raises(WorkerError, match="do not touch"):
        engine.step(split, np.arange(60))
    none_left()
    layer.kernel_size = tuple(layer.kernel_size)
    engine.step(split, np.arange(60))
    assert_as_after(engine, 1)


@pytest.mark.parametrize("where", ["forward", "backward", "predict"])
def test_an_interrupt_of_the_first_while_the_others_wait(monkeypatch, where, none_left):
    split, engine = a_split(), an_engine()
    engine.step(split, np.arange(60))
    monkeypatch.setattr(numpy_stages.Stage, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate(split) if where == "predict" else engine.step(split, np.arange(60))
    none_left()
    monkeypatch.undo()
    engine.step(split, np.arange(60))
    assert_as_after(engine, 2)


def test_what_it_sets_in_numpy_and_blas_is_set_back(monkeypatch):
    split, engine = a_split(), an_engine(2)
    seen = []

    def settings() -> list[int]:
        return [np.getbufsize(), *(library.get_num_threads() for library in engine._blas)]

    def forward(self, original=numpy_stages.Stage.forward):
        seen.append(settings())
        original(self)

    size = np.setbufsize(4096)
    try:
        with threadpoolctl.threadpool_limits(2):
            before = settings()
            assert before == [4096] + [2] * len(engine._blas) and len(before) > 1
            monkeypatch.setattr(numpy_stages.Stage, "forward", forward)
            engine.step(split, np.arange(60))
            assert settings() == before
            assert seen[0] == [512] + [1] * len(engine._blas)
            engine.evaluate(split)
            assert settings() == before
            monkeypatch.setattr(numpy_stages.Stage, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step(split, np.arange(60))
            assert settings() == before
    finally:
        np.setbufsize(size)


def test_more_workers_than_cores():
    split, engine = a_split(), an_engine(2 * len(os.sched_getaffinity(0)))
    for _ in range(20):
        engine.step(split, np.arange(60))
    engine.evaluate(split)


# Processes of their own.

PROGRAM = f"""
import signal, sys, time
import numpy as np
sys.path[:] = {sys.path!r}
from npbn.engine import numpy_stages
from members import a_split, an_engine, digest
signal.signal(signal.SIGINT, signal.default_int_handler)
split, every = a_split(), np.arange(60)
"""


@contextlib.contextmanager
def a_program(text: str, *options: str):
    """Python, running PROGRAM and this; in a group of its own."""
    process = subprocess.Popen(
        [sys.executable, *options, "-c", PROGRAM + text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    """Nobody may have waited for them, in a container."""
    until = time.perf_counter() + seconds
    while left := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.perf_counter() < until, left
        time.sleep(0.01)


@pytest.mark.parametrize(
    "text",
    [
        "print('ready', flush=True)\nwhile True: engine.step(split, every)",
        "numpy_stages.Stage.backward = lambda self: (print('ready', flush=True), time.sleep(1000))"
        "\nengine.step(split, every)",
        "print('ready', flush=True)\ntime.sleep(1000)",
    ],
    ids=["computing", "the others wait", "idle"],
)
def test_no_worker_outlives_the_first(text):
    with a_program("engine = an_engine(2)\nengine.step(split, every)\n" + text) as process:
        assert process.stdout.readline() == "ready\n"
        workers = serving(process.pid)
        assert len(workers) == 1
        process.kill()
        assert_gone(workers, 5)
        assert process.communicate(timeout=30) == ("", "")


@pytest.mark.parametrize(
    ("text", "last_line"),
    [
        ("an_engine(4)", ""),  # more, which are starting still
        ("del engine", ""),
        ("raise RuntimeError('over')", "RuntimeError: over"),
    ],
    ids=["referenced", "not referenced", "an exception"],
)
def test_the_end_of_a_program(text, last_line):
    start = "engine = an_engine(2)\nengine.step(split, every)\n"
    wait = "print('ready', flush=True)\nsys.stdin.readline()\n"
    with a_program(start + wait + text, "-W", "error") as process:
        assert process.stdout.readline() == "ready\n"
        workers = serving(process.pid)
        assert len(workers) == 1
        out, err = process.communicate(timeout=30)
        assert_gone(workers, 0)
        assert out == ""
        assert err.strip().splitlines()[-1:] == [last_line][: bool(last_line)]
        assert "Warning" not in err and "ignored" not in err
        assert process.returncode == bool(last_line)


@pytest.mark.parametrize("delay", [0.1, 1])
def test_ctrl_c_is_for_the_first_alone(delay):
    """From the moment that its workers start: while they import NumPy, and while they compute."""
    text = """
try:
    engine = an_engine()
    print("ready", flush=True)
    while True:
        engine.step(split, every)
except KeyboardInterrupt:
    print("interrupted", flush=True)
engine.step(split, every)
"""
    with a_program(text, "-W", "error") as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        workers = serving(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (out, err, process.returncode) == ("interrupted\n", "", 0)
        assert_gone(workers, 0)


def test_results_are_identical_to_the_bit_in_another_process():
    text = "print(digest(1), digest(2), digest(3))"
    with a_program(text) as process:
        out, err = process.communicate(timeout=60)
    expected = [digest(workers) for workers in (1, 2, 3)]
    assert out.split() == expected, err
    assert expected == [digest(workers) for workers in (1, 2, 3)]
    assert len(set(expected)) == 3


KILL_A_WORKER = """
import os, signal
from npbn.engine import Engine

def step(self, *arguments, original=Engine.step, count=[0]):
    count[0] += 1
    if count[0] == 3:
        os.kill(self._team._workers[0].process.pid, signal.SIGKILL)
    return original(self, *arguments)

Engine.step = step
"""


def test_a_command_line_says_it_in_one_line(tmp_path: Path):
    process = run(
        *("train.py", "--dataset", "digits", "--limit-train", "100", "--batch-size", "16"),
        *("--backend", "numpy", "--threads", "2", "--engine", "compiled", "--epochs", "2"),
        cwd=tmp_path,
        prelude=KILL_A_WORKER,
    )
    assert_refused(process, "a worker process of the engine has ended (exit code -9)")
