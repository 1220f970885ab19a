"""Grade the homework of a class: every function of every student, with a report for each."""

from __future__ import annotations

import argparse
import csv
import io
import json
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from npbn.commands.check import add_options, hinted
from npbn.commands.command_line import ArgumentParser, integer, say, typed
from npbn.errors import NpbnError
from npbn.verify import grading
from npbn.verify.examination import ASKED, CONVENTION, UNDECIDED, UNLOADED, UNWRITTEN
from npbn.verify.grading import NOT_FOUND, Assignment, Report
from npbn.verify.operations import OPERATIONS, PROMISES

EPILOG = """\
examples:
  {grade} submissions                           guess the functions from their names
  {grade} submissions --assignment homework2.toml
  {grade} submissions/anna.py submissions/ben --edits 15

A student is a file, or a folder of files, in the folder that is given. In the folder of the output:

  marks.csv         students × functions
  marks.json        one record for each student and function
  feedback/*.md     a report for each student
  gradescope/*.json Gradescope's results.json for each student
  nbgrader.csv      the columns that `nbgrader export` writes

An assignment is a file in TOML:

  title = "Homework 2"
  [[function]]
  operation = "batch_norm"
  forward = "batchnorm_forward"
  backward = "batchnorm_backward"     # left out for a class, and for a loss with its gradient
  points = 4
  promises = ["padding at least 1"]   # what the homework's inputs keep to
  asks = ["large logits"]             # what it asks beyond the usual

operations: {operations}
promises: {promises}
asks: {asks}

The code of the students runs in processes of its own, with limits on time, memory, files and
processes and, where Linux allows it, without a network. It runs as the same user: this is no
sandbox. For more, run this command in a container without a network.

exit codes: 0 graded, 2 bad input, 130 interrupted
"""

EDITS_OF_A_CLASS = 1.0
"""The default time for the search for edits, in seconds for each wrong function."""

SHORT = {
    "right": "right",
    CONVENTION: "right (c)",
    ASKED: "right (a)",
    "wrong": "wrong",
    UNWRITTEN: "not written",
    UNDECIDED: "can't tell",
    "could not be run": "not run",
    UNLOADED: "not loaded",
    NOT_FOUND: "missing",
}


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(
            grade=typed(program),
            operations=", ".join(OPERATIONS),
            promises=", ".join(f'"{text}"' for text in PROMISES),
            asks=", ".join(f'"{text}"' for text in sorted(grading.KNOWN)),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="the folder of the class, or files and folders"
    )
    parser.add_argument("--assignment", metavar="FILE", help="the functions that are graded")
    parser.add_argument(
        "--output",
        default="marks",
        metavar="DIR",
        help="the folder for what is written (default: marks); what it has of the same names is "
        "replaced",
    )
    parser.add_argument(
        "--jobs",
        type=integer(1),
        metavar="N",
        help="students at a time (default: one for each CPU)",
    )
    add_options(parser, timeout=10, seconds=EDITS_OF_A_CLASS)
    return parser.parse_args(words)


def main(program: str, words: list[str]) -> None:
    arguments = parse_arguments(program, words)
    assignment = Assignment()
    if arguments.assignment is not None:
        assignment = grading.read_assignment(arguments.assignment)
    found = grading.students(arguments.paths)
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    say(f"{len(found)} students, seed {seed}")
    with tqdm(total=len(found), unit=" students", leave=False, disable=None) as bar:
        grades = grading.grade_all(
            found,
            assignment,
            jobs=arguments.jobs,
            on_student=lambda _: bar.update(),
            seed=seed,
            timeout=arguments.timeout,
            edit_seconds=(arguments.edits, arguments.pairs),
        )
    report = Report(assignment, hinted(grades, arguments.hint))
    show(report)
    write(report, Path(arguments.output))
    say(f"written: {arguments.output}")


def show(report: Report) -> None:
    """Print the table of students and functions."""
    rows = [["student", *report.columns, "points"]]
    for student, found in report.grades.items():
        cells = ["; ".join(SHORT[g.verdict] for g in cell) or "-" for cell in report.cells(student)]
        rows.append([student[:40], *cells, f"{sum(g.points for g in found):g}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(map(str.ljust, row, widths)).rstrip())
    said = {g.verdict for found in report.grades.values() for g in found}
    legend = {CONVENTION: "(c) by another convention", ASKED: "(a) where the assignment asks"}
    notes = [text for verdict, text in legend.items() if verdict in said]
    if notes:
        say("; ".join(notes))


def write(report: Report, folder: Path) -> None:
    """Write all files to a temporary folder, and then replace the old files by them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npbn-", dir=folder) as beside:
            new = Path(beside)
            texts = {
                "marks.csv": table(report.rows()),
                "nbgrader.csv": table(report.nbgrader()),
                "marks.json": json.dumps(report.records(), indent=1) + "\n",
            }
            for student in report.grades:
                name = "".join(c if c.isalnum() or c in "-_. '" else "_" for c in student)
                # Two students may differ only in characters that are replaced.
                while f"feedback/{name}.md" in texts:
                    name += "'"
                texts[f"feedback/{name}.md"] = report.feedback(student)
                gradescope = json.dumps(report.gradescope(student), indent=1)
                texts[f"gradescope/{name}.json"] = gradescope + "\n"
            for name, text in texts.items():
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_bytes(text.encode(errors="backslashreplace"))
            for name in ("feedback", "gradescope"):
                if (folder / name).exists():
                    (folder / name).rename(new / f"old-{name}")
            for path in [*new.iterdir()]:
                if not path.name.startswith("old-"):
                    path.replace(folder / path.name)
            shutil.rmtree(new / "old-feedback", ignore_errors=True)
    except OSError as error:
        where = error.filename or folder
        raise NpbnError(f"{where} cannot be written: {error.strerror}") from None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as CSV. No cell is a formula for a spreadsheet."""
    text = io.StringIO()
    csv.writer(text).writerows([grading.spreadsheet_cell(c) for c in row] for row in rows)
    return text.getvalue()
