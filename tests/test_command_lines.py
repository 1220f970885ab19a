"""Whatever the command lines are given: an answer, or one line and exit code 2; no traceback."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import SCRIPTS

SCRIPT_NAMES = ("check_gpu", "benchmark", "accuracy")
COMMANDS = ("train", "check", "plot", "predict", "evaluate", "export")
NAMES = ("train", "check", *SCRIPT_NAMES)
MODULES = {name: importlib.import_module(f"npbn.commands.{name}") for name in COMMANDS}
interrupt = signal.getsignal(signal.SIGINT)
sys.path.insert(0, str(SCRIPTS))
try:
    for name in SCRIPT_NAMES:
        MODULES[name] = importlib.import_module(name)
finally:
    sys.path.remove(str(SCRIPTS))
    signal.signal(signal.SIGINT, interrupt)  # which the scripts leave to the system


def parse_arguments(name: str) -> None:
    """Parse ``sys.argv`` as a command or a script does."""
    own = (f"{name}.py", sys.argv[1:]) if name in COMMANDS else ()
    MODULES[name].parse_arguments(*own)


def parse(name: str, arguments: list[str]) -> str:
    """What is said to be wrong with them; nothing if they are accepted."""
    output, errors = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [f"{name}.py", *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            parse_arguments(name)
            code = None
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    if code != 2:  # with 0, it is --help or --version
        assert not errors.getvalue() and code in (0, None)
        return ""
    (line,) = errors.getvalue().splitlines()
    assert line.startswith(f"{name}.py: error: ") and line.isprintable()
    return line


def actions(name: str, monkeypatch) -> list[argparse.Action]:
    """The options of a script, from its own parser."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser,
            "parse_known_args",
            lambda self, *_, **__: found.extend(self._actions) or sys.exit(0),
        )
        with pytest.raises(SystemExit):
            parse_arguments(name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_option_that_is_not_free_text_refuses_bad_values(name, monkeypatch):
    checked = 0
    for action in actions(name, monkeypatch):
        if action.nargs == 0 or (action.type in (None, str) and action.choices is None):
            continue
        option = action.option_strings[0]
        for value in ("", "x", " ", "nan", "-1", "-inf", "1e999", "1 2", "0x10", "\n", "é\u2028"):
            line = parse(name, [f"{option}={value}"])
            assert f"argument {option}: " in line, value
            assert repr(value) in line or ascii(value) in line
            checked += 1
        line = parse(name, [option])
        assert f"argument {option}: expected " in line and "one argument" in line
    assert checked or name == "accuracy"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_option_is_refused(name):
    for argument in ("--no-such-option", "-q", "--no\nsuch", "--no\x1b[31m", "--é\udcff"):
        assert "unrecognized arguments: -" in parse(name, [argument])


VALUES = st.one_of(
    st.sampled_from(["0", "1", "-1", "3", "0.5", "1e308", "inf", "nan", "auto", "numpy", "step"]),
    st.sampled_from(["", "--", "-", "=", "a.py:f,g", ":", ":,", "digits", "relu", "\0", "10" * 99]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
)


@pytest.mark.parametrize("name", MODULES)
@given(data=st.data())
def test_arbitrary_arguments_never_give_a_traceback(name, data, monkeypatch):
    options = [action.option_strings[-1:] for action in actions(name, monkeypatch)]
    option = st.sampled_from([option for (option,) in filter(None, options)])
    pair = st.tuples(option, VALUES)
    token = st.one_of(
        pair.map(list), pair.map("=".join).map(lambda t: [t]), option.map(lambda t: [t])
    )
    free = VALUES.map(lambda text: [text])
    parts = data.draw(st.lists(st.one_of(token, token, free), max_size=6))
    parse(name, [text for part in parts for text in part])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_a_callback_of_a_c_library_is_not_lost(name):
    """There, Python can only ignore an exception. Compilers have such callbacks."""
    program = f"""
import ctypes, os, signal, time
from npbn.commands.command_line import run, say

def callback():
    os.kill(os.getpid(), signal.{name})
    time.sleep(0)

def main():
    signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # it may be in the background
    ctypes.CFUNCTYPE(None)(callback)()
    time.sleep(600)

run("program", main)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 128 + getattr(signal, name)
    said = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert process.stderr.strip() == f"program: {said}"


HUGE = str(10**400)
QUICK = ("--dataset", "digits", "--limit-train", "40", "--batch-size", "16", "--backend", "numpy")
QUICK += ("--epochs", "2", "--run", "run")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--lr", "1e308"), 3),
        (("--lr", "5e-324"), 0),
        (("--weight-decay", "1e308"), 3),
        (("--momentum", "0.9999999999999999"), 0),
        (("--batch-size", HUGE, "--schedule", "cosine"), 0),
        (("--schedule", "step", "--lr-epochs", HUGE), 0),
        (("--schedule", "step", "--lr-epochs", "1", "--lr-factor", "5e-324"), 0),
        (("--threads", HUGE), 0),
        (("--threads", HUGE, "--engine", "fused"), 0),
        (("--seed", HUGE), 0),
        (("--eval-every", HUGE), 0),
        (("--target-accuracy", "1e-300"), 0),
        (("--epochs", HUGE, "--max-steps", "2", "--schedule", "cosine"), 0),
        (("--max-steps", HUGE), 0),
        (("--limit-train", HUGE), 2),
        (("--limit-train", "2", "--batch-size", "1"), 0),
        (("--run", ""), 2),
        (("--run", "\udcffé\n"), 0),
        (("--run", "x/.."), 2),
        (("--run", "a" * 300), 2),
        (("--dataset", "auto", "--data", "a" * 300), 2),
        (("--dataset", "auto", "--data", ""), 2),
        (("--dataset", "auto", "--data", "a\nb"), 2),
    ],
)
def test_values_at_the_edge_of_what_is_allowed(options, code, trainer, tmp_path):
    """They train, or end in one line."""
    process = trainer(*QUICK, *options, cwd=tmp_path)
    assert process.returncode == code, process.stderr
    assert len(process.stderr.splitlines()) == (1 if code else 0)
    if code:
        assert process.stderr.startswith("train.py: error: ")
