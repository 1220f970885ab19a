"""Load data sets by name, from files on this machine or by a download.

Published data sets are verified by their SHA-256. Images are uint8 arrays of shape (N, C, H, W),
with values from 0 to 255; labels are int64 arrays of shape (N,).
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
"""The names of the data sets that `load` accepts besides "auto", with their functions."""

DATASETS = ("auto", *SOURCES)
YOURS = ("idx", "folder")
"""The sources that load the user's own data and need a directory."""


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

    The name "auto" means Fashion-MNIST if that is available, and the digits otherwise. If
    ``directory`` is given, or the environment variable NPBN_DATA names a directory, the files of a
    published data set (Fashion-MNIST, MNIST, KMNIST) must be in that directory. Otherwise, npbn
    looks in Debian's /usr/share/datasets and then in the user's cache. If the files are in neither
    place, npbn downloads them into the cache with torchvision or, if torchvision is missing, with
    pooch. The directory has the four IDX files, gzipped or not, either directly or in torchvision's
    layout, for instance in FashionMNIST/raw. Every file must have the right SHA-256.

    Args:
        name: "auto", or a name in `SOURCES`.
        directory: the only directory to look in; it overrides NPBN_DATA. The sources "idx" and
            "folder" need a directory; "digits" does not allow one.
        cache: the cache directory. By default, this is the platform's user cache.
        timeout: the time limit of a download, in seconds.
        on_download: a function that is called with a line of text before a download begins. If
            this function is given and standard error is a terminal, a progress bar follows.
        options: the options of `from_folder`, only for "folder".

    Raises:
        ValueError: there is no data set of this name, or an argument is not allowed with it.
        DataError: the data set is not available. If ``directory`` or NPBN_DATA is set, files are
            missing or not genuine there, and no other place is tried.
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
