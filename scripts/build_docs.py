"""Build the site of npbn's docstrings, with their formulas, by pdoc."""

from __future__ import annotations

from _command_line import ArgumentParser, run, say

# isort: split

import importlib.util
import pkgutil
import warnings
from pathlib import Path

import npbn
from npbn.errors import NpbnError


def main() -> None:
    parser = ArgumentParser(prog="build_docs.py", description=__doc__)
    parser.add_argument(
        "output", nargs="?", default="site", metavar="DIR", help="folder to write (default: site)"
    )
    output = Path(parser.parse_args().output)
    if importlib.util.find_spec("pdoc") is None:
        raise NpbnError("pdoc is not installed: pip install 'pdoc>=15'")
    import pdoc.render

    for name in npbn.__all__:
        getattr(npbn, name)  # pdoc sees only what has been imported
    modules = ["npbn"] + [
        module.name
        for module in pkgutil.walk_packages(npbn.__path__, "npbn.")
        if not module.name.rpartition(".")[2].startswith("_")
    ]
    pdoc.render.configure(math=True, docformat="google", footer_text=f"npbn {npbn.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a page that lacks something
        # Most packages list their modules themselves, but not those with an __all__.
        warnings.filterwarnings("ignore", "The module specification .* already been added")
        # The constructors of named tuples, whose annotations pdoc looks up in the wrong module.
        warnings.filterwarnings("ignore", r"Error parsing type annotation .*\.__init__")
        try:
            pdoc.pdoc(*modules, output_directory=output)
        except OSError as error:
            raise NpbnError(f"{output} cannot be written: {error.strerror}") from None
    say(f"{len(modules)} modules; open {output / 'index.html'}")


if __name__ == "__main__":
    run("build_docs.py", main)
