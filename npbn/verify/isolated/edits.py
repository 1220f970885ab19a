"""Find a small change of wrong code that makes it right. The change shows where the mistake is.

The syntax tree of the code is changed at one place, compiled, run on the probes (small random
inputs), and changed back. Then the next change is tried. A change is reported only if it makes all
outputs right on all probes, and also on other random inputs (the confirming probes). No other hint
is given, because a wrong hint is worse than none.

The changes (`Changes`) repair common mistakes: ``=`` where ``+=`` is needed, a wrong sign, a factor
too many or too few, eps outside of the root, a wrong order of the cache or of the results, a window
whose ends lack the stride, a slice ``[p:-p]``, which is empty if p is 0. Changes that alter the
length of the text least are tried first.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npbn.verify.isolated.loading import time_limit

RIGHT = 1e-6
"""The largest error of a right output, relative to its largest element."""
SECONDS_OF_A_RUN = 1.0
"""How long the changed code may run on a probe, in seconds."""
MOST_CANDIDATES = 20_000
"""The largest number of changes of one function that are tried."""
BEAM = 8
"""The number of partial repairs that are combined with every other change, to find pairs."""

Outputs = Mapping[str, np.ndarray]
Run = Callable[[int], Outputs]


@dataclass(frozen=True)
class Change:
    """A change of a statement. By itself or with other changes, it makes wrong code right.

    Attributes:
        line: the number of the line.
        before, after: the statement, and the statement after the change.
        reason: what the change does, or an empty text.
    """

    line: int
    before: str
    after: str
    reason: str = ""

    def shown(self, hint: str = "edit") -> str:
        """Return the change as a text; the hint is "edit", "reason" or "line"."""
        if hint == "line":
            return f"line {self.line}"
        if hint == "reason":
            return f"line {self.line}: {self.reason or 'a small change is missing'}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"line {self.line}: `{self.before}` → `{self.after}`{reason}"


@dataclass(frozen=True)
class Edit:
    """The changes that together make the code right, and the number of changes that were tried."""

    changes: tuple[Change, ...]
    tried: int


@dataclass
class Candidate:
    """A change of the syntax tree.

    Attributes:
        places: for each change of a node: the node, the name of the field that changes, the index
            in this field (None if the field is no list), and the new value.
        statements: the statements that change, each with the statement that replaces it, or None if
            only a part of the statement changes.
        tier: the rank of the kind of change. Of changes of equal length, a lower tier comes first.
        reason: what the change does, or an empty text.
    """

    places: list[tuple[Any, str, int | None, Any]]
    statements: list[tuple[ast.stmt, Any]]
    tier: int
    reason: str = ""
    length: int = 0
    texts: list[tuple[int, str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Change the syntax tree in a ``with`` block, and change it back at the end."""
        before = []
        for node, name, index, new in self.places:
            if index is None:
                before.append(getattr(node, name))
                setattr(node, name, new)
            else:
                before.append(getattr(node, name)[index])
                getattr(node, name)[index] = new
        try:
            yield
        finally:
            for (node, name, index, _), old in reversed(
                list(zip(self.places, before, strict=True))
            ):
                if index is None:
                    setattr(node, name, old)
                else:
                    getattr(node, name)[index] = old

    def measure(self) -> None:
        """Set ``texts``, the changed statements, and ``length``, the change of their length."""
        if not self.texts:
            old = [_text(statement) for statement, _ in self.statements]
            with self.applied():
                new = [_text(after or statement) for statement, after in self.statements]
            self.texts = [
                (statement.lineno, a, b)
                for (statement, _), a, b in zip(self.statements, old, new, strict=True)
                if a != b
            ]
        self.length = sum(abs(len(b) - len(a)) for _, a, b in self.texts)

    def changes(self) -> tuple[Change, ...]:
        """Return the changes as texts."""
        return tuple(Change(line, a, b, self.reason) for line, a, b in self.texts)


def _text(statement: ast.stmt) -> str:
    """Return the source of a statement, or only its first line if it has a body."""
    return ast.unparse(statement).split("\n")[0]


@dataclass
class Unit:
    """A function of the module, or a method: its syntax tree and the function object."""

    node: ast.FunctionDef
    function: types.FunctionType
    owner: ast.ClassDef | None

    def compiled(self, path: str) -> types.CodeType | None:
        """Return the compiled code of the present syntax tree, or None if it cannot be compiled."""
        whole: ast.stmt = self.node
        if self.owner is not None:
            whole = ast.ClassDef(self.owner.name, [], [], [self.node], [])
            ast.copy_location(whole, self.owner)
        module = ast.Module([whole], [])
        with contextlib.suppress(SyntaxError, ValueError, TypeError):
            ast.fix_missing_locations(module)
            return _inner(compile(module, path, "exec"), self.node.name)
        return None


def _inner(code: types.CodeType, name: str) -> types.CodeType | None:
    """Return the code object of a function of this name that is inside another code object."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if constant.co_name == name:
                return constant
            found = _inner(constant, name)
            if found is not None:
                return found
    return None


def search(
    module: types.ModuleType,
    source: str,
    run: Run,
    truth: Sequence[Outputs],
    confirming: int,
    *,
    seconds: float = 3.0,
    pair_seconds: float = 0.0,
) -> Edit | None:
    """Return the changes that make wrong code right, or None.

    Args:
        module: the module of the code.
        source: its source.
        run: a function of an index k. It runs the present code on probe k and returns the outputs.
        truth: for each probe (input), the right outputs.
        confirming: the number of confirming probes, which are the last ones.
        seconds: the time limit for single changes.
        pair_seconds: the time limit for pairs of changes, which are tried after single ones.
    """
    with np.errstate(all="ignore"):
        found = Search(module, source, run, truth, confirming, seconds)
        return found.singles(seconds) or (found.pairs(pair_seconds) if pair_seconds else None)


class Search:
    """The search for changes in a module. The constructor itself may take up to ``seconds``."""

    def __init__(
        self,
        module: types.ModuleType,
        source: str,
        run: Run,
        truth: Sequence[Outputs],
        confirming: int,
        seconds: float,
    ) -> None:
        self.path, self.run, self.truth = str(module.__file__), run, truth
        self.last = len(truth) - confirming
        self.tried = 0
        self.seen: set[Any] = set()
        units = _units(module, ast.parse(source))
        self.lines: set[int] = set()
        self.scores = [self._traced(k) for k in range(self.last)]
        # Probes on which the code is wrong come first, because most changes fail there.
        self.order = sorted(range(self.last), key=lambda k: self.scores[k] == 0)
        self.wrong = any(score > 0 for score in self.scores)
        self.units = [u for u in units if self.lines & set(_lines(u.node))]
        functions = [unit.node for unit in units]
        self.candidates = [
            (unit, candidate)
            for unit in self.units
            for candidate in itertools.islice(
                Changes(unit.node, functions, self.lines).all(), MOST_CANDIDATES
            )
        ]
        self.candidates.sort(key=lambda pair: pair[1].tier)
        end = time.monotonic() + seconds
        for _, candidate in self.candidates:
            if time.monotonic() > end:
                break  # Candidates without texts are not tried.
            candidate.measure()
        self.candidates = [pair for pair in self.candidates if pair[1].texts]
        self.candidates.sort(key=lambda pair: (pair[1].tier // 10, pair[1].length, pair[1].tier))

    def _traced(self, k: int) -> float:
        """Run the code on a probe, note which lines are executed, and return the score."""

        def trace(frame: types.FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename != self.path:
                return None
            self.lines.add(frame.f_lineno)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            return self.score(k)
        finally:
            sys.settrace(before)

    def score(self, k: int) -> float:
        """Return how wrong the present code is on a probe. The score of right code is 0."""
        try:
            with time_limit(SECONDS_OF_A_RUN):
                found = self.run(k)
            return sum(_wrong(found.get(name), right) for name, right in self.truth[k].items())
        except (Exception, SystemExit):
            return 1e9

    def _right(self) -> bool:
        """Return whether the present code is right on all probes."""
        confirming = range(self.last, len(self.truth))
        return all(self.score(k) == 0 for k in itertools.chain(self.order, confirming))

    @contextlib.contextmanager
    def _with(self, unit: Unit, candidate: Candidate) -> Iterator[bool]:
        """Change a function in a ``with`` block.

        Yields True if the changed function can be compiled and was not tried before.
        """
        with candidate.applied():
            code = unit.compiled(self.path)
        fits = code is not None and code.co_freevars == unit.function.__code__.co_freevars
        if code is None or not fits:
            yield False
            return
        key = (
            unit.node.name,
            unit.owner,
            code.co_code,
            str(code.co_consts),
            code.co_names,
            code.co_varnames,
        )
        new = key not in self.seen
        self.seen.add(key)
        before = unit.function.__code__
        unit.function.__code__ = code
        try:
            yield new
        finally:
            unit.function.__code__ = before

    def singles(self, seconds: float) -> Edit | None:
        """Return the first single change that makes the code right."""
        end = time.monotonic() + seconds
        if not self.wrong:
            return None
        for unit, candidate in self.candidates:
            if time.monotonic() > end:
                return None
            with self._with(unit, candidate) as new:
                if not new:
                    continue
                self.tried += 1
                if self._right():
                    return Edit(candidate.changes(), self.tried)
        return None

    def pairs(self, seconds: float) -> Edit | None:
        """Return the first pair of changes that makes the code right.

        The first change of a pair must improve some score and worsen none.
        """
        end = time.monotonic() + seconds
        partial: list[tuple[float, int, Unit, Candidate]] = []
        self.seen.clear()
        for number, (unit, candidate) in enumerate(self.candidates):
            if time.monotonic() > end - seconds / 2:
                break
            with self._with(unit, candidate) as new:
                if not new:
                    continue
                scores = [self.score(k) for k in range(self.last)]
            if (
                all(a <= b for a, b in zip(scores, self.scores, strict=True))
                and scores != self.scores
            ):
                partial.append((sum(scores), number, unit, candidate))
        for _, _, unit, first in sorted(partial, key=lambda found: found[:2])[:BEAM]:
            self.seen.clear()
            with first.applied(), self._with(unit, Candidate([], [], 0)):
                for other, second in self.candidates:
                    if time.monotonic() > end:
                        return None
                    if {id(p[0]) for p in first.places} & {id(p[0]) for p in second.places}:
                        continue
                    with self._with(other, second) as new:
                        if not new:
                            continue
                        self.tried += 1
                        if self._right():
                            return Edit(first.changes() + second.changes(), self.tried)
        return None


def _wrong(found: Any, right: np.ndarray) -> float:
    """Return the fraction of wrong elements, or a large number if the shape is wrong."""
    if found is None:
        return 1e8
    found = np.asarray(found)
    if found.shape != right.shape or found.dtype.kind not in "fiub":
        return 1e6
    scale = float(np.max(np.abs(right), initial=0.0)) or 1.0
    good = np.abs(found - right) <= RIGHT * scale
    return float(1 - np.mean(good)) if good.size else 0.0


def _units(module: types.ModuleType, tree: ast.Module) -> list[Unit]:
    """Return the functions and methods of a module."""
    found = []
    for node in tree.body:
        value = getattr(module, getattr(node, "name", ""), None)
        if isinstance(node, ast.FunctionDef) and isinstance(value, types.FunctionType):
            found.append(Unit(node, value, None))
        elif isinstance(node, ast.ClassDef) and isinstance(value, type):
            for inner in node.body:
                method = value.__dict__.get(_mangled(node, inner))
                if isinstance(inner, ast.FunctionDef) and isinstance(method, types.FunctionType):
                    found.append(Unit(inner, method, node))
    return [unit for unit in found if not unit.node.decorator_list]


def _mangled(owner: ast.ClassDef, node: ast.stmt) -> str:
    name = getattr(node, "name", "")
    private = name.startswith("__") and not name.endswith("__")
    return f"_{owner.name.lstrip('_')}{name}" if private else name


def _lines(node: ast.FunctionDef) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


Parent = tuple[ast.AST, str, int | None]
"""The parent of a node, the name of the parent's field, and the index in the field or None."""


class Changes:
    """All changes that are tried in one function.

    Args:
        function: the function.
        functions: all functions of the file.
        lines: the numbers of the lines that were executed. Other lines are not changed.
    """

    def __init__(
        self, function: ast.FunctionDef, functions: Sequence[ast.FunctionDef], lines: set[int]
    ) -> None:
        self.function, self.functions = function, functions
        self.parents: dict[int, Parent] = {}
        self.statement: dict[int, ast.stmt] = {}
        self.nodes: list[ast.AST] = []
        for index, statement in enumerate(function.body):
            self.parents[id(statement)] = (function, "body", index)
            self._walk(statement, statement)
        self.nodes = [
            node
            for node in self.nodes
            if set(range(self.statement[id(node)].lineno, self._end(node) + 1)) & lines
        ]
        names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        self.arguments = [a.arg for a in function.args.args if a.arg != "self"]
        self.names = [
            n for n in sorted(names | set(self.arguments)) if n not in ("np", "range", "self")
        ]
        self.attributes = sorted(
            {
                n.attr
                for f in functions
                for n in ast.walk(f)
                if isinstance(n, ast.Attribute)
                and isinstance(n.value, ast.Name)
                and n.value.id == "self"
            }
        )

    def _end(self, node: ast.AST) -> int:
        statement = self.statement[id(node)]
        body = getattr(statement, "body", None)
        return body[0].lineno - 1 if body else statement.end_lineno or statement.lineno

    def _walk(self, node: ast.AST, statement: ast.stmt) -> None:
        self.nodes.append(node)
        self.statement[id(node)] = statement
        for name, value in ast.iter_fields(node):
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, ast.AST) and not isinstance(child, ast.expr_context):
                    self.parents[id(child)] = (
                        node,
                        name,
                        index if isinstance(value, list) else None,
                    )
                    self._walk(child, child if isinstance(child, ast.stmt) else statement)

    def all(self) -> Iterator[Candidate]:
        """Yield all changes, each of one node, and the changes of several equal nodes at once."""
        together: dict[tuple[str, str], list[Candidate]] = {}
        for node in self.nodes:
            for new, tier, reason in self._replacements(node):
                candidate = self._candidate([(node, new)], tier, reason)
                yield candidate
                if isinstance(new, ast.AST):
                    key = (ast.dump(node), ast.dump(new))
                    together.setdefault(key, []).append(candidate)
        for twins in together.values():
            if len(twins) > 1:
                places = [place for twin in twins for place in twin.places]
                statements = list({id(s[0]): s for t in twins for s in t.statements}.values())
                yield Candidate(places, statements, twins[0].tier, twins[0].reason)
        yield from self._assignments_together()
        yield from self._axes_together()
        yield from self._loops_together()
        yield from self._returns_in_loops()

    def _candidate(
        self, pairs: Sequence[tuple[ast.AST, Any]], tier: int, reason: str = ""
    ) -> Candidate:
        places, statements = [], {}
        for node, new in pairs:
            if isinstance(new, ast.stmt):
                ast.copy_location(new, node)
            places.append((*self.parents[id(node)], new))
            statement = self.statement[id(node)]
            statements[id(statement)] = (statement, new if statement is node else None)
        return Candidate(places, list(statements.values()), tier, reason)

    def _replacements(self, node: ast.AST) -> Iterator[tuple[Any, int, str]]:
        """Yield the nodes that may replace a node, each with its tier and reason."""
        if isinstance(node, ast.BinOp):
            yield from self._operations(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield node.operand, 1, "a sign too many"
        elif isinstance(node, ast.Constant):
            yield from self._constants(node)
        elif isinstance(node, ast.Call):
            yield from self._calls(node)
        elif isinstance(node, ast.Subscript):
            yield from self._subscripts(node)
        elif isinstance(node, ast.Attribute) and node.attr == "T":
            yield node.value, 3, "transposed"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            for kind in (ast.Gt, ast.GtE, ast.Lt, ast.LtE):
                yield ast.Compare(node.left, [kind()], node.comparators), 25, ""
        elif isinstance(node, ast.Assign):
            yield from self._assigns(node)
        elif isinstance(node, ast.AugAssign):
            opposite = {ast.Add: ast.Sub, ast.Sub: ast.Add}.get(type(node.op))
            if opposite is not None:
                yield ast.AugAssign(node.target, opposite(), node.value), 2, "the other sign"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield from self._returns(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield from self._names(node)
        if isinstance(node, ast.expr) and self._is_value(node):
            yield from self._values(node)

    def _is_value(self, node: ast.expr) -> bool:
        """Return whether a statement assigns or returns an expression, by itself or in a tuple."""
        parent, name, _ = self.parents[id(node)]
        if isinstance(parent, ast.Tuple):
            above = self.parents.get(id(parent))
            return (
                above is not None
                and isinstance(above[0], ast.Return | ast.Assign)
                and above[1] == "value"
            )
        return isinstance(parent, ast.Return | ast.Assign | ast.AugAssign) and name == "value"

    def _operations(self, node: ast.BinOp) -> Iterator[tuple[Any, int, str]]:
        if isinstance(node.op, ast.Mult | ast.Div | ast.FloorDiv):
            yield node.left, 0, "a factor too many"
        if isinstance(node.op, ast.Mult):
            yield node.right, 0, "a factor too many"
        if isinstance(node.op, ast.Add | ast.Sub):
            other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield ast.BinOp(node.left, other, node.right), 1, "the other sign"
            yield node.left, 2, "a term too many"
            yield node.right, 2, "a term too many"
            # √v + eps becomes √(v + eps).
            if isinstance(node.left, ast.Call) and len(node.left.args) == 1:
                inner = ast.BinOp(node.left.args[0], node.op, node.right)
                yield ast.Call(node.left.func, [inner], node.left.keywords), 2, "inside of the root"
        if isinstance(node.op, ast.Mult):
            yield ast.BinOp(node.left, ast.Div(), node.right), 21, ""
        if isinstance(node.op, ast.Div):
            yield ast.BinOp(node.left, ast.Mult(), node.right), 21, ""
        if isinstance(node.op, ast.Pow):
            yield node.left, 2, "a power too many"
        if isinstance(node.op, ast.MatMult):
            yield ast.BinOp(node.right, ast.MatMult(), node.left), 22, ""

    def _constants(self, node: ast.Constant) -> Iterator[tuple[Any, int, str]]:
        parent, name, _ = self.parents[id(node)]
        if type(node.value) is int:
            for change in (1, -1):
                if node.value + change >= 0 or getattr(parent, "arg", "") == "axis":
                    yield ast.Constant(node.value + change), 10, ""
            if isinstance(parent, ast.keyword) and parent.arg == "axis":
                for axis in ((0, 2, 3), None):
                    yield ast.Constant(axis) if axis is None else _tuple(axis), 4, "the other axes"
        elif type(node.value) is bool:
            yield ast.Constant(not node.value), 4, ""

    def _calls(self, node: ast.Call) -> Iterator[tuple[Any, int, str]]:
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        swap = {"sum": "mean", "mean": "sum"}.get(name)
        if isinstance(function, ast.Attribute) and swap is not None:
            text = f"a {swap}, not a {name}"
            yield _with(node, func=ast.Attribute(function.value, swap, ast.Load())), 1, text
        if name in ("sum", "mean", "max") and not any(k.arg == "axis" for k in node.keywords):
            for axis in (0, (0, 2, 3), 1):
                value = ast.Constant(axis) if isinstance(axis, int) else _tuple(axis)
                new = [*node.keywords, ast.keyword("axis", value)]
                yield _with(node, keywords=new), 3, "the axis is missing"
        for k, keyword in enumerate(node.keywords):
            if keyword.arg == "keepdims":
                yield (
                    _with(node, keywords=node.keywords[:k] + node.keywords[k + 1 :]),
                    2,
                    "keepdims",
                )
        if name == "sqrt" and len(node.args) == 1:
            for eps in self._small():
                inner = ast.BinOp(node.args[0], ast.Add(), eps)
                yield _with(node, args=[inner]), 1, "eps is missing in the root"
        if len(node.args) == 1 and not node.keywords and name not in ("range", "len"):
            yield node.args[0], 4, "a call too many"
        if isinstance(function, ast.Attribute) and name in (
            "reshape",
            "transpose",
            "copy",
            "astype",
        ):
            yield function.value, 4, "a call too many"

    def _small(self) -> Iterator[ast.expr]:
        for name in self.names:
            if "eps" in name.lower():
                yield ast.Name(name, ast.Load())
        for name in self.attributes:
            if "eps" in name.lower():
                yield ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())

    def _subscripts(self, node: ast.Subscript) -> Iterator[tuple[Any, int, str]]:
        if isinstance(node.ctx, ast.Load):
            yield node.value, 4, "an index too many"
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        new = [self._whole(node, axis, part) for axis, part in enumerate(parts)]
        if any(a is not b for a, b in zip(new, parts, strict=True)):
            reason = "a slice [p:-p] is empty where p is 0"
            yield ast.Subscript(node.value, _joined(node.slice, new), node.ctx), 0, reason
        strides = [n for n in self.names if n.lower() in ("s", "stride", "strides")]
        strides += [f"self.{n}" for n in self.attributes if "stride" in n]
        for stride in strides:
            factor = ast.parse(stride, mode="eval").body
            new = [_strided(part, factor) for part in parts]
            if any(a is not b for a, b in zip(new, parts, strict=True)):
                reason = "a window begins at the index times the stride"
                yield ast.Subscript(node.value, _joined(node.slice, new), node.ctx), 3, reason

    @staticmethod
    def _whole(node: ast.Subscript, axis: int, part: ast.expr) -> ast.expr:
        """Return a slice [p:-p] as [p:size - p], and other slices as they are."""
        if not isinstance(part, ast.Slice) or not isinstance(part.upper, ast.UnaryOp):
            return part
        if part.lower is None or not isinstance(part.upper.op, ast.USub):
            return part
        shape = ast.Attribute(copy.deepcopy(node.value), "shape", ast.Load())
        size = ast.Subscript(shape, ast.Constant(axis), ast.Load())
        for inner in ast.walk(size):
            if hasattr(inner, "ctx"):
                inner.ctx = ast.Load()
        return ast.Slice(part.lower, ast.BinOp(size, ast.Sub(), part.upper.operand), part.step)

    def _assigns(self, node: ast.Assign) -> Iterator[tuple[Any, int, str]]:
        target = node.targets[0]
        if isinstance(target, ast.Subscript):
            reason = "several values belong to the same place: they must be added"
            yield self._summed(node), 0, reason
        elif isinstance(target, ast.Name) and self._in_loop(node):
            yield self._summed(node), 6, "the values must be added"
        if isinstance(target, ast.Tuple) and len(target.elts) > 1:
            reason = "unpacked in another order than packed"
            by_name = {getattr(e, "id", ""): e for e in target.elts}
            packed = self._packed(set(by_name))
            if packed:
                new = ast.Tuple([by_name[name] for name in packed], ast.Store())
                yield ast.Assign([new], node.value), 1, reason
            for i, j in itertools.combinations(range(min(len(target.elts), 8)), 2):
                elements = list(target.elts)
                elements[i], elements[j] = elements[j], elements[i]
                yield ast.Assign([ast.Tuple(elements, ast.Store())], node.value), 7, reason

    @staticmethod
    def _summed(node: ast.Assign) -> ast.AugAssign:
        """Return an assignment ``a = b`` as ``a += b``."""
        target: Any = node.targets[0]
        return ast.AugAssign(target, ast.Add(), node.value)

    def _packed(self, names: set[str]) -> list[str]:
        """Return these names in the order of a tuple in another function, or an empty list."""
        for function in self.functions:
            for node in ast.walk(function):
                if function is not self.function and isinstance(node, ast.Tuple):
                    found = [getattr(e, "id", "") for e in node.elts]
                    if set(found) == names and len(found) == len(names):
                        return found
        return []

    def _in_loop(self, node: ast.AST) -> bool:
        while id(node) in self.parents:
            node = self.parents[id(node)][0]
            if isinstance(node, ast.For | ast.While):
                return True
        return False

    def _returns(self, node: ast.Return) -> Iterator[tuple[Any, int, str]]:
        if isinstance(node.value, ast.Tuple):
            count = len(node.value.elts)
            for order in itertools.permutations(range(count)) if count <= 4 else ():
                if order != tuple(range(count)):
                    new = ast.Tuple([node.value.elts[k] for k in order], ast.Load())
                    yield ast.Return(new), 2, "the results are returned in another order"

    def _names(self, node: ast.Name) -> Iterator[tuple[Any, int, str]]:
        for eps in self._small():
            if (ast.unparse(eps) != node.id and "var" in node.id.lower()) or node.id in ("v", "V"):
                yield ast.BinOp(node, ast.Add(), eps), 4, "eps is missing"
        parent, _, _ = self.parents[id(node)]
        if isinstance(parent, ast.Call) and getattr(parent.func, "id", "") == "range":
            yield ast.BinOp(node, ast.Add(), ast.Constant(1)), 6, ""
            yield ast.BinOp(node, ast.Sub(), ast.Constant(1)), 6, ""
        for other in self.names:
            if other != node.id:
                yield ast.Name(other, ast.Load()), 30, ""

    def _values(self, node: ast.expr) -> Iterator[tuple[Any, int, str]]:
        """Yield changes of an assigned or returned value: its sign, a factor, its shape."""
        yield ast.UnaryOp(ast.USub(), node), 2, "the wrong sign"
        values: list[ast.expr] = [ast.Name(name, ast.Load()) for name in self.names]
        for name in self.attributes:
            values.append(ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load()))
        for value in values:
            yield ast.BinOp(node, ast.Mult(), value), 11, "a factor is missing"
            yield ast.BinOp(node, ast.Div(), value), 12, "a divisor is missing"
            shape = ast.Attribute(value, "shape", ast.Load())
            call = ast.Call(ast.Attribute(node, "reshape", ast.Load()), [shape], [])
            yield call, 13, "the shape is another"
        for axis in range(4):
            for value in values:
                size = ast.Subscript(
                    ast.Attribute(value, "shape", ast.Load()), ast.Constant(axis), ast.Load()
                )
                if isinstance(node, ast.BinOp | ast.Name):
                    yield size, 14, "the size is another"
                if axis == 0:
                    yield ast.BinOp(node, ast.Div(), size), 14, "the divisor N is missing"
        if not isinstance(node, ast.Tuple):
            yield ast.Attribute(node, "T", ast.Load()), 11, "not transposed"

    def _assignments_together(self) -> Iterator[Candidate]:
        """Yield the change of all assignments ``a[i] = b`` in loops to ``a[i] += b``."""
        found = [
            node
            for node in self.nodes
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Subscript)
            and self._in_loop(node)
        ]
        if len(found) > 1:
            pairs = [(n, self._summed(n)) for n in found]
            reason = "several values belong to the same place: they must be added"
            yield self._candidate(pairs, 1, reason)

    def _axes_together(self) -> Iterator[Candidate]:
        """Yield the change that adds the same axis to all sums and means of a function."""
        found = [
            node
            for node in self.nodes
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("sum", "mean")
            and not node.keywords
            and len(node.args) == (getattr(node.func.value, "id", "") == "np")
        ]
        for axis in (0, (0, 2, 3)):
            value = ast.Constant(axis) if isinstance(axis, int) else _tuple(axis)
            pairs = [(n, _with(n, keywords=[ast.keyword("axis", value)])) for n in found]
            if len(pairs) > 1:
                yield self._candidate(pairs, 3, "the axis is missing")

    def _loops_together(self) -> Iterator[Candidate]:
        """Yield changes that make two nested loops run over the height and width of an array."""
        loops = [
            node.iter.args[0]
            for node in self.nodes
            if isinstance(node, ast.For)
            and isinstance(node.iter, ast.Call)
            and getattr(node.iter.func, "id", "") in ("range", "xrange")
            and len(node.iter.args) == 1
        ]
        for name in self.arguments:
            for first, second in itertools.pairwise(loops):
                for axes in ((2, 3), (1, 2)):
                    shape = ast.Attribute(ast.Name(name, ast.Load()), "shape", ast.Load())
                    new = [ast.Subscript(shape, ast.Constant(k), ast.Load()) for k in axes]
                    reason = "a loop visits another number of places"
                    yield self._candidate([(first, new[0]), (second, new[1])], 8, reason)

    def _returns_in_loops(self) -> Iterator[Candidate]:
        """Yield the change that takes a return out of its loops."""
        for node in self.nodes:
            if not isinstance(node, ast.Return) or not self._in_loop(node):
                continue
            place: ast.AST = node
            while place not in self.function.body:
                place = self.parents[id(place)][0]
            index = self.function.body.index(place)
            body = [*self.function.body[: index + 1], node, *self.function.body[index + 1 :]]
            parent, name, _ = self.parents[id(node)]
            rest = [s for s in getattr(parent, name) if s is not node] or [ast.Pass()]
            places: list[tuple[Any, str, int | None, Any]] = [
                (parent, name, None, rest),
                (self.function, "body", None, body),
            ]
            candidate = Candidate(places, [], 1, "the function returns within its loop")
            text = _text(node)
            candidate.texts = [(node.lineno, text, f"{text}, after the loops")]
            yield candidate


def _with(node: ast.Call, **changed: Any) -> ast.Call:
    """Return a call with some of its parts changed."""
    new = ast.Call(node.func, node.args, node.keywords)
    for name, value in changed.items():
        setattr(new, name, value)
    return new


def _tuple(values: Sequence[int]) -> ast.Tuple:
    return ast.Tuple([ast.Constant(value) for value in values], ast.Load())


def _joined(index: ast.expr, parts: list[ast.expr]) -> ast.expr:
    """Return an index of these parts: a tuple if ``index`` is a tuple, else the only part."""
    return ast.Tuple(parts, ast.Load()) if isinstance(index, ast.Tuple) else parts[0]


def _strided(part: ast.expr, factor: ast.expr) -> ast.expr:
    """Return a slice i:i + k as i * stride:i * stride + k, and other parts as they are."""
    if not isinstance(part, ast.Slice) or not isinstance(part.lower, ast.Name):
        return part
    upper = part.upper
    if not isinstance(upper, ast.BinOp) or not isinstance(upper.op, ast.Add):
        return part
    begin = ast.BinOp(part.lower, ast.Mult(), factor)
    names = [side for side in (upper.left, upper.right) if ast.dump(side) == ast.dump(part.lower)]
    if not names:
        return part
    size = upper.right if names[0] is upper.left else upper.left
    return ast.Slice(begin, ast.BinOp(begin, ast.Add(), size), part.step)
