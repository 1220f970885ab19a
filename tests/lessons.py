"""The lessons, taken apart: Python files in percent cells."""

from __future__ import annotations

import re
from pathlib import Path

from commands import SCRIPTS

LESSONS = sorted((SCRIPTS / "lessons").glob("[0-9]*.py"))


def cells(path: Path) -> list[tuple[str, str]]:
    """("markdown" or "code", text) of every cell; text before the first is a code cell, too."""
    before, *parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [("code", before)] if before.strip() else []
    for header, text in zip(parts[::2], parts[1::2], strict=True):
        assert header in ("", " [markdown]"), header
        if header:
            lines = text.strip().splitlines()
            assert all(line == "#" or line.startswith("# ") for line in lines), text
            found.append(("markdown", "\n".join(line[2:] for line in lines)))
        else:
            found.append(("code", text.strip()))
    return found


def markdown(path: Path) -> str:
    return "\n\n".join(text for kind, text in cells(path) if kind == "markdown")
