"""Check gradients: all of npbn's, or those of files of yours."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from npbn import backend, layers, models, verify
from npbn import functional as F
from npbn.checkpoint import write_file
from npbn.commands.command_line import ArgumentParser, integer, number, one_line, say, typed
from npbn.errors import NpbnError, SubmissionError
from npbn.verify.examination import ASKED, CONVENTION, UNDECIDED, UNLOADED, UNWRITTEN
from npbn.verify.grading import Grade, Task, spreadsheet_cell
from npbn.verify.isolated import calling
from npbn.verify.operations import OPERATIONS, Pair, probes, true_functions

EPILOG = """\
examples:
  {check}
  {check} homework.py:batch_norm_forward,batch_norm_backward \\
      --op batch_norm
  {check} layers.py:BatchNormalization --op batch_norm
  {check} submissions/*.py --op softmax_cross_entropy \\
      --functions softmax_loss,softmax_loss --timeout 10 --csv marks.csv

For all functions of all students at once, see npbn grade --help.

operations: {operations}

what can be checked, in plain NumPy:

{signatures}

exit codes: 0 right, 1 wrong, not written or cannot be run, 2 bad input, 3 can't tell or cannot be
loaded here, 130 interrupted; of several files, the worst: 2 before 1 before 3
"""

CODES = {
    "right": 0,
    CONVENTION: 0,
    ASKED: 0,
    UNDECIDED: 3,
    UNLOADED: 3,
    "wrong": 1,
    UNWRITTEN: 1,
    "could not be run": 1,
    "bad input": 2,
}
COLUMNS = ("file", "verdict", "right outputs", "wrong outputs", "what", "report")
HINTS = ("edit", "reason", "line")
EDITS = 3.0
"""The default time for the search for an edit that makes wrong code right, in seconds."""


def add_options(parser: argparse.ArgumentParser, timeout: float, seconds: float) -> None:
    """Add the options that check and grade have in common.

    Args:
        parser: the parser.
        timeout, seconds: the default values of ``--timeout`` and ``--edits``.
    """
    parser.add_argument(
        "--timeout",
        type=number("a number > 0", lambda value: value > 0),
        default=timeout,
        metavar="SECONDS",
        help=f"for each call of a function (default: {timeout:g})",
    )
    parser.add_argument(
        "--seed", type=integer(0), metavar="N", help="of the inputs (default: new each time)"
    )
    group = parser.add_argument_group("where the mistake is")
    positive = number("a number >= 0", lambda value: value >= 0)
    group.add_argument(
        "--edits",
        type=positive,
        default=seconds,
        metavar="SECONDS",
        help="how long to search for a small change that makes wrong code right, for each function "
        f"(default: {seconds:g}; 0: not at all)",
    )
    group.add_argument(
        "--pairs",
        type=positive,
        default=0.0,
        metavar="SECONDS",
        help="how long to search for two such changes after that (default: 0)",
    )
    group.add_argument(
        "--hint",
        choices=HINTS,
        default="edit",
        help="what the report shows of the change: all of it, its line and reason, or its line "
        "(default: edit)",
    )


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(
            check=typed(program),
            operations=", ".join(OPERATIONS),
            signatures=(calling.__doc__ or "").split("\n\n", 1)[1].strip(),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "submissions",
        nargs="*",
        metavar="FILE:FORWARD,BACKWARD",
        help="a Python file or a notebook, and two functions or a class in it; of several, a line "
        "each; npbn itself unless given",
    )
    parser.add_argument(
        "--functions",
        metavar="FORWARD,BACKWARD",
        help="the two functions, or the class, for files given without them",
    )
    parser.add_argument(
        "--op",
        choices=OPERATIONS,
        metavar="OPERATION",
        help="what the code should compute (listed below)",
    )
    parser.add_argument(
        "--adapter",
        metavar="FILE:FUNCTION",
        help="for arguments that are not recognized: a function that gets (forward, backward) and "
        "returns both in npbn's signature",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write file, verdict, right outputs, wrong outputs, what and report there",
    )
    parser.add_argument("--json", metavar="FILE", help="write a record for each file there")
    add_options(parser, timeout=60, seconds=EDITS)
    arguments = parser.parse_args(words)
    needed = arguments.submissions, arguments.op
    more = arguments.functions, arguments.csv, arguments.json, arguments.adapter
    if any((*needed, *more)) and not all(needed):
        parser.error("FILE:FORWARD,BACKWARD and --op belong together")
    arguments.submissions = [split(parser, s, arguments.functions) for s in arguments.submissions]
    return arguments


def split(parser: ArgumentParser, submission: str, functions: str | None) -> tuple[str, str, str]:
    """Return the file and the names of the forward and the backward function in an argument.

    For a class, both names are that of the class.
    """
    if functions and os.path.isfile(submission):
        file, names = submission, functions
    else:
        file, _, names = submission.rpartition(":")
    forward, comma, backward = names.partition(",")
    if not comma:
        backward = forward
    if not file or not forward or not backward or "," in backward:
        parser.error(f"expected FILE:FORWARD,BACKWARD or FILE:CLASS, got {submission!r}")
    if not os.path.isfile(file):  # Path.is_file may raise an error.
        parser.error(f"{file} is not a file")
    return file, forward, backward


def main(program: str, words: list[str]) -> int:
    arguments = parse_arguments(program, words)
    backend.limit_blas_threads(1)  # The matrices are small, and other programs may be running.
    return check_submissions(arguments) if arguments.submissions else check_npbn()


def check_submissions(arguments: argparse.Namespace) -> int:
    """Print the report on one file, or a line on each of several files; return the exit code.

    The exit code of several files is the worst exit code of a file.
    """
    several = len(arguments.submissions) > 1
    longest = max(len(file) for file, _, _ in arguments.submissions)
    outputs = len("y moving_mean moving_var dx dgamma dbeta")
    widths = (longest, max(map(len, CODES)), outputs, outputs)
    rows = [COLUMNS]
    grades: list[Grade] = []
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed

    def line(row: tuple[str, ...]) -> str:
        return "  ".join([*map(str.ljust, map(one_line, row), widths), one_line(row[4])]).rstrip()

    if several:
        say(line(COLUMNS))
    for file, forward, backward in arguments.submissions:
        task = Task(arguments.op, forward, backward)
        try:
            found = verify.examine_file(
                file,
                forward,
                backward,
                arguments.op,
                adapter=arguments.adapter,
                timeout=arguments.timeout,
                seed=seed,
                edit_seconds=(arguments.edits, arguments.pairs),
            )
        except SubmissionError as error:
            if not several:
                raise
            rows.append((file, "bad input", "", "", str(error), str(error)))
            grades.append(Grade(file, task, file, "bad input", None, str(error)))
        else:
            grade = Grade(file, task, file, found.verdict, found, str(found))
            grades += hinted({"": [grade]}, arguments.hint)[""]
            shown = grades[-1].examination
            assert shown is not None
            right, wrong = " ".join(shown.right), " ".join(shown.wrong)
            rows.append((file, shown.verdict, right, wrong, shown.first, str(shown)))
        say(line(rows[-1]) if several else rows[-1][-1])
    if arguments.csv is not None:
        text = io.StringIO()
        csv.writer(text).writerows([*map(spreadsheet_cell, row[:-1]), row[-1]] for row in rows)
        write(arguments.csv, text.getvalue())
    if arguments.json is not None:
        write(arguments.json, json.dumps([grade.record() for grade in grades], indent=1) + "\n")
    return max((CODES[verdict] for _, verdict, *_ in rows[1:]), key=(0, 3, 1, 2).index)


def hinted(grades: Mapping[str, Sequence[Grade]], hint: str) -> dict[str, list[Grade]]:
    """Return the grades, with edits that are shortened as the option ``--hint`` says."""

    def shortened(grade: Grade) -> Grade:
        if grade.examination is None:
            return grade
        found = dataclasses.replace(grade.examination, hint=hint)
        return dataclasses.replace(grade, examination=found, text=str(found))

    return {student: [shortened(g) for g in found] for student, found in grades.items()}


def write(path: str, text: str) -> None:
    """Write a text to a file in one step."""
    try:
        write_file(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise NpbnError(f"{path} cannot be written: {error.strerror}") from None


def check_npbn() -> int:
    """Check every operation, layer and model; return 0 if all gradients are right."""
    started = time.perf_counter()
    say(f"{'':44}  gradient     relative error  verdict")
    reports = [
        table(name, check())
        for name, check in {**operations(), **each_layer(), **networks()}.items()
    ]
    right = all(report.ok for report in reports)
    worst = max(report.worst for report in reports)
    count = sum(len(report.findings) for report in reports)
    say("")
    say(
        f"{count} gradients, float64, complex step, random upstream gradients: "
        f"{'all right' if right else 'NOT ALL RIGHT'}, largest relative error {worst:.1e} "
        f"({time.perf_counter() - started:.0f} s)"
    )
    return 0 if right else 1


def table(title: str, report: verify.Report) -> verify.Report:
    for k, finding in enumerate(report.findings):
        name = f"d{finding.name}"
        say(f"{title if k == 0 else '':44}  {name:12} {finding.error:14.1e}  {finding.verdict}")
    return report


Checks = dict[str, Callable[[], verify.Report]]


def operations() -> Checks:
    """Return a check of each operation of npbn on each of its probes (inputs).

    Probes are left out if they are optional or harder than usual; see `Probe`.
    """
    checks: Checks = {}
    for name, operation in OPERATIONS.items():
        if not hasattr(F, name):
            continue
        pairs = {name: true_functions(name)}
        if name == "batch_norm":
            pairs["batch_norm, staged"] = F.batch_norm, F.batch_norm_backward_staged
        for title, pair in pairs.items():
            for probe in probes(name):
                if probe.beyond or probe.optional:
                    continue
                wanted = [gradient.removeprefix("d") for gradient in operation.gradients]
                inputs = {key: probe.arguments[key] for key in wanted}
                others = {k: v for k, v in probe.arguments.items() if k not in wanted}
                checks[f"{title}, {probe.name}"] = functools.partial(
                    verify.check_gradients, *with_dy(name, pair), inputs, constants=others
                )
    return checks


def with_dy(name: str, pair: Pair) -> Pair:
    """Return a forward and a backward pass. The backward pass has the arguments (dy, cache).

    The backward pass of a loss has only the argument cache, so it is wrapped in a new function.
    """
    forward, backward = pair
    if not OPERATIONS[name].loss:
        return pair
    return forward, lambda dy, cache: dy * backward(cache)


def each_layer() -> Checks:
    """Return the checks of small networks. There is one network for each kind of layer."""
    generator = np.random.default_rng(1)

    def images(layer: layers.Layer, features: int) -> layers.Sequential:
        head = layers.Linear(features, 3, generator=generator)
        return layers.Sequential(layer, layers.Flatten(), head)

    def vectors(layer: layers.Layer) -> layers.Sequential:
        return layers.Sequential(layer, layers.Linear(6, 3, generator=generator))

    small = {
        "Conv2d": images(layers.Conv2d(2, 3, 3, stride=2, padding=1, generator=generator), 27),
        "BatchNorm, 4-D": images(layers.BatchNorm(2, 4), 50),
        "AvgPool2d": images(layers.AvgPool2d(2), 8),
        "MaxPool2d": images(layers.MaxPool2d(2), 8),
        "Linear": vectors(layers.Linear(6, 6, generator=generator)),
        "BatchNorm, 2-D": vectors(layers.BatchNorm(6, 2)),
        **{kind.__name__: vectors(kind()) for kind in layers.ACTIVATIONS.values()},
    }
    return {
        f"layer {name}": whole(model, (6, 2, 5, 5) if len(model.layers) == 3 else (6, 6), 3)
        for name, model in small.items()
    }


def networks() -> Checks:
    return {
        f"{name}, {'training' if training else 'prediction'}": whole(
            model(generator=np.random.default_rng(2)), (8, 1, 28, 28), 10, training
        )
        for name, model in (("LeNet", models.LeNet), ("BLeNet", models.BLeNet))
        for training in (True, False)
    }


def whole(
    model: layers.Sequential, shape: tuple[int, ...], classes: int, training: bool = True
) -> Callable[[], verify.Report]:
    def check() -> verify.Report:
        rng = np.random.default_rng(3)
        model.to(backend.get_backend("numpy"), "float64")
        if not training:
            model.eval()
        return verify.check_model(
            model, rng.standard_normal(shape), rng.integers(0, classes, shape[0])
        )

    return check
