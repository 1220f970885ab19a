"""Create, read and write the folders of training runs.

    config.json        the options
    environment.json   versions, device, threads, commit, command line
    metrics.jsonl      one JSON object in each line: epoch 0 (before training), epoch 1, ...
    last.safetensors   the last checkpoint, from which the run can be resumed
    best.safetensors   the checkpoint with the best test accuracy

The folder is created in a hidden folder next to it and then renamed, so that a run exists
completely or not at all. (If the process is killed before the renaming, the hidden folder remains.
Nothing reads the hidden folder.) Later, each file is replaced in one step, except for
metrics.jsonl, to which lines are appended. If a run is interrupted before it saves the checkpoint
of an epoch, metrics.jsonl may have a line, or a part of a line, after that of the last checkpoint.
Such lines are removed when the run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npbn.checkpoint import Arrays, Record, load_checkpoint, save_checkpoint, write_file
from npbn.errors import CheckpointError

CHECKPOINTS = ("last", "best")


class Run:
    """The folder of a training run.

    Attributes:
        path: the path of the folder.
        config: the options of the run by name.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = dict(config)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        start: tuple[Mapping[str, Any], Arrays, Record],
        *,
        overwrite: bool = False,
    ) -> Run:
        """Create the folder of a new run, and return the run.

        Args:
            path: the path of the folder. Missing parent folders are created as well.
            config, environment: the contents of config.json and environment.json.
            start: the first line of the metrics, and the arrays and the record of the first
                checkpoint.
            overwrite: whether to replace an existing run of this name.

        Raises:
            CheckpointError: the folder cannot be written; a file or folder of this name exists and
                ``overwrite`` is false; or it exists and is not a run.
        """
        path = Path(path)
        cls.check_name(path, overwrite=overwrite)
        metrics, arrays, record = start
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
                run = cls(Path(beside) / "new", config)
                run.path.mkdir()
                _write_json(run.path / "config.json", config)
                _write_json(run.path / "environment.json", environment)
                run.append(metrics)
                run.save(arrays, record)
                if path.exists():
                    os.rename(path, Path(beside) / "old")
                os.rename(run.path, path)
        except OSError as error:
            raise _cannot_write(path, error) from None
        run.path = path
        return run

    @staticmethod
    def check_name(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Raise an error if `create` would not create a folder of this name.

        Raises:
            CheckpointError: a file or folder of this name exists and may not be overwritten.
        """
        if os.path.lexists(path):
            if not overwrite:
                raise CheckpointError(f"{path} exists")
            names = ("config.json", "metrics.jsonl")
            if not all(os.path.isfile(os.path.join(path, name)) for name in names):
                raise CheckpointError(f"{path} is not a run, and will not be overwritten")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Return the run in a folder.

        Raises:
            CheckpointError: the folder is not the folder of a run, or config.json is damaged.
        """
        path = Path(path)
        if not os.path.isdir(path):  # Path.is_dir may raise an error.
            raise CheckpointError(f"{path} is not a directory; expected the folder of a run")
        config = _read_json(path / "config.json")
        return cls(path, config)

    def environment(self) -> dict[str, Any]:
        """Return the versions, the device and the other facts in environment.json.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return _read_json(self.path / "environment.json")

    def load(self, which: str = "last") -> tuple[Arrays, Record]:
        """Return the arrays and the record of a checkpoint of this run, "last" or "best".

        Raises:
            CheckpointError: the checkpoint is missing, is damaged, or belongs to another run.
        """
        path = self.path / f"{which}.safetensors"
        arrays, record = load_checkpoint(path)
        if record.get("config") != self.config:
            raise CheckpointError(f"{path} is of another run than {self.path / 'config.json'}")
        return arrays, record

    def save(self, arrays: Arrays, record: Record, *, best: bool = False) -> None:
        """Replace the last checkpoint. If ``best`` is true, replace the best checkpoint first.

        Raises:
            CheckpointError: a checkpoint cannot be written. In this case, the earlier checkpoint is
                unchanged.
        """
        record = {**record, "config": self.config, "metrics_sha256": _digest(self._metrics())}
        for which in ("best", "last") if best else ("last",):
            save_checkpoint(self.path / f"{which}.safetensors", arrays, record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append the record of an epoch to the metrics.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(path, error) from None

    def records(self) -> list[Record]:
        """Return the records of the epochs. An incomplete last line is ignored.

        Raises:
            CheckpointError: the file is damaged.
        """
        lines = self._metrics().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise CheckpointError(f"{self.path / 'metrics.jsonl'} is damaged") from None

    def rewind(self, record: Record) -> None:
        """Remove the metrics of the epochs after a checkpoint.

        Args:
            record: the record of the checkpoint.

        Raises:
            CheckpointError: the metrics up to the checkpoint have changed since it was saved.
        """
        content = self._metrics()
        kept = b"".join(content.splitlines(keepends=True)[: record["epoch"] + 1])
        if _digest(kept) != record.get("metrics_sha256"):
            raise CheckpointError(
                f"{self.path / 'metrics.jsonl'} is damaged: its lines are not those that the last "
                "checkpoint knows"
            )
        if kept != content:
            try:
                write_file(self.path / "metrics.jsonl", kept)
            except OSError as error:
                raise _cannot_write(self.path / "metrics.jsonl", error) from None

    def _metrics(self) -> bytes:
        path = self.path / "metrics.jsonl"
        try:
            return path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return value
