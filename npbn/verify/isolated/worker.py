"""The process in which other people's code runs: it answers the requests of `npbn.verify.session`.

The code can do anything to this process, and can send wrong answers. But it cannot send right
answers without computing them, because the inputs are drawn after the code has been loaded, and the
results are judged in another process.
"""

from __future__ import annotations

import copy
import ctypes
import os
import signal
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npbn.verify.isolated import edits, loading
from npbn.verify.isolated.calling import BadResultError, Code, NotExaminedError, RaisedError
from npbn.verify.isolated.messages import MessageError, receive, send

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG = 1
MEMORY, FILE_SIZE, PROCESSES = 8 * 10**9, 10**8, 1000


def main() -> None:
    """Answer requests until the pipe ends."""
    # The pipes get other file descriptors. So the code cannot read or print messages by mistake.
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    isolate()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    worker = Worker()
    for name in [name for name in sys.modules if name.partition(".")[0] == "npbn"]:
        del sys.modules[name]
    while True:
        try:
            request, arrays = receive(requests)
        except MessageError:
            os._exit(0)
        try:
            answer = worker.answer(request, arrays)
        except MemoryError:
            answer = {"raised": "MemoryError"}, {}
        try:
            send(answers, *answer)
        except BrokenPipeError:
            os._exit(0)


def isolate() -> None:
    """Limit memory, files and processes. If the system allows it, take away the network."""
    if sys.platform != "linux" or not hasattr(os, "fork"):
        return
    import resource

    for kind, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if most < 0 else min(limit, most), most))
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = CLONE_NEWPID | CLONE_NEWNET
    if libc.unshare(spaces) != 0 and libc.unshare(spaces | CLONE_NEWUSER) != 0:
        return
    # The child is the first process of a new PID namespace. When it ends, all other processes of
    # this namespace end.
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        os._exit(os.WEXITSTATUS(status))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


Answer = tuple[Any, dict[str, Any]]
"""An answer: values for JSON, and arrays by name."""


class Worker:
    """The file of homework that was loaded, and the results of its forward passes."""

    def __init__(self) -> None:
        self.module = types.ModuleType("nothing")
        self.path = self.source = ""
        self.code: Code | None = None
        self.made: list[tuple[Any, Any]] = []
        self.adapter_path = ""

    def answer(self, request: Any, arrays: dict[str, np.ndarray]) -> Answer:
        """Return the answer to a request."""
        try:
            method: Callable[..., Answer] = getattr(self, request["do"])
            return method(arrays=arrays, **{k: v for k, v in request.items() if k != "do"})
        except NotExaminedError as error:
            return {"not examined": str(error) or "it is not meant for this"}, {}
        except BadResultError as error:
            return {"failed": str(error)}, {}
        except RaisedError as error:
            cause = error.__cause__
            assert cause is not None
            return self._raised(cause), {}
        except Exception as error:
            # The examined code has a class, or returned a value, that this module cannot handle.
            return {"not called": f"{type(error).__name__}: {error}"}, {}

    def _raised(self, error: BaseException) -> dict[str, Any]:
        if isinstance(error, loading.NeededError):
            return {"needs": str(error)}
        own = loading.line_of(error, self.path)
        if self.adapter_path and own is None and loading.line_of(error, self.adapter_path):
            return {"adapter": loading.describe(error, self.adapter_path)}
        if own is None and isinstance(error, TypeError):  # The code got wrong arguments.
            return {"not called": loading.describe(error, self.path)}
        # A statement of the code itself refuses this input.
        refusal = own is not None and isinstance(error, AssertionError | NotImplementedError)
        return {"raised": loading.describe(error, self.path), "refusal": refusal}

    def load(self, path: str, arrays: dict[str, np.ndarray]) -> Answer:
        """Load a file of homework; answer with its functions and classes by name, and notes."""
        self.path = path
        try:
            self.module, self.source, notes = loading.load(Path(path), arrays["content"].tobytes())
        except (Exception, SystemExit) as error:
            return {"failed": f"cannot be loaded: {loading.describe(error, path)}"}, {}
        found = {
            name: "class" if isinstance(value, type) else "function"
            for name, value in vars(self.module).items()
            if callable(value) and not isinstance(value, types.ModuleType)
        }
        return {"names": found, "notes": notes[:20]}, {}

    def select(
        self,
        forward: str,
        backward: str,
        gradients: list[str],
        by_name: bool,
        adapter: str,
        arrays: dict[str, np.ndarray],
        old: bool = False,
    ) -> Answer:
        """Choose the functions, or the class, that the next requests call."""
        if old:
            loading.as_before(self.module, self.source)
        pair = getattr(self.module, forward), getattr(self.module, backward)
        if adapter:
            file, _, name = adapter.rpartition(":")
            self.adapter_path = file
            # An adapter may import `npbn.verify.NotExaminedError`. So while it is loaded, modules
            # that have only this error stand in for npbn, which is not in this process.
            package, verify = types.ModuleType("npbn"), types.ModuleType("npbn.verify")
            verify.__dict__["NotExaminedError"] = NotExaminedError
            package.__dict__["verify"] = verify
            sys.modules |= {"npbn": package, "npbn.verify": verify}
            sys.path.insert(0, str(Path(file).parent))
            space: dict[str, Any] = {"__name__": "adapter", "__file__": file}
            try:
                exec(compile(arrays["adapter"].tobytes(), file, "exec"), space)
                if name not in space:
                    return {"adapter": f"AttributeError: it has no function {name}"}, {}
                pair = space[name](*pair)
            except (Exception, SystemExit) as error:
                return {"adapter": loading.describe(error, file)}, {}
            finally:
                del sys.modules["npbn"], sys.modules["npbn.verify"], sys.path[0]
        self.code = Code(*pair, gradients, by_name)
        self.made = []
        return {"dictionary": self.code.has_dictionary()}, {}

    def forward(
        self, values: dict[str, Any], arrays: dict[str, np.ndarray], again: int | None = None
    ) -> Answer:
        """Call the forward pass; answer with its outputs, and the number of this call.

        Args:
            values: the arguments that are no arrays, by role.
            arrays: the other arguments.
            again: the number of an earlier call whose instance of a class is to be used again.
        """
        assert self.code is not None
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        given |= {k: v[()] if v.ndim == 0 else v for k, v in arrays.items()}
        before = copy.deepcopy(given)
        instance = None if again is None else self.made[again][0]
        outputs, cache = self.code.forward(given, instance)
        changed = [k for k, v in arrays.items() if not np.array_equal(v, before[k])]
        self.made.append((cache, given | {"y": outputs["y"]}))
        order = self.code.order
        return {
            "call": len(self.made) - 1,
            "taken": sorted(self.code.taken),
            "changed": changed,
            "order": order,
            "unknown": [] if self.code.unknown is None else self.code.unknown.names,
        }, numeric(outputs)

    def backward(self, call: int, arrays: dict[str, np.ndarray]) -> Answer:
        """Call the backward pass; answer with the gradients."""
        assert self.code is not None
        cache, self.code.values = self.made[call]
        dy = arrays.get("dy")
        before = copy.deepcopy(dy)
        found = self.code.backward(dy, cache)
        same = dy is None or before is None or np.array_equal(dy, before)
        named = isinstance(found, dict)
        answer = {
            "named": named,
            "changed": [] if same else ["dy"],
            "count": len(found),
            "without dy": self.code.without_dy,
        }
        return answer, numeric(found if isinstance(found, dict) else dict(enumerate(found)))

    def search(
        self,
        values: list[dict[str, Any]],
        confirming: int,
        order: list[str],
        seconds: float,
        pair_seconds: float,
        arrays: dict[str, np.ndarray],
    ) -> Answer:
        """Search for edits that make the code right; answer with the changes.

        Args:
            values: for each probe, the arguments that are no arrays.
            confirming: the number of confirming probes, which are the last ones.
            order: the roles of the gradients in the order in which the code returns them.
            seconds, pair_seconds: the time limits for single edits, and for pairs of edits.
            arrays: the other arguments, the upstream gradients and the right outputs, with the
                number of the probe in their names.
        """
        assert self.code is not None
        probes: list[dict[str, np.ndarray]] = [{} for _ in values]
        truth: list[dict[str, np.ndarray]] = [{} for _ in values]
        for name, array in arrays.items():
            number, _, role = name.partition("/")
            output = role.removesuffix(" is right")
            (probes if output == role else truth)[int(number)][output] = array
        code = self.code

        def run(k: int) -> dict[str, np.ndarray]:
            given = {n: tuple(v) if isinstance(v, list) else v for n, v in values[k].items()}
            given |= {n: np.array(v) for n, v in probes[k].items() if n != "dy"}
            outputs, cache = code.forward(given)
            if not any(gradient in truth[k] for gradient in code.gradients):
                return numeric(outputs)
            dy = probes[k].get("dy")
            found = code.backward(None if dy is None else dy.copy(), cache)
            if isinstance(found, list):
                found = dict(zip(order, found, strict=False))
            return numeric(outputs | found)

        found = edits.search(
            self.module,
            self.source,
            run,
            truth,
            confirming,
            seconds=seconds,
            pair_seconds=pair_seconds,
        )
        changes = [] if found is None else found.changes
        return {"changes": [[c.line, c.before, c.after, c.reason] for c in changes]}, {}


def numeric(values: dict[Any, Any]) -> dict[str, np.ndarray]:
    """Return values as arrays of numbers or booleans. A value that is None is left out.

    Raises:
        BadResultError: a value cannot be converted to such an array.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if value is None:
            continue
        try:
            array = np.array(value)
        except (Exception, SystemExit):
            array = np.array(None)
        if array.dtype.kind not in "biufc":
            raise BadResultError(
                f"returned no numbers for {name if isinstance(name, str) else 'a gradient'}"
            )
        found[str(name)] = array
    return found
