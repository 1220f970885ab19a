"""Provide options, pictures and printed arrays for all lessons.

A lesson is a Python file in cells (``# %%``). A lesson opens as a notebook in VS Code and, with
jupytext, in Jupyter. In a notebook, a picture appears below the cell that draws the picture. A
lesson also runs as a script. The script prints the text and the output of each cell in order, and
the option ``--pictures`` saves the pictures:

    python scripts/lessons/1_batch_norm_by_hand.py [--quick] [--pictures DIR]
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from npbn.data import Dataset

# Colour-blind readers can also tell these three colours of Okabe and Ito apart.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"


@dataclass(frozen=True)
class Lesson:
    """Hold the options of a lesson.

    Attributes:
        quick: whether to measure less. A quick lesson still shows and checks everything.
        pictures: the folder for the pictures, or None to save no pictures.
        regenerate: whether to repeat the long measurements of `_curves`.
    """

    quick: bool = False
    pictures: Path | None = None
    regenerate: bool = False

    def show(self, figure: Figure, name: str) -> None:
        """Show the finished picture `figure` in a notebook.

        A script with the option --pictures saves the picture under the name `name`.
        """
        import matplotlib.pyplot as plt

        if _in_notebook():
            plt.show()
        elif self.pictures is None:
            print(f"picture: {name} (--pictures DIR saves it)")
        else:
            path = self.pictures / f"{Path(sys.argv[0]).stem}-{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            print(f"picture: {path}")
        plt.close(figure)

    def data(self) -> Dataset:
        """Return Fashion-MNIST, or the handwritten digits if Fashion-MNIST is not available."""
        from npbn import data
        from npbn.errors import DataError

        try:
            dataset = data.load("auto")
        except DataError as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            sys.exit(2)
        print(f"{dataset.name}: {len(dataset.train):,} images to train on")
        return dataset


def start(*, needs: tuple[str, ...] = (), curves: bool = False) -> Lesson:
    """Return the options of the lesson.

    In a script, the first call runs the whole lesson cell by cell, prints the text of the lesson,
    and exits. If a library is missing, the script exits with one clear line.

    Args:
        needs: the libraries that the lesson needs besides matplotlib.
        curves: whether the lesson shows measurements of `_curves`.
    """
    if _running:
        return _running[0]
    lesson = Lesson() if _in_notebook() else _from_command_line(needs, curves)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hide matplotlib's reports on fonts
    if not _in_notebook():
        os.environ["MPLBACKEND"] = "agg"
    import matplotlib.pyplot as plt

    from npbn import backend

    backend.limit_blas_threads(1)  # The matrices are small, and other programs may be running.
    plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": "medium"})
    if not _in_notebook():
        _running.append(lesson)
        _run(Path(sys.argv[0]))
        sys.exit()
    return lesson


_running: list[Lesson] = []
"""This list contains the lesson that the process runs as a script."""


def _run(path: Path) -> None:
    """Run the code cells of the lesson `path` in the main module, and print the text cells."""
    code: list[str] = []
    lines = [*path.read_text(encoding="utf-8").splitlines(), "# %%"]
    for number, line in enumerate(lines):
        if not line.startswith("# %%"):
            code.append(line)
            continue
        if code and code[0].startswith("# %% [markdown]"):
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in code[1:])
            print(f"{text.strip()}\n")
        else:
            # Empty lines before the source give a traceback the line numbers of the file.
            source = "\n" * (number - len(code)) + "\n".join(code)
            exec(compile(source, str(path), "exec"), vars(sys.modules["__main__"]))
            print()
        code = [line]


def print_arrays(**arrays: Any) -> None:
    """Print the name and the elements of each of the `arrays`."""
    import numpy as np

    for name, array in arrays.items():
        rounded = np.round(array, 4)
        rounded = np.where(rounded == 0, 0, rounded)  # replace -0 by 0
        start = f"{name} = "
        print(start + np.array2string(rounded, prefix=start, floatmode="maxprec_equal"))


def draw_matrix(
    axes: Axes, matrix: Any, title: str, *, numbers: bool = True, largest: float | None = None
) -> None:
    """Draw `matrix` on `axes` as an image with the title `title`.

    Negative elements are green, 0 is white, and positive elements are brown. The colours are
    darkest at 1.6 times `largest`. The default of `largest` is the largest absolute value of
    `matrix`. If `numbers` is true, the image also shows the elements as numbers.
    """
    import numpy as np

    matrix = np.asarray(matrix)
    limit = 1.6 * float(np.max(np.abs(matrix)) if largest is None else largest)
    axes.imshow(matrix, cmap="BrBG_r", vmin=-limit, vmax=limit)  # paler than the numbers
    axes.set_title(title)
    axes.set_xticks(np.arange(matrix.shape[1] + 1) - 0.5, labels=[])
    axes.set_yticks(np.arange(matrix.shape[0] + 1) - 0.5, labels=[])
    axes.tick_params(length=0)
    axes.grid(color="0.7", linewidth=0.5)
    if numbers:
        for (row, column), value in np.ndenumerate(np.round(matrix, 2) + 0.0):
            axes.text(column, row, f"{value:g}", ha="center", va="center")


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def _from_command_line(needs: tuple[str, ...], curves: bool) -> Lesson:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from _command_line import ArgumentParser

    # If the output goes into a program that ends early, such as `head`, the lesson ends silently.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = ArgumentParser(
        description="A lesson, run as a script: prints its numbers and fails if a claim is wrong."
    )
    parser.add_argument("--quick", action="store_true", help="measure less: done in seconds")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="save the pictures in DIR, as PNG"
    )
    if curves:
        parser.add_argument(
            "--regenerate",
            action="store_true",
            help="measure the long curves again, in many minutes, and write curves/*.json",
        )
    options = parser.parse_args()
    for name, extra in (("matplotlib", "plots"), *((name, "benchmark") for name in needs)):
        if importlib.util.find_spec(name) is None:
            parser.exit(
                2, f"not installed: {name}; in npbn's directory: pip install -e '.[{extra}]'\n"
            )
    if options.pictures is not None:
        try:
            options.pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot save pictures in {options.pictures}: {error.strerror}")
    return Lesson(options.quick, options.pictures, curves and options.regenerate)
