"""Files, folders and disks in the states in which files get lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def sparse(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(200 * 10**9)


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "missing": lambda path, content: None,
    "empty": lambda path, content: path.write_bytes(b""),
    "cut": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "doubled": lambda path, content: path.write_bytes(2 * content),
    "not UTF-8": lambda path, content: path.write_bytes(b"\xff\xfe" * 10 + b"\n"),
    "an array": lambda path, content: path.write_bytes(b"[1]\n"),
    "a number": lambda path, content: path.write_bytes(b"1e999\n"),
    "an empty object": lambda path, content: path.write_bytes(b"{}\n{}\n"),
    "deep": lambda path, content: path.write_bytes(b"[" * 100_000 + b"\n"),
    "a directory": lambda path, content: path.mkdir(),
    "a pipe": lambda path, content: os.mkfifo(path),
    "a link to nowhere": lambda path, content: path.symlink_to("nowhere"),
    "a link to itself": lambda path, content: path.symlink_to(path.name),
    "an endless file": lambda path, content: path.symlink_to("/dev/zero"),
    "200 GB": sparse,
}
"""What makes a damaged file of a path that does not exist and of the content it had, by name."""


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file under a folder, hidden ones too; None for a directory, and for a run's lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and path.name != "lock"
        else None
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Afterwards every file is what it was before, and no other is there."""
    before = contents(folder)
    yield
    assert contents(folder) == before


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own in a new folder; skips the test where mounting is not allowed."""
    folder.mkdir()
    _mount(f"size={kilobytes}k", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(disk: Path, read_only: bool = True) -> None:
    """Also for root, for whom modes are no obstacle."""
    _mount("remount," + ("ro" if read_only else "rw"), disk)


def _mount(options: str, folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("this system has no mount")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this user may not mount: {error.stderr.strip()}")
