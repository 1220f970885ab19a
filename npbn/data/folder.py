"""Load image files that are sorted into one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from npbn.data.images import image_endings, inspect_image, read_image
from npbn.data.splits import Dataset, Split
from npbn.errors import DataError


def from_folder(
    directory: str | os.PathLike[str],
    *,
    channels: int | None = None,
    side: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
) -> Dataset:
    """Return the data set of the image files in a folder.

    The files are either train/CLASS/* and test/CLASS/*, or CLASS/*, which this function splits. The
    classes are the names of the folders in ``train``, or in ``directory``, in alphabetical order.
    Hidden files are ignored. Files whose ending is not that of an image are ignored as well, and a
    note counts these files. `npbn.data.images` describes how each kind of image file is read.

    Args:
        directory: the folder.
        channels: 1 for grey or 3 for colour. By default, 3 if any image has colours, otherwise 1.
        side: the side of the square images, in pixels. By default, the side of the image files,
            which must then be squares of one size.
        test_fraction: the fraction of each class that is kept for testing, in (0, 1); at least one
            image is kept. A folder without ``train`` and ``test`` needs this argument; a folder
            with both does not allow it.
        seed: the seed of the random choice of the test images.

    Raises:
        ValueError: an option is not allowed.
        DataError: the folder does not have this layout, or a file in it is not as expected.
    """
    directory = Path(directory)
    if channels not in (None, 1, 3):
        raise ValueError(f"expected channels 1 (grey) or 3 (colour), got {channels}")
    if side is not None and side < 1:
        raise ValueError(f"expected side >= 1, got {side}")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ValueError(f"expected test_fraction in (0, 1), got {test_fraction}")
    passed_over: list[Path] = []
    if (directory / "train").is_dir() and (directory / "test").is_dir():
        if test_fraction is not None:
            raise DataError(
                f"{directory} has folders train and test: expected no test_fraction with these"
            )
        train = _files(directory / "train", passed_over)
        test = _files(directory / "test", passed_over)
        if unknown := sorted(set(test) - set(train)):
            raise DataError(f"{directory / 'test' / unknown[0]}: {directory / 'train'} has no such")
    else:
        found = _files(directory, passed_over)
        if test_fraction is None:
            raise DataError(
                f"{directory} has no folders train and test: expected test_fraction, the share of "
                "images to keep for testing"
            )
        train, test = {}, {}
        generator = np.random.default_rng(seed)
        for name, paths in found.items():
            if len(paths) < 2:
                raise DataError(f"{directory / name}: expected at least 2 images, to keep 1")
            count = min(max(1, round(test_fraction * len(paths))), len(paths) - 1)
            kept = set(generator.permutation(len(paths))[:count].tolist())
            train[name] = [path for i, path in enumerate(paths) if i not in kept]
            test[name] = [path for i, path in enumerate(paths) if i in kept]

    every = [path for part in (train, test) for paths in part.values() for path in paths]
    inspected = [inspect_image(path) for path in every]
    if channels is None:
        channels = max(found for found, _ in inspected)
    if side is None:
        side = _common_side(every, [size for _, size in inspected])
    classes = tuple(train)
    return Dataset(
        "images",
        str(directory),
        classes,
        _split(train, classes, channels, side),
        _split(test, classes, channels, side),
        tuple(
            f"passed over {len(passed_over)} files that are no images, such as {path}"
            for path in passed_over[:1]
        ),
        key="folder",
    )


def _files(directory: Path, passed_over: list[Path]) -> dict[str, list[Path]]:
    """Return the image files of each folder in ``directory``, by the folder's name.

    The other files, except hidden files, are appended to ``passed_over``.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if path.is_dir())
        folders = [path for path in folders if not path.name.startswith(".")]
        files = {
            folder.name: [
                path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."
            ]
            for folder in folders
        }
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror}") from None
    if len(files) < 2:
        raise DataError(f"{directory}: expected a folder for each class, at least 2")
    endings = image_endings()
    for name, paths in files.items():
        passed_over += [path for path in paths if path.suffix.lower() not in endings]
        files[name] = [path for path in paths if path.suffix.lower() in endings]
        if not files[name]:
            raise DataError(f"{directory / name} has no image files")
    return files


def _common_side(paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> int:
    """Return the side of the images; raise DataError if they are not squares of one size."""
    for path, size in zip(paths, sizes, strict=True):
        if size != (sizes[0][0], sizes[0][0]):
            first = f" and {paths[0]} {sizes[0][0]} × {sizes[0][1]}" if path != paths[0] else ""
            raise DataError(
                f"{path} has {size[0]} × {size[1]} pixels{first}: expected squares of one size, or "
                "a side to bring them to"
            )
    return sizes[0][0]


def _split(
    files: dict[str, list[Path]], classes: tuple[str, ...], channels: int, side: int
) -> Split:
    """Return the split of the files; the label of a class is its index in ``classes``."""
    labels = [classes.index(name) for name, paths in files.items() for _ in paths]
    paths = [path for paths in files.values() for path in paths]
    images = np.empty((len(paths), channels, side, side), np.uint8)
    for i, path in enumerate(paths):
        images[i] = read_image(path, channels, side)
    return Split(images, np.array(labels, np.int64))
