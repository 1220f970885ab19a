"""Check that npbn is installed, then import the common parts of its commands for the scripts."""

from __future__ import annotations

import importlib.util
import signal
import sys

# Ctrl-C during the imports ends the process without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

NEEDED = (
    "npbn",
    "numpy",
    "array_api_compat",
    "platformdirs",
    "portalocker",
    "safetensors",
    "threadpoolctl",
    "tqdm",
)

missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if missing:
    if sys.stderr is not None:
        print(
            f"not installed: {', '.join(missing)}; in npbn's directory: pip install -e .",
            file=sys.stderr,
        )
    sys.exit(2)

from npbn.commands import start as start
from npbn.commands.command_line import ArgumentParser as ArgumentParser
from npbn.commands.command_line import integer as integer
from npbn.commands.command_line import number as number
from npbn.commands.command_line import one_line as one_line
from npbn.commands.command_line import run as run
from npbn.commands.command_line import say as say
