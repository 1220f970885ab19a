"""Load the handwritten digits that come with npbn; ``digits.md`` names their origin."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npbn.data.splits import Dataset, Split

TEST = 360  # the number of test images, which are the last fifth of the images


def load_digits(notes: tuple[str, ...] = ()) -> Dataset:
    """Return 1,797 digits of 8 × 8 pixels, enlarged to 28 × 28; the last 360 are for testing."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        small, labels = file["images"], file["labels"].astype(np.int64)
    images = np.rint(_enlarged(small, 28) * (255 / 16)).astype(np.uint8)[:, np.newaxis]
    return Dataset(
        "handwritten digits",
        "npbn",
        tuple("0123456789"),
        Split(images[:-TEST], labels[:-TEST]),
        Split(images[-TEST:], labels[-TEST:]),
        notes,
        key="digits",
    )


def _enlarged(images: np.ndarray, side: int) -> np.ndarray:
    """Return images (N, n, n) enlarged to (N, side, side) by linear interpolation.

    The interpolation is between the centres of the pixels.
    """
    n = images.shape[-1]
    # The centres of the new pixels, in units of old pixels. Beyond the outermost old centres, the
    # image is constant.
    centres = np.clip((np.arange(side) + 0.5) * (n / side) - 0.5, 0, n - 1)
    low = np.floor(centres).astype(np.int64)
    high = np.minimum(low + 1, n - 1)
    weight = centres - low
    total = np.zeros((len(images), side, side))
    for rows, of_rows in ((low, 1 - weight), (high, weight)):
        for columns, of_columns in ((low, 1 - weight), (high, weight)):
            corner = images[:, rows[:, np.newaxis], columns]
            total += corner * of_rows[:, np.newaxis] * of_columns
    return total
