"""Build npbn's documentation as a site: the pages that pdoc makes of docstrings, and the lessons.

The site needs no network. Its formulas are MathML, which browsers show without a script.
"""

from __future__ import annotations

from _command_line import ArgumentParser, run, say

# isort: split

import functools
import html
import importlib
import importlib.util
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import npbn
from npbn.errors import NpbnError

SCRIPTS = Path(__file__).parent
LESSONS = sorted((SCRIPTS / "lessons").glob("[0-9]*.py"))
# This matches code, in which dollar signs mark no formulas, and the formulas $$ … $$ and $ … $.
MATH = re.compile(r"(<pre.*?</pre>|<code.*?</code>)|\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


def main() -> None:
    parser = ArgumentParser(prog="build_docs.py", description=__doc__)
    parser.add_argument(
        "output", nargs="?", default="site", metavar="DIR", help="folder to write (default: site)"
    )
    output = Path(parser.parse_args().output)
    for name in ("pdoc", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            raise NpbnError(f"{name} is not installed: pip install -e '.[docs]'")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pdoc warns about a page that is incomplete.
        # pdoc adds most modules of a package without being asked, but not in a package that has an
        # __all__.
        warnings.filterwarnings("ignore", "The module specification .* already been added")
        # pdoc looks up the annotations of named tuples' constructors in the wrong module.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .*\.__init__")
        try:
            count = build(output)
        except OSError as error:
            raise NpbnError(f"{output} cannot be written: {error.strerror}") from None
    say(f"{count} modules, {len(LESSONS)} lessons; open {output / 'index.html'}")


def build(output: Path) -> int:
    """Write the site; return the number of modules in it."""
    import pdoc.render
    import pdoc.search

    for name in npbn.__all__:
        getattr(npbn, name)  # pdoc sees only modules that have been imported.
    modules = ["npbn"] + [
        module.name
        for module in pkgutil.walk_packages(npbn.__path__, "npbn.")
        if not module.name.rpartition(".")[2].startswith("_")
    ]
    for name in modules:
        without_aliases(importlib.import_module(name))

    def pages_near(module: str) -> tuple[str, list[tuple[str, str]]]:
        """Return the title and the entries of the list of modules on a module's page.

        The entries are the modules in a package or, for a module that is no package, the modules
        next to it. An entry is the name and the page of a module.
        """
        package, _, own = module.rpartition(".")
        within = [name for name in modules if name.rpartition(".")[0] == module]
        names = within or [name for name in modules if name.rpartition(".")[0] == package]
        short = [name.rpartition(".")[2] for name in names]
        pages = [f"{own}/{name}.html" if within else f"{name}.html" for name in short]
        return f"In {module if within else package}", list(zip(short, pages, strict=True))

    environment: Any = pdoc.render.env
    pdoc.render.configure(
        docformat="google",
        footer_text=f"npbn {npbn.__version__}",
        template_directory=SCRIPTS / "page_templates",
    )
    environment.filters["to_html"] = to_html
    vars(pdoc.search)["to_html"] = to_html
    environment.globals["pages_near"] = pages_near
    pdoc.pdoc(*modules, output_directory=output)

    (output / "lessons").mkdir(exist_ok=True)
    titles = {path: cells(path)[0][1].splitlines()[0].removeprefix("# ") for path in LESSONS}
    for path in LESSONS:
        page = environment.get_template("lesson.html.jinja2").render(
            name=path.stem,
            title=titles[path],
            lessons=[(path.stem, title) for path, title in titles.items()],
            body="\n".join(
                to_html(text if kind == "markdown" else f"```python\n{text}\n```")
                for kind, text in cells(path)
            ),
        )
        (output / "lessons" / f"{path.stem}.html").write_text(page, encoding="utf-8")
    return len(modules)


def cells(path: Path) -> list[tuple[str, str]]:
    """Return the cells of a lesson as pairs of a kind, "markdown" or "code", and a text."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [
        ("markdown", re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE))
        if header
        else ("code", text.strip())
        for header, text in zip(parts[::2], parts[1::2], strict=True)
    ]


@functools.cache
def to_html(text: str) -> Any:
    """Return Markdown as HTML, with its formulas as MathML.

    The result has an attribute ``toc_html``, as the result of pdoc's function ``to_html`` has.
    """
    import pdoc.render_helpers
    from latex2mathml.converter import convert

    def replace(match: re.Match[str]) -> str:
        code, display, inline = match.groups()
        if code:
            return str(code)
        formula = html.unescape(re.sub(r"</?em>", "*", display or inline))
        boxed = re.fullmatch(r"\s*\\boxed\{(.*)\}\s*", formula, re.DOTALL)  # MathML has no boxes.
        mathml = convert(boxed[1] if boxed else formula, display="block" if display else "inline")
        return f'<div class="boxed">{mathml}</div>' if boxed else str(mathml)

    plain: Any = pdoc.render_helpers.to_html(text)
    result: Any = type(plain)(MATH.sub(replace, plain))
    result.toc_html = plain.toc_html
    return result


def without_aliases(module: Any) -> None:
    """Delete the docstrings that Python adds to named tuples: "Alias for field number 0"."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, tuple):
            value.__new__.__doc__ = ""
            for name in getattr(value, "_fields", ()):
                getattr(value, name).__doc__ = ""


if __name__ == "__main__":
    run("build_docs.py", main)
