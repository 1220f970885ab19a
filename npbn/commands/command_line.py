"""Define the common parts of all commands: error messages of one line, and exit codes.

The exit codes are 0 if all went well; 1 if nobody reads the output any more; 2 for bad input,
something missing on this machine or an output that cannot be written; and 130 if Ctrl-C interrupted
the command.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable
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


class CtrlC:
    """A context in which the first Ctrl-C only sets ``pressed``; the next one interrupts."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> CtrlC:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # In the background, it may be ignored.
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def typed(program: str) -> str:
    """Return the command that starts a program: "npbn train", or "python scripts/train.py"."""
    return f"python scripts/{program}" if program.endswith(".py") else program


def say(line: str) -> None:
    """Print a line and flush the output, so that the line appears at once."""
    print(line, flush=True)


def run(program: str, main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its exit code.

    An error that the user can correct is printed as one line, without a traceback.
    """
    from npbn.errors import BackendError, NpbnError

    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal that cannot show √ shows \u221a.
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try:
        try:
            code = main() or 0
        finally:  # This also runs after --help, for which argparse ends the program.
            if sys.stdout is not None:
                sys.stdout.flush()
    except NpbnError as error:
        code = _fail(one_line(f"{program}: error: {error}"))
        if isinstance(error, BackendError) and sys.stderr is not None:
            # On a GPU that failed, CuPy prints a traceback for each thing that it frees.
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    except KeyboardInterrupt:
        _fail(f"\n{program}: interrupted")
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:  # The error is about a file, not about the output.
            raise
        # Python would try to write the rest of the buffer at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # The reader has ended, as in `train.py | head`.
            sys.exit(1)
        sys.exit(_fail(f"{program}: error: cannot write the output: {error.strerror}"))
    sys.exit(code)
