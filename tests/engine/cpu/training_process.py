"""A process that trains by the fused engine for `test_compilation`, and says how that went.

    training_process.py [forks]

prints JSON: ``losses``, every bit of them; ``compiled``, how many functions Numba has compiled;
``lines``, what the engine reported; ``layer``, what starts its threads. With "forks" also what
becomes of training in a process that is forked from it, ``forked``, and in one that
multiprocessing spawns, ``spawned``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys

import numpy as np
from models import TINY, a_split, a_tiny_model

from npbn.engine.cpu import CpuEngine
from npbn.optim import SGD


def losses(report=None) -> list[str]:
    """Of three steps, in hexadecimal."""
    model, split = a_tiny_model(), a_split(TINY, 20, 1)
    optimizer = SGD(model.parameters(), 0.1)
    engine = CpuEngine(model, optimizer, split, split, batch_size=8, threads=2, report=report)
    return [float(result.loss).hex() for result in engine.steps(np.arange(20))]


def in_a_fork() -> str:
    """What training raises there: the error's name and its message."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            message = f"trained: {losses()}"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


def main(forks: bool) -> None:
    import numba
    from numba.core import event

    compiled, lines = [], []

    class Listener(event.Listener):
        def on_start(self, event):
            compiled.append(event.data["dispatcher"])

        def on_end(self, event):
            pass

    with event.install_listener("numba:compile", Listener()):
        found = {"losses": losses(lines.append)}
    found |= {"compiled": len(compiled), "lines": lines, "layer": numba.threading_layer()}
    if forks:
        found["forked"] = in_a_fork()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["spawned"] = pool.apply(losses)
    print(json.dumps(found))


if __name__ == "__main__":
    main("forks" in sys.argv)
