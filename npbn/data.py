"""Fashion-MNIST, found or fetched, always verified; handwritten digits where it cannot be had.

Images are uint8 arrays of shape (N, 1, 28, 28), grey values from 0 (background) to 255; labels are
int64 arrays of shape (N,).
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import array_api_compat
import numpy as np
import platformdirs

from npbn.backend import Backend
from npbn.errors import DataError
from npbn.functional._arrays import common_library

DATASETS = ("auto", "fashion-mnist", "digits")

SYSTEM_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

# SHA-256 of the *uncompressed* files: gzip headers carry names and times, so compressed ones vary.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_SIZE = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
# MNIST, the handwritten digits, has the same file names and sizes and has been served in
# Fashion-MNIST's place.
_DIGIT_MNIST_SHA256 = {
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

HOW_TO_GET_IT = (
    "three ways to get it: (1) on Debian or Ubuntu, apt install dataset-fashion-mnist; (2) with a "
    "network, pip install torchvision, and run this again; (3) copy the four files "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (.gz or not) into a directory and name it with --data or $NPBN_DATA"
)


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8, (N, C, H, W), grey values or colours from 0 to 255.
        labels: integers, (N,), from 0 to the number of classes - 1. (One out of range makes the
            loss NaN.)
    """

    images: Any
    labels: Any

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or tuple(self.labels.shape) != (self.images.shape[0],):
            raise ValueError(
                f"expected images of shape (N, C, H, W) and labels of shape (N,), "
                f"got {tuple(self.images.shape)} and {tuple(self.labels.shape)}"
            )
        xp = common_library(images=self.images, labels=self.labels)
        if self.images.dtype != xp.uint8:
            raise TypeError(f"expected images of dtype uint8, got {self.images.dtype}")
        if not xp.isdtype(self.labels.dtype, "integral"):
            raise TypeError(f"expected labels of an integer dtype, got {self.labels.dtype}")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def to(self, backend: Backend) -> Split:
        """The same on another backend's device."""
        return Split(backend.asarray(self.images), backend.asarray(self.labels))

    def batches(
        self, batch_size: int, dtype: Any, *, order: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """Batches of (x, labels), with x = images / 255 in ``dtype``, in [0, 1].

        Args:
            batch_size: the last batch may be smaller.
            dtype: float32 or float64.
            order: indices on that backend, (M,): which examples, in which order; all of them in
                their own order unless given.
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
    """A training and a test split.

    Attributes:
        name: what it is.
        source: where it came from, in words.
        classes: their names, by label.
        train, test: the splits, on the host.
        notes: what a user should know about how it was chosen, a line each.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What `load` calls it."""
        return "digits" if self.source == "scikit-learn" else "fashion-mnist"

    def limited(self, examples: int) -> Dataset:
        """The same with the first so many training examples alone."""
        train = Split(self.train.images[:examples], self.train.labels[:examples])
        return dataclasses.replace(self, train=train)


def load(
    name: str = "auto",
    directory: str | os.PathLike[str] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 300.0,
    on_download: Callable[[str], None] | None = None,
) -> Dataset:
    """Fashion-MNIST, or "digits"; "auto" is Fashion-MNIST if it can be had, else digits.

    Fashion-MNIST is looked for in ``directory``; else in the directory that the environment
    variable NPBN_DATA names; else in Debian's /usr/share/datasets/fashion-mnist; else in the
    user's cache; else it is downloaded into the cache by torchvision. A directory holds the four
    IDX files, gzipped or not, either directly or in FashionMNIST/raw as torchvision lays them out.

    Args:
        name: "auto", "fashion-mnist" or "digits".
        directory: where to look, and nowhere else; overrides NPBN_DATA.
        cache: the cache directory; the platform's user cache unless given.
        timeout: seconds that a download may take.
        on_download: called, before one begins, with a line that says so.

    Raises:
        ValueError: no such data set, or a directory given for digits.
        DataError: what was asked for cannot be had. With ``directory`` or NPBN_DATA: the files are
            not there or are not Fashion-MNIST; no other place is tried then.
    """
    if name not in DATASETS:
        raise ValueError(f"expected a data set of {', '.join(DATASETS)}, got {name!r}")
    if name == "digits":
        if directory is not None:
            raise ValueError("expected no data directory with digits: they come with scikit-learn")
        return _digits()

    explicit = directory if directory is not None else os.environ.get("NPBN_DATA") or None
    if explicit is not None:
        try:
            return _read_fashion_mnist(Path(explicit))
        except DataError as error:
            if directory is not None:
                raise
            raise DataError(f"{error} (the directory is named by $NPBN_DATA)") from None

    cache_directory = Path(platformdirs.user_cache_path("npbn") if cache is None else cache)
    notes: list[str] = []
    for place in (SYSTEM_DIRECTORY, cache_directory):
        try:
            return _read_fashion_mnist(place, tuple(notes))
        except _NoFilesError:
            pass
        except DataError as error:
            notes.append(f"passed over {error}")
    try:
        if on_download is not None:
            on_download(
                f"downloading Fashion-MNIST into {cache_directory}, in {timeout:.0f} s at most"
            )
        _download_fashion_mnist(cache_directory, timeout)
        return _read_fashion_mnist(cache_directory, tuple(notes))
    except DataError as error:
        problem = f"Fashion-MNIST is not on this machine and could not be downloaded: {error}"
        if name == "fashion-mnist":
            raise DataError("; ".join([*notes, problem, HOW_TO_GET_IT])) from None
    try:
        return _digits((*notes, problem, HOW_TO_GET_IT))
    except DataError as error:
        raise DataError("; ".join([*notes, problem, HOW_TO_GET_IT, str(error)])) from None


class _NoFilesError(DataError):
    """The directory has none of the four files."""


def _read_fashion_mnist(directory: Path, notes: tuple[str, ...] = ()) -> Dataset:
    """The four files of ``directory``, every one of them verified.

    Of a file that is there more than once, the first genuine one is taken.
    """
    files: dict[str, tuple[Path, bytes]] = {}
    passed_over: list[str] = []
    try:
        if not directory.is_dir():
            raise _NoFilesError(
                f"{directory} is not a directory; expected one with Fashion-MNIST's files"
            )
        places = [directory, directory / "FashionMNIST" / "raw"]
        paths = {
            name: [
                path
                for place in places
                for ending in ("", ".gz")
                if (path := place / (name + ending)).is_file()
            ]
            for name in _SHA256
        }
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror}") from None
    if not any(paths.values()):
        raise _NoFilesError(
            f"{directory} holds none of Fashion-MNIST's files; expected "
            f"{', '.join(_SHA256)} (.gz or not) there or in FashionMNIST/raw"
        )
    missing = [name for name, found in paths.items() if not found]
    if missing:
        raise DataError(f"{directory} lacks {', '.join(sorted(missing))} (.gz or not)")
    for name, found in paths.items():
        for path in found:
            try:
                files[name] = path, _read_verified(path, name)
                break
            except DataError as error:
                if path == found[-1]:
                    raise
                passed_over.append(f"passed over {error}")

    def split(prefix: str) -> Split:
        # The hash has vouched for the IDX headers: 16 bytes for images, 8 for labels.
        images = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"][1], np.uint8, offset=16)
        labels = np.frombuffer(files[f"{prefix}-labels-idx1-ubyte"][1], np.uint8, offset=8)
        return Split(images.reshape(-1, 1, 28, 28), labels.astype(np.int64))

    return Dataset(
        "Fashion-MNIST",
        str(files["train-images-idx3-ubyte"][0].parent),
        _FASHION_CLASSES,
        split("train"),
        split("t10k"),
        (*notes, *passed_over),
    )


def _read_verified(path: Path, name: str) -> bytes:
    """The uncompressed bytes of ``path``, if they are Fashion-MNIST's file ``name``."""
    size = _SIZE[name]
    try:
        # One byte more than there should be is enough to know that there is too much.
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(size + 1)
    except EOFError:
        raise DataError(f"{path} is truncated: its gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None

    if len(content) < size:
        raise DataError(f"{path} is truncated: expected {size:,} bytes, got {len(content):,}")
    digest = hashlib.sha256(content).hexdigest()
    if digest in _DIGIT_MNIST_SHA256:
        raise DataError(
            f"{path} is not Fashion-MNIST but MNIST, the handwritten digits, under the same name"
        )
    if digest != _SHA256[name]:
        raise DataError(
            f"{path} is not Fashion-MNIST's: its content has the SHA-256 {digest[:16]}..., "
            f"expected {_SHA256[name][:16]}..."
        )
    return content


_DOWNLOAD = """
import socket, sys
socket.setdefaulttimeout(20)  # a connection that stalls; the whole is bounded from outside
problem = "torchvision cannot be imported"
try:
    from torchvision.datasets import FashionMNIST
    problem = "torchvision could not download it"
    FashionMNIST(sys.argv[1], download=True)
except Exception as error:
    sys.exit(f"{problem}: {type(error).__name__}: {' '.join(str(error).split())}")
"""


def _download_fashion_mnist(cache: Path, timeout: float) -> None:
    """Let torchvision download into ``cache``, which ends up with whole, verified files or none.

    In a process of its own: it can be stopped when time is up, and its 300 MB go with it.
    """
    target = cache / "FashionMNIST" / "raw"
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Beside its target, so that each file can be moved there in one step.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as temporary:
            process = subprocess.run(
                [sys.executable, "-c", _DOWNLOAD, temporary],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=timeout,
            )
            if process.returncode != 0:
                lines = process.stderr.strip().splitlines()
                raise DataError(lines[-1] if lines else f"exit code {process.returncode}")
            _read_fashion_mnist(Path(temporary))
            for name in _SHA256:
                source = Path(temporary) / "FashionMNIST" / "raw" / name
                os.replace(source, target / name)
    except subprocess.TimeoutExpired:
        raise DataError(f"the download was not done after {timeout:.0f} seconds") from None
    except OSError as error:
        raise DataError(f"cannot write to the cache {cache}: {error.strerror}") from None


def _digits(notes: tuple[str, ...] = ()) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels resized to 28 × 28."""
    try:
        from scipy.ndimage import zoom
        from sklearn.datasets import load_digits
    except Exception as error:  # a broken installation raises whatever its loader raises
        raise DataError(
            f"scikit-learn, which brings the digits, cannot be imported ({error}): "
            "pip install scikit-learn, or npbn's extra [data]"
        ) from None
    digits = load_digits()
    enlarged = zoom(digits.images, (1, 3.5, 3.5), order=1, grid_mode=True, mode="nearest")
    images = np.rint(enlarged * (255 / 16)).astype(np.uint8)[:, np.newaxis]
    labels = digits.target.astype(np.int64)
    # The last fifth is the test split.
    return Dataset(
        "handwritten digits",
        "scikit-learn",
        tuple("0123456789"),
        Split(images[:-360], labels[:-360]),
        Split(images[-360:], labels[-360:]),
        notes,
    )
