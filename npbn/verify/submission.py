"""Examine a file of other people's code in a separate process, with a time limit.

The code may crash, hang, print or exit, and this must not harm the process of the examiner. The
results of the code come back in a NumPy archive, which contains only arrays and no executable code.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npbn.errors import SubmissionError
from npbn.verify.examination import Examination, Outputs, examine, outputs
from npbn.verify.operations import NotExaminedError, probes
from npbn.verify.signatures import BadResultError, adapt, guess


def examine_file(
    path: str | os.PathLike[str],
    forward: str,
    backward: str,
    operation: str,
    *,
    signature: str = "auto",
    adapter: str | None = None,
    timeout: float = 60.0,
) -> Examination:
    """Examine two functions of a file of Python code.

    Args:
        path: the path of the file.
        forward, backward: the names of the functions. The two names are equal if the forward pass
            also returns the gradient (softmax_loss), or if the code is a class (with an adapter).
        operation: the operation that the functions compute, a name in
            `npbn.verify.operations.OPERATIONS`.
        signature: one of `npbn.verify.signatures.SIGNATURES`, or "auto" to guess the signature from
            the names of the arguments.
        adapter: "FILE:FUNCTION", the place of a function that gets forward and backward and returns
            a pair in npbn's signature. Code with any other signature needs such an adapter; see
            `npbn.verify.signatures`.
        timeout: the time limit for all probes together, in seconds.

    Raises:
        SubmissionError: the code cannot be examined, but its author did not make a mistake: the
            file or a function does not exist, or the adapter does not work.
        ValueError: the operation is unknown.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise SubmissionError(f"{path} is not a file")
    if path.suffix != ".py":
        raise SubmissionError(f"{path} is no Python file: its name does not end in .py")
    adapter_file, _, adapter_name = (adapter or "").rpartition(":")
    if adapter and not os.path.isfile(adapter_file):
        raise SubmissionError(f"expected FILE:FUNCTION for the adapter, got {adapter!r}")
    results: dict[str, Outputs | str | NotExaminedError] = {}
    with tempfile.TemporaryDirectory(prefix="npbn-") as directory:
        task = {
            "path": str(path.resolve()),
            "forward": forward,
            "backward": backward,
            "operation": operation,
            "signature": signature,
            "adapter_file": str(Path(adapter_file).resolve()) if adapter else "",
            "adapter_name": adapter_name,
            "directory": directory,
        }
        command = [sys.executable, "-m", "npbn.verify.submission", json.dumps(task)]
        failure = "gave no result"
        try:
            process = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
                check=False,
            )
            if process.returncode != 0:
                failure = f"ended its process with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            failure = f"was not done after {timeout:g} seconds"
        refused = _told(directory, "refused")
        if refused:
            raise SubmissionError(refused)
        failure = _told(directory, "failed") or failure
        changed = _told(directory, "changed")
        for k, probe in enumerate(probes(operation)):
            answer = Path(directory) / f"{k}.npz"
            unsupported = _told(directory, f"{k}.unsupported")
            if answer.is_file():
                with np.load(answer, allow_pickle=False) as archive:
                    results[probe.name] = dict(archive)
            elif unsupported:
                results[probe.name] = NotExaminedError(unsupported)
            else:
                results[probe.name] = _told(directory, f"{k}.failed") or failure
    return examine(operation, results, changed.split())


def _tell(directory: str, name: str, text: str) -> None:
    (Path(directory) / f"{name}.txt").write_text(text, "utf-8", "backslashreplace")


def _told(directory: str, name: str) -> str:
    file = Path(directory) / f"{name}.txt"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def load(path: str) -> Any:
    """Load a Python file, and return the module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _main(task: dict[str, Any]) -> None:
    """Run the code on every probe, in the separate process, and write the results to files.

    For each probe, a file contains the outputs, or says how the code failed or why it was not run.
    """
    warnings.simplefilter("ignore")
    path, operation, directory = task["path"], task["operation"], task["directory"]
    # The code may open files and import modules that are in its own folder.
    os.chdir(Path(path).parent)
    sys.path.insert(0, str(Path(path).parent))
    signature, adapter = task["signature"], task["adapter_file"]
    try:
        module = load(path)
    except (Exception, SystemExit) as error:
        _tell(directory, "failed", f"cannot be loaded: {_describe(error, path)}")
        return
    for function in (task["forward"], task["backward"]):
        if not callable(getattr(module, function, None)):
            _tell(directory, "refused", f"{Path(path).name} has no function {function}")
            return
    forward, backward = getattr(module, task["forward"]), getattr(module, task["backward"])
    if adapter:
        try:
            forward, backward = getattr(load(adapter), task["adapter_name"])(forward, backward)
        except (Exception, SystemExit) as error:
            _tell(directory, "refused", f"the adapter raised {_describe(error, adapter)}")
            return
        signature = "npbn"
    elif signature == "auto":
        signature = guess(operation, forward)
    forward, backward = adapt(operation, forward, backward, signature)
    changed: dict[str, None] = {}
    forward = _watched(forward, (), changed)
    backward = _watched(backward, () if operation == "softmax_cross_entropy" else ("dy",), changed)
    for k, probe in enumerate(probes(operation)):
        try:
            arrays: dict[str, Any] = outputs(operation, (forward, backward), probe)
            strange = [name for name, array in arrays.items() if array.dtype.kind not in "fiub"]
            if strange:
                raise BadResultError(f"returned no numbers for {', '.join(strange)}")
            part = Path(directory) / f"{k}.part"
            with open(part, "wb") as file:
                np.savez(file, **arrays)
            part.replace(Path(directory) / f"{k}.npz")
            _tell(directory, "changed", " ".join(changed))
        except NotExaminedError as error:
            _tell(directory, f"{k}.unsupported", str(error) or "it is not meant for this")
        except BadResultError as error:
            _tell(directory, f"{k}.failed", str(error))
        except (Exception, SystemExit) as error:
            if adapter and _line(error, adapter) and not _line(error, path):
                _tell(directory, "refused", f"the adapter raised {_describe(error, adapter)}")
                return
            _tell(directory, f"{k}.failed", f"raised {_describe(error, path)}")


def _watched(
    function: Callable[..., Any], names: tuple[str, ...], changed: dict[str, None]
) -> Callable[..., Any]:
    """Return a function that calls ``function`` and notes which arguments it changes in place.

    Args:
        function: the function to call.
        names: the names of the positional arguments.
        changed: a dictionary to which the names of the changed arguments are added, as keys.
    """

    def call(*values: Any, **arguments: Any) -> Any:
        given = dict(zip(names, values, strict=False)) | arguments
        before = copy.deepcopy(given)
        result = function(*values, **arguments)
        changed.update(
            (name, None) for name in given if not np.array_equal(given[name], before[name])
        )
        return result

    return call


def _describe(error: BaseException, path: str) -> str:
    text = " ".join(str(error).split())
    line = _line(error, path)
    return type(error).__name__ + f": {text}" * bool(text) + f", line {line}" * (line is not None)


def _line(error: BaseException, path: str) -> int | None:
    """Return the number of the file's innermost line in the traceback of an error, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == path), None)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
