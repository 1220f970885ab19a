"""Running the command lines as a user would: as processes, from another directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"

# A machine without a network: nothing listens on port 9 of this machine.
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def run(
    script: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None, prelude: str = ""
) -> subprocess.CompletedProcess[str]:
    """``python scripts/SCRIPT ARGUMENTS``; ``prelude`` is Python code run in the process before."""
    environment = {k: v for k, v in os.environ.items() if k != "NPBN_DATA"} | (env or {})
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    if prelude:
        start = (
            f"import runpy, sys; sys.path.insert(0, {str((SCRIPTS / script).parent)!r})\n"
            "sys.argv = sys.argv[1:]\n"
            f"{prelude}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command[1:2] = ["-c", start, str(SCRIPTS / script)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def npbn_command(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``npbn ARGUMENTS``."""
    return subprocess.run(
        [sys.executable, "-m", "npbn", *arguments],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_refused(
    process: subprocess.CompletedProcess[str], *expected: str, code: int = 2
) -> None:
    """One clear line on standard error, this exit code, and no traceback."""
    assert process.returncode == code, process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for text in expected:
        assert text in lines[0]


GPU = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import emulated_gpu
if not emulated_gpu.driver():
    emulated_gpu.install()
"""
"""A prelude: CuPy computes in this process, on an emulated GPU if there is no other."""

CTRL_C = "os.kill(os.getpid(), signal.SIGINT)"


def after_step(step: int, action: str) -> str:
    """A prelude: in this process, do something after so many batches of training."""
    return f"""
import os, signal
from npbn.training import Training

def train(self, max_steps, on_batch, original=Training._train, count=[0]):
    def watched(examples):
        count[0] += 1
        if count[0] == {step}:
            {action}
        on_batch(examples)

    return original(self, max_steps, watched)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
Training._train = train
"""


class Trainer:
    """Runs scripts/train.py like `run`, without the seconds that its imports take; see trainer.py.

    The digits are loaded already, with 100 of the test images.
    """

    def __init__(self, folder: Path) -> None:
        self._outputs = folder / "stdout", folder / "stderr"
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("trainer.py"))],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments: str, cwd: Path, prelude: str = ""
    ) -> subprocess.CompletedProcess[str]:
        for path in self._outputs:
            path.write_text("")
        stdout, stderr = map(str, self._outputs)
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "prelude": prelude,
            "stdout": stdout,
            "stderr": stderr,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        outputs = (path.read_text() for path in self._outputs)
        return subprocess.CompletedProcess(["train.py", *arguments], code, *outputs)

    def close(self) -> None:
        self._process.communicate()
