"""Report measurements: medians, tables, files."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _command_line import say
from npbn.checkpoint import write_file
from npbn.errors import NpbnError


def quotients(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, with the smallest and the largest value in brackets."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}}-{high:{form}})"


def print_table(rows: list[list[str]]) -> None:
    """Print a table in Markdown; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    say("")
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        say(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")


def check_writable(path: Path) -> None:
    """Raise an error if no file can be written at ``path``.

    Scripts call this function before a measurement that takes minutes.
    """
    if path.exists() and not path.is_file():
        raise NpbnError(f"cannot write {path}: it is no file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise NpbnError(f"cannot write {path}: {error.strerror}") from None


def save(path: Path, content: bytes) -> None:
    """Write a file; if writing fails, an older file at ``path`` stays intact."""
    try:
        write_file(path, content)
    except OSError as error:
        raise NpbnError(f"cannot write {path}: {error.strerror}") from None
