"""Finding, verifying and downloading published data sets; the digits that npbn carries."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from commands import NO_NETWORK
from disks import make_read_only, small_disk
from npbn import data
from npbn.data import published
from npbn.data.published import FASHION_MNIST, FILES, KMNIST, MNIST
from npbn.errors import DataError

# The true one, also where a test has replaced it.
SYSTEM_DIRECTORY = published.SYSTEM_DIRECTORY / "fashion-mnist"


@pytest.fixture(scope="session")
def idx_files(fashion_mnist, tmp_path_factory) -> Path:
    """The four true files, uncompressed."""
    directory = tmp_path_factory.mktemp("idx")
    for name in FILES:
        compressed = (SYSTEM_DIRECTORY / f"{name}.gz").read_bytes()
        (directory / name).write_bytes(gzip.decompress(compressed))
    return directory


@pytest.fixture
def copied(idx_files, tmp_path) -> Path:
    """A directory of links to the true files, in which a test may replace some."""
    directory = tmp_path / "fashion-mnist"
    directory.mkdir()
    for name in FILES:
        (directory / name).symlink_to(idx_files / name)
    return directory


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine without the files and without a network; the cache directory."""
    monkeypatch.setattr(published, "SYSTEM_DIRECTORY", tmp_path / "nowhere")
    monkeypatch.delenv("NPBN_DATA", raising=False)
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def test_what_is_read(fashion_mnist):
    assert fashion_mnist.train.images.shape == (60_000, 1, 28, 28)
    assert fashion_mnist.test.images.shape == (10_000, 1, 28, 28)
    assert fashion_mnist.train.images.dtype == np.uint8
    for split, count in ((fashion_mnist.train, 6_000), (fashion_mnist.test, 1_000)):
        np.testing.assert_array_equal(np.bincount(split.labels), np.full(10, count))
    assert fashion_mnist.classes[9] == "Ankle boot" and fashion_mnist.train.labels[0] == 9


@pytest.mark.parametrize("layout", ["flat", "flat gzipped", "torchvision", "mixed"])
def test_layouts(layout, fashion_mnist, idx_files, tmp_path):
    target = tmp_path / "FashionMNIST" / "raw" if layout == "torchvision" else tmp_path
    target.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(FILES):
        if layout == "flat gzipped" or (layout == "mixed" and i % 2):
            shutil.copy(SYSTEM_DIRECTORY / f"{name}.gz", target)
        else:
            (target / name).symlink_to(idx_files / name)
    found = data.load("fashion-mnist", tmp_path)
    assert found.source == str(target)
    np.testing.assert_array_equal(found.test.images, fashion_mnist.test.images)
    np.testing.assert_array_equal(found.test.labels, fashion_mnist.test.labels)


def test_the_environment_variable_and_what_overrides_it(idx_files, monkeypatch, tmp_path):
    monkeypatch.setenv("NPBN_DATA", str(idx_files))
    assert data.load().source == str(idx_files)
    with pytest.raises(DataError, match="holds none of Fashion-MNIST's files"):
        data.load(directory=tmp_path)
    monkeypatch.setenv("NPBN_DATA", str(tmp_path))
    assert data.load(directory=idx_files).source == str(idx_files)
    with pytest.raises(DataError, match="holds none of Fashion-MNIST's files"):
        data.load()


def test_the_environment_variable_is_named_where_it_is_to_blame(monkeypatch, tmp_path):
    monkeypatch.setenv("NPBN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"\(the directory is named by \$NPBN_DATA\)"):
        data.load()


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_missing_file_is_named(copied):
    (copied / FILES[2]).unlink()
    with pytest.raises(DataError, match=f"lacks {FILES[2]}"):
        data.load("fashion-mnist", copied)


@pytest.mark.parametrize("size", [0, 1, 1000, 10_007])
def test_a_truncated_file_is_named(size, copied, idx_files):
    name = "t10k-labels-idx1-ubyte"
    replace(copied / name, (idx_files / name).read_bytes()[:size])
    with pytest.raises(
        DataError, match=f"{name} is truncated: expected 10,008 bytes, got {size:,}"
    ):
        data.load("fashion-mnist", copied)


def test_a_file_with_more_than_there_should_be_is_refused(copied, idx_files):
    name = "t10k-labels-idx1-ubyte"
    replace(copied / name, (idx_files / name).read_bytes() + b"\0" * 1000)
    with pytest.raises(DataError, match=f"{name} is not Fashion-MNIST's"):
        data.load("fashion-mnist", copied)


def test_a_single_changed_byte_is_refused(copied, idx_files):
    name = "train-labels-idx1-ubyte"
    content = bytearray((idx_files / name).read_bytes())
    content[30_000] ^= 1
    replace(copied / name, bytes(content))
    with pytest.raises(DataError, match=f"{name} is not Fashion-MNIST's: .*SHA-256") as caught:
        data.load("fashion-mnist", copied)
    assert str(caught.value).isascii()  # it is printed on terminals of all kinds


def test_truncated_and_damaged_gzip_files_are_named(copied):
    name = "t10k-labels-idx1-ubyte"
    content = (SYSTEM_DIRECTORY / f"{name}.gz").read_bytes()
    (copied / name).unlink()
    for damaged, message in (
        (content[:-100], "is truncated: its gzip stream ends too early"),
        (content[:2000] + bytes(100) + content[2100:], "is damaged|is not Fashion-MNIST's"),
        (b"<html>404</html>", "is damaged"),
    ):
        (copied / f"{name}.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}\.gz ({message})"):
            data.load("fashion-mnist", copied)


def pretend_digests(monkeypatch, source, compressed=False):
    """Of files of zeros (gzipped, where the source's digests are of such): have them be genuine."""

    def sha256(content):
        sizes = [len(zeros(name, compressed)) for name in FILES]
        return types.SimpleNamespace(
            hexdigest=lambda: (
                source.sha256[sizes.index(len(content))] if len(content) in sizes else ""
            )
        )

    monkeypatch.setattr(published.hashlib, "sha256", sha256)


def zeros(name: str, compressed: bool = False) -> bytes:
    """A file of that name as it would be if every pixel and label were 0."""
    count = 60_000 if name.startswith("train") else 10_000
    shape = (count, 28, 28) if "images" in name else (count,)
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
    content = header + bytes(int(np.prod(shape)))
    return gzip.compress(content, 1, mtime=0) if compressed else content


@pytest.mark.parametrize(
    ("asked", "genuine"), [(FASHION_MNIST, MNIST), (MNIST, FASHION_MNIST)], ids=["fashion", "mnist"]
)
def test_one_data_set_under_the_name_of_another_is_named(asked, genuine, tmp_path, monkeypatch):
    for name in FILES:
        (tmp_path / name).write_bytes(zeros(name))
    pretend_digests(monkeypatch, genuine)
    with pytest.raises(
        DataError, match=f"{FILES[0]} is not {asked.title} but {genuine.title}, under the same name"
    ):
        data.load(asked.key, tmp_path)


@pytest.mark.parametrize("source", [MNIST, KMNIST], ids=["mnist", "kmnist"])
def test_the_other_published_data_sets(source, tmp_path, monkeypatch):
    """The files are not at hand, so files of zeros are, with the hash function to match."""
    raw = tmp_path / source.torchvision / "raw"
    raw.mkdir(parents=True)
    ending = ".gz" if source.compressed else ""
    for name in FILES:
        (raw / (name + ending)).write_bytes(zeros(name, source.compressed))
    with pytest.raises(DataError, match=rf"{FILES[0]}{ending} is not {source.title}'s"):
        data.load(source.key, tmp_path)
    pretend_digests(monkeypatch, source, source.compressed)
    found = data.load(source.key, tmp_path)
    assert (found.name, found.key, found.source) == (source.title, source.key, str(raw))
    assert found.train.images.shape == (60_000, 1, 28, 28) and len(found.test) == 10_000
    if source.compressed:  # no digest is known of what is in them
        for name in FILES:
            (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))
            (raw / f"{name}.gz").unlink()
        with pytest.raises(DataError, match=r"holds none of KMNIST's files.*with \.gz"):
            data.load(source.key, tmp_path)


def test_digests_are_those_that_others_publish():
    """Of the compressed files: torchvision has the MD5, and so vouches that these are the files."""
    datasets = pytest.importorskip("torchvision.datasets")
    for source in published.PUBLISHED:
        theirs = getattr(datasets, source.torchvision)
        assert [name for name, _ in theirs.resources] == [f"{name}.gz" for name in FILES]
        assert source.address in theirs.mirrors
        assert len(set(source.sha256)) == 4 and all(len(d) == 64 for d in source.sha256)
        if source is not MNIST:  # torchvision's have "0 - zero"
            assert list(source.classes) == theirs.classes


def test_no_more_is_read_than_there_should_be(tmp_path):
    """A small gzip file can unfold to any size."""
    name = "train-labels-idx1-ubyte"
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(bytes(100_000_000), 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="is not Fashion-MNIST's"):
            FASHION_MNIST._read_verified(path, name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_a_genuine_copy_is_found_behind_a_damaged_one(copied, idx_files):
    replace(copied / FILES[0], b"short")
    raw = copied / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / FILES[0]).symlink_to(idx_files / FILES[0])
    found = data.load("fashion-mnist", copied)
    assert len(found.train) == 60_000
    (note,) = found.notes
    assert note.startswith(f"passed over {copied / FILES[0]} is truncated")


def test_what_cannot_be_read_is_named(copied):
    with pytest.raises(DataError, match=r"x (cannot be read: File name too long|is not a dir)"):
        data.load(directory="x" * 5000)
    unreadable = Path("/proc/self/mem")  # for root, too
    if unreadable.is_file():
        (copied / FILES[0]).unlink()
        (copied / FILES[0]).symlink_to(unreadable)
        with pytest.raises(DataError, match=f"{FILES[0]} cannot be read: "):
            data.load(directory=copied)


def test_damaged_files_in_an_implicit_place_are_passed_over_and_named(
    copied, idx_files, bare, monkeypatch
):
    """The next place is tried, and the user hears of it."""
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(published, "SYSTEM_DIRECTORY", copied.parent)
    found = data.load("fashion-mnist", cache=idx_files)
    assert found.source == str(idx_files)
    assert len(found.notes) == 1
    assert "passed over" in found.notes[0] and f"{FILES[0]} is truncated" in found.notes[0]


def test_what_was_passed_over_is_said_with_the_digits_too(copied, bare, monkeypatch):
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(published, "SYSTEM_DIRECTORY", copied.parent)
    found = data.load(cache=bare)
    assert found.name == "handwritten digits"
    assert "passed over" in found.notes[0]


def test_what_was_passed_over_is_said_in_errors_too(copied, bare, tmp_path, monkeypatch):
    put_torchvision("raise ImportError", tmp_path, monkeypatch)
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(published, "SYSTEM_DIRECTORY", copied.parent)
    with pytest.raises(DataError, match=r"^passed over .*; ways to get it: \(1\).*\$NPBN_DATA"):
        data.load("fashion-mnist", cache=bare)


def test_the_cache_is_used(idx_files, bare):
    assert data.load(cache=idx_files).source == str(idx_files)


def test_without_anything_auto_gives_digits_and_says_how_to_do_better(bare):
    found = data.load(cache=bare)
    assert found.name == "handwritten digits"
    (note,) = found.notes
    assert "could not be downloaded" in note and FASHION_MNIST.how_to_get_it in note


def test_without_anything_fashion_mnist_is_refused(bare):
    said: list[str] = []
    with pytest.raises(DataError, match=r"could not be downloaded: .*; ways to get it: "):
        data.load("fashion-mnist", cache=bare, on_download=said.append)
    assert said == [f"downloading Fashion-MNIST into {bare}, in 300 s at most"]
    assert not list(bare.rglob("*ubyte*"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "pooch could not: "),
        ("raise ImportError('no torch')", "pooch could not: "),
        ("import time; time.sleep(60)", "the download was not done after 4 seconds"),
    ],
)
def test_a_torchvision_that_does_not_work(module, expected, bare, tmp_path, monkeypatch):
    put_torchvision(module, tmp_path, monkeypatch)
    with pytest.raises(DataError, match=expected) as caught:
        data.load("fashion-mnist", cache=bare, timeout=4 if "sleep" in module else 300)
    assert "\n" not in str(caught.value)


def put_torchvision(module: str, directory: Path, monkeypatch) -> None:
    """A stand-in for torchvision, found before the real one."""
    package = directory / "path" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


COPYING = """
import pathlib, shutil, sys, types
def download(root, download):
    print("what torchvision says is no part of the program's output")
    raw = pathlib.Path(root, "FashionMNIST", "raw")
    raw.mkdir(parents=True)
    for path in pathlib.Path({source!r}).glob("*ubyte"):
        shutil.copy(path, raw)
datasets = types.SimpleNamespace(FashionMNIST=download)
"""


def test_a_download_after_a_damaged_copy(copied, idx_files, bare, tmp_path, monkeypatch, capfd):
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(published, "SYSTEM_DIRECTORY", copied.parent)
    put_torchvision(COPYING.format(source=str(idx_files)), tmp_path, monkeypatch)
    found = data.load("fashion-mnist", cache=bare)
    assert found.source == str(bare / "FashionMNIST" / "raw")
    (note,) = found.notes
    assert note.startswith("passed over")
    assert capfd.readouterr() == ("", "")


def test_a_download_is_verified_before_the_cache_gets_it(copied, bare, tmp_path, monkeypatch):
    replace(copied / FILES[3], b"short")
    put_torchvision(COPYING.format(source=str(copied)), tmp_path, monkeypatch)
    with pytest.raises(DataError, match=f"could not be downloaded: .*{FILES[3]} is truncated"):
        data.load("fashion-mnist", cache=bare)
    assert not [path for path in bare.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_to(bare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to the cache"):
        data.load("fashion-mnist", cache=tmp_path / "file" / "cache")


# The publisher's gzip files, rebuilt: Debian's have the same deflate stream behind a header with
# another time stamp and no file name. torchvision checks their MD5.
PUBLISHED_AT = {"train": 1504176606, "t10k": 1504176627}


def as_published(name: str) -> bytes:
    stamp = struct.pack("<I", PUBLISHED_AT[name.split("-")[0]])
    header = b"\x1f\x8b\x08\x08" + stamp + b"\x00\x03" + name.encode() + b"\0"
    return header + (SYSTEM_DIRECTORY / f"{name}.gz").read_bytes()[10:]


@pytest.fixture
def publisher(bare, monkeypatch):
    """A server on this machine that plays the publisher's; a dict of what it serves."""
    contents: dict[str, bytes | tuple[bytes, str]] = {}
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rsplit("/", 1)[-1].removesuffix(".gz")
            body, flaw = contents.get(name), ""
            if isinstance(body, tuple):
                body, flaw = body
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if flaw else body)
            if flaw == "stalls":
                over.wait(60)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "")
    yield contents
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["torchvision", "pooch"])
def downloader(request, tmp_path, monkeypatch) -> str:
    """What downloads: pooch does where there is no torchvision."""
    pytest.importorskip(request.param)
    if request.param == "pooch":
        put_torchvision("raise ImportError", tmp_path, monkeypatch)
    return request.param


def test_download(downloader, publisher, bare, fashion_mnist):
    publisher.update({name: as_published(name) for name in FILES})
    found = data.load("fashion-mnist", cache=bare)
    assert found.source == str(bare / "FashionMNIST" / "raw")
    np.testing.assert_array_equal(found.train.labels, fashion_mnist.train.labels)
    publisher.clear()
    assert data.load("fashion-mnist", cache=bare).source == found.source  # and from the cache
    left = sorted(str(path.relative_to(bare)) for path in bare.rglob("*") if path.is_file())
    assert left == sorted(f"FashionMNIST/raw/{name}" for name in FILES)


@pytest.mark.parametrize("body", [gzip.compress(b"digits", mtime=0), b"<html>404</html>"])
def test_a_download_of_other_bytes_leaves_nothing(body, downloader, publisher, bare, fashion_mnist):
    publisher.update(dict.fromkeys(FILES, body))
    with pytest.raises(DataError, match="could not be downloaded: ") as caught:
        data.load("fashion-mnist", cache=bare)
    assert "\n" not in str(caught.value)
    assert not [path for path in bare.rglob("*") if path.is_file()]


@pytest.mark.parametrize("flaw", ["ends", "stalls"])
def test_a_download_that_stops_in_the_middle_leaves_nothing(
    flaw, downloader, publisher, bare, fashion_mnist, monkeypatch
):
    """Of the last file, when the others are there; a stalled connection is given up, too."""
    script = published.DOWNLOAD.replace("timeout(20)", "timeout(1)").replace(
        "timeout=20", "timeout=1"
    )
    monkeypatch.setattr(published, "DOWNLOAD", script)
    publisher.update({name: as_published(name) for name in FILES})
    publisher[FILES[3]] = as_published(FILES[3]), flaw
    with pytest.raises(DataError, match=f"{downloader} could not: ") as caught:
        data.load("fashion-mnist", cache=bare)
    assert "\n" not in str(caught.value)
    assert not [path for path in bare.rglob("*") if path.is_file()]


# A torchvision that copies the true files, at once and without a network.
COPY = """
import os, pathlib, shutil, sys, time

class FashionMNIST:
    def __init__(self, root, download):
        target = pathlib.Path(root) / "FashionMNIST" / "raw"
        shutil.copytree(os.environ["TRUE_FILES"], target)
        # As many as are wanted at the same time have to have come as far as this.
        (pathlib.Path(os.environ["MEETING"]) / str(os.getpid())).touch()
        while len(os.listdir(os.environ["MEETING"])) < int(os.environ["WANTED"]):
            time.sleep(0.01)
"""


@pytest.fixture
def copying(idx_files, bare, tmp_path, monkeypatch) -> Path:
    """The cache directory of a machine with that torchvision."""
    package = tmp_path / "path" / "torchvision"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "datasets" / "__init__.py").write_text(COPY)
    (tmp_path / "meeting").mkdir()
    paths = (str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("TRUE_FILES", str(idx_files))
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    monkeypatch.setenv("WANTED", "1")
    return bare


def test_two_processes_that_download_at_once(copying, tmp_path, monkeypatch):
    """Both get the true files, which are there once in the end, and nothing else."""
    monkeypatch.setenv("WANTED", "2")
    code = (
        "import pathlib, sys\n"
        "from npbn import data\n"
        "from npbn.data import published\n"
        "published.SYSTEM_DIRECTORY = pathlib.Path('nowhere')\n"
        "print(data.load('fashion-mnist', cache=sys.argv[1]).source)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(copying)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    target = copying / "FashionMNIST" / "raw"
    for process in processes:
        output, errors = process.communicate()
        assert (output.strip(), errors) == (str(target), "")
    assert len(list((tmp_path / "meeting").iterdir())) == 2
    assert sorted(path for path in copying.rglob("*") if path.is_file()) == sorted(
        target / name for name in FILES
    )


def test_a_cache_on_a_disk_that_is_full_or_read_only(copying):
    """55 MB are needed. Nothing of them is left, and later, with space, all is well."""
    with small_disk(copying, kilobytes=50_000) as disk:
        with pytest.raises(DataError, match=r"could not: .*No space left on device") as caught:
            data.load("fashion-mnist", cache=disk)
        assert "\n" not in str(caught.value)
        assert not [path for path in disk.rglob("*") if path.is_file()]
        make_read_only(disk)
        with pytest.raises(DataError, match=r"cannot write to the cache .*: Read-only file system"):
            data.load("fashion-mnist", cache=disk)
    assert data.load("fashion-mnist", cache=copying).source == str(copying / "FashionMNIST" / "raw")


def test_digits():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 1, 28, 28) and len(digits.test) == 360
    assert digits.train.images.dtype == np.uint8 and digits.train.labels.dtype == np.int64
    assert digits.train.images.min() == 0 and digits.train.images.max() == 255
    # As scikit-learn's digits are by scipy.ndimage.zoom(images, (1, 3.5, 3.5), order=1,
    # grid_mode=True, mode="nearest"): computed once, with scikit-learn 1.9.1 and SciPy 1.17.1.
    assert hashlib.sha256(
        np.concatenate([digits.train.images, digits.test.images])
    ).hexdigest() == ("facd805c9f5fea0fb9af69c2e48a80f8f446d8a01a3a2c9ca94a8103e9d77c65")
    labels = np.concatenate([digits.train.labels, digits.test.labels]).astype(np.uint8)
    assert hashlib.sha256(labels).hexdigest() == (
        "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    )


def test_errors(tmp_path):
    with pytest.raises(
        ValueError,
        match="expected a data set of auto, fashion-mnist, mnist, kmnist, digits, idx, folder, got",
    ):
        data.load("x")
    with pytest.raises(ValueError, match="no data directory with digits"):
        data.load("digits", tmp_path)
    with pytest.raises(ValueError, match="no side with mnist, only with folder"):
        data.load("mnist", tmp_path, side=28)
    with pytest.raises(ValueError, match="expected a directory with idx"):
        data.load("idx")
