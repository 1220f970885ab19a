"""Load a file of homework as its author had it.

Only imports, assignments and definitions of functions and classes are executed. The other
statements of a file are often a script that trains or asks for input. The cells of a notebook are
joined, without those that cannot be parsed.

- Modules beside the file are found, and so are packages that the file is a part of (``from .layers
  import *``, ``from common.functions import softmax``).
- A module that is not installed is replaced by a stand-in. If the code calls the stand-in later, it
  fails with `NeededError`, which names the module.
- CuPy is replaced by NumPy.
- Names that NumPy or Python have removed exist again: ``np.float``, ``xrange``. In a file for
  Python 2, ``print`` statements become calls, and ``/`` of two integers gives an integer.
- ``float(x)`` of an array with one element works, as it did before NumPy 2.4.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import re
import signal
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

SECONDS_OF_A_STATEMENT = 5.0
PICTURES = ("matplotlib", "pylab", "seaborn", "IPython", "tqdm", "PIL", "cv2")
"""Packages that gradients never need. They get stand-ins, because importing them takes long."""
LEVELS = 3
"""The number of folders, from that of the file upwards, in which imported packages are searched."""


class NeededError(Exception):
    """The error that is raised if code uses a module that is not installed."""


class Missing(types.ModuleType):
    """A stand-in for a module that is not installed, and for everything in it."""

    loading = True
    __all__: Sequence[str] = ()
    __path__ = ()  # type: ignore[assignment] # A package without folders.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")

    def __call__(self, *values: Any, **_: Any) -> Any:
        if not Missing.loading:
            raise NeededError(f"needs {self.__name__.partition('.')[0]}, which is not installed")
        # If the stand-in is used as a decorator, it returns the function.
        return values[0] if len(values) == 1 and callable(values[0]) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> Missing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A finder that has a stand-in for modules that homework imports.

    Args:
        root: the folder that contains the homework. Only imports by files below it get a stand-in,
            because an installed package may import a module only to test whether that exists.
        only: the packages that get a stand-in. None means all packages.
    """

    def __init__(self, root: str, only: Sequence[str] | None = None) -> None:
        self.root, self.only = root, only

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self.only is not None:
            known = fullname.partition(".")[0] in self.only
        else:
            frame = sys._getframe(1)
            while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            known = frame.f_code.co_filename.startswith(self.root)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Missing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Removed(importlib.abc.MetaPathFinder):
    """A finder that refuses to import npbn, because homework has to compute by itself."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "npbn":
            raise ImportError("npbn is the reference, and cannot be imported by homework")


def load(path: Path, content: bytes) -> tuple[types.ModuleType, str, list[str]]:
    """Execute a file. Return its module, its source, and notes on what was changed or failed.

    Args:
        path: the path that the file has or had.
        content: the bytes of the file.

    Raises:
        SyntaxError: the file is neither Python 3 nor, nearly, Python 2.
        ValueError: a notebook is damaged.
    """
    notes: list[str] = []
    source = notebook_source(content) if path.suffix == ".ipynb" else decoded(content)
    tree, source, old = parsed(source)
    if old:
        notes.append("it is written in Python 2")
    for name in ("float", "int", "bool", "object", "str"):
        if name not in np.__dict__:
            setattr(np, name, getattr(builtins, name))
    for name, value in {
        "xrange": range,
        "unicode": str,
        "raw_input": input,
        "reduce": functools.reduce,
    }.items():
        if not hasattr(builtins, name):
            setattr(builtins, name, value)
    if importlib.util.find_spec("six") is None:
        six, moves = types.ModuleType("six"), types.ModuleType("six.moves")
        moves.__dict__.update(
            {"xrange": range, "range": range, "zip": zip, "map": map, "input": input}
        )
        six.__dict__.update({"moves": moves})
        sys.modules |= {"six": six, "six.moves": moves}
    sys.modules["cupy"] = cupy_of_numpy()
    folders = [*path.parents][:LEVELS]
    sys.meta_path[:0] = [Removed(), StandIns("", PICTURES)]
    sys.meta_path.append(StandIns(str(folders[-1])))
    # A file of homework must not hide a module of Python that has the same name.
    at = next((k for k, p in enumerate(sys.path) if p.endswith("-packages")), len(sys.path))
    sys.path[at:at] = map(str, folders)
    name, package = module_name(path, tree)
    # Make the packages of the file without executing their __init__.py.
    parts = package.split(".") if package else []
    for k in range(len(parts)):
        above = types.ModuleType(".".join(parts[: k + 1]))
        above.__path__ = [str([*path.parents][len(parts) - 1 - k])]
        sys.modules[above.__name__] = above
    module = types.ModuleType(name)
    module.__file__, module.__package__ = str(path), package
    sys.modules[name] = module
    linecache.cache[str(path)] = (len(source), None, source.splitlines(keepends=True), str(path))
    if old:
        tree = ast.fix_missing_locations(Old().visit(tree))
        module.__dict__.update(Old.NAMES)
    execute(tree, module, notes)
    Missing.loading = False
    return module, source, notes


def cupy_of_numpy() -> types.ModuleType:
    """Return a module "cupy" with the functions of NumPy, so that no GPU is needed."""
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        vars(np) | {"asnumpy": np.asarray, "get_array_module": lambda *_: np, "__name__": "cupy"}
    )
    return cupy


def decoded(content: bytes) -> str:
    """Return the text of a file in UTF-8 or, if it is not UTF-8, in Latin-1."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def notebook_source(content: bytes) -> str:
    """Return the code of a notebook, without the lines that are commands of IPython."""
    try:
        cells = json.loads(content)["cells"]
        codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"damaged notebook: {error}") from None
    kept = []
    for code in codes:
        if code.lstrip().startswith("%%"):
            continue
        # Commands are `%name ...`, `!program ...`, `?name` and `name?`. In a cell without commands,
        # a line may begin with % and go on with an expression.
        commands = r"^([ \t]*)(?:%{1,2}[A-Za-z].*|[!?].*|[\w.*]+\?+[ \t]*)$"
        for text in (code, re.sub(commands, r"\1pass", code, flags=re.M)):
            with contextlib.suppress(SyntaxError):  # Leave out a cell that is not finished.
                parsed(text)
                kept.append(text)
                break
    return "\n\n".join(kept) + "\n"


def parsed(source: str) -> tuple[ast.Module, str, bool]:
    """Return the syntax tree of code, its source in Python 3, and whether it is in Python 2.

    Raises:
        SyntaxError: the code is neither Python 3 nor, nearly, Python 2.
    """
    try:
        return ast.parse(source), source, False
    except SyntaxError as error:
        new = python_3(source)
        try:
            return ast.parse(new), new, True
        except SyntaxError:
            raise error from None


def python_3(source: str) -> str:
    """Return code in Python 2 with its print statements and exceptions in Python 3's syntax."""
    source = source.expandtabs()
    source = re.sub(r"^(\s*)print[ \t]+(?P<what>[^\n=][^\n]*)$", _print, source, flags=re.M)
    source = re.sub(r"^(\s*)print[ \t]*$", r"\1print()", source, flags=re.M)
    source = re.sub(r"\bexcept\s+([\w.]+)\s*,\s*(\w+)\s*:", r"except \1 as \2:", source)
    source = re.sub(r"\braise\s+([\w.]+)\s*,\s*(.+)$", r"raise \1(\2)", source, flags=re.M)
    return source.replace("<>", "!=")


def _print(match: re.Match[str]) -> str:
    return f"{match[1]}print({match['what'].rstrip().rstrip(',')})"


def old_division(a: Any, b: Any) -> Any:
    """Divide as Python 2 does: the quotient of two integers is an integer."""
    whole = (int, np.integer)
    return a // b if isinstance(a, whole) and isinstance(b, whole) else a / b


def old_number(kind: type, value: Any) -> Any:
    """Convert an array of one element to a number, whatever its shape, as NumPy did before 2.4."""
    return kind(
        value.reshape(-1)[0] if isinstance(value, np.ndarray) and value.size == 1 else value
    )


def old_index(index: Any) -> Any:
    """Return a whole number of a float type as an integer, as NumPy did in indices before 1.12."""
    return int(index) if isinstance(index, float | np.floating) and index == int(index) else index


def old_element(value: Any) -> Any:
    """Return an array of one element as a 0-D array, as NumPy did in assignments before 2.4."""
    return value.reshape(()) if isinstance(value, np.ndarray) and value.size == 1 else value


class Old(ast.NodeTransformer):
    """Replace operations with functions that do what Python 2 and NumPy before 2.4 did."""

    NAMES: ClassVar = {
        "_old_division": old_division,
        "_old_number": old_number,
        "_old_element": old_element,
        "_old_index": old_index,
    }

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return self._call(node, "_old_division", [node.left, node.right])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if getattr(node.func, "id", "") in ("float", "int") and len(node.args) == 1:
            return self._call(node, "_old_number", [node.func, *node.args])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr in ("iteritems", "itervalues", "iterkeys"):
            node.attr = node.attr.removeprefix("iter")
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.slice, ast.Tuple):
            node.slice.elts = [self._index(part) for part in node.slice.elts]
        else:
            node.slice = self._index(node.slice)
        return node

    def _index(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Slice):
            for name in ("lower", "upper", "step"):
                bound = getattr(node, name)
                if bound is not None:
                    setattr(node, name, self._index(bound))
            return node
        starred = isinstance(node, ast.Starred)
        return node if starred else self._call(node, "_old_index", [node])

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Subscript):
            node.value = self._call(node.value, "_old_element", [node.value])
        return node

    @staticmethod
    def _call(node: ast.expr, name: str, values: list[ast.expr]) -> ast.expr:
        return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), values, []), node)


def as_before(module: types.ModuleType, source: str) -> None:
    """Execute a module's source again, with operations as in old Python and NumPy (`Old`)."""
    tree = ast.fix_missing_locations(Old().visit(ast.parse(source)))
    module.__dict__.update(Old.NAMES)
    execute(tree, module, [])


def module_name(path: Path, tree: ast.AST) -> tuple[str, str]:
    """Return the name of the module of a file and the name of its package.

    The package has as many parts as the file's relative imports need.
    """
    levels = [node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    depth = min(max(levels, default=0), LEVELS - 1)
    parts = [folder.name for folder in [*path.parents][:depth]][::-1]
    return ".".join([*parts, path.stem]), ".".join(parts)


def execute(tree: ast.Module, module: types.ModuleType, notes: list[str]) -> None:
    """Execute the definitions of a file. If a statement raises an error, a note says so."""
    for statement in tree.body:
        if not defines(statement):
            continue
        code = compile(ast.Module([statement], []), str(module.__file__), "exec")
        try:
            with time_limit(SECONDS_OF_A_STATEMENT):
                exec(code, module.__dict__)
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            notes.append(f"line {statement.lineno} was left out: {type(error).__name__}: {text}")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a ``with`` block that takes longer than some seconds.

    If the system has no alarm signals, as on Windows, there is no limit.
    """

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def defines(statement: ast.stmt) -> bool:
    """Return whether a statement of a file defines something that functions may need."""
    if isinstance(statement, ast.If | ast.Try):
        return not is_main(statement) and any(map(defines, statement.body))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    return isinstance(statement, kinds)


def is_main(statement: ast.stmt) -> bool:
    """Return whether a statement is an ``if`` like ``if __name__ == "__main__"``."""
    return isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test)


def line_of(error: BaseException, path: str) -> int | None:
    """Return the number of the innermost line of a file in an error's traceback, or None."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def describe(error: BaseException, path: str) -> str:
    """Return the class and the message of an error, and the line of a file that raised it."""
    text, line = " ".join(str(error).split())[:300], line_of(error, path)
    if isinstance(error, SyntaxError) and error.lineno:
        text, line = str(error.msg), error.lineno
    return type(error).__name__ + f": {text}" * bool(text) + f", line {line}" * (line is not None)
