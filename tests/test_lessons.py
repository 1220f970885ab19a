"""scripts/lessons: they run, show their pictures, and open as notebooks."""

from __future__ import annotations

import ast
import itertools
import os
import re

import matplotlib.image
import numpy as np
import pytest

from commands import SCRIPTS, assert_refused, run
from lessons import LESSONS, cells, markdown

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@each_lesson
def test_it_runs_and_saves_its_pictures(path, tmp_path):
    process = run(f"lessons/{path.name}", "--quick", "--pictures", "new/pictures", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    pictures = sorted((tmp_path / "new" / "pictures").iterdir())
    named = re.findall(r"^picture: (.+)$", process.stdout, re.MULTILINE)
    assert pictures
    assert sorted(tmp_path / name for name in named) == pictures
    assert len(pictures) == path.read_text(encoding="utf-8").count("lesson.show(")
    for picture in pictures:
        assert picture.name.startswith(path.stem)
        pixels = matplotlib.image.imread(picture)[:, :, :3]
        assert min(pixels.shape[:2]) >= 300
        assert len(np.unique(np.round(pixels.reshape(-1, 3), 1), axis=0)) > 5
        drawn = np.mean(np.any(pixels != 1, axis=2))
        assert drawn > 0.02, f"{picture.name} is blank but for {drawn:.1%}"


def test_without_a_folder_it_writes_no_files(tmp_path):
    process = run(f"lessons/{LESSONS[0].name}", "--quick", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "(--pictures DIR saves it)" in process.stdout
    assert not list(tmp_path.iterdir())


@each_lesson
def test_its_cells_are_text_and_code_in_turns(path):
    kinds = [kind for kind, _ in cells(path)]
    assert kinds[:2] == ["markdown", "code"]
    assert all(one != other for one, other in itertools.pairwise(kinds))
    title, *others = [text for kind, text in cells(path) if kind == "markdown"]
    assert re.match(r"# \w.+\n", title)
    for text in others:
        assert not re.search(r"^# ", text, re.MULTILINE), "a second title"
    for kind, text in cells(path):
        if kind == "code":
            assert ast.parse(text).body


@each_lesson
def test_its_first_code_is_imports_and_options(path):
    """A reader sees next to no plumbing."""
    plumbing = ast.parse(cells(path)[1][1]).body
    for statement in plumbing:
        assert isinstance(statement, ast.Import | ast.ImportFrom) or (
            ast.unparse(statement).startswith("lesson = start(")
        )


@each_lesson
def test_no_formula_in_its_lines_is_broken(path):
    """A line that begins inside a formula might begin like a list, which would cut it in two."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\$\$.+?\$\$", "", markdown(path), flags=re.DOTALL)
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line


@each_lesson
def test_bad_options_are_refused_in_one_line(path, tmp_path):
    name = f"lessons/{path.name}"
    (tmp_path / "file").write_text("not a folder")
    error = f"{path.name}: error:"
    assert_refused(run(name, "--no-such-option", cwd=tmp_path), error, "--no-such-option")
    assert_refused(run(name, "--pictures", cwd=tmp_path), error, "--pictures")
    assert_refused(run(name, "--pictures", "file", cwd=tmp_path), error, "file")


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path):
    prelude = "sys.modules['matplotlib'] = None"
    process = run(f"lessons/{LESSONS[0].name}", cwd=tmp_path, prelude=prelude)
    assert_refused(process, "not installed: matplotlib", "[plots]")


def test_without_pytorch_the_comparison_says_how_to_get_it(tmp_path):
    prelude = "sys.modules['torch'] = None"
    process = run("lessons/4_npbn_against_pytorch.py", cwd=tmp_path, prelude=prelude)
    assert_refused(process, "not installed: torch", "[benchmark]")


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("1_batch_norm_by_hand", "+ 2 * x_centred * dq", "+ x_centred * dq"),
        ("1_batch_norm_by_hand", "0.1 * mean)", "0.9 * mean)"),
        ("3_convolution_as_a_matrix_product", "] += column.", "] = column."),
    ],
)
def test_a_lesson_with_a_mistake_fails(name, right, wrong, tmp_path):
    text = (SCRIPTS / "lessons" / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(right) == 1
    changed = tmp_path / "changed.py"
    changed.write_text(text.replace(right, wrong), encoding="utf-8")
    paths = [str(SCRIPTS / "lessons"), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = run(str(changed), "--quick", cwd=tmp_path, env=env)
    assert process.returncode == 1
    assert "AssertionError" in process.stderr
