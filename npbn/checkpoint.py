"""State in, state out: checkpoints that are whole or not there, and files for PyTorch.

A checkpoint is one file in the safetensors format (huggingface.co/docs/safetensors): named arrays,
and with them a record, JSON in the file's metadata. Nothing in it can be executed. Its SHA-256 over
the metadata also hold a checksum, so that a damaged file is recognized.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from npbn.errors import CheckpointError
from npbn.layers import BatchNorm, Layer, Sequential

FORMAT = 1
"""The version of the record's layout; files of a later one are refused."""

Arrays = dict[str, np.ndarray]
Record = dict[str, Any]
PathLike = str | os.PathLike[str]


def write_file(path: PathLike, content: bytes) -> None:
    """Write a file whole or not at all, so that a crash leaves the old one or the new one.

    (If the process is killed, a hidden file next to it remains, which nothing reads.)

    Raises:
        OSError: it cannot be written; an old file of that name is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave it empty
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C must leave nothing behind either
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: PathLike, arrays: Mapping[str, np.ndarray], record: Record) -> None:
    """Write arrays and a record of what JSON can hold.

    Raises:
        CheckpointError: the file cannot be written; an old one of that name is unchanged.
    """
    # Little-endian and contiguous, as in the file, so that the SHA-256 is that of the file.
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
    """The arrays and the record of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, is damaged, is none, or is of a later version.
    """
    arrays, metadata = _read(path)
    text = metadata.get("npbn")
    if text is None:
        raise CheckpointError(f"{path} is no checkpoint of npbn: it has no record")
    try:
        record = json.loads(text)
    except ValueError:
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
        with open(path, "rb") as file:  # what safetensors says about a missing file is less clear
            empty = not file.read(1)
        if empty:
            raise CheckpointError(f"{path} is empty")
        with safetensors.safe_open(path, framework="numpy") as file:
            # keys() has to be called: the file is no dict that could be iterated over.
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
        # TypeError and AttributeError: a dtype that NumPy does not have.
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}") from None


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# PyTorch's names of the arrays of a batch norm. Other layers have its names, weight and bias.
_TORCH_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}
_COUNT = "num_batches_tracked"


def export_torch(model: Sequential, path: PathLike) -> None:
    """Write the state of a model as PyTorch's modules have it, for ``load_state_dict``.

    With the equivalent ``nn.Sequential``, one module a layer in the same order (a batch norm is
    ``nn.BatchNorm1d`` or ``nn.BatchNorm2d``), in PyTorch:

        model.load_state_dict(safetensors.torch.load_file(path))

    γ, β and the moving statistics become (C,); no value is changed. What the file does not hold,
    and the modules have to be given: eps, and PyTorch's momentum, which is 1 - npbn's. In later
    training the statistics will differ, for PyTorch's running variance is the unbiased one.

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
    """Take over the state of the equivalent PyTorch model, written by safetensors.

    That is, ``safetensors.torch.save_file(model.state_dict(), path)``; see `export_torch`.

    Raises:
        CheckpointError: the file cannot be read, or is of another model. Nothing is changed then.
    """
    arrays, _ = _read(path)
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
    """Return every batch norm of a model, by name."""
    found: dict[str, BatchNorm] = {}
    for name, child in layer.children().items():
        if isinstance(child, BatchNorm):
            found[prefix + name] = child
        found |= _batch_norms(child, f"{prefix}{name}.")
    return found
