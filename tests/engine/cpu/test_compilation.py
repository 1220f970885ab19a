"""Compiling the kernels: the cache, several processes, and machines without Numba."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import assert_refused, run
from npbn.errors import UnsupportedError

HERE = Path(__file__).parent

try:
    from npbn.engine.cpu import compilation
except UnsupportedError as error:
    NO_NUMBA = str(error)
else:
    NO_NUMBA = ""
needs_numba = pytest.mark.skipif(bool(NO_NUMBA), reason=NO_NUMBA)


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([*map(str, HERE.parents[:2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / "training_process.py"), *arguments],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert not errors
    return json.loads(output.splitlines()[-1])


@needs_numba
def test_the_life_of_a_cache(tmp_path):
    """One test, because its processes take long, and each needs what those before have left."""
    cache = tmp_path / "cache"

    # Two processes compile at once, and both train.
    processes = [start(cache), start(cache)]
    one, other = (finish(process) for process in processes)
    assert one["losses"] == other["losses"]
    for found in (one, other):
        assert found["compiled"] > 0
        assert found["lines"][0].startswith("compiling ")
        assert found["lines"][0].endswith(" kernels, once for this machine")

    # A later one compiles nothing.
    later = finish(start(cache, "forks"))
    assert later["losses"] == one["losses"]
    assert later["compiled"] == 0 and later["lines"] == []
    # One that is forked from it is told why it cannot train, one that is spawned trains.
    if later["layer"] == "workqueue":
        assert later["forked"] == f"trained: {later['losses']}"
    else:
        assert later["forked"].startswith("BackendError: this process was forked from one that")
        assert "\n" not in later["forked"]
    assert later["spawned"] == later["losses"]

    # Files are empty or cut off, as after a power cut: those of code, and their indices.
    codes, indices = (sorted(cache.rglob(pattern)) for pattern in ("*.nbc", "*.nbi"))
    assert len(codes) > 1 < len(indices)
    for files in (codes, indices):
        for i, path in enumerate(files):
            os.truncate(path, path.stat().st_size // 2 if i % 2 else 0)
    assert finish(start(cache))["losses"] == one["losses"]


@needs_numba
@pytest.mark.parametrize("place", ["a file", "in a file", "in a folder that is not there"])
def test_kernels_are_compiled_wherever_the_cache_is(place, tmp_path, monkeypatch):
    from numba import config, njit

    @njit
    def kernel(x):
        return x + 1

    (tmp_path / "file").touch()
    name = {"a file": "file", "in a file": "file/cache"}.get(place, "folder/cache")
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / name))
    with compilation._cached([kernel], compilation.cache_directory("float32")):
        assert kernel(1) == 2
    assert str(tmp_path / name) == config.CACHE_DIR
    assert len([*tmp_path.rglob("*.nbc")]) == (place == "in a folder that is not there")


# Without Numba.

REASON = "no module for this Python, says the stand-in"


@pytest.fixture
def without_numba(tmp_path) -> dict[str, str]:
    """An environment in which numba cannot be imported."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "numba.py").write_text(f"raise ImportError({REASON!r})\n")
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": paths}


TRAIN = ("--dataset", "digits", "--backend", "numpy", "--epochs", "1", "--max-steps", "3")


def test_without_numba_the_layers_train_and_one_line_says_why(without_numba, tmp_path):
    process = run("train.py", *TRAIN, cwd=tmp_path, env=without_numba)
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if REASON in line]
    assert len(lines) == 1 and re.search(
        r"by layers( on \d+ threads?)? \(it needs Numba, which cannot be imported", lines[0]
    )


def test_without_numba_the_fused_engine_is_refused(without_numba, tmp_path):
    process = run("train.py", *TRAIN, "--engine", "fused", cwd=tmp_path, env=without_numba)
    assert_refused(process, "--engine fused", REASON)


def test_without_numba_npbn_and_its_interface_are_imported(without_numba):
    """And with it they do not import it."""
    code = "import sys, npbn, npbn.engine; assert 'numba' not in sys.modules"
    for environment in (without_numba, {}):
        subprocess.run([sys.executable, "-c", code], env=os.environ | environment, check=True)


@needs_numba
def test_where_numba_is_told_not_to_compile_the_layers_train(tmp_path):
    process = run("train.py", *TRAIN, cwd=tmp_path, env={"NUMBA_DISABLE_JIT": "1"})
    assert process.returncode == 0, process.stderr
    assert re.search(r"by layers( on \d+ threads?)? \(NUMBA_DISABLE_JIT is set", process.stdout)
