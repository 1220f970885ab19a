"""List the runs in a folder: their differences, their epochs and their accuracy."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, one_line, output, say
from npbn.errors import CheckpointError, NpbnError
from npbn.experiment import Config

RESULTS = ("epochs_done", "steps", "train_loss", "best_test_accuracy", "seconds")


def main(program: str, words: list[str]) -> None:
    parser = ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="print every option and result as comma-separated values, for a spreadsheet or pandas",
    )
    arguments = parser.parse_args(words)
    folder = Path(arguments.folder)
    try:
        paths = sorted(path for path in folder.iterdir() if os.path.isfile(path / "config.json"))
    except OSError as error:
        raise NpbnError(f"{folder} cannot be read: {error.strerror}") from None
    if not paths:
        raise NpbnError(f"{folder} holds no runs")
    configs: dict[str, Config] = {}
    results: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for path in paths:
        name = one_line(path.name)
        try:
            run, config = experiment.open_run(path)
            results[name] = result(run.records()[1:])
            configs[name] = config
        except CheckpointError as error:
            errors[name] = one_line(str(error))
    (print_csv if arguments.csv else print_table)(configs, results, errors)


def result(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the values of `RESULTS` for the records of the epochs of a run."""
    tested = [record["test"]["accuracy"] for record in records if record["test"]]
    passes = [record[of] for record in records for of in ("train", "test") if record[of]]
    values = (
        len(records),
        records[-1]["step"] if records else 0,
        records[-1]["train"]["loss"] if records else None,
        max(tested, default=None),
        sum(one["seconds"] for one in passes),
    )
    return dict(zip(RESULTS, values, strict=True))


def print_table(
    configs: dict[str, Config], results: dict[str, dict[str, Any]], errors: dict[str, str]
) -> None:
    """Print a line for each run, with the options in which the runs differ."""
    different = dict(zip(configs, experiment.differences([*configs.values()]), strict=True))
    rows = [("name", "differs in", "epochs", "best", "seconds")]
    for name, config in configs.items():
        found = results[name]
        best = found["best_test_accuracy"]
        rows.append(
            (
                name,
                different[name] or "-",
                f"{found['epochs_done']}/{config.epochs}",
                "-" if best is None else f"{best:.4f}",
                f"{found['seconds']:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(map(len, [rows[0][0], *configs, *errors]))
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    lines += [f"{name.ljust(widths[0])}  {error}" for name, error in errors.items()]
    for line in [lines[0], *sorted(lines[1:])]:
        say(line.rstrip())


def print_csv(
    configs: dict[str, Config], results: dict[str, dict[str, Any]], errors: dict[str, str]
) -> None:
    """Print a line for each run, with all options, all results, and what is wrong with the run."""
    options = [field.name for field in dataclasses.fields(Config) if field.name != "classes"]
    with output():
        writer = csv.DictWriter(sys.stdout, ["name", *options, *RESULTS, "error"], restval="")
        writer.writeheader()
        for name in sorted([*configs, *errors]):
            row: dict[str, Any] = {"name": name}
            if name in configs:
                row |= {option: getattr(configs[name], option) for option in options}
                row |= results[name]
            writer.writerow(row | {"error": errors.get(name, "")})
