"""What the command lines share: one clear line for bad input, and exit codes.

0 all went well, 1 nobody reads the output any more, 2 bad input, something missing on this machine
or an output that cannot be written, 130 interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

# Ctrl-C during the imports ends the process without a traceback; `run` takes over from there.
# (Where the signal is ignored, as in the background, it stays so.)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

NEEDED = (
    "npbn",
    "numpy",
    "array_api_compat",
    "platformdirs",
    "safetensors",
    "threadpoolctl",
    "tqdm",
)


def check_installation() -> None:
    """To be called before these are imported: one line if they are not there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            _fail(f"not installed: {', '.join(missing)}; in npbn's directory: pip install -e .")
        )


def _fail(message: str) -> int:
    if sys.stderr is not None:
        print(message, file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    r"""With what is in a name and would break the line written as Python does: \n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with errors of one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        message = one_line(f"{self.prog}: error: {message} (--help lists the options)")
        self.exit(2, f"{message}\n")


def integer(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer >= {minimum}, got {text!r}")
        return value

    return parse


def number(description: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a finite number for which ``holds`` is true."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"expected {description}, got {text!r}")
        return value

    return parse


class CtrlC:
    """Inside, the first Ctrl-C is noted; a second one ends the program at once."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> CtrlC:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # and not ignored, as in the background
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def say(line: str) -> None:
    """Print a line, so that it is seen at once."""
    print(line, flush=True)


def run(program: str, main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit: what a user can mend is one line, without a traceback."""
    from npbn.errors import NpbnError

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without √ shows \u221a
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            main()
        finally:  # also after argparse's --help, which ends the program
            if sys.stdout is not None:
                sys.stdout.flush()
    except NpbnError as error:
        sys.exit(_fail(one_line(f"{program}: error: {error}")))
    except KeyboardInterrupt:
        _fail(f"\n{program}: interrupted")
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:  # nothing that we print to
            raise
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has gone, as in `train.py | head`
            sys.exit(1)
        sys.exit(_fail(f"{program}: error: cannot write the output: {error.strerror}"))
    sys.exit(0)
