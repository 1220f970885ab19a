"""Examine a file of other people's code in a separate process.

The code may crash, hang, print or exit without harm to the examiner's process. The process of the
code gets inputs, which are drawn after it has loaded the file, and sends outputs back. The process
of the examiner judges them, so the code's process has no right outputs before the verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npbn.errors import SubmissionError
from npbn.verify import numeric
from npbn.verify.examination import (
    Examination,
    Facts,
    Outputs,
    Ran,
    difference,
    examine,
    given,
    meant_results,
    upstream,
)
from npbn.verify.isolated.edits import Change
from npbn.verify.operations import KINKS, NOT_SQUARE, OPERATIONS, Layout, Operation, Probe, probes
from npbn.verify.session import EndedError, Session, printable

_ARGUMENT = {"y": "dy", "moving_mean": "moving_mean", "moving_var": "moving_var"}
"""For outputs that are no gradients, the argument that has the same layout of arrays."""
DIRECTIONS = 2
"""The number of random directions in which each gradient is compared with a numeric derivative."""


def examine_file(
    path: str | os.PathLike[str],
    forward: str,
    backward: str,
    operation: str,
    *,
    adapter: str | None = None,
    timeout: float = 60.0,
    seed: int | None = None,
    edit_seconds: tuple[float, float] = (0.0, 0.0),
) -> Examination:
    """Examine two functions, or a class, of a file of Python code or of a notebook.

    Args:
        path: the path of the file.
        forward, backward: the names of the functions. The two names are equal if the forward pass
            also returns the gradient (softmax_loss), or if the code is a class.
        operation: the operation that the code should compute, a name in
            `npbn.verify.operations.OPERATIONS`.
        adapter: "FILE:FUNCTION", for code whose arguments are not recognized. The function gets
            the forward and the backward function, and returns two functions with npbn's arguments;
            see `npbn.verify.isolated.calling`.
        timeout: the time limit for each call, in seconds.
        seed: the seed of the inputs. By default, the inputs differ each time.
        edit_seconds: how many seconds to search for an edit that makes wrong code right, and how
            many seconds to search for two such edits.

    Raises:
        SubmissionError: the code cannot be examined because the file or a function does not exist,
            or because the adapter does not work.
        ValueError: the operation is unknown.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"expected an operation of {', '.join(OPERATIONS)}, got {operation!r}")
    if not os.path.isfile(path):
        raise SubmissionError(f"{path} is not a file")
    if Path(path).suffix not in (".py", ".ipynb"):
        raise SubmissionError(
            f"{path} is no Python file and no notebook: its name ends in neither .py nor .ipynb"
        )
    with Session(path, timeout) as session:
        return examine_in(
            session,
            forward,
            backward,
            operation,
            adapter=adapter,
            seed=seed,
            edit_seconds=edit_seconds,
        )


def examine_in(
    session: Session,
    forward: str,
    backward: str,
    operation: str,
    *,
    adapter: str | None = None,
    seed: int | None = None,
    asks: frozenset[str] = frozenset(),
    promised: Sequence[Callable[[Probe], bool]] = (),
    edit_seconds: tuple[float, float] = (0.0, 0.0),
) -> Examination:
    """Examine two functions, or a class, of a file that a session has loaded.

    Args:
        session: the session.
        forward, backward, operation, adapter, seed: as in `examine_file`.
        asks: what the assignment asks beyond the usual; see `Probe.beyond`.
        promised: functions that say whether a probe is among the inputs that the assignment
            promises; see `npbn.verify.operations.PROMISES`.
        edit_seconds: as in `examine_file`.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    try:
        return _examine(
            session, forward, backward, operation, adapter, seed, asks, promised, edit_seconds
        )
    except EndedError as error:
        return Examination(operation, "could not be run", complaints=(f"it {error}",))


def _examine(
    session: Session,
    forward: str,
    backward: str,
    operation: str,
    adapter: str | None,
    seed: int,
    asks: frozenset[str],
    promised: Sequence[Callable[[Probe], bool]],
    edit_seconds: tuple[float, float],
) -> Examination:
    session.ensure_started()
    if session.failure:
        return Examination(operation, "could not be loaded", complaints=(f"it {session.failure}",))
    for name in (forward, backward):
        if name not in session.names:
            # Often, the statement that defines the function could not be executed.
            why = f" ({'; '.join(session.notes[:3])})" if session.notes else ""
            raise SubmissionError(f"{session.path.name} has no function {name}{why}")
    beyond = {
        probe.name: probe.beyond
        for probe in probes(operation, seed)
        if probe.beyond not in {"", *asks}
    }
    beyond |= {
        probe.name: f"what the assignment does not ask ({probe.name})"
        for probe in probes(operation, seed)
        if not all(keeps(probe) for keeps in promised)
    }

    def run(old: bool) -> tuple[Conversation, dict[str, Ran], Examination]:
        conversation = Conversation(session, forward, backward, operation, adapter, seed, old)
        results = conversation.run_probes()
        return conversation, results, examine(operation, results, conversation.facts, seed, beyond)

    conversation, results, found = run(old=False)
    if found.verdict == "could not be run" and conversation.looks_old():
        again = run(old=True)
        if again[-1].verdict != "could not be run":
            conversation, results, found = again
    if found.verdict == "wrong" and "y" in found.wrong:
        conversation.compare_with_differences()
        found = examine(operation, results, conversation.facts, seed, beyond)
    depends = bool(conversation.facts.state)  # The search for edits looks at single calls.
    if found.verdict == "wrong" and edit_seconds[0] > 0 and not depends:
        changes = conversation.search_edits(results, set(beyond), edit_seconds)
        found = dataclasses.replace(found, changes=changes)
    return found


class _FailedError(Exception):
    """The error that is raised if the code fails on a probe, with the `Ran` of this probe."""

    def __init__(self, result: Ran) -> None:
        super().__init__()
        self.result = result


@dataclass
class Call:
    """The result of a call of the forward pass.

    Attributes:
        outputs: the outputs by name, in npbn's layout.
        number: the number by which the process of the code knows this call.
        order: the names of the gradients in the order of the arguments of the forward pass.
        skipped: why the code is not meant for this input, or an empty text.
        explicit: whether the code has an argument for the mode, training or prediction, or an
            adapter.
    """

    outputs: Outputs
    number: int
    order: list[str]
    skipped: str = ""
    explicit: bool = False


@dataclass
class Conversation:
    """The examination of one operation in a file: the requests to the process that runs the file.

    Args:
        session: the process that has loaded the file.
        forward, backward, operation, adapter, seed: as in `examine_file`.
        old: whether the file runs as old code, with the names and the behaviour of Python 2 and of
            NumPy before 2.4.
    """

    session: Session
    forward: str
    backward: str
    operation: str
    adapter: str | None
    seed: int
    old: bool = False
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        self.record: Operation = OPERATIONS[self.operation]
        self.kind = "class" if self.session.names[self.forward] == "class" else "function"
        self.layouts: dict[int, Layout] = {}
        self.facts.notes += self.session.notes
        if self.old:
            self.facts.notes.append("it was run as Python 2 and NumPy before 2.4 would run it")
        self.facts.is_class = self.kind == "class"
        self.raised: list[str] = []
        self.slow = False  # whether a backward pass ended the process or was too slow
        self.select()

    def select(self) -> None:
        """Tell the process which functions are examined. It starts again if it has ended."""
        self.session.ensure_started()
        request: dict[str, Any] = {
            "do": "select",
            "forward": self.forward,
            "backward": self.backward,
            "gradients": [self.role(name) for name in self.record.gradients],
            "by_name": self.adapter is not None,
            "adapter": "",
            "old": self.old,
        }
        arrays = {}
        if self.adapter:
            file = Path(self.adapter.rpartition(":")[0])
            if not file.is_file():
                raise SubmissionError(
                    f"expected FILE:FUNCTION for the adapter, got {self.adapter!r}"
                )
            name = self.adapter.rpartition(":")[2]
            request["adapter"] = f"{file.resolve()}:{name}"
            arrays["adapter"] = np.frombuffer(file.read_bytes(), np.uint8)
        answer = self._understood(self.session.ask(request, arrays)[0])
        if answer.get("dictionary") and self.kind == "function":
            self.kind = "course"

    def role(self, output: str) -> str:
        """Return the name of a gradient of npbn in other people's code: "dx" for "dlogits"."""
        name = output.removeprefix("d")
        return f"d{self.record.roles[name]}" if name in self.record.roles else output

    def looks_old(self) -> bool:
        """Return whether the errors are typical of code for old versions of Python and NumPy.

        Examples are a float as an index or as a size, and an array of one element as a number.
        """
        words = [
            *("as an integer", "must be integers", "slice indices", "sequence of integers"),
            *("only 0-dimensional", "array element with a sequence", "only integers, slices"),
            *("Cannot cast array data", "has no attribute 'iter"),
        ]
        return any(word in text for text in self.raised for word in words)

    # Requests.

    def _understood(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of a process, or raise an error if the answer tells of a failure."""
        if "adapter" in answer:
            raise SubmissionError(f"the adapter raised {printable(answer['adapter'])}")
        if "not examined" in answer:
            raise _FailedError(Ran(skipped=printable(answer["not examined"])))
        if "not called" in answer:
            text = f"could not be called: {printable(answer['not called'])}"
            raise _FailedError(Ran(failure=text, uncalled=True))
        if "needs" in answer:
            raise _FailedError(Ran(failure=printable(answer["needs"]), needs=True))
        if "failed" in answer:
            text = printable(answer["failed"])
            raise _FailedError(Ran(failure=text, unwritten=text.startswith("returned None")))
        if "raised" in answer:
            text = printable(answer["raised"])
            self.raised.append(text)
            refusal = bool(answer.get("refusal"))
            unwritten = refusal and text.startswith("NotImplementedError")
            unwritten = unwritten or (self.session.has_gaps and _of_a_gap(text))
            raise _FailedError(Ran(failure=f"raised {text}", refusal=refusal, unwritten=unwritten))
        return answer

    def _ask(self, request: dict[str, Any], arrays: Outputs) -> tuple[dict[str, Any], Outputs]:
        """Send a request, and return the values and arrays of the answer.

        Arrays of integers and booleans are converted to float64.
        """
        answer, found = self.session.ask(request, arrays)
        return self._understood(answer), {name: _floating(a) for name, a in found.items()}

    def _arguments(self, probe: Probe, layout: Layout) -> tuple[dict[str, Any], Outputs]:
        """Return the arguments of a probe: numbers and texts by name, and arrays by name."""
        values: dict[str, Any] = dict(self.record.constants)
        arrays = {}
        for name, value in probe.arguments.items():
            role = self.record.roles.get(name, name)
            if isinstance(value, np.ndarray):
                arrays[role] = layout.arguments.get(name, _same)(value)
            else:
                values[role] = value
        return values, arrays

    def call(self, probe: Probe, layout: Layout, again: int | None = None) -> Call:
        """Call the forward pass on a probe (an input).

        If ``again`` is the number of an earlier call of a class, the same instance is used again.
        """
        values, arrays = self._arguments(probe, layout)
        request = {"do": "forward", "values": values, "again": again}
        answer, found = self._ask(request, arrays)
        outputs: Outputs = {
            name: layout.outputs.get(name, _same)(found[name])
            for name in ("y", "moving_mean", "moving_var")
            if name in found and (name == "y" or name in probe.arguments)
        }
        for name in outputs.keys() & {"moving_mean", "moving_var"}:
            shape = probe.arguments[name].shape  # The code may keep moving averages in any shape.
            if outputs[name].size == math.prod(shape):
                outputs[name] = outputs[name].reshape(shape)
        number = answer.get("call")
        if "y" not in outputs or type(number) is not int:
            raise EndedError("gave no result")
        y = outputs["y"]
        if self.record.loss and y.ndim and y.size == 1:
            outputs["y"] = y.reshape(())
        self.facts.changed |= dict.fromkeys(_names(answer.get("changed")))
        taken = set(_names(answer.get("taken")))
        self.facts.taken |= dict.fromkeys(taken)
        self.facts.unknown |= dict.fromkeys(_names(answer.get("unknown")))
        return Call(
            outputs,
            number,
            _names(answer.get("order")),
            "" if self.adapter else _unasked(probe, taken, y.shape, self._shape(probe)),
            self.adapter is not None or (self.kind == "function" and "training" in taken),
        )

    def _shape(self, probe: Probe) -> tuple[int, ...]:
        """Return the shape of the right output."""
        return given(self.operation, (), self.seed)[probe.name]["y"].shape

    def gradients(self, probe: Probe, layout: Layout, call: Call) -> Outputs:
        """Call the backward pass for a call of the forward pass; return the gradients by name."""
        arrays = {}
        if not self.record.loss:
            dy = upstream(self.seed, call.outputs["y"].shape)
            arrays["dy"] = layout.arguments.get("dy", _same)(dy)
        answer, found = self._ask({"do": "backward", "call": call.number}, arrays)
        self.facts.changed |= dict.fromkeys(_names(answer.get("changed")))
        self.facts.without_dy = bool(answer.get("without dy"))
        names = list(self.record.gradients)
        if answer.get("named"):
            back = {self.role(name): name for name in names}
            named = {back[role]: value for role, value in found.items() if role in back}
        else:
            named = self._in_order(probe, layout, found, call.order, answer.get("count"))
        missing = [name for name in names if name not in named]
        if missing == names:
            raise _FailedError(Ran(failure="returned None from backward", unwritten=True))
        self.facts.missing |= dict.fromkeys(missing)
        if self.adapter:  # An adapter may return a vector where gamma is 4-D.
            shapes = {name: np.shape(probe.arguments[name.removeprefix("d")]) for name in named}
            named = {
                name: a.reshape(shapes[name]) if a.size == math.prod(shapes[name]) else a
                for name, a in named.items()
            }
        return {name: layout.outputs.get(name, _same)(value) for name, value in named.items()}

    def _in_order(
        self, probe: Probe, layout: Layout, found: Outputs, order: list[str], count: Any
    ) -> Outputs:
        """Return the gradients by name, for code that returns them as a sequence.

        The order is npbn's, or that of the forward pass's arguments if more shapes fit that order.
        """
        names = list(self.record.gradients)
        if count != len(names):
            text = f"expected {len(names)} gradients ({', '.join(names)})"
            got = printable(count)
            raise _FailedError(Ran(failure=f"returned {got} from backward, {text}"))
        places = [k for k in range(len(names)) if str(k) in found]
        other = [name for role in order for name in names if self.role(name) == role]
        if sorted(other) == sorted(names) and other != names:

            def fits(order: list[str]) -> int:
                return sum(
                    layout.outputs.get(order[k], _same)(found[str(k)]).shape
                    == probe.arguments[order[k].removeprefix("d")].shape
                    for k in places
                )

            if fits(other) > fits(names):
                names = other
                self.facts.order = other
        return {names[k]: found[str(k)] for k in places}

    # Probes.

    def layout(self, probe: Probe) -> Layout:
        """Return the layout of the code's arrays. It is found by trying the known layouts."""
        x = probe.arguments[next(iter(probe.arguments))]
        group = x.ndim if self.record.map_layouts else 0
        if group in self.layouts:
            return self.layouts[group]
        layouts = self.record.map_layouts if group == 4 else self.record.layouts
        if self.adapter:
            layouts = (Layout(),)
        right = given(self.operation, (), self.seed)[probe.name]
        facts, self.facts = self.facts, Facts()  # Observations with a wrong layout do not count.
        tried: list[tuple[float, int, int, Layout]] = []
        unasked = False  # A probe that the code is not meant for says nothing about its layout.
        for k, layout in enumerate(layouts):
            if self.kind not in layout.kinds:
                continue
            # The best layout has the smallest error of the output, then the fewest gradients of a
            # wrong shape.
            error, misfits = 4.0, 0
            try:
                call = self.call(probe, layout)
                y = call.outputs["y"]
                unasked = unasked or bool(call.skipped)
                error = 2.0
                if self.record.loss and y.ndim <= 1:  # A scalar, or one loss for each example
                    means = y.mean(), y.sum(), y.sum() / len(x)
                    error = round(min(1.0, *(difference(mean, right["y"]) for mean in means)), 1)
                elif y.shape == right["y"].shape:
                    error = round(min(1.0, difference(y, right["y"])), 1)
                if error < 0.5:
                    misfits = 9  # if backward fails
                    gradients = self.gradients(probe, layout, call)
                    misfits = sum(gradients[n].shape != right[n].shape for n in gradients)
            except _FailedError as failed:
                if failed.result.skipped and "argument" in failed.result.skipped:
                    break
            except EndedError:
                self.session.start()
                self.select()
            tried.append((error, misfits, k, layout))
            if error < 0.05 and misfits == 0:
                break
        self.facts = facts
        tried.sort(key=lambda found: found[:3])
        best = tried[0][3] if tried else layouts[0]
        if not unasked:
            self.layouts[group] = best
        return best

    def run_probes(self) -> dict[str, Ran]:
        """Run the code on each probe (input). Return the results by the names of the probes."""
        results: dict[str, Ran] = {}
        self.layouts = {}
        for k, probe in enumerate(probes(self.operation, self.seed)):
            try:
                result = self._run(probe, self.layout(probe), check_state=k == 0)
            except EndedError as error:
                result = Ran(failure=str(error), ended=True)
            results[probe.name] = result
            if result.ended:
                if not result.outputs:  # The other probes would probably end in the same way.
                    break
                self.session.start()
                if self.session.failure:
                    break
                self.select()
        return results

    def _run(self, probe: Probe, layout: Layout, check_state: bool) -> Ran:
        try:
            call = self.call(probe, layout)
        except _FailedError as failed:
            if self.kind == "class" and probe.beyond == NOT_SQUARE:
                return Ran(skipped="it takes one size of the kernel")
            return failed.result
        if call.skipped:
            return Ran(skipped=call.skipped)
        result = Ran(dict(call.outputs), layout=layout.name)
        if probe.arguments.get("training") is False and not call.explicit:
            result.skipped = "homework has no backward pass in prediction"
            return result
        if self.slow:
            result.skipped = "backward was too slow"
            return result
        try:
            gradients = self.gradients(probe, layout, call)
            result.outputs |= gradients
            if check_state:
                self._check_state(probe, layout, call, gradients)
        except _FailedError as failed:
            result = dataclasses.replace(failed.result, outputs=result.outputs, layout=layout.name)
        except EndedError as error:
            result.failure, result.ended, self.slow = str(error), True, True
        return result

    def _check_state(self, probe: Probe, layout: Layout, call: Call, gradients: Outputs) -> None:
        """Call forward and backward again in several ways, and note which results then differ."""
        second = self.call(probe, layout)
        if not _equal(second.outputs, call.outputs):
            self.facts.state = "two calls of forward with equal inputs give different outputs"
            return
        others = [p for p in probes(self.operation, self.seed)[1:] if _same_kind(p, probe)]
        if others:
            with contextlib.suppress(_FailedError):
                self.call(others[0], layout)
        try:
            after = self.gradients(probe, layout, second)
        except _FailedError:
            after = {}
        if not _equal(after, gradients):
            self.facts.state = (
                "the gradients of equal calls differ: something is kept from one call to the next"
            )
            return
        try:
            if self.kind == "class":
                second = self.call(probe, layout, again=second.number)
            after = self.gradients(probe, layout, second)
        except _FailedError:
            after = {}
        if not _equal(after, gradients):
            self.facts.notes.append(
                "a second pass through the same object gives other gradients"
                if self.kind == "class"
                else "a second call of backward with the same cache gives other gradients"
            )

    # The search for edits.

    def search_edits(
        self, results: Mapping[str, Ran], beyond: Set[str], seconds: tuple[float, float]
    ) -> tuple[Change, ...]:
        """Return changes that make the code right on all probes, or an empty tuple.

        The process of the code searches for them. It also confirms them on probes of another seed.
        """
        results = meant_results(self.operation, results, self.facts, self.seed)
        arrays: dict[str, Any] = {}
        values: list[dict[str, Any]] = []
        for seed in (self.seed, self.seed + 1):
            right = given(self.operation, self.facts.base, seed, self.facts.fixed)
            for probe in probes(self.operation, seed):
                result = results.get(probe.name)
                if result is None or result.refusal or probe.name in beyond:
                    continue
                if result.skipped and not result.outputs:
                    continue
                truth = right.get(probe.name)
                if truth is None:
                    continue
                k = len(values)
                layout = self.layout(probe)
                here, given_arrays = self._arguments(probe, layout)
                values.append(here)
                arrays |= {f"{k}/{role}": value for role, value in given_arrays.items()}
                if not self.record.loss:
                    dy = upstream(seed, truth["y"].shape)
                    arrays[f"{k}/dy"] = layout.arguments.get("dy", _same)(dy)
                for name, value in truth.items():
                    if name.startswith("moving") and name not in result.outputs:
                        continue  # The code has no moving averages.
                    if (result.skipped or result.unwritten) and name in self.record.gradients:
                        continue
                    change = layout.arguments.get(_ARGUMENT.get(name, name.removeprefix("d")))
                    arrays[f"{k}/{self.role(name)} is right"] = (change or _same)(value)
            if seed == self.seed:
                count = len(values)
        request = {
            "do": "search",
            "values": values,
            "confirming": len(values) - count,
            "order": [self.role(name) for name in self.facts.order or self.record.gradients],
            "seconds": seconds[0],
            "pair_seconds": seconds[1],
        }
        timeout, self.session.timeout = self.session.timeout, 5 * sum(seconds) + 30
        try:
            answer = self._understood(self.session.ask(request, arrays)[0])
            return tuple(
                Change(int(line), printable(before), printable(after), printable(reason))
                for line, before, after, reason in answer["changes"][:10]
            )
        except (_FailedError, EndedError, KeyError, TypeError, ValueError):
            return ()
        finally:
            self.session.timeout = timeout

    # Question 1: is the backward pass the gradient of its own forward pass?

    def compare_with_differences(self) -> None:
        """Compare the gradients with numeric derivatives of the code's own forward pass.

        The result is ``facts.own_gradient``. Nothing is noted if all calls together take longer
        than the time limit for one call.
        """
        verdicts: dict[str, bool] = {}
        end = time.monotonic() + self.session.timeout
        generator = np.random.default_rng(self.seed)
        for probe in probes(self.operation, self.seed):
            edge = probe.beyond or probe.name in KINKS
            if edge or probe.arguments.get("training") is False:
                continue
            layout = self.layout(probe)
            try:
                call = self.call(probe, layout)
                if call.skipped:
                    continue
                gradients = self.gradients(probe, layout, call)
                for name, gradient in gradients.items():
                    x = probe.arguments[name.removeprefix("d")]
                    if gradient.shape != x.shape or x.dtype.kind != "f":
                        verdicts[name] = False
                        continue
                    for _ in range(DIRECTIONS):
                        if time.monotonic() > end:
                            return
                        verdicts[name] = verdicts.get(name, True) and self._agrees(
                            probe, layout, name, gradient, generator.standard_normal(x.shape)
                        )
            except (_FailedError, EndedError):
                return
        if verdicts:
            self.facts.own_gradient = verdicts

    def _agrees(
        self, probe: Probe, layout: Layout, name: str, gradient: np.ndarray, direction: np.ndarray
    ) -> bool:
        argument = name.removeprefix("d")

        def function(x: np.ndarray) -> np.ndarray:
            moved = Probe(probe.name, probe.arguments | {argument: x})
            y = self.call(moved, layout).outputs["y"]
            if y.dtype.kind != "f":
                raise _FailedError(Ran(failure=f"returned numbers of the dtype {y.dtype}"))
            return y

        slopes, errors = numeric.extrapolated(function, probe.arguments[argument], direction)
        dy = np.ones(slopes.shape) if self.record.loss else upstream(self.seed, slopes.shape)
        expected, computed = float(np.sum(slopes * dy)), float(np.sum(gradient * direction))
        scale = float(np.sum(np.abs(slopes * dy)))
        return abs(expected - computed) <= 1e-6 * scale + float(np.sum(errors * np.abs(dy)))


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _floating(a: np.ndarray) -> np.ndarray:
    """Convert integers, booleans and floats of more than 8 bytes to float64."""
    long = a.dtype.kind == "f" and a.dtype.itemsize > 8
    return a.astype(np.float64) if a.dtype.kind in "biu" or long else a


def _of_a_gap(text: str) -> bool:
    """Return whether an error is typical of a template with gaps such as ``x = None``."""
    return "NoneType" in text or text.startswith("NameError")


def _names(value: Any) -> list[str]:
    """Return a value from the process as a list of at most 20 short texts."""
    return [printable(name)[:40] for name in value[:20]] if isinstance(value, list) else []


def _equal(a: Outputs, b: Outputs) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=True) for k in a)


def _same_kind(a: Probe, b: Probe) -> bool:
    """Return whether two probes (inputs) have equally many dimensions and the same mode.

    The result is False if the first probe is harder than usual; see `Probe.beyond`.
    """
    first, second = (next(iter(p.arguments.values())) for p in (a, b))
    same = a.arguments.get("training") == b.arguments.get("training")
    return bool(first.ndim == second.ndim) and same and not a.beyond


def _unasked(probe: Probe, taken: set[str], shape: tuple[int, ...], right: tuple[int, ...]) -> str:
    """Return why code that lacks an argument is not meant for a probe (an input), or "".

    For example, code without an argument for padding is not meant for a probe with padding.

    Args:
        probe: the probe.
        taken: the arguments that the code takes, by npbn's names.
        shape: the shape of the output.
        right: the shape of the right output.
    """
    arguments = probe.arguments
    for name in ("weight", "gamma", "beta", "bias", "mask", "slope"):
        if name in arguments and name not in taken:
            return f"it has no argument and no attribute for {name}"
    if right == () and len(shape) == 2 and shape == arguments.get("logits", np.empty(0)).shape:
        return "it returns probabilities, and no loss"
    modes = {"training", "prediction", "mode"}
    if not arguments.get("training", True) and not taken & modes:
        return "it has no prediction mode"
    if "kernel_size" in arguments:
        sizes = {"kernel_size", "kernel_height", "kernel_width"}
        if not taken & sizes and arguments["kernel_size"] != (2, 2):
            return "it has no size of the window"
    if "stride" in arguments and "stride" not in taken:
        pool = "kernel_size" in arguments
        if shape != right if pool else arguments["stride"] != (1, 1):
            return "it has no stride"
    if "padding" in arguments and "padding" not in taken and arguments["padding"] != (0, 0):
        return "it has no padding"
    return ""
