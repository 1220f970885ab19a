"""scripts/predict.py as its users meet it: whatever the file, the same image, the same answer."""

from __future__ import annotations

import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import assert_refused, run
from npbn import data, inspection
from npbn.checkpoint import load_checkpoint, save_checkpoint
from npbn.models import LeNet

INDEX = 7  # of the test image that is saved in many ways
LINE = re.compile(r"^  (\d\.\d{4})  (.*)$", re.MULTILINE)


def answers(output: str) -> list[tuple[str, str]]:
    """Probability and class, line by line."""
    return [match.groups() for match in LINE.finditer(output)]


@pytest.fixture(scope="session")
def digit() -> np.ndarray:
    return data.load("digits").test.images[INDEX, 0]


@pytest.fixture(scope="session")
def expected(runs) -> list[tuple[str, str]]:
    """The probabilities of that image, computed by hand from the checkpoint."""
    arrays, _ = load_checkpoint(runs / "with" / "best.safetensors")
    model = LeNet()
    model.load_state_dict(
        {name[6:]: array for name, array in arrays.items() if name.startswith("model.")}
    )
    model.eval()
    image = data.load("digits").test.images[INDEX : INDEX + 1]
    logits = model.forward(image.astype(np.float32) / 255)[0].astype(np.float64)
    probabilities = np.exp(logits) / np.sum(np.exp(logits))
    order = np.argsort(-probabilities)
    return [(f"{probabilities[k]:.4f}", str(k)) for k in order]


def test_an_image_of_the_test_set(runs, expected):
    process = run("predict.py", "with", "--index", str(INDEX), cwd=runs)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert answers(process.stdout) == expected[:3]
    label = data.load("digits").test.labels[INDEX]
    first, second, *_ = process.stdout.splitlines()
    assert first.startswith("model: after epoch ")
    assert second == f"test image {INDEX}: {expected[0][1]} (truly {label})"
    process = run("predict.py", "with", "--index", str(INDEX), "--all", cwd=runs)
    assert answers(process.stdout) == expected


def test_probabilities_are_those_of_prediction_mode_whatever_the_mode_is():
    model, test = LeNet(), data.load("digits").test
    model.eval()
    expected = inspection.probabilities(model, test)
    assert expected.shape == (360, 10)
    np.testing.assert_allclose(np.sum(expected, axis=1), 1, rtol=1e-5)
    model.train()
    found = inspection.probabilities(model, test, batch_size=100)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert model.training


def transparent(ink: int, digit: np.ndarray) -> Image.Image:
    return Image.merge("LA", (Image.new("L", (28, 28), ink), Image.fromarray(digit)))


def palette(digit: np.ndarray) -> Image.Image:
    """Each grey value g is entry 255 - g."""
    image = Image.fromarray(255 - digit)
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255 - i // 3 for i in range(768)])
    return image


def animated(digit: np.ndarray, path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in (digit, 255 - digit)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def rotated(digit: np.ndarray, path: Path) -> None:
    """As a camera held sideways saves it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned to the right by 90 degrees
    Image.fromarray(digit).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


EXACT = {
    "grey.png": lambda digit, path: Image.fromarray(digit).save(path),
    "colour.bmp": lambda digit, path: Image.fromarray(digit).convert("RGB").save(path),
    "opaque.png": lambda digit, path: Image.fromarray(digit).convert("RGBA").save(path),
    "white ink.png": lambda digit, path: transparent(255, digit).save(path),
    "palette.png": lambda digit, path: palette(digit).save(path),
    "16 bits.png": lambda digit, path: Image.fromarray(digit.astype(np.uint16) * 257).save(path),
    "16 bits.tiff": lambda digit, path: Image.fromarray(digit.astype(np.uint16) * 257).save(path),
    "cmyk.tiff": lambda digit, path: Image.fromarray(digit).convert("CMYK").save(path),
    "animated.gif": animated,
    "rotated.png": rotated,
    "name of another kind.txt": lambda digit, path: Image.fromarray(digit).save(path, "PNG"),
}
EXACT_INVERTED = {
    "dark on light.png": lambda digit, path: Image.fromarray(255 - digit).save(path),
    "black ink.png": lambda digit, path: transparent(0, digit).save(path),
}


def test_options_stand_anywhere(runs, digit, tmp_path):
    EXACT_INVERTED["dark on light.png"](digit, tmp_path / "a.png")
    words = ("with", str(tmp_path / "a.png"), "--invert")
    orders = [words, (words[0], words[2], words[1]), (words[2], *words[:2])]
    outputs = {run("predict.py", *order, cwd=runs).stdout for order in orders}
    assert len(outputs) == 1 and f"{tmp_path / 'a.png'}: " in outputs.pop()


@pytest.mark.parametrize(
    ("files", "options"), [(EXACT, ()), (EXACT_INVERTED, ("--invert",))], ids=["plain", "inverted"]
)
def test_the_same_image_in_any_file_has_the_same_probabilities(
    files, options, runs, digit, expected, tmp_path
):
    for name, save in files.items():
        save(digit, tmp_path / name)
    paths = [str(tmp_path / name) for name in files]
    process = run("predict.py", "with", *paths, "--all", *options, cwd=runs)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    for number, path in enumerate(paths):
        assert answers(process.stdout)[10 * number : 10 * number + 10] == expected, path
        assert f"\n{path}: {expected[0][1]}\n" in process.stdout
    assert "note:" not in process.stdout


def test_another_size_has_the_same_class(runs, digit, expected, tmp_path):
    for name, size in {"large.jpg": 333, "larger.png": 1000, "small.png": 20}.items():
        image = Image.fromarray(digit).resize((size, size))
        image.save(tmp_path / name)
        process = run("predict.py", "with", str(tmp_path / name), cwd=runs)
        assert process.returncode == 0, process.stderr
        assert answers(process.stdout)[0][1] == expected[0][1], name


@pytest.mark.parametrize(
    ("size", "shrunk"),
    [((28, 14), (28, 14)), ((7, 28), (7, 28)), ((28, 1), (28, 1)), ((2000, 2), (28, 1))],
)
def test_the_aspect_ratio_is_kept(size, shrunk, runs, tmp_path):
    """What is missing to a square is black, as much on either side."""
    Image.new("L", size, 200).save(tmp_path / "narrow.png")
    width, height = shrunk
    padded = np.zeros((28, 28), np.uint8)
    left, top = (28 - width) // 2, (28 - height) // 2
    padded[top : top + height, left : left + width] = 200
    Image.fromarray(padded).save(tmp_path / "padded.png")
    paths = [str(tmp_path / name) for name in ("narrow.png", "padded.png")]
    process = run("predict.py", "with", *paths, "--all", cwd=runs)
    assert process.returncode == 0, process.stderr
    found = answers(process.stdout)
    assert found[:10] == found[10:]


@pytest.mark.parametrize(
    ("values", "options", "hint"),
    [
        ("light", (), "try with --invert"),
        ("light", ("--invert",), None),
        ("dark", (), None),
        ("dark", ("--invert",), "try without --invert"),
    ],
)
def test_a_light_border_calls_for_a_hint(values, options, hint, runs, digit, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(digit if values == "dark" else 255 - digit).resize((100, 60)).save(path)
    process = run("predict.py", "with", str(path), *options, cwd=runs)
    assert process.returncode == 0, process.stderr
    if hint is None:
        assert "note:" not in process.stdout
    else:
        (line,) = [line for line in process.stdout.splitlines() if line.startswith("note:")]
        assert f"the border of {path} is light" in line and hint in line


def test_an_image_file_needs_no_data_set(runs, digit, tmp_path):
    """Not even the one that the run was trained on."""
    Image.fromarray(digit).save(tmp_path / "a.png")
    prelude = (
        "import npbn.data\ndef load(*_, **__): raise npbn.errors.DataError('there is no data')\n"
    )
    prelude += "npbn.data.load = load"
    process = run("predict.py", "with", str(tmp_path / "a.png"), cwd=runs, prelude=prelude)
    assert process.returncode == 0, process.stderr
    process = run("predict.py", "with", "--index", "0", cwd=runs, prelude=prelude)
    assert_refused(process, "predict.py: error: there is no data")


@pytest.mark.parametrize(
    ("options", "best"),
    [((), True), (("--checkpoint", "best"), True), (("--checkpoint", "last"), False)],
)
def test_the_checkpoint_is_the_best_unless_asked_for_the_last(options, best, runs, tmp_path):
    """The best one is replaced by a network that knows nothing."""
    shutil.copytree(runs / "with", tmp_path / "one")
    arrays, record = load_checkpoint(tmp_path / "one" / "last.safetensors")
    nothing = {name: np.zeros_like(array) for name, array in arrays.items()}
    save_checkpoint(tmp_path / "one" / "best.safetensors", nothing, record | {"epoch": 1})
    process = run("predict.py", "one", "--index", "0", *options, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (answers(process.stdout) == [("0.1000", k) for k in "012"]) == best
    assert f"after epoch {1 if best else 3}\n" in process.stdout


def test_other_models_and_dtypes(tmp_path, digit):
    Image.fromarray(digit).save(tmp_path / "a.png")
    options = ("--dataset", "digits", "--backend", "numpy", "--epochs", "1", "--model", "blenet")
    options += ("--dtype", "float64", "--activation", "relu", "--no-batch-norm", "--lr", "0.1")
    assert run("train.py", *options, "--run", "one", cwd=tmp_path).returncode == 0
    process = run("predict.py", "one", "a.png", "--index", str(INDEX), cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = answers(process.stdout)
    assert found[:3] == found[3:] and len(found) == 6


def header_of_a_png(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and little more."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def truncated(path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:1000])


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "is no image"),
    "text": (lambda path: path.write_text("no image"), "is no image"),
    "truncated": (truncated, "cannot be read as an image: image file is truncated"),
    "missing": (lambda path: None, "cannot be read as an image: No such file"),
    "directory": (lambda path: path.mkdir(), "cannot be read as an image: it is not a file"),
    "pipe": (lambda path: os.mkfifo(path), "cannot be read as an image: it is not a file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read as an image"),
    "bomb": (
        lambda path: path.write_bytes(header_of_a_png(20_000, 20_000)),
        "could be decompression bomb",
    ),
    "half a bomb": (
        lambda path: path.write_bytes(header_of_a_png(10_000, 10_000)),
        "could be decompression bomb",
    ),
    "floating point": (
        lambda path: Image.new("F", (28, 28)).save(path, "TIFF"),
        "expected pixels of 8 or 16 bits, got floating point",
    ),
    "32 bits": (
        lambda path: Image.new("I", (28, 28), 65536).save(path, "TIFF"),
        "expected pixels of 8 or 16 bits",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_refused_in_one_line(case, runs, digit, tmp_path):
    make, expected = BAD[case]
    make(tmp_path / "bad")
    Image.fromarray(digit).save(tmp_path / "good.png")
    paths = [str(tmp_path / name) for name in ("good.png", "bad")]
    process = run("predict.py", "with", *paths, cwd=runs)
    assert_refused(process, f"predict.py: error: {paths[1]} ", expected)
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "the following arguments are required: RUN"),
        (("with",), "expected an image file, or --index and a number"),
        (("with", "--index", "360"), "--index 360: the test images are 0 to 359"),
        (("with", "--index", "-1"), "argument --index: expected an integer >= 0, got '-1'"),
        (("with", "--index", "0", "--invert"), "argument --invert: not allowed without an image"),
        (("nowhere", "a.png"), "nowhere is not a directory; expected the folder of a run"),
        (("with", "a.png", "--checkpoint", "9"), "argument --checkpoint: invalid choice: '9'"),
        ((".", "a.png"), "config.json cannot be read: No such file"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, expected, runs):
    assert_refused(run("predict.py", *arguments, cwd=runs), "predict.py: error:", expected)


def test_a_checkpoint_of_another_model(runs, tmp_path):
    shutil.copytree(runs / "with", tmp_path / "one")
    arrays, record = load_checkpoint(tmp_path / "one" / "best.safetensors")
    del arrays["model.0.weight"]
    save_checkpoint(tmp_path / "one" / "best.safetensors", arrays, record)
    process = run("predict.py", "one", "--index", "0", cwd=tmp_path)
    assert_refused(process, "best.safetensors does not fit", "0.weight")
