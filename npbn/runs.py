"""A run's folder: what was asked for, on what it ran, what each epoch found, and checkpoints.

    config.json        the options
    environment.json   versions, device, threads, commit, command line
    metrics.jsonl      one JSON object a line: epoch 0 (before training), epoch 1, ...
    last.safetensors   the state to go on from
    best.safetensors   the state with the best test accuracy

The folder is created atomically: built in a hidden sibling, then renamed (the sibling stays if the
process is killed before, and nothing reads it). From then on every file in it is replaced in one
step but metrics.jsonl, which grows: lines beyond the last checkpoint's epoch, whole or not, are of
an epoch that was cut short, and go when the run goes on.
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
    """The folder of one run.

    Attributes:
        path: the folder.
        config: the options, by name.
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
        """A new folder.

        Args:
            path: of the folder; those above it are made if need be.
            config, environment: what JSON can hold.
            start: the metrics' first line, and arrays and record of the first checkpoint.
            overwrite: replace a run that is there.

        Raises:
            CheckpointError: there is something of that name already, and ``overwrite`` is false or
                it is no run; or the folder cannot be written.
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
        """Whether `create` may make a folder of that name.

        Raises:
            CheckpointError: there is something already that may not be overwritten.
        """
        if os.path.lexists(path):
            if not overwrite:
                raise CheckpointError(f"{path} exists")
            names = ("config.json", "metrics.jsonl")
            if not all(os.path.isfile(os.path.join(path, name)) for name in names):
                raise CheckpointError(f"{path} is not a run, and will not be overwritten")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in a folder.

        Raises:
            CheckpointError: it is no run, or its configuration is damaged.
        """
        path = Path(path)
        if not os.path.isdir(path):  # where Path.is_dir may raise
            raise CheckpointError(f"{path} is not a directory; expected the folder of a run")
        config = _read_json(path / "config.json")
        return cls(path, config)

    def environment(self) -> dict[str, Any]:
        """Versions, device and threads when the run started.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return _read_json(self.path / "environment.json")

    def load(self, which: str = "last") -> tuple[Arrays, Record]:
        """A checkpoint of this run.

        Raises:
            CheckpointError: it is not there, damaged, or of another run.
        """
        path = self.path / f"{which}.safetensors"
        arrays, record = load_checkpoint(path)
        if record.get("config") != self.config:
            raise CheckpointError(f"{path} is of another run than {self.path / 'config.json'}")
        return arrays, record

    def save(self, arrays: Arrays, record: Record, *, best: bool = False) -> None:
        """Replace the last checkpoint, and the best one before it if asked to.

        Raises:
            CheckpointError: it cannot be written; the earlier one is intact then.
        """
        record = {**record, "config": self.config, "metrics_sha256": _digest(self._metrics())}
        for which in ("best", "last") if best else ("last",):
            save_checkpoint(self.path / f"{which}.safetensors", arrays, record)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add an epoch to the metrics.

        Raises:
            CheckpointError: it cannot be written.
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
        """Return the metrics of each epoch. An unfinished last line is left out.

        Raises:
            CheckpointError: the file is damaged.
        """
        lines = self._metrics().split(b"\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            raise CheckpointError(f"{self.path / 'metrics.jsonl'} is damaged") from None

    def rewind(self, record: Record) -> None:
        """Drop the metrics that are later than a checkpoint's record.

        Raises:
            CheckpointError: those up to the checkpoint are not what they were.
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
