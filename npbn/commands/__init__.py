"""Define the command ``npbn``.

Each subcommand has a module, which also has the help text of ``npbn COMMAND --help``.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import NoReturn

COMMANDS = {
    "train": "train a network, and keep the run in a folder",
    "evaluate": "loss and accuracy of a run's model on its test images",
    "predict": "classify image files with a run's model",
    "plot": "draw runs",
    "runs": "list the runs in a folder",
    "export": "write a run's model for PyTorch or ONNX Runtime",
    "check": "check gradients: npbn's, or those of files of yours",
    "grade": "grade the homework of a class",
}


def main() -> NoReturn:
    """Parse ``npbn COMMAND …``, run the command, and exit."""
    from npbn import __version__
    from npbn.commands.command_line import ArgumentParser

    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    parser = ArgumentParser(
        prog="npbn",
        description="Batch normalization with hand-derived gradients: train, look, check.",
        epilog="\n".join(["commands:", *lines, "", "npbn COMMAND --help says more of each"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"npbn {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    if len(sys.argv) == 1:
        parser.print_help()
        sys.exit()
    found = parser.parse_args()
    start(found.command, f"npbn {found.command}", found.arguments)


def start(command: str, program: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit.

    Args:
        command: one of COMMANDS.
        program: the name of the program in messages.
        arguments: the arguments of the command. By default, these are the arguments of the command
            line.
    """
    from npbn.commands.command_line import run

    # During the imports, Ctrl-C ends the process without a traceback. After them, `run` handles
    # Ctrl-C. In the background, where Ctrl-C is ignored, it stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = importlib.import_module(f"npbn.commands.{command}")
    run(program, lambda: module.main(program, sys.argv[1:] if arguments is None else arguments))
