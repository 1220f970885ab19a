"""Define data sets, which consist of a training split and a test split of images with labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from npbn.backend import Backend
from npbn.functional.arrays import common_library


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: the images as a uint8 array (N, C, H, W), grey values or colours from 0 to 255.
        labels: the labels as an integer array (N,), from 0 to the number of classes - 1. A
            `npbn.training.Training` refuses other labels.
    """

    images: Any
    labels: Any

    def __post_init__(self) -> None:
        xp = common_library(images=self.images, labels=self.labels)
        if self.images.ndim != 4 or tuple(self.labels.shape) != (self.images.shape[0],):
            raise ValueError(
                f"expected images of shape (N, C, H, W) and labels of shape (N,), "
                f"got {tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            )
        if self.images.dtype != xp.uint8:
            raise TypeError(
                "expected images of dtype uint8, with values from 0 to 255, "
                f"got {self.images.dtype}"
            )
        if not xp.isdtype(self.labels.dtype, "integral"):
            raise TypeError(f"expected labels of an integer dtype, got {self.labels.dtype}")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, backend: Backend) -> Split:
        """Return the split on a backend's device."""
        return Split(backend.asarray(self.images), backend.asarray(self.labels))

    def batches(
        self, batch_size: int, dtype: Any, *, order: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield batches (x, labels), where x = images / 255 has the given dtype, in [0, 1].

        Args:
            batch_size: the number of examples in a batch. The last batch may be smaller.
            dtype: float32 or float64.
            order: the indices (M,) of the examples to take, in this order, on the backend of the
                split. By default, all examples are taken in their own order.
        """
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        xp = array_api_compat.array_namespace(self.images)
        dtype = getattr(xp, np.dtype(dtype).name)
        count = len(self) if order is None else order.shape[0]
        for start in range(0, count, batch_size):
            batch = slice(start, min(start + batch_size, count))
            if order is None:
                images, labels = self.images[batch, ...], self.labels[batch]
            else:
                images = xp.take(self.images, order[batch], axis=0)
                labels = xp.take(self.labels, order[batch], axis=0)
            yield xp.astype(images, dtype) / 255, labels


@dataclass(frozen=True)
class Dataset:
    """A data set, which consists of a training split and a test split.

    Attributes:
        name: the name of the data set for people.
        source: the origin of the data, for instance a directory.
        classes: the names of the classes, by label.
        train, test: the training split and the test split, on the host.
        notes: lines about the choice of the data that the user should know.
        key: the name of the data set in `npbn.data.SOURCES`, or "arrays" if it is made of arrays.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
    key: str = "arrays"

    def limited(self, examples: int) -> Dataset:
        """Return the data set with only the first ``examples`` examples of the training split."""
        train = Split(self.train.images[:examples], self.train.labels[:examples])
        return dataclasses.replace(self, train=train)


def from_arrays(
    train_images: Any,
    train_labels: Any,
    test_images: Any,
    test_labels: Any,
    *,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Return a data set of NumPy arrays.

    Args:
        train_images, test_images: the images as uint8 arrays, from 0 to 255. The shape is (N, H, W)
            for grey images, or (N, C, H, W).
        train_labels, test_labels: the labels as integer arrays (N,), from 0 to the number of
            classes - 1.
        classes: the names of the classes. By default, the names are "0", "1", ….

    Raises:
        ValueError, TypeError: a shape or a dtype is not as described, or a label is out of range.
    """
    splits = []
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        images, labels = np.asarray(images), np.asarray(labels)
        split = Split(images[:, np.newaxis] if images.ndim == 3 else images, labels)
        splits.append(Split(split.images, labels.astype(np.int64)))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:] or not len(train) or not len(test):
        raise ValueError(
            f"expected training and test images of one size, and some of each, got shapes "
            f"{train.images.shape} and {test.images.shape}"
        )
    if classes is None:
        classes = [str(i) for i in range(int(train.labels.max()) + 1)]
    for name, split in (("train", train), ("test", test)):
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))
        if wrong.size:
            raise ValueError(
                f"expected {name}_labels from 0 to {len(classes) - 1}, got "
                f"{split.labels[wrong[0]]} for image {wrong[0]}"
            )
    return Dataset("arrays", "memory", tuple(classes), train, test)
