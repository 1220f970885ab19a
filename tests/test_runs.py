"""The folder of a run: whole or not there, and what happens if a part of it is not what it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import portalocker
import pytest

from commands import assert_refused
from disks import DAMAGES, contents, unchanged
from npbn import runs
from npbn.errors import CheckpointError
from npbn.runs import LIMITS, Run

CONFIG = {"epochs": 3, "lr": 0.1, "data": None, "name": "é"}
ENVIRONMENT = {"npbn": "0.1.0"}
LINES = ("metrics.jsonl", "layers.jsonl")
ARRAYS = {"model.w": np.arange(6.0)}


def layers(number: int) -> dict:
    norms = [{"gamma": [1.0, number], "beta": [0.0, 0.5]}]
    return {"number": number, "batch_norm": norms, "preactivations": {"2": [number] * 80}}


def metrics(number: int, **changed) -> dict:
    measured = {"loss": 0.1, "accuracy": 0.9, "examples": 5, "seconds": 1}
    train = measured if number else None
    return {"number": number, "step": 3 * number, "train": train, "test": None} | changed


def create(path: Path, config=CONFIG, **options) -> Run:
    start = (metrics(0), layers(0), ARRAYS, {"epoch": 0})
    return Run.create(path, config, ENVIRONMENT, start, **options)


def go_on(run: Run, epoch: int) -> None:
    run.append(metrics(epoch), layers(epoch))
    run.save({"model.w": np.arange(6.0) + epoch}, {"epoch": epoch}, best=epoch == 1)


@pytest.fixture
def run(tmp_path) -> Run:
    """Of two epochs, the first of them the better one; no process writes it any more."""
    run = create(tmp_path / "run")
    go_on(run, 1)
    go_on(run, 2)
    run.unlock()
    return run


def test_what_was_written_is_read(run, tmp_path):
    found = Run.open(tmp_path / "run")
    assert (found.path, found.config, found.environment()) == (run.path, CONFIG, ENVIRONMENT)
    assert [line["number"] for line in found.records()] == [0, 1, 2]
    for which, epoch in (("last", 2), ("best", 1)):
        arrays, record = found.load(which)
        np.testing.assert_array_equal(arrays["model.w"], np.arange(6.0) + epoch)
        assert record["epoch"] == epoch
    assert list(tmp_path.iterdir()) == [run.path]


def test_a_new_run_has_a_checkpoint_at_once_and_folders_above_are_made(tmp_path):
    run = create(tmp_path / "a" / "b" / "run")
    assert run.load()[1]["epoch"] == 0
    assert set(contents(tmp_path / "a" / "b")) == {"run"} | {
        f"run/{name}"
        for name in ("config.json", "environment.json", "last.safetensors", "lock", *LINES)
    }


def test_a_run_is_overwritten_only_if_asked_for(run, tmp_path):
    other = CONFIG | {"epochs": 9}
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="run exists"):
        create(run.path, other)
    assert create(run.path, other, overwrite=True).config == other
    assert Run.open(run.path).config == other
    assert not (run.path / "best.safetensors").exists()  # which was the other run's
    assert list(tmp_path.iterdir()) == [run.path]
    assert create(tmp_path / "new", overwrite=True).load()


@pytest.mark.parametrize("what", ["file", "empty folder", "project", "link to nowhere"])
def test_what_is_no_run_is_never_overwritten(what, tmp_path):
    path = tmp_path / "run"
    if what == "file":
        path.write_text("precious")
    elif what == "link to nowhere":
        path.symlink_to("nowhere")
    else:
        path.mkdir()
        if what == "project":  # many have a file of that name
            (path / "config.json").write_text("{}")
            (path / "precious").write_text("precious")
    with unchanged(tmp_path):
        with pytest.raises(CheckpointError, match="run exists"):
            create(path)
        with pytest.raises(CheckpointError, match="run is not a run, and will not be overwritten"):
            create(path, overwrite=True)
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["file/run", "a" * 300])
def test_a_folder_that_cannot_be_made(name, tmp_path):
    (tmp_path / "file").write_text("")
    with unchanged(tmp_path), pytest.raises(CheckpointError, match="cannot be written: "):
        create(tmp_path / name)


@pytest.mark.parametrize("step", ["mkdir", "fsync", "replace", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_in_the_middle_leaves_nothing(step, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(os, step, fail)
    with unchanged(tmp_path), pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        create(tmp_path / "run")
    if isinstance(error, OSError):
        assert str(caught.value).endswith("cannot be written: No space left on device")


def test_what_json_cannot_hold_leaves_nothing(tmp_path):
    with unchanged(tmp_path), pytest.raises(TypeError, match="not JSON serializable"):
        create(tmp_path / "run", {"x": object()})


def test_what_killed_processes_left_does_not_disturb(run):
    for name in (".run-abcdef", ".run-1"):
        shutil.copytree(run.path, run.path.parent / name / "new")
    for path in (*run.path.iterdir(),):
        (run.path / f".{path.name}-{os.getpid()}").write_bytes(b"half")
        (run.path / f".{path.name}-1").write_bytes(b"half")
    found = Run.open(run.path)
    assert found.load()[1]["epoch"] == 2
    go_on(found, 3)
    found.rewind(found.load()[1])
    assert [line["number"] for line in found.records()] == [0, 1, 2, 3]
    create(run.path, overwrite=True)


# One process at a time


def in_another_process(path: Path, program: str) -> str:
    """What it prints; ``create`` is there, and P is the path."""
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]}
from pathlib import Path
from npbn.errors import CheckpointError
from npbn.runs import Run
from test_runs import CONFIG, create
P = Path({str(path)!r})
try:
    {program}
except CheckpointError as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_run_that_is_being_written_is_locked(run):
    expected = f"CheckpointError {run.path} is being written by process {os.getpid()} on "
    run.lock()
    for program in ("Run.open(P).lock()", "create(P, overwrite=True)"):
        with unchanged(run.path.parent):
            said = in_another_process(run.path, program)
        assert said.startswith(expected), said
    assert in_another_process(run.path, "print(Run.open(P).load()[1]['epoch'])") == "2"
    run.unlock()
    assert in_another_process(run.path, "Run.open(P).lock()") == ""


def test_a_new_run_is_locked(tmp_path):
    run = create(tmp_path / "run")
    assert "is being written by" in in_another_process(run.path, "Run.open(P).lock()")
    del run  # which releases the lock
    assert in_another_process(tmp_path / "run", "Run.open(P).lock()") == ""


def test_the_lock_of_a_killed_process_is_free(run):
    program = "Run.open(P).lock(); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(subprocess.CalledProcessError):
        in_another_process(run.path, program)
    assert "process" in (run.path / "lock").read_text()
    run.lock()


def test_a_run_replaced_between_opening_and_locking(run, monkeypatch):
    def lock(file, flags, original=portalocker.lock):
        original(file, flags)
        monkeypatch.undo()
        other = create(run.path.parent / "other")
        shutil.rmtree(run.path)
        os.rename(other.path, run.path)

    monkeypatch.setattr(portalocker, "lock", lock)
    with pytest.raises(CheckpointError, match="run is being replaced by another process"):
        run.lock()


def test_a_file_system_without_locks(run, monkeypatch):
    def lock(*_):
        raise portalocker.LockException(OSError(38, "Function not implemented"))

    monkeypatch.setattr(portalocker, "lock", lock)
    with pytest.raises(CheckpointError, match=r"lock cannot be locked: .*Function not implemented"):
        run.lock()


def test_of_several_creators_exactly_one_wins(tmp_path):
    """They all come to the last step at once."""
    wait = """
import os, time
def rename(*paths, original=os.rename):
    (P.parent / f"ready-{os.getpid()}").touch()
    while len(list(P.parent.glob("ready-*"))) < 3:
        time.sleep(0.001)
    original(*paths)
os.rename = rename
print(create(P, CONFIG | {"who": os.getpid()}).config["who"])
"""
    wait = f"exec({wait!r})"
    with ThreadPoolExecutor(3) as pool:
        path = tmp_path / "runs" / "run"
        path.parent.mkdir()
        said = sorted(pool.map(lambda _: in_another_process(path, wait), range(3)))
    assert said[1:] == [f"RunExistsError {path} exists"] * 2
    assert Run.open(path).config["who"] == int(said[0])
    assert {p.name for p in path.parent.glob("[!r]*")} | {"run"} == {"run"}


def test_a_run_is_read_whole_while_it_is_written(run):
    """The best checkpoint, the last one, metrics and layers, a hundred times."""
    writer = threading.Thread(target=lambda: [go_on(run, epoch) for epoch in range(3, 40)])
    writer.start()
    reads = 0
    while writer.is_alive() or reads < 100:
        found = Run.open(run.path)
        assert found.load()[1]["epoch"] <= len(found.records())
        assert found.load("best")[1]["epoch"] == 1
        assert len(found.layers()) >= 3
        reads += 1
    writer.join()
    assert len(run.layers()) == 40


def test_the_best_checkpoint_is_written_before_the_last(run, monkeypatch):
    """So the last one, from which a run is resumed, never knows of a best one that is not there."""
    written = []
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, *_: written.append(path.name))
    run.save(ARRAYS, {"epoch": 2}, best=True)
    assert written == ["best.safetensors", "last.safetensors"]


def test_only_the_limits_may_change(run):
    arrays, record = run.load()
    run.extend(CONFIG | {"epochs": 9}, arrays, record)
    for found in (run, Run.open(run.path)):
        assert found.config == CONFIG | {"epochs": 9}
        assert found.load()[1]["config"]["epochs"] == 9
        assert found.load("best")[1]["config"]["epochs"] == 3
    with pytest.raises(AssertionError):
        run.extend(CONFIG | {"lr": 9}, arrays, record)


# metrics.jsonl


def test_lines_of_the_metrics_are_short_whatever_the_network(trained):
    for line in (trained / "metrics.jsonl").read_bytes().splitlines():
        assert len(line) <= 1000
    assert len(Run.open(trained).layers()[0]["preactivations"]) == 4


@pytest.mark.parametrize(
    "edited",
    [
        [],
        {},
        {"number": 1},
        metrics(2),
        metrics(1, step=None),
        metrics(1, train=None),
        metrics(1, train=3),
        metrics(1, train=metrics(1)["train"] | {"loss": "x"}),
        metrics(1, test={"loss": 0.1, "accuracy": 0.2, "examples": 5}),
    ],
)
def test_metrics_edited_by_hand(edited, run):
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    lines[1] = json.dumps(edited)
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged: line 2"):
        run.records()


@pytest.mark.parametrize(
    "edited",
    [
        *("", "[]", "{}", '{"number": 1, "batch_norm": 1}', '{"number": "1"}', "[" * 10**5),
        layers(2),
        layers(1) | {"batch_norm": None},
        layers(1) | {"batch_norm": []},
        layers(1) | {"batch_norm": [{"gamma": [1.0, 2.0]}]},
        layers(1) | {"batch_norm": [{"gamma": [1.0, "2"], "beta": [1.0, 2.0]}]},
        layers(1) | {"batch_norm": [{"gamma": [1.0], "beta": [1.0, 2.0]}]},
        layers(1) | {"preactivations": [[1] * 80]},
        layers(1) | {"preactivations": {}},
        layers(1) | {"preactivations": {"2": 80}},
    ],
    ids=lambda edited: str(edited)[:60],
)
def test_layers_edited_by_hand(edited, run):
    lines = (run.path / "layers.jsonl").read_text().splitlines()
    lines[1] = edited if isinstance(edited, str) else json.dumps(edited)
    (run.path / "layers.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"layers\.jsonl is damaged"):
        run.layers()


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line["preactivations"]["2"].pop(),
        lambda line: line["batch_norm"][0].pop("beta"),
        lambda line: line["batch_norm"][0].update(more=[1.0]),
    ],
)
def test_the_same_damage_in_every_line_of_the_layers(damage, run):
    path = run.path / "layers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        damage(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=r"layers\.jsonl is damaged"):
        run.layers()


def test_layers_of_an_epoch_without_metrics_are_not_read(run):
    """As after a kill between the two lines."""
    with open(run.path / "layers.jsonl", "a") as file:
        file.write(json.dumps(layers(3)) + "\n")
    assert [line["number"] for line in run.layers()] == [0, 1, 2]


def test_a_lock_names_only_its_last_holder(run):
    (run.path / "lock").write_text("a holder whose name is very long\n" * 10)
    run.lock()
    text = (run.path / "lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ") and len(text.splitlines()) == 1


@pytest.mark.parametrize("more", [b"", b'{"number": 3}\n', b'{"number": 3}\n{"num', b'{"n', b"\n"])
def test_lines_beyond_the_checkpoint_go(more, run):
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + more)
    run.rewind(run.load()[1])
    assert path.read_bytes() == whole
    go_on(run, 3)
    run.rewind(run.load()[1])
    assert [line["number"] for line in run.records()] == [0, 1, 2, 3]


def test_a_line_that_is_not_finished_is_not_read(run):
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"number": 3')
    assert [line["number"] for line in run.records()] == [0, 1, 2]


def test_a_checkpoint_in_the_middle_of_an_epoch_keeps_the_lines_before(run):
    run.save(ARRAYS, {"epoch": 2, "batch": 5})
    run.append(metrics(3), layers(3))
    run.rewind(run.load()[1])
    assert [line["number"] for line in run.records()] == [0, 1, 2]


@pytest.mark.parametrize("change", [lambda c: c[1:], lambda c: c[:-2], lambda c: c.upper()])
def test_lines_that_are_not_those_of_the_checkpoint(change, run):
    path = run.path / "metrics.jsonl"
    path.write_bytes(change(path.read_bytes()))
    with unchanged(run.path), pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
        run.rewind(run.load()[1])
    path.write_text("not JSON\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged"):
        run.records()


# Damage, piece by piece


def flipped(content: bytes) -> bytes:
    """One bit: of a name in the environment, elsewhere in the middle."""
    place = content.find(b'"npbn": ') + 1 or len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGE = {
    "flipped": lambda path, content: path.write_bytes(flipped(content)),
    **{
        name: DAMAGES[name]
        for name in ("missing", "empty", "cut", "not UTF-8", "an array", "a directory")
    },
}
READ_BY = {
    "config.json": lambda path: Run.open(path).load(),
    "environment.json": lambda path: Run.open(path).environment(),
    "metrics.jsonl": lambda path: Run.open(path).rewind(Run.open(path).load()[1]),
    "layers.jsonl": lambda path: Run.open(path).rewind(Run.open(path).load()[1]),
    "last.safetensors": lambda path: Run.open(path).load(),
    "best.safetensors": lambda path: Run.open(path).load("best"),
}


@pytest.fixture(scope="module")
def trained(trainer, tmp_path_factory) -> Path:
    """A run that was interrupted; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained")
    options = ("--dataset", "digits", "--limit-train", "32", "--backend", "numpy", "--epochs", "2")
    stop = """
import os, signal
from npbn.training import Training
def evaluate(self, original=Training._evaluate):
    os.kill(os.getpid(), signal.SIGINT)
    return original(self)
Training._evaluate = evaluate
"""
    process = trainer(*options, "--run", "run", cwd=folder, prelude=stop)
    assert process.returncode == 130, process.stderr
    return folder / "run"


@pytest.mark.parametrize("piece", READ_BY)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_piece_is_named(piece, damage, trained, trainer, tmp_path):
    """By --resume too, in one line, before anything is changed."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / piece
    content = path.read_bytes()
    path.unlink()
    DAMAGE[damage](path, content)
    with unchanged(tmp_path):
        if (piece, damage) == ("environment.json", "flipped"):
            assert READ_BY[piece](tmp_path / "run") != json.loads(content)
        else:
            with pytest.raises(CheckpointError) as caught:
                READ_BY[piece](tmp_path / "run")
            assert piece in str(caught.value) and "\n" not in str(caught.value)
    if piece == "best.safetensors" or (piece, damage) == ("environment.json", "flipped"):
        return  # which do not matter for going on
    with unchanged(tmp_path):
        assert_refused(trainer("--resume", "run", cwd=tmp_path), "train.py: error:", f"run/{piece}")


@pytest.mark.parametrize("piece", ["config.json", "last.safetensors", "best.safetensors"])
def test_a_piece_of_another_run_is_refused(piece, run, tmp_path):
    other = create(tmp_path / "other", CONFIG | {"lr": 0.2})
    go_on(other, 1)
    shutil.copy(other.path / piece, run.path / piece)
    which = "best" if piece == "best.safetensors" else "last"
    with pytest.raises(CheckpointError, match=r"is of another run than .*config\.json"):
        Run.open(run.path).load(which)


def test_every_bit_of_the_configuration_matters(trained, tmp_path):
    """Some flips are still JSON; a number of threads, a name, a value: none of it is used."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            Run.open(tmp_path / "run").load()
        except CheckpointError:
            continue
        # Of the limits, those of the checkpoint count. Else: one kind of white space for another.
        found, right = ({**json.loads(c), **dict.fromkeys(LIMITS)} for c in (damaged, content))
        assert found == right


def test_nothing_is_done_with_a_configuration_that_no_checkpoint_vouches_for(
    trained, trainer, tmp_path
):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text()) | {"dataset": "fashion-mnist", "data": "no/such/place"}
    path.write_text(json.dumps(config))
    process = trainer("--resume", "run", cwd=tmp_path)
    assert_refused(process, "last.safetensors is of another run than run/config.json")


def test_resume_ends_in_one_line_where_the_run_is_of_another_version(trained, trainer, tmp_path):
    """An option that is missing from a configuration that is otherwise whole."""
    shutil.copytree(trained, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    arrays, record = run.load()
    del run.config["precise_bn"]
    (run.path / "config.json").write_text(json.dumps(run.config))
    run.save(arrays, record)
    with unchanged(tmp_path):
        process = trainer("--resume", "run", cwd=tmp_path)
    assert_refused(process, "run/config.json: precise_bn: missing")
