"""Data of one's own: image folders, IDX files, arrays; from Python and from the command line."""

from __future__ import annotations

import gzip
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import npbn
from commands import assert_refused, run
from npbn.data.images import read_image
from npbn.errors import DataError

SIDE = 12
CLASSES = ("blue", "green", "red")


def picture(rng, label: int, side: int = SIDE) -> np.ndarray:
    """An image of noise in which one colour is brighter: blue, green or red."""
    image = rng.integers(0, 100, (side, side, 3))
    image[..., 2 - label] += rng.integers(80, 150)
    return image.astype(np.uint8)


def save(path: Path, image: np.ndarray | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


@pytest.fixture
def photos(rng, tmp_path) -> Path:
    """CLASS/*.png, 20 of each, in colour."""
    for label, name in enumerate(CLASSES):
        for i in range(20):
            save(tmp_path / "photos" / name / f"{i:02}.png", picture(rng, label))
    return tmp_path / "photos"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_directory(rng, tmp_path) -> Path:
    """Four files: grey images of 12 × 12, of which one half is brighter."""
    directory = tmp_path / "idx"
    directory.mkdir()
    for name, count in (("train", 60), ("test", 20)):
        labels = rng.integers(0, 2, count).astype(np.uint8)
        images = rng.integers(0, 100, (count, SIDE, SIDE)).astype(np.uint8)
        images[labels == 1, : SIDE // 2] += 100
        (directory / f"{name}-images.idx3-ubyte").write_bytes(idx(images))
        (directory / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return directory


# Folders.


def test_a_folder_with_train_and_test(rng, tmp_path):
    images = [picture(rng, i % 3) for i in range(6)]
    for i, image in enumerate(images):
        part = "train" if i < 4 else "test"
        save(tmp_path / part / CLASSES[i % 3] / f"{i}.bmp", image)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "red" / "Thumbs.db").write_bytes(b"no image")
    found = npbn.data.from_folder(tmp_path)
    assert (found.classes, found.key, found.source) == (CLASSES, "folder", str(tmp_path))
    assert found.train.labels.tolist() == [0, 0, 1, 2] and found.test.labels.tolist() == [1, 2]
    expected = [images[i].transpose(2, 0, 1) for i in (0, 3, 1, 2)]
    np.testing.assert_array_equal(found.train.images, expected)
    np.testing.assert_array_equal(found.test.images[1], images[5].transpose(2, 0, 1))
    (note,) = found.notes
    assert note.startswith("passed over 1 files that are no images") and "Thumbs.db" in note


@pytest.mark.parametrize(("fraction", "kept"), [(0.25, 5), (0.001, 1), (0.999, 19), (0.5, 10)])
def test_a_folder_that_is_split(photos, fraction, kept):
    found = npbn.data.from_folder(photos, test_fraction=fraction, seed=3)
    np.testing.assert_array_equal(np.bincount(found.test.labels), [kept] * 3)
    np.testing.assert_array_equal(np.bincount(found.train.labels), [20 - kept] * 3)
    # Every image is in one of the two.
    together = np.concatenate([found.train.images, found.test.images])
    assert len(np.unique(together.reshape(60, -1), axis=0)) == 60
    again = npbn.data.from_folder(photos, test_fraction=fraction, seed=3)
    np.testing.assert_array_equal(again.test.images, found.test.images)
    other = npbn.data.from_folder(photos, test_fraction=fraction, seed=4)
    assert not np.array_equal(other.test.images, found.test.images)


def test_channels_and_sides(photos, rng):
    colour = npbn.data.from_folder(photos, test_fraction=0.5)
    assert colour.train.images.shape == (30, 3, SIDE, SIDE)
    grey = npbn.data.from_folder(photos, test_fraction=0.5, channels=1, side=20)
    assert grey.train.images.shape == (30, 1, 20, 20)
    for path in photos.rglob("*.png"):
        save(path, Image.open(path).convert("L"))
    assert npbn.data.from_folder(photos, test_fraction=0.5).train.images.shape[1] == 1
    three = npbn.data.from_folder(photos, test_fraction=0.5, channels=3).train.images
    np.testing.assert_array_equal(three[:, 0], three[:, 2])


def test_a_folder_that_is_not_as_expected(photos, rng, tmp_path):
    def refused(message: str, directory: Path = photos, **options) -> None:
        with pytest.raises(DataError, match=message):
            npbn.data.from_folder(directory, **options)

    refused("has no folders train and test: expected test_fraction")
    refused("nowhere cannot be read: No such file", tmp_path / "nowhere", test_fraction=0.5)
    refused("expected a folder for each class", photos / "red", test_fraction=0.5)
    save(photos / "red" / "odd.png", picture(rng, 2, 13))
    refused(
        r"odd\.png has 13 × 13 pixels and .*00\.png 12 × 12: expected squares", test_fraction=0.5
    )
    npbn.data.from_folder(photos, test_fraction=0.5, side=12)
    save(photos / "red" / "odd.png", np.zeros((12, 14, 3), np.uint8))
    refused(r"odd\.png has 14 × 12 pixels", test_fraction=0.5)
    for broken in (b"", b"no image"):
        (photos / "red" / "odd.png").write_bytes(broken)
        refused(r"odd\.png is no image of a format", test_fraction=0.5)
    content = (photos / "red" / "00.png").read_bytes()
    (photos / "red" / "odd.png").write_bytes(content[: len(content) // 2])
    refused(r"odd\.png cannot be read as an image: ", test_fraction=0.5)
    (photos / "red" / "odd.png").unlink()
    os.mkfifo(photos / "red" / "pipe.png")  # would be waited for
    (photos / "empty").mkdir()
    refused("empty has no image files", test_fraction=0.5)
    save(photos / "empty" / "one.png", picture(rng, 0))
    refused("empty: expected at least 2 images", test_fraction=0.5)
    for part in ("train", "test"):
        for label, name in enumerate((*CLASSES, "other")[: 3 + (part == "test")]):
            save(photos / part / name / "0.png", picture(rng, label % 3))
    refused("test/other: .*train has no such")
    refused("has folders train and test: expected no test_fraction", test_fraction=0.5)
    for option in ({"channels": 2}, {"side": 0}, {"test_fraction": 1.0}):
        with pytest.raises(ValueError, match=f"expected {next(iter(option))}"):
            npbn.data.from_folder(photos, **option)


# What becomes of an image file in colour; test_predict_script.py has the grey ones.


def test_kinds_of_colour_images(rng, tmp_path):
    image = picture(rng, 1)
    expected = image.transpose(2, 0, 1)

    def read(name: str, saved: Image.Image, **options) -> np.ndarray:
        path = tmp_path / name
        saved.save(path, **options)
        return read_image(path, 3, SIDE)

    pillow = Image.fromarray(image)
    np.testing.assert_array_equal(read("plain.png", pillow), expected)
    np.testing.assert_array_equal(read("opaque.png", pillow.convert("RGBA")), expected)
    np.testing.assert_array_equal(read("palette.png", pillow.quantize(255, dither=0)), expected)
    black = Image.fromarray(0 * image)
    frames = {"save_all": True, "append_images": [black]}
    np.testing.assert_array_equal(read("animated.webp", pillow, lossless=True, **frames), expected)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = pillow.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(read("rotated.png", turned, exif=exif), expected)
    # Half transparent: half as bright, on black. And what nothing is seen of is black.
    veil = pillow.copy()
    veil.putalpha(128)
    np.testing.assert_array_equal(read("veil.png", veil), np.rint(expected * (128 / 255)))
    veil.putalpha(0)
    np.testing.assert_array_equal(read("nothing.png", veil), 0 * expected)
    inverted = read_image(tmp_path / "plain.png", 3, SIDE, invert=True)
    np.testing.assert_array_equal(inverted, 255 - expected)
    # Not a square: black above and below.
    wide = read("wide.png", Image.fromarray(np.full((2, 4, 3), 200, np.uint8)))
    assert np.all(wide[:, 3:9] == 200) and np.all(wide[:, :3] == 0) and np.all(wide[:, 9:] == 0)


# IDX files.


def test_idx_files(idx_directory):
    found = npbn.data.from_idx(idx_directory)
    assert found.train.images.shape == (60, 1, SIDE, SIDE) and len(found.test) == 20
    assert found.train.labels.dtype == np.int64 and set(found.train.labels) == {0, 1}
    assert (found.classes, found.key) == (("0", "1"), "idx")
    (note,) = found.notes
    assert "taken as they are" in note


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images.idx3-ubyte", None, "expected one IDX file with train .* got none"),
        ("more-train-images", b"", "got more-train-images and train-images.idx3-ubyte"),
        ("train-images.idx3-ubyte", b"", "no IDX file of unsigned bytes: it begins with $"),
        ("train-images.idx3-ubyte", b"\x89PNG....", "begins with 89504e47"),
        ("train-images.idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "begins with 00000d03"),
        ("train-images.idx3-ubyte", idx(np.zeros((2, 3, 3), np.uint8))[:-1], "has 17 values, exp"),
        ("train-images.idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12, "has 0 values, expected 42"),
        ("train-images.idx3-ubyte", idx(np.zeros(60, np.uint8)), "has 1 dimensions, expected 3"),
        ("train-images.idx3-ubyte", idx(np.zeros((9, 12, 12), np.uint8)), "expected images of"),
        (
            "test-labels-idx1-ubyte.gz",
            gzip.compress(idx(np.full(20, 7, np.uint8)), mtime=0),
            "test_lab",
        ),
        ("test-labels-idx1-ubyte.gz", gzip.compress(bytes(99), mtime=0)[:-9], "is truncated"),
        ("test-labels-idx1-ubyte.gz", b"plain", "is damaged"),
    ],
)  # fmt: skip
def test_idx_files_that_are_not_as_expected(name, content, message, idx_directory):
    if content is None:
        (idx_directory / name).unlink()
    else:
        (idx_directory / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        npbn.data.from_idx(idx_directory)


# Arrays.


def test_arrays(rng):
    images = rng.integers(0, 256, (8, 5, 5), dtype=np.uint8)
    labels = [0, 1, 2, 0, 1, 2, 0, 1]
    found = npbn.data.from_arrays(images, labels, images[:2], labels[:2])
    assert found.train.images.shape == (8, 1, 5, 5) and found.classes == ("0", "1", "2")
    named = npbn.data.from_arrays(
        images[:, None], labels, images[:2, None], labels[:2], classes=["a", "b", "c"]
    )
    assert named.classes == ("a", "b", "c")
    for arguments, error, message in (
        ((images / 255, labels, images, labels), TypeError, "expected images of dtype uint8"),
        ((images, labels[1:], images, labels), ValueError, "expected images of shape"),
        ((images, labels, images[:, 1:], labels), ValueError, "of one size"),
        ((images, labels, images[:0], labels[:0]), TypeError, "integer dtype"),
        ((images, labels, images[:2], [0, 3]), ValueError, "test_labels from 0 to 2, got 3 for im"),
        ((images, [-1, *labels[1:]], images, labels), ValueError, "train_labels from 0 .* got -1"),
    ):
        with pytest.raises(error, match=message):
            npbn.data.from_arrays(*arguments)


# Training on them.


@pytest.mark.parametrize("engine", ["layers", "fused"])
def test_six_lines_of_python(engine, photos):
    data = npbn.data.from_folder(photos, test_fraction=0.25)
    generator = np.random.default_rng(0)
    model = npbn.models.BLeNet(3, SIDE, len(data.classes), generator=generator)
    training = npbn.train(model, data, epochs=20, lr=0.5, batch_size=15, engine=engine)
    assert training.engine.kind == engine
    assert training.best > 0.9


@pytest.mark.parametrize("engine", ["layers", "fused"])
def test_a_folder_from_the_command_line(engine, photos, tmp_path):
    options = ("--dataset", "folder", "--data", "photos", "--test-fraction", "0.25")
    how = ("--epochs", "20", "--batch-size", "15", "--lr", "0.5", "--run", "run", "--seed", "1")
    process = run("train.py", *options, *how, "--engine", engine, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "data: images from photos, 45 training and 15 test images" in process.stdout
    assert "model: BLeNet with batch norm" in process.stdout
    # The data is found from elsewhere, too, and split alike.
    test = npbn.data.from_folder(photos, test_fraction=0.25, seed=1).test
    where = tmp_path / "elsewhere"
    where.mkdir()
    process = run("predict.py", "../run", "--index", "7", cwd=where)
    assert f"(truly {CLASSES[test.labels[7]]})" in process.stdout, process.stderr
    # A file is treated as in training: the same image, the same answer.
    (path,) = (
        path
        for path in photos.rglob("*.png")
        if np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), test.images[7])
    )
    from_file = run("predict.py", "../run", str(path), cwd=where)
    numbers = [re.findall(r"\d\.\d{4}  \w+", p.stdout) for p in (process, from_file)]
    assert len(numbers[0]) == 3 and numbers[0] == numbers[1]
    assert "note:" not in from_file.stdout
    resumed = run("train.py", "--resume", "../run", cwd=where)
    assert resumed.returncode == 0, resumed.stderr
    loaded = npbn.load(tmp_path / "run")
    assert loaded.config.classes == CLASSES and loaded.config.channels == 3
    assert np.mean(loaded.predict(test.images).argmax(1) == test.labels) > 0.9


def test_idx_files_from_the_command_line(idx_directory, tmp_path):
    process = run(
        *("train.py", "--dataset", "idx", "--data", "idx", "--epochs", "2", "--batch-size", "20"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert "note: the files in idx are taken as they are" in process.stdout
    assert "data: IDX files from idx, 60 training and 20 test images" in process.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dataset", "folder"), "argument --data: expected a directory with --dataset folder"),
        (("--dataset", "idx"), "argument --data: expected a directory with --dataset idx"),
        (("--side", "28"), "argument --side: not allowed without --dataset folder"),
        (("--dataset", "folder", "--data", "photos"), "see --test-fraction"),
        (("--dataset", "folder", "--data", "photos", "--channels", "2"), "expected 1 or 3"),
        (
            *(
                (
                    "--dataset",
                    "folder",
                    "--data",
                    "photos",
                    "--test-fraction",
                    "0.2",
                    "--side",
                    "30",
                ),
            ),
            "images of 30 × 30: BLeNet halves 30 → 15, takes 4 off → 11, halves → 5.5",
        ),
        (("--dataset", "mnist", "--data", "photos"), "photos holds none of MNIST's files"),
    ],
)
def test_bad_options_and_data(options, expected, photos, tmp_path):
    assert_refused(run("train.py", *options, cwd=tmp_path), "train.py: error: ", expected)
