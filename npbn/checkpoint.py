"""Save and load checkpoints of training runs, and exchange models with PyTorch.

A checkpoint is one file in the safetensors format (huggingface.co/docs/safetensors). The file
contains named arrays. The metadata of the file contain a record in JSON and a SHA-256 checksum, by
which a damaged file is recognized. Loading a checkpoint executes no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from npbn.errors import CheckpointError
from npbn.layers import BatchNorm, Layer, Sequential

FORMAT = 1
"""The version of the format of checkpoints. Files of any other version are refused."""

Arrays = dict[str, np.ndarray]
Record = dict[str, Any]
PathLike = str | os.PathLike[str]


def write_file(path: PathLike, content: bytes) -> None:
    """Write a file completely or not at all.

    After a crash, the file has either the old content or the new content. (If the process is
    killed, a hidden temporary file may remain in the same folder. Nothing reads that file.)

    Raises:
        OSError: the file cannot be written. In this case, an old file of this name is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Without this, a power cut could leave the file empty.
        os.replace(temporary, path)
    except BaseException:  # The temporary file is also removed after Ctrl-C.
        temporary.unlink(missing_ok=True)
        raise


LARGEST = 2**30
"""The size of the largest file that `read_file` reads, in bytes."""


def read_file(path: PathLike) -> bytes:
    """Return the content of a file.

    Raises:
        CheckpointError: the path is not that of a file, or the file cannot be read.
    """
    try:
        _check_file(path)
        if os.stat(path).st_size > LARGEST:
            raise CheckpointError(f"{path} is damaged: it has {os.stat(path).st_size:,} bytes")
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_file(path: PathLike) -> None:
    """Raise an error if a path is that of something else, such as a pipe, which may never end.

    Raises:
        CheckpointError, OSError: the path is not that of a file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise CheckpointError(f"{path} cannot be read: it is not a file")


def save_checkpoint(path: PathLike, arrays: Mapping[str, np.ndarray], record: Record) -> None:
    """Write a checkpoint with named arrays and a record.

    Args:
        path: the path of the file.
        arrays: the arrays by name.
        record: further values by name, all of which JSON can represent.

    Raises:
        CheckpointError: the file cannot be written. In this case, an old file of this name is
            unchanged.
    """
    # Arrays are little-endian and contiguous in the file. They are converted before the SHA-256 is
    # computed, so that the SHA-256 after loading is equal.
    arrays = {
        name: np.array(array, array.dtype.newbyteorder("<"), order="C")
        for name, array in arrays.items()
    }
    text = json.dumps({"format": FORMAT, **record})
    metadata = {"npbn": text, "sha256": _digest(text, arrays)}
    try:
        write_file(path, safetensors.numpy.save(arrays, metadata))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None


def load_checkpoint(path: PathLike) -> tuple[Arrays, Record]:
    """Return the arrays and the record of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is not a checkpoint, or has another
            version than `FORMAT`.
    """
    arrays, metadata = _read(path)
    text = metadata.get("npbn")
    if text is None:
        raise CheckpointError(f"{path} is no checkpoint of npbn: it has no record")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is damaged: its record is not JSON")
    if record.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path} has another format than {FORMAT}, the one that this npbn reads: it was "
            "written by another version"
        )
    if metadata.get("sha256") != _digest(text, arrays):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of its content")
    return arrays, record


def _read(path: PathLike) -> tuple[Arrays, dict[str, str]]:
    try:
        _check_file(path)
        # For a missing file, the error message of open is clearer than that of safetensors.
        with open(path, "rb") as file:
            empty = not file.read(1)
        if empty:
            raise CheckpointError(f"{path} is empty")
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # keys() is needed, because this object cannot be iterated over as a dict can.
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            for name, dtype in dtypes.items():
                if dtype.startswith(("F8", "F4")):
                    raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected F16 or more")
            arrays = {n: file.get_tensor(n) for n, dtype in dtypes.items() if dtype != "BF16"}
        if len(arrays) < len(dtypes):
            content = Path(path).read_bytes()
            # safetensors gives the types of its functions, except for this one.
            for name, entry in safetensors.deserialize(content):  # type: ignore[no-untyped-call]
                if entry["dtype"] == "BF16":  # It is the upper half of a float32.
                    upper = np.frombuffer(entry["data"], "<u2").astype("<u4")
                    arrays[name] = (upper << 16).view("<f4").reshape(entry["shape"])
        return arrays, metadata
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
        # TypeError and AttributeError mean that the file has another dtype that NumPy has not.
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # safetensors raises it for absurd sizes.
            raise
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from None


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# PyTorch's names of the arrays of a batch norm. The arrays of other layers are named weight and
# bias, in PyTorch and in npbn.
_TORCH_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_COUNT = "num_batches_tracked"
# What wrappers of a PyTorch model put before all names.
_PREFIXES = ("module.", "_orig_mod.", "model.")


def export_torch(model: Sequential, path: PathLike) -> None:
    """Write the state of a model to a safetensors file with PyTorch's names.

    The equivalent model in PyTorch is an ``nn.Sequential`` with one module for each layer, in the
    same order. The module of a batch norm is an ``nn.BatchNorm1d`` or an ``nn.BatchNorm2d``. In
    PyTorch, this line loads the file into such a model:

        model.load_state_dict(safetensors.torch.load_file(path))

    γ, β and the moving statistics get the shape (C,). No value changes. The file contains neither
    eps nor the momentum. So the PyTorch modules must be created with eps and with PyTorch's
    momentum, which is 1 minus npbn's. In a later training with PyTorch, the moving variance will
    differ from npbn's, because PyTorch averages the unbiased variance.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays: Arrays = {}
    norms = _batch_norms(model)
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if prefix in norms:
            arrays[f"{prefix}.{_TORCH_NAMES[last]}"] = value.reshape(-1)
        else:
            arrays[name] = np.array(value, order="C")
    for prefix in norms:
        arrays[f"{prefix}.{_COUNT}"] = np.zeros((), np.int64)
    try:
        write_file(path, safetensors.numpy.save(arrays, {"format": "pt"}))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None


def import_torch(model: Sequential, path: PathLike) -> None:
    """Load the state of the equivalent PyTorch model from a safetensors file.

    In PyTorch, ``safetensors.torch.save_file(model.state_dict(), path)`` writes such a file. The
    docstring of `export_torch` describes the equivalent model. Numbers of the dtypes float16 and
    bfloat16 are converted. The prefixes of PyTorch's wrappers ("module.", "_orig_mod.", "model.")
    are removed if all names have them.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another model. In this case, nothing
            is changed.
    """
    arrays, _ = _read(path)
    for prefix in 2 * _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    norms = _batch_norms(model)
    state: Arrays = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        theirs = f"{prefix}.{_TORCH_NAMES[last]}" if prefix in norms else name
        if theirs not in arrays:
            raise CheckpointError(f"{path} is of another model: it has no {theirs}")
        found = arrays.pop(theirs)
        if prefix in norms and found.shape == (value.size,):
            found = found.reshape(value.shape)
        state[name] = found
    left = arrays.keys() - {f"{prefix}.{_COUNT}" for prefix in norms}
    if left:
        raise CheckpointError(f"{path} is of another model, which has {', '.join(sorted(left))}")
    try:
        model.load_state_dict(state)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is of another model: {error}") from None


def _batch_norms(layer: Layer, prefix: str = "") -> dict[str, BatchNorm]:
    """Return the batch norms of a model by name."""
    found: dict[str, BatchNorm] = {}
    for name, child in layer.children().items():
        if isinstance(child, BatchNorm):
            found[prefix + name] = child
        found |= _batch_norms(child, f"{prefix}{name}.")
    return found
