"""Create, read and write the folders of training runs.

    config.json        the options
    environment.json   versions, device, threads, commit, command line
    metrics.jsonl      one JSON object in each line: epoch 0 (before training), epoch 1, ...
    layers.jsonl       γ, β and histograms of the layers, with the same lines
    last.safetensors   the last checkpoint, from which the run can be resumed
    best.safetensors   the checkpoint with the best test accuracy
    lock               the process that writes this run, or that wrote it last

A process locks a run before it writes to the folder, so that only one process writes at a time. The
operating system releases the lock when the process ends, however it ends. Reading needs no lock.

The folder is created in a hidden folder next to it and then renamed, so that a run exists
completely or not at all. (If the process is killed before the renaming, the hidden folder remains.
Nothing reads the hidden folder.) Later, each file is replaced in one step, except for metrics.jsonl
and layers.jsonl, to which lines are appended. If a run is interrupted before it saves the
checkpoint of an epoch, these files may have a line, or a part of a line, after that of the last
checkpoint. Such lines are removed when the run is resumed.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import portalocker

from npbn.checkpoint import Arrays, Record, load_checkpoint, read_file, save_checkpoint, write_file
from npbn.errors import CheckpointError, RunExistsError
from npbn.inspection import HISTOGRAM_EDGES

CHECKPOINTS = ("last", "best")
LIMITS = ("epochs", "max_steps")
"""The options that may change when a run is resumed."""
_LINES = _METRICS, _LAYERS = "metrics.jsonl", "layers.jsonl"
_MEASURED = ("loss", "accuracy", "examples", "seconds")


class Run:
    """The folder of a training run.

    Attributes:
        path: the path of the folder.
        config: the options of the run by name.
    """

    _lock: IO[str] | None = None  # the open file whose lock this process holds

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.config = dict(config)

    def __del__(self) -> None:
        self.unlock()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        start: tuple[Record, Record, Arrays, Record],
        *,
        overwrite: bool = False,
    ) -> Run:
        """Create the folder of a new run, and return the run, locked by this process.

        If several processes create a run of the same name at the same time, one of them succeeds.

        Args:
            path: the path of the folder. Missing parent folders are created as well.
            config, environment: the contents of config.json and environment.json.
            start: the first lines of metrics.jsonl and layers.jsonl, and the arrays and the record
                of the first checkpoint.
            overwrite: whether to replace an existing run of this name.

        Raises:
            RunExistsError: a file or folder of this name exists and ``overwrite`` is false.
            CheckpointError: the folder cannot be written; the existing folder is not a run; or
                another process is writing the existing run.
        """
        path = Path(path)
        cls.check_name(path, overwrite=overwrite)
        metrics, layers, arrays, record = start
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
                run = cls(Path(beside) / "new", config)
                run.path.mkdir()
                run._acquire()
                _write_json(run.path / "config.json", config)
                _write_json(run.path / "environment.json", environment)
                run.append(metrics, layers)
                run.save(arrays, record)
                if os.path.lexists(path):
                    cls.check_name(path, overwrite=overwrite)
                    old = cls(path, {})
                    old.lock()
                    os.rename(path, Path(beside) / "old")
                os.rename(run.path, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and path.exists():
                raise RunExistsError(f"{path} exists") from None
            raise _cannot_write(path, error) from None
        run.path = path
        return run

    @staticmethod
    def check_name(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Raise an error if `create` would not create a folder of this name.

        Raises:
            RunExistsError: a file or folder of this name exists and ``overwrite`` is false.
            CheckpointError: the existing folder is not a run.
        """
        if os.path.lexists(path):
            if not overwrite:
                raise RunExistsError(f"{path} exists")
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

    def lock(self) -> None:
        """Lock the run for this process, until `unlock` or until the process ends.

        Raises:
            CheckpointError: another process has locked the run, or the run cannot be locked.
        """
        try:
            self._acquire()
        except OSError as error:
            raise _cannot_write(self.path / "lock", error) from None

    def _acquire(self) -> None:
        path = self.path / "lock"
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(open(path, "a+", encoding="utf-8"))
            try:
                portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
            except portalocker.AlreadyLocked:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise CheckpointError(f"{self.path} is being written by {holder}") from None
            except portalocker.LockException as error:
                raise CheckpointError(f"{path} cannot be locked: {error}") from None
            # Another process may have replaced the run after the file was opened.
            if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                raise CheckpointError(f"{self.path} is being replaced by another process")
            started = datetime.datetime.now().isoformat(" ", timespec="seconds")
            holder = f"process {os.getpid()} on {platform.node()} since {started}\n"
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), holder.encode())
            self._lock = file
            closing.pop_all()  # The file stays open.

    def unlock(self) -> None:
        """Release the lock. This also happens when the object is deleted."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def environment(self) -> dict[str, Any]:
        """Return the versions, the device and the other facts in environment.json.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return _read_json(self.path / "environment.json")

    def load(self, which: str = "last") -> tuple[Arrays, Record]:
        """Return the arrays and the record of a checkpoint of this run, "last" or "best".

        The entry "config" of the record contains the options. Its `LIMITS` may differ from those in
        config.json.

        Raises:
            CheckpointError: the checkpoint is missing, is damaged, or belongs to another run.
        """
        path = self.path / f"{which}.safetensors"
        arrays, record = load_checkpoint(path)
        if _fixed(record.get("config")) != _fixed(self.config):
            raise CheckpointError(f"{path} is of another run than {self.path / 'config.json'}")
        return arrays, record

    def save(self, arrays: Arrays, record: Record, *, best: bool = False) -> None:
        """Replace the last checkpoint. If ``best`` is true, replace the best checkpoint first.

        Raises:
            CheckpointError: a checkpoint cannot be written. In this case, the earlier checkpoint is
                unchanged.
        """
        digests = {f"{Path(name).stem}_sha256": _digest(self._read(name)) for name in _LINES}
        record = {**record, "config": self.config, **digests}
        for which in ("best", "last") if best else ("last",):
            save_checkpoint(self.path / f"{which}.safetensors", arrays, record)

    def extend(self, config: Mapping[str, Any], arrays: Arrays, record: Record) -> None:
        """Change `LIMITS` in the last checkpoint, whose limits count, and in config.json.

        Args:
            config: the new options.
            arrays, record: the content of the last checkpoint.

        Raises:
            CheckpointError: a file cannot be written.
        """
        assert _fixed(config) == _fixed(self.config)
        self.config = dict(config)
        self.save(arrays, record)
        try:
            _write_json(self.path / "config.json", config)
        except OSError as error:
            raise _cannot_write(self.path / "config.json", error) from None

    def append(self, metrics: Record, layers: Record) -> None:
        """Append the metrics of an epoch, and what was recorded of the layers after it.

        Raises:
            CheckpointError: a file cannot be written.
        """
        # `records` relies on this order: each line of the metrics has its line of the layers.
        for name, record in ((_LAYERS, layers), (_METRICS, metrics)):
            path = self.path / name
            try:
                with open(path, "ab") as file:
                    file.write(json.dumps(record).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(path, error) from None

    def records(self) -> list[Record]:
        """Return the metrics of the epochs. An incomplete last line is ignored.

        Raises:
            CheckpointError: the file is damaged.
        """
        records = self._lines(_METRICS)
        if not records:
            raise CheckpointError(f"{self.path / _METRICS} is damaged: it has no lines")
        for number, record in enumerate(records):
            if not _are_metrics(record, number):
                raise CheckpointError(f"{self.path / _METRICS} is damaged: line {number + 1}")
        return records

    def layers(self) -> list[Record]:
        """Return what was recorded of the layers, for each record of `records`.

        Raises:
            CheckpointError: a file is damaged.
        """
        count = len(self.records())
        lines = self._lines(_LAYERS)[:count]
        sizes = [_sizes(line, number) for number, line in enumerate(lines)]
        if len(sizes) < count or sizes[0] is None or any(size != sizes[0] for size in sizes):
            raise CheckpointError(f"{self.path / _LAYERS} is damaged")
        return lines

    def rewind(self, record: Record) -> None:
        """Remove the lines of the epochs after a checkpoint.

        Args:
            record: the record of the checkpoint.

        Raises:
            CheckpointError: the lines up to the checkpoint have changed since it was saved.
        """
        for name in _LINES:
            content, path = self._read(name), self.path / name
            kept = b"".join(content.splitlines(keepends=True)[: record["epoch"] + 1])
            if _digest(kept) != record.get(f"{path.stem}_sha256"):
                raise CheckpointError(
                    f"{path} is damaged: its lines are not those that the last checkpoint knows"
                )
            if kept != content:
                try:
                    write_file(path, kept)
                except OSError as error:
                    raise _cannot_write(path, error) from None

    def _lines(self, name: str) -> list[Any]:
        try:
            return [json.loads(line) for line in self._read(name).split(b"\n")[:-1]]
        except (ValueError, RecursionError):
            raise CheckpointError(f"{self.path / name} is damaged: it is not JSON") from None

    def _read(self, name: str) -> bytes:
        return read_file(self.path / name)


def _fixed(config: Any) -> Any:
    """Return the options that never change."""
    if not isinstance(config, Mapping):
        return config
    return {name: value for name, value in config.items() if name not in LIMITS}


def _are_metrics(record: Any, number: int) -> bool:
    """Return whether a value has the fields of `npbn.training.Epoch` that are read again."""

    def measured(part: Any) -> bool:
        return isinstance(part, dict) and all(
            isinstance(part.get(name), int | float) for name in _MEASURED
        )

    return (
        isinstance(record, dict)
        and record.get("number") == number
        and isinstance(record.get("step"), int)
        and {"train", "test"} <= record.keys()
        and (measured(record["train"]) or (number == 0 and record["train"] is None))
        and (measured(record["test"]) or record["test"] is None)
    )


def _sizes(line: Any, number: int) -> list[dict[str, int]] | None:
    """Return the lengths of all lists in a line of layers.jsonl, or None if it is damaged."""
    if not isinstance(line, dict) or line.get("number") != number:
        return None
    norms, counts = line.get("batch_norm"), line.get("preactivations")
    if not isinstance(norms, list) or not isinstance(counts, dict):
        return None
    for part in (*norms, counts):
        if not isinstance(part, dict) or (part is not counts and part.keys() != {"gamma", "beta"}):
            return None
        for values in part.values():
            if not isinstance(values, list) or not all(isinstance(v, int | float) for v in values):
                return None
    if any(len(values) != len(HISTOGRAM_EDGES) - 1 for values in counts.values()):
        return None
    return [{name: len(values) for name, values in part.items()} for part in (*norms, counts)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {error.strerror or error}")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: expected a JSON object")
    return value
