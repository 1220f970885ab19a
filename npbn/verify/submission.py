"""Running somebody's code: in a process of its own, with a time limit.

The code under examination can crash, hang, print, or exit; all of that is a finding. What it
computes comes back as a NumPy archive, which holds arrays and nothing that could be executed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npbn.verify.examination import GRADIENTS, Examination, Outputs, examine, outputs, probes
from npbn.verify.signatures import Pair, UnsupportedError, adapt, guess


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
        path: the file.
        forward, backward: names of the functions; the same name twice where the forward pass
            returns the gradient as well (softmax_loss).
        operation: what they are to be, one of `npbn.verify.examination.OPERATIONS`.
        signature: of `npbn.verify.signatures`, or "auto" to go by the names of the arguments.
        adapter: "FILE:NAME" of a function (forward, backward) → the pair in npbn's signature, for
            signatures of your own.
        timeout: seconds for all probes together.

    Raises:
        ValueError: the file does not exist, or the operation is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    names = [probe.name for probe in probes(operation)]
    with tempfile.TemporaryDirectory(prefix="npbn-") as directory:
        task = {
            "path": str(path.resolve()),
            "forward": forward,
            "backward": backward,
            "operation": operation,
            "signature": signature,
            "adapter": adapter,
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
            failure = f"was not done after {timeout:.0f} seconds"
        results: dict[str, Outputs | str | None] = {}
        for k, name in enumerate(names):
            answer = Path(directory) / f"{k}.npz"
            message = Path(directory) / f"{k}.txt"
            if answer.is_file():
                with np.load(answer, allow_pickle=False) as archive:
                    results[name] = {key: archive[key] for key in archive.files}
            elif message.is_file():
                text = message.read_text(encoding="utf-8")
                results[name] = None if text == "unsupported" else text
            else:
                results[name] = failure
    return examine(operation, results)


def load(path: str, name: str) -> Callable[..., Any]:
    """A function of a Python file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _main(task: dict[str, Any]) -> None:
    """In the process of its own: run every probe, write what comes out or how it failed."""
    warnings.simplefilter("ignore")
    directory, operation = Path(task["directory"]), task["operation"]
    sys.path.insert(0, str(Path(task["path"]).parent))
    pair: Pair | None = None
    failure = ""
    try:
        forward, backward = (load(task["path"], task[name]) for name in ("forward", "backward"))
        if task["adapter"]:
            file, _, name = task["adapter"].rpartition(":")
            pair = load(file, name)(forward, backward)
        else:
            signature = task["signature"]
            if signature == "auto":
                signature = guess(operation, forward)
            pair = adapt(operation, forward, backward, signature)
    except (Exception, SystemExit) as error:
        failure = f"cannot be loaded: {_describe(error)}"
    for k, probe in enumerate(probes(operation)):
        try:
            if pair is None:
                raise _FailureError(failure)
            found = outputs(operation, pair, probe)
            arrays: dict[str, Any] = {n: a for n, a in found.items() if a.dtype.kind in "fiub"}
            missing = set(GRADIENTS[operation]) - arrays.keys()
            if missing:
                raise _FailureError(f"returned no numbers for {', '.join(sorted(missing))}")
            part = directory / f"{k}.part"
            with open(part, "wb") as file:
                np.savez(file, **arrays)
            part.replace(directory / f"{k}.npz")
        except UnsupportedError:
            (directory / f"{k}.txt").write_text("unsupported", encoding="utf-8")
        except _FailureError as error:
            (directory / f"{k}.txt").write_text(str(error), encoding="utf-8")
        except (Exception, SystemExit) as error:
            text = f"raised {_describe(error)}"
            (directory / f"{k}.txt").write_text(text, encoding="utf-8")


class _FailureError(Exception):
    """A finding, in words."""


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
