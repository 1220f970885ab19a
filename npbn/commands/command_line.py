"""Define the common parts of all commands: error messages of one line, and exit codes.

The exit codes are 0 if all went well; 1 if nobody reads the output any more; 2 for bad input,
something missing on this machine or an output that cannot be written; 3 if the loss of a training
became NaN; and 128 + n if signal n stopped the command: 130 after Ctrl-C, 143 after SIGTERM, 129
after SIGHUP. `npbn check` has exit codes of its own for 1 and 3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STARTED = time.perf_counter()
"""The time when the program began, before most of its imports."""


def _fail(message: str) -> int:
    if sys.stderr is not None:
        print(message, file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    r"""Return the message with each unprintable character as an escape sequence, such as \n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse.ArgumentParser that prints an error as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        message = one_line(f"{self.prog}: error: {message} (--help lists the options)")
        self.exit(2, f"{message}\n")


def value(kind: type, description: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return an argparse type: a value of type ``kind`` for which ``holds`` is true."""

    def parse(text: str) -> Any:
        try:
            found = kind(text)
            if holds(found):
                return found
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {description}, got {text!r}")

    return parse


def integer(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least ``minimum``."""
    return value(int, f"an integer >= {minimum}", lambda found: bool(found >= minimum))


def number(description: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """Return an argparse type: a finite number for which ``holds`` is true."""
    return value(float, description, lambda found: math.isfinite(found) and holds(found))


SIGNALS = [
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""The signals that stop a command. Windows has no SIGHUP."""


class Stopped(KeyboardInterrupt):
    """The error that is raised if a signal stops the command. ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


def _unraisable(found: Any) -> None:
    """Send a signal again if Python ignored its exception, as in a callback of a compiler."""
    if isinstance(found.exc_value, Stopped):
        # A timer sends the signal, because here the exception would be ignored again.
        threading.Timer(0.1, os.kill, (os.getpid(), found.exc_value.signal)).start()
    else:
        sys.__unraisablehook__(found)


class PostponedStop:
    """A context in which the first signal of `SIGNALS` only stores its number in ``signal``.

    The next signal stops the command at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> PostponedStop:
        # A signal that is ignored stays ignored: SIGINT in the background, SIGHUP with nohup.
        self._numbers = [number for number in SIGNALS if signal.getsignal(number) is _stop]
        for number in self._numbers:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number in self._numbers:
            signal.signal(number, _stop)

    def __exit__(self, *_: object) -> None:
        self._restore()


def typed(program: str) -> str:
    """Return the command that starts a program: "npbn train", or "python scripts/train.py"."""
    return f"python scripts/{program}" if program.endswith(".py") else program


class OutputError(Exception):
    """The error that is raised if the output cannot be written. Its cause is an OSError."""


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Raise OutputError in place of an OSError in a ``with`` block that writes to the output."""
    try:
        yield
    except OSError as error:
        raise OutputError from error


_quiet = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of `say` in a ``with`` block."""
    global _quiet
    _quiet = True
    try:
        yield
    finally:
        _quiet = False


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress the standard output in a ``with`` block."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def say(line: str, *, always: bool = False) -> None:
    """Print a line and flush the output, so that the line appears at once.

    In the context of `quiet`, the line is printed only if ``always`` is true.

    Raises:
        OutputError: the line cannot be written.
    """
    if _quiet and not always:
        return
    with output():
        print(line, flush=True)


def run(program: str, main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its exit code.

    An error that the user can correct is printed as one line, without a traceback.
    """
    from npbn.errors import BackendError, NonFiniteError, NpbnError

    if isinstance(sys.stdout, io.TextIOWrapper):  # If a terminal cannot show √, it shows \u221a.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _unraisable
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)
    code = 0
    try:
        try:
            code = main() or 0
        finally:  # This also runs after --help, for which argparse ends the program.
            with output():
                if sys.stdout is not None:
                    sys.stdout.flush()
    except NpbnError as error:
        code = _fail(one_line(f"{program}: error: {error}"))
        if isinstance(error, NonFiniteError):
            code = 3
        if isinstance(error, BackendError) and sys.stderr is not None:
            # After a GPU has failed, CuPy prints a traceback for each array that it frees.
            sys.stderr.flush()
            os._exit(code)
    except Stopped as stopped:
        name = signal.Signals(stopped.signal).name
        _fail(f"\n{program}: {'interrupted' if name == 'SIGINT' else f'stopped by {name}'}")
        code = 128 + stopped.signal
    except MemoryError as error:
        code = _fail(one_line(f"{program}: error: out of memory: {error or 'no more is free'}"))
    except OutputError as error:
        # Python would try to write the rest of the buffer at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        cause = error.__cause__
        assert isinstance(cause, OSError)
        code = 1  # The reader has ended, as in `train.py | head`.
        if not isinstance(cause, BrokenPipeError):
            code = _fail(f"{program}: error: cannot write the output: {cause.strerror}")
    except OSError as error:
        what = "" if error.filename is None else f"{error.filename}: "
        code = _fail(one_line(f"{program}: error: {what}{error.strerror or error}"))
    sys.exit(code)
