"""Check gradients: all of npbn's, or those of files of yours."""

from __future__ import annotations

import argparse
import csv
import functools
import io
import os
import time
from collections.abc import Callable

import numpy as np

from npbn import backend, layers, models, verify
from npbn import functional as F
from npbn.checkpoint import write_file
from npbn.commands.command_line import ArgumentParser, number, say, typed
from npbn.errors import NpbnError, SubmissionError
from npbn.verify import signatures
from npbn.verify.operations import OPERATIONS, Pair, probes, true_functions

EPILOG = """\
examples:
  {check}
  {check} homework.py:batch_norm_forward,batch_norm_backward \\
      --op batch_norm
  {check} submissions/*.py --op softmax_cross_entropy \\
      --functions softmax_loss,softmax_loss --timeout 10 --csv marks.csv

operations: {operations}

signatures that functions of yours may have, in plain NumPy:

{signatures}

exit codes: 0 right, 1 wrong or cannot be run, 2 bad input, 3 can't tell, 130 interrupted; of
several files, the worst: 2 before 1 before 3
"""

CODES = {"right": 0, "undecided": 3, "wrong": 1, "could not be run": 1, "bad input": 2}
COLUMNS = ("file", "verdict", "right outputs", "wrong outputs", "first mistake", "report")


def parse_arguments(program: str, words: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=program,
        description=__doc__,
        epilog=EPILOG.format(
            check=typed(program),
            operations=", ".join(OPERATIONS),
            signatures=(signatures.__doc__ or "").split("\n\n", 1)[1].strip(),
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "submissions",
        nargs="*",
        metavar="FILE:FORWARD,BACKWARD",
        help="a Python file and two functions in it; of several, a line each; npbn itself unless "
        "given",
    )
    parser.add_argument(
        "--functions",
        metavar="FORWARD,BACKWARD",
        help="the two functions, for files given without them",
    )
    parser.add_argument(
        "--op",
        choices=OPERATIONS,
        metavar="OPERATION",
        help="what the two functions are to be (listed below)",
    )
    parser.add_argument(
        "--signature",
        choices=("auto", *signatures.SIGNATURES),
        default="auto",
        help="how they take their arguments (default: auto, by the names of the arguments)",
    )
    parser.add_argument(
        "--adapter",
        metavar="FILE:FUNCTION",
        help="for other signatures: a function that gets (forward, backward) and returns both in "
        "npbn's signature",
    )
    parser.add_argument(
        "--timeout",
        type=number("a number > 0", lambda value: value > 0),
        default=60.0,
        metavar="SECONDS",
        help="for running those of one file (default: 60)",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write file, verdict, right outputs, wrong outputs, first mistake and report there",
    )
    arguments = parser.parse_args(words)
    needed = arguments.submissions, arguments.op
    if any((*needed, arguments.functions, arguments.csv)) and not all(needed):
        parser.error("FILE:FORWARD,BACKWARD and --op belong together")
    arguments.submissions = [split(parser, s, arguments.functions) for s in arguments.submissions]
    return arguments


def split(parser: ArgumentParser, submission: str, functions: str | None) -> tuple[str, str, str]:
    """Return the file, and the names of the forward and the backward function."""
    if functions and os.path.isfile(submission):
        file, names = submission, functions
    else:
        file, _, names = submission.rpartition(":")
    forward, _, backward = names.partition(",")
    if not file or not forward or not backward or "," in backward:
        parser.error(f"expected FILE:FORWARD,BACKWARD, got {submission!r}")
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
    widths = (longest, len("could not be run"), outputs, outputs)
    rows = [COLUMNS]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join([*map(str.ljust, row, widths), row[4]]).rstrip()

    if several:
        say(line(COLUMNS))
    for file, forward, backward in arguments.submissions:
        try:
            examined = verify.examine_file(
                file,
                forward,
                backward,
                arguments.op,
                signature=arguments.signature,
                adapter=arguments.adapter,
                timeout=arguments.timeout,
            )
        except SubmissionError as error:
            if not several:
                raise
            rows.append((file, "bad input", "", "", str(error), str(error)))
        else:
            right, wrong = " ".join(examined.right), " ".join(examined.wrong)
            rows.append((file, examined.verdict, right, wrong, examined.first, str(examined)))
        say(line(rows[-1]) if several else rows[-1][-1])
    if arguments.csv is not None:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        try:
            write_file(arguments.csv, text.getvalue().encode(errors="backslashreplace"))
        except OSError as error:
            raise NpbnError(f"{arguments.csv} cannot be written: {error.strerror}") from None
    return max((CODES[verdict] for _, verdict, *_ in rows[1:]), key=(0, 3, 1, 2).index)


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
    """Return a check of every operation on each of its probes."""
    checks: Checks = {}
    for name, operation in OPERATIONS.items():
        pairs = {name: true_functions(name)}
        if name == "batch_norm":
            pairs["batch_norm, staged"] = F.batch_norm, F.batch_norm_backward_staged
        for title, pair in pairs.items():
            for probe in probes(name):
                wanted = [gradient.removeprefix("d") for gradient in operation.gradients]
                inputs = {key: probe.arguments[key] for key in wanted}
                others = {k: v for k, v in probe.arguments.items() if k not in wanted}
                checks[f"{title}, {probe.name}"] = functools.partial(
                    verify.check_gradients, *with_dy(name, pair), inputs, constants=others
                )
    return checks


def with_dy(name: str, pair: Pair) -> Pair:
    """Return a forward and a backward pass with the arguments (dy, cache) of the backward pass.

    The backward pass of a loss has only the argument cache, so it is wrapped in a new function.
    """
    forward, backward = pair
    if name != "softmax_cross_entropy":
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
