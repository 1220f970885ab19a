"""List the runs in a folder: their differences, their epochs and their accuracy."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from npbn import experiment
from npbn.commands.command_line import ArgumentParser, one_line, say
from npbn.errors import CheckpointError, NpbnError
from npbn.experiment import Config

# The fields of `Config` that do not matter to the training, or that have their own column.
NOT_LISTED = {"model", "classes", "channels", "side", "data"}


def main(program: str, words: list[str]) -> None:
    parser = ArgumentParser(prog=program, description=__doc__)
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="DIR", help="(default: %(default)s)"
    )
    folder = Path(parser.parse_args(words).folder)
    try:
        paths = sorted(path for path in folder.iterdir() if os.path.isfile(path / "config.json"))
    except OSError as error:
        raise NpbnError(f"{folder} cannot be read: {error.strerror}") from None
    if not paths:
        raise NpbnError(f"{folder} holds no runs")
    found: dict[str, tuple[Config, list[dict[str, Any]]] | str] = {}
    for path in paths:
        try:
            run, config = experiment.open_run(path)
            found[path.name] = config, run.records()[1:]
        except CheckpointError as error:
            found[path.name] = str(error)
    configs = [dataclasses.asdict(of[0]) for of in found.values() if not isinstance(of, str)]
    different = [
        field.name
        for field in dataclasses.fields(Config)
        if field.name not in NOT_LISTED and len({config[field.name] for config in configs}) > 1
    ]
    rows = [("name", "model", "differs in", "epochs", "best", "seconds")]
    for name, of in found.items():
        if isinstance(of, str):
            rows.append((one_line(name), one_line(of), "", "", "", ""))
            continue
        config, records = of
        tested = [record["test"]["accuracy"] for record in records if record["test"]]
        passes = [record[of] for record in records for of in ("train", "test") if record[of]]
        rows.append(
            (
                one_line(name),
                config.model,
                " ".join(f"{field}={getattr(config, field)}" for field in different) or "-",
                f"{len(records)}/{config.epochs}",
                f"{max(tested):.4f}" if tested else "-",
                f"{sum(one['seconds'] for one in passes):.1f}",
            )
        )
    whole = [row for row in rows if row[3]]
    widths = [max(len(row[k]) for row in whole) for k in range(6)]
    widths[0] = max(len(row[0]) for row in rows)
    for row in rows:
        cells = zip(row, widths, strict=True) if row[3] else ((row[0], widths[0]), (row[1], 0))
        say("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
