"""Classify images with the network of a training run: image files, or images of the test set.

Image files may be of any size, grey or in colour. They are converted to the training format: grey
or in colour, resized with the aspect ratio kept, and padded to a square with black.
"""

from __future__ import annotations

import argparse

import numpy as np

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, integer, say, typed
from npbn.data import YOURS
from npbn.data.images import padded, read_pixels
from npbn.errors import NpbnError
from npbn.experiment import Config
from npbn.runs import CHECKPOINTS

EPILOG = """\
examples:
  {predict} runs/first boot.png
  {predict} runs/first --invert photo.jpg      dark on a light ground
  {predict} runs/first --index 0 17            of the test set

exit codes: 0 classified, 1 the output pipe was closed, 2 bad input or something missing on
this machine, 130 interrupted
"""

UNKNOWN = -1  # the label of an image that is not in the test set


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(predict=typed(program)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--index",
        type=integer(0),
        nargs="+",
        default=[],
        metavar="I",
        help="images of the test set, from 0",
    )
    parser.add_argument(
        "--invert", action="store_true", help="image files are dark on light: swap the two"
    )
    parser.add_argument(
        "--all", action="store_true", help="every class's probability, not only the top three"
    )
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="whose model to use (default: best, or last as long as nothing was evaluated)",
    )
    arguments = parser.parse_intermixed_args(words)  # Options may stand between RUN and IMAGE.
    if not arguments.images and not arguments.index:
        parser.error("expected an image file, or --index and a number")
    if arguments.invert and not arguments.images:
        parser.error("argument --invert: not allowed without an image file")
    return arguments


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    loaded = experiment.load(arguments.run, arguments.checkpoint)
    config = loaded.config
    names, images, labels = [], [], []
    for path in arguments.images:
        names.append(path)
        images.append(read(path, config, invert=arguments.invert))
        labels.append(UNKNOWN)
    if arguments.index:
        test = loaded.dataset().test
        for i in arguments.index:
            if i >= len(test):
                raise NpbnError(f"--index {i}: the test images are 0 to {len(test) - 1}")
            names.append(f"test image {i}")
            images.append(test.images[i])
            labels.append(int(test.labels[i]))
    say(f"model: after epoch {loaded.epoch}")
    found = loaded.predict(np.stack(images))
    for name, label, probabilities in zip(names, labels, found, strict=True):
        truth = "" if label == UNKNOWN else f" (truly {config.classes[label]})"
        order = np.argsort(-probabilities, kind="stable")
        say(f"{name}: {config.classes[order[0]]}{truth}")
        for k in order if arguments.all else order[:3]:
            say(f"  {probabilities[k]:.4f}  {config.classes[k]}")


def read(path: str, config: Config, *, invert: bool) -> np.ndarray:
    """Return an image file as an array in the format that the network was trained on.

    Print a note if the border of the image is light although the training images were on black.
    """
    assert config.channels is not None and config.side is not None
    pixels = read_pixels(path, config.channels, config.side, invert=invert)
    if pixels.max() < 32:
        say(
            f"note: {path} is nearly black: its brightest pixel is {pixels.max()} of 255 (scale "
            "values of 8 or 12 bits in a file of 16 bits first)"
        )
    border = np.concatenate(
        [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1
    )
    if config.dataset not in YOURS and np.mean(border) > 127:
        say(
            f"note: the border of {path} is light, but the network was trained on light things on "
            f"black: try {'without' if invert else 'with'} --invert"
        )
    return padded(pixels, config.side)
