"""A hundred damages of a run's folder, and every command that reads one: one line, or it works.

Nothing may end in a traceback, hang, or take the damage for the run's result.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from disks import DAMAGES
from npbn import data
from npbn.checkpoint import load_checkpoint, save_checkpoint
from npbn.commands import command_line, evaluate, export, plot, predict, runs, train

if not hasattr(signal, "setitimer") or not hasattr(os, "mkfifo"):
    pytest.skip("needs alarms and pipes", allow_module_level=True)

COMMANDS = {
    "evaluate": (evaluate, ["run"]),
    "predict": (predict, ["run", "--index", "0"]),
    "plot": (plot, ["run"]),
    "runs": (runs, ["."]),
    "runs --csv": (runs, [".", "--csv"]),
    "export": (export, ["run", "model.safetensors"]),
    "train --resume": (train, ["--resume", "run", "--epochs", "2"]),
    "train --from": (
        train,
        [*("--from", "run", "--dataset", "digits", "--limit-train", "32", "--epochs", "1")],
    ),
}
FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "layers.jsonl"),
    *("last.safetensors", "best.safetensors", "lock"),
)


CASES = [(file, kind) for file in FILES for kind in DAMAGES]


@pytest.fixture(scope="module")
def trained(trainer, tmp_path_factory) -> Path:
    """A run of one epoch; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained")
    options = ("--dataset", "digits", "--limit-train", "32", "--backend", "numpy", "--epochs", "1")
    process = trainer(*options, "--engine", "layers", "--run", "run", cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder / "run"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[[str], tuple[int, str]]:
    """Run a command here, as the program would; return its exit code and the one line of error."""
    few = data.load("digits")
    few = few.limited(32)
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> tuple[int, str]:
        module, words = COMMANDS[name]
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{name} hangs"))
        signal.setitimer(signal.ITIMER_REAL, 300)
        before = [signal.getsignal(number) for number in command_line.SIGNALS]
        try:
            with pytest.raises(SystemExit) as end:
                command_line.run("npbn", lambda: module.main("npbn", list(words)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in zip(command_line.SIGNALS, before, strict=True):
                signal.signal(number, handler)
        _, said = capsys.readouterr()
        code = end.value.code or 0
        refused = 2 if "NaN or infinite" not in said else 3
        assert (code, len(said.splitlines())) in ((0, 0), (refused, 1)), (name, code, said)
        assert not said or said.startswith("npbn: error: ")
        return code, said

    return call


# In the suite, each damage is shown to one command; with HYPOTHESIS_PROFILE=long, to all of them.
EVERY = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def some_commands(case: int) -> list[str]:
    """The commands for a case of a table."""
    names = list(COMMANDS)
    return names if EVERY else [names[case * 3 % len(names)]]


@pytest.mark.parametrize(("file", "kind"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_damaged_file_is_named_or_not_needed(file, kind, trained, tmp_path, command):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / file
    content = path.read_bytes()
    path.unlink()
    DAMAGES[kind](path, content)
    for name in some_commands(CASES.index((file, kind))):
        code, said = command(name)
        assert code == 0 or file in said or "holds no runs" in said or "no epoch yet" in said, said


ODD: dict[str, dict[str, object]] = {
    "another format": {"format": 1},
    "a format that is no number": {"format": [[]]},
    "no format": {"format": None},
    "another model": {"model": "blenet"},
    "an activation of another kind": {"activation": 5},
    "a huge side": {"model": "blenet", "side": 10**9},
    "a side of 0": {"model": "blenet", "side": 0},
    "a side that is no number": {"model": "blenet", "side": "28"},
    "other channels": {"model": "blenet", "channels": 3},
    "no channels": {"model": "blenet", "channels": None},
    "no classes": {"classes": []},
    "too few classes": {"classes": ["a"]},
    "classes that are no texts": {"classes": list(range(10))},
    "strange classes": {
        "classes": ["\n", "\x1b[31m", "$x$", "_", "", "é", "a" * 10000, "\u202e", "g", "h"]
    },
    "another dtype": {"dtype": "float64"},
    "half precision": {"dtype": "float16"},
    "huge threads": {"threads": 10**30},
    "batches of 0": {"batch_size": 0},
    "huge batches": {"batch_size": 10**30},
    "a rate of NaN": {"lr": float("nan")},
    "a huge rate": {"lr": 1e308},
    "no batch norm": {"no_batch_norm": True},
    "a flag that is a number": {"precise_bn": 1},
    "a negative seed": {"seed": -1},
    "an unknown backend": {"backend": "torch"},
    "a GPU that is not there": {"backend": "cupy"},
    "an unknown data set": {"dataset": "imagenet"},
    "data of no directory": {"dataset": "idx", "data": None},
    "a field too many": {"more": 1},
}


@pytest.mark.parametrize("kind", ODD, ids=lambda value: value.replace(" ", "-"))
def test_odd_configurations_that_the_checkpoints_confirm(kind, trained, tmp_path, command):
    """They work, or end in one line."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text()) | ODD[kind]
    path.write_text(json.dumps(config))
    for which in ("last", "best"):
        file = tmp_path / "run" / f"{which}.safetensors"
        arrays, record = load_checkpoint(file)
        save_checkpoint(file, arrays, record | {"config": json.loads(json.dumps(config))})
    for name in some_commands(list(ODD).index(kind)):
        command(name)


WEIGHTS: dict[str, Callable[[dict], object]] = {
    "NaN": lambda arrays: arrays["model.0.weight"].fill(np.nan),
    "infinity": lambda arrays: arrays["model.12.weight"].fill(np.inf),
    "half precision": lambda arrays: arrays.update(
        {name: value.astype(np.float16) for name, value in arrays.items()}
    ),
    "none": lambda arrays: arrays.clear(),
    "one missing": lambda arrays: arrays.pop("model.1.gamma"),
    "one too many": lambda arrays: arrays.update({"model.99.weight": np.ones(3)}),
    "a strange name": lambda arrays: arrays.update({"\n\x1b[31m": np.ones(3)}),
    "another shape": lambda arrays: arrays.update({"model.0.weight": np.ones((6, 1, 3, 3))}),
    "negative variances": lambda arrays: arrays["model.1.moving_var"].fill(-1),
}


@pytest.mark.parametrize("kind", WEIGHTS, ids=lambda value: value.replace(" ", "-"))
def test_odd_weights(kind, trained, tmp_path, command):
    """They are refused in one line; no prediction is made of NaN."""
    shutil.copytree(trained, tmp_path / "run")
    for which in ("last", "best"):
        file = tmp_path / "run" / f"{which}.safetensors"
        arrays, record = load_checkpoint(file)
        arrays = {name: np.array(value) for name, value in arrays.items()}
        WEIGHTS[kind](arrays)
        save_checkpoint(file, arrays, record)
    for name in (
        list(COMMANDS) if EVERY else ["predict", some_commands(list(WEIGHTS).index(kind))[0]]
    ):
        code, said = command(name)
        if kind not in ("half precision", "a strange name") and not name.startswith("runs"):
            assert code == 2, (name, said)
