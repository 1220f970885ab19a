"""Load images and labels of the user from files in IDX, which is the format of MNIST.

An IDX file has a big-endian header with a magic number and the sizes. The values follow in C order.
The file may be gzipped. (Y. LeCun, C. Cortes, C. Burges, *The MNIST database*, "File formats".)
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from npbn.data.splits import Dataset, from_arrays
from npbn.errors import DataError


def from_idx(directory: str | os.PathLike[str]) -> Dataset:
    """Return the data set in a directory of four IDX files: training and test images and labels.

    The names of the files tell them apart. The name of a training file contains "train", and the
    name of a test file contains "t10k" or "test". Each name also contains "images" or "labels", and
    may end with ".gz". Images are uint8, (N, H, W); labels are uint8, (N,). The content of the
    files is not verified, and a note of the data set says so.

    Raises:
        DataError: one of the four files is missing, is not the only file with such a name, or is
            damaged.
    """
    directory = Path(directory)
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise DataError(f"{directory} cannot be read: {error.strerror}") from None
    arrays = []
    for words in (("train",), ("t10k", "test")):
        for kind, dimensions in (("images", 3), ("labels", 1)):
            found = {
                name.removesuffix(".gz"): name
                for name in names
                if kind in name and any(word in name for word in words)
            }
            if len(found) != 1:
                raise DataError(
                    f"{directory}: expected one IDX file with {' or '.join(words)} and {kind} in "
                    f"its name, got {' and '.join(found) or 'none'}"
                )
            path = directory / next(iter(found.values()))
            array = values(path, read(path))
            if array.ndim != dimensions:
                raise DataError(
                    f"{path} has {array.ndim} dimensions, expected {dimensions}, of {kind}"
                )
            arrays.append(array)
    try:
        dataset = from_arrays(*arrays)
    except ValueError as error:
        raise DataError(f"{directory}: {error}") from None
    return Dataset(
        "IDX files",
        str(directory),
        dataset.classes,
        dataset.train,
        dataset.test,
        (f"the files in {directory} are taken as they are: nothing says what they should hold",),
        key="idx",
    )


def read(path: Path, limit: float = math.inf, *, unpack: bool = True) -> bytes:
    """Return the content of a file, but not more than ``limit`` bytes.

    If the name of the file ends with ".gz" and ``unpack`` is true, the content is uncompressed.

    Raises:
        DataError: the file cannot be read, or its compressed content is damaged.
    """
    content = bytearray()
    try:
        with gzip.open(path) if unpack and path.suffix == ".gz" else open(path, "rb") as file:
            while len(content) < limit:
                # Read in pieces, because a small gzipped file may have a very large content.
                piece = file.read(int(min(limit - len(content), 1 << 22)))
                if not piece:
                    break
                content += piece
    except EOFError:
        raise DataError(f"{path} is truncated: its gzip stream ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return bytes(content)


def values(path: Path, content: bytes) -> np.ndarray:
    """Return the values of an IDX file as a uint8 array with the shape in the file's header.

    Args:
        path: the path of the file, for error messages.
        content: the uncompressed content of the file.

    Raises:
        DataError: the content is not an IDX file of unsigned bytes, or has not the size in the
            header.
    """
    magic = int.from_bytes(content[:4], "big")
    dimensions = magic & 0xFF
    header = 4 + 4 * dimensions
    if magic >> 8 != 0x08 or len(content) < header:
        raise DataError(
            f"{path} is no IDX file of unsigned bytes: it begins with {content[:4].hex()}"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} has {len(content) - header:,} values, expected {' × '.join(map(str, shape))}, "
            "as its header says"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
