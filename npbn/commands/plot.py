"""Draw training runs: how they went, what batch norm did, what the network sees, and its mistakes.

For one run, all pictures are drawn. For several runs, only the pictures that can show all of the
runs together are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, say, typed
from npbn.commands.pictures import draw_comparison, draw_run
from npbn.runs import CHECKPOINTS, Run

EPILOG = """\
examples:
  {plot} runs/first                        into runs/first/plots
  {plot} runs/with runs/without --output comparison

A run that has not ended is drawn up to its last epoch.

exit codes: 0 drawn, 1 the output pipe was closed, 2 bad input or something missing on this
machine, 130 interrupted
"""


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(plot=typed(program)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the pictures (default: RUN/plots; needed for several runs)",
    )
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="whose model to draw (default: best, or last as long as nothing was evaluated)",
    )
    arguments = parser.parse_args(words)
    count = len(arguments.runs)
    if count > 1 and arguments.output is None:
        parser.error(f"argument --output: needed for {count} runs: where to put the pictures")
    if count > 1 and arguments.checkpoint is not None:
        parser.error("argument --checkpoint: not allowed with several runs: no model is drawn")
    return arguments


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    runs = [Run.open(path) for path in arguments.runs]
    directory = runs[0].path / "plots" if arguments.output is None else Path(arguments.output)
    if len(runs) > 1:
        draw_comparison(runs, directory)
        return
    loaded = experiment.load(runs[0].path, arguments.checkpoint)
    say(f"model: after epoch {loaded.epoch}")
    draw_run(loaded, loaded.dataset(), directory)
