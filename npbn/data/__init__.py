"""Data sets: a table of sources, each found or fetched, verified where that is possible.

Images are uint8 arrays of shape (N, C, H, W), with values from 0 to 255; labels are int64 arrays of
shape (N,).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from npbn.data.digits import load_digits
from npbn.data.folder import from_folder
from npbn.data.idx import from_idx
from npbn.data.published import FASHION_MNIST, PUBLISHED
from npbn.data.splits import Dataset, Split, from_arrays
from npbn.errors import DataError

__all__ = ["SOURCES", "Dataset", "Split", "from_arrays", "from_folder", "from_idx", "load"]

SOURCES: dict[str, Callable[..., Dataset]] = {
    **{source.key: source.load for source in PUBLISHED},
    "digits": load_digits,
    "idx": from_idx,
    "folder": from_folder,
}
"""The data sets that `load` finds by name."""

DATASETS = ("auto", *SOURCES)
YOURS = ("idx", "folder")
"""The sources that have no data of their own: they need a directory."""


def load(
    name: str = "auto",
    directory: str | os.PathLike[str] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    timeout: float = 300.0,
    on_download: Callable[[str], None] | None = None,
    **options: Any,
) -> Dataset:
    """Return a data set by its name in `SOURCES`.

    "auto" is Fashion-MNIST if it is available, else the digits. The published ones
    (Fashion-MNIST, MNIST, KMNIST) are looked for in ``directory``; else in the directory that the
    environment variable NPBN_DATA names; else in Debian's /usr/share/datasets; else in the user's
    cache; else they are downloaded into the cache, by torchvision or, where that is missing, by
    pooch. A directory holds the four IDX files, gzipped or not, either directly or as torchvision
    lays them out, in FashionMNIST/raw for instance. Every file must have the right SHA-256.

    Args:
        name: "auto", or one of `SOURCES`.
        directory: where to look, and nowhere else; overrides NPBN_DATA. Needed with "idx" and
            "folder", not allowed with "digits".
        cache: the cache directory; the platform's user cache unless given.
        timeout: seconds that a download may take.
        on_download: called with a line before a download begins; a progress bar follows if
            standard error is a terminal.
        options: of `from_folder`, with "folder".

    Raises:
        ValueError: no such data set, or an argument that does not go with it.
        DataError: what was asked for is not available. With ``directory`` or NPBN_DATA: the files
            are not there or are not genuine; no other place is tried then.
    """
    if name not in DATASETS:
        raise ValueError(f"expected a data set of {', '.join(DATASETS)}, got {name!r}")
    if options and name != "folder":
        raise ValueError(f"expected no {', '.join(options)} with {name}, only with folder")
    if name in YOURS:
        if directory is None:
            raise ValueError(f"expected a directory with {name}")
        return SOURCES[name](directory, **options)
    if name == "digits":
        if directory is not None:
            raise ValueError("expected no data directory with digits: they come with npbn")
        return load_digits()
    how: dict[str, Any] = {"cache": cache, "timeout": timeout, "on_download": on_download}
    if name != "auto":
        return SOURCES[name](directory, **how)
    try:
        return FASHION_MNIST.load(directory, **how)
    except DataError as error:
        if directory is not None or os.environ.get("NPBN_DATA"):
            raise
        return load_digits((str(error),))
