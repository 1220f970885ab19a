"""Run a file of other people's code in a separate process with limits, and send it requests.

The process starts in an empty folder, without this process's environment variables. It has limits
on time, memory, the size of files and the number of processes. On Linux, if the system allows it,
the process has no network, and all processes that it has started end when it ends.

This is not a sandbox: the code runs as the same user, and can read and write this user's files.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import npbn
from npbn.errors import SubmissionError
from npbn.verify.isolated.messages import Message, MessageError, receive, send

_BOOT = """
import sys, types
root = sys.argv.pop(1)
for name in ("npbn", "npbn.verify"):
    module = types.ModuleType(name)
    module.__path__ = [root + "/" + name.replace(".", "/")]
    sys.modules[name] = module
from npbn.verify.isolated.worker import main
main()
"""
"""A program that starts the worker without running ``npbn/__init__.py``.

So the right functions of npbn are not in the process.
"""


class EndedError(Exception):
    """The error that is raised if the process ended or did not answer in time.

    The message is the rest of a sentence that begins with "it": "was not done after 60 seconds".
    """


class Session:
    """A process that has loaded a file of homework.

    Args:
        path: the path of the file. The file is read once, when the session is made.
        timeout: the time limit for each request, in seconds.

    Attributes:
        names: the names of the functions and classes of the file; the values are "function" or
            "class".
        notes: sentences about statements that were changed or left out while loading.
        failure: why the file cannot be loaded, or an empty text.
        has_gaps: whether the file seems to be a template with gaps to fill in.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 60.0) -> None:
        self.path, self.timeout = Path(path), timeout
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.failure = ""
        try:
            self._content = self.path.read_bytes()
        except OSError as error:
            raise SubmissionError(f"{path} cannot be read: {error.strerror}") from None
        # Templates that courses hand out have gaps such as "x = None  # YOUR CODE HERE".
        gaps = len(re.findall(rb"=\s*None\b", self._content))
        self.has_gaps = gaps >= 3 and b"code here" in self._content.lower()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="npbn-", ignore_cleanup_errors=True)

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Start the process, or start it again, and load the file."""
        self.stop()
        environment = {
            "PATH": os.defpath,
            "HOME": self._folder.name,
            "TMPDIR": self._folder.name,
            "MPLBACKEND": "agg",
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        if sys.platform == "win32":
            environment |= {"SYSTEMROOT": os.environ["SYSTEMROOT"]}
        root = Path(npbn.__file__).parents[1]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _BOOT, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=environment,
            start_new_session=True,
        )
        try:
            answer, _ = self._ask(
                {"do": "load", "path": str(self.path.resolve())},
                {"content": np.frombuffer(self._content, np.uint8)},
            )
        except EndedError as error:
            self.failure = str(error)
            return
        if isinstance(answer, dict) and isinstance(answer.get("names"), dict):
            self.names = {str(k): str(v) for k, v in answer["names"].items()}
            notes = answer.get("notes")
            self.notes = [printable(n) for n in notes[:20]] if isinstance(notes, list) else []
            self.failure = ""
        else:
            text = answer.get("failed") if isinstance(answer, dict) else None
            self.failure = printable(text or "gave no result")

    def ensure_started(self) -> None:
        """Start the process again if it has ended."""
        if self._process is None and not self.failure:
            self.start()

    def stop(self) -> None:
        """End the process and all processes of its group."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()

    def ask(self, request: dict[str, Any], arrays: dict[str, Any] | None = None) -> Message:
        """Send a request and return the answer: values by name, and arrays.

        Raises:
            EndedError: the process has ended, did not answer in time, or gave no valid answer.
                Before the next request, it must be started again by `start`.
        """
        if self._process is None:
            raise EndedError(self.failure or "has ended")
        answer, found = self._ask(request, arrays or {})
        if not isinstance(answer, dict):
            self.stop()
            raise EndedError("gave no result")
        return answer, found

    def _ask(self, request: dict[str, Any], arrays: dict[str, Any]) -> Message:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            send(process.stdin.fileno(), request, arrays)
            return receive(process.stdout.fileno(), self.timeout)
        except TimeoutError:
            failure = f"was not done after {self.timeout:g} seconds"
        except (MessageError, BrokenPipeError):
            failure = "gave no result"
            end = time.monotonic() + 1
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            if process.returncode is not None:
                failure = f"ended its process with exit code {process.returncode}"
        self.stop()
        raise EndedError(failure)


def printable(text: Any) -> str:
    """Return a text in one line, without control characters, to print texts of unknown origin."""
    words = " ".join(str(text).split())[:500]
    return "".join(c if c.isprintable() else "�" for c in words)
