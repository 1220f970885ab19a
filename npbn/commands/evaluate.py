"""Print the loss and accuracy of a run's model on its test images, and each class's accuracy."""

from __future__ import annotations

import argparse

import numpy as np

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, say
from npbn.runs import CHECKPOINTS


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="whose model to use (default: best, or last as long as nothing was evaluated)",
    )
    return parser.parse_args(words)


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    loaded = experiment.load(arguments.run, arguments.checkpoint)
    test = loaded.dataset().test
    probabilities = loaded.predict(test.images)
    right = probabilities.argmax(axis=1) == test.labels
    loss = -np.log(np.take_along_axis(probabilities, test.labels[:, None], axis=1)).mean()
    say(f"model: after epoch {loaded.epoch}")
    say(f"test images {len(test):,}  accuracy {right.mean():.4f}  loss {loss:.4f}")
    width = max(map(len, loaded.config.classes))
    for label, name in enumerate(loaded.config.classes):
        of_class = right[test.labels == label]
        if of_class.size:
            say(f"  {name:{width}}  {of_class.mean():.4f}  of {of_class.size:,}")
