"""Image files as arrays, for training and prediction alike.

A rule for each kind of file:

- animated: the first frame;
- rotated: turned upright, as EXIF says;
- 16 bits: the upper eight of each pixel; floating-point pixels are refused;
- transparent: shown on black;
- colour, where one channel is wanted: its luma (ITU-R BT.601, Pillow's "L"); grey, where three are
  wanted: the same value three times;
- of another size, or not square: shrunk or enlarged with the aspect ratio kept, black around it;
- unreadable, or so large that Pillow suspects an attack: refused, with the name of the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npbn.errors import DataError

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")


def image_endings() -> set[str]:
    """Return the endings of file names that stand for images: ".png", ".jpg", …"""
    from PIL import Image

    return set(Image.registered_extensions())


def inspect_image(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int]]:
    """Return the channels, 1 or 3, and the size, (width, height), without decoding all pixels.

    Raises:
        DataError: it is no image.
    """
    with _opened(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # by 90 degrees, to one side or the other
        size = image.size[::-1] if turned else image.size
        return (1 if image.mode in GREY_MODES else 3), size


def read_image(
    path: str | os.PathLike[str], channels: int, side: int, *, invert: bool = False
) -> np.ndarray:
    """Return an image file as the networks take images: uint8, (channels, side, side).

    Args:
        path: any format that Pillow knows; the rules are at the top of this module.
        channels: 1, grey; 3, red, green, blue.
        side: of the result, in pixels.
        invert: swap dark and light; what is transparent stays black.

    Raises:
        DataError: it cannot be read as an image.
    """
    return padded(read_pixels(path, channels, side, invert=invert), side)


def read_pixels(
    path: str | os.PathLike[str], channels: int, side: int, *, invert: bool = False
) -> np.ndarray:
    """Return what `read_image` does, without the black around it: its longer side is ``side``."""
    from PIL import Image, ImageOps

    with _opened(path) as file:
        image: Any = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
            values = np.asarray(image)
            if np.min(values) < 0 or np.max(values) > 65535:
                raise ValueError("expected pixels of 8 or 16 bits")
            image = Image.fromarray((values // 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("expected pixels of 8 or 16 bits, got floating point")
        width, height = (max(1, round(side * size / max(image.size))) for size in image.size)
        image = image.convert("RGBA")
        if channels == 1:
            image = image.convert("LA")
        pixels = np.asarray(image.resize((width, height)), dtype=np.float64)
    colours, alpha = pixels[..., :-1], pixels[..., -1:]
    values = np.rint((255 - colours if invert else colours) * (alpha / 255))
    return np.moveaxis(values.astype(np.uint8), -1, 0)


def padded(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return pixels (C, H, W) in the middle of a black square (C, side, side)."""
    channels, height, width = pixels.shape
    square = np.zeros((channels, side, side), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return square


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open an image file; whatever its decoder raises becomes a DataError that names it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image of a format that Pillow knows, or damaged") from None
    except Exception as error:  # the decoder of each format fails in its own way
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as an image: {reason}") from None
