"""Grade the homework of a class by an assignment, which says what each function is worth.

A file in TOML describes the assignment::

    title = "Assignment 2"

    [[function]]
    operation = "batch_norm"
    forward = "batchnorm_forward"        # a function, or a class
    backward = "batchnorm_backward"      # left out for a class, and for a loss with its gradient
    points = 4

    [[function]]
    operation = "conv2d"
    forward = "conv_forward_naive"
    backward = "conv_backward_naive"
    points = 6
    promises = ["padding at least 1", "the stride divides"]

Code that is wrong only for inputs that break the promises gets the verdict "right where the
assignment asks". Without an assignment, the operations of functions and classes are guessed from
their names.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from npbn import backend
from npbn.errors import SubmissionError
from npbn.verify.examination import (
    ASKED,
    CONVENTION,
    UNDECIDED,
    UNLOADED,
    Examination,
)
from npbn.verify.isolated.calling import BACKWARD_METHODS, FORWARD_METHODS
from npbn.verify.isolated.loading import decoded, notebook_source, parsed
from npbn.verify.operations import OPERATIONS, PROMISES, probes
from npbn.verify.session import Session, printable
from npbn.verify.submission import examine_in

NOT_FOUND = "not found"
"""The verdict on a function that is in no file of the student."""

KNOWN = {demand for name in OPERATIONS for demand in (p.beyond for p in probes(name)) if demand}
"""What an assignment may ask (``asks``) beyond the usual, such as "padding" or "large logits"."""


@dataclass(frozen=True)
class Task:
    """A function or class that the assignment asks for.

    Attributes:
        operation: the name of the operation that it should compute.
        forward, backward: the names of the functions. The two names are equal for a class, and for
            a loss function that also returns its gradient.
        points: the number of points for right code.
        promises: what the assignment promises of its inputs; see
            `npbn.verify.operations.PROMISES`.
        asks: what the assignment asks beyond the usual; see `KNOWN`.
    """

    operation: str
    forward: str
    backward: str
    points: float = 1.0
    promises: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the title of the task's column in a table."""
        return self.forward


@dataclass(frozen=True)
class Assignment:
    """The title and the tasks of an assignment. If there are no tasks, each file's are guessed."""

    title: str = "homework"
    tasks: tuple[Task, ...] = ()


@dataclass(frozen=True)
class Grade:
    """The verdict on one function of one student.

    Attributes:
        student: the name of the student's file or folder.
        task: the task, from the assignment or guessed.
        file: the path of the file, or an empty text if no file has the function.
        verdict: the verdict, or `NOT_FOUND`.
        examination: the examination, or None if the code was not examined.
        text: the report for the student.
    """

    student: str
    task: Task
    file: str
    verdict: str
    examination: Examination | None
    text: str

    @property
    def points(self) -> float:
        """Return all points of the task if the code is right, else 0."""
        return self.task.points if self.verdict in ("right", CONVENTION, ASKED) else 0.0

    @property
    def open(self) -> bool:
        """Return whether the verdict is open, so that a person has to decide."""
        return self.verdict in (UNDECIDED, UNLOADED, "could not be run")

    def record(self) -> dict[str, Any]:
        """Return the grade as a dict for JSON."""
        found = self.examination
        mistakes = (
            []
            if found is None
            else [
                {"name": m.name, "explanation": m.explanation}
                for c in found.mistakes[:1]
                for m in c
            ]
        )
        changes = () if found is None else found.changes
        return {
            "student": self.student,
            "file": self.file,
            "function": self.task.forward,
            "operation": self.task.operation,
            "verdict": self.verdict,
            "forward": "not examined" if found is None else found.forward,
            "backward": "not examined" if found is None else found.backward,
            "mistakes": mistakes,
            "lines": [change.line for change in changes],
            "edits": [] if found is None else list(found.edits),
            "complaints": [] if found is None else list(found.complaints),
            "conventions": [] if found is None else list(found.conventions),
            "beyond": [] if found is None else list(found.beyond),
            "not_examined": []
            if found is None
            else [note for note in found.notes if "not examined" in note],
            "points": self.points,
            "max_points": self.task.points,
        }


# The assignment.


def read_assignment(path: str | os.PathLike[str]) -> Assignment:
    """Return the assignment in a TOML file.

    Raises:
        SubmissionError: the file cannot be read, or an entry is unknown or wrong. The message
            names the entry.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SubmissionError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SubmissionError(f"{path} is no TOML: {printable(error)}") from None
    _known(path, "the file", found, {"title": str, "function": list})
    tasks = tuple(_task(path, k, entry) for k, entry in enumerate(found.get("function", ()), 1))
    if not tasks:
        raise SubmissionError(f"{path}: expected at least one [[function]]")
    return Assignment(found.get("title", Path(path).stem), tasks)


_ENTRY = {
    "operation": str,
    "forward": str,
    "backward": str,
    "points": (int, float),
    "promises": list,
    "asks": list,
}


def _known(path: Any, where: str, entry: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(entry, dict):
        raise SubmissionError(f"{path}, {where}: expected a table")
    for name, value in entry.items():
        if name not in types:
            raise SubmissionError(
                f"{path}, {where}: expected one of {', '.join(types)}, got {name}"
            )
        if not isinstance(value, types[name]):
            raise SubmissionError(f"{path}, {where}: {name} has the wrong type: {value!r}")


def _task(path: Any, number: int, entry: Any) -> Task:
    where = f"function {number}"
    _known(path, where, entry, _ENTRY)
    for name in ("operation", "forward"):
        if name not in entry:
            raise SubmissionError(f"{path}, {where}: {name} is missing")
    for name, allowed in (("promises", PROMISES), ("asks", KNOWN)):
        for value in entry.get(name, ()):
            if value not in allowed:
                known = ", ".join(repr(text) for text in sorted(allowed))
                raise SubmissionError(f"{path}, {where}: {name}: expected {known}, got {value!r}")
    if entry["operation"] not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise SubmissionError(
            f"{path}, {where}: operation: expected one of {known}, got {entry['operation']!r}"
        )
    if entry.get("points", 1) < 0:
        raise SubmissionError(f"{path}, {where}: points: expected a number >= 0")
    return Task(
        entry["operation"],
        entry["forward"],
        entry.get("backward", entry["forward"]),
        float(entry.get("points", 1)),
        tuple(entry.get("promises", ())),
        tuple(entry.get("asks", ())),
    )


# The students' files.


def students(paths: Sequence[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """Return the files of each student, by the student's name.

    If there is only one path and it is a folder, this is the folder of the class: each file and
    each folder in it belongs to one student. Otherwise, each path belongs to one student.

    Raises:
        SubmissionError: there is no such file or folder, or there is nothing to grade.
    """
    found: dict[str, list[Path]] = {}

    def add(path: Path) -> None:
        files = [path] if path.is_file() else sorted(_files(path))
        if files:
            name = printable(path.name if path.is_dir() else path.stem)
            while name in found:
                name += "'"
            found[name] = files

    for given in paths:
        path = Path(given)
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise SubmissionError(f"{path} is no Python file and no notebook")
            add(path)
        elif path.is_dir():
            # A single argument is the folder of the class.
            entries = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")))
            for entry in entries if len(paths) == 1 else [path]:
                if entry.is_dir() or entry.suffix in SUFFIXES:
                    add(entry)
        else:
            raise SubmissionError(f"{path} does not exist")
    if not found:
        raise SubmissionError("there is nothing to grade: expected Python files and notebooks")
    return found


SUFFIXES = (".py", ".ipynb")
MOST_FILES = 1000


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "_")))
        for name in sorted(names):
            if Path(name).suffix in SUFFIXES and not name.startswith("."):
                count += 1
                if count > MOST_FILES:
                    return
                yield Path(directory) / name


def source_of(path: Path) -> str:
    """Return the code of a file or a notebook, or an empty text if it cannot be read."""
    try:
        content = path.read_bytes()[: 10**7]
        return notebook_source(content) if path.suffix == ".ipynb" else decoded(content)
    except (OSError, ValueError):
        return ""


def syntax_tree(source: str) -> ast.Module | None:
    """Return the syntax tree of code in Python 3 or 2, or None if it cannot be parsed."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return parsed(source)[0]
    return None


def defined(path: Path) -> dict[str, set[str]]:
    """Return the names of the functions and classes of a file, each with the names of its methods.

    The file is parsed, not executed. If it cannot be parsed, a regular expression finds the
    functions.
    """
    source = source_of(path)
    tree = syntax_tree(source)
    if tree is None:
        return {name: set() for name in re.findall(r"^def (\w+)\(", source, re.M)}
    found: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = set()
        elif isinstance(node, ast.ClassDef):
            found[node.name] = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


GUESSES = (
    (r"transpose|conv1d|conv3d|deconv|activation|model|network|layer1|fused", None),
    (r"(affine|linear|conv|fc|batchnorm|bn).*(relu|pool|sigmoid|bn|batchnorm)", None),
    (r"spatial.*(batch|bn)|batchnorm2d|bn2d", "spatial_batch_norm"),
    (r"spatial.*group|group_?norm", "group_norm"),
    (r"batch_?norm|^bn", "batch_norm"),
    (r"layer_?norm", "layer_norm"),
    (r"(avg|average|mean)_?pool", "avg_pool2d"),
    (r"pool", "max_pool2d"),
    (r"^conv", "conv2d"),
    (r"affine|linear|dense|fully_?connected|^fc", "linear"),
    (r"leaky_?relu", "leaky_relu"),
    (r"relu", "relu"),
    (r"tanh", "tanh"),
    (r"(soft_?max.*(loss|entropy))|cross_?entropy", "softmax_cross_entropy"),
    (r"sigmoid", "sigmoid"),
    (r"svm|hinge", "svm_loss"),
    (r"embedding", "embedding"),
    (r"rnn_?step", "rnn_step"),
)
"""Regular expressions for names, with the operation that a function of this name computes.

The first expression that is found in a name decides. None means that the function is not graded.
"""


def guess(name: str) -> str | None:
    """Return the operation that code with this name seems to compute, or None."""
    short = re.sub(r"(_?forward_?|_?fwd_?|_naive|_strides|_fast|_loop)", "", name.lower())
    return next((operation for pattern, operation in GUESSES if re.search(pattern, short)), None)


def guessed(names: Mapping[str, set[str]]) -> list[Task]:
    """Return a task for each function or class of a file whose name tells an operation."""
    tasks = []
    for name, methods in names.items():
        operation = guess(name)
        if operation is None:
            continue
        partner = next((other for other in _partners(name) if other in names), None)
        if (methods & {*FORWARD_METHODS} and methods & {*BACKWARD_METHODS}) or (
            not methods and OPERATIONS[operation].loss and "loss" in name.lower() and not partner
        ):
            tasks.append(Task(operation, name, name))
        elif partner is not None and not methods:
            tasks.append(Task(operation, name, partner))
    return tasks


def _partners(name: str) -> list[str]:
    """Return names that the backward function may have if this is the forward function's name."""
    words = (("forward", "backward"), ("Forward", "Backward"), ("fwd", "bwd"), ("forward", "back"))
    found = [name.replace(old, new) for old, new in words if old in name]
    if "backward" not in name:
        found += [f"{name}_backward", f"{name}_back", f"d{name}", f"{name}_grad", f"{name}_prime"]
    return [other for other in found if other != name]


# Grading.


def grade(
    name: str,
    files: Sequence[Path],
    assignment: Assignment,
    *,
    seed: int,
    timeout: float,
    edit_seconds: tuple[float, float] = (0.0, 0.0),
) -> list[Grade]:
    """Grade one student. For each task, the first file that has the functions is examined.

    Args:
        name: the name of the student.
        files: the student's files.
        assignment: the assignment.
        seed: the seed of the inputs, the same for all students.
        timeout: the time limit for each call, in seconds.
        edit_seconds: as in `npbn.verify.submission.examine_file`.
    """
    return _graded(
        name,
        files,
        assignment,
        lambda file, tasks: _grade_file(name, file, tasks, seed, timeout, edit_seconds),
    )


def _graded(
    name: str,
    files: Sequence[Path],
    assignment: Assignment,
    grade_file: Callable[[Path, list[Task]], Iterable[Grade]],
) -> list[Grade]:
    """Return the grades of one student. The function ``grade_file`` grades the tasks of a file."""
    names = {file: defined(file) for file in files}
    work: dict[Path, list[Task]] = {}
    grades: list[Grade] = []
    for task in assignment.tasks:
        at = next(
            (f for f, known in names.items() if {task.forward, task.backward} <= known.keys()), None
        )
        if at is None:
            broken = [file for file in files if syntax_tree(source_of(file)) is None]
            text = f"there is no {task.forward}"
            if broken:
                text += f" ({', '.join(printable(f.name) for f in broken)} cannot be parsed)"
            grades.append(Grade(name, task, "", NOT_FOUND, None, text))
        else:
            work.setdefault(at, []).append(task)
    if not assignment.tasks:
        work = {file: tasks for file, known in names.items() if (tasks := guessed(known))}
    for file, tasks in work.items():
        grades += grade_file(file, tasks)
    order = {task: k for k, task in enumerate(assignment.tasks)}
    return sorted(grades, key=lambda grade: order.get(grade.task, 0))


def _grade_file(
    name: str,
    file: Path,
    tasks: Sequence[Task],
    seed: int,
    timeout: float,
    edit_seconds: tuple[float, float],
) -> Iterator[Grade]:
    try:
        with Session(file, timeout) as session:
            for task in tasks:
                try:
                    found = examine_in(
                        session,
                        task.forward,
                        task.backward,
                        task.operation,
                        seed=seed,
                        asks=frozenset(task.asks),
                        promised=[PROMISES[text] for text in task.promises],
                        edit_seconds=edit_seconds,
                    )
                except SubmissionError as error:
                    yield Grade(name, task, str(file), UNLOADED, None, str(error))
                except Exception as error:  # The other functions are still graded.
                    yield from _failed(name, file, [task], error)
                else:
                    yield Grade(name, task, str(file), found.verdict, found, str(found))
    except (SubmissionError, OSError) as error:
        for task in tasks:
            yield Grade(name, task, str(file), UNLOADED, None, printable(error))


def _failed(name: str, file: Path, tasks: Sequence[Task], error: Exception) -> Iterator[Grade]:
    """Yield grades that a person has to decide, because the examination raised an error."""
    text = f"the examination itself failed: {type(error).__name__}: {printable(error)}"
    for task in tasks:
        yield Grade(name, task, str(file), "could not be run", None, text)


def _job(arguments: tuple[Any, ...]) -> list[Grade]:
    name, files, assignment, options = arguments
    with np.errstate(all="ignore"):
        return grade(name, files, assignment, **options)


def grade_all(
    found: Mapping[str, Sequence[Path]],
    assignment: Assignment,
    *,
    jobs: int | None = None,
    on_student: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, list[Grade]]:
    """Grade all students, several at a time; return the grades by student.

    Args:
        found: the files of each student, from `students`.
        assignment: the assignment.
        jobs: the number of processes. By default, the number of CPUs that this process may use.
        on_student: a function that is called with the name of each student who has been graded.
        options: the keyword arguments of `grade`.
    """
    jobs = min(jobs or backend.usable_cpus(), len(found))
    results: dict[str, list[Grade]] = {}
    work = [(name, list(files), assignment, options) for name, files in found.items()]
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=backend.limit_blas_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(_job, arguments): arguments[0] for arguments in work}
        for future in as_completed(futures):
            name = futures[future]
            try:
                results[name] = future.result()
            except BrokenExecutor as error:  # A process of this pool was killed.
                failed = functools.partial(_failed, name, error=error)
                results[name] = _graded(name, found[name], assignment, failed)
            if on_student is not None:
                on_student(name)
    return {name: results[name] for name in found}


@dataclass
class Report:
    """The grades of a class, as tables and files for people and for other programs."""

    assignment: Assignment
    grades: Mapping[str, Sequence[Grade]]
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.assignment.tasks:
            self.columns = [task.name for task in self.assignment.tasks]
        else:
            every = {g.task.operation for found in self.grades.values() for g in found}
            self.columns = [name for name in OPERATIONS if name in every]

    def cells(self, student: str) -> list[list[Grade]]:
        """Return, for each column of the table, the grades of a student."""
        by_task = bool(self.assignment.tasks)
        return [
            [g for g in self.grades[student] if (g.task.name if by_task else g.task.operation) == c]
            for c in self.columns
        ]

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each student and function, for JSON."""
        return [grade.record() for found in self.grades.values() for grade in found]

    def rows(self) -> list[list[str]]:
        """Return a table of students and functions, with a row of titles, for CSV."""
        rows = [["student", *self.columns, "points", "max points", "to decide"]]
        for student, found in self.grades.items():
            cells = ["; ".join(g.verdict for g in cell) for cell in self.cells(student)]
            points, most = sum(g.points for g in found), sum(g.task.points for g in found)
            undecided = sum(g.open for g in found)
            rows.append([student, *cells, f"{points:g}", f"{most:g}", str(undecided)])
        return rows

    def feedback(self, student: str) -> str:
        """Return the feedback for a student, in Markdown."""
        lines = [f"# {self.assignment.title}: {student}", ""]
        for grade in self.grades[student]:
            points = f" ({grade.points:g} of {grade.task.points:g} points)"
            if not self.assignment.tasks:
                points = ""
            lines += [
                f"## {grade.task.forward}: {grade.verdict}{points}",
                "",
                "```",
                grade.text.replace("```", "'''"),
                "```",
                "",
            ]
        if not self.grades[student]:
            lines.append("Nothing to grade was found.")
        return "\n".join(lines)

    def gradescope(self, student: str) -> dict[str, Any]:
        """Return a student's grades as Gradescope's results.json."""
        return {
            "tests": [
                {
                    "name": f"{grade.task.forward} ({grade.task.operation})",
                    "score": grade.points,
                    "max_score": grade.task.points,
                    "status": "passed" if grade.points == grade.task.points else "failed",
                    "output": grade.text,
                }
                for grade in self.grades[student]
            ]
        }

    def nbgrader(self) -> list[list[str]]:
        """Return the grades as rows of the table that ``nbgrader export`` writes."""
        rows = [["assignment", "student_id", "raw_score", "score", "max_score"]]
        for student, found in self.grades.items():
            points, most = sum(g.points for g in found), sum(g.task.points for g in found)
            rows.append([self.assignment.title, student, *([f"{points:g}"] * 2), f"{most:g}"])
        return rows


def spreadsheet_cell(text: str) -> str:
    """Return a text for a cell of a spreadsheet, such that it is not taken for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
