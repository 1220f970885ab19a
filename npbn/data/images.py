"""Read image files as arrays, in the same way for training and prediction.

There is a rule for each kind of file:

- Of an animated image, the first frame is read.
- A rotated image is turned upright, as its EXIF data says.
- A pixel of 16 bits is reduced to 8 bits. Floating-point pixels are refused.
- A transparent image is shown on black.
- If one channel is wanted, the luma of a colour image is read (ITU-R BT.601, Pillow's "L"). If
  three channels are wanted, the value of a grey pixel is repeated three times.
- An image of another size is shrunk or enlarged to the wanted size, with the aspect ratio kept. If
  the image is not square, it is padded with black.
- A file that is unreadable, or so large that Pillow suspects an attack, is refused with an error
  that names the file.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npbn.errors import DataError

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F")


def image_endings() -> set[str]:
    """Return the endings of the names of image files, such as ".png" and ".jpg"."""
    from PIL import Image

    return set(Image.registered_extensions())


def inspect_image(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int]]:
    """Return the number of channels, 1 or 3, and the size (width, height) of an image file.

    The pixels are not decoded.

    Raises:
        DataError: the file is not an image.
    """
    with _opened(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # The photo is turned by 90 degrees.
        size = image.size[::-1] if turned else image.size
        return (1 if image.mode in GREY_MODES else 3), size


def read_image(
    path: str | os.PathLike[str], channels: int, side: int, *, invert: bool = False
) -> np.ndarray:
    """Return an image file as a uint8 array (channels, side, side), the input of the networks.

    Args:
        path: the path of a file in any format that Pillow knows. The rules for each kind of file
            are at the top of this module.
        channels: 1 for grey, or 3 for red, green and blue.
        side: the side of the result, in pixels.
        invert: whether to swap dark and light; transparent pixels stay black.

    Raises:
        DataError: the file cannot be read as an image.
    """
    return padded(read_pixels(path, channels, side, invert=invert), side)


def read_pixels(
    path: str | os.PathLike[str], channels: int, side: int, *, invert: bool = False
) -> np.ndarray:
    """Return an image as `read_image` does, but without padding.

    The longer side of the result is ``side``.
    """
    from PIL import Image, ImageOps

    with _opened(path) as file:
        image: Any = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # Pillow would clip pixels of 16 bits.
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
    """Open an image file; convert every error of its decoder to a DataError that names the file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not stat.S_ISREG(os.stat(path).st_mode):  # Reading a pipe may never end.
                raise ValueError("it is not a file")
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image of a format that Pillow knows, or damaged") from None
    except Exception as error:  # Each decoder raises its own errors.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as an image: {reason}") from None
