"""Draw training runs: how they went, what batch norm did, and what the network sees and mistakes.

One run is drawn with all pictures; of several, those that can be compared are laid over one
another.
"""

from __future__ import annotations

from _command_line import ArgumentParser, check_installation, run, say

check_installation()

import argparse
from pathlib import Path

from _experiment import load_data, load_model
from _pictures import draw_comparison, draw_run
from npbn import plots
from npbn.runs import CHECKPOINTS, Run

EPILOG = """\
examples:
  python scripts/plot_run.py runs/first                        into runs/first/plots
  python scripts/plot_run.py runs/with runs/without --output comparison

A run that is still under way, or was interrupted, is drawn as far as it has come.

exit codes: 0 drawn, 1 nobody reads the output any more, 2 bad input or something missing on this
machine, 130 interrupted
"""


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="plot_run.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py made")
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
    arguments = parser.parse_args()
    count = len(arguments.runs)
    if count > len(plots.COLOURS):
        parser.error(f"expected at most {len(plots.COLOURS)} runs, got {count}")
    if count > 1 and arguments.output is None:
        parser.error(f"argument --output: needed for {count} runs: where to put the pictures")
    if count > 1 and arguments.checkpoint is not None:
        parser.error("argument --checkpoint: not allowed with several runs: no model is drawn")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    runs = [Run.open(path) for path in arguments.runs]
    directory = runs[0].path / "plots" if arguments.output is None else Path(arguments.output)
    if len(runs) > 1:
        draw_comparison(runs, directory)
        return
    model, record = load_model(runs[0], arguments.checkpoint)
    say(f"model: as it was after epoch {record['epoch']}")
    draw_run(runs[0], model, load_data(runs[0].config), directory)


if __name__ == "__main__":
    run("plot_run.py", main)
