"""Files that attack the grader, or stumble into it: each is marked by itself, and nothing else."""

from __future__ import annotations

import csv
import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from commands import ROOT, npbn_command
from npbn.errors import SubmissionError
from npbn.verify import examine_file
from npbn.verify.isolated.messages import MessageError, receive, send
from npbn.verify.session import EndedError, Session
from npbn.verify.submission import examine_in

RIGHT = """
import numpy as np
def relu_forward(x): return np.maximum(x, 0), x
def relu_backward(dy, x): return dy * (x > 0)
"""
WRONG = "def relu_forward(x): return x, x\ndef relu_backward(dy, x): return dy\n"
NONE = "def relu_forward(x): pass\ndef relu_backward(dy, x): pass\n"


def in_forward(code: str) -> str:
    """Homework that does something hostile when it is called."""
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    return (
        f"import os, sys\ndef relu_forward(x):\n{body}    return x, x\n{RIGHT.splitlines()[-1]}\n"
    )


FILES = {
    "ok": (RIGHT, "right"),
    "numpy": ("print('hijacked')\n" + WRONG, "wrong"),
    "copy": ("raise SystemExit\n" + WRONG, "wrong"),
    "exits": (in_forward("os._exit(0)"), "could not be run"),
    "exits when loaded": ("import os\nos._exit(0)\n" + RIGHT, "right"),
    "aborts": (in_forward("os.abort()"), "could not be run"),
    "hangs": (in_forward("while True: pass"), "could not be run"),
    "recursion": (in_forward("relu_forward(x)"), "could not be run"),
    "memory": (in_forward("a = bytearray(10**11)"), "could not be run"),
    "reference": ("from npbn.functional import relu as relu_forward, relu_backward\n", "missing"),
    "reference later": (
        in_forward("from npbn.functional import relu\nreturn relu(x)"),
        "could not be run",
    ),
    "skips": (
        in_forward("class NotExaminedError(Exception): pass\nraise NotExaminedError('shy')"),
        "could not be run",
    ),
    "garbage": (
        in_forward("[os.write(k, b'x' * 10**6) for k in range(1, 20)]"),
        "could not be run",
    ),
    "forged": (
        in_forward(
            'import struct\nt = b\'{"value": {"call": 0, "taken": ["x"]}, "arrays": []}\'\n'
            "[os.write(k, struct.pack('<QQ', len(t), 0) + t) for k in range(3, 9)]"
        ),
        "could not be run",
    ),
    "huge": (
        in_forward(
            "import struct\n[os.write(k, struct.pack('<QQ', 10**18, 10**18)) for k in range(3, 9)]"
        ),
        "could not be run",
    ),
    "objects": (in_forward("return [object()], x"), "could not be run"),
    "escape": (
        in_forward("raise ValueError('\\x1b[2K\\x1b[1Gright \\n=HYPERLINK(1)')"),
        "could not be run",
    ),
    "empty": ("", "missing"),
    "broken": ("def relu_forward(:", "missing"),
    "bytes": ("\0\0", "missing"),
    "not written": (NONE, "not written yet"),
    "patches": (
        "import sys, gc\n"
        "for module in list(sys.modules.values()):\n    module.outputs = lambda *_: None\n" + WRONG,
        "wrong",
    ),
}
# Some of these need processes and pipes of Linux; how they fail elsewhere is not tested.
ANYTHING_BUT_RIGHT = {"garbage", "forged", "huge", "reference later", "skips", "objects"}


@pytest.mark.skipif(sys.platform != "linux", reason="signals, pipes and limits of Linux")
def test_a_class_with_hostile_files_is_graded(tmp_path):
    folder = tmp_path / "submissions"
    folder.mkdir()
    for name, (source, _) in FILES.items():
        (folder / f"{name}.py").write_text(source)
    (folder / "=cmd.py").write_text(RIGHT)
    os.mkfifo(folder / "pipe.py")
    (folder / "link.py").symlink_to("/etc/hostname")
    (tmp_path / "relu.toml").write_text(
        '[[function]]\noperation = "relu"\nforward = "relu_forward"\nbackward = "relu_backward"\n'
    )
    process = npbn_command(
        *("grade", "submissions", "--assignment", "relu.toml", "--timeout", "5", "--edits", "0"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout and "hijacked" not in process.stdout
    records = json.loads((tmp_path / "marks" / "marks.json").read_text())
    verdicts = {record["student"]: record["verdict"] for record in records}
    for name, (_, verdict) in FILES.items():
        if name in ANYTHING_BUT_RIGHT:
            assert verdicts[name] in ("could not be run", "wrong", "can't tell"), name
        else:
            assert verdicts[name] == {"missing": "not found"}.get(verdict, verdict), name
    with open(tmp_path / "marks" / "marks.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + len(verdicts)
    assert "'=cmd" in {row[0] for row in rows}
    assert not any(cell.startswith("=") for row in rows for cell in row)
    for path in (tmp_path / "marks" / "feedback").iterdir():
        assert "\x1b" not in path.read_text(encoding="utf-8")


def test_the_reference_is_refused(tmp_path):
    path = tmp_path / "homework.py"
    path.write_text("from npbn.functional import relu as relu_forward, relu_backward\n")
    with pytest.raises(SubmissionError, match="npbn is the reference"):
        examine_file(path, "relu_forward", "relu_backward", "relu")


def test_homework_takes_no_place_of_the_standard_library(tmp_path):
    """Even of a module that nothing has imported yet."""
    (tmp_path / "fractions.py").write_text("raise SystemExit\n" + WRONG)
    path = tmp_path / "homework.py"
    path.write_text("from fractions import Fraction\nzero = float(Fraction(0))\n" + RIGHT)
    path.write_text(path.read_text().replace("maximum(x, 0)", "maximum(x, zero)"))
    assert examine_file(path, "relu_forward", "relu_backward", "relu").verdict == "right"


def test_code_that_ends_its_process_at_every_chance(tmp_path):
    """Also while the functions are chosen, in a second function of the same file."""
    source = (
        "import os\nclass Trap:\n    def __getattr__(self, name): os._exit(3)\n"
        "    def __call__(self, x): os._exit(3)\nrelu_forward = relu_backward = Trap()\n" + RIGHT
    ).replace("def relu_", "def fine_")
    path = tmp_path / "homework.py"
    path.write_text(source)
    with Session(path, 20) as session:
        for names, verdict in (
            (("relu_forward", "relu_backward"), "could not be run"),
            (("fine_forward", "fine_backward"), "right"),
        ):
            assert examine_in(session, *names, "relu", seed=1).verdict == verdict


def test_code_cannot_hide_where_it_fails(tmp_path):
    """An error without a line of the file may be the grader's, but is never left unexamined."""
    path = tmp_path / "homework.py"
    hidden = "def relu_forward(x):\n    if len(x) > 3: raise TypeError\n    return max(x, 0), x\n"
    hidden = hidden.replace("max(", "x.__class__.clip(")
    path.write_text(
        f"space = {{}}\nnone = exec({hidden!r}, space)\n{RIGHT}"
        + ("relu_forward = space['relu_forward']\n")
    )
    found = examine_file(path, "relu_forward", "relu_backward", "relu")
    assert found.verdict == "can't tell" and "could not be called" in str(found)
    path.write_text(path.read_text().replace("len(x) > 3", "True"))
    assert examine_file(path, "relu_forward", "relu_backward", "relu").verdict == "can't tell"


def test_results_that_nobody_has_thought_of(tmp_path):
    path = tmp_path / "homework.py"
    path.write_text(
        "import numpy as np\nclass Pair(tuple):\n    def __len__(self): raise KeyError('len')\n"
        "def f(x): return Pair((np.maximum(x, 0), x)) if len(x) > 4 else (np.maximum(x, 0), x)\n"
        "def b(dy, x): return dy * (x > 0)\n"
    )
    found = examine_file(path, "f", "b", "relu")
    assert found.verdict == "can't tell", str(found)
    assert "it could not be called: KeyError: 'len'" in str(found)


@pytest.mark.parametrize(
    ("forward", "backward", "verdict"),
    [
        ("np.maximum(x, 0).astype(np.longdouble)", "(dy * (x > 0)).astype('g')", "right"),
        ("np.maximum(x, 0)", "x > 0", "wrong"),
        ("x.astype('i8')", "(x > 0).astype('u1')", "wrong"),
        ("np.sqrt(x + 0j)", "dy * 1j", "wrong"),
        ("np.zeros((0, *x.shape))", "np.zeros(0)", "not written yet"),
    ],
)
def test_numbers_of_every_dtype_are_judged(forward, backward, verdict, tmp_path):
    path = tmp_path / "homework.py"
    path.write_text(
        f"import numpy as np\ndef f(x): return {forward}, x\ndef b(dy, x): return {backward}\n"
    )
    found = examine_file(path, "f", "b", "relu", edit_seconds=(1, 0))
    assert found.verdict == verdict, str(found)


class Liar:
    """A session whose process answers what it likes."""

    path, timeout, failure, has_gaps = Path("homework.py"), 5.0, "", False

    def __init__(self, answers) -> None:
        self.names = {"forward": "function", "backward": "function"}
        self.notes: list[str] = []
        self.answers = answers
        self.count = 0

    def start(self) -> None: ...

    def ensure_started(self) -> None: ...

    def ask(self, request, arrays):
        if request["do"] == "select":
            return {}, {}
        self.count += 1
        answer = self.answers[self.count % len(self.answers)]
        if answer is None:
            raise EndedError("ended")
        return answer


NAMES = ("y", "dx", "dlogits", "dgamma", "0", "1", "\u0660", "moving_mean", "")
KEYS = ("call", "taken", "changed", "order", "count", "named", "without dy", "changes", "raised")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ARRAYS = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
    st.sampled_from([(), (0,), (1,), (2, 3), (4, 5), (3, 4, 5), (0, 10**9)]),
    st.sampled_from(["f2", "f4", "f8", "g", "?", "i1", "u8", "c8", "c16", "G"]),
    st.sampled_from([0, 1, -3.5, np.nan, np.inf]),
)
ANSWERS = st.none() | st.tuples(
    st.dictionaries(st.sampled_from(KEYS), VALUES)
    | st.fixed_dictionaries({"call": st.integers(0, 9), "count": st.just(1)}),
    st.dictionaries(st.sampled_from(NAMES), ARRAYS)
    | st.fixed_dictionaries({"y": ARRAYS, "0": ARRAYS}),
)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("operation", ["relu", "batch_norm", "softmax_cross_entropy"])
@given(answers=st.lists(ANSWERS, min_size=1, max_size=6))
@example(answers=[({"call": 0, "count": 1}, {"y": np.zeros((5, 4)), "\u0660": np.zeros((5, 4))})])
def test_what_a_process_answers_is_judged_and_never_an_error(operation, answers):
    liar = Liar(answers)
    found = examine_in(liar, "forward", "backward", operation, seed=1, edit_seconds=(1, 0))
    assert found.verdict in ("wrong", "could not be run", "can't tell", "not written yet")
    assert str(found)


@pytest.mark.parametrize(
    "listed",
    [
        *([["y", dtype, [1]]] for dtype in ("(((", "f3", "O", "V8", "M8", "f8,f8", "<f8 ", "", 3)),
        *([["y", "<f8", shape]] for shape in ([-1], [1.0], [True], "1", None, [2], [10**30])),
        *([], [["y", "<f8", [0, 10**30]]], [["y", "<f8", [1] * 99]], [["y"]], 3, None),
    ],
    ids=repr,
)
def test_a_message_of_another_form_is_refused(listed):
    text = json.dumps({"value": {}, "arrays": listed}).encode()
    reader, writer = os.pipe()
    try:
        os.write(writer, struct.pack("<QQ", len(text), 8) + text + bytes(8))
        if listed == []:
            assert receive(reader, 60) == ({}, {})
        else:
            with pytest.raises(MessageError):
                receive(reader, 60)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("dtype", ["?", "i4", "u8", "f2", "f8", "c16"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_a_message_arrives_as_it_was_sent(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    reader, writer = os.pipe()
    try:
        send(writer, {"a": [1, "b"]}, {"y": array[..., ::-1] if shape else array})
        value, arrays = receive(reader, 60)
    finally:
        os.close(reader)
        os.close(writer)
    assert value == {"a": [1, "b"]} and arrays.keys() == {"y"}
    np.testing.assert_array_equal(arrays["y"], array[..., ::-1] if shape else array, strict=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_process_is_left(tmp_path):
    """Neither a child that the code starts, nor one that has left its group."""
    word = f"left-{os.getpid()}-{time.time_ns()}"
    child = f"import time; time.sleep(300); {word!r}"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
    )
    (tmp_path / "lingers.py").write_text(in_forward(code))
    npbn_command("check", "lingers.py:relu_forward,relu_backward", "--op", "relu", cwd=tmp_path)
    for _ in range(100):
        if not any(word in line for line in command_lines()):
            return
        time.sleep(0.1)
    if os.geteuid() == 0:  # Others may not be allowed to make a process space.
        pytest.fail("a process is left")


def command_lines() -> list[str]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/cmdline", encoding="utf-8", errors="replace") as file:
                    found.append(file.read())
            except OSError:
                continue
    return found


def test_the_child_knows_nothing_of_the_grader(tmp_path):
    """Neither its environment, nor its folder, nor npbn."""
    source = """
import os, sys
ours = [m for m in sys.modules if m.partition(".")[0] == "npbn"]
found = [os.getcwd(), sorted(os.environ), sys.argv, ours]
def relu_forward(x): raise ValueError(repr(found))
def relu_backward(dy, x): pass
"""
    (tmp_path / "homework.py").write_text(source)
    process = npbn_command(
        *("check", "homework.py:relu_forward,relu_backward", "--op", "relu"),
        cwd=tmp_path,
        env={"SECRET": "1"},
    )
    assert process.returncode == 1
    assert "SECRET" not in process.stdout and "[]]" in process.stdout
    assert str(ROOT) not in process.stdout and str(tmp_path) not in process.stdout
