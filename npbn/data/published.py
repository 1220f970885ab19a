"""Load MNIST, Fashion-MNIST and KMNIST from IDX files that are verified by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from npbn.data.idx import read, values
from npbn.data.splits import Dataset, Split
from npbn.errors import DataError

SYSTEM_DIRECTORY = Path("/usr/share/datasets")
"""The directory in which Debian's packages of data sets put a folder for each data set."""

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class IdxSource:
    """A published data set of 60,000 training and 10,000 test images, 28 × 28, grey, 10 classes.

    Attributes:
        key: the name of the data set in `npbn.data.SOURCES`.
        title: the name of the data set for people.
        torchvision: the name of the data set's class in torchvision, which is also the name of the
            folder in which torchvision keeps the files.
        address: the address to which a name in FILES and ".gz" are added for a download.
        packages: another way to get the files, as a sentence; may be empty.
        sha256: the digests of FILES.
        classes: the names of the classes, by label.
        compressed: whether the digests are those of the gzipped files, as published. Otherwise, the
            digests are those of the content, because gzip headers have names and times.
    """

    key: str
    title: str
    torchvision: str
    address: str
    packages: str
    sha256: tuple[str, ...]
    classes: tuple[str, ...]
    compressed: bool = False

    def load(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        cache: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        on_download: Callable[[str], None] | None = None,
    ) -> Dataset:
        """Return the data set from this machine or from a download; see `npbn.data.load`."""
        explicit = directory if directory is not None else os.environ.get("NPBN_DATA") or None
        if explicit is not None:
            try:
                return self.read(Path(explicit))
            except DataError as error:
                if directory is not None:
                    raise
                raise DataError(f"{error} (the directory is named by $NPBN_DATA)") from None
        cached = Path(platformdirs.user_cache_path("npbn") if cache is None else cache)
        notes: list[str] = []
        for place in (SYSTEM_DIRECTORY / self.key, cached):
            try:
                return self.read(place, tuple(notes))
            except _NoFilesError:
                pass
            except DataError as error:
                notes.append(f"passed over {error}")
        try:
            if on_download is not None:
                on_download(f"downloading {self.title} into {cached}, in {timeout:.0f} s at most")
            self._download(cached, timeout, progress=on_download is not None)
            return self.read(cached, tuple(notes))
        except DataError as error:
            problem = f"{self.title} is not on this machine and could not be downloaded: {error}"
            raise DataError("; ".join([*notes, problem, self.how_to_get_it])) from None

    @property
    def how_to_get_it(self) -> str:
        ways = [
            *([self.packages] if self.packages else []),
            "with a network, run this again",
            f"copy the four files {', '.join(FILES[:3])} and {FILES[3]} "
            f"({self._endings_in_words}) into a directory, and name it or set "
            "$NPBN_DATA to it",
        ]
        return "ways to get it: " + "; ".join(f"({i}) {way}" for i, way in enumerate(ways, 1))

    @property
    def _endings(self) -> tuple[str, ...]:
        return (".gz",) if self.compressed else ("", ".gz")

    @property
    def _endings_in_words(self) -> str:
        return "with .gz" if self.compressed else ".gz or not"

    def read(self, directory: Path, notes: tuple[str, ...] = ()) -> Dataset:
        """Return the data set of the four files in a directory, after verifying each file.

        If a file exists more than once, the first genuine one is used.
        """
        expected = f"expected {self.title}'s files"
        try:
            if not directory.is_dir():
                raise _NoFilesError(f"{directory} is not a directory; {expected} in one")
            places = [directory, directory / self.torchvision / "raw"]
            paths = {
                name: [
                    path
                    for place in places
                    for ending in self._endings
                    if (path := place / (name + ending)).is_file()
                ]
                for name in FILES
            }
        except OSError as error:
            raise DataError(f"{directory} cannot be read: {error.strerror}") from None
        if not any(paths.values()):
            raise _NoFilesError(
                f"{directory} holds none of {self.title}'s files; expected {', '.join(FILES)} "
                f"({self._endings_in_words}) there or in "
                f"{self.torchvision}/raw"
            )
        missing = [name for name, found in paths.items() if not found]
        if missing:
            raise DataError(
                f"{directory} lacks {', '.join(sorted(missing))} ({self._endings_in_words})"
            )
        contents: list[np.ndarray] = []
        taken: list[Path] = []
        passed_over: list[str] = []
        for name, found in paths.items():
            for path in found:
                try:
                    contents.append(self._read_verified(path, name))
                    taken.append(path)
                    break
                except DataError as error:
                    if path == found[-1]:
                        raise
                    passed_over.append(f"passed over {error}")
        train_images, train_labels, test_images, test_labels = contents
        return Dataset(
            self.title,
            str(taken[0].parent),
            self.classes,
            Split(train_images[:, np.newaxis], train_labels.astype(np.int64)),
            Split(test_images[:, np.newaxis], test_labels.astype(np.int64)),
            (*notes, *passed_over),
            key=self.key,
        )

    def _read_verified(self, path: Path, name: str) -> np.ndarray:
        """Return the values in ``path``; raise DataError if it is not the genuine file ``name``."""
        count = 60_000 if name.startswith("train") else 10_000
        size = 16 + count * 784 if "images" in name else 8 + count
        # One byte more than expected is enough to detect a file that is too long.
        content = read(path, size + 1)
        if len(content) < size:
            raise DataError(f"{path} is truncated: expected {size:,} bytes, got {len(content):,}")
        hashed = read(path, size + 1, unpack=False) if self.compressed else content
        digest = hashlib.sha256(hashed).hexdigest()
        for other in PUBLISHED:
            if other is not self and digest in other.sha256:
                raise DataError(
                    f"{path} is not {self.title} but {other.title}, under the same name"
                )
        wanted = self.sha256[FILES.index(name)]
        if digest != wanted:
            raise DataError(
                f"{path} is not {self.title}'s: it has the SHA-256 {digest[:16]}..., expected "
                f"{wanted[:16]}..."
            )
        return values(path, content)

    def _download(self, cache: Path, timeout: float, *, progress: bool) -> None:
        """Download the files into ``cache``; only whole, verified files are put there.

        The download uses torchvision or, if torchvision cannot be imported, pooch. It runs in a
        separate process, which can be stopped when time is up, and whose memory is freed at its
        end.
        """
        target = cache / self.torchvision / "raw"
        try:
            target.mkdir(parents=True, exist_ok=True)
            # The temporary folder is next to the target, so that each file can be moved to the
            # target in one step.
            with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as temporary:
                command = [sys.executable, "-c", DOWNLOAD, temporary, self.torchvision]
                shows = progress and sys.stderr is not None and sys.stderr.isatty()
                process = subprocess.run(
                    [*command, self.address, *FILES],
                    stdout=subprocess.PIPE,
                    stderr=None if shows else subprocess.DEVNULL,
                    text=True,
                    timeout=timeout,
                )
                if process.returncode != 0:
                    lines = process.stdout.strip().splitlines()
                    raise DataError(lines[-1] if lines else f"exit code {process.returncode}")
                self.read(Path(temporary))
                for path in (Path(temporary) / self.torchvision / "raw").iterdir():
                    if (path.suffix == ".gz") == self.compressed:
                        os.replace(path, target / path.name)
        except subprocess.TimeoutExpired:
            raise DataError(f"the download was not done after {timeout:.0f} seconds") from None
        except OSError as error:
            raise DataError(f"cannot write to the cache {cache}: {error.strerror}") from None


class _NoFilesError(DataError):
    """The directory has none of the four files."""


# torchvision unpacks the files and keeps the compressed files, and this program makes pooch do so
# as well. The program prints only the error, if there is one.
DOWNLOAD = """
import gzip, os, shutil, socket, sys
socket.setdefaulttimeout(20)  # a connection that stalls; the whole is bounded from outside
directory, name, address, *files = sys.argv[1:]
output, sys.stdout = sys.stdout, sys.stderr
by = "torchvision"
try:
    from torchvision import datasets
except Exception:  # missing, or broken
    by = "pooch"
try:
    if by == "torchvision":
        getattr(datasets, name)(directory, download=True)
    else:
        import pooch
        raw = os.path.join(directory, name, "raw")
        http = pooch.HTTPDownloader(progressbar=True, timeout=20)
        for file in files:
            path = pooch.retrieve(address + file + ".gz", None, file + ".gz", raw, downloader=http)
            with gzip.open(path) as source, open(os.path.join(raw, file), "wb") as target:
                shutil.copyfileobj(source, target)
except Exception as error:
    print(by, "could not:", type(error).__name__ + ":", *str(error).split(), file=output)
    sys.exit(1)
"""


FASHION_MNIST = IdxSource(
    "fashion-mnist",
    "Fashion-MNIST",
    "FashionMNIST",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "on Debian or Ubuntu, apt install dataset-fashion-mnist",
    (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    ),
)  # fmt: skip
MNIST = IdxSource(
    "mnist",
    "MNIST",
    "MNIST",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "",
    (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    tuple("0123456789"),
)
KMNIST = IdxSource(
    "kmnist",
    "KMNIST",
    "KMNIST",
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    "",
    (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    compressed=True,
)
PUBLISHED = (FASHION_MNIST, MNIST, KMNIST)
