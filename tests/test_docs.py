"""The documents keep their word: mathematics that renders, code that runs, lines that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, assert_refused, run
from lessons import LESSONS, markdown

README = (ROOT / "README.md").read_text(encoding="utf-8")


def docstrings() -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / "npbn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    name = getattr(node, "name", "module")
                    found.append((f"{path.relative_to(ROOT)}: {name}", text))
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [*docstrings(), ("README.md", README), *((path.name, markdown(path)) for path in LESSONS)],
)
def test_formulas_survive_markdown(name, text):
    """Dollars come in pairs; no line of a formula begins like a list, which would cut it in two."""
    without_code = re.sub(r"```.*?```|``.*?``|`[^`\n]*`", "", text, flags=re.DOTALL)
    displayed = re.findall(r"\$\$(.+?)\$\$", without_code, flags=re.DOTALL)
    for formula in displayed:
        for line in formula.splitlines()[1:]:
            assert not re.match(r"\s*([-+*]|\d+\.)\s", line), f"{name}: {line}"
            assert line.strip(), f"{name}: an empty line ends the paragraph and the formula"
        assert formula.count("{") == formula.count("}"), f"{name}: {formula}"
        # GitHub's Markdown eats a backslash before punctuation, also in formulas.
        assert not re.search(r"\\[,;:!\\]", formula), f"{name}: {formula}"
    rest = re.sub(r"\$\$.+?\$\$", "", without_code, flags=re.DOTALL)
    assert rest.count("$") % 2 == 0, name


@pytest.mark.parametrize(
    "path",
    sorted(
        path.name
        for path in (ROOT / "npbn" / "functional").glob("[a-z]*.py")
        if path.stem not in ("arrays", "windows")  # what operations share
    ),
)
def test_every_operation_has_formula_derivation_and_source(path):
    text = ast.get_docstring(ast.parse((ROOT / "npbn" / "functional" / path).read_text("utf-8")))
    for part in ("$$", "**Source.**"):
        assert part in text
    assert "**Backward.**" in text


def test_the_example_in_the_readme_runs_and_learns(tmp_path):
    (code,) = re.findall(r"```python\n(import npbn\nfrom npbn.*?)```", README, re.DOTALL)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    # The initial weights are random: 20 runs gave 0.89 to 0.93. Without learning, it is 0.1.
    assert float(process.stdout) > 0.8


def test_the_checker_in_the_readme_finds_the_mistake(tmp_path):
    pattern = r"```python\n(import numpy as np\nfrom npbn\.verify.*?)```"
    (code,) = re.findall(pattern, README, re.DOTALL)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert process.stdout.startswith("dx: WRONG")


def test_the_lines_for_pytorch_print_what_the_documents_say(capsys):
    """The lines of the front page are in the example."""
    pytest.importorskip("torch")
    text = (ROOT / "npbn" / "verify" / "README.md").read_text(encoding="utf-8")
    pattern = r"```python\n(import numpy as np\nimport torch.*?)```\n\n```\n(.*?)```"
    ((code, expected),) = re.findall(pattern, text, re.DOTALL)
    exec(code, {})
    numbers = r"-?\d\.\d+(e-\d+)?"
    assert re.sub(numbers, "*", capsys.readouterr().out) == re.sub(numbers, "*", expected)
    pattern = r"```python\n(from npbn.verify import check_torch.*?)```"
    (lines,) = re.findall(pattern, README, re.DOTALL)
    assert len(lines.splitlines()) == 3
    assert all(f"\n{line}\n" in code for line in lines.splitlines())


def test_the_backward_pass_in_the_readme_is_the_one_that_runs():
    (code,) = re.findall(r"```python\n(dbeta.*?)```", README, flags=re.DOTALL)
    source = (ROOT / "npbn" / "functional" / "batch_norm.py").read_text(encoding="utf-8")
    for line in code.splitlines():
        assert f"    {line}\n" in source


DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(path for name in ("npbn", "scripts") for path in sorted((ROOT / name).rglob("*.md"))),
]


def anchors(path: Path) -> set[str]:
    """What the headings of a document are called in links, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = document.parent / path if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_is_a_front_page():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1500


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    process = run("build_docs.py", "out", cwd=directory)
    assert process.returncode == 0, process.stderr
    return directory / "out"


def test_the_site_has_a_page_for_every_module_and_lesson(site):
    for path in (ROOT / "npbn").rglob("[a-z]*.py"):
        name = path.relative_to(ROOT).with_suffix(".html")
        assert (site / name).is_file(), name
    start = (site / "npbn.html").read_text("utf-8")
    for path in LESSONS:
        assert f'href="lessons/{path.stem}.html"' in start
        page = (site / "lessons" / f"{path.stem}.html").read_text("utf-8")
        assert "<math" in page and "lesson = start(" in re.sub(r"<.*?>", "", page)
    # Every page of an operation lists the others.
    for path in (ROOT / "npbn" / "functional").glob("[a-z]*.py"):
        page = (site / "npbn" / "functional" / f"{path.stem}.html").read_text("utf-8")
        assert 'href="batch_norm.html"' in page and 'href="conv2d.html"' in page


def test_the_site_needs_no_network_and_its_formulas_are_set(site):
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        assert "Alias for field number" not in page
        assert not re.search(
            r"""(?:<script|<link|<img)[^>]*(?:src|href)=["']?(?:https?:)?//""", page
        )
        prose = re.sub(
            r"<(pre|code|script|style)\b.*?</\1>|<math.*?</math>", "", page, flags=re.DOTALL
        )
        assert "\\frac" not in prose and "\\sum" not in prose, path
        if path.parent.name in ("functional", "lessons"):  # others speak of $NPBN_DATA
            assert "$" not in prose, path
    page = (site / "npbn" / "functional" / "batch_norm.html").read_text("utf-8")
    assert "<mfrac><mrow><mi>&#x003B3;</mi></mrow><mrow><mi>s</mi></mrow></mfrac>" in page
    assert '<div class="boxed"><math' in page  # MathML has no boxes


def test_bad_places_for_the_site_are_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run("build_docs.py", "file", cwd=tmp_path), "build_docs.py: error:", "file")
