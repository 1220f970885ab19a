"""Lets these tests find the modules beside their folder, however few of them are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent))
