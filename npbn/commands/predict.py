"""Classify images with the network of a training run: image files, or images of the test set.

Image files may be of any size, grey or in colour. They are made what the network was trained on:
grey, light on dark, square and small, with the aspect ratio kept.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, integer, say, typed
from npbn.errors import NpbnError
from npbn.runs import CHECKPOINTS

EPILOG = """\
examples:
  {predict} runs/first boot.png
  {predict} runs/first --invert photo.jpg      dark on a light ground
  {predict} runs/first --index 0 17            of the test set

exit codes: 0 classified, 1 the output pipe was closed, 2 bad input or something missing on
this machine, 130 interrupted
"""

UNKNOWN = -1  # the label of an image that is not of the test set


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
    arguments = parser.parse_intermixed_args(words)  # options may stand between RUN and IMAGE
    if not arguments.images and not arguments.index:
        parser.error("expected an image file, or --index and a number")
    if arguments.invert and not arguments.images:
        parser.error("argument --invert: not allowed without an image file")
    return arguments


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    loaded = experiment.load(arguments.run, arguments.checkpoint)
    config, side = loaded.config, loaded.config.side
    assert side is not None
    names, images, labels = [], [], []
    for path in arguments.images:
        names.append(path)
        images.append(read_image(path, side, invert=arguments.invert))
        labels.append(UNKNOWN)
    if arguments.index:
        test = experiment.load_data(config).test
        for i in arguments.index:
            if i >= len(test):
                raise NpbnError(f"--index {i}: the test images are 0 to {len(test) - 1}")
            names.append(f"test image {i}")
            images.append(test.images[i])
            labels.append(int(test.labels[i]))
    say(f"model: as it was after epoch {loaded.epoch}")
    found = loaded.predict(np.stack(images))
    for name, label, probabilities in zip(names, labels, found, strict=True):
        truth = "" if label == UNKNOWN else f" (truly {config.classes[label]})"
        order = np.argsort(-probabilities, kind="stable")
        say(f"{name}: {config.classes[order[0]]}{truth}")
        for k in order if arguments.all else order[:3]:
            say(f"  {probabilities[k]:.4f}  {config.classes[k]}")


def read_image(path: str, side: int, *, invert: bool) -> np.ndarray:
    """An image file as the network knows images: uint8, (1, side, side), on black."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise NpbnError(f"Pillow is needed ({error}): pip install 'pillow>=10'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
            values = np.asarray(image)
            if np.min(values) < 0 or np.max(values) > 65535:
                raise ValueError("expected pixels of 8 or 16 bits")
            image = Image.fromarray((values // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("expected pixels of 8 or 16 bits, got floating point")
        longer = max(image.size)
        width, height = (max(1, round(side * size / longer)) for size in image.size)
        image = image.convert("RGBA").convert("LA").resize((width, height))
    except UnidentifiedImageError:
        raise NpbnError(f"{path} is no image of a format that Pillow knows, or damaged") from None
    except Exception as error:  # the decoder of each format fails in its own way
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise NpbnError(f"{path} cannot be read as an image: {reason}") from None
    grey, alpha = np.moveaxis(np.asarray(image, dtype=np.float64), -1, 0)
    # What is transparent is ground, so black in any case.
    values = np.rint((255 - grey if invert else grey) * (alpha / 255)).astype(np.uint8)
    if np.mean(np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])) > 127:
        say(
            f"note: the border of {path} is light, but the network was trained on light things on "
            f"black: try {'without' if invert else 'with'} --invert"
        )
    padded = np.zeros((1, side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    padded[0, top : top + height, left : left + width] = values
    return padded
