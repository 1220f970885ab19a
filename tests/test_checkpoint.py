"""Checkpoints: whole or not there, and refused in one line where they are not what they were."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from disks import make_read_only, small_disk, unchanged
from npbn import backend, checkpoint
from npbn.checkpoint import export_torch, import_torch, load_checkpoint, save_checkpoint
from npbn.errors import CheckpointError
from npbn.layers import BatchNorm, Linear, Sequential
from npbn.models import BLeNet, LeNet

NUMPY = backend.get_backend("numpy")
ARRAYS = {
    "float32": np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30),
    "float64": np.array([np.pi, -0.0, np.inf, np.nan, 5e-324]),
    "int64": np.array([[-(2**63)], [2**63 - 1]]),
    "bool": np.array([True, False]),
    "0-d": np.array(2.5),
    "empty": np.zeros((3, 0, 2), np.float32),
    "strided": np.arange(60.0).reshape(6, 10)[::2, ::-3],
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.array([1, 2], ">f4"),
    "naïve/名": np.ones(1),
}
RECORD = {"epoch": 3, "loss": 0.1 + 0.2, "none": None, "state": {"large": 2**128 - 1, "é": [1]}}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "saved"
    save_checkpoint(path, ARRAYS, RECORD)
    return path


def assert_refused(path: Path, *expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for text in expected:
        assert text in message


def test_round_trip(saved):
    arrays, record = load_checkpoint(saved)
    assert record == RECORD
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype.newbyteorder("="), name
        assert arrays[name].shape == array.shape
        np.testing.assert_array_equal(arrays[name], array, strict=False)
    assert np.signbit(arrays["float64"][1])  # -0.0 equals 0.0
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]


def header_end(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def test_cut_anywhere_it_is_refused(tmp_path):
    path = tmp_path / "lenet"
    model = LeNet(generator=np.random.default_rng(0))
    save_checkpoint(path, model.state_dict(), RECORD)
    content = path.read_bytes()
    for size in {*range(header_end(content) + 1), *range(0, len(content), 1024), len(content) - 1}:
        path.write_bytes(content[:size])
        assert_refused(path, "is damaged, or no safetensors file" if size else "is empty")
        assert path.stat().st_size == size
    path.write_bytes(content + b"\0")
    assert_refused(path, "is damaged")


def test_with_any_bit_flipped_it_is_refused(tmp_path, rng):
    saved = tmp_path / "saved"
    save_checkpoint(saved, {"0.weight": ARRAYS["float32"], "1": ARRAYS["int64"]}, {"epoch": 3})
    content = saved.read_bytes()
    end = header_end(content)
    body = rng.integers(8 * end, 8 * len(content), 300)
    for bit in (*range(8 * end), *body):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(flipped)
        assert_refused(saved)
    saved.write_bytes(content)
    load_checkpoint(saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"dtype":"F32"', b'"dtype":"I32"'), (b'"shape":[2,3]', b'"shape":[3,2]')],
)
def test_other_arrays_of_the_same_bytes_are_refused(old, new, tmp_path):
    path = tmp_path / "saved"
    save_checkpoint(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"epoch": 3})
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    assert_refused(path, "is damaged: its SHA-256")


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "file"
    assert_refused(path, "cannot be read: No such file")
    path.mkdir()
    assert_refused(path, "cannot be read: Is a directory")
    path.rmdir()
    for content in (b"\0" * 100, b"PK\x03\x04" * 50, b"{}", b"\xff" * 8, os.urandom(5000)):
        path.write_bytes(content)
        assert_refused(path, "is damaged, or no safetensors file")
    path.write_bytes(safetensors.numpy.save({"x": np.ones(3)}))
    assert_refused(path, "is no checkpoint of npbn: it has no record")
    for text in ("", "[1]", "{"):
        path.write_bytes(safetensors.numpy.save({"x": np.ones(3)}, {"npbn": text}))
        assert_refused(path, "is damaged: its record is not JSON")
    path.write_bytes(safetensors.numpy.save({}, {"npbn": json.dumps({"format": 1})}))
    assert_refused(path, "is damaged: its SHA-256")


def test_bfloat16_is_refused(tmp_path):
    """NumPy has no such dtype."""
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = tmp_path / "file"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused(path, "bfloat16")
    with pytest.raises(CheckpointError, match="bfloat16"):
        import_torch(LeNet(), path)


def test_a_later_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(saved, ARRAYS, RECORD)
    monkeypatch.undo()
    assert_refused(saved, "has another format than 1", "written by another version")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="this system has no /proc")
def test_a_file_that_opens_and_cannot_be_read(tmp_path):
    (tmp_path / "file").symlink_to("/proc/self/mem")
    with pytest.raises(CheckpointError, match="file cannot be read: Input/output error"):
        load_checkpoint(tmp_path / "file")


def test_a_file_that_may_not_be_read(saved):
    saved.chmod(0)
    if os.access(saved, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match="saved cannot be read: Permission denied"):
        load_checkpoint(saved)


def assert_not_written(path: Path) -> None:
    """Neither kind of file; the earlier one stays, and nothing is beside it."""
    for write in (
        lambda: save_checkpoint(path, {"x": np.zeros(100_000)}, {}),
        lambda: export_torch(LeNet(), path),
    ):
        with unchanged(path.parent), pytest.raises(CheckpointError) as caught:
            write()
        assert str(caught.value).startswith(f"{path} cannot be written: ")
        assert "\n" not in str(caught.value)


def test_a_file_that_gets_too_large_leaves_the_earlier_one(saved):
    """Part of it is written; as on a full disk, and nobody has to be root."""
    resource = pytest.importorskip("resource", reason="this system has no limits of file sizes")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        assert_not_written(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_or_read_only_leaves_the_earlier_one(tmp_path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        save_checkpoint(disk / "saved", ARRAYS, RECORD)
        assert_not_written(disk / "saved")
        make_read_only(disk)
        assert_not_written(disk / "saved")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_earlier_one(step, saved, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    assert_not_written(saved)


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_leaves_the_earlier_one_or_the_new_one(step, before, saved, monkeypatch):
    """At any moment; the one just after the rename is the hardest."""
    original = getattr(os, step)

    def interrupted(*arguments):
        if not before:
            original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, {}, {"new": True})
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    replaced = step == "replace" and not before
    assert load_checkpoint(saved)[1] == ({"new": True} if replaced else RECORD)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "saved", {}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == mode


ONE = np.ones(7, np.float32)


def a_trained(network: type, dtype: str):
    """Weights and statistics that no fresh model has."""
    model = network(generator=np.random.default_rng(1))
    rng = np.random.default_rng(2)
    model.load_state_dict(
        {name: value + rng.random(value.shape) for name, value in model.state_dict().items()}
    )
    model.to(NUMPY, dtype)
    model.eval()
    return model


def images(dtype: str) -> np.ndarray:
    return np.random.default_rng(3).random((20, 1, 28, 28)).astype(dtype)


def equivalent(network: type):
    pytest.importorskip("torch")
    from test_torch_parity import torch_network

    return torch_network(*{LeNet: (0, 256), BLeNet: (2, 400)}[network])


@pytest.mark.parametrize("network", [LeNet, BLeNet])
def test_pytorch_predicts_the_same_from_an_exported_file(network, dtype, tmp_path):
    theirs, model = equivalent(network), a_trained(network, dtype)
    import torch
    from safetensors.torch import load_file

    theirs.to(getattr(torch, dtype))
    export_torch(model, tmp_path / "file")
    theirs.load_state_dict(load_file(tmp_path / "file"), strict=True)
    theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(images(dtype))).numpy()
    # Sums of up to 400 terms of about 1: 400 roundings at the worst.
    bound = 400 * np.finfo(dtype).eps * np.abs(expected).max()
    assert expected.std() > 0.1
    np.testing.assert_allclose(model.forward(images(dtype)), expected, rtol=0, atol=bound)
    for value in theirs.state_dict().values():
        assert value.dtype in (getattr(torch, dtype), torch.int64)


@pytest.mark.parametrize("network", [LeNet, BLeNet])
def test_a_model_that_pytorch_trained_is_imported(network, dtype, tmp_path):
    theirs = equivalent(network)
    import torch
    from safetensors.torch import save_file

    theirs.to(getattr(torch, dtype))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        theirs(torch.rand(20, 1, 28, 28, dtype=getattr(torch, dtype))).square().mean().backward()
        optimizer.step()
    save_file(theirs.state_dict(), tmp_path / "file")
    model = network()
    model.to(NUMPY, dtype)
    import_torch(model, tmp_path / "file")
    for layer in (*theirs, *model.layers):
        if isinstance(layer, BatchNorm | torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            layer.eps = 0.01  # which the file does not hold
    model.eval()
    theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(images(dtype))).numpy()
    bound = 400 * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(model.forward(images(dtype)), expected, rtol=0, atol=bound)


def test_what_is_exported_comes_back(tmp_path):
    model, other = a_trained(BLeNet, "float32"), BLeNet()
    export_torch(model, tmp_path / "file")
    import_torch(other, tmp_path / "file")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], value)


def test_files_of_other_models_are_refused(tmp_path):
    def refused(message: str, change) -> None:
        arrays = dict(exported)
        change(arrays)
        safetensors.numpy.save_file(arrays, tmp_path / "file")
        before = model.state_dict()
        with pytest.raises(CheckpointError, match=message) as caught:
            import_torch(model, tmp_path / "file")
        assert "\n" not in str(caught.value)
        for name, value in model.state_dict().items():
            np.testing.assert_array_equal(value, before[name])

    model = Sequential(Linear(3, 2), BatchNorm(2, num_dims=2))
    export_torch(model, tmp_path / "file")
    exported = safetensors.numpy.load_file(tmp_path / "file")
    assert exported["1.num_batches_tracked"].shape == ()
    assert exported["1.num_batches_tracked"].dtype == np.int64
    refused("of another model: it has no 1.running_var", lambda arrays: arrays.pop("1.running_var"))
    refused("of another model, which has 2.weight", lambda arrays: arrays.update({"2.weight": ONE}))
    refused(r"expected 0.weight of shape \(2, 3\)", lambda arrays: arrays.update({"0.weight": ONE}))
    refused(r"expected 1.gamma of shape \(1, 2\)", lambda arrays: arrays.update({"1.weight": ONE}))
    refused(
        "expected 0.bias of real numbers",
        lambda arrays: arrays.update({"0.bias": ONE[:2] * np.complex64(1j)}),
    )
    save_checkpoint(tmp_path / "ours", model.state_dict(), {})
    with pytest.raises(CheckpointError, match=r"ours is of another model: it has no 1\.weight"):
        import_torch(model, tmp_path / "ours")


def test_neither_way_needs_pytorch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from npbn.checkpoint import export_torch, import_torch\n"
        "from npbn.models import LeNet\n"
        "export_torch(LeNet(), 'file'); import_torch(LeNet(), 'file')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "file").stat().st_size > 4 * 44_878


def theirs(**options) -> dict:
    """The state of a small model in PyTorch, ``options`` for its tensors' ``to``."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return {
        name: tensor.to(**options) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }


def imported(state: dict, path: Path) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("safetensors.torch")
    torch.save_file(state, path)
    model = Sequential(Linear(4, 3), BatchNorm(3, 2))
    import_torch(model, path)
    return model.state_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_other_precisions_are_converted(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    state = theirs(dtype=getattr(torch, dtype))
    found = imported(state, tmp_path / "file")
    assert found["0.weight"].dtype == np.float32
    for ours, name in (("0.weight", "0.weight"), ("0.bias", "0.bias"), ("1.gamma", "1.weight")):
        np.testing.assert_array_equal(found[ours].ravel(), state[name].float().numpy().ravel())


def test_weights_of_8_bits_are_refused_by_their_name(tmp_path):
    torch = pytest.importorskip("torch")
    state = theirs() | {"0.weight": theirs()["0.weight"].to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"0\.weight has dtype F8_E4M3; expected F16 or"):
        imported(state, tmp_path / "file")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "x."])
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in theirs().items()}
    if prefix == "x.":
        with pytest.raises(CheckpointError, match=r"another model: it has no 0\.weight"):
            imported(state, tmp_path / "file")
    else:
        right = imported(theirs(), tmp_path / "right")
        for name, value in imported(state, tmp_path / "file").items():
            np.testing.assert_array_equal(value, right[name])


def test_a_file_without_moving_statistics(tmp_path):
    state = {name: tensor for name, tensor in theirs().items() if "running" not in name}
    with pytest.raises(CheckpointError, match=r"it has no 1\.running_mean"):
        imported(state, tmp_path / "file")
