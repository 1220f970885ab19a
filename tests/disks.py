"""Folders and disks in the states in which files get lost."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


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
