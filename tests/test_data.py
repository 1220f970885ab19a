"""Finding, verifying and downloading Fashion-MNIST; the digits that stand in for it."""

from __future__ import annotations

import gzip
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
from npbn.errors import DataError

FILES = tuple(data._SHA256)
SYSTEM_DIRECTORY = data.SYSTEM_DIRECTORY  # the true one, also where a test has replaced it


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
    for name in FILES:
        (tmp_path / name).symlink_to(idx_files / name)
    return tmp_path


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine without the files and without a network; the cache directory."""
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", tmp_path / "nowhere")
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


# What sha256sum says of the digits' files; they themselves are not at hand.
DIGIT_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@pytest.mark.parametrize("name", FILES)
def test_digit_mnist_is_refused_by_name(name, tmp_path, monkeypatch):
    for other in FILES:
        (tmp_path / other).write_bytes(bytes(data._SIZE[other]))

    def sha256(content):
        of = next(key for key, size in data._SIZE.items() if size == len(content))
        digest = DIGIT_MNIST[of] if of == name else data._SHA256[of]
        return types.SimpleNamespace(hexdigest=lambda: digest)

    monkeypatch.setattr(data.hashlib, "sha256", sha256)
    with pytest.raises(
        DataError, match=f"{name} is not Fashion-MNIST but MNIST, the handwritten digits"
    ):
        data.load("fashion-mnist", tmp_path)


def test_no_more_is_read_than_there_should_be(tmp_path):
    """A small gzip file can unfold to any size."""
    name = "train-labels-idx1-ubyte"
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(bytes(100_000_000), 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="is not Fashion-MNIST's"):
            data._read_verified(path, name)
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
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", copied)
    found = data.load("fashion-mnist", cache=idx_files)
    assert found.source == str(idx_files)
    assert len(found.notes) == 1
    assert "passed over" in found.notes[0] and f"{FILES[0]} is truncated" in found.notes[0]


def test_what_was_passed_over_is_said_with_the_digits_too(copied, bare, monkeypatch):
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", copied)
    found = data.load(cache=bare)
    assert found.name == "handwritten digits"
    assert "passed over" in found.notes[0]


def test_what_was_passed_over_is_said_in_errors_too(copied, bare, tmp_path, monkeypatch):
    put_torchvision("raise ImportError", tmp_path, monkeypatch)

    def no_digits(notes=()):
        raise DataError("no scikit-learn")

    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", copied)
    monkeypatch.setattr(data, "_digits", no_digits)
    for name, last in (("fashion-mnist", "--data or "), ("auto", "; no scikit-learn")):
        with pytest.raises(DataError, match=rf"^passed over .*; three ways to get it: .*{last}"):
            data.load(name, cache=bare)


def test_the_cache_is_used(idx_files, bare):
    assert data.load(cache=idx_files).source == str(idx_files)


def test_without_anything_auto_gives_digits_and_says_how_to_do_better(bare):
    found = data.load(cache=bare)
    assert found.name == "handwritten digits"
    assert any("could not be downloaded" in note for note in found.notes)
    assert data.HOW_TO_GET_IT in found.notes


def test_without_anything_fashion_mnist_is_refused(bare):
    said: list[str] = []
    with pytest.raises(DataError, match=r"could not be downloaded: .*; three ways to get it: "):
        data.load("fashion-mnist", cache=bare, on_download=said.append)
    assert said == [f"downloading Fashion-MNIST into {bare}, in 300 s at most"]
    assert not list(bare.rglob("*ubyte*"))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "cannot be imported: RuntimeError: operator torchvision::nms does not exist",
        ),
        ("raise ImportError('no torch')", "torchvision cannot be imported: ImportError: no torch"),
        ("import time; time.sleep(60)", "the download was not done after 2 seconds"),
    ],
)
def test_a_torchvision_that_does_not_work(module, expected, bare, tmp_path, monkeypatch):
    put_torchvision(module, tmp_path, monkeypatch)
    with pytest.raises(DataError, match=expected):
        data.load("fashion-mnist", cache=bare, timeout=2)


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
sys.modules["torchvision.datasets"] = types.SimpleNamespace(FashionMNIST=download)
"""


def test_a_download_after_a_damaged_copy(copied, idx_files, bare, tmp_path, monkeypatch, capfd):
    replace(copied / FILES[0], b"short")
    monkeypatch.setattr(data, "SYSTEM_DIRECTORY", copied)
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


def published(name: str) -> bytes:
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


def test_download_with_the_real_torchvision(publisher, bare, fashion_mnist):
    pytest.importorskip("torchvision")
    publisher.update({name: published(name) for name in FILES})
    found = data.load("fashion-mnist", cache=bare)
    assert found.source == str(bare / "FashionMNIST" / "raw")
    np.testing.assert_array_equal(found.train.labels, fashion_mnist.train.labels)
    publisher.clear()
    assert data.load("fashion-mnist", cache=bare).source == found.source  # and from the cache
    left = sorted(str(path.relative_to(bare)) for path in bare.rglob("*") if path.is_file())
    assert left == sorted(f"FashionMNIST/raw/{name}" for name in FILES)


def test_a_download_of_other_bytes_leaves_nothing(publisher, bare, fashion_mnist):
    pytest.importorskip("torchvision")
    publisher.update({name: gzip.compress(b"digits") for name in FILES})
    with pytest.raises(DataError, match="torchvision could not download it: "):
        data.load("fashion-mnist", cache=bare)
    assert not [path for path in bare.rglob("*") if path.is_file()]


@pytest.mark.parametrize("flaw", ["ends", "stalls"])
def test_a_download_that_stops_in_the_middle_leaves_nothing(
    flaw, publisher, bare, fashion_mnist, monkeypatch
):
    """Of the last file, when the others are there; a stalled connection is given up, too."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(data, "_DOWNLOAD", data._DOWNLOAD.replace("timeout(20)", "timeout(1)"))
    publisher.update({name: published(name) for name in FILES})
    publisher[FILES[3]] = published(FILES[3]), flaw
    with pytest.raises(DataError, match="torchvision could not download it: ") as caught:
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
        "data.SYSTEM_DIRECTORY = pathlib.Path('nowhere')\n"
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
        with pytest.raises(DataError, match=r"download it: .*No space left on device") as caught:
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
    from sklearn.datasets import load_digits

    # Both reduced to 4 × 4 blocks: the same picture, neither shifted nor turned.
    small = digits.train.images[:, 0].reshape(-1, 4, 7, 4, 7).mean(axis=(2, 4))
    original = load_digits().images[:1437].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.98
    assert np.corrcoef(small.ravel(), original.transpose(0, 2, 1).ravel())[0, 1] < 0.9

    # Linear between the centres of the 8 pixels, which lie at 1.25, 4.75, ... of the 28.
    centres = 3.5 * np.arange(8) + 1.25
    weights = np.stack([np.interp(np.arange(28), centres, one) for one in np.eye(8)], axis=1)
    expected = weights @ load_digits().images[:1437] @ weights.T * (255 / 16)
    assert np.abs(digits.train.images[:, 0] - expected).max() < 0.501


def test_errors(tmp_path):
    with pytest.raises(
        ValueError, match="expected a data set of auto, fashion-mnist, digits, got 'x'"
    ):
        data.load("x")
    with pytest.raises(ValueError, match="no data directory with digits"):
        data.load("digits", tmp_path)


def test_without_scikit_learn_the_way_out_is_named():
    """In a process in which scikit-learn cannot be imported."""
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from npbn import data\n"
        "try: data.load('digits')\n"
        "except data.DataError as error: print(error)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "pip install scikit-learn" in process.stdout
